# SPDX-License-Identifier: Apache-2.0
"""Policies loaded from model folders: network, parameters, vocabulary, lengths."""

import dataclasses
import logging
from typing import Any

import jax

from nlhf_jax import distributed, partitioning
from nlhf_jax.data import vocabularies
from nlhf_jax.jobs import adapters, folders
from nlhf_jax.models.families import check_end, language_model
from nlhf_jax.settings import MemorySettings, MeshSettings
from nlhf_jax.types import LanguageModel, Params

_log = logging.getLogger(__name__)


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


def as_frozen_base(params: Params, memory: MemorySettings) -> Params:
    """Returns the base that adapters are trained on, in the dtype it is kept in.

    Where that rounds it, a warning says so: the adapters learn on rounded weights, and
    as a model their folder is read with those of the base's own file.
    """
    kept = as_frozen(params, memory)
    is_rounded = jax.tree.map(_is_rounded, params, kept)
    if any(jax.tree.leaves(is_rounded)) and distributed.is_first():
        _log.warning(
            "frozen_dtype %s rounds the base's numbers: the adapters are trained on "
            "the rounded base, and elsewhere stand on the base as it is; "
            "frozen_dtype 'float32' trains them on that",
            memory.frozen_dtype,
        )
    return kept


def _is_rounded(one: jax.Array, kept: jax.Array) -> bool:
    """Whether numbers have changed; those that are none (NaN) cannot."""
    if one.dtype == kept.dtype:
        return False
    return bool(((one != kept.astype(one.dtype)) & (one == one)).any())


def load_params(
    checkpoint: str, network: Any, mesh: MeshSettings | None = None
) -> Params:
    """Returns a folder's float32 parameters, each array where it will lie.

    Adapters are merged into their base: see `jobs/adapters.py`.

    Args:
      checkpoint: model folder.
      network: has `init` and `logical_axes`.
      mesh: how devices are laid out; None puts all on one.

    Raises:
      UserError: nothing readable is there, or it does not fit the network or the mesh.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    if mesh is None:
        return adapters.load_whole(checkpoint, shapes)
    shardings = partitioning.shardings_for(
        network.logical_axes, shapes, partitioning.make_mesh(mesh)
    )
    return adapters.load_whole(checkpoint, shapes, shardings)


def load_policy(
    checkpoint: str,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
    mesh: MeshSettings | None = None,
    weights: str = "",
) -> Policy:
    """Reads a language model's folder; see `load_params` for the mesh.

    Args:
      checkpoint: its folder.
      memory: what its passes keep.
      mesh: how devices are laid out.
      weights: where its parameters are, if elsewhere: the base of adapters, say.

    Raises:
      UserError: the folder is missing, of another kind, or its vocabulary has more
        ids than the model has rows.
    """
    description = folders.read_description(checkpoint)
    vocabulary_path = folders.vocabulary_file(checkpoint)
    vocabulary = vocabularies.load_vocabulary(vocabulary_path)
    vocabularies.check_vocabulary(vocabulary, description.settings.vocab_size)
    check_end(description.settings, vocabulary.eos_id)
    network = language_model(description.settings, memory)
    params = load_params(weights or checkpoint, network, mesh)
    return Policy(description, network, params, vocabulary, vocabulary_path)
