# SPDX-License-Identifier: Apache-2.0
"""The training jobs' steps with the shapes of all they read: no parameters, no data.

What is compiled from here is what the job compiles (`steps`), so that it can be asked
what it needs of a machine that is not at hand.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from nlhf_jax import partitioning, supervised_step
from nlhf_jax.checks import UserError
from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.jobs import (
    adapters,
    folders,
    judges,
    policies,
    steps,
    supervised,
    train,
)
from nlhf_jax.jobs.abstract_batches import params_of, prompts_of, responses_of
from nlhf_jax.jobs.shares import WHOLE, Share
from nlhf_jax.models.adapters import with_base
from nlhf_jax.models.families import judge_memory, language_model
from nlhf_jax.preferences.judges import learned_judge
from nlhf_jax.preferences.outside import indifferent
from nlhf_jax.settings import (
    LoopSettings,
    LoraSettings,
    MemorySettings,
    MeshSettings,
)
from nlhf_jax.types import (
    BASE,
    POLICY,
    REFERENCE,
    Algorithm,
    ComparisonBatch,
    LanguageModel,
    SupervisedBatch,
    TrainState,
)

# Names of the models a job reads, as its flags name them.
MODELS = ("reference_model", "preference_model", "reward_model", "model")


@dataclasses.dataclass(frozen=True)
class Program:
    """A job's step and the shapes of everything it is given.

    Attributes:
      job: its name.
      step: what is compiled.
      state: abstract train state.
      frozen: abstract parameter sets that are not trained.
      batch: abstract batch.
      logical_axes: of the trained parameters.
      frozen_axes: of each frozen set's.
      loop: batch size and microbatches.
      memory: what the step computes again or cuts up.
      mesh: how devices are laid out.
      shapes: of every network, by parameter set.
      algorithm: of `train`, else None.
      network: the policy's functions; None where nothing is decoded.
      prompt_length: tokens of a prompt.
      response_length: tokens of a response, also the most steps a decode takes.
    """

    job: str
    step: steps.Step
    state: TrainState
    frozen: dict[str, PyTree]
    batch: PyTree
    logical_axes: PyTree
    frozen_axes: dict[str, PyTree]
    loop: LoopSettings
    memory: MemorySettings
    mesh: MeshSettings
    shapes: dict[str, ModelSettings]
    algorithm: Algorithm | None
    network: LanguageModel | None
    prompt_length: int
    response_length: int

    def shardings(self, mesh: Mesh) -> partitioning.StepShardings:
        """Returns where state and frozen sets lie, as in the job.

        Raises:
          UserError: the mesh divides neither the parameters nor the batch.
        """
        partitioning.check_batch_size(
            self.loop.batch_size, mesh, self.loop.num_microbatches
        )
        params = self.state.param_sets[POLICY]
        return partitioning.step_shardings(
            mesh, self.state, params, self.logical_axes, self.frozen, self.frozen_axes
        )

    def jaxpr(self) -> Any:
        """Returns the step traced as one device would run it alone."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.make_jaxpr(self.step.step_fn)(
            self.state, self.frozen, self.batch, key
        )

    def trace(self, mesh: Mesh) -> Any:
        """Returns the step traced on a mesh; `.lower().compile()` does the rest."""
        compiled = steps.compiled(self.step.step_fn, mesh, self.shardings(mesh))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return compiled.trace(self.state, self.frozen, self.batch, key)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is known by its shape alone.

    Attributes:
      settings: the network.
      prompt_length: tokens of a prompt; 0 is the data's.
      response_length: tokens of a response; 0 is the data's.
      encode: text -> ids, for a judge's fixed words.
      lora: of the adapters that its folder holds, if it does.
      start: ids that every text begins with.
      base: the digest of what these stand on, or of a whole folder's parameters.
    """

    settings: ModelSettings
    prompt_length: int = 0
    response_length: int = 0
    encode: Callable[[str], list[int]] | None = None
    lora: LoraSettings | None = None
    start: tuple[int, ...] = ()
    base: str = ""


def program(
    job: str,
    bindings: Mapping[str, Any],
    given: Mapping[str, Any],
    share: Share = WHOLE,
) -> Program:
    """Returns the program that a job would run.

    Args:
      job: one of `BUILDERS`.
      bindings: the job's arguments; what is missing has the job's defaults.
      given: `MODELS` name -> shape, in place of a folder that is not at hand.
      share: with one device's part, what it would compute if it were alone.

    Raises:
      UserError: a model's shape is not known, or settings don't fit each other.
    """
    signature = inspect.signature(getattr(BUILDERS[job][1], job))
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    said = defaults | dict(bindings)
    loop = said["loop"]
    rows = loop.batch_size // share.rows
    said["loop"] = dataclasses.replace(loop, batch_size=rows)
    return BUILDERS[job][0](job, said, given, share)


def _described(folder: str, kind: str, flag: str, given: Mapping[str, Any]) -> Model:
    """Returns the shape that a flag gives, else that of a folder that exists."""
    if flag in given:
        return Model(given[flag])
    if not folder or not folders.resolve(folder).exists():
        raise UserError(
            f"the shape of {folder or 'a model'!r} is not known: there is no such "
            f"folder here; --{flag}=configs/models/t5_1_1_large.gin would name a shape"
        )
    description = folders.read_description(folder, kind)
    encode, start = _encoder(folder)
    return Model(
        description.settings,
        description.feature_lengths["inputs"],
        description.feature_lengths["targets"],
        encode,
        description.lora,
        start,
        description.base_digest or adapters.digest_if_there(folder),
    )


def _encoder(folder: str) -> tuple[Callable[[str], list[int]], tuple[int, ...]]:
    """Returns how a folder's model reads words, and what its texts begin with."""
    from nlhf_jax.data import prompts, vocabularies

    vocabulary = vocabularies.load_vocabulary(folders.vocabulary_file(folder))
    start, _ = prompts.frame_of(vocabulary)
    return lambda text: vocabularies.encode(text, vocabulary), start


