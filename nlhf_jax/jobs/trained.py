# SPDX-License-Identifier: Apache-2.0
"""What a run trains: all of a model's parameters, or adapters on a frozen base."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from nlhf_jax.jobs import adapters, first_states, folders, run_records
from nlhf_jax.models.adapters import adapter_axes
from nlhf_jax.settings import LoraSettings
from nlhf_jax.types import BASE, Params, ParamSets, TrainState

Evaluate = Callable[[TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trained parameters of a run, and what stays beside them.

    Attributes:
      start: how the first state is made.
      logical_axes: of what is trained.
      frozen: the base, where adapters are trained; else nothing.
      frozen_axes: of that.
      stand: what adapters stand on; None without.
    """

    start: first_states.InitialState
    logical_axes: Any
    frozen: ParamSets
    frozen_axes: dict[str, Any]
    stand: adapters.Stand | None = None

    def opened(self, model_dir: str, seed: int) -> pathlib.Path:
        """Returns the run's folder, made or, where it can be gone on with, opened.

        Raises:
          UserError: what was trained there has another base, shape or seed, or the
            folder cannot be written; then nothing is written.
        """
        adapters.check_goes_on(folders.expanded("MODEL_DIR", model_dir), self.stand)
        run = run_records.Continued(seed, self.start.shapes)
        return run_records.open_folder(model_dir, run)

    def evaluated(self, evaluate: Evaluate) -> Evaluate:
        """Returns an evaluation of states, given one of whole parameters."""
        if self.stand is None:
            return evaluate
        return adapters.evaluated_on(evaluate, self.frozen[BASE], self.stand.lora)

    def describe(
        self,
        model_dir: pathlib.Path,
        description: folders.ModelDescription,
        vocabulary_path: str,
        chat_template: str | None = None,
        system_prompt: str = "",
    ) -> None:
        """Writes a folder's description, given that of the whole model."""
        # That of a reference may have adapters, which what is trained here does not.
        description = dataclasses.replace(
            description, lora=None, base="", base_digest="", reference_digest=""
        )
        if self.stand is not None:
            description = self.stand.describes(description)
        folders.describe(
            model_dir, description, vocabulary_path, chat_template, system_prompt
        )


def whole(
    network: Any, checkpoint: str, seed: int, make: Callable[[Params], TrainState]
) -> Trained:
    """Returns a run of all parameters; the arguments are `initial_state`'s."""
    start = first_states.initial_state(network.init, checkpoint, seed, make)
    return Trained(start, network.logical_axes, {}, {})


def on_base(
    stand: adapters.Stand,
    network: Any,
    base: Params,
    seed: int,
    make: Callable[[Params], TrainState],
) -> Trained:
    """Returns a run of adapters.

    Args:
      stand: what they stand on and start from.
      network: of the base.
      base: its parameters, as they are kept.
      seed: of fresh adapters.
      make: adapters -> state.
    """
    return Trained(
        first_states.state_of_adapters(stand, network, seed, make),
        adapter_axes(network.logical_axes, stand.lora),
        {BASE: base},
        {BASE: network.logical_axes},
        stand,
    )


def reference_axes(stand: adapters.Stand, network: Any) -> dict[str, Any]:
    """Returns the logical axes of a reference's adapters, {} where it has none."""
    return adapter_axes(network.logical_axes, stand.lora) if stand.start else {}


def stand_of(checkpoint: str, lora: LoraSettings | None) -> adapters.Stand | None:
    """Returns what a run stands on: see `adapters.stand_on`; None without adapters."""
    return None if lora is None else adapters.stand_on(checkpoint, lora)
