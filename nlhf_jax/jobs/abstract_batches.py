# SPDX-License-Identifier: Apache-2.0
"""Prompts, responses and parameters as shapes alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

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


def params_of(network: Any) -> PyTree:
    """Returns a network's abstract parameters."""
    return _made_by(network.init)


@functools.lru_cache(maxsize=64)
def _made_by(init: Callable[[jax.Array], PyTree]) -> PyTree:
    """Returns the shapes of what is made; to trace a large network takes seconds.

    Equal settings have equal functions, so the search for the largest batch finds them.
    """
    return jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
