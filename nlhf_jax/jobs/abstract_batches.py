# SPDX-License-Identifier: Apache-2.0
"""Prompts and responses as shapes alone."""

import jax
import jax.numpy as jnp

from nlhf_jax.types import PromptBatch, Responses


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _bools(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def prompts_of(batch_size: int, length: int) -> PromptBatch:
    """Returns abstract prompts, [B, S]."""
    return PromptBatch(_ints(batch_size, length), _bools(batch_size, length))


def responses_of(batch_size: int, length: int) -> Responses:
    """Returns abstract responses, [B, T]."""
    return Responses(_ints(batch_size, length), _bools(batch_size, length))
