# SPDX-License-Identifier: Apache-2.0
"""Nash Learning from Human Feedback in JAX: policies that no other is preferred to."""

__version__ = "0.1.0"
