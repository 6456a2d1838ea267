# SPDX-License-Identifier: Apache-2.0
"""Networks; each file gives a `LanguageModel` of pure functions."""
