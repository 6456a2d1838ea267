# SPDX-License-Identifier: Apache-2.0
"""Examples in host memory, and batches that are a pure function of (seed, step).

A split is tokenised once. Epoch e of a seed is a permutation drawn from (seed, e), so
a resumed run reads the same batches and there is no iterator to save; of several
processes each takes its own rows of a batch. The letter E counts the examples of a
split, R the rows that are taken. All arrays are numpy's.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from nlhf_jax import distributed
from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.data import jsonl, tasks, token_checks
from nlhf_jax.data.length_buckets import bucket, first_columns
from nlhf_jax.data.order import example_order, swaps
from nlhf_jax.data.prompts import PromptFormat, prompt_format
from nlhf_jax.data.vocabularies import Vocabulary, decode, encode
from nlhf_jax.settings import DataSettings
from nlhf_jax.types import ComparisonBatch, PromptBatch, Responses, SupervisedBatch

PAD_ID = 0
Rows = Int[np.ndarray, "R"]


# -------------------------------------------------------------------------- padding


def pad_prompts(
    rows: Iterable[Sequence[int] | np.ndarray],
    length: int,
    num_after: int = 1,
    pad_id: int = PAD_ID,
) -> tuple[PromptBatch, int]:
    """Returns (prompts, number cut): a cut prompt keeps its last `num_after` ids.

    Args:
      rows: ids of whole prompts.
      length: S, at least 1.
      num_after: ids that stand after each prompt's text: its end, or the beginning of
        the answer that a chat template writes.
      pad_id: fills the padding; the mask alone says what is padding.
    """
    rows = [np.asarray(row, np.int32) for row in rows]
    tokens_BS, mask_BS, cut_B = _pad(rows, length, pad_id)
    kept = min(num_after, length)
    for number in np.flatnonzero(cut_B) if kept else ():
        tokens_BS[number, -kept:] = rows[number][-kept:]
    return PromptBatch(tokens_BS, mask_BS), int(cut_B.sum())


def pad_responses(
    rows: Iterable[Sequence[int] | np.ndarray], length: int, pad_id: int = PAD_ID
) -> tuple[Responses, int]:
    """Returns (responses, number cut): a cut response has no end-of-sequence id."""
    tokens_BT, mask_BT, cut_B = _pad(rows, length, pad_id)
    return Responses(tokens_BT, mask_BT), int(cut_B.sum())


def _pad(rows: Iterable[Sequence[int] | np.ndarray], length: int, pad_id: int):
    rows = [np.asarray(row, np.int32) for row in rows]
    tokens_BT = np.full((len(rows), length), pad_id, np.int32)
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row)] = row[:length]
    lengths_B = np.array([len(row) for row in rows], np.int32)
    mask_BT = np.arange(length)[None, :] < lengths_B[:, None]
    return tokens_BT, mask_BT, lengths_B > length


def prompt_batch(
    texts: Sequence[str],
    vocabulary: Vocabulary,
    length: int,
    form: PromptFormat | None = None,
) -> tuple[PromptBatch, int]:
    """Returns (prompts of S = `length` tokens, number cut).

    Args:
      texts: of the prompts.
      vocabulary: of the model.
      length: S.
      form: what stands around each text; None for the vocabulary's own way.

    Raises:
      UserError: `length` has no room for a text.
    """
    form = form or prompt_format(vocabulary)
    form.check_length(length)
    rows = [form.encode(text) for text in texts]
    return pad_prompts(rows, length, form.num_after, vocabulary.pad_id)


def encode_responses(
    texts: Sequence[str], vocabulary: Vocabulary, length: int
) -> Responses:
    """Returns the texts as responses of T = `length` tokens that end with EOS.

    A longer text is cut and has no EOS, as a sampled response cut at the limit.
    """
    rows = [[*encode(text, vocabulary), vocabulary.eos_id] for text in texts]
    return pad_responses(rows, length, vocabulary.pad_id)[0]


def decode_responses(
    tokens_BT: Int[np.ndarray, "B T"],
    mask_BT: Bool[np.ndarray, "B T"],
    vocabulary: Vocabulary,
) -> list[str]:
    """Returns the responses' texts, without end-of-sequence and padding."""
    rows = zip(np.asarray(tokens_BT), np.asarray(mask_BT), strict=True)
    return [decode(tokens_T[mask_T], vocabulary) for tokens_T, mask_T in rows]


# --------------------------------------------------------------------------- stores


