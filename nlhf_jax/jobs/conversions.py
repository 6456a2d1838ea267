# SPDX-License-Identifier: Apache-2.0
"""`nlhf import` and `nlhf export`: weights between this package and others.

Both open a source, write another format tensor by tensor into a folder beside the
target, and rename it at the end: a target is whole or not there.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nlhf_jax.checks import UserError, check_local_folder
from nlhf_jax.conversion import agreement, formats
from nlhf_jax.conversion.hugging_face_folders import read_json
from nlhf_jax.conversion.shapes import check_complete
from nlhf_jax.conversion.tensors import Weights, cast
from nlhf_jax.data import vocabularies
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.jobs import conversion_flags, folders, model_cards, our_weights
from nlhf_jax.models.t5 import EOS_ID, PAD_ID

HUGGING_FACE, PEFT, OURS = "hugging_face", "peft", "nlhf"
GENERATION = "generation_config.json"
_log = logging.getLogger(__name__)
LOADED_AS_THEY_ARE = (HUGGING_FACE, "gguf")  # by transformers


def import_model(words: Sequence[str]) -> int:
    """Makes a model folder of weights in another format: Hugging Face and others.

    Raises:
      UserError: flags that make no sense, or a source that cannot be taken whole; then
        nothing is written.
    """
    options, own = conversion_flags.import_options(words)
    if options.check:
        agreement.require()
    source = folders.expanded("from", options.source)
    target = free_target("to", options.to)
    name = options.format or formats.recognised(source)
    chosen = formats.load(name)
    conversion_flags.check_flags(name, own, chosen.open_flags)
    if options.check and name == PEFT:
        agreement.require(with_peft=True)
    weights = chosen.open(source, own)
    weights = with_vocabulary(weights, options.vocabulary)
    check_complete(weights)
    weights = cast(weights, options.dtype, allow_rounding=options.allow_rounding)
    lengths = {"inputs": options.inputs_length, "targets": options.targets_length}
    _say_other_ends(weights)
    with written_whole(target) as folder:
        given = {"feature_lengths": lengths, "is_merged": False}
        our_weights.write_folder(folder, weights, given)
        if options.check:
            print(_check_import(name, source, folder, options))
    print(f"imported {summary(weights)} ({name}){_also(weights)} into {options.to}")
    return 0


def export_model(words: Sequence[str]) -> int:
    """Writes a model folder's weights in another format: Hugging Face and others.

    Raises:
      UserError: flags that make no sense, or weights that the format cannot hold; then
        nothing is written.
    """
    options, own = conversion_flags.export_options(words)
    compares = options.check and options.format == HUGGING_FACE
    chosen = formats.load(options.format)
    if chosen.write is None:
        raise UserError(f"{options.format} is only read: it has no writer")
    conversion_flags.check_flags(options.format, own, chosen.write_flags)
    target = free_target("to", options.to)
    source = folders.expanded("checkpoint", options.checkpoint)
    wanted = {"judges": True, "optimizer": _state_wanted(options.format, chosen, own)}
    weights = our_weights.open_folder(source, wanted)
    if weights.scoring is not None and compares:
        raise UserError(
            "--check compares what language models say, got a "
            f"{weights.scoring.kind} model: leave it out"
        )
    if compares:
        agreement.require()
    check_complete(weights)
    weights = cast(weights, options.dtype, allow_rounding=options.allow_rounding)
    lengths = folders.description_of(source).feature_lengths
    given = {
        "feature_lengths": lengths,
        "max_positions": sum(lengths.values()),
        "shard_bytes": round(options.shard_gigabytes * 1e9),
    }
    with written_whole(target) as folder:
        chosen.write(folder, weights, given | own)
        step = int(source.name) if source.name.isdecimal() else None
        home = folders.find_model_dir(source)
        card = model_cards.model_card(target.name, home, weights, step)
        (folder / model_cards.CARD).write_text(card, encoding="utf-8")
        if options.check:
            print(_check_export(chosen, folder, weights, options, own))
    also = _also(weights)
    print(f"exported {summary(weights)}{also} into {options.to} ({options.format})")
    return 0


def _state_wanted(name: str, chosen: formats.Format, own: Mapping[str, str]) -> str:
    """Returns which optimiser's state an export reads; none that it does not write."""
    if "optimizer" not in chosen.write_flags:
        return our_weights.NONE
    if name == OURS:
        return our_weights.state_flag(own)
    return own.get("optimizer") or our_weights.ANY


def _say_other_ends(weights: Weights) -> None:
    """Warns of ids that end a response elsewhere and not here."""
    file = weights.files.get(GENERATION)
    if file is None or not isinstance(weights.settings, DecoderOnlySettings):
        return
    ours = weights.settings.eos_id
    try:
        ends = read_json(file).get("eos_token_id")
    except UserError:
        return  # nothing is read from it here
    others = [end for end in ends if end != ours] if isinstance(ends, list) else []
    if others:
        _log.warning(
            "%s ends a response with any of %s; here id %s alone does",
            GENERATION,
            ends,
            ours,
        )


