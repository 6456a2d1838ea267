# SPDX-License-Identifier: Apache-2.0
"""seqio tasks by name.

A supervised task has the features `inputs` and `targets`; a task of comparisons has
`inputs`, `first`, `second` and a number `preference` = P(first preferred to second).
The texts stay beside the ids in `inputs_pretokenized` and so on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.data import debian, jsonl, tldr
from nlhf_jax.data.prompts import PromptFormat, prompt_format, prompt_vocabulary
from nlhf_jax.data.tensorflow_setup import import_seqio, import_tensorflow
from nlhf_jax.data.vocabularies import Vocabulary
from nlhf_jax.settings import DataSettings

SUPERVISED = ("inputs", "targets")
COMPARISONS = ("inputs", "first", "second")
SPLITS = ("train", "evaluation")

_own: set[str] = set()  # names this module has put into seqio's registry


def get_task(
    settings: DataSettings, vocabulary: Vocabulary, kind: Sequence[str]
) -> Any:
    """Returns the seqio task or mixture that the settings name.

    Args:
      settings: names the task and its files.
      vocabulary: a seqio vocabulary for all features.
      kind: SUPERVISED or COMPARISONS, the features that are wanted.

    Raises:
      UserError: no such task (lists them and the nearest), or it has other features.
    """
    name = settings.mixture_or_task_name
    check_name(settings, kind)
    seqio = import_seqio()
    builders = _BUILDERS[tuple(kind)]
    if name in builders:
        return builders[name](settings, vocabulary)
    if settings.chat_template:
        raise UserError(
            f"chat_template {settings.chat_template!r} works with the tasks "
            f"{', '.join(builders)}; {name!r} makes tokens itself"
        )
    task = seqio.get_mixture_or_task(name)
    missing = [feature for feature in kind if feature not in task.output_features]
    if missing:
        raise UserError(f"task {name!r} has no feature {missing[0]!r}, which is needed")
    return task


def check_name(settings: DataSettings, kind: Sequence[str]) -> None:
    """Checks that there is a task of the name; seqio is asked last, it takes seconds.

    Raises:
      UserError: there is none; lists the known ones and the nearest.
    """
    name = settings.mixture_or_task_name
    builders = _BUILDERS[tuple(kind)]
    if name in builders:
        return
    seqio = import_seqio()
    registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} - _own
    if name not in registered:
        everything = registered.union(*_BUILDERS.values())
        if name in everything:
            raise UserError(
                f"task {name!r} has no features {', '.join(kind)}; tasks that have are "
                f"{', '.join(builders)}"
            )
        check_choice("mixture_or_task_name", name, everything)


def check_files(settings: DataSettings, kind: Sequence[str]) -> None:
    """Reads the user's own files for what is wrong with them, before longer work.

    Raises:
      UserError: a file is missing or malformed.
    """
    if settings.mixture_or_task_name == "jsonl":
        jsonl.read_splits(settings, _JSONL_FIELDS[tuple(kind)])


def register(
    name: str,
    source: Any,
    renamed: Mapping[str, str],
    features: Sequence[str],
    vocabulary: Vocabulary,
    form: PromptFormat | None = None,
) -> Any:
    """Adds a task to seqio's registry, in place of one of the same name.

    Args:
      name: in the registry.
      source: a seqio data source.
      renamed: feature or extra field -> field of the source.
      features: those to tokenise; all but "inputs" end with an end-of-sequence id.
      vocabulary: of all features.
      form: how a prompt, "inputs", becomes ids; None for the vocabulary's own way.
    """
    seqio, tf = import_seqio(), import_tensorflow()
    form = form or prompt_format(vocabulary)
    if name in _own:
        seqio.TaskRegistry.remove(name)
    elif name in seqio.TaskRegistry.names():
        raise UserError(f"seqio already has another task named {name!r}: rename it")
    _own.add(name)
    feature = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
    inputs = {}
    if not form.is_plain:
        whole = prompt_vocabulary(vocabulary, form)
        inputs["inputs"] = seqio.Feature(whole, add_eos=False, dtype=tf.int32)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            _rekey(renamed),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=dict.fromkeys(features, feature) | inputs,
    )


def format_of(settings: DataSettings, vocabulary: Vocabulary) -> PromptFormat:
    """Returns the format of the prompts that some settings ask for.

    Raises:
      UserError: as `prompts.prompt_format`.
    """
    return prompt_format(vocabulary, settings.chat_template, settings.system_prompt)


def _rekey(renamed: Mapping[str, str]) -> Callable[[Any], Any]:
    def rekey(dataset):
        return dataset.map(lambda row: {key: row[old] for key, old in renamed.items()})

    return rekey


def _docstrings(settings: DataSettings, vocabulary: Vocabulary) -> Any:
    splits = {split: split for split in SPLITS}
    return _docstring_task("docstrings", splits, settings, vocabulary)


def _docstrings_pretraining(settings: DataSettings, vocabulary: Vocabulary) -> Any:
    """The same evaluation; training also reads definitions without a body, and quotes.

    They teach a model that starts from nothing the language, and to copy.
    """
    splits = {"train": "train+signatures+quotes", "evaluation": "evaluation"}
    return _docstring_task("docstrings_pretraining", splits, settings, vocabulary)


def _docstring_task(
    name: str, splits: Mapping[str, str], settings: DataSettings, vocabulary: Vocabulary
) -> Any:
    from nlhf_jax.data import docstring_builder

    folder = docstring_builder.corpus_folder(
        settings.cache_dir, settings.data_dir, settings.lock_file
    )
    builder = docstring_builder.prepare(folder, settings.lock_file)
    source = import_seqio().TfdsDataSource(
        tfds_name=f"docstrings:{builder.version}", tfds_data_dir=folder, splits=splits
    )
    renamed = {"inputs": "prompt", "targets": "target"}
    form = format_of(settings, vocabulary)
    return register(name, source, renamed, SUPERVISED, vocabulary, form)


def rows_task(
    name: str,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    kind: Sequence[str],
    vocabulary: Vocabulary,
    form: PromptFormat,
) -> Any:
    """Returns a registered task over rows in memory.

    The tensors are made from the lists once: Python inside a pipeline would make
    iterators that can't be saved.

    Args:
      name: in seqio's registry.
      splits: split -> rows with the fields that `jsonl` describes.
      kind: SUPERVISED or COMPARISONS.
      vocabulary: of all features.
      form: how a prompt becomes ids.
    """
    seqio, tf = import_seqio(), import_tensorflow()
    renamed = _FIELDS[tuple(kind)]

    def dataset(split, shuffle_files, seed=None):
        del shuffle_files, seed
        rows = splits[split]
        columns = {f: [row[f] for row in rows] for f in renamed.values()}
        if "preference" in columns:
            columns["preference"] = [float(p) for p in columns["preference"]]
        return tf.data.Dataset.from_tensor_slices(columns)

    filled = [split for split, rows in splits.items() if rows]
    source = seqio.FunctionDataSource(
        dataset, splits=filled, num_input_examples={s: len(splits[s]) for s in filled}
    )
    return register(name, source, renamed, kind, vocabulary, form)


def _rows_of(kind: tuple[str, ...], read: Callable[[DataSettings], Any]):
    def build(settings: DataSettings, vocabulary: Vocabulary) -> Any:
        kind_name = "comparisons" if kind == COMPARISONS else "supervised"
        name = f"{settings.mixture_or_task_name}_{kind_name}"
        form = format_of(settings, vocabulary)
        return rows_task(name, read(settings), kind, vocabulary, form)

    return build


def _debian_or_docstrings(settings: DataSettings, vocabulary: Vocabulary) -> Any:
    """Package descriptions where this machine has them, else docstrings."""
    name = "debian" if debian.is_available(settings) else "docstrings"
    chosen = dataclasses.replace(settings, mixture_or_task_name=name)
    return _BUILDERS[SUPERVISED][name](chosen, vocabulary)


_JSONL_FIELDS = {
    SUPERVISED: jsonl.PROMPT_FIELDS,
    COMPARISONS: jsonl.COMPARISON_FIELDS,
}
_FIELDS = {
    SUPERVISED: {"inputs": "prompt", "targets": "target"},
    COMPARISONS: {
        "inputs": "prompt",
        "first": "response_a",
        "second": "response_b",
        "preference": "preference",
    },
}


def _read_jsonl(kind: tuple[str, ...]) -> Callable[[DataSettings], Any]:
    return lambda settings: jsonl.read_splits(settings, _JSONL_FIELDS[kind])


_BUILDERS: dict[tuple[str, ...], dict[str, Callable[..., Any]]] = {
    SUPERVISED: {
        "docstrings": _docstrings,
        "docstrings_pretraining": _docstrings_pretraining,
        "debian": _rows_of(SUPERVISED, debian.splits),
        "debian_or_docstrings": _debian_or_docstrings,
        "jsonl": _rows_of(SUPERVISED, _read_jsonl(SUPERVISED)),
        "tldr": _rows_of(SUPERVISED, tldr.prompt_splits),
    },
    COMPARISONS: {
        "jsonl": _rows_of(COMPARISONS, _read_jsonl(COMPARISONS)),
        "tldr": _rows_of(COMPARISONS, tldr.comparison_splits),
    },
}
