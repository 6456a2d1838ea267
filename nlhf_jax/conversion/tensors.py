# SPDX-License-Identifier: Apache-2.0
"""What passes between formats: a network's shape, and its tensors one at a time.

A format (Hugging Face, T5X, GGUF, ours) opens a folder or file as a `Weights`, whose
tensors are read when somebody asks for one, and writes such a value, reading each
tensor once. So a conversion holds one tensor at a time, whatever the two formats are.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.settings import LoraSettings

DTYPES = ("float32", "bfloat16")


class Tensor(NamedTuple):
    """An array that is read from its file when `read` is called.

    Attributes:
      shape: of what `read` returns.
      dtype: of what `read` returns; bfloat16 is that of `ml_dtypes`.
      read: reads the file again each time, so that nothing is kept.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank adapters, and what they stand on.

    Attributes:
      lora: their settings.
      base: model folder, step's folder or parameter file of the base.
      tensors: by our names (`layers_0/attention/query/lora_a`), float32.
    """

    lora: LoraSettings
    base: str
    tensors: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Moments:
    """What an optimiser has averaged of the gradients, by slot and parameter.

    Attributes:
      optimizer: "adafactor" or "adamw", as in `OptimizerSettings`.
      count: updates that it has made.
      slots: slot -> tensors by our names, float32. AdamW has `mu` and `nu` of every
        parameter; Adafactor `v` of those it does not factor, `v_row` and `v_col` of
        those it does.
    """

    optimizer: str
    count: int
    slots: Mapping[str, Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a judge's score is read off its text-to-text network.

    Attributes:
      kind: "preference" or "reward".
      answer_id: the score is the logit of this id after the last token that is read.
      reads: what is read in order: ids of fixed words, or "x" (the prompt), "y" (the
        response that is scored) and "y'" (the one it is compared with), without their
        ends. The last of it is what an encoder-decoder's decoder reads. How "x" is
        put is the `chat_template` and `system_prompt` of the weights.
      prompt_length: tokens of a prompt that are read, those around its text among
        them; later ones are not.
      response_length: tokens that a response may have, its end among them; a longer
        one is refused.
    """

    kind: str
    answer_id: int
    reads: tuple[str | tuple[int, ...], ...]
    prompt_length: int
    response_length: int


@dataclasses.dataclass(frozen=True)
class Weights:
    """A language model outside of any format.

    Attributes:
      settings: shape of the network.
      tensors: by our names (`layers_0/attention/query/kernel`), in our layouts.
      files: name in the model folder -> file to copy there, of what goes with the
        weights: `vocabulary.model` or `tokenizer.json`, `generation_config.json`,
        `chat_template.jinja` and the like.
      vocabulary: "byte" where the model reads bytes and needs no file; else "".
      adapters: those that are merged into `tensors`, for a format that holds them by
        themselves; None where there are none.
      chat_template: how prompts were put when it was trained, as in a model folder's
        description; None where the source does not say.
      system_prompt: what was said before them.
      moments: the optimiser's state, where the source has one and it was asked for.
      scoring: of a judge; None of a language model.
    """

    settings: ModelSettings
    tensors: Mapping[str, Tensor]
    files: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    vocabulary: str = ""
    adapters: Adapters | None = None
    chat_template: str | None = None
    system_prompt: str = ""
    moments: Moments | None = None
    scoring: Scoring | None = None


def of_array(array: np.ndarray) -> Tensor:
    """Returns a tensor whose numbers are here already."""
    return Tensor(tuple(array.shape), array.dtype, lambda: array)


def turned(tensor: Tensor) -> Tensor:
    """Returns the transpose of a matrix."""
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)


def cast(weights: Weights, dtype: str, *, allow_rounding: bool = False) -> Weights:
    """Returns weights whose floating numbers have another dtype; "" keeps theirs.

    Args:
      weights: what is to be cast; no tensor is read yet.
      dtype: "float32", "bfloat16", or "".
      allow_rounding: whether numbers may change. Where not, reading a tensor that has
        a number which the new dtype cannot hold raises a UserError that names it.

    Raises:
      UserError: another dtype.
    """
    if not dtype:
        return weights
    target = np.dtype(check_choice("dtype", dtype, DTYPES))
    tensors = {
        path: _cast(path, tensor, target, allow_rounding)
        for path, tensor in weights.tensors.items()
    }
    return dataclasses.replace(weights, tensors=tensors)


def _cast(path: str, tensor: Tensor, target: np.dtype, may_round: bool) -> Tensor:
    if tensor.dtype == target or np.issubdtype(tensor.dtype, np.integer):
        return tensor

    def read() -> np.ndarray:
        found = tensor.read()
        rounded = found.astype(target)
        if not may_round and not _is_same(found, rounded):
            raise UserError(
                f"tensor {path} is {tensor.dtype.name} and {target.name} would round "
                "its numbers: take its own dtype, or allow it with --allow_rounding"
            )
        return rounded

    return Tensor(tensor.shape, target, read)


def _is_same(found: np.ndarray, rounded: np.ndarray) -> bool:
    """Whether all numbers are as they were; two NaN are, too."""
    step = 1 << 20  # numbers at a time, so that no second copy is made of all
    first, second = found.reshape(-1), rounded.reshape(-1)
    return all(
        np.array_equal(
            first[i : i + step].astype(np.float64),
            second[i : i + step].astype(np.float64),
            equal_nan=True,
        )
        for i in range(0, first.size, step)
    )