@dataclasses.dataclass(frozen=True)
class SupervisedData:
    """A split of prompts with targets.

    Attributes:
      examples: all of them, in the task's order, as one batch.
      prompt_texts: before tokenisation and cutting.
      target_texts: likewise.
      num_truncated_prompts: prompts longer than S tokens, the end token included.
      num_truncated_targets: targets longer than T tokens.
      length_buckets: as in `DataSettings`.
    """

    examples: SupervisedBatch
    prompt_texts: list[str]
    target_texts: list[str]
    num_truncated_prompts: int
    num_truncated_targets: int
    length_buckets: tuple[int, ...] = ()

    @property
    def num_examples(self) -> int:
        """Returns the number of examples, E."""
        return len(self.prompt_texts)

    def batch(
        self, seed: int, step: int, batch_size: int, rows: Rows | None = None
    ) -> SupervisedBatch:
        """Returns batch `step` of the order drawn from `seed`, or `rows` of it only.

        With `length_buckets` it is as wide as all rows of the batch need.
        """
        _, indices_B = example_order(seed, step, batch_size, self.num_examples)
        found = self.take(indices_B if rows is None else indices_B[rows])
        width = bucket(self.examples.prompts, indices_B, self.length_buckets)
        return found._replace(prompts=first_columns(found.prompts, width))

    def take(self, indices: Sequence[int] | np.ndarray) -> SupervisedBatch:
        """Returns the examples at `indices`, in that order."""
        prompts, targets = self.examples
        return SupervisedBatch(_take(prompts, indices), _take(targets, indices))


@dataclasses.dataclass(frozen=True)
class ComparisonData:
    """A split of labelled comparisons.

    Attributes:
      examples: all of them, in the task's order, as one batch.
      prompt_texts: before tokenisation and cutting.
      first_texts: likewise.
      second_texts: likewise.
      preferences: P(first preferred to second) of each example.
      num_truncated_prompts: prompts longer than S tokens, the end token included.
      num_truncated_responses: responses (of both sides) longer than T tokens.
      length_buckets: as in `DataSettings`.
    """

    examples: ComparisonBatch
    prompt_texts: list[str]
    first_texts: list[str]
    second_texts: list[str]
    preferences: list[float]
    num_truncated_prompts: int
    num_truncated_responses: int
    length_buckets: tuple[int, ...] = ()

    @property
    def num_examples(self) -> int:
        """Returns the number of examples, E."""
        return len(self.prompt_texts)

    def batch(
        self, seed: int, step: int, batch_size: int, rows: Rows | None = None
    ) -> ComparisonBatch:
        """Returns batch `step` of the order drawn from `seed`, or `rows` of it only.

        Each epoch exchanges first and second of a random half of the examples and
        writes 1 - preference, so that no model can learn from the place. With
        `length_buckets` it is as wide as all rows of the batch need.
        """
        epochs_B, indices_B = example_order(seed, step, batch_size, self.num_examples)
        width = bucket(self.examples.prompts, indices_B, self.length_buckets)
        if rows is not None:
            epochs_B, indices_B = epochs_B[rows], indices_B[rows]
        swapped = [
            swaps(seed, int(epoch), self.num_examples)[index]
            for epoch, index in zip(epochs_B, indices_B, strict=True)
        ]
        found = swap(self.take(indices_B), np.array(swapped, bool))
        return found._replace(prompts=first_columns(found.prompts, width))

    def take(self, indices: Sequence[int] | np.ndarray) -> ComparisonBatch:
        """Returns the examples at `indices`, in that order and not exchanged."""
        prompts, first, second, preference_E = self.examples
        return ComparisonBatch(
            _take(prompts, indices),
            _take(first, indices),
            _take(second, indices),
            preference_E[np.asarray(indices, np.int64)],
        )


def _take(arrays, indices):
    chosen = np.asarray(indices, np.int64)
    return type(arrays)(*(array[chosen] for array in arrays))


def swap(batch: ComparisonBatch, swapped_B: Bool[np.ndarray, "B"]) -> ComparisonBatch:
    """Returns the batch with first and second exchanged where `swapped_B` is True."""
    first, second = (
        Responses(
            *(
                np.where(swapped_B[:, None], theirs, own)
                for own, theirs in zip(side, other, strict=True)
            )
        )
        for side, other in ((batch.first, batch.second), (batch.second, batch.first))
    )
    preference_B = np.where(swapped_B, 1 - batch.preference_B, batch.preference_B)
    return ComparisonBatch(
        batch.prompts, first, second, preference_B.astype(np.float32)
    )


# -------------------------------------------------------------------------- loading


def _read_examples(
    settings: DataSettings, split: str, vocabulary: Vocabulary, kind: Sequence[str]
) -> list[dict]:
    check_choice("split", split, tasks.SPLITS)
    task = tasks.get_task(settings, vocabulary, kind)
    name = settings.mixture_or_task_name
    if split not in task.splits:
        remedy = f": set {split}_file" if name == "jsonl" else ""
        remedy += (
            ", or group_field to 'prompt'" if remedy and split == "evaluation" else ""
        )
        raise UserError(f"task {name!r} has no split {split!r}{remedy}")
    # The first process prepares what the task keeps on disk, then all read it.
    examples = distributed.first_then_others("data", lambda: _examples_of(task, split))
    if not examples:
        raise UserError(f"task {name!r} has no examples in {split!r}")
    form = tasks.format_of(settings, vocabulary)
    token_checks.check_ids(examples, kind, vocabulary, f"task {name!r}, {split}", form)
    return examples


