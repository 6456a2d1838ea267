# SPDX-License-Identifier: Apache-2.0
"""Texts to batches: the only room that sees TensorFlow, seqio and TFDS."""
