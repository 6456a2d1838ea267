# SPDX-License-Identifier: Apache-2.0
"""Which network a model's settings mean."""

import dataclasses

from nlhf_jax.checks import UserError
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.models.t5 import EOS_ID, t5_language_model
from nlhf_jax.settings import MemorySettings
from nlhf_jax.types import LanguageModel


def language_model(
    settings: ModelSettings,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> LanguageModel:
    """Returns the network of some settings; equal settings give equal functions.

    Raises:
      UserError: the chunks of the vocabulary do not divide it, or T5 is to attend in
        another way than "plain".
    """
    if isinstance(settings, DecoderOnlySettings):
        return decoder_only_language_model(settings, memory)
    return t5_language_model(settings, memory)


def judge_memory(settings: ModelSettings, memory: MemorySettings) -> MemorySettings:
    """Returns what a judge of any family keeps beside a policy with `memory`.

    A T5 judge attends in its only way, whichever the policy was given.
    """
    if isinstance(settings, DecoderOnlySettings):
        return memory
    return dataclasses.replace(memory, attention="plain")


def end_of(settings: ModelSettings) -> int:
    """Returns the id that ends a response of this network."""
    is_decoder_only = isinstance(settings, DecoderOnlySettings)
    return settings.eos_id if is_decoder_only else EOS_ID


def check_end(settings: ModelSettings, vocabulary_end: int) -> None:
    """Raises a UserError unless a decoder-only model ends as its vocabulary does."""
    if isinstance(settings, DecoderOnlySettings) and settings.eos_id != vocabulary_end:
        raise UserError(
            f"eos_id of DecoderOnlySettings must be {vocabulary_end}, the vocabulary's "
            f"end of a text, got {settings.eos_id}"
        )
