# SPDX-License-Identifier: Apache-2.0
"""TFDS builder of the docstring corpus, prepared once per environment."""

import json
import pathlib
from collections.abc import Callable

from nlhf_jax.checks import expanded
from nlhf_jax.data import docstrings
from nlhf_jax.data.tensorflow_setup import (
    cache_folder,
    import_tensorflow,
    import_tfds,
    progress_bar,
)

tf = import_tensorflow()
tfds = import_tfds()


class Docstrings(tfds.core.GeneratorBasedBuilder):
    """Docstring bodies with their summary lines; whole packages are held out.

    Args:
      read_corpus: returns the corpus; called when nothing is prepared yet.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, *, read_corpus: Callable[[], docstrings.Corpus] | None = None, **kwargs
    ):
        self._read_corpus = read_corpus
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("prompt", "target", "package", "name")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Docstring bodies and summary lines of installed packages.",
            features=tfds.features.FeaturesDict({name: tf.string for name in names}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        corpus = self._read_corpus() if self._read_corpus else _installed_corpus("")
        splits = docstrings.split_pairs(corpus.pairs, corpus.signatures)
        counts = pathlib.Path(self._data_dir_root, "counts.json")
        counts.parent.mkdir(parents=True, exist_ok=True)
        sizes = {split: len(pairs) for split, pairs in splits.items()}
        counts.write_text(json.dumps(corpus.counts | sizes, indent=1, sort_keys=True))
        return {
            split: self._generate_examples(pairs) for split, pairs in splits.items()
        }

    def _generate_examples(self, pairs: list[docstrings.Pair]):
        for number, pair in enumerate(pairs):
            yield (
                number,
                {
                    "prompt": pair.prompt,
                    "target": pair.summary,
                    "package": pair.package,
                    "name": pair.name,
                },
            )


def _installed_corpus(lock_file: str) -> docstrings.Corpus:
    files = docstrings.list_files(lock_file)
    return docstrings.read_corpus(files, progress_bar("Reading docstrings"))


def corpus_folder(cache_dir: str = "", data_dir: str = "", lock_file: str = "") -> str:
    """Returns the folder of the corpus: `data_dir`, or one per environment.

    The cache's folder is named by a digest of Python's and the packages' versions, so
    a changed environment gets a new corpus and the old one stays.
    """
    if data_dir:
        return str(expanded("data_dir", data_dir))
    name = f"docstrings-{docstrings.digest(lock_file)}"
    return str(cache_folder(cache_dir) / name)


def prepare(
    folder: str,
    lock_file: str = "",
    read_corpus: Callable[[], docstrings.Corpus] | None = None,
) -> Docstrings:
    """Returns the builder of the corpus in `folder`, preparing it the first time."""
    read_corpus = read_corpus or (lambda: _installed_corpus(lock_file))
    builder = Docstrings(data_dir=folder, read_corpus=read_corpus)
    if not builder.is_prepared():
        builder.download_and_prepare()
    return builder
