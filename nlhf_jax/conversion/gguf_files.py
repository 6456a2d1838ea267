# SPDX-License-Identifier: Apache-2.0
"""GGUF files, the single-file format of llama.cpp, as weights; they are read only.

A file holds metadata (of the network and its tokenizer) and tensors, most of them
quantised. Here they become float32, or bfloat16 where they are stored so, one at a
time. Three things differ from ours besides the names: projections are stored outputs
first, Gemma's norms have 1 added, and Llama's queries and keys pair neighbouring
numbers for their rotary positions, (x_0, x_1), (x_2, x_3), ..., where ours pair halves.
"""

import atexit
import functools
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.conversion import gguf_settings, gguf_tokenizer
from nlhf_jax.conversion.formats import Format, Options
from nlhf_jax.conversion.shapes import flat, parameter_shapes
from nlhf_jax.conversion.tensors import Tensor, Weights
from nlhf_jax.decoder_settings import DecoderOnlySettings

MAGIC = b"GGUF"
_log = logging.getLogger(__name__)
BLOCK = 2**26  # bytes of float32 that are unpacked at once
ROPE_FACTORS = "rope_freqs.weight"
# Ours -> theirs; a layer's stand under `blk.NUMBER.`.
OUTSIDE = {
    "token_embedder/embedding": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "logits_dense/kernel": "output.weight",
}
MODULES = {
    "pre_attention_norm": "attn_norm",
    "attention/query": "attn_q",
    "attention/key": "attn_k",
    "attention/value": "attn_v",
    "attention/out": "attn_output",
    "attention/query_norm": "attn_q_norm",
    "attention/key_norm": "attn_k_norm",
    "post_attention_norm": "post_attention_norm",
    "pre_mlp_norm": "ffn_norm",
    "mlp/wi_0": "ffn_gate",
    "mlp/wi_1": "ffn_up",
    "mlp/wo": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}


def recognises(path: pathlib.Path) -> bool:
    """Returns whether a path is a GGUF file."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def metadata(path: pathlib.Path) -> dict[str, Any]:
    """Returns a file's metadata by key: numbers, texts and lists of them.

    Raises:
      UserError: it is no GGUF file, or is damaged.
    """
    fields = _reader(path).fields
    try:
        return {key: field.contents() for key, field in fields.items()}
    except Exception as error:  # the library raises many kinds for damaged bytes
        raise _damage(path, error) from None


def open_gguf(path: pathlib.Path, options: Options) -> Weights:
    """Opens a model of Llama's, Gemma's or Qwen's architecture.

    Args:
      path: the file.
      options: none are read.

    Raises:
      UserError: the file is damaged, of another architecture, or a tensor is missing,
        not known or of another shape; names it.
    """
    del options
    said, reader = metadata(path), _reader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {
        name: tuple(reversed([int(size) for size in tensor.shape]))
        for name, tensor in stored.items()
    }
    factors_E = None
    if ROPE_FACTORS in stored:
        factors_E = _numbers(path, stored.pop(ROPE_FACTORS)).astype(np.float64)
    settings = gguf_settings.settings_of(said, shapes, factors_E)
    undo_pairs = said["general.architecture"] == "llama"
    tensors = {}
    for ours, shape in _wanted(settings, stored).items():
        name = their_name(ours)
        turned = shape[::-1] if ours.endswith("/kernel") else shape
        if shapes[name] != turned:
            raise UserError(
                f"tensor {name} must have the shape {turned}, got {shapes[name]}"
            )
        heads = _num_paired_heads(ours, settings) if undo_pairs else 0
        is_half = stored[name].tensor_type.name == "BF16"
        dtype = np.dtype(jnp.bfloat16 if is_half else np.float32)
        shift = settings.norm_plus_one and ours.endswith("/scale")
        read = functools.partial(
            _read, path, stored[name], ours.endswith("/kernel"), heads, shift, dtype
        )
        tensors[ours] = Tensor(shape, dtype, read)
    return Weights(settings, tensors, _tokenizer_files(path, said))


def _tokenizer_files(
    path: pathlib.Path, said: Mapping[str, Any]
) -> dict[str, pathlib.Path]:
    """Returns the tokenizer's files, which lie somewhere until the program ends.

    Without them a vocabulary is still to be named.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nlhf-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return gguf_tokenizer.write_tokenizer(said, folder)
    except UserError as error:
        _log.warning("%s: its tokenizer is left out: %s", path, error)
        return {}


