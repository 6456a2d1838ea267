# SPDX-License-Identifier: Apache-2.0
"""T5X's states of optimisers as ours, and ours as T5X's.

Both have Adafactor (Shazeer and Stern, 2018, arXiv 1804.04235). After t updates, with
d = 1 - (t + 1)^-0.8, an average a of x becomes d a + (1 - d) x. `v` averages
g^2 + 1e-30; `v_row` averages the mean of that over one axis, `v_col` over the other,
and v_row v_col / mean(v_row) stands for `v`. Of a matrix with two axes both do the
same: it is factored if no side is below 128, and `v_row` lies along the shorter one.
Where layers are scanned or heads apart T5X goes by its axes' names: `v_row` lies along
the width D, `v_col` along all others, whatever their sizes, layer by layer:

    query, key, value   (D, L, H, K)    v_row (D, L)    v_col (L, H, K)
    out                 (H, L, K, D)    v_row (L, D)    v_col (H, L, K)
    wi                  (D, L, F)       v_row (D, L)    v_col (L, F)
    wo                  (F, L, D)       v_row (L, D)    v_col (F, L)

The averages are linear in g^2 and mean(v_row) = mean(v_col). So which of the two comes
first changes nothing, and the means of a `v` are the factors that the same gradients
give. The reverse is not known: factors never become a `v`.
AdamW's `mu` and `nu` are arrays like the parameter, in T5X as in optax, whose states
T5X stores by position: 0 is `scale_by_adam`, 2 the schedule of `optax.adamw`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import t5x_layouts as layouts
from nlhf_jax.conversion.t5x_arrays import STATES, Checkpoint, Index, StoredArray
from nlhf_jax.conversion.tensors import Moments, Tensor, of_array
from nlhf_jax.optimizers import SLOTS, SMALLEST_FACTORED, is_factored, row_axis
from nlhf_jax.t5_settings import T5Settings

ADAFACTOR, ADAMW = "adafactor", "adamw"
ROW, COLUMN, WHOLE, MOMENTUM = ADAFACTOR_SLOTS = "v_row", "v_col", "v", "m"
UNUSED = (1,)  # shape of a slot that a parameter has no use for
ADAM_PLACE, SCHEDULE_PLACE = "0", "2"

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class NotHeld(Exception):
    """A state that our optimisers do not have; its text says why."""


def width_axis(name: str) -> int:
    """Returns which axis of one of our kernels is the network's width."""
    return 1 if re.search(r"/(out|wo)/kernel$", name) else 0


def _scan_axis(slot: str, name: str) -> int:
    """Returns which axis of a slot counts the layers, where that is a kernel's second.

    A factor has one axis less before it where that of the kernel's first is averaged.
    """
    if slot not in (ROW, COLUMN):
        return layouts.SCAN_AXIS
    return int((slot == ROW) == (width_axis(name) == 0))


def is_like_parameter(name: str, shape: Shape) -> bool:
    """Returns whether an array of a state is split over devices as its parameter is.

    T5X stores such an array by itself, and all others within the index.
    """
    slot = name.rpartition("/")[2]
    return slot not in (ROW, COLUMN, MOMENTUM, "count") and shape != UNUSED


# --- ours as theirs


def their_states(
    moments: Moments, shapes: Shapes, settings: T5Settings, scan: bool
) -> dict[str, Tensor]:
    """Returns the arrays below `param_states` by T5X's names.

    Args:
      moments: by our names.
      shapes: of our parameters.
      settings: of the network; with a bias in each layer its heads are apart.
      scan: whether layers are stacked.
    """
    if moments.optimizer == ADAFACTOR:
        states = {}
        for name, shape in shapes.items():
            slots = {slot: of[name] for slot, of in moments.slots.items() if name in of}
            if _goes_by_names(name, settings, scan):
                apart = layouts.apart(name, shape, settings)
                slots = _factors(name, slots, shape, apart)
            for slot in ADAFACTOR_SLOTS:
                states[f"{name}/{slot}"] = slots.get(slot, _unused())
        return dict(sorted(_by_layer(states, scan).items()))
    arrays = {}
    for slot in SLOTS[ADAMW]:
        of = {
            f"{name}/{slot}": layouts.with_heads(name, tensor, settings)
            for name, tensor in moments.slots[slot].items()
        }
        for name, tensor in _by_layer(of, scan).items():
            arrays[f"{ADAM_PLACE}/{slot}/{name.removesuffix('/' + slot)}"] = tensor
    count = of_array(np.asarray(moments.count, np.int32))
    counts = {f"{place}/count": count for place in (ADAM_PLACE, SCHEDULE_PLACE)}
    return dict(sorted((arrays | counts).items()))


def _unused() -> Tensor:
    return of_array(np.zeros(UNUSED, np.float32))


def _goes_by_names(name: str, settings: T5Settings, scan: bool) -> bool:
    """Whether T5X factors a parameter by its axes' names and not by their sizes."""
    if not settings.bias_in_each_layer or not name.endswith("/kernel"):
        return False
    return "attention/" in name or (scan and layouts.LAYER.match(name) is not None)


def _factors(
    name: str, slots: Mapping[str, Tensor], shape: Shape, apart: Shape
) -> dict[str, Tensor]:
    """Returns the factors of a kernel with heads apart, of the slots of ours."""
    axis = width_axis(name)
    if WHOLE in slots:
        rows, columns = (_mean(slots[WHOLE], one) for one in (1 - axis, axis))
    else:
        rows, columns = slots[ROW], slots[COLUMN]
        if row_axis(shape) != axis:
            rows, columns = columns, rows
    others = apart[:-1] if axis else apart[1:]
    return {ROW: rows, COLUMN: layouts.reshaped(columns, others)}


def _mean(tensor: Tensor, axis: int) -> Tensor:
    shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]

    def read() -> np.ndarray:
        return tensor.read().mean(axis, dtype=np.float64).astype(tensor.dtype)

    return Tensor(shape, tensor.dtype, read)


def _by_layer(states: Mapping[str, Tensor], scan: bool) -> dict[str, Tensor]:
    """Returns slots with those of equal layers as one; what is unused stays so."""
    if not scan:
        return dict(states)
    layers: dict[str, dict[int, Tensor]] = {}
    found = {}
    for name, tensor in states.items():
        theirs, layer = layouts.their_name(name)
        if layer is None or tensor.shape == UNUSED:
            found[theirs] = tensor
        else:
            layers.setdefault(theirs, {})[layer] = tensor
    for name, of in layers.items():
        parameter, _, slot = name.rpartition("/")
        found[name] = layouts.stacked(of, _scan_axis(slot, parameter))
    return found


# --- theirs as ours


class _Place(NamedTuple):
    """Where one of our parameters lies in T5X's arrays.

    Attributes:
      name: T5X's.
      layer: of stacked ones; None where it lies by itself.
      axis: of the parameter, that counts the layers.
      num_layers: how many there are.
    """

    name: str
    layer: int | None = None
    axis: int = 0
    num_layers: int = 1

    def index(self, axis: int) -> Index:
        """Returns the part of an array whose layers would be on an axis."""
        if self.layer is None:
            return ()
        return (slice(None),) * (axis if self.axis else 0) + (self.layer,)


def _place(name: str, arrays: Mapping[str, StoredArray]) -> _Place:
    if name in arrays:
        return _Place(name)
    theirs, layer = layouts.their_name(name)
    stack = theirs.partition("/")[0]
    return _Place(theirs, layer, *layouts.axis_and_length(arrays, stack))


def our_moments(checkpoint: Checkpoint, shapes: Shapes) -> Moments:
    """Returns the state of a checkpoint's optimiser; no array is read yet.

    Args:
      checkpoint: opened with its optimiser, its parameters known to be all there.
      shapes: of our parameters by our names.

    Raises:
      NotHeld: it is another optimiser, or Adafactor with momentum, or one that factors
        what ours does not; says which.
      UserError: an array is missing, or is not as its parameter; names it.
    """
    kinds = {name.rpartition("/")[2] for name in checkpoint.states}
    if kinds == set(ADAFACTOR_SLOTS):
        return _adafactors(checkpoint, shapes)
    return _adams(checkpoint, shapes)


def _adafactors(checkpoint: Checkpoint, shapes: Shapes) -> Moments:
    slots: dict[str, dict[str, Tensor]] = {slot: {} for slot in SLOTS[ADAFACTOR]}
    for name, shape in shapes.items():
        for slot, tensor in _slots_of(name, checkpoint, shape).items():
            slots[slot][name] = tensor
    return Moments(ADAFACTOR, _number("step", checkpoint.step), slots)


