# SPDX-License-Identifier: Apache-2.0
"""Judges that look the answer up: games over the responses of a tabular model."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nlhf_jax.models.tabular import index_of
from nlhf_jax.types import Judge, LanguageModel, ParamSets, PromptBatch, Responses


def table_judge(
    model: LanguageModel,
    preference_NN: Float[Array | np.ndarray, "N N"],
    reward_N: Float[Array | np.ndarray, "N"],
) -> Judge:
    """Returns the judge of a game whose actions are the responses of `model`.

    Args:
      model: a tabular model; the place of a response is that in `all_responses`.
      preference_NN: P(row preferred to column), in [0, 1].
      reward_N: reward of each response.
    """
    preference_NN, reward_N = jnp.asarray(preference_NN), jnp.asarray(reward_N)

    def preference(
        frozen: ParamSets, prompts: PromptBatch, first: Responses, second: Responses
    ) -> Float[Array, "B"]:
        del frozen, prompts
        return preference_NN[index_of(model, first), index_of(model, second)]

    def reward(
        frozen: ParamSets, prompts: PromptBatch, responses: Responses
    ) -> Float[Array, "B"]:
        del frozen, prompts
        return reward_N[index_of(model, responses)]

    return Judge(preference, reward)