def their_name(path: str) -> str:
    """Returns GGUF's name of one of our parameters, by its `a/b/c` path."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    layer, _, rest = path.partition("/")
    module, _, leaf = rest.rpartition("/")
    end = "bias" if leaf == "bias" else "weight"
    return f"blk.{layer.removeprefix('layers_')}.{MODULES[module]}.{end}"


# --- the file


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UserError(
            "GGUF files need the library gguf, which is not installed: pip install "
            "'nlhf_jax[hf]'"
        ) from None
    return gguf


def _reader(path: pathlib.Path) -> Any:
    facts = path.stat() if path.is_file() else None
    if facts is None or not recognises(path):
        raise UserError(f"{str(path)!r} is no GGUF file: it does not begin with GGUF")
    return _reader_of(path.resolve(), facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=1)  # tokens of a large vocabulary take seconds to list
def _reader_of(path: pathlib.Path, _modified: int, _size: int) -> Any:
    library = _library()
    try:
        return library.GGUFReader(path)
    except Exception as error:
        raise _damage(path, error) from None


def _damage(path: pathlib.Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"GGUF file {path} is truncated or damaged: {reason:.200}")


def _wanted(
    settings: DecoderOnlySettings, stored: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Returns our parameters' shapes, all of which are in the file and nothing else."""
    shapes = flat(parameter_shapes(settings))
    names = {their_name(path) for path in shapes}
    for name in names:
        if name not in stored:
            raise UserError(f"tensor {name} is missing{nearest(name, stored)}")
    for name in stored:
        if name not in names:
            raise UserError(
                f"tensor {name} has no place in this network{nearest(name, names)}"
            )
    return {path: tuple(leaf.shape) for path, leaf in shapes.items()}


# --- one tensor


def _numbers(path: pathlib.Path, tensor: Any) -> np.ndarray:
    """Returns a tensor in float32 and in its stored layout; beside it, some rows."""
    quants, data, kind = _library().quants, tensor.data, tensor.tensor_type
    try:
        if data.ndim < 2:
            return quants.dequantize(data, kind).astype(np.float32, copy=False)
        shape = [int(size) for size in reversed(tensor.shape)]
        whole = np.empty(shape, np.float32)
        rows = max(1, BLOCK // max(1, whole[:1].nbytes))
        for first in range(0, len(whole), rows):
            whole[first : first + rows] = quants.dequantize(
                data[first : first + rows], kind
            )
        return whole
    except NotImplementedError:
        raise UserError(
            f"tensor {tensor.name} of {path} is stored as {kind.name}, which the "
            "library gguf cannot read"
        ) from None


def _read(
    path: pathlib.Path,
    tensor: Any,
    is_kernel: bool,
    num_paired_heads: int,
    has_one_added: bool,
    dtype: np.dtype,
) -> np.ndarray:
    array = _numbers(path, tensor)
    if num_paired_heads:
        array = halves(array, num_paired_heads)
    if has_one_added:
        array = array - np.float32(1.0)
    return (array.T if is_kernel else array).astype(dtype, copy=False)


def _num_paired_heads(path: str, settings: DecoderOnlySettings) -> int:
    """Returns how many heads' rows are to be put in our order; 0 if none."""
    if "/attention/query/" in path:
        return settings.num_heads
    return settings.num_kv_heads if "/attention/key/" in path else 0


def halves(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns rows of heads in our order, given those of neighbouring pairs.

        a head of 6   x_0 y_0 x_1 y_1 x_2 y_2   ->   x_0 x_1 x_2 y_0 y_1 y_2

    Args:
      array: first axis H*K, the rows of a kernel stored outputs first, or a bias.
      num_heads: H.
    """
    rest = array.shape[1:]
    pairs = array.reshape(num_heads, -1, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(array.shape)


FORMAT = Format(
    looks_for="a file that begins with GGUF",
    recognises=recognises,
    open=open_gguf,
)
