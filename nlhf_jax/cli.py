# SPDX-License-Identifier: Apache-2.0
"""The command line: `nlhf JOB --gin_file=... --gin.NAME=VALUE --parameter=VALUE`."""

import ast
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Sequence

from nlhf_jax import __version__
from nlhf_jax.checks import UserError, check_choice, nearest
from nlhf_jax.jobs import COMMANDS, JOBS

USAGE_EXIT, INTERRUPTED_EXIT, STOPPED_EXIT = 2, 130, 143
DEFAULT_FILES = {"quickstart": ["configs/runs/quickstart.gin"]}
# Job -> scale -> its file; the first scale is the default.
SCALES = {
    "reproduce": {
        "small": "configs/runs/reproduce_small.gin",
        "paper": "configs/runs/reproduce_paper.gin",
    }
}


class Arguments:
    """What stands after the job's name.

    Attributes:
      files: values of --gin_file, in order.
      search_paths: values of --gin_search_paths, split at commas.
      overrides: gin name -> gin literal.
      dry_run: stop after the configuration is checked.
      help: print the job's parameters.
    """

    def __init__(self, job: str, words: Sequence[str]):
        self.files: list[str] = []
        self.search_paths: list[str] = []
        self.overrides: dict[str, str] = {}
        self.dry_run = self.help = False
        words = list(words)
        while words:
            self._take(job, words)
        self.files = self.files or DEFAULT_FILES.get(job, [])
        if not self.files and job in SCALES:
            self.files = [next(iter(SCALES[job].values()))]

    def _take(self, job: str, words: list[str]) -> None:
        word = words.pop(0)
        if word in ("--help", "-h"):
            self.help = True
            return
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: flags begin with --")
        name, has_value, value = word[2:].partition("=")
        if name == "dry_run":
            self.dry_run = True
            return
        if not has_value:
            value = self._next_value(name, words)
        if name == "scale" and job in SCALES:
            self.files.append(SCALES[job][check_choice("scale", value, SCALES[job])])
        elif name == "gin_file":
            self.files.append(value)
        elif name == "gin_search_paths":
            self.search_paths += value.split(",")
        elif name.startswith("gin."):
            self.overrides[name[len("gin.") :]] = value
        else:
            self._take_parameter(job, name, value)

    def _next_value(self, name: str, words: list[str]) -> str:
        """The value that follows its flag after a space; a lone parameter is True."""
        if words and not words[0].startswith("--"):
            return words.pop(0)
        if name.startswith("gin"):
            raise UserError(f"--{name} needs a value: --{name}=VALUE")
        return "True"

    def _take_parameter(self, job: str, name: str, value: str) -> None:
        """A parameter of the job itself: text needs no second pair of quotes."""
        known = _hints(job)
        if name not in known:
            flags = ("gin_file", "gin_search_paths", "dry_run", "help", *known)
            flags += ("scale",) * (job in SCALES)
            raise UserError(f"{job} has no flag --{name}{nearest(name, flags)}")
        is_text = known[name] is str
        if f"{job}.{name}" in self.overrides:
            raise UserError(f"--{name} is given twice")
        self.overrides[f"{job}.{name}"] = repr(value) if is_text else value


def _hints(job: str) -> dict:
    from nlhf_jax import gin_bindings

    signature = inspect.signature(gin_bindings.job_function(job))
    return {name: p.annotation for name, p in signature.parameters.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit code.

    0: done. 2: a user's mistake, one sentence on standard error without a traceback.
    130: Ctrl-C. 143: a signal ended the run after its state was saved. Other
    exceptions are defects and keep their traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(words)
    except UserError as error:
        print(f"nlhf: {error}", file=sys.stderr)
        return USAGE_EXIT
    except BrokenPipeError:
        # Whoever read our output has enough; Python must not flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("nlhf: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT


def _main(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0 if words else USAGE_EXIT
    if words[0] == "--version":
        print(f"nlhf_jax {__version__}")
        return 0
    if words[0] in COMMANDS:
        _enable_compilation_cache()
        module, function = COMMANDS[words[0]].split(":")
        return getattr(importlib.import_module(module), function)(words[1:])
    job = check_choice("job", words[0], (*JOBS, *COMMANDS))
    arguments = Arguments(job, words[1:])
    from nlhf_jax import gin_bindings
    from nlhf_jax.jobs import runs

    if arguments.help:
        print(inspect.getdoc(gin_bindings.job_function(job)))
        print(f"\nFlags: {', '.join(f'--{name}' for name in _hints(job))}")
        if job in SCALES:
            print(f"--scale: {' or '.join(SCALES[job])}, in place of --gin_file")
        return 0
    gin_bindings.load(job, arguments.files, arguments.overrides, arguments.search_paths)
    if arguments.dry_run:
        print(f"{job}: the configuration is complete and every name in it is known")
        return 0
    runs.set_config_source(gin_bindings.operative_config)
    _enable_compilation_cache()
    try:
        gin_bindings.run(job)
    except runs.Stopped as stopped:
        print(
            f"nlhf: {job} was stopped by a signal at step {stopped.step}, everything "
            "is saved; the same command continues",
            file=sys.stderr,
        )
        return STOPPED_EXIT
    return 0


def _usage() -> str:
    everything = JOBS | COMMANDS
    width = max(map(len, everything))
    jobs = "\n".join(
        f"  {name:<{width}}  {_summary(place)}" for name, place in everything.items()
    )
    return (
        "usage: nlhf JOB [--gin_file=FILE ...] [--gin.NAME=VALUE ...]\n"
        "                [--PARAMETER=VALUE ...] [--gin_search_paths=FOLDER,...] "
        "[--dry_run]\n"
        f"jobs:\n{jobs}\n"
        "nlhf JOB --help prints a job's parameters."
    )


def _summary(place: str) -> str:
    """The first sentence of a job's docstring, read without importing the job."""
    module, function = place.split(":")
    spec = importlib.util.find_spec(module)
    tree = ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _show_only_errors_of_libraries() -> None:
    """Keeps a library's remarks about its own files out of a job's few lines."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)


def _enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, so that a second start is quick."""
    import jax

    cache = os.environ.get("NLHF_CACHE") or pathlib.Path.home() / ".cache" / "nlhf_jax"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
