# SPDX-License-Identifier: Apache-2.0
"""The learned pairwise preference model, text to text, antisymmetric by construction.

With f(x, y, y') the first decoder step's logit of one fixed token after reading the
instruction, the document and both responses (Munos et al., 2024, arXiv 2312.00886,
section 8 and Appendix G),

    logit P(y > y' | x) = (f(x, y, y') - f(x, y', y)) / 2,

so P(y > y') + P(y' > y) = 1 to float rounding and P(y > y) = 1/2: no position bias can
act as a reward of the first place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.preferences.inputs import PairwiseTemplate, pairwise_input
from nlhf_jax.settings import T5Settings
from nlhf_jax.types import (
    LanguageModel,
    Params,
    PreferenceModel,
    PromptBatch,
    Responses,
)


def first_step_logit(
    network: LanguageModel, params: Params, inputs: PromptBatch, answer_id: int
) -> Float[Array, "B"]:
    """Returns the logit of `answer_id` as the first output token, float32."""
    tokens_B1 = jnp.full((inputs.tokens_BS.shape[0], 1), answer_id, jnp.int32)
    return network.logits(params, inputs, tokens_B1, None)[:, 0, answer_id]


def pairwise_preference_model(
    settings: T5Settings,
    template: PairwiseTemplate,
    *,
    prompt_length: int,
    response_length: int,
) -> PreferenceModel:
    """Returns the preference model; its parameters are a T5 language model's.

    Args:
      settings: shape of the network.
      template: words around the document and the responses, as ids.
      prompt_length: tokens of the document that are read, at most.
      response_length: tokens of each response, at most; wider ones raise a UserError.
    """
    network = t5_language_model(settings)

    def logits(
        params: Params, prompts: PromptBatch, first: Responses, second: Responses
    ) -> Float[Array, "B"]:
        lengths = {"prompt_length": prompt_length, "response_length": response_length}
        forward = pairwise_input(template, prompts, first, second, **lengths)
        backward = pairwise_input(template, prompts, second, first, **lengths)
        # Both orders in one batch: one pass over the weights.
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), forward, backward)
        score_2B = first_step_logit(network, params, both, template.answer_id)
        forward_B, backward_B = jnp.split(score_2B, 2)
        return 0.5 * (forward_B - backward_B)

    return PreferenceModel(network.init, network.logical_axes, logits)
