# SPDX-License-Identifier: Apache-2.0
"""Policies loaded from model folders: network, parameters, vocabulary, lengths."""

import dataclasses
from typing import Any

import jax

from nlhf_jax import checkpoints
from nlhf_jax.data import vocabularies
from nlhf_jax.jobs import folders
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.settings import MemorySettings
from nlhf_jax.types import LanguageModel, Params


@dataclasses.dataclass(frozen=True)
class Policy:
    """A language model as it lies in a folder.

    Attributes:
      description: shape and feature lengths.
      network: its pure functions.
      params: float32 parameters.
      vocabulary: the seqio vocabulary beside it.
      vocabulary_path: that vocabulary's file.
    """

    description: folders.ModelDescription
    network: LanguageModel
    params: Params
    vocabulary: Any
    vocabulary_path: str

    @property
    def response_length(self) -> int:
        """Longest response it was trained on, tokens."""
        return self.description.feature_lengths["targets"]


def as_frozen(params: Params, memory: MemorySettings) -> Params:
    """Returns parameters that are not trained, in the dtype they are kept in."""
    return jax.tree.map(lambda leaf: leaf.astype(memory.frozen_dtype), params)


def load_policy(
    checkpoint: str,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> Policy:
    """Reads a language model's folder.

    Raises:
      UserError: the folder is missing, of another kind, or its vocabulary has more
        ids than the model has rows.
    """
    description = folders.read_description(checkpoint)
    vocabulary_path = folders.vocabulary_file(checkpoint)
    vocabulary = vocabularies.load_vocabulary(vocabulary_path)
    vocabularies.check_vocabulary(vocabulary, description.settings.vocab_size)
    network = t5_language_model(description.settings, memory)
    params = checkpoints.load_params(folders.resolve(checkpoint))
    return Policy(description, network, params, vocabulary, vocabulary_path)
