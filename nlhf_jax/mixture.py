# SPDX-License-Identifier: Apache-2.0
"""Log-linear mixtures of token distributions, temperature and truncation.

    log p(token) = sum_k w_k log p_k(token) - log Z,    sum_k w_k = 1.

With two sets this is the geometric mixture of Munos et al., 2024, arXiv 2312.00886,
eq. 15, taken one token at a time (Appendix F.1); docs/math.md (28). Raw logits serve as
well as log-probabilities: their normalisers cancel in Z.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nlhf_jax.checks import UserError
from nlhf_jax.types import Speaker

_SUM_TOLERANCE = 1e-6  # weights written in decimal do not add to one exactly


def speaker_weights(
    speaker: Speaker, step: jax.Array | int
) -> dict[str, jax.Array | float]:
    """Returns the speaker's weight of each parameter set at `step`.

    Raises:
      UserError: fixed weights do not sum to one.
    """
    weights = {
        name: weight(step) if callable(weight) else weight
        for name, weight in speaker.weights.items()
    }
    fixed = [weight for weight in weights.values() if isinstance(weight, (int, float))]
    if len(fixed) == len(weights) and abs(sum(fixed) - 1.0) > _SUM_TOLERANCE:
        raise UserError(
            f"a speaker's weights must sum to 1, got {weights} with sum {sum(fixed)}"
        )
    return weights


def mix(
    logits: Mapping[str, Float[Array, "R V"]],
    weights: Mapping[str, jax.Array | float],
) -> Float[Array, "R V"]:
    """Returns sum_k w_k * logits_k; a set of weight 0 has no say, even at -inf."""
    if len(logits) == 1:
        return next(iter(logits.values()))
    mixed_RV = 0.0
    for name, logits_RV in logits.items():
        weight = jnp.asarray(weights[name], logits_RV.dtype)
        # 0 * -inf would be NaN for a token that one model forbids.
        mixed_RV = mixed_RV + jnp.where(weight == 0, 0.0, weight * logits_RV)
    return mixed_RV


def process(logits_RV: Float[Array, "R V"], speaker: Speaker) -> Float[Array, "R V"]:
    """Applies temperature, top-k and top-p to mixed logits, in this order.

    Temperature 0 leaves the logits as they are; the caller takes the most likely token.
    """
    if speaker.temperature not in (0.0, 1.0):
        logits_RV = logits_RV / speaker.temperature
    if speaker.top_k:
        logits_RV = _keep_top_k(logits_RV, speaker.top_k)
    if speaker.top_p < 1.0:
        logits_RV = _keep_top_p(logits_RV, speaker.top_p)
    return logits_RV


def _keep_top_k(logits_RV: Float[Array, "R V"], k: int) -> Float[Array, "R V"]:
    k = min(k, logits_RV.shape[-1])
    smallest_R1 = jax.lax.top_k(logits_RV, k)[0][:, -1:]
    return jnp.where(logits_RV >= smallest_R1, logits_RV, -jnp.inf)


def _keep_top_p(logits_RV: Float[Array, "R V"], p: float) -> Float[Array, "R V"]:
    sorted_RV = jnp.flip(jnp.sort(logits_RV, axis=-1), axis=-1)
    probs_RV = jax.nn.softmax(sorted_RV, axis=-1)
    before_RV = jnp.cumsum(probs_RV, axis=-1) - probs_RV
    # A token stays while the more likely ones have not yet reached p.
    is_kept_RV = before_RV < p
    smallest_R1 = jnp.min(
        jnp.where(is_kept_RV, sorted_RV, jnp.inf), axis=-1, keepdims=True
    )
    return jnp.where(logits_RV >= smallest_R1, logits_RV, -jnp.inf)
