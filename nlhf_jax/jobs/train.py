# SPDX-License-Identifier: Apache-2.0
"""The main job: pursue the equilibrium of the preference game from a reference."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from nlhf_jax import distributed, global_arrays, partitioning
from nlhf_jax.alarms import AlarmSettings
from nlhf_jax.checkpoints import save_params
from nlhf_jax.checks import UserError, check_choice, check_integer
from nlhf_jax.data import batches as data_batches
from nlhf_jax.jobs import folders, judges, outside_steps, runs, steps, trained
from nlhf_jax.jobs.adapters import Stand, starts_at
from nlhf_jax.jobs.held_out import HeldOut
from nlhf_jax.jobs.policies import Policy, as_frozen, as_frozen_base, load_policy
from nlhf_jax.jobs.trained import Trained, stand_of
from nlhf_jax.models.adapters import adapted
from nlhf_jax.preferences.outside import OutsideJudge, check_serves
from nlhf_jax.settings import (
    DataSettings,
    LoopSettings,
    LoraSettings,
    MemorySettings,
    MeshSettings,
    OptimizerSettings,
)
from nlhf_jax.types import REFERENCE, Algorithm, Params, TrainState


def train(
    *,
    model_dir: str,
    algorithm: Algorithm,
    data: DataSettings,
    optimizer: OptimizerSettings,
    loop: LoopSettings,
    reference_checkpoint: str,
    preference_checkpoint: str = "",
    reward_checkpoint: str = "",
    initial_checkpoint_path: str = "",
    max_decode_length: int = 0,
    seed: int = 0,
    num_eval_examples: int = 64,
    num_gap_samples: int = 4,
    num_updates_per_rollout: int = 1,
    write_sets: tuple[str, ...] = (),
    mesh: MeshSettings = MeshSettings(),  # noqa: B008 frozen, so it can be shared
    memory: MemorySettings = MemorySettings(),  # noqa: B008
    alarms: AlarmSettings = AlarmSettings(),  # noqa: B008
    lora: LoraSettings | None = None,
    outside_judge: OutsideJudge | None = None,
) -> None:
    """Trains a policy with one of the registered algorithms.

    Args:
      model_dir: folder for checkpoints, metrics and the model's description.
      algorithm: speakers, comparisons and loss.
      data: the task whose prompts are answered; its targets are not read.
      optimizer: optimiser settings.
      loop: steps, batch size and periods.
      reference_checkpoint: model folder of the reference policy mu.
      preference_checkpoint: model folder of the preference model, where the algorithm
        asks for comparisons.
      reward_checkpoint: model folder of the reward model, where it asks for ratings.
      initial_checkpoint_path: where the policy starts; empty is the reference.
      max_decode_length: longest response in tokens; 0 is the reference's own.
      seed: of the prompts' order and of sampling.
      num_eval_examples: held-out prompts answered at each evaluation.
      num_gap_samples: candidates, and as many opponents, that bound the duality gap
        from below at each evaluation, at least 2; 0 leaves the bound out.
      num_updates_per_rollout: optimiser steps on the same responses; at the later ones
        policy gradients clip the probability ratio. One step of `loop` is one rollout.
      write_sets: parameter sets besides the policy that are written as models of their
        own when training ends, to MODEL_DIR/sets/NAME.
      mesh: how devices are laid out.
      memory: what a step computes again, cuts up or halves to fit.
      alarms: when figures of the policy or the judge give a warning.
      lora: trains adapters on the reference's weights, which policy and reference then
        share; None trains all of the weights.
      outside_judge: a Python function of texts that compares responses, in place of a
        preference model. With one named too, that model judges held-out answers.

    Raises:
      UserError: a checkpoint is missing or does not fit, the algorithm needs a judge
        that is not given, the data or the folder is unusable.
    """
    named = preference_checkpoint, reward_checkpoint
    _check(algorithm, named, write_sets, outside_judge, loop, mesh)
    check_counts(num_eval_examples, num_updates_per_rollout, num_gap_samples)
    stand = stand_of(reference_checkpoint, lora)
    reference, shared = _load_reference(reference_checkpoint, stand, memory, mesh)
    judge = _load_judge(algorithm, reference_checkpoint, *named, memory, mesh, shared)
    prompts, held_out = _prompts(data, reference)
    reader, examiner = _asked(outside_judge, judge, reference, prompts, held_out)
    max_decode_length = max_decode_length or reference.response_length
    step = steps.policy_step(
        reference.network,
        algorithm,
        judge.judge,
        optimizer=optimizer,
        loop=loop,
        max_decode_length=max_decode_length,
        num_updates_per_rollout=num_updates_per_rollout,
        lora=lora,
        reader=reader,
    )
    first = initial_checkpoint_path or reference_checkpoint
    side = _sides(stand, first, reference, step, memory, mesh, seed)
    runs.check_layout(side.trained.start, side.trained.logical_axes, loop, mesh)
    folder = side.trained.opened(model_dir, seed)
    asked = data.chat_template, data.system_prompt
    shape = reference.description, reference.vocabulary_path
    side.trained.describe(folder, *shape, *asked)
    evaluate = HeldOut(
        side.reference,
        examiner,
        held_out,
        num_prompts=num_eval_examples,
        num_gap_samples=num_gap_samples,
        max_decode_length=max_decode_length,
        seed=seed,
        folder=folder / "samples" / "held_out",
    )
    state = runs.run(
        runs.Training(
            algorithm.name,
            step.step_fn,
            side.frozen | judge.frozen,
            _batches(prompts, seed, loop.batch_size, is_read=reader is not None),
            side.trained.evaluated(evaluate),
            {"data/truncated_prompts": prompts.num_truncated_prompts},
            side.trained.logical_axes,
            side.frozen_axes | judge.logical_axes,
            alarms,
        ),
        folder=folder,
        initial_state=side.trained.start,
        settings=loop,
        seed=seed,
        mesh=mesh,
    )
    _write_sets(folder, write_sets, state, side.trained)


def _check(
    algorithm: Algorithm,
    judges_named: tuple[str, str],
    sets: tuple[str, ...],
    outside: OutsideJudge | None,
    loop: LoopSettings,
    mesh: MeshSettings,
) -> None:
    check_judges(algorithm, *judges_named, outside)
    outside_steps.check(outside, loop, mesh)
    check_sets(algorithm, sets)


def _prompts(data: DataSettings, reference: Policy):
    """Returns the examples that are trained on, and those held out."""
    return (
        data_batches.load_supervised(data, split, reference.vocabulary)
        for split in ("train", "evaluation")
    )


def _batches(
    prompts: data_batches.SupervisedData, seed: int, batch_size: int, *, is_read: bool
) -> Callable[[int, Any], Any]:
    """Returns (step, rows) -> prompts; with a judge of texts, also whose they are."""
    if is_read:
        return functools.partial(outside_steps.batch, prompts, seed, batch_size)
    return lambda step, rows: prompts.batch(seed, step, batch_size, rows).prompts


def _asked(
    outside: OutsideJudge | None,
    judge: judges.LoadedJudge,
    reference: Policy,
    prompts: data_batches.SupervisedData,
    held_out: data_batches.SupervisedData,
) -> tuple[outside_steps.Reader | None, Any]:
    """Returns who is asked in a step on the host, and who judges held-out answers."""
    if outside is None:
        return None, judge
    of = functools.partial(outside_steps.Reader, outside, reference.vocabulary)
    judged_by = judge if judge.compares else of(held_out.prompt_texts)
    return of(prompts.prompt_texts), judged_by


def _load_reference(
    checkpoint: str, stand: Stand | None, memory: MemorySettings, mesh: MeshSettings
) -> tuple[Policy, tuple[str, Params] | None]:
    """Returns the reference, or the base it stands on, and what a judge may share."""
    if stand is None:
        return load_policy(checkpoint, memory, mesh), None
    found = load_policy(checkpoint, memory, mesh, stand.base)
    kept = as_frozen_base(found.params, memory)
    return dataclasses.replace(found, params=kept), (stand.digest, kept)


@dataclasses.dataclass(frozen=True)
class _Sides:
    """What is trained and what it is compared with; with adapters they share a base."""

    trained: Trained
    reference: Policy
    frozen: dict[str, Any]
    frozen_axes: dict[str, Any]


def _sides(
    stand: Stand | None,
    first: str,
    reference: Policy,
    step: steps.Step,
    memory: MemorySettings,
    mesh: MeshSettings,
    seed: int,
) -> _Sides:
    network = reference.network
    kept = as_frozen(reference.params, memory)
    if stand is None:
        return _Sides(
            trained.whole(network, first, seed, step.init_state),
            reference,
            {REFERENCE: kept},
            {REFERENCE: network.logical_axes},
        )
    mine = starts_at(stand, first)
    policy = trained.on_base(mine, network, kept, seed, step.init_state)
    theirs = stand.adapters(network, partitioning.make_mesh(mesh))
    return _Sides(
        policy,
        dataclasses.replace(reference, params=adapted(kept, theirs, stand.lora)),
        {REFERENCE: theirs} | dict(policy.frozen),
        {REFERENCE: trained.reference_axes(stand, network)} | policy.frozen_axes,
    )


def asks(algorithm: Algorithm, outside: OutsideJudge | None = None) -> set[str]:
    """Returns the judges that an algorithm asks: "preference", "reward" or both.

    None of them with a judge of texts in their place.
    """
    if outside is not None:
        return set()
    compares = any(part.comparisons for part in algorithm.parts)
    rates = any(part.ratings for part in algorithm.parts)
    found = {"preference": compares, "reward": rates}
    return {name for name, is_asked in found.items() if is_asked}


def _load_judge(
    algorithm: Algorithm,
    policy: str,
    preference: str,
    reward: str,
    memory: MemorySettings,
    mesh: MeshSettings,
    shared: tuple[str, Params] | None,
) -> judges.LoadedJudge:
    return judges.load_judge(
        policy_checkpoint=policy,
        # Also where the algorithm asks for rewards only: held-out answers are compared.
        preference_checkpoint=preference,
        reward_checkpoint=reward if "reward" in asks(algorithm) else "",
        memory=memory,
        mesh=mesh,
        shared=shared,
    )


def check_judges(
    algorithm: Algorithm,
    preference: str,
    reward: str,
    outside: OutsideJudge | None = None,
) -> None:
    """Raises a UserError if the algorithm asks a judge that nobody has named."""
    if outside is not None:
        check_serves(algorithm)
    asked = asks(algorithm, outside)
    if "preference" in asked and not preference:
        raise UserError(
            f"{algorithm.name} compares responses: PREFERENCE_CHECKPOINT must name a "
            "model folder, got ''"
        )
    if "reward" in asked and not reward:
        raise UserError(
            f"{algorithm.name} rates responses: REWARD_CHECKPOINT must name a model "
            "folder, got ''"
        )


def check_counts(
    num_eval_examples: int = 1,
    num_updates_per_rollout: int = 1,
    num_gap_samples: int = 0,
) -> None:
    """Raises a UserError for a count below its least value."""
    check_integer("num_eval_examples", num_eval_examples, 1)
    check_integer("num_updates_per_rollout", num_updates_per_rollout, 1)
    if check_integer("num_gap_samples", num_gap_samples) == 1:
        raise UserError("num_gap_samples must be 0 or at least 2, got 1")


def check_sets(algorithm: Algorithm, names: tuple[str, ...]) -> None:
    """Raises a UserError for a name that is no parameter set of the algorithm."""
    if names and not algorithm.derived_sets:
        raise UserError(f"{algorithm.name} has only its policy to write, got {names!r}")
    for name in names:
        check_choice(f"parameter set of {algorithm.name}", name, algorithm.derived_sets)


def _write_sets(
    folder: pathlib.Path,
    names: tuple[str, ...],
    state: TrainState,
    is_of: Trained,
) -> None:
    """Writes parameter sets as model folders of their own, MODEL_DIR/sets/NAME."""
    description = folders.description_of(folder)
    for name in names:
        target = folder / "sets" / name
        is_of.describe(target, description, folders.vocabulary_file(folder))
        params = global_arrays.fetch(state.param_sets[name])
        distributed.first_does(
            "parameter set", functools.partial(save_params, target, params, "float32")
        )
