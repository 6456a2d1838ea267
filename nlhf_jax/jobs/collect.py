# SPDX-License-Identifier: Apache-2.0
"""Pairwise feedback: candidate responses, and votes of a population of raters."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

import jax
import numpy as np

from nlhf_jax.checks import UserError, check_integer
from nlhf_jax.data import batches as data_batches
from nlhf_jax.evaluation import cyclicity
from nlhf_jax.jobs import folders, generation, runs
from nlhf_jax.jobs.policies import Policy, load_policy
from nlhf_jax.preferences.raters import RaterPopulation
from nlhf_jax.progress import Progress
from nlhf_jax.settings import DataSettings, SamplingSettings
from nlhf_jax.types import POLICY

_SIGNATURE = re.compile(r"^[\w.]+\([^()]*\):\s")
FILES = {"train": "train.jsonl", "evaluation": "evaluation.jsonl"}


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Candidate responses to each of P prompts.

    Attributes:
      prompts: prompt texts.
      references: the person-written target of each prompt.
      texts: P lists of candidates, one per source, in the order of `sources`.
      sources: where the candidates come from.
    """

    prompts: list[str]
    references: list[str]
    texts: list[list[str]]
    sources: tuple[str, ...]


def collect(
    *,
    model_dir: str,
    policy_checkpoint: str,
    data: DataSettings,
    raters: RaterPopulation,
    temperatures: Sequence[float] = (0.5, 1.0),
    num_prompts: int = 1000,
    num_eval_prompts: int = 128,
    pairs_per_prompt: int = 4,
    votes_per_pair: int = 1,
    leading_words: Sequence[int] = (2, 8),
    max_decode_length: int = 0,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Writes comparisons of candidate responses, labelled by sampled votes.

    The candidates are the policy's samples at several temperatures, the person-written
    target, and leading words of the document, few and many. Only sampled votes are
    written, never the raters' scores.

    Args:
      model_dir: folder for `train.jsonl`, `evaluation.jsonl` and `cyclicity.json`.
      policy_checkpoint: model folder of the policy that proposes candidates.
      data: the task whose prompts are answered.
      raters: the population that votes.
      temperatures: one candidate is sampled at each.
      num_prompts: prompts of the train split.
      num_eval_prompts: prompts of the evaluation split.
      pairs_per_prompt: pairs of candidates shown to raters, drawn without repeats.
      votes_per_pair: raters asked about a pair; preference = their share for the first.
      leading_words: for each number a candidate of as many words. One that is too
        short shows the judges that shorter is not always better.
      max_decode_length: tokens of an answer at most; 0 takes the length of the policy's
        training.
      batch_size: prompts decoded at once.
      seed: of sampling, pairing and voting.

    Raises:
      UserError: the checkpoint, the data or the folder is unusable.
    """
    for name, value in (
        ("num_prompts", num_prompts),
        ("num_eval_prompts", num_eval_prompts),
        ("pairs_per_prompt", pairs_per_prompt),
        ("votes_per_pair", votes_per_pair),
        ("batch_size", batch_size),
        *(("leading_words", count) for count in leading_words),
    ):
        check_integer(name, value, 1)
    check_integer("max_decode_length", max_decode_length, 0)
    policy = load_policy(policy_checkpoint)
    folder = runs.open_folder(model_dir)
    if all((folder / name).exists() for name in (*FILES.values(), "cyclicity.json")):
        return
    sizes = {"train": num_prompts, "evaluation": num_eval_prompts}
    rng = np.random.default_rng(seed)
    for split, name in FILES.items():
        texts = data_batches.load_supervised(data, split, policy.vocabulary)
        found = propose(
            policy,
            texts,
            num_prompts=sizes[split],
            temperatures=temperatures,
            leading_words=leading_words,
            batch_size=batch_size,
            seed=seed,
            max_decode_length=max_decode_length,
        )
        comparisons = vote(found, raters, rng, pairs_per_prompt, votes_per_pair)
        write_lines(folder / name, comparisons)
    # The held-out candidates also say how cyclic the population is on this data.
    write_lines(folder / "cyclicity.json", [cycles_of(found, raters)])


def comparison_data(data: DataSettings, comparisons_dir: str) -> DataSettings:
    """Returns the settings that read what a `collect` job wrote.

    Raises:
      UserError: a file is missing.
    """
    paths = {
        split: pathlib.Path(comparisons_dir) / name for split, name in FILES.items()
    }
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"comparisons_dir has no file {str(path)!r}")
    return dataclasses.replace(
        data,
        mixture_or_task_name="jsonl",
        train_file=str(paths["train"]),
        evaluation_file=str(paths["evaluation"]),
    )


def propose(
    policy: Policy,
    data: data_batches.SupervisedData,
    *,
    num_prompts: int,
    temperatures: Sequence[float],
    leading_words: Sequence[int],
    batch_size: int,
    seed: int,
    max_decode_length: int = 0,
) -> Candidates:
    """Returns the candidates for the first `num_prompts` prompts of a seeded order."""
    num_prompts = min(num_prompts, data.num_examples)
    rows = np.random.default_rng(seed).permutation(data.num_examples)[:num_prompts]
    prompts = data.take(rows).prompts
    length = max_decode_length or policy.response_length
    columns = []
    with Progress(len(temperatures), "candidates") as bar:
        for index, temperature in enumerate(temperatures):
            speaker = generation.policy_speaker(SamplingSettings(length, temperature))
            decode = generation.Generator(
                policy.network,
                policy.vocabulary,
                speaker=speaker,
                max_decode_length=length,
                batch_size=min(batch_size, num_prompts),
            )
            key = jax.random.fold_in(jax.random.key(seed), index)
            columns.append(decode({POLICY: policy.params}, prompts, key).texts)
            bar.update(index + 1)
    documents = [data.prompt_texts[row] for row in rows]
    columns.append([data.target_texts[row] for row in rows])
    references = columns[-1]
    sources = [*(f"temperature {t:g}" for t in temperatures), "reference"]
    for count in leading_words:
        columns.append([leading(text, count) for text in documents])
        sources.append(f"leading {count}")
    texts = [list(candidates) for candidates in zip(*columns, strict=True)]
    return Candidates(documents, references, texts, tuple(sources))


def leading(document: str, num_words: int) -> str:
    """Returns the first words of the document's body.

    The body is what follows the first line, or `name(parameters): ` at the start.
    """
    body = document.split("\n", 1)[-1]
    return " ".join(_SIGNATURE.sub("", body).split()[:num_words])


def vote(
    candidates: Candidates,
    raters: RaterPopulation,
    rng: np.random.Generator,
    pairs_per_prompt: int,
    votes_per_pair: int,
) -> list[dict]:
    """Returns comparisons with `preference` = share of sampled votes for the first.

    Pairs with an empty or twice the same response are left out: nobody can be asked.
    """
    shown = []
    for row, texts in enumerate(candidates.texts):
        distinct = sorted({text for text in texts if text.strip()})
        pairs = [(a, b) for a in distinct for b in distinct if a < b]
        for index in rng.permutation(len(pairs))[:pairs_per_prompt]:
            first, second = rng.permutation(pairs[index]).tolist()
            shown.append((row, first, second))
    if not shown:
        raise UserError("no prompt has two different candidates to compare")
    rows, firsts, seconds = zip(*shown, strict=True)
    share = raters.votes(
        rng,
        [candidates.prompts[row] for row in rows],
        [candidates.references[row] for row in rows],
        list(firsts),
        list(seconds),
        num_votes=votes_per_pair,
    )
    return [
        {
            "prompt": candidates.prompts[row],
            "response_a": first,
            "response_b": second,
            "preference": float(preference),
        }
        for (row, first, second), preference in zip(shown, share, strict=True)
    ]


def cycles_of(candidates: Candidates, raters: RaterPopulation) -> dict:
    """Returns how cyclic the population is over each prompt's candidates."""
    num_candidates = len(candidates.sources)
    matrices = np.full((len(candidates.texts), num_candidates, num_candidates), 0.5)
    for i in range(num_candidates):
        for j in range(i + 1, num_candidates):
            firsts, seconds = ([row[k] for row in candidates.texts] for k in (i, j))
            p = raters.preference(
                candidates.prompts, candidates.references, firsts, seconds
            )
            matrices[:, i, j], matrices[:, j, i] = p, 1.0 - np.asarray(p)
    return dataclasses.asdict(cyclicity.measure(matrices))


def write_lines(path: pathlib.Path, records: Sequence[dict]) -> None:
    """Writes JSON lines; the file appears whole or not at all."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    folders.write_atomically(path, text)
