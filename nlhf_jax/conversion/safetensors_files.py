# SPDX-License-Identifier: Apache-2.0
"""Files of the safetensors format, read and written one tensor at a time.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {"dtype", "shape", "data_offsets"}, and "__metadata__"
    numbers   of one tensor after another, in C order, little-endian

The library of that name writes from memory and maps files into it; here a tensor is in
memory from when it is asked for until it is written.

Source: https://github.com/huggingface/safetensors, "Format".
"""

import functools
import hashlib
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nlhf_jax.checks import UserError
from nlhf_jax.conversion.tensors import Tensor

DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype("bfloat16"),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit
BLOCK = 1 << 24  # bytes of a tensor that are copied at once
METADATA = "__metadata__"
DIGEST = "{sha256}".ljust(64, "-")  # stands in a header for what is known at the end


def read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """Returns a file's header and where its numbers begin.

    Raises:
      UserError: it is no safetensors file, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LONGEST_HEADER):
            raise UserError(f"{path} is no safetensors file, or was cut short")
        try:
            header = json.loads(file.read(length))
            entries = [entry for name, entry in header.items() if name != METADATA]
            spans = [entry["data_offsets"] for entry in entries]
            numbers = 0
            for first, last in sorted(spans):  # no byte is left out or is two tensors'
                if type(first) is not int or type(last) is not int:
                    raise TypeError(spans)
                if first != numbers or last < first:
                    raise ValueError(spans)
                numbers = last
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{path} is no safetensors file: its header") from None
    if size != 8 + length + numbers:
        raise UserError(
            f"{path} must have {8 + length + numbers} bytes, as its header says, got "
            f"{size}: it is damaged or was cut short"
        )
    return header, 8 + length


def tensors_of(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name, none of them read.

    Raises:
      UserError: the file is damaged, or holds a tensor of a dtype that is not known.
    """
    header, start = read_header(path)
    found = {}
    for name, entry in header.items():
        if name == METADATA:
            continue
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            first, last = entry["data_offsets"]
            fits = last - first == dtype.itemsize * math.prod(shape)
            fits = fits and all(type(size) is int and size >= 0 for size in shape)
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"tensor {name} of {path} is not described as it should be")
        read = functools.partial(_read, path, name, dtype, shape, start + first)
        found[name] = Tensor(shape, dtype, read)
    return found


def _read(
    path: pathlib.Path, name: str, dtype: np.dtype, shape: tuple[int, ...], start: int
) -> np.ndarray:
    count = math.prod(shape)
    # As bytes: numpy does not read the numbers of other libraries' dtypes.
    raw = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=start)
    if raw.size != count * dtype.itemsize:
        raise UserError(f"tensor {name} of {path} was cut short")
    return raw.view(dtype).reshape(shape)


def write(
    path: pathlib.Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes a file, reading each tensor once, and returns the digest of what it holds.

    Args:
      path: the file; one that is there is replaced.
      tensors: by name; written in the order of their names.
      metadata: of the header. `DIGEST` in it is replaced by the digest.

    Returns:
      the SHA-256 of names and numbers, name by name, in hexadecimal digits.
    """
    tensors = dict(sorted(tensors.items()))
    header = _header(tensors, metadata or {})
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, tensor in tensors.items():
            digest.update(name.encode())
            _check(name, tensor, found := tensor.read())
            for block in blocks(found):
                digest.update(block)
                file.write(block)
            del found
        # Of the same length as what stands there, so nothing moves.
        file.seek(8)
        file.write(header.replace(DIGEST.encode(), digest.hexdigest().encode()))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Returns what `write` would of the same tensors; each is read once."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        for block in blocks(tensors[name].read()):
            digest.update(block)
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {}
    if metadata:
        header[METADATA] = dict(metadata)
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + num_bytes(tensor)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _check(name: str, tensor: Tensor, found: np.ndarray) -> None:
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        raise UserError(
            f"tensor {name} must be {tensor.dtype.name}{list(tensor.shape)}, got "
            f"{found.dtype.name}{list(found.shape)}"
        )


def num_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's numbers."""
    return tensor.dtype.itemsize * math.prod(tensor.shape)


def blocks(array: np.ndarray) -> Iterator[bytes]:
    """Yields an array's bytes in C order, some rows at a time, whatever its layout."""
    if array.ndim < 2:
        yield np.ascontiguousarray(array).tobytes()
        return
    rows = max(1, BLOCK // max(1, array[:1].nbytes))
    for first in range(0, array.shape[0], rows):
        yield array[first : first + rows].tobytes()
