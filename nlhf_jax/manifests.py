# SPDX-License-Identifier: Apache-2.0
"""What makes a folder a checkpoint: `<step>/manifest.json`, written after all else.

    {"format": 1, "step": 20,                      what the state is
     "seed": 0, "versions": {...}, ...             facts of the run
     "positions": {"metrics.jsonl": 3121},         bytes of files that grow beside it
     "arrays": {NAME: {shape, dtype, checksum, pieces}},
     "files": {PATH: {size, xxh3_128}},            all of the folder but this one
     "xxh3_128": DIGEST}                           of the text before this line

A folder without a manifest is no checkpoint. While a checkpoint is being written its
folder has a `manifest.json.partial`, which becomes the manifest in one rename; so a
folder with the one and not the other is what a process left that was killed.

A *piece* is what one device holds of an array: a process names those of its own
devices, and the first copy (replica 0) of each piece is the one that is named.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import xxhash

from nlhf_jax.checks import CheckpointError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
UNFINISHED_FILE = "manifest.json.partial"
_DIGEST = "xxh3_128"
_TAIL = re.compile(r',\n "xxh3_128": "([0-9a-f]{32})"\n}\n\Z')
_CHUNK = 1 << 22  # bytes

Manifest = dict[str, Any]
Piece = dict[str, Any]


def digest_of(array: np.ndarray) -> str:
    """Returns the xxh3-128 of an array's bytes in C order, as 32 hexadecimal digits."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return xxhash.xxh3_128(flat.view(np.uint8)).hexdigest()


def digest_of_file(path: pathlib.Path) -> str:
    """Returns the xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of_text(text: str) -> str:
    """Returns the xxh3-128 of a text in UTF-8."""
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[list[int]]:
    """[start, stop] along each axis."""
    return [
        list(part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)
    ]


def host_pieces(leaf: Any) -> list[tuple[list[list[int]], np.ndarray]]:
    """Returns (bounds, numbers) of the pieces that this process is to name.

    On the CPU the numbers are a view: while it lives, nothing else is written there.
    """
    if not isinstance(leaf, jax.Array):
        whole = np.asarray(leaf)
        mine = jax.process_index() == 0
        return [(_bounds((slice(None),) * whole.ndim, whole.shape), whole)] * mine
    first = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    for shard in first:
        shard.data.copy_to_host_async()
    return [(_bounds(s.index, leaf.shape), np.asarray(s.data)) for s in first]


def digests_of_pieces(
    arrays: Mapping[str, list[tuple[list[list[int]], np.ndarray]]],
) -> dict[str, list[Piece]]:
    """Returns name -> [{"bounds": ..., "xxh3_128": ...}] of what `host_pieces` gave."""
    return {
        name: [{"bounds": b, _DIGEST: digest_of(numbers)} for b, numbers in pieces]
        for name, pieces in arrays.items()
    }


def check_pieces(arrays: Mapping[str, Any], manifest: Manifest) -> None:
    """Checks arrays, by name, against the pieces that have the same bounds.

    Raises:
      CheckpointError: names the first array whose numbers are others.
    """
    for name, leaf in arrays.items():
        known = {
            json.dumps(piece["bounds"]): piece[_DIGEST]
            for piece in manifest["arrays"][name]["pieces"]
        }
        for bounds, numbers in host_pieces(leaf):
            wanted = known.get(json.dumps(bounds))
            if wanted is not None and digest_of(numbers) != wanted:
                raise CheckpointError(f"the digest of {name} differs")


def describe_arrays(
    arrays: Mapping[str, Any],
    checksums: Iterable[Any],
    pieces: Mapping[str, list[Piece]],
) -> dict[str, Any]:
    """Returns what the manifest says of each array."""
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": np.dtype(leaf.dtype).name,
            "checksum": int(checksum),
            "pieces": pieces[name],
        }
        for (name, leaf), checksum in zip(arrays.items(), checksums, strict=True)
    }


def stored_shapes(manifest: Manifest) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns array name -> shape and dtype, as a manifest tells them."""
    return {
        name: jax.ShapeDtypeStruct(tuple(facts["shape"]), np.dtype(facts["dtype"]))
        for name, facts in manifest["arrays"].items()
    }


def files_in(folder: pathlib.Path) -> list[str]:
    """Returns the paths of all files under a step's folder but the manifest itself."""
    found = (path for path in folder.rglob("*") if not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in found)
    return sorted(
        name
        for name in names
        if name != MANIFEST_FILE and not name.startswith(UNFINISHED_FILE)
    )


