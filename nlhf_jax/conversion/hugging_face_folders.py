# SPDX-License-Identifier: Apache-2.0
"""Folders as Hugging Face's hub has them: config.json and safetensors files.

config.json                       the network
model.safetensors                 its tensors, or, of a large one,
model-00001-of-00004.safetensors  parts, and
model.safetensors.index.json      which part has which tensor
tokenizer.json, spiece.model, ... the vocabulary, which is copied
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import (
    hugging_face,
    hugging_face_judges,
    hugging_face_tokenizers,
    t5_config,
)
from nlhf_jax.conversion.formats import Format, Options
from nlhf_jax.conversion.hugging_face_config import FAMILIES, settings_from_config
from nlhf_jax.conversion.hugging_face_writing import config_of, plain
from nlhf_jax.conversion.safetensors_files import num_bytes, tensors_of, write
from nlhf_jax.conversion.tensors import Tensor, Weights
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The configuration an imported model came with, kept beside ours.
THEIR_CONFIG = "hugging_face_config.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FORMAT_METADATA = {"format": "pt"}  # their loader asks for it


def recognises(path: pathlib.Path) -> bool:
    """Whether a folder has a config.json that names the kind of its model."""
    try:
        return "model_type" in read_json(path / CONFIG)
    except UserError:
        return False


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file is missing, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{file} is missing or cannot be read") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is no JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object")
    return found


def settings_of(config: Mapping[str, Any]) -> ModelSettings:
    """Returns the settings that a `config.json` describes, of any family.

    Raises:
      UserError: another family, a size that is missing, or a switch our network does
        not have.
    """
    family = config.get("model_type", "")
    if family in t5_config.FAMILIES:
        return t5_config.t5_settings(config)
    if family not in FAMILIES:
        known = ", ".join(sorted((*FAMILIES, *t5_config.FAMILIES)))
        raise UserError(f"model_type must be one of {known}; got {family!r}")
    return settings_from_config(config)


def open_folder(path: pathlib.Path, options: Options) -> Weights:
    """Returns the weights in a folder, none of them read.

    Raises:
      UserError: names what is missing, damaged, of another shape or not known.
    """
    del options
    path = path.parent if path.name == CONFIG else path
    config = read_json(path / CONFIG)
    try:
        settings = settings_of(config)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        text = str(error) if isinstance(error, UserError) else repr(error)
        raise UserError(f"{path / CONFIG}: {text}") from None
    tensors = read_shards(path)
    if config["model_type"] in t5_config.FAMILIES:
        table, head = "shared.weight", "lm_head.weight"
        if t5_config.may_share_table(config) and table in tensors:
            tensors.setdefault(head, tensors[table])
    is_pair = not isinstance(settings, DecoderOnlySettings)
    files, vocabulary = hugging_face_tokenizers.found_in(path, is_pair=is_pair)
    files[THEIR_CONFIG] = path / CONFIG
    ours = hugging_face.from_hugging_face(tensors, settings)
    return Weights(settings, ours, files, vocabulary)


def read_shards(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of a folder's safetensors files, by name.

    Raises:
      UserError: a file is missing or damaged, or holds other tensors than the index
        says; the file or the tensor is named. Also where there are only files that
        would have to be unpickled, which can run any program.
    """
    if (path / WHOLE).is_file() and not (path / INDEX).is_file():
        return tensors_of(path / WHOLE)
    if not (path / INDEX).is_file():
        for name in PICKLED:
            if (path / name).is_file():
                raise UserError(
                    f"{path / name} is pickled and is not read, since that may run any "
                    "program: load it with transformers and save it again with "
                    "save_pretrained, which writes safetensors"
                )
        raise UserError(f"{str(path)!r} has no {WHOLE} and no {INDEX}")
    places = read_json(path / INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{path / INDEX} has no weight_map")
    found: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, places.values()))):
        if pathlib.PurePath(shard).name != shard or "\\" in shard or shard == "..":
            raise UserError(
                f"{path / INDEX} must name files of its own folder, got {shard!r}"
            )
        if not (path / shard).is_file():
            first = next(name for name, file in places.items() if file == shard)
            raise UserError(f"{path / shard} is missing, which should hold {first}")
        for name, tensor in tensors_of(path / shard).items():
            if places.get(name) != shard:
                said = places.get(name, "none")
                raise UserError(
                    f"tensor {name} is in {path / shard}, and the index says {said}"
                )
            found[name] = tensor
    for name, shard in places.items():
        if name not in found:
            raise UserError(f"tensor {name} is missing in {path / shard}")
    return found


def write_folder(folder: pathlib.Path, weights: Weights, options: Options) -> None:
    """Writes weights so that `transformers` loads them.

    Args:
      folder: empty.
      weights: of a T5 or a decoder-only model, or of a judge; see
        `hugging_face_judges`.
      options: "shard_bytes", the largest file wanted; a tensor is never split.
        "max_positions", tokens the model is meant for, unless an imported
        configuration says it.

    Raises:
      UserError: no family has the network's switches.
    """
    config = _config(weights, options["max_positions"])
    theirs = hugging_face.to_hugging_face(weights.tensors, weights.settings)
    if hugging_face_judges.is_classifier(weights):
        config, theirs = hugging_face_judges.as_classifier(config, theirs, weights)
    config["torch_dtype"] = _common_dtype(theirs)
    write_json(folder / CONFIG, config)
    write_shards(folder, theirs, options["shard_bytes"])
    hugging_face_tokenizers.write(folder, weights)


def write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON with sorted keys."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_shards(
    folder: pathlib.Path, tensors: Mapping[str, Tensor], shard_bytes: int
) -> None:
    """Writes tensors to one file, or to several and an index.

    Args:
      folder: of the files.
      tensors: by name.
      shard_bytes: the largest file wanted; a larger tensor has a file of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes(tensor) > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= num_bytes(tensor)
    if len(shards) == 1:
        write(folder / WHOLE, shards[0], FORMAT_METADATA)
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file, shard, FORMAT_METADATA)
        places |= dict.fromkeys(shard, file)
    total = sum(map(num_bytes, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / INDEX, index)


def _common_dtype(tensors: Mapping[str, Tensor]) -> str:
    """Returns the dtype that most numbers have."""
    numbers: dict[str, int] = {}
    for tensor in tensors.values():
        name = tensor.dtype.name
        numbers[name] = numbers.get(name, 0) + math.prod(tensor.shape)
    return max(numbers, key=lambda name: numbers[name])


def _config(weights: Weights, max_positions: int) -> dict[str, Any]:
    """Returns the configuration it came with, if it still says the same network."""
    kept = weights.files.get(THEIR_CONFIG)
    if kept is not None:
        try:
            config = read_json(kept)
            if same_network(settings_of(config), weights.settings):
                return _without_dtype(config) | _ids(weights.settings, config)
        except (UserError, TypeError, ValueError, KeyError):
            pass  # it is written anew
    return config_of(weights.settings, max_positions)


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    stale = ("torch_dtype", "dtype", "_name_or_path", "quantization_config")
    return {key: value for key, value in config.items() if key not in stale}


def _ids(settings: ModelSettings, kept: Mapping[str, Any]) -> dict[str, int]:
    """Returns the special ids that a kept configuration says otherwise, or not at all.

    Of several ends, ours may be any; no padding is as good as any.
    """
    if not isinstance(settings, DecoderOnlySettings):
        return {}
    found = {}
    ends = kept.get("eos_token_id")
    if settings.eos_id not in (ends if isinstance(ends, list) else [ends]):
        found["eos_token_id"] = settings.eos_id
    if kept.get("pad_token_id") not in (None, settings.pad_id):
        found["pad_token_id"] = settings.pad_id
    return found


def same_network(first: ModelSettings, second: ModelSettings) -> bool:
    """Whether two settings are one network, up to special ids and dropout."""

    def core(settings: ModelSettings) -> Any:
        if isinstance(settings, DecoderOnlySettings):
            return dataclasses.replace(plain(settings), pad_id=0, eos_id=0)
        return dataclasses.replace(settings, dropout_rate=0.0, dtype="float32")

    return type(first) is type(second) and core(first) == core(second)


FORMAT = Format(
    looks_for="a folder with config.json and *.safetensors",
    recognises=recognises,
    open=open_folder,
    write=write_folder,
)
