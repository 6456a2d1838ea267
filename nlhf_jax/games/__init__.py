# SPDX-License-Identifier: Apache-2.0
"""Matrix games of preferences: where the truth is known exactly."""
