# SPDX-License-Identifier: Apache-2.0
"""Parameters alone in one portable file, and the names of a tree's arrays."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from nlhf_jax.checks import CheckpointError, UserError, check_choice
from nlhf_jax.conversion.shapes import nested
from nlhf_jax.types import Params

PARAMS_FILE = "params.safetensors"
HEADER = "nlhf_jax"  # name of our facts in the metadata of a file


def names_of(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by name: the keys on the way, joined by slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def check_same_arrays(
    where: str, found: PyTree, wanted: PyTree, *, any_dtype: bool = False
) -> None:
    """Checks that two trees have arrays of the same names, shapes and dtypes.

    Raises:
      UserError: names the first array that differs and both shapes, or the names that
        one of them lacks.
    """
    found, wanted = names_of(found), names_of(wanted)
    for kind, names in (
        ("lacks", sorted(wanted.keys() - found.keys())),
        ("has the unexpected", sorted(found.keys() - wanted.keys())),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} {kind} {names[0]!r}{more}: other model or run?")
    for name, want in wanted.items():
        have = found[name]
        same_dtype = any_dtype or np.dtype(have.dtype) == np.dtype(want.dtype)
        if tuple(have.shape) != tuple(want.shape) or not same_dtype:
            raise UserError(
                f"{where} holds {name!r} as {_describe(have)}, "
                f"but {_describe(want)} is needed"
            )


def save_params(
    path: str | pathlib.Path,
    params: Params,
    dtype: str = "bfloat16",
    metadata: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes parameters alone to one safetensors file and returns its path.

    Arrays are named by the keys of the tree joined by slashes, as in T5X.

    Args:
      path: the file, or a folder in which `params.safetensors` is written.
      params: nested dictionaries of arrays.
      dtype: "float32", or "bfloat16" for half the size with 8 bits of precision;
        integers stay as they are.
      metadata: facts that JSON can hold; they stand in the file's header.
    """
    check_choice("dtype", dtype, ("bfloat16", "float32"))
    path = pathlib.Path(path).expanduser()
    if path.suffix != ".safetensors":
        path = path / PARAMS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, leaf in names_of(params).items():
        array = np.asarray(leaf)
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(jnp.dtype(dtype))
        arrays[name] = np.ascontiguousarray(array)
    header = {**(metadata or {}), "sha256": _digest(arrays)}
    partial = path.with_name(path.name + ".partial")
    safetensors.numpy.save_file(arrays, partial, {HEADER: json.dumps(header)})
    partial.rename(path)
    return path


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def read_params_metadata(path: str | pathlib.Path) -> dict[str, Any]:
    """Returns the facts in the header of a file that `save_params` wrote."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return json.loads((file.metadata() or {}).get(HEADER, "{}"))


def read_params_file(
    source: pathlib.Path, like: Params | None = None
) -> dict[str, Any]:
    """Returns the nested dictionary of arrays in a file, in their stored dtypes.

    Raises:
      CheckpointError: the digest in the header is not that of the arrays.
      UserError: names or shapes differ from those of `like`.
    """
    arrays = safetensors.numpy.load_file(source)
    digest = read_params_metadata(source).get("sha256")
    if digest is not None and digest != _digest(arrays):
        raise CheckpointError("its digest differs")
    params = nested(arrays)
    if like is not None:
        check_same_arrays(str(source), params, like, any_dtype=True)
    return params
