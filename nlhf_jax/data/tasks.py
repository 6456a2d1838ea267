# SPDX-License-Identifier: Apache-2.0
"""seqio tasks by name.

A supervised task has the features `inputs` and `targets`; a task of comparisons has
`inputs`, `first`, `second` and a number `preference` = P(first preferred to second).
The texts stay beside the ids in `inputs_pretokenized` and so on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.data.tensorflow_setup import import_seqio, import_tensorflow
from nlhf_jax.data.vocabularies import Vocabulary
from nlhf_jax.settings import DataSettings

SUPERVISED = ("inputs", "targets")
COMPARISONS = ("inputs", "first", "second")
SPLITS = ("train", "evaluation")


def get_task(
    settings: DataSettings, vocabulary: Vocabulary, kind: Sequence[str]
) -> Any:
    """Returns the seqio task or mixture that the settings name.

    Args:
      settings: names the task and its files.
      vocabulary: a seqio vocabulary for all features.
      kind: SUPERVISED or COMPARISONS, the features that are wanted.

    Raises:
      UserError: no such task, or it has other features.
    """
    name = settings.mixture_or_task_name
    seqio = import_seqio()
    builders = _BUILDERS[tuple(kind)]
    if name in builders:
        return builders[name](settings, vocabulary)
    registered = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in registered:
        known = sorted({*builders, *registered})
        other = any(name in group for group in _BUILDERS.values())
        reason = f"has no features {', '.join(kind)}" if other else "is no task"
        raise UserError(
            f"mixture_or_task_name {name!r} {reason}; those that do are "
            f"{', '.join(known)}{nearest(name, known)}"
        )
    task = seqio.get_mixture_or_task(name)
    missing = [feature for feature in kind if feature not in task.output_features]
    if missing:
        raise UserError(f"task {name!r} has no feature {missing[0]!r}, which is needed")
    return task


def register(
    name: str,
    source: Any,
    renamed: Mapping[str, str],
    features: Sequence[str],
    vocabulary: Vocabulary,
) -> Any:
    """Adds a task to seqio's registry, in place of one of the same name.

    Args:
      name: in the registry.
      source: a seqio data source.
      renamed: feature or extra field -> field of the source.
      features: those to tokenise and end with an end-of-sequence id.
      vocabulary: of all features.
    """
    seqio, tf = import_seqio(), import_tensorflow()
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    feature = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            _rekey(renamed),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={key: feature for key in features},
    )


def _rekey(renamed: Mapping[str, str]) -> Callable[[Any], Any]:
    def rekey(dataset):
        return dataset.map(lambda row: {key: row[old] for key, old in renamed.items()})

    return rekey


def _docstrings(settings: DataSettings, vocabulary: Vocabulary) -> Any:
    from nlhf_jax.data import docstring_builder

    folder = docstring_builder.corpus_folder(
        settings.cache_dir, settings.data_dir, settings.lock_file
    )
    builder = docstring_builder.prepare(folder, settings.lock_file)
    source = import_seqio().TfdsDataSource(
        tfds_name=f"docstrings:{builder.version}", tfds_data_dir=folder, splits=SPLITS
    )
    renamed = {"inputs": "prompt", "targets": "target"}
    return register("docstrings", source, renamed, SUPERVISED, vocabulary)


_BUILDERS: dict[tuple[str, ...], dict[str, Callable[..., Any]]] = {
    SUPERVISED: {"docstrings": _docstrings},
    COMPARISONS: {},
}
