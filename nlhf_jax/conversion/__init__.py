# SPDX-License-Identifier: Apache-2.0
"""Parameters between this package's names and layouts and other frameworks'."""
