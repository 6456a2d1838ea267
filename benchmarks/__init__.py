# SPDX-License-Identifier: Apache-2.0
"""Speed as ratios: two ways to do the same work, measured in turns."""
