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

from nlhf_jax.decoder_settings import ModelSettings


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
class Weights:
    """A language model outside of any format.

    Attributes:
      settings: shape of the network.
      tensors: by our names (`layers_0/attention/query/kernel`), in our layouts.
      files: name in the model folder -> file to copy there, of what goes with the
        weights: `vocabulary.model` or `tokenizer.json`, `generation_config.json`,
        `chat_template.jinja` and the like.
    """

    settings: ModelSettings
    tensors: Mapping[str, Tensor]
    files: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
