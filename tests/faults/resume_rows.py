# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and go on, in one process and in several, for minutes and for an hour."""

ROWS = ()
