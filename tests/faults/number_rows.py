# SPDX-License-Identifier: Apache-2.0
"""Faults of numbers: what is not finite, and what metrics files show of it."""

ROWS = ()
