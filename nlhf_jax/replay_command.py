# SPDX-License-Identifier: Apache-2.0
"""`nlhf replay FOLDER`: a step whose numbers were not finite is played again."""

import argparse
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nlhf_jax import cli, gin_bindings
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import replay

PIPELINES = ("quickstart", "reproduce")


def main(words: Sequence[str]) -> int:
    """Plays a run's step again whose numbers were not finite, and shows which.

    Returns 0 where it comes out as it was, 1 where not.

    Raises:
      UserError: the folder is none that a run wrote, or the job cannot be rebuilt.
    """
    given = _parser().parse_args(list(words))
    allowed = [name for name in given.allow_import.split(",") if name]
    return replay.play(given.folder, functools.partial(rebuild, allow_import=allowed))


def rebuild(
    folder: pathlib.Path, command: Sequence[str], *, allow_import: Sequence[str] = ()
) -> None:
    """Calls the job of a command; of a pipeline, only the stage that trains `folder`.

    Args:
      folder: of the run.
      command: its words after `nlhf`.
      allow_import: modules that its configuration may import. What the command allowed
        does not count, for it was read from a file.

    Raises:
      UserError: the command is no job's, or its configuration has become wrong.
    """
    job = cli.check_choice("job", command[0], cli.JOBS)
    arguments = cli.Arguments(job, command[1:])
    gin_bindings.load(
        job, arguments.files, arguments.overrides, arguments.search_paths, allow_import
    )

    def is_wanted(name: str, given: Mapping[str, Any]) -> bool:
        named = pathlib.Path(str(given.get("model_dir", ""))).expanduser()
        if name in PIPELINES:
            return name == job
        # Any other folder is not redirected: the job would write into it.
        return name in cli.TRAINING_JOBS and named.resolve() == folder

    with gin_bindings.only(is_wanted):
        gin_bindings.run(job)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlhf replay",
        description="Plays a step again whose numbers were not finite.",
        epilog="It ends with 0 where it comes out as it was, 1 where not.",
    )
    parser.add_argument("folder", help="MODEL_DIR/failures/step_N, as the run named it")
    parser.add_argument(
        "--allow_import",
        default="",
        metavar="MODULE,...",
        help="what its configuration may import besides nlhf_jax and seqio",
    )
    parser.error = _refuse
    return parser


def _refuse(message: str) -> None:
    raise UserError(f"nlhf replay: {message}")
