# SPDX-License-Identifier: Apache-2.0
"""Who judges: learned pairwise and scalar models, and populations of raters."""
