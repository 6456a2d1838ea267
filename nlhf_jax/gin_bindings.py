# SPDX-License-Identifier: Apache-2.0
"""The only file that knows gin: what can be bound, loading, and linting.

A run is a job, gin files and overrides. Mistakes gin accepts in silence are errors
here, found before anything is built: misspelt macros, macros and bindings nobody
reads, values of the wrong type, unset required values.
"""

import contextlib
import functools
import importlib
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin

from nlhf_jax import gin_files, gin_lint, settings
from nlhf_jax.alarms import AlarmSettings
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import CheckpointError, UserError, check_choice
from nlhf_jax.data.tensorflow_setup import import_seqio
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.jobs import JOBS, rehearsal
from nlhf_jax.preferences.outside import OutsideJudge
from nlhf_jax.preferences.raters import RaterPopulation
from nlhf_jax.t5_settings import T5Settings

SETTINGS = (
    T5Settings,
    DecoderOnlySettings,
    settings.DataSettings,
    settings.LoraSettings,
    settings.OptimizerSettings,
    settings.SamplingSettings,
    settings.LoopSettings,
    settings.MemorySettings,
    settings.MeshSettings,
    AlarmSettings,
    RaterPopulation,
    OutsideJudge,
)
REPOSITORY = gin_files.REPOSITORY

# Name -> the function or class itself, and what gin made of it.
_known: dict[str, Callable[..., Any]] = {}
_bound: dict[str, Callable[..., Any]] = {}
# Jobs and their arguments, in the order they would run; None outside of a rehearsal.
_rehearsed: list[tuple[str, dict[str, Any]]] | None = None
# (job, arguments) -> whether it is called; None calls all.
_is_wanted: Callable[[str, Mapping[str, Any]], bool] | None = None


def register() -> None:
    """Makes every settings class, algorithm and job configurable, once."""
    if _known:
        return
    for configurable in (*SETTINGS, *ALGORITHMS.values()):
        _known[configurable.__name__] = configurable
    for name in JOBS:
        _known[name] = job_function(name)
    for name, configurable in _known.items():
        called = _that_can_be_rehearsed(configurable) if name in JOBS else configurable
        _bound[name] = gin.external_configurable(called, name)


def job_function(name: str) -> Callable[..., Any]:
    """Returns the function of a job, importing its module.

    Raises:
      UserError: no such job; names the nearest one.
    """
    check_choice("job", name, JOBS)
    module, function = JOBS[name].split(":")
    return getattr(importlib.import_module(module), function)


def load(
    job: str,
    files: Sequence[str],
    overrides: Mapping[str, str],
    search_paths: Sequence[str] = (),
    allow_import: Sequence[str] = (),
) -> None:
    """Lints the gin files and overrides for `job`, then gives them to gin.

    Every setting and every algorithm that the job or a job it calls will get is built
    once, so that a value out of its range is found before the first of them starts.

    Args:
      job: name of the job whose bindings are meant.
      files: paths, looked up as they are, in `search_paths`, then in the repository.
      overrides: name -> gin literal, as in `--gin.NAME=VALUE`.
      search_paths: more folders for files and their includes.
      allow_import: modules that the files may import besides ours and seqio's.

    Raises:
      UserError: one sentence with file and line.
    """
    register()
    gin.clear_config()
    folders = [*map(pathlib.Path, search_paths), REPOSITORY]
    read = []
    for file in files:
        read += gin_files.read(file, folders, "the command line")
    _import([s for s in read if s.key == gin_files.IMPORT], allow_import)
    statements = [s for s in read if s.key != gin_files.IMPORT]
    known = _known | _of_others(statements)
    for key, value in overrides.items():
        flag = gin_files.Statement(key, gin_files.quoted(value), f"--gin.{key}")
        statements.append(gin_lint.as_text(flag, statements, known))
    gin_lint.check(job, statements, known)
    text = "\n".join(f"{s.key} = {s.value}" for s in statements)
    try:
        gin.parse_config(text, skip_unknown=False)
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    try:
        for name, arguments in rehearse(job):
            rehearsal.check(name, arguments)
    except UserError as error:
        raise UserError(
            f"{error}{gin_lint.places_in(str(error), statements)}"
        ) from None
    for sentence in gin_lint.repeated(read):
        print(f"nlhf: {sentence}", file=sys.stderr)


