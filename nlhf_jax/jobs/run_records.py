# SPDX-License-Identifier: Apache-2.0
"""What a run writes of itself: configuration, versions, and what of it has changed."""

import contextlib
import datetime
import importlib.metadata
import json
import pathlib
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from nlhf_jax import checkpoints, distributed, retention
from nlhf_jax.checks import UserError, check_local_folder, expanded
from nlhf_jax.jobs import saves
from nlhf_jax.types import TrainState

REPORTED_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow")
CONFIG_FILE = "config.gin"
LONGEST_VALUE = 80  # characters of a value in a sentence
_BINDING = re.compile(r"([A-Za-z_][\w./]*) =\s*(.*)")

_config_source: Callable[[], str] = str
_command: tuple[str, ...] = ()
# Folder -> the one that is opened in its place; None while nothing is redirected.
_instead: dict[pathlib.Path, pathlib.Path] | None = None


def set_source(config: Callable[[], str], command: Sequence[str] = ()) -> None:
    """Says where the operative configuration comes from, and the command that set it.

    Args:
      config: returns it as text.
      command: the words after `nlhf`.
    """
    global _config_source, _command
    _config_source, _command = config, tuple(command)


def operative_config() -> str:
    """Returns the operative configuration as text; empty outside the command line."""
    return _config_source()


def command() -> tuple[str, ...]:
    """Returns the words after `nlhf`; none outside the command line."""
    return _command


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def redirected(folder: pathlib.Path, instead: pathlib.Path) -> Iterator[None]:
    """While it is open, `open_folder` gives `instead` for `folder` and writes nothing.

    Other folders are given as they are, and nothing is written into them either.
    """
    global _instead
    _instead = {folder.resolve(): instead}
    try:
        yield
    finally:
        _instead = None


class Continued(NamedTuple):
    """What a run that would continue a folder's checkpoints has to agree with.

    Attributes:
      seed: of the run.
      shapes: of the state that it trains.
    """

    seed: int
    shapes: TrainState


def open_folder(model_dir: str, run: Continued | None = None) -> pathlib.Path:
    """Makes the output folder and writes `config.gin` and `versions.json` into it.

    Process 0 writes; all processes must see the folder, for they share checkpoints.
    Where the folder holds checkpoints of another configuration, one line says what has
    changed, and the configuration before is kept: `config.1.gin` is the first one.

    Args:
      model_dir: as the user named it.
      run: what would continue what is there; None for a job that trains nothing.

    Raises:
      UserError: the path is empty, is a file, cannot be written, or is not shared, or
        its checkpoints are of another seed, model or optimiser; then nothing is
        written.
    """
    folder = expanded("MODEL_DIR", check_local_folder("MODEL_DIR", model_dir))
    if _instead is not None:
        return _instead.get(folder.resolve(), folder)
    distributed.first_does("folder", lambda: _describe_run(folder, model_dir, run))
    distributed.all_do("shared folder", lambda: _check_seen(folder, model_dir))
    return folder


def _check_seen(folder: pathlib.Path, model_dir: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"MODEL_DIR {model_dir!r} must be a folder that all processes share; "
            "process 0 made it, and another one does not see it"
        )


def _describe_run(folder: pathlib.Path, model_dir: str, run: Continued | None) -> None:
    if run is not None:
        saves.check_newest(folder, *run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(folder)
        written = {"written": datetime.datetime.now(datetime.UTC).isoformat()}
        text = json.dumps(versions() | written, indent=2) + "\n"
        (folder / "versions.json").write_text(text)
    except OSError as error:
        raise UserError(
            f"MODEL_DIR {model_dir!r} cannot be written: {error.strerror}"
        ) from error


def _write_config(folder: pathlib.Path) -> None:
    file, now = folder / CONFIG_FILE, operative_config()
    steps = retention.committed(folder / checkpoints.STEPS_FOLDER)
    before = file.read_text(encoding="utf-8") if steps and file.is_file() else ""
    changes = changed_bindings(before, now)
    if changes:
        names = [path.name.split(".")[1] for path in folder.glob("config.*.gin")]
        number = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
        kept = folder / f"config.{number}.gin"
        file.rename(kept)
        print(
            f"nlhf: {folder} goes on under another configuration, so it is no longer "
            f"the run that was begun ({kept.name} has what it was): {changes}",
            file=sys.stderr,
        )
    file.write_text(now, encoding="utf-8")


def changed_bindings(before: str, now: str) -> str:
    """Returns `NAME OLD -> NEW; ...` for what two configurations bind differently.

    What only one of them binds belongs to a function that the other one did not call;
    where that matters, the binding that names the function is among the others. The
    folder's own name is left out.
    """
    old, new = _bindings(before), _bindings(now)
    return "; ".join(
        f"{name} {_short(old[name])} -> {_short(new[name])}"
        for name in old
        if name in new
        and old[name] != new[name]
        and name.rpartition(".")[2].lower() != "model_dir"
    )


def _bindings(text: str) -> Mapping[str, str]:
    """Returns name -> value of the text that gin writes, each value on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        start = _BINDING.fullmatch(line)
        if start:
            name = start[1]
            found[name] = start[2].removesuffix("\\").strip()
        elif name and line.strip() and not line.startswith("#"):
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _short(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