def describe_files(
    folder: pathlib.Path, is_mine: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """Returns size and digest of those files of a step's folder that `is_mine` takes.

    Every file and every folder is on the disk afterwards, whoever wrote it.
    """
    found, folders = {}, {folder}
    for name in filter(is_mine, files_in(folder)):
        path = folder / name
        _sync(path)
        folders.update(path.parents[: len(pathlib.PurePosixPath(name).parts) - 1])
        found[name] = {"size": path.stat().st_size, _DIGEST: digest_of_file(path)}
    for inner in folders:
        _sync(inner)
    return found


def check_files(
    folder: pathlib.Path, manifest: Manifest, share: tuple[int, int] = (0, 1)
) -> None:
    """Checks that every file of a checkpoint is there, with its size and its digest.

    Args:
      folder: of the step.
      manifest: as `read` returned it.
      share: (number, count): of several processes, each looks at its own files.

    Raises:
      CheckpointError: names the first file that is missing or differs, and how.
    """
    number, count = share
    for name in sorted(manifest["files"])[number::count]:
        wanted, path = manifest["files"][name], folder / name
        try:
            size = path.stat().st_size
            if size != wanted["size"]:
                raise CheckpointError(f"{name} has {size} bytes, not {wanted['size']}")
            if digest_of_file(path) != wanted[_DIGEST]:
                raise CheckpointError(f"{name} differs from its digest")
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing") from None
        except OSError as error:
            wrong = f"{name} cannot be read: {error.strerror}"
            raise CheckpointError(wrong) from error


def unlisted_files(folder: pathlib.Path, manifest: Manifest) -> list[str]:
    """Returns the files of a checkpoint that its manifest does not know."""
    return [name for name in files_in(folder) if name not in manifest["files"]]


def is_complete(folder: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint, good or damaged: whether it has a manifest."""
    return (folder / MANIFEST_FILE).is_file()


def is_leftover(folder: pathlib.Path) -> bool:
    """Whether a folder is a save that never ended."""
    return (folder / UNFINISHED_FILE).is_file() and not is_complete(folder)


def begin(folder: pathlib.Path) -> None:
    """Makes a step's folder, marked as not finished."""
    folder.mkdir(parents=True)
    (folder / UNFINISHED_FILE).touch()


def write_part(folder: pathlib.Path, process: int, part: dict[str, Any]) -> None:
    """Lays down what another process than the first has to say of a checkpoint."""
    path = folder / f"{UNFINISHED_FILE}.{process}"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(part, file)
        file.flush()
        os.fsync(file.fileno())


def take_part(folder: pathlib.Path, process: int) -> dict[str, Any]:
    """Returns what `write_part` laid down, and takes it away."""
    path = folder / f"{UNFINISHED_FILE}.{process}"
    part = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return part


def commit(folder: pathlib.Path, manifest: Manifest) -> None:
    """Makes a marked folder a checkpoint; a kill leaves it either marked or whole.

    Raises:
      OSError: it could not be written, or is not known to be on the disk; the folder is
        marked.
    """
    body = json.dumps({"format": FORMAT, **manifest}, indent=1).removesuffix("\n}")
    partial = folder / UNFINISHED_FILE
    with open(partial, "w", encoding="utf-8") as file:
        file.write(f'{body},\n "{_DIGEST}": "{digest_of_text(body)}"\n}}\n')
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST_FILE)
    try:
        _sync(folder)
        _sync(folder.parent)
    except OSError:
        # Nobody knows whether the name outlasts the machine: marked again, so that the
        # save has failed for all who look, and can be tried again.
        (folder / MANIFEST_FILE).rename(partial)
        raise


def _sync(path: pathlib.Path) -> None:
    """Makes a file's bytes, or the names in a folder, survive a loss of power."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read(folder: pathlib.Path) -> Manifest:
    """Returns the manifest of a step's folder, checked against its own digest.

    Raises:
      CheckpointError: there is none, or it is not as it was written.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST_FILE} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{MANIFEST_FILE} cannot be read: {error}") from error
    tail = _TAIL.search(text)
    if tail is None:
        raise CheckpointError(f"{MANIFEST_FILE} is cut or has another form")
    if digest_of_text(text[: tail.start()]) != tail[1]:
        raise CheckpointError(f"{MANIFEST_FILE} differs from its digest")
    try:
        manifest = json.loads(text)
        found = manifest["format"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(f"{MANIFEST_FILE} is no manifest: {error}") from error
    if found != FORMAT:
        raise CheckpointError(f"{MANIFEST_FILE} has format {found!r}, not {FORMAT}")
    try:
        _check_form(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{MANIFEST_FILE} has another form: {type(error).__name__} {error}"
        ) from error
    return manifest


def _check_form(manifest: Manifest) -> None:
    """Checks what the functions above rely on; files lie in their own folder."""
    int(manifest["step"])
    for name, facts in manifest["files"].items():
        parts = pathlib.PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/" or "\0" in name:
            raise CheckpointError(f"{MANIFEST_FILE} lists {name!r}, outside its folder")
        int(facts["size"]), facts[_DIGEST].lower()
    for facts in manifest["arrays"].values():
        np.dtype(facts["dtype"])
        int(facts["checksum"]), [int(size) for size in facts["shape"]]
        [(piece["bounds"], piece[_DIGEST]) for piece in facts["pieces"]]
