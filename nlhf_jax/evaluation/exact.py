# SPDX-License-Identifier: Apache-2.0
"""Expectations over all responses of a tabular model, without sampling.

The loss that is averaged is the algorithm's own, through the train step's own scoring.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax.checks import UserError
from nlhf_jax.models import tabular
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
