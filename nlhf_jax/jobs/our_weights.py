# SPDX-License-Identifier: Apache-2.0
"""Model folders of this package as a format that weights are read from and written in.

What is read: a parameter file, or the newest good checkpoint of a run, or one step's,
from all of which the policy's parameters are taken.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
from typing import Any

from nlhf_jax import manifests, parameter_files, stored_states
from nlhf_jax.checks import CheckpointError, UserError, check_choice, check_integer
from nlhf_jax.conversion import peft, safetensors_files
from nlhf_jax.conversion.formats import Format, Options
from nlhf_jax.conversion.hugging_face_folders import THEIR_CONFIG
from nlhf_jax.conversion.hugging_face_tokenizers import COMPANIONS, TOKENIZER
from nlhf_jax.conversion.shapes import nested
from nlhf_jax.conversion.tensors import Adapters, Moments, Tensor, Weights
from nlhf_jax.data import vocabularies
from nlhf_jax.jobs import adapters, folders, moments, scorings
from nlhf_jax.types import POLICY

# Beside vocabulary.model, what an imported model's folder keeps of its source.
LANGUAGE_MODEL = "language_model"
KEPT = (*COMPANIONS, THEIR_CONFIG)
# Whether an optimiser's state is read: what lies beside a model, a run's too, or none.
BESIDE, ANY, NONE = "beside", "true", "false"
_log = logging.getLogger(__name__)


def recognises(path: pathlib.Path) -> bool:
    """Whether a path leads to a model folder."""
    try:
        return folders.find_model_dir(path).is_dir()
    except UserError:
        return False


def open_folder(path: pathlib.Path, options: Options) -> Weights:
    """Returns the weights of a model's folder, none of them read.

    Args:
      path: a model folder, its `checkpoints` folder, or one step's.
      options: "judges", whether it may be a judge's; "optimizer", whether the state of
        its optimiser is read: "true", "beside" (not a run's) or "false", the default.

    Raises:
      UserError: no model of such a kind, no checkpoint that is whole, or no vocabulary;
        or a state that is asked for is damaged.
    """
    description = folders.description_of(path)
    is_judge = description.kind != LANGUAGE_MODEL
    if is_judge and not options.get("judges"):
        folders.read_description(path)  # which says what is wanted
    folder = folders.find_model_dir(path)
    named = folders.vocabulary_file(path)
    files = {name: folder / name for name in KEPT if (folder / name).is_file()}
    if named != folders.BYTE_VOCABULARY:
        files[pathlib.Path(named).name] = pathlib.Path(named)
    tensors, source = _opened(folders.resolve(path))
    wanted = options.get("optimizer") or NONE
    # Of a model merged with adapters it would be of the numbers before.
    state = _state(source, wanted) if description.lora is None else None
    weights = Weights(
        description.settings,
        tensors,
        files,
        folders.BYTE_VOCABULARY if named == folders.BYTE_VOCABULARY else "",
        chat_template=description.chat_template,
        system_prompt=description.system_prompt,
        moments=state,
    )
    if is_judge:
        vocabulary = vocabularies.load_vocabulary(named)
        scoring = scorings.scoring_of(description, vocabulary)
        weights = dataclasses.replace(weights, scoring=scoring)
    if description.lora is None:
        return weights
    return _on_base(path, weights, description)


def _on_base(
    path: pathlib.Path, weights: Weights, description: folders.ModelDescription
) -> Weights:
    """Returns the base with a folder's adapters merged, tensor by tensor.

    Raises:
      UserError: the base has gone or has changed.
    """
    adapters.check_base(path, description.base, description.base_digest)
    base = open_folder(pathlib.Path(description.base), {"judges": True})
    mine = Adapters(description.lora, description.base, weights.tensors)
    leaves = nested({name: tensor.read() for name, tensor in mine.tensors.items()})
    merged = peft.merged(base, description.lora, leaves)
    return dataclasses.replace(weights, tensors=merged.tensors, adapters=mine)


def tensors_in(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the policy's tensors in a folder, by path; digests are compared here.

    Raises:
      UserError: there is nothing, or nothing that is whole.
    """
    return _opened(path)[0]


def _opened(path: pathlib.Path) -> tuple[dict[str, Tensor], pathlib.Path]:
    """Returns the policy's tensors in a folder, and the file or step they are of.

    Raises:
      UserError: there is nothing, or nothing that is whole.
    """
    sources = stored_states.param_sources(path.absolute())
    wrong = []
    for source in sources:
        try:
            is_step = source.is_dir()
            return _of_step(source) if is_step else _of_file(source), source
        except (CheckpointError, UserError, OSError) as error:
            wrong.append(f"{source.name}: {error}")
    raise UserError(
        f"no checkpoint in {str(path)!r} is readable: {'; '.join(wrong) or 'none'}"
    )


def _state(source: pathlib.Path, wanted: str) -> Moments | None:
    """Returns the optimiser's state of a parameter file or a step's folder.

    Raises:
      UserError: it is damaged or of another program; says what leaves it out.
    """
    if wanted == NONE:
        return None
    if source.is_dir() and wanted == BESIDE:
        _log.warning(
            "the optimiser's state of a run's checkpoint (%s) is not taken along: "
            "--optimizer=true takes it",
            source,
        )
        return None
    try:
        return moments.of_step(source) if source.is_dir() else moments.beside(source)
    except Exception as error:  # of any program that writes such a file
        raise UserError(
            f"the optimiser's state of {source} cannot be read: {error}; "
            "--optimizer=false leaves it out"
        ) from error


def state_flag(options: Options) -> str:
    """Returns which optimiser's state goes from one of our folders to another.

    Raises:
      UserError: the option is neither "true" nor "false".
    """
    text = options.get("optimizer") or ""
    return check_choice("optimizer", text, ("", ANY, NONE)) or BESIDE


def _open(path: pathlib.Path, options: Options) -> Weights:
    return open_folder(path, {**options, "optimizer": state_flag(options)})


def _of_step(folder: pathlib.Path) -> dict[str, Tensor]:
    manifests.check_files(folder, manifests.read(folder))
    stored = stored_states.stored_arrays(folder)["param_sets"][POLICY]
    read = functools.partial(stored_states.read_stored_array, folder)
    return {
        name: Tensor(tuple(leaf.shape), leaf.dtype, functools.partial(read, name, leaf))
        for name, leaf in parameter_files.names_of(stored).items()
    }


def _of_file(file: pathlib.Path) -> dict[str, Tensor]:
    tensors = safetensors_files.tensors_of(file)
    said = parameter_files.read_params_metadata(file).get("sha256")
    if said is not None and said != safetensors_files.digest_of(tensors):
        raise CheckpointError("its digest differs")
    return tensors


def write_folder(folder: pathlib.Path, weights: Weights, options: Options) -> None:
    """Writes a model folder.

    Args:
      folder: empty.
      weights: of any language model.
      options: "feature_lengths", {"inputs": tokens, "targets": tokens}; "is_merged",
        whether adapters are written as a part of their base and not by themselves.

    Raises:
      UserError: lengths below 1, or weights without a vocabulary.
    """
    lengths = options["feature_lengths"]
    for name in ("inputs", "targets"):
        check_integer(f"{name}_length", lengths[name], 1)
    description = folders.ModelDescription(
        LANGUAGE_MODEL if weights.scoring is None else weights.scoring.kind,
        dataclasses.replace(weights.settings, dtype="float32"),
        dict(lengths),
        vocabulary_of(weights),
        system_prompt=weights.system_prompt,
    )
    tensors = weights.tensors
    if weights.adapters is not None and not options.get("is_merged", True):
        stand = adapters.stand_on(weights.adapters.base, weights.adapters.lora)
        description = stand.describes(description)
        tensors = weights.adapters.tensors
    for name, source in weights.files.items():
        shutil.copyfile(source, folder / name)
    put = weights.chat_template
    if put is None:  # chat models of other projects were trained in their template
        put = folders.template_of(folder, description.vocabulary) or None
    description = dataclasses.replace(description, chat_template=put)
    (folder / folders.DESCRIPTION_FILE).write_text(description.to_json())
    header: dict[str, Any] = {"sha256": safetensors_files.DIGEST}
    safetensors_files.write(
        folder / parameter_files.PARAMS_FILE,
        tensors,
        {parameter_files.HEADER: json.dumps(header)},
    )
    if weights.moments is not None:
        moments.write(folder, weights.moments)


def vocabulary_of(weights: Weights) -> str:
    """Returns the vocabulary's name in a model folder: a file's, or "byte".

    Raises:
      UserError: there is none.
    """
    if weights.vocabulary:
        return weights.vocabulary
    for name in (folders.VOCABULARY_FILE, TOKENIZER):
        if name in weights.files:
            return name
    raise UserError(
        "the source holds no vocabulary: --vocabulary must name a SentencePiece model, "
        "a tokenizer.json, or byte"
    )


OPTIMIZER_FLAG = "true or false; default: true beside a model, false of a run's"
FORMAT = Format(
    looks_for="a model folder with model.json",
    recognises=recognises,
    open=_open,
    write=write_folder,
    open_flags={"optimizer": OPTIMIZER_FLAG},
    write_flags={"optimizer": OPTIMIZER_FLAG},
)