def _one_id_a_word(text: str) -> list[int]:
    """Stands for a vocabulary that is not at hand: a few ids more or less."""
    return [2] * len(text.split())


def _frozen(network: Any, memory: MemorySettings) -> PyTree:
    return jax.eval_shape(
        lambda params: policies.as_frozen(params, memory), params_of(network)
    )


def _policy_program(
    job: str, said: Mapping[str, Any], given: Mapping[str, Any], share: Share
) -> Program:
    algorithm, loop, memory = said["algorithm"], said["loop"], said["memory"]
    lengths = said["data"].task_feature_lengths
    reference = _described(
        said["reference_checkpoint"], "language_model", "reference_model", given
    )
    network = language_model(share.of(reference.settings, memory), memory)
    length = said["max_decode_length"] or reference.response_length
    length = length or lengths["targets"]
    models = _models(said, given, algorithm)

    def judge_of(kind: str, model: Model) -> Any:
        kept = judge_memory(model.settings, memory)
        return _judge_network(kind, model, lengths["inputs"], length, kept, share)

    nets = {kind: judge_of(kind, model) for kind, model in models.items()}
    lora = said["lora"]
    is_shared = {
        kind: model.lora
        for kind, model in models.items()
        if lora
        and model.lora
        and model.base == reference.base
        and reference.lora in (None, lora)
    }
    judge = learned_judge(nets.get("preference"), nets.get("reward"))
    judge = judges.on_base(judge, is_shared)
    if said["outside_judge"]:  # its two programs, in one
        judge = indifferent()
    trained = _trained_network(network, lora)
    whole = {kind: net for kind, net in nets.items() if kind not in is_shared}
    frozen = {BASE if lora else REFERENCE: network} | whole
    shared = {k: with_base(nets[k], None, one) for k, one in is_shared.items()}
    if lora:
        # The reference's own adapters, where it has some.
        shared[REFERENCE] = trained if reference.lora == lora else None
    step = steps.policy_step(
        network,
        algorithm,
        judge,
        optimizer=said["optimizer"],
        loop=loop,
        max_decode_length=length,
        num_updates_per_rollout=said["num_updates_per_rollout"],
        lora=lora,
    )
    return Program(
        job=job,
        step=step,
        state=jax.eval_shape(step.init_state, params_of(trained)),
        frozen={name: _frozen(net, memory) for name, net in frozen.items()}
        | {name: params_of(net) if net else {} for name, net in shared.items()},
        batch=prompts_of(loop.batch_size, lengths["inputs"]),
        logical_axes=trained.logical_axes,
        frozen_axes={name: net.logical_axes for name, net in frozen.items()}
        | {name: net.logical_axes if net else {} for name, net in shared.items()},
        loop=loop,
        memory=memory,
        mesh=said["mesh"],
        shapes={REFERENCE: reference.settings}
        | {kind: model.settings for kind, model in models.items()},
        algorithm=algorithm,
        network=network,
        prompt_length=lengths["inputs"],
        response_length=length,
    )


