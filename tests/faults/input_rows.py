# SPDX-License-Identifier: Apache-2.0
"""Faults of what is read: bad data, bad configuration, secrets."""

ROWS = ()