def _examples_of(task: Any, split: str) -> list[dict]:
    # Without sequence_length seqio cuts nothing: cutting is counted here.
    dataset = task.get_dataset(
        sequence_length=None, split=split, shuffle=False, num_epochs=1
    )
    return list(dataset.as_numpy_iterator())


def _texts(examples: list[dict], feature: str, vocabulary: Vocabulary) -> list[str]:
    key = f"{feature}_pretokenized"
    if key in examples[0]:
        return [example[key].decode("utf-8") for example in examples]
    return [decode(example[feature], vocabulary) for example in examples]


def load_supervised(
    settings: DataSettings, split: str, vocabulary: Vocabulary
) -> SupervisedData:
    """Tokenises a split ("train" or "evaluation") of a supervised task.

    Raises:
      UserError: unknown task or split, or no examples.
    """
    examples = _read_examples(settings, split, vocabulary, tasks.SUPERVISED)
    form = tasks.format_of(settings, vocabulary)
    found = _supervised(examples, settings.task_feature_lengths, vocabulary, form)
    return dataclasses.replace(found, length_buckets=settings.length_buckets)


def supervised_from_rows(
    rows: Sequence[Mapping[str, Any]],
    task_feature_lengths: Mapping[str, int],
    vocabulary: Vocabulary,
) -> SupervisedData:
    """Tokenises rows of `prompt` and `target` that are in memory.

    Raises:
      UserError: a row is not as `jsonl` describes.
    """
    checked = jsonl.check_rows(rows, jsonl.PROMPT_FIELDS)
    form = prompt_format(vocabulary)
    task = tasks.rows_task("rows", {"all": checked}, tasks.SUPERVISED, vocabulary, form)
    examples = _examples_of(task, "all")
    token_checks.check_ids(examples, tasks.SUPERVISED, vocabulary, "rows", form)
    return _supervised(examples, task_feature_lengths, vocabulary, form)


def _prompts(examples, lengths, vocabulary, form) -> tuple[PromptBatch, int]:
    form.check_length(lengths["inputs"])
    rows = (row["inputs"] for row in examples)
    return pad_prompts(rows, lengths["inputs"], form.num_after, vocabulary.pad_id)


def _supervised(examples, lengths, vocabulary, form) -> SupervisedData:
    prompts, cut_prompts = _prompts(examples, lengths, vocabulary, form)
    targets, cut_targets = pad_responses(
        (row["targets"] for row in examples), lengths["targets"], vocabulary.pad_id
    )
    return SupervisedData(
        SupervisedBatch(prompts, targets),
        _texts(examples, "inputs", vocabulary),
        _texts(examples, "targets", vocabulary),
        cut_prompts,
        cut_targets,
    )


def load_comparisons(
    settings: DataSettings, split: str, vocabulary: Vocabulary
) -> ComparisonData:
    """Tokenises a split ("train" or "evaluation") of a task of comparisons.

    Raises:
      UserError: unknown task or split, or no examples.
    """
    examples = _read_examples(settings, split, vocabulary, tasks.COMPARISONS)
    form = tasks.format_of(settings, vocabulary)
    found = _comparisons(examples, settings.task_feature_lengths, vocabulary, form)
    return dataclasses.replace(found, length_buckets=settings.length_buckets)


def comparisons_from_rows(
    rows: Sequence[Mapping[str, Any]],
    task_feature_lengths: Mapping[str, int],
    vocabulary: Vocabulary,
) -> ComparisonData:
    """Tokenises comparisons that are in memory, with the fields that `jsonl` describes.

    Raises:
      UserError: a row is not as `jsonl` describes.
    """
    checked = jsonl.check_rows(rows, jsonl.COMPARISON_FIELDS)
    form = prompt_format(vocabulary)
    task = tasks.rows_task(
        "rows", {"all": checked}, tasks.COMPARISONS, vocabulary, form
    )
    examples = _examples_of(task, "all")
    token_checks.check_ids(examples, tasks.COMPARISONS, vocabulary, "rows", form)
    return _comparisons(examples, task_feature_lengths, vocabulary, form)


def _comparisons(examples, lengths, vocabulary, form) -> ComparisonData:
    prompts, cut_prompts = _prompts(examples, lengths, vocabulary, form)
    length, pad_id = lengths["targets"], vocabulary.pad_id
    (first, cut_first), (second, cut_second) = (
        pad_responses((row[side] for row in examples), length, pad_id)
        for side in ("first", "second")
    )
    preference_E = np.array([row["preference"] for row in examples], np.float32)
    return ComparisonData(
        ComparisonBatch(prompts, first, second, preference_E),
        _texts(examples, "inputs", vocabulary),
        _texts(examples, "first", vocabulary),
        _texts(examples, "second", vocabulary),
        [float(preference) for preference in preference_E],
        cut_prompts,
        cut_first + cut_second,
    )
