# SPDX-License-Identifier: Apache-2.0
"""What becomes of the parameter sets that an algorithm derives from the policy.

Each function returns an `update_sets` of an `Algorithm`: (param_sets, step, metrics) ->
param_sets, where step counts the steps done and metrics is what the last one measured.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from nlhf_jax.checks import check_integer, check_range
from nlhf_jax.types import POLICY, ParamSets, UpdateSets

Metrics = Mapping[str, jax.Array]


def snapshots(moves: Mapping[str, str], *, period: int) -> UpdateSets:
    """Returns an update that copies whole sets at every `period`-th step.

    Args:
      moves: set -> the set it becomes; all read what was there before any moved.
      period: steps between two copies, >= 1.

    Raises:
      UserError: period out of range.
    """
    check_integer("period", period, 1)
    return moves_when(lambda step, metrics: step % period == 0, moves)


def moves_when(
    is_due: Callable[[jax.Array, Metrics], jax.Array], moves: Mapping[str, str]
) -> UpdateSets:
    """Returns an update that copies whole sets after the steps that `is_due` names.

    Args:
      is_due: (step, metrics) -> a boolean scalar.
      moves: set -> the set it becomes; all read what was there before any moved.
    """

    def update(param_sets: ParamSets, step: jax.Array, metrics: Metrics) -> ParamSets:
        due = is_due(step, metrics)
        moved = {
            name: jax.tree.map(
                lambda new, old: jnp.where(due, new, old),
                param_sets[source],
                param_sets[name],
            )
            for name, source in moves.items()
        }
        return dict(param_sets) | moved

    return update


def moving_average(name: str, *, decay: float) -> UpdateSets:
    """Returns an update a <- (1 - decay) theta + decay a of the set `name`.

    Raises:
      UserError: decay outside [0, 1].
    """
    check_range("decay", decay, 0.0, 1.0)

    def update(param_sets: ParamSets, step: jax.Array, metrics: Metrics) -> ParamSets:
        del step, metrics
        average = jax.tree.map(
            lambda new, old: (1.0 - decay) * new + decay * old,
            param_sets[POLICY],
            param_sets[name],
        )
        return dict(param_sets) | {name: average}

    return update


def in_turn(*updates: UpdateSets) -> UpdateSets:
    """Returns an update that applies several, one after the other."""

    def update(param_sets: ParamSets, step: jax.Array, metrics: Metrics) -> ParamSets:
        for one in updates:
            param_sets = one(param_sets, step, metrics)
        return param_sets

    return update