def _slots_of(name: str, checkpoint: Checkpoint, shape: Shape) -> dict[str, Tensor]:
    """Returns Adafactor's slots of one of our parameters."""
    place = _place(name, checkpoint.arrays)
    slots = {s: _array(f"{place.name}/{s}", checkpoint) for s in ADAFACTOR_SLOTS}
    if slots[MOMENTUM].shape != UNUSED:
        raise NotHeld("it has momentum (the slot m), which our Adafactor has not")
    whole = checkpoint.arrays[place.name]
    if slots[WHOLE].shape == whole.shape:
        found = _part(slots[WHOLE], place.index(layouts.SCAN_AXIS), shape)
        if not is_factored(shape):
            return {WHOLE: found}
        axis = row_axis(shape)
        return {ROW: _mean(found, 1 - axis), COLUMN: _mean(found, axis)}
    if not is_factored(shape):
        raise NotHeld(
            f"{place.name} is factored there, which ours is not where a side is below "
            f"{SMALLEST_FACTORED}, and factors do not say the averages one by one"
        )
    by_names = place.layer is not None or len(whole.shape) > 2
    first = width_axis(name) if by_names else row_axis(shape)
    factors = {}
    for slot, size in ((ROW, shape[first]), (COLUMN, shape[1 - first])):
        array, wanted = slots[slot], size * place.num_layers
        if int(np.prod(array.shape)) != wanted:
            raise UserError(
                f"tensor {STATES}/{place.name}/{slot} must have {wanted} numbers, got "
                f"the shape {array.shape}"
            )
        factors[slot] = _part(array, place.index(_scan_axis(slot, name)), (size,))
    if first != row_axis(shape):
        factors = {ROW: factors[COLUMN], COLUMN: factors[ROW]}
    return factors


def _adams(checkpoint: Checkpoint, shapes: Shapes) -> Moments:
    states = checkpoint.states
    before = {name.partition("mu/")[0] for name in states if "mu/" in name}
    if len(before) != 1:
        raise NotHeld("it is neither Adafactor's nor that of one AdamW")
    (where,) = before
    for name in states:
        is_adams = name.startswith((f"{where}mu/", f"{where}nu/"))
        if not is_adams and not name.endswith("count"):
            raise NotHeld(f"besides AdamW's averages it holds {name}")
    count = _number(f"{STATES}/{where}count", states.get(f"{where}count"))
    slots: dict[str, dict[str, Tensor]] = {slot: {} for slot in SLOTS[ADAMW]}
    for name, shape in shapes.items():
        place = _place(name, checkpoint.arrays)
        for slot, found in slots.items():
            array = _array(f"{where}{slot}/{place.name}", checkpoint)
            wanted = checkpoint.arrays[place.name].shape
            if array.shape != wanted:
                raise UserError(
                    f"tensor {STATES}/{where}{slot}/{place.name} must have the shape "
                    f"{wanted} of its parameter, got {array.shape}"
                )
            found[name] = _part(array, place.index(layouts.SCAN_AXIS), shape)
    return Moments(ADAMW, count, slots)


def _array(name: str, checkpoint: Checkpoint) -> StoredArray:
    array = checkpoint.states.get(name)
    if array is None:
        raise UserError(
            f"tensor {STATES}/{name} is missing: --optimizer=false leaves the "
            "optimiser's state out"
        )
    if np.dtype(array.dtype) != np.float32:
        raise NotHeld(f"{STATES}/{name} is of {array.dtype}, and not of float32")
    return array


def _part(array: StoredArray, index: Index, shape: Shape) -> Tensor:
    def read() -> np.ndarray:
        return array.read(index).reshape(shape)

    return Tensor(shape, np.dtype(np.float32), read)


def _number(name: str, array: StoredArray | None) -> int:
    """Returns a count of updates."""
    found: Any = None if array is None else np.asarray(array.read(()))
    if found is None or found.size != 1 or found.dtype.kind not in "iu":
        raise UserError(
            f"tensor {name} must be one integer, the updates that were made"
        )
    return int(found.reshape(()))
