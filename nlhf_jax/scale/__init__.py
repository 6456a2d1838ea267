# SPDX-License-Identifier: Apache-2.0
"""What a step needs of a chip: compiled programs read, chips, plans, reports."""
