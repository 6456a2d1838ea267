# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and go on: in several processes, and for an hour."""

ROWS = ()