def _trained_network(network: Any, lora: LoraSettings | None) -> Any:
    """Returns what gives the trained parameters' shapes and logical axes."""
    return network if lora is None else with_base(network, None, lora)


def _models(
    said: Mapping[str, Any], given: Mapping[str, Any], algorithm: Algorithm
) -> dict[str, Model]:
    """Returns the judges the job loads: those asked, and the one that compares."""
    found, asked = {}, train.asks(algorithm, said["outside_judge"])
    for kind in ("preference", "reward"):
        folder, flag = said[f"{kind}_checkpoint"], f"{kind}_model"
        compares = kind == "preference" and (folder or flag in given)
        if kind in asked or compares:
            found[kind] = _described(folder, kind, flag, given)
    return found


def _judge_network(
    kind: str,
    model: Model,
    prompt_length: int,
    response_length: int,
    memory: MemorySettings,
    share: Share,
) -> Any:
    return judges.NETWORKS[kind](
        share.of(model.settings, memory),
        model.encode or _one_id_a_word,
        model.start,
        prompt_length=model.prompt_length or prompt_length,
        response_length=model.response_length or response_length,
        memory=memory,
    )


def _supervised_program(
    job: str, said: Mapping[str, Any], given: Mapping[str, Any], share: Share
) -> Program:
    loop, memory = said["loop"], said["memory"]
    lengths = said["data"].task_feature_lengths
    prompts = prompts_of(loop.batch_size, lengths["inputs"])
    responses = responses_of(loop.batch_size, lengths["targets"])
    model = _trained_model(said, given)
    if job == "sft":
        network = language_model(share.of(model.settings, memory), memory)
        batch = SupervisedBatch(prompts, responses)
    else:
        network = _judge_network(
            job, model, lengths["inputs"], lengths["targets"], memory, share
        )
        labels_B = jax.ShapeDtypeStruct((loop.batch_size,), jnp.float32)
        batch = ComparisonBatch(prompts, responses, responses, labels_B)
    lora = said["lora"]
    trained = _trained_network(network, lora)
    step = steps.supervised(
        STEP_MAKERS[job], network, optimizer=said["optimizer"], loop=loop, lora=lora
    )
    return Program(
        job=job,
        step=step,
        state=jax.eval_shape(step.init_state, params_of(trained)),
        frozen={BASE: _frozen(network, memory)} if lora else {},
        batch=batch,
        logical_axes=trained.logical_axes,
        frozen_axes={BASE: network.logical_axes} if lora else {},
        loop=loop,
        memory=memory,
        mesh=said["mesh"],
        shapes={POLICY: model.settings},
        algorithm=None,
        network=None,
        prompt_length=lengths["inputs"],
        response_length=lengths["targets"],
    )


def _trained_model(said: Mapping[str, Any], given: Mapping[str, Any]) -> Model:
    """Returns what a supervised job trains: by flag, by folder, or by its settings."""
    folder = said["initial_checkpoint_path"]
    has_folder = bool(folder) and folders.resolve(folder).exists()
    if "model" in given:
        return Model(given["model"])
    if has_folder:
        description = folders.read_description(folder, folders.kind_of(folder))
        encode, start = _encoder(folder)
        return Model(description.settings, encode=encode, start=start)
    if said.get("model") is not None:
        return Model(said["model"])
    return _described(folder, "language_model", "model", given)


STEP_MAKERS = {
    "sft": supervised_step.make_sft_step,
    "preference": supervised_step.make_preference_step,
    "reward": supervised_step.make_reward_step,
}
BUILDERS = {
    "train": (_policy_program, train),
    "sft": (_supervised_program, supervised),
    "preference": (_supervised_program, supervised),
    "reward": (_supervised_program, supervised),
}


def folder_flags(job: str) -> dict[str, str]:
    """Returns the job's parameter that names each model's folder, by flag."""
    if job == "train":
        kinds = ("reference", "preference", "reward")
        return {f"{kind}_model": f"{kind}_checkpoint" for kind in kinds}
    return {"model": "initial_checkpoint_path"}
