# SPDX-License-Identifier: Apache-2.0
"""The learned scalar reward, for the RLHF baseline.

    P(y > y' | x) = sigmoid(r(x, y) - r(x, y'))          (Bradley-Terry)

A Bradley-Terry preference is transitive; it cannot express a cycle. The reward is the
last logit of one fixed token (Munos et al., 2024, arXiv 2312.00886, section 8), after
the decoder has read the response; docs/math.md (31).
"""

from jaxtyping import Array, Float

from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.models.families import language_model
from nlhf_jax.preferences.inputs import RewardTemplate, reward_input
from nlhf_jax.preferences.pairwise import last_logit
from nlhf_jax.settings import MemorySettings
from nlhf_jax.types import Params, PromptBatch, Responses, RewardModel


def reward_model(
    settings: ModelSettings,
    template: RewardTemplate,
    *,
    prompt_length: int,
    response_length: int,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> RewardModel:
    """Returns the reward model; the arguments are those of the preference model."""
    network = language_model(settings, memory)

    def rewards(
        params: Params, prompts: PromptBatch, responses: Responses
    ) -> Float[Array, "B"]:
        inputs = reward_input(
            template,
            prompts,
            responses,
            prompt_length=prompt_length,
            response_length=response_length,
        )
        return last_logit(network, params, inputs, responses, template.answer_id)

    return RewardModel(network.init, network.logical_axes, rewards)
