# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: queries and keys are turned by angles that grow with position.

Pair i of a head's K numbers is (x_i, x_{i + K/2}); it is turned by position * f_i, so
that a query and a key meet under an angle that their distance alone decides. N stands
for positions of prompt and response together, E for the K/2 frequencies.

Source: Su et al., 2021, arXiv 2104.09864, section 3.4.2, with pairs as in Llama.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nlhf_jax.decoder_settings import DecoderOnlySettings


class Rotation(NamedTuple):
    """Cosine and sine of every angle, float32; one entry per position and pair."""

    cosine_BNE: Float[Array, "B N E"]
    sine_BNE: Float[Array, "B N E"]


def plain_frequencies(head_dim: int, base: float) -> Float[np.ndarray, "E"]:
    """Returns f_i = base^(-2 i / K), in radians per position."""
    return base ** -(np.arange(0, head_dim, 2) / head_dim)


def stretched(
    frequencies_E: Float[np.ndarray, "E"], settings: DecoderOnlySettings
) -> Float[np.ndarray, "E"]:
    """Returns the frequencies after `rope_scaling`.

    "linear" divides all by the factor. "llama3" divides those that turn fewer than
    `low` times in `rope_original_length` positions, keeps those that turn more than
    `high` times, and mixes between:

        w = clip((turns - low) / (high - low), 0, 1),  f' = w f + (1 - w) f / factor

    Source: the released code of Llama 3.1.
    """
    slow_E = frequencies_E / settings.rope_factor
    if settings.rope_scaling == "none":
        return frequencies_E
    if settings.rope_scaling == "linear":
        return slow_E
    low = settings.rope_low_frequency_factor
    high = settings.rope_high_frequency_factor
    num_turns_E = settings.rope_original_length * frequencies_E / (2 * math.pi)
    kept_E = np.clip((num_turns_E - low) / (high - low), 0.0, 1.0)
    return kept_E * frequencies_E + (1 - kept_E) * slow_E


def layer_frequencies(
    settings: DecoderOnlySettings, is_local: bool
) -> Float[np.ndarray, "E"]:
    """Returns the frequencies of a local or a global layer."""
    if is_local and settings.local_rope_base:
        return plain_frequencies(settings.head_dim, settings.local_rope_base)
    plain_E = plain_frequencies(settings.head_dim, settings.rope_base)
    return stretched(plain_E, settings)


def rotation(
    positions_BN: Int[Array, "B N"], frequencies_E: Float[np.ndarray, "E"]
) -> Rotation:
    """Returns the angles' cosines and sines at these positions."""
    frequencies_11E = jnp.asarray(frequencies_E, jnp.float32)[None, None, :]
    angles_BNE = positions_BN[..., None].astype(jnp.float32) * frequencies_11E
    return Rotation(jnp.cos(angles_BNE), jnp.sin(angles_BNE))


def rotate(x_BHNK: Float[Array, "B H N K"], turn: Rotation) -> Float[Array, "B H N K"]:
    """Returns the vectors turned, computed in float32, in their own dtype."""
    first_BHNE, second_BHNE = jnp.split(x_BHNK.astype(jnp.float32), 2, axis=-1)
    cosine_B1NE, sine_B1NE = turn.cosine_BNE[:, None], turn.sine_BNE[:, None]
    turned = (
        first_BHNE * cosine_B1NE - second_BHNE * sine_B1NE,
        second_BHNE * cosine_B1NE + first_BHNE * sine_B1NE,
    )
    return jnp.concatenate(turned, axis=-1).astype(x_BHNK.dtype)
