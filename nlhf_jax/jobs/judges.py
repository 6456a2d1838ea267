# SPDX-License-Identifier: Apache-2.0
"""Learned judges built from model folders."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from nlhf_jax import checkpoints
from nlhf_jax.data import vocabularies
from nlhf_jax.jobs import folders, policies
from nlhf_jax.jobs.generation import batch_slices, take
from nlhf_jax.preferences import inputs, judges, pairwise, reward
from nlhf_jax.settings import MemorySettings
from nlhf_jax.types import (
    Judge,
    Params,
    PreferenceModel,
    PromptBatch,
    Responses,
    RewardModel,
)


def build_preference_model(
    description: folders.ModelDescription,
    vocabulary,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> PreferenceModel:
    """Returns the pairwise model of a folder's description."""
    return pairwise.pairwise_preference_model(
        description.settings,
        inputs.pairwise_template(lambda text: vocabularies.encode(text, vocabulary)),
        prompt_length=description.feature_lengths["inputs"],
        response_length=description.feature_lengths["targets"],
        memory=memory,
    )


def build_reward_model(
    description: folders.ModelDescription,
    vocabulary,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> RewardModel:
    """Returns the scalar model of a folder's description."""
    return reward.reward_model(
        description.settings,
        inputs.reward_template(lambda text: vocabularies.encode(text, vocabulary)),
        prompt_length=description.feature_lengths["inputs"],
        response_length=description.feature_lengths["targets"],
        memory=memory,
    )


@dataclasses.dataclass(frozen=True)
class LoadedJudge:
    """A judge and the frozen parameters its functions read.

    Attributes:
      judge: functions of the frozen parameter sets.
      frozen: "preference" and "reward" parameters, as far as they were given.
      logical_axes: of those parameters.
    """

    judge: Judge
    frozen: dict[str, Params]
    logical_axes: dict[str, Any]

    @functools.cached_property
    def _compiled_preference(self):
        return jax.jit(self.judge.preference)

    def preferences(
        self, prompts: PromptBatch, first: Responses, second: Responses
    ) -> Float[np.ndarray, "B"]:
        """Returns P(first > second) in [0, 1] for host arrays, one compiled shape."""
        everything = np.arange(prompts.tokens_BS.shape[0])
        batch = (take(part, everything) for part in (prompts, first, second))
        return np.asarray(self._compiled_preference(self.frozen, *batch))

    def preferences_in_batches(
        self,
        prompts: PromptBatch,
        first: Responses,
        second: Responses,
        *,
        batch_size: int,
    ) -> Float[np.ndarray, "B"]:
        """Returns `preferences` of any number of rows, `batch_size` at a time."""
        num_rows = prompts.tokens_BS.shape[0]
        parts = [
            self.preferences(*(take(batch, rows) for batch in (prompts, first, second)))
            for rows in batch_slices(num_rows, batch_size)
        ]
        return np.concatenate(parts)[:num_rows]


BUILDERS = {"preference": build_preference_model, "reward": build_reward_model}


def load_judge(
    *,
    preference_checkpoint: str = "",
    reward_checkpoint: str = "",
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> LoadedJudge:
    """Builds the judge from the folders named; an empty name leaves that part out.

    Its parameters have the `frozen_dtype` of `memory`.

    Raises:
      UserError: a folder is missing or holds another kind of model.
    """
    models, frozen = {}, {}
    named = {"preference": preference_checkpoint, "reward": reward_checkpoint}
    for kind, checkpoint in named.items():
        if checkpoint:
            description = folders.read_description(checkpoint, kind)
            vocabulary = vocabularies.load_vocabulary(
                folders.vocabulary_file(checkpoint)
            )
            models[kind] = BUILDERS[kind](description, vocabulary, memory)
            params = checkpoints.load_params(folders.resolve(checkpoint))
            frozen[kind] = policies.as_frozen(params, memory)
    judge = judges.learned_judge(models.get("preference"), models.get("reward"))
    axes = {kind: model.logical_axes for kind, model in models.items()}
    return LoadedJudge(judge, frozen, axes)
