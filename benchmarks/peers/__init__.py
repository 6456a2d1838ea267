# SPDX-License-Identifier: Apache-2.0
"""Peers as sides: each imports its framework in a function, in its own environment."""
