# SPDX-License-Identifier: Apache-2.0
"""The code as one archive: the working tree as it is, without what git ignores."""

import gzip
import os
import pathlib
import subprocess
import tarfile

from launch.errors import SubmitError

LEFT_OUT = (".git", ".venv", ".venv.lock", "runs", "__pycache__", "build")


def files(root: pathlib.Path) -> list[str]:
    """Returns the paths to send, relative to `root`, sorted.

    In a git repository those that are tracked or new and not ignored; elsewhere all
    but environments, runs and caches.
    """
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
    try:
        done = subprocess.run([*listing, "--exclude-standard"], capture_output=True)
        listed = done.stdout.decode().split("\0") if done.returncode == 0 else []
    except OSError:
        listed = []
    found = set(filter(None, listed)) or set(_walk(root))
    return sorted(p for p in found if _is_sent(root, p))


def _walk(root: pathlib.Path):
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root)


def _is_sent(root: pathlib.Path, path: str) -> bool:
    """A file of the tree itself; a link out of it would carry what is not ours."""
    if set(pathlib.PurePath(path).parts) & set(LEFT_OUT) or not (root / path).is_file():
        return False
    return (root / path).resolve().is_relative_to(root.resolve())


def write(root: pathlib.Path, target: pathlib.Path) -> int:
    """Writes the archive; equal trees give equal bytes. Returns how many files.

    Raises:
      SubmitError: the tree lacks what a worker starts from.
    """
    paths = files(root)
    needed = {"launch/here.py", "launch/worker.py", "requirements.lock"} - set(paths)
    if needed:
        raise SubmitError(f"{root} lacks {', '.join(sorted(needed))}")
    with (
        open(target, "wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path in paths:
            tar.add(os.path.join(root, path), arcname=path, filter=_plain)
    return len(paths)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry
