# SPDX-License-Identifier: Apache-2.0
"""The command line: `nlhf JOB --gin_file=... --gin.NAME=VALUE --parameter=VALUE`."""

import ast
import importlib
import importlib.util
import inspect
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence

from nlhf_jax import __version__, compilation_cache, discovery, distributed, watchdog
from nlhf_jax.checks import (
    CheckpointError,
    RunFailed,
    UserError,
    check_choice,
    nearest,
)
from nlhf_jax.jobs import COMMANDS, JOBS

DEFECT_EXIT, USAGE_EXIT, INTERRUPTED_EXIT, STOPPED_EXIT = 1, 2, 130, 143
FAILED_EXIT, UNSAVED_EXIT = 70, 74
LONGEST_WORD = 400
DEFAULT_FILES = {"quickstart": ["configs/runs/quickstart.gin"]}
# Job -> scale -> its file; the first scale is the default.
SCALES = {
    "reproduce": {
        "small": "configs/runs/reproduce_small.gin",
        "paper": "configs/runs/reproduce_paper.gin",
    }
}


# What runs in several processes; the others read what these write.
TRAINING_JOBS = ("sft", "preference", "reward", "train")
SEVERAL_PROCESSES = ("doctor",)  # of the commands


class Arguments:
    """What stands after the job's name.

    Attributes:
      processes: which process of how many this is, as far as flags say it.
      files: values of --gin_file, in order.
      search_paths: values of --gin_search_paths, split at commas.
      overrides: gin name -> gin literal.
      allow_import: values of --allow_import, split at commas.
      dry_run: stop after the configuration is checked and the step built from shapes.
      help: print the job's parameters.
    """

    def __init__(self, job: str, words: Sequence[str]):
        self.files: list[str] = []
        self.search_paths: list[str] = []
        self.allow_import: list[str] = []
        self.overrides: dict[str, str] = {}
        self.dry_run = self.help = False
        self.processes: dict[str, str] = {}
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
            if has_value:
                raise UserError(f"--dry_run takes no value, got {value!r}")
            self.dry_run = True
            return
        if not has_value:
            value = self._next_value(name, words)
        if name == "scale" and job in SCALES:
            self.files.append(SCALES[job][check_choice("scale", value, SCALES[job])])
        elif name == "gin_file":
            self.files.append(value)
        elif name in discovery.FLAGS:
            self.processes[name] = value
        elif name == "gin_search_paths":
            self.search_paths += value.split(",")
        elif name == "allow_import":
            self.allow_import += [part for part in value.split(",") if part]
        elif name.startswith("gin."):
            self.overrides[name[len("gin.") :]] = value
        else:
            self._take_parameter(job, name, value)

    def command(self, job: str) -> str:
        """Returns what all processes of a job must have been told alike."""
        words = [f"--gin_file={file}" for file in self.files]
        words += [f"--gin.{name}={value}" for name, value in self.overrides.items()]
        return " ".join([job, *words])

    def _next_value(self, name: str, words: list[str]) -> str:
        """The value that follows its flag after a space; a lone parameter is True."""
        if words and not words[0].startswith("--"):
            return words.pop(0)
        if name.startswith("gin") or name == "allow_import":
            raise UserError(f"--{name} needs a value: --{name}=VALUE")
        return "True"

    def _take_parameter(self, job: str, name: str, value: str) -> None:
        """A parameter of the job itself: text needs no second pair of quotes."""
        known = parameters(job)
        if name not in known:
            flags = ("gin_file", "gin_search_paths", "allow_import", "dry_run", "help")
            flags += (*known, *discovery.FLAGS, *("scale",) * (job in SCALES))
            raise UserError(f"{job} has no flag --{name}{nearest(name, flags)}")
        is_text = known[name] is str
        if f"{job}.{name}" in self.overrides:
            raise UserError(f"--{name} is given twice")
        self.overrides[f"{job}.{name}"] = repr(value) if is_text else value