def _check_import(
    name: str, source: pathlib.Path, folder: pathlib.Path, options: Any
) -> str:
    """Returns how the folder compares with what transformers makes of the source.

    A source that transformers does not read is written for it first; of adapters it is
    their base, on which `peft` puts them.
    """
    weights = our_weights.open_folder(folder, {})
    rows = _prompt_rows(weights, options.prompt)
    if name in LOADED_AS_THEY_ARE:
        model = agreement.load_theirs(source, options.dtype)
    else:
        theirs = weights
        if name == PEFT and weights.adapters is not None:
            theirs = our_weights.open_folder(pathlib.Path(weights.adapters.base), {})
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            longest = {"max_positions": agreement.LONGEST_PROMPT * 2}
            given = longest | {"shard_bytes": 1 << 40}
            formats.load(HUGGING_FACE).write(pathlib.Path(place), theirs, given)
            model = agreement.load_theirs(pathlib.Path(place))
    if name == PEFT:
        model = agreement.with_adapters(model, source)
    found = agreement.compare(weights, model, rows, length=agreement.NUM_TOKENS)
    return agreement.check(found)


def _check_export(
    chosen: formats.Format,
    folder: pathlib.Path,
    weights: Weights,
    options: Any,
    own: dict[str, str],
) -> str:
    """Returns how the result compares with the weights, as its users load it.

    What only we read is read again, and must be the same bit for bit.
    """
    if options.format == HUGGING_FACE:
        rows = _prompt_rows(weights, options.prompt)
        model = agreement.load_theirs(folder)
        found = agreement.compare(weights, model, rows, length=agreement.NUM_TOKENS)
        return agreement.check(found)
    known = {flag: value for flag, value in own.items() if flag in chosen.open_flags}
    if weights.adapters is not None and "base" in chosen.open_flags:
        known["base"] = weights.adapters.base
    again = chosen.open(folder, known | {"judges": True})
    for path, tensor in weights.tensors.items():
        there = again.tensors.get(path)
        if there is None or not np.array_equal(there.read(), tensor.read()):
            raise UserError(f"--check: tensor {path} is not what was written")
    return f"read again, all {len(again.tensors)} tensors are the same"


def _prompt_rows(weights: Weights, texts: Sequence[str]) -> list[list[int]]:
    vocabulary = vocabularies.load_vocabulary(_vocabulary_path(weights))
    return agreement.prompt_rows(texts, vocabulary, weights)


def _vocabulary_path(weights: Weights) -> str:
    name = our_weights.vocabulary_of(weights)
    return name if name == folders.BYTE_VOCABULARY else str(weights.files[name])


def free_target(name: str, folder: str) -> pathlib.Path:
    """Returns the folder that is to be made.

    Raises:
      UserError: something is there already, or the folder it is to lie in is not.
    """
    target = folders.expanded(name, check_local_folder(name, folder)).absolute()
    if target.exists() or target.is_symlink():
        raise UserError(f"{name}: there is already something at {folder!r}")
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{name}: {str(parent)!r} is no folder that can be written to")
    return target


@contextlib.contextmanager
def written_whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder that becomes `target` at the end; after an error, nothing.

    Raises:
      UserError: the disk is full, or may not be written to.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():  # os.rename takes an empty folder's place
            raise UserError(f"something was made at {str(target)!r} meanwhile")
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{str(target)!r} is not written: {error}") from error
        raise


def with_vocabulary(weights: Weights, vocabulary: str) -> Weights:
    """Returns weights with the vocabulary that is named, or their own; it is read once.

    A decoder-only network takes its padding and its end from the vocabulary, since both
    must be one.

    Args:
      weights: of any network.
      vocabulary: a SentencePiece model, a tokenizer.json, or "byte"; "" is their own.

    Raises:
      UserError: there is none, it cannot be read, it has more ids than the network, or
        a T5's has other ids for padding and end than T5.
    """
    files = dict(weights.files)
    if vocabulary:
        # Ids, ends and templates of the old one say nothing of the new.
        for name in (folders.VOCABULARY_FILE, *our_weights.COMPANIONS):
            files.pop(name, None)
        is_byte = vocabulary == folders.BYTE_VOCABULARY
        weights = dataclasses.replace(weights, vocabulary=vocabulary if is_byte else "")
        if not is_byte:
            path = folders.expanded("vocabulary", vocabulary)
            # What says which of its tokens are special lies beside it.
            for companion in our_weights.COMPANIONS:
                if (path.parent / companion).is_file():
                    files[companion] = path.parent / companion
            files.pop(our_weights.TOKENIZER, None)
            is_json = path.suffix == ".json"
            files[our_weights.TOKENIZER if is_json else folders.VOCABULARY_FILE] = path
    weights = dataclasses.replace(weights, files=files)
    read = vocabularies.load_vocabulary(_vocabulary_path(weights))
    vocabularies.check_vocabulary(read, weights.settings.vocab_size)
    if not isinstance(weights.settings, DecoderOnlySettings):
        if (read.pad_id, read.eos_id) != (PAD_ID, EOS_ID):
            raise UserError(
                f"the vocabulary of a T5 must have padding {PAD_ID} and end {EOS_ID}, "
                f"got {read.pad_id} and {read.eos_id}"
            )
        return weights
    settings = dataclasses.replace(
        weights.settings, pad_id=read.pad_id, eos_id=read.eos_id
    )
    return dataclasses.replace(weights, settings=settings)


def summary(weights: Weights) -> str:
    """Returns how many tensors and parameters there are, in words."""
    total = sum(_size(tensor.shape) for tensor in weights.tensors.values())
    return f"{len(weights.tensors)} tensors, {total:,} parameters"


def _also(weights: Weights) -> str:
    """Returns what is said of an optimiser's state that comes along."""
    found = weights.moments
    if found is None:
        return ""
    return f", with the state of {found.optimizer} after {found.count:,} updates,"


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
