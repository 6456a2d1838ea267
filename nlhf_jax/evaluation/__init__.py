# SPDX-License-Identifier: Apache-2.0
"""Who beats whom, how texts look, how cyclic the raters are, and the report page."""
