# SPDX-License-Identifier: Apache-2.0
"""Expectations over all responses of a tabular model, without sampling.

The loss that is averaged is the algorithm's own, through the train step's own scoring.
"""

import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.train_step import score, scored_samples
from nlhf_jax.types import (
    POLICY,
    Algorithm,
    Judge,
    LanguageModel,
    Params,
    ParamSets,
    Responses,
)

LARGEST_SUM = 2**20  # terms of one expectation
NEWTON_STEPS, SLOPE_TOLERANCE, DIFFERENCE = 50, 1e-14, 1e-5


def expected_gradient(
    model: LanguageModel,
    algorithm: Algorithm,
    judge: Judge,
    param_sets: ParamSets,
    length: int,
    *,
    step: jax.Array | int = 0,
) -> Params:
    """Returns E[gradient of the loss] over all draws of all speakers, exactly.

    Every combination of one response per speaker is one example, weighted by its
    probability. The draws' probabilities are constants: no gradient flows through what
    was said, only through the loss, as in the train step.

    Args:
      model: a tabular model.
      algorithm: its speakers draw, and its loss is differentiated.
      judge: answers its questions; frozen weights are not handed to it.
      param_sets: `params` and all other sets the algorithm names.
      length: longest response, tokens.
      step: at which scheduled weights are evaluated.

    Raises:
      UserError: more than 2^20 combinations of responses.
    """
    choices = tabular.all_responses(model, length)
    drawn = _combinations(choices, len(algorithm.speakers))
    context = tabular.empty_prompts(drawn[0].tokens_BT.shape[0])

    def weighted_loss(params, constants):
        log_weight_B = sum(
            tabular.response_log_probs(model, constants, speaker, responses, step)
            for speaker, responses in zip(algorithm.speakers, drawn, strict=True)
        )
        feedback = score(algorithm, judge, {}, context, drawn)
        samples = scored_samples(model, algorithm, params, constants, context, drawn)
        loss_B = algorithm.loss(samples, feedback).loss_B
        return jnp.sum(jnp.exp(log_weight_B) * loss_B)

    return jax.jit(jax.grad(weighted_loss))(param_sets[POLICY], dict(param_sets))


def _combinations(choices: Responses, speakers: int) -> tuple[Responses, ...]:
    """Returns one `Responses` per speaker: the rows run through all combinations."""
    size = choices.tokens_BT.shape[0]
    if size**speakers > LARGEST_SUM:
        raise UserError(
            f"an exact expectation has at most {LARGEST_SUM} terms, got {size} "
            f"responses for each of {speakers} speakers"
        )
    picks = np.array(list(itertools.product(range(size), repeat=speakers)))
    return tuple(
        Responses(choices.tokens_BT[column], choices.mask_BT[column])
        for column in picks.T
    )


def fixed_point(
    model: LanguageModel,
    algorithm: Algorithm,
    game: tuple[Float[np.ndarray, "N N"], Float[np.ndarray, "N"]],
    frozen: ParamSets,
    start: Params,
    length: int,
    *,
    step: int = 0,
) -> tuple[Float[np.ndarray, "N"], float]:
    """Returns the policy at which the expected gradient vanishes, and what is left.

    Newton's method in float64 on `expected_gradient` as a function of the policy; the
    sets the algorithm derives from the policy are the policy itself. Logits that have
    no say (a constant, rows of no prefix) stay where they are: the shortest step.

    Args:
      model: a tabular model.
      algorithm: whose fixed point is looked for.
      game: preference_NN and reward_N of its responses.
      frozen: the other sets, `reference` above all.
      start: parameters near the point.
      length: longest response, tokens.
      step: at which scheduled weights are evaluated.

    Returns:
      The policy [N], and the largest entry of the expected gradient there.
    """
    with jax.enable_x64(True):
        frozen = jax.tree.map(_as_float64, dict(frozen))
        flat_P, restore = jax.flatten_util.ravel_pytree(
            jax.tree.map(_as_float64, start)
        )
        judge = table_judge(model, *map(_as_float64, game))

        def slope(flat_P):
            params = restore(flat_P)
            sets = {name: params for name in (POLICY, *algorithm.derived_sets)}
            found = expected_gradient(
                model, algorithm, judge, frozen | sets, length, step=step
            )
            return jax.flatten_util.ravel_pytree(found)[0]

        slopes = jax.jit(jax.vmap(slope))
        for _ in range(NEWTON_STEPS):
            slope_P, curvature_PP = _differences(slopes, np.asarray(flat_P))
            if np.abs(slope_P).max() < SLOPE_TOLERANCE:
                break
            move_P = np.linalg.lstsq(curvature_PP, -slope_P, rcond=1e-7)[0]
            flat_P = flat_P + move_P * min(1.0, 1.0 / max(np.abs(move_P).max(), 1e-30))
        policy_N = np.asarray(tabular.response_policy(model, restore(flat_P), length))
        return policy_N, float(np.abs(slope_P).max())


def _differences(slopes, flat_P) -> tuple[np.ndarray, np.ndarray]:
    """Returns the slope and, by central differences, its derivative.

    Differentiation would not see through the constants of the losses.
    """
    moves_PP = DIFFERENCE * np.eye(len(flat_P))
    around = np.concatenate([[flat_P], flat_P + moves_PP, flat_P - moves_PP])
    slope_P, *found = np.asarray(slopes(jnp.asarray(around)))
    after_PP, before_PP = np.split(np.stack(found), 2)
    return slope_P, (after_PP - before_PP).T / (2 * DIFFERENCE)


def _as_float64(leaf) -> jax.Array:
    return jnp.asarray(np.asarray(leaf), jnp.float64)
