# SPDX-License-Identifier: Apache-2.0
"""An optimiser's state that goes along with a model, and runs that go on from it.

MODEL_DIR/optimizer.safetensors     SLOT/PARAMETER of an imported model, float32

A run that starts at such a folder with the same optimiser begins with these averages
and their count of updates, and at the first step of its own learning-rate schedule. The
checkpoints of a run have such a state too, which `nlhf export` takes from there.
"""

import functools
import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from nlhf_jax import distributed, global_arrays, parameter_files, stored_states
from nlhf_jax.checks import UserError, check_choice, check_integer
from nlhf_jax.conversion import safetensors_files
from nlhf_jax.conversion.shapes import flat, nested
from nlhf_jax.conversion.tensors import Moments, Tensor
from nlhf_jax.jobs import folders
from nlhf_jax.optimizers import SLOTS, is_factored, slots_of, with_slots
from nlhf_jax.types import POLICY, TrainState

MOMENTS_FILE = "optimizer.safetensors"
_log = logging.getLogger(__name__)


def write(folder: pathlib.Path, moments: Moments) -> None:
    """Writes an optimiser's state into a model folder."""
    tensors = {
        f"{slot}/{name}": tensor
        for slot, of in moments.slots.items()
        for name, tensor in of.items()
    }
    facts = {
        "sha256": safetensors_files.DIGEST,
        "optimizer": moments.optimizer,
        "count": moments.count,
    }
    header = {parameter_files.HEADER: json.dumps(facts)}
    safetensors_files.write(folder / MOMENTS_FILE, tensors, header)


def beside(source: pathlib.Path) -> Moments | None:
    """Returns the state beside a parameter file, None where there is none.

    Raises:
      UserError: the file is damaged.
    """
    file = source.parent / MOMENTS_FILE
    if not file.is_file():
        return None
    tensors = safetensors_files.tensors_of(file)
    said = parameter_files.read_params_metadata(file)
    name = check_choice(f"optimizer of {file}", said.get("optimizer", ""), SLOTS)
    count = check_integer(f"count of {file}", said.get("count"))
    if said.get("sha256") != safetensors_files.digest_of(tensors):
        raise UserError(f"{file} is damaged: its digest differs")
    slots: dict[str, dict[str, Tensor]] = {slot: {} for slot in SLOTS[name]}
    for path, tensor in tensors.items():
        slot, _, parameter = path.partition("/")
        if slot not in slots:
            raise UserError(f"tensor {path} of {file} is of no slot of {name}")
        slots[slot][parameter] = tensor
    return Moments(name, count, slots)


def of_step(folder: pathlib.Path) -> Moments | None:
    """Returns the policy's optimiser state in a step's folder, None where it has none.

    Arrays that Adafactor has no use for are left out.
    """
    stored = stored_states.stored_arrays(folder)
    parts = stored.get("opt_states", {}).get(POLICY) or []
    shapes = flat(stored["param_sets"][POLICY])
    for place, part in enumerate(parts):
        for name, slots in SLOTS.items():
            if not isinstance(part, dict) or not {"count", *slots} <= part.keys():
                continue
            before = f"opt_states/{POLICY}/{place}"
            read = functools.partial(stored_states.read_stored_leaf, folder, stored)
            found: dict[str, dict[str, Tensor]] = {slot: {} for slot in slots}
            for slot, of in found.items():
                for one, leaf in flat(part[slot]).items():
                    shape, path = tuple(leaf.shape), f"{before}/{slot}/{one}"
                    if name == "adamw" or _is_used(slot, shapes[one].shape):
                        reads = functools.partial(read, path)
                        of[one] = Tensor(shape, leaf.dtype, reads)
            return Moments(name, int(read(f"{before}/count")), found)
    return None


def _is_used(slot: str, shape: tuple[int, ...]) -> bool:
    """Whether Adafactor has a use for a slot of a parameter of this shape."""
    return is_factored(tuple(shape)) == (slot != "v")


def continued(
    state: TrainState, shardings: PyTree, moments: Moments, source: str
) -> TrainState:
    """Returns a run's first state with the averages that lie beside its parameters.

    Of another optimiser they are left out, and that is said.

    Args:
      state: before the first update.
      shardings: of the state.
      moments: what was read.
      source: the folder, for a sentence.

    Raises:
      UserError: an average is missing or has another shape than the optimiser's.
    """
    name, mine = slots_of(state.opt_states[POLICY])
    _, places = slots_of(shardings.opt_states[POLICY])
    if name != moments.optimizer:
        say(
            f"the optimiser's state in {source!r} is of {moments.optimizer} and this "
            f"run's is {name}: it starts without"
        )
        return state
    slots = {}
    for slot in SLOTS[name]:
        there, found = flat(getattr(mine, slot)), dict(moments.slots[slot])
        lie = flat(getattr(places, slot))
        new = {
            one: _placed(f"{slot}/{one}", found.pop(one, None), leaf, lie[one])
            for one, leaf in there.items()
        }
        if found:
            raise UserError(
                f"the optimiser's state in {source!r} holds {slot}/{min(found)}, which "
                "this run's has not: another network?"
            )
        slots[slot] = nested(new)
    count = np.asarray(moments.count, mine.count.dtype)
    count = global_arrays.put(count, places.count)
    opt_states = dict(state.opt_states)
    opt_states[POLICY] = with_slots(opt_states[POLICY], count, slots)
    say(f"the optimiser goes on from {source!r}, after {moments.count} updates")
    return state._replace(opt_states=opt_states)


def _placed(name: str, found: Tensor | None, leaf: jax.Array, sharding: Any) -> Any:
    """Returns an average where it is to lie; a slot without use stays empty."""
    if found is None and leaf.shape == (1,):
        return leaf
    if found is None or tuple(found.shape) != leaf.shape:
        got = "none" if found is None else f"{tuple(found.shape)}"
        raise UserError(
            f"the optimiser's {name} must have the shape {leaf.shape}, got {got}"
        )
    return global_arrays.put(found.read().astype(leaf.dtype), sharding)


def say(text: str) -> None:
    """Says a sentence, once for all processes."""
    if distributed.is_first():
        _log.warning("%s", text)


def is_beside(source: str) -> bool:
    """Returns whether an optimiser's state lies beside a parameter file."""
    return (pathlib.Path(source).parent / MOMENTS_FILE).is_file()


def for_start(checkpoint: str | pathlib.Path) -> Moments | None:
    """Returns what an imported model's folder keeps of its optimiser, None without.

    Raises:
      UserError: the file is damaged.
    """
    sources = stored_states.param_sources(folders.resolve(checkpoint).absolute())
    if not sources or not sources[0].is_file():
        return None
    return beside(sources[0])