def parameters(job: str) -> dict:
    """Returns a job's parameters and their annotations."""
    from nlhf_jax import gin_bindings

    signature = inspect.signature(gin_bindings.job_function(job))
    return {name: p.annotation for name, p in signature.parameters.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit code.

    0: done. 2: a user's mistake, one sentence on standard error without a traceback.
    42: a process of the job is gone, late or hangs; all must be started again. 70: the
    run failed, one sentence, and would fail again: its numbers are not finite. 74: the
    last checkpoint could not be written, one sentence. 130: Ctrl-C. 143: a signal ended
    the run after its state was saved. Other exceptions are defects and keep their
    traceback.
    """
    code, reason = _ended(list(sys.argv[1:] if argv is None else argv))
    distributed.leave(code, reason)
    return code


def _ended(words: list[str]) -> tuple[int, str]:
    """Returns the exit code, and in several processes why it is no good one."""
    try:
        return _main(words), ""
    except UserError as error:
        sentence = on_one_line(str(error))
        print(f"nlhf: {sentence}", file=sys.stderr)
        return USAGE_EXIT, sentence
    except RunFailed as error:
        sentence = on_one_line(error.sentence)
        print(f"nlhf: {sentence}", file=sys.stderr)
        return FAILED_EXIT, sentence
    except CheckpointError as error:
        sentence = on_one_line(str(error))
        print(f"nlhf: {sentence}", file=sys.stderr)
        return UNSAVED_EXIT, sentence
    except BrokenPipeError:
        # Whoever read our output has enough; Python must not flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    except KeyboardInterrupt:
        print("nlhf: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT, "interrupted"
    except Exception as error:
        if distributed.num_processes() == 1:
            raise
        # An interpreter that ends by itself would wait minutes for the others.
        traceback.print_exc()
        reason = on_one_line(f"{type(error).__name__}: {error}")
        if not distributed.is_peer_loss(error):
            return DEFECT_EXIT, reason
        return distributed.RESTART_EXIT, f"another process is gone or late: {reason}"


def on_one_line(sentence: str) -> str:
    """Returns a sentence without what a terminal would obey, blanks for line ends.

    Of a word that nobody can read, the beginning.
    """
    words = [w if len(w) <= LONGEST_WORD else w[:80] + "..." for w in sentence.split()]
    text = " ".join(words)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _main(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0 if words else USAGE_EXIT
    if words[0] == "--version":
        print(f"nlhf_jax {__version__}")
        return 0
    if words[0] in COMMANDS:
        if words[0] not in SEVERAL_PROCESSES:
            own = discovery.from_variables({}, os.environ) or discovery.Processes()
            _check_single(words[0], own)
        compilation_cache.enable()
        module, function = COMMANDS[words[0]].split(":")
        return getattr(importlib.import_module(module), function)(words[1:])
    job = check_choice("job", words[0], (*JOBS, *COMMANDS))
    arguments = Arguments(job, words[1:])
    from nlhf_jax import gin_bindings
    from nlhf_jax.jobs import runs

    if arguments.help:
        print(inspect.getdoc(gin_bindings.job_function(job)))
        print(f"\nFlags: {', '.join(f'--{name}' for name in parameters(job))}")
        if job in SCALES:
            print(f"--scale: {' or '.join(SCALES[job])}, in place of --gin_file")
        return 0
    gin_bindings.load(
        job,
        arguments.files,
        arguments.overrides,
        arguments.search_paths,
        arguments.allow_import,
    )
    if arguments.dry_run:
        built = gin_bindings.build(job)
        print(
            f"{job}: the configuration is complete and every name in it is known"
            + (f"; {built}" if built else "")
        )
        return 0
    _join_processes(job, arguments)
    runs.set_source(gin_bindings.operative_config, words)
    compilation_cache.enable()
    try:
        gin_bindings.run(job)
    except runs.Stopped as stopped:
        print(
            f"nlhf: {job} was stopped by a signal at step {stopped.step}, everything "
            f"is saved; the same command continues: {shlex.join(['nlhf', *words])}",
            file=sys.stderr,
        )
        return STOPPED_EXIT
    return 0


def _join_processes(job: str, arguments: Arguments) -> None:
    """Starts this process as one of several, where it is one; before any device."""
    processes = discovery.find(arguments.processes)
    if job not in TRAINING_JOBS:
        _check_single(job, processes)
    watchdog.own_process()
    watchdog.limit(0)  # a mistake in its variable is found here
    facts = {"command": arguments.command(job), "version": __version__}
    distributed.start(processes, facts)


def _check_single(job: str, processes: discovery.Processes) -> None:
    if processes.num_processes > 1:
        raise UserError(
            f"{job} runs in one process, got {processes.num_processes} (from "
            f"{processes.source}); {', '.join(TRAINING_JOBS)} run in several"
        )


def _usage() -> str:
    everything = JOBS | COMMANDS
    width = max(map(len, everything))
    jobs = "\n".join(
        f"  {name:<{width}}  {_summary(place)}" for name, place in everything.items()
    )
    return (
        "usage: nlhf JOB [--gin_file=FILE ...] [--gin.NAME=VALUE ...]\n"
        "                [--PARAMETER=VALUE ...] [--gin_search_paths=FOLDER,...]\n"
        "                [--allow_import=MODULE,...] [--dry_run]\n"
        "                [--coordinator=HOST:PORT --num_processes=N --process_id=K]\n"
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
