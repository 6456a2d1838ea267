# SPDX-License-Identifier: Apache-2.0
"""Judges: what answers an algorithm's comparisons and ratings, given frozen weights.

The frozen parameter sets are named `preference` and `reward`.
"""

import jax
from jaxtyping import Array, Float

from nlhf_jax.checks import UserError
from nlhf_jax.types import (
    Judge,
    ParamSets,
    PreferenceModel,
    PromptBatch,
    Responses,
    RewardModel,
)


def learned_judge(
    preference_model: PreferenceModel | None, reward_model: RewardModel | None
) -> Judge:
    """Returns the judge made of the models at hand.

    A question to a model that is not at hand raises a UserError when the step is
    traced, before anything is computed.
    """

    def preference(
        frozen: ParamSets, prompts: PromptBatch, first: Responses, second: Responses
    ) -> Float[Array, "B"]:
        if preference_model is None:
            raise UserError("a comparison needs a preference model, got none")
        logit_B = preference_model.logits(frozen["preference"], prompts, first, second)
        return jax.nn.sigmoid(logit_B)

    def reward(
        frozen: ParamSets, prompts: PromptBatch, responses: Responses
    ) -> Float[Array, "B"]:
        if reward_model is None:
            raise UserError("a rating needs a reward model, got none")
        return reward_model.rewards(frozen["reward"], prompts, responses)

    return Judge(preference, reward)


def bradley_terry_judge(reward_model: RewardModel) -> Judge:
    """Returns the judge whose preference is sigmoid(r(first) - r(second)).

    The game it defines is transitive; its Nash equilibrium still differs from the RLHF
    solution at the same tau (Munos et al., 2024, arXiv 2312.00886, Appendix A).
    """

    def preference(
        frozen: ParamSets, prompts: PromptBatch, first: Responses, second: Responses
    ) -> Float[Array, "B"]:
        first_B = reward_model.rewards(frozen["reward"], prompts, first)
        return jax.nn.sigmoid(
            first_B - reward_model.rewards(frozen["reward"], prompts, second)
        )

    def reward(
        frozen: ParamSets, prompts: PromptBatch, responses: Responses
    ) -> Float[Array, "B"]:
        return reward_model.rewards(frozen["reward"], prompts, responses)

    return Judge(preference, reward)
