# SPDX-License-Identifier: Apache-2.0
"""Faults of hosts: processes that die, raise, hang, are told to stop or start wrong."""

ROWS = ()
