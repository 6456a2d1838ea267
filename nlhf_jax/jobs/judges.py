# SPDX-License-Identifier: Apache-2.0
"""Learned judges built from model folders."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from nlhf_jax import global_arrays
from nlhf_jax.data import prompts as data_prompts
from nlhf_jax.data import vocabularies
from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.jobs import adapters, folders, policies
from nlhf_jax.jobs.generation import batch_slices, take
from nlhf_jax.models.adapters import adapted, adapter_axes
from nlhf_jax.models.families import end_of, judge_memory
from nlhf_jax.preferences import inputs, judges, pairwise, reward
from nlhf_jax.settings import LoraSettings, MemorySettings, MeshSettings
from nlhf_jax.types import (
    BASE,
    Judge,
    Params,
    ParamSets,
    PreferenceModel,
    PromptBatch,
    Responses,
    RewardModel,
)


def _framed(settings: ModelSettings, template: Any, start: Sequence[int]) -> Any:
    """Returns the template with the end and beginning of the network that reads it."""
    return dataclasses.replace(template, eos_id=end_of(settings), start=tuple(start))


def preference_network(
    settings: ModelSettings,
    encode: inputs.Encode,
    start: Sequence[int] = (),
    **lengths_and_memory: Any,
) -> PreferenceModel:
    """Returns the pairwise model of a shape; its template has the ids of `encode`.

    Every text it reads begins with the ids `start`.
    """
    template = _framed(settings, inputs.pairwise_template(encode), start)
    return pairwise.pairwise_preference_model(settings, template, **lengths_and_memory)


def reward_network(
    settings: ModelSettings,
    encode: inputs.Encode,
    start: Sequence[int] = (),
    **lengths_and_memory: Any,
) -> RewardModel:
    """Returns the scalar model of a shape; see `preference_network`."""
    template = _framed(settings, inputs.reward_template(encode), start)
    return reward.reward_model(settings, template, **lengths_and_memory)


def _build(
    make: Callable[..., Any],
    description: folders.ModelDescription,
    vocabulary: Any,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> Any:
    return make(
        description.settings,
        lambda text: vocabularies.encode(text, vocabulary),
        data_prompts.frame_of(vocabulary)[0],
        prompt_length=description.feature_lengths["inputs"],
        response_length=description.feature_lengths["targets"],
        memory=memory,
    )


# (a folder's description, its vocabulary, memory) -> the model
build_preference_model = functools.partial(_build, preference_network)
build_reward_model = functools.partial(_build, reward_network)


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

    @property
    def compares(self) -> bool:
        """Whether there is a model that answers comparisons."""
        return "preference" in self.frozen

    @functools.cached_property
    def _compiled_preference(self):
        return jax.jit(self.judge.preference)

    def preferences(
        self, prompts: PromptBatch, first: Responses, second: Responses
    ) -> Float[np.ndarray, "B"]:
        """Returns P(first > second) in [0, 1] for host arrays, one compiled shape."""
        everything = np.arange(prompts.tokens_BS.shape[0])
        batch = (take(part, everything) for part in (prompts, first, second))
        return global_arrays.fetch(self._compiled_preference(self.frozen, *batch))

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


NETWORKS = {"preference": preference_network, "reward": reward_network}
BUILDERS = {"preference": build_preference_model, "reward": build_reward_model}


def load_judge(
    *,
    policy_checkpoint: str = "",
    preference_checkpoint: str = "",
    reward_checkpoint: str = "",
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
    mesh: MeshSettings | None = None,
    shared: tuple[str, Params] | None = None,
) -> LoadedJudge:
    """Builds the judge from the folders named; an empty name leaves that part out.

    Its parameters have the `frozen_dtype` of `memory`, and lie on the mesh if given.
    With `shared`, the digest of a base and its parameters, a model whose adapters stand
    on that base is not merged: the base then serves it too, as the frozen set "base".

    Raises:
      UserError: a folder is missing, holds another kind of model, or reads other tokens
        than `policy_checkpoint` writes.
    """
    folders.check_same_vocabulary(
        policy_checkpoint, preference_checkpoint, reward_checkpoint
    )
    models, frozen, loras = {}, {}, {}
    named = {"preference": preference_checkpoint, "reward": reward_checkpoint}
    for kind, checkpoint in named.items():
        if checkpoint:
            description = folders.read_description(checkpoint, kind)
            vocabulary = vocabularies.load_vocabulary(
                folders.vocabulary_file(checkpoint)
            )
            kept = judge_memory(description.settings, memory)
            models[kind] = BUILDERS[kind](description, vocabulary, kept)
            if shared and description.lora and description.base_digest == shared[0]:
                loras[kind] = description.lora
                frozen[kind] = adapters.load_adapters(checkpoint, models[kind], mesh)
                frozen[BASE] = shared[1]
                continue
            params = policies.load_params(checkpoint, models[kind], mesh)
            frozen[kind] = policies.as_frozen(params, memory)
    judge = judges.learned_judge(models.get("preference"), models.get("reward"))
    axes = axes_of(models, loras)
    return LoadedJudge(on_base(judge, loras), frozen, axes)


def axes_of(
    models: Mapping[str, Any], loras: Mapping[str, LoraSettings]
) -> dict[str, Any]:
    """Returns the logical axes of a judge's frozen sets, "base" left to whose it is."""
    return {
        kind: adapter_axes(model.logical_axes, loras[kind])
        if kind in loras
        else model.logical_axes
        for kind, model in models.items()
    }


def on_base(judge: Judge, loras: Mapping[str, LoraSettings]) -> Judge:
    """Returns a judge some of whose frozen sets are adapters on the set "base".

    Args:
      judge: of whole parameter sets.
      loras: kind of model -> its adapters' settings.
    """
    if not loras:
        return judge

    def joined(frozen: ParamSets) -> ParamSets:
        on = {
            kind: adapted(frozen[BASE], frozen[kind], lora)
            for kind, lora in loras.items()
        }
        return dict(frozen) | on

    return Judge(
        lambda frozen, *given: judge.preference(joined(frozen), *given),
        lambda frozen, *given: judge.reward(joined(frozen), *given),
    )
