# SPDX-License-Identifier: Apache-2.0
"""The learned pairwise preference model, text to text, antisymmetric by construction.

The encoder reads the paper's input: instruction, document, both responses. The decoder
reads the first response again, and f(x, y, y') is the last logit of one fixed token
(Munos et al., 2024, arXiv 2312.00886, section 8 and Appendix G, where the decoder reads
nothing). Then

    logit P(y > y' | x) = (f(x, y, y') - f(x, y', y)) / 2,

so P(y > y') + P(y' > y) = 1 to float rounding and P(y > y) = 1/2 (docs/math.md (30)):
no position bias can act as a reward of the first place. With a decoder that reads
nothing, f depends on the order only through the words "Summary 1" and "Summary 2", and
a model of a few million parameters was still at ln 2 after hundreds of steps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.models.families import language_model
from nlhf_jax.preferences.inputs import PairwiseTemplate, pairwise_input
from nlhf_jax.settings import MemorySettings
from nlhf_jax.types import (
    LanguageModel,
    Params,
    PreferenceModel,
    PromptBatch,
    Responses,
)


def last_logit(
    network: LanguageModel,
    params: Params,
    inputs: PromptBatch,
    read: Responses,
    answer_id: int,
) -> Float[Array, "B"]:
    """Returns the logit of `answer_id` after the decoder has read a response, float32.

    Args:
      network: an encoder-decoder.
      params: its parameters.
      inputs: what the encoder reads, [B, S].
      read: what the decoder reads, [B, T], without its padding and end token.
      answer_id: any fixed id.
    """
    # A response that was cut has no end token; without it nobody can tell.
    is_read_BT = read.mask_BT & (read.tokens_BT != network.eos_id)
    tokens_BT = jnp.where(is_read_BT, read.tokens_BT, 0)
    # Position t predicts what follows the first t tokens, so one more is needed.
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, 1)))
    score_BT = network.logits_of(params, inputs, tokens_BT, answer_id)
    num_read_B1 = is_read_BT.sum(axis=1, keepdims=True)
    return jnp.take_along_axis(score_BT, num_read_B1, axis=1)[:, 0]


def whole_width(responses: Responses, width: int) -> Responses:
    """Returns the responses padded to `width` tokens."""
    missing = ((0, 0), (0, width - responses.tokens_BT.shape[1]))
    return Responses(*(jnp.pad(leaf, missing) for leaf in responses))


def pairwise_preference_model(
    settings: ModelSettings,
    template: PairwiseTemplate,
    *,
    prompt_length: int,
    response_length: int,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> PreferenceModel:
    """Returns the preference model; its parameters are a T5 language model's.

    Args:
      settings: shape of the network.
      template: words around the document and the responses, as ids.
      prompt_length: tokens of the document that are read, at most.
      response_length: tokens of each response, at most; wider ones raise a UserError.
      memory: what its passes keep.
    """
    network = language_model(settings, memory)

    def logits(
        params: Params, prompts: PromptBatch, first: Responses, second: Responses
    ) -> Float[Array, "B"]:
        lengths = {"prompt_length": prompt_length, "response_length": response_length}
        forward = pairwise_input(template, prompts, first, second, **lengths)
        backward = pairwise_input(template, prompts, second, first, **lengths)
        first, second = (whole_width(one, response_length) for one in (first, second))
        # Both orders in one batch: one pass over the weights.
        both, read = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), (forward, first), (backward, second)
        )
        score_2B = last_logit(network, params, both, read, template.answer_id)
        forward_B, backward_B = jnp.split(score_2B, 2)
        return 0.5 * (forward_B - backward_B)

    return PreferenceModel(network.init, network.logical_axes, logits)
