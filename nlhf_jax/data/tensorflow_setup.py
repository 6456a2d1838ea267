# SPDX-License-Identifier: Apache-2.0
"""Imports of TensorFlow, seqio and TFDS that leave the accelerators to JAX."""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from nlhf_jax.checks import expanded


@functools.cache
def import_tensorflow() -> ModuleType:
    """Returns `tensorflow`, which sees the CPU only and keeps its start-up lines."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _without_native_stderr():
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
    return tf


@contextlib.contextmanager
def _without_native_stderr() -> Iterator[None]:
    """Hides what native libraries print while they are loaded, before any log level.

    Python's own exceptions still pass; only file descriptor 2 is redirected.
    """
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@functools.cache
def import_tfds() -> ModuleType:
    """Returns `tensorflow_datasets`, whose progress bars show on a terminal only."""
    import_tensorflow()
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    return tfds


@functools.cache
def import_seqio() -> ModuleType:
    """Returns `seqio` (about four seconds the first time)."""
    import_tensorflow()
    import seqio

    return seqio


def cache_folder(cache_dir: str = "") -> pathlib.Path:
    """Returns `cache_dir`, else $NLHF_CACHE, else ~/.cache/nlhf_jax."""
    chosen = cache_dir or os.environ.get("NLHF_CACHE") or "~/.cache/nlhf_jax"
    return expanded("cache_dir", chosen)


def progress_bar(description: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Returns an iterator that shows a bar on a terminal, else one plain line."""

    def iterate(items):
        if sys.stderr.isatty():
            from tqdm import tqdm

            return tqdm(items, desc=description, leave=False)
        print(f"{description} ...", file=sys.stderr, flush=True)
        return items

    return iterate