def _import(imports: Sequence[gin_files.Statement], allowed: Sequence[str]) -> None:
    """Imports the modules that may be; what they register can then be named."""
    for statement in imports:
        gin_lint.check_import(statement, allowed)
    for statement in imports:
        if statement.value.partition(".")[0] == "seqio":
            import_seqio()  # which keeps TensorFlow off the accelerators
        try:
            importlib.import_module(statement.value)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{statement.place}: import {statement.value} failed: {reason}"
            ) from error


def _of_others(statements: Sequence[gin_files.Statement]) -> dict[str, Callable]:
    """Returns the configurables that imported modules registered and a file names."""
    found = {}
    for name in gin_lint.names_in(statements) - _known.keys():
        with contextlib.suppress(ValueError, RuntimeError):
            found[name] = inspect.unwrap(gin.get_configurable(name))
    return found


def _that_can_be_rehearsed(job: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the job, which in a rehearsal notes its arguments and does nothing."""

    @functools.wraps(job)
    def call(**arguments: Any) -> Any:
        if _rehearsed is None:
            if _is_wanted is None or _is_wanted(job.__name__, arguments):
                return job(**arguments)
            return None
        _rehearsed.append((job.__name__, arguments))
        return None

    call.__signature__ = inspect.signature(job)  # which gin reads
    call.can_be_rehearsed = True  # copied to what gin makes of it
    return call


def rehearse(job: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the job, and the jobs it is given, each with its arguments.

    The arguments are those of the real run: gin has built every setting and algorithm
    among them. Nothing else has run. What one job would tell another is not there.

    Raises:
      UserError: a setting or an algorithm refuses a value.
    """
    with _rehearsal() as found, _plain_errors():
        for called in _functions_in(_bound[job]):
            called()
        done = 0
        while done < len(found):  # it grows while jobs name further jobs
            for passed_on in _functions_in(found[done][1]):
                passed_on()
            done += 1
    return found


def build(job: str) -> str:
    """Returns what the job's step is, built from shapes alone; "" for other jobs.

    Raises:
      UserError: a folder or file that it names is missing, or settings don't fit.
    """
    found = rehearse(job)
    return rehearsal.build(*found[0]) if found else ""


def _functions_in(value: Any) -> list[Callable[[], Any]]:
    if isinstance(value, Mapping):
        return [one for inner in value.values() for one in _functions_in(inner)]
    # What is not ours would run.
    return [value] if getattr(value, "can_be_rehearsed", False) else []


@contextlib.contextmanager
def only(is_wanted: Callable[[str, Mapping[str, Any]], bool]) -> Iterator[None]:
    """While it is open, jobs do nothing but those for which `is_wanted` is true."""
    global _is_wanted
    _is_wanted = is_wanted
    try:
        yield
    finally:
        _is_wanted = None


@contextlib.contextmanager
def _rehearsal() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    global _rehearsed
    _rehearsed = []
    try:
        yield _rehearsed
    finally:
        _rehearsed = None


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except (UserError, CheckpointError) as error:
        # gin adds lines about its own calls to every exception that passes through.
        lines = str(error).splitlines()
        kept = [line for line in lines if "In call to configurable" not in line]
        kind = UserError if isinstance(error, UserError) else CheckpointError
        raise kind(" ".join(kept).strip()) from error


def run(job: str) -> None:
    """Calls a job with its bindings; raises what the job raises."""
    with _plain_errors():
        _bound[job]()


def bindings(job: str) -> dict[str, Any]:
    """Returns what a job would be called with, without calling it.

    Raises:
      UserError: a settings class refuses its values.
    """
    with _plain_errors():
        return dict(gin.get_bindings(job, resolve_references=True))


def operative_config() -> str:
    """Returns the values in force as gin text."""
    return gin.operative_config_str()
