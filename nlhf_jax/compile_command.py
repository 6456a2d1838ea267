# SPDX-License-Identifier: Apache-2.0
"""`nlhf compile`: what a job's step needs of a machine, without that machine."""

import ast
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nlhf_jax import cli, gin_bindings, gin_files
from nlhf_jax.checks import UserError, check_choice, nearest
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings
from nlhf_jax.t5_settings import T5Settings

MOST_DEVICES = 65_536
SWITCHES = ("fit", "plan", "json")
USAGE = """usage: nlhf compile --job=JOB (--topology=CHIP:SHAPE | --cpu_devices=N)
                    [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--PARAMETER=VALUE ...]
  --job=JOB               train, sft, preference or reward; files, bindings and
                          parameters are that job's
  --topology=v5e:16x16    a TPU slice that need not exist; needs the package libtpu
  --cpu_devices=8         fake CPU devices instead
  --reference_model=FILE  a gin file of a model's shape, where its folder is not
                          here; also --preference_model, --reward_model, and --model
                          for what a supervised job trains
  --plan                  an estimate from shapes alone, without the compiler
  --fit                   look for the largest batch that fits
  --json                  one JSON object"""


def main(words: Sequence[str]) -> int:
    """Says what a job's step needs of a TPU slice or of fake devices, without them.

    Raises:
      UserError: flags, configuration, shapes or target that make no sense.
    """
    if not words or {"--help", "-h"} & set(words):
        print(USAGE)
        return 0 if words else cli.USAGE_EXIT
    from nlhf_jax.jobs import compile as compile_job
    from nlhf_jax.jobs import programs

    own, rest = _split(words, (*programs.MODELS, "job", "topology", "cpu_devices"))
    if "job" not in own:
        raise UserError(f"compile needs --job=JOB: {', '.join(programs.BUILDERS)}")
    job = check_choice("job", own["job"], programs.BUILDERS)
    _check_flags(job, rest, own, programs)
    options = compile_job.Options(
        topology=own.get("topology", ""),
        cpu_devices=_devices(own),
        **{name: name in own for name in SWITCHES},
    )
    given = {flag: read_shape(own[flag]) for flag in programs.MODELS if flag in own}
    bindings = resolve(job, rest, [programs.folder_flags(job)[flag] for flag in given])
    return compile_job.run(job, bindings, given, options)


def _split(
    words: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Returns this command's own flags, and the words that are the job's."""
    own: dict[str, str] = {}
    rest, words = [], list(words)
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in (*names, *SWITCHES):
            rest.append(word)
            continue
        if name in own:
            raise UserError(f"--{name} is given twice")
        if name in SWITCHES:
            if has_value:
                raise UserError(f"--{name} takes no value, got {value!r}")
        elif not has_value:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            value = words.pop(0)
        own[name] = value
    return own, rest


def _check_flags(job: str, rest: list[str], own: Mapping[str, str], programs) -> None:
    parameters = cli.parameters(job)
    models = programs.folder_flags(job)
    known = (*models, *SWITCHES, "job", "topology", "cpu_devices", "gin_file")
    for word in rest:
        name = word.removeprefix("--").partition("=")[0]
        is_jobs = name.startswith("gin") or name in parameters
        if word.startswith("--") and not is_jobs:
            near = nearest(name, (*known, *parameters))
            raise UserError(f"compile has no flag --{name}{near}")
    for name in own:
        if name not in known:
            raise UserError(
                f"{job} reads no --{name}; it reads "
                + ", ".join(f"--{flag}" for flag in models)
            )


def _devices(own: Mapping[str, str]) -> int:
    """Returns how many fake devices are asked for, 0 for none."""
    name = "cpu_devices"
    if name not in own:
        return 0
    text = own[name]
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MOST_DEVICES):
        raise UserError(
            f"{name} must be an integer in [1, {MOST_DEVICES}], got {text!r}"
        )
    return int(text)


def resolve(
    job: str, words: Sequence[str], without: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the arguments that gin would call a job with; the job is not called.

    Args:
      job: its name.
      words: --gin_file, --gin.NAME and the job's own flags.
      without: parameters that name a folder that need not exist.

    Raises:
      UserError: as the job itself would.
    """
    arguments = cli.Arguments(job, words)
    overrides = dict(arguments.overrides)
    # Nothing is written, and a shape that is given needs no folder.
    for name in ("model_dir", *without):
        overrides[f"{job}.{name}"] = "''"
    gin_bindings.load(
        job,
        arguments.files,
        overrides,
        arguments.search_paths,
        arguments.allow_import,
    )
    return gin_bindings.bindings(job)


def read_shape(file: str) -> ModelSettings:
    """Returns the `T5Settings` or `DecoderOnlySettings` that a gin file binds.

    Raises:
      UserError: the file is missing, binds none, or is incomplete.
    """
    statements = gin_files.read(file, [gin_files.REPOSITORY], "the command line")
    values = {one.key: one.value for one in statements}
    is_decoder_only = any(key.startswith("DecoderOnlySettings.") for key in values)
    shape = DecoderOnlySettings if is_decoder_only else T5Settings
    found = {}
    for key, value in values.items():
        if not key.startswith(f"{shape.__name__}."):
            continue
        passed = set()
        while value.startswith("%"):
            if value in passed:
                raise UserError(f"{file}: the macro {value} is defined by itself")
            passed.add(value)
            if value[1:] not in values:
                raise UserError(f"{file}: the macro {value} is not defined")
            value = values[value[1:]]
        try:
            found[key.removeprefix(f"{shape.__name__}.")] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{file}: {key} is not a literal: {value}") from error
    if not found:
        near = sorted(p.name for p in pathlib.Path(file).parent.glob("*.gin"))
        raise UserError(
            f"{file} binds no {shape.__name__}; files of shapes are in configs/models"
            + nearest(pathlib.Path(file).name, near)
        )
    try:
        return shape(**found)
    except TypeError as error:
        text = str(error).replace(f"{shape.__name__}.__init__() ", "")
        raise UserError(f"{file}: {shape.__name__} {text}") from error
