# SPDX-License-Identifier: Apache-2.0
"""The only file that knows gin: what can be bound, loading, and linting.

A run is a job, gin files and overrides. Mistakes gin accepts in silence are errors
here, found before anything is built: misspelt macros, macros and bindings nobody
reads, values of the wrong type, unset required values.
"""

import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin

from nlhf_jax import gin_files, gin_lint, settings
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.jobs import JOBS
from nlhf_jax.preferences.raters import RaterPopulation

SETTINGS = (
    settings.T5Settings,
    settings.DataSettings,
    settings.OptimizerSettings,
    settings.SamplingSettings,
    settings.LoopSettings,
    settings.MemorySettings,
    settings.MeshSettings,
    RaterPopulation,
)
REPOSITORY = gin_files.REPOSITORY

# Name -> the function or class itself, and what gin made of it.
_known: dict[str, Callable[..., Any]] = {}
_bound: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Makes every settings class, algorithm and job configurable, once."""
    if _known:
        return
    for configurable in (*SETTINGS, *ALGORITHMS.values()):
        _known[configurable.__name__] = configurable
    for name in JOBS:
        _known[name] = job_function(name)
    for name, configurable in _known.items():
        _bound[name] = gin.external_configurable(configurable, name)


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
) -> None:
    """Lints the gin files and overrides for `job`, then gives them to gin.

    Args:
      job: name of the job whose bindings are meant.
      files: paths, looked up as they are, in `search_paths`, then in the repository.
      overrides: name -> gin literal, as in `--gin.NAME=VALUE`.
      search_paths: more folders for files and their includes.

    Raises:
      UserError: one sentence with file and line.
    """
    register()
    gin.clear_config()
    folders = [*map(pathlib.Path, search_paths), REPOSITORY]
    statements = []
    for file in files:
        statements += gin_files.read(file, folders, "the command line")
    for key, value in overrides.items():
        text = gin_files.quoted(value)
        statements.append(gin_files.Statement(key, text, f"--gin.{key}"))
    gin_lint.check(job, statements, _known)
    text = "\n".join(f"{s.key} = {s.value}" for s in statements)
    try:
        gin.parse_config(text, skip_unknown=False)
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error


def run(job: str) -> None:
    """Calls a job with its bindings; raises what the job raises."""
    try:
        _bound[job]()
    except UserError as error:
        # gin adds lines about its own calls to every exception that passes through.
        lines = str(error).splitlines()
        kept = [line for line in lines if "In call to configurable" not in line]
        raise UserError(" ".join(kept).strip()) from error


def operative_config() -> str:
    """Returns the values in force as gin text."""
    return gin.operative_config_str()
