# SPDX-License-Identifier: Apache-2.0
"""What a training job compiles, apart from what it reads and runs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from nlhf_jax import (
    optimizers,
    outside_step,
    partitioning,
    supervised_step,
    train_step,
)
from nlhf_jax.jobs.outside_steps import Halves, OutsideStep, Reader
from nlhf_jax.models.adapters import with_base
from nlhf_jax.settings import LoopSettings, LoraSettings, OptimizerSettings
from nlhf_jax.types import (
    BASE,
    Algorithm,
    Judge,
    LanguageModel,
    Params,
    ParamSets,
    Schedule,
    TrainState,
)


class Step(NamedTuple):
    """A job's step and the state it starts from, as pure functions.

    Attributes:
      step_fn: (state, frozen, batch, key) -> (state, metrics), or with a judge on the
        host its halves.
      init_state: parameters -> the state before the first update.
    """

    step_fn: Callable[..., tuple[TrainState, dict]] | Halves
    init_state: Callable[[Params], TrainState]


def _optimizer_and_rate(
    settings: OptimizerSettings, num_updates: int
) -> tuple[Any, Schedule]:
    return (
        optimizers.make_optimizer(settings, num_updates),
        optimizers.learning_rate_schedule(settings, num_updates),
    )


def policy_step(
    network: LanguageModel,
    algorithm: Algorithm,
    judge: Judge,
    *,
    optimizer: OptimizerSettings,
    loop: LoopSettings,
    max_decode_length: int,
    num_updates_per_rollout: int,
    lora: LoraSettings | None = None,
    reader: Reader | None = None,
) -> Step:
    """Returns the step of `train`: rollout, score and update.

    Args:
      network: of all parameter sets.
      algorithm: speakers, comparisons and loss.
      judge: answers them from the frozen sets.
      optimizer: its settings.
      loop: steps and microbatches.
      max_decode_length: longest response in tokens.
      num_updates_per_rollout: optimiser steps on the same responses.
      lora: of adapters, where they are what is trained: the parameter sets are then
        adapters on the frozen set "base".
      reader: a judge on the host, which is asked in place of `judge`.
    """
    transformation, rate = _optimizer_and_rate(
        optimizer, loop.train_steps * num_updates_per_rollout
    )
    learning = {
        "num_microbatches": loop.num_microbatches,
        "num_updates_per_rollout": num_updates_per_rollout,
        "learning_rate": rate,
        "skip_not_finite": loop.max_skipped_steps > 0,
    }

    def make(network: LanguageModel):
        return train_step.make_train_step(
            network,
            algorithm,
            judge,
            transformation,
            max_length=max_decode_length,
            **learning,
        )

    def make_draw(network: LanguageModel):
        return functools.partial(
            outside_step.draw,
            network,
            algorithm,
            num_parts=reader.judge.num_parts,
            max_length=max_decode_length,
        )

    def make_learn(network: LanguageModel):
        bound = network, algorithm, transformation
        return functools.partial(outside_step.learn, *bound, **learning)

    def init_state(params: Params) -> TrainState:
        return train_step.init_state(params, algorithm, transformation)

    if reader is None:
        return Step(_on_base(make, network, lora), init_state)
    halves = (_on_base(one, network, lora) for one in (make_draw, make_learn))
    return Step(Halves(*halves, algorithm.comparisons, reader), init_state)


def _on_base(
    make: Callable[[Any], Callable[..., Any]], network: Any, lora: LoraSettings | None
) -> Callable[..., tuple[TrainState, dict]]:
    """Returns a step, whose base with adapters is an argument, never a constant."""
    if lora is None:
        return make(network)

    def step_fn(state: TrainState, frozen: ParamSets, *rest: Any):
        return make(with_base(network, frozen[BASE], lora))(state, frozen, *rest)

    return step_fn


def supervised(
    make_step: Callable[..., Any],
    network: Any,
    *,
    optimizer: OptimizerSettings,
    loop: LoopSettings,
    lora: LoraSettings | None = None,
) -> Step:
    """Returns the step of `sft`, `preference` or `reward`.

    Args:
      make_step: of `supervised_step`: (network, optimiser, ...) -> step.
      network: what is trained.
      optimizer: its settings.
      loop: steps and microbatches.
      lora: of adapters, as in `policy_step`.
    """
    transformation, rate = _optimizer_and_rate(optimizer, loop.train_steps)

    def make(network: Any):
        update = make_step(
            network,
            transformation,
            num_microbatches=loop.num_microbatches,
            learning_rate=rate,
            skip_not_finite=loop.max_skipped_steps > 0,
        )

        def supervised_step(state: TrainState, frozen: ParamSets, *rest: Any):
            return update(state, *rest)

        return supervised_step

    return Step(
        _on_base(make, network, lora),
        lambda params: supervised_step.init_state(params, transformation),
    )


def compiled(
    step_fn: Callable[..., tuple[TrainState, dict]] | Halves,
    mesh: Mesh,
    lie: partitioning.StepShardings,
) -> partitioning.CompiledFunction | OutsideStep:
    """Returns (state, frozen, batch, key) -> (state, metrics), compiled when called."""
    if isinstance(step_fn, Halves):
        return OutsideStep(step_fn, mesh, lie)
    return partitioning.compile_step(
        step_fn,
        mesh,
        lie.state,
        lie.frozen,
        partitioning.batch_sharding(mesh),
        partitioning.replicated(mesh),
    )
