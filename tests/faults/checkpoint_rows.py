# SPDX-License-Identifier: Apache-2.0
"""Faults of checkpoints: killed while saving, damaged, without room, stalled."""

ROWS = ()
