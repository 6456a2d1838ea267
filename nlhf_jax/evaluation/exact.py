# SPDX-License-Identifier: Apache-2.0
"""Expectations over all responses of a tabular model, without sampling.

The loss that is averaged is the algorithm's own, through the train step's own scoring.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError
from nlhf_jax.loss_gradient import scored_samples
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.train_step import judged
from nlhf_jax.types import (
    POLICY,
    Algorithm,
    Judge,
    LanguageModel,
    Params,
    ParamSets,
    Responses,
    Samples,
    Speaker,
)

LARGEST_SUM = 2**20  # terms of one expectation
# Of Newton's method; moves and the differences that give the slope's derivative, nats.
NEWTON_STEPS, MOVE_TOLERANCE, LONGEST_MOVE, DIFFERENCE = 50, 1e-12, 1.0, 1e-5
NO_SAY = 1e-12  # of the Fisher matrix: what is less is a logit that has no say


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
        samples = tuple(
            Samples(
                responses,
                {},
                tabular.sampling_log_probs(model, constants, speaker, responses, step),
            )
            for speaker, responses in zip(algorithm.speakers, drawn, strict=True)
        )
        log_weight_B = sum(one.sampling_log_probs_BT.sum(axis=1) for one in samples)
        _, chosen, feedback = judged(algorithm, judge, {}, context, samples)
        scored = scored_samples(model, algorithm, params, constants, context, chosen)
        loss_B = algorithm.loss(scored, feedback).loss_B
        return jnp.sum(jnp.exp(log_weight_B) * loss_B)

    trained = param_sets[algorithm.trains]
    return jax.jit(jax.grad(weighted_loss))(trained, dict(param_sets))


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


def fixed_points(
    model: LanguageModel,
    algorithm: Algorithm,
    games: Sequence[tuple[Float[np.ndarray, "N N"], Float[np.ndarray, "N"]]],
    frozen: ParamSets,
    start: Params,
    length: int,
    *,
    step: int = 0,
) -> list[tuple[Float[np.ndarray, "N"], float]]:
    """Returns for each game where the expected gradient vanishes, and the last move.

    Newton's method in float64 on F^+ g, the expected gradient g of the algorithm's loss
    measured by the Fisher matrix F, as a function of the policy: unlike g it does not
    fade towards policies that never say some response. The sets the algorithm derives
    from the policy, or looks ahead to, are the policy itself. Logits that have no say
    (a constant, rows of no prefix) stay where they are.

    Args:
      model: a tabular model.
      algorithm: whose fixed points are looked for.
      games: preference_NN and reward_N of its responses, all of one size.
      frozen: the other sets, `reference` above all.
      start: parameters to begin with; the reference serves.
      length: longest response, tokens.
      step: at which scheduled weights are evaluated.

    Returns:
      Per game the policy [N], and the last move of a logit, nats: far below one if the
      point was found.
    """
    with jax.enable_x64(True):
        frozen = jax.tree.map(_as_float64, dict(frozen))
        start_P, restore = jax.flatten_util.ravel_pytree(
            jax.tree.map(_as_float64, start)
        )

        def direction(flat_P, game):
            params = restore(flat_P)
            derived = (*algorithm.derived_sets, *algorithm.lookaheads)
            sets = {name: params for name in (POLICY, *derived)}
            judge = table_judge(model, *game)
            found = expected_gradient(
                model, algorithm, judge, frozen | sets, length, step=step
            )
            slope_P = jax.flatten_util.ravel_pytree(found)[0]
            fisher_PP = _fisher(model, restore, flat_P, length)
            inverse_PP = jnp.linalg.pinv(fisher_PP, rtol=NO_SAY, hermitian=True)
            return inverse_PP @ slope_P

        # Compiled once for all games.
        directions = jax.jit(jax.vmap(direction, in_axes=(0, None)))
        found = []
        for game in games:
            game = tuple(map(_as_float64, game))
            flat_P, move = _newton(lambda x, g=game: directions(x, g), start_P)
            policy_N = tabular.response_policy(model, restore(flat_P), length)
            found.append((np.asarray(policy_N), move))
        return found


def _newton(function, start_P) -> tuple[jax.Array, float]:
    """Returns a zero of the function (of several points at once), and the last move."""
    flat_P, largest = start_P, np.inf
    for _ in range(NEWTON_STEPS):
        value_P, slope_PP = _differences(function, np.asarray(flat_P))
        move_P = np.linalg.lstsq(slope_PP, -value_P, rcond=1e-7)[0]
        largest = float(np.abs(move_P).max())
        flat_P = flat_P + move_P * min(1.0, LONGEST_MOVE / max(largest, 1e-30))
        if largest < MOVE_TOLERANCE:
            break
    return flat_P, largest


def _fisher(model, restore, flat_P, length) -> jax.Array:
    """Returns E[grad log pi grad log pi^T], [P, P]."""
    choices = tabular.all_responses(model, length)

    def log_probs(flat_P):
        sets, speaker = {POLICY: restore(flat_P)}, Speaker({POLICY: 1.0})
        return tabular.response_log_probs(model, sets, speaker, choices)

    score_NP = jax.jacrev(log_probs)(flat_P)
    return (score_NP.T * jnp.exp(log_probs(flat_P))[None, :]) @ score_NP


def _differences(function, flat_P) -> tuple[np.ndarray, np.ndarray]:
    """Returns the function's value [P] and, by central differences, its slope [P, P].

    Differentiation would not see through the constants of the losses.
    """
    moves_PP = DIFFERENCE * np.eye(len(flat_P))
    around = np.concatenate([[flat_P], flat_P + moves_PP, flat_P - moves_PP])
    value_P, *found = np.asarray(function(jnp.asarray(around)))
    after_PP, before_PP = np.split(np.stack(found), 2)
    return value_P, (after_PP - before_PP).T / (2 * DIFFERENCE)


def _as_float64(leaf) -> jax.Array:
    return jnp.asarray(np.asarray(leaf), jnp.float64)
