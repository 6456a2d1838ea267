# SPDX-License-Identifier: Apache-2.0
"""What summaries look like, without asking whether anyone prefers them.

The figures describe one policy's summaries; a policy can raise ROUGE or shorten its
texts and still lose every comparison.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np

from nlhf_jax.checks import UserError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True)
class SummaryStatistics:
    """Means over one policy's summaries.

    Attributes:
      num_summaries: how many.
      num_distinct: how many different texts among them.
      words: mean number of words, separated by white space.
      ended_share: share that stopped by themselves, before the length limit; NaN where
        that is not known.
      copied_share: mean share of a summary's word pairs that the document has in the
        same order; summaries of fewer than two words are left out, NaN if none is left.
      rouge1: mean ROUGE-1 F-measure against the person-written text, in [0, 1].
      rouge2: the same for ROUGE-2.
      rougeL: the same for ROUGE-L.
    """

    num_summaries: int
    num_distinct: int
    words: float
    ended_share: float
    copied_share: float
    rouge1: float
    rouge2: float
    rougeL: float


@functools.cache
def _scorer():
    from rouge_score import rouge_scorer  # imports nltk, a second

    return rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=False)


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns mean F-measures {"rouge1", "rouge2", "rougeL"} in [0, 1].

    Words are lowercase runs of letters and digits, without stemming, as in T5's
    evaluation. An empty text scores 0.

    Raises:
      UserError: no texts, or another number of references.

    Source: Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    _check_lengths(texts, references)
    rows = [
        _scorer().score(reference, text)
        for text, reference in zip(texts, references, strict=True)
    ]
    return {
        name: float(np.mean([row[name].fmeasure for row in rows]))
        for name in ROUGE_TYPES
    }


def _check_lengths(texts: Sequence[str], others: Sequence[str]) -> None:
    if not texts or len(texts) != len(others):
        raise UserError(
            "texts must be one per reference and at least one, got "
            f"{len(texts)} texts and {len(others)} references"
        )


def _word_pairs(text: str) -> list[tuple[str, str]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return list(itertools.pairwise(words))


def copied_share(document: str, summary: str) -> float:
    """Returns the share of the summary's word pairs that stand in the document.

    NaN for a summary of fewer than two words.
    """
    pairs = _word_pairs(summary)
    where = set(_word_pairs(document))
    return float(np.mean([pair in where for pair in pairs])) if pairs else float("nan")


def describe(
    documents: Sequence[str],
    references: Sequence[str],
    texts: Sequence[str],
    ended: Sequence[bool] | None = None,
) -> SummaryStatistics:
    """Returns the statistics of one policy's summaries.

    Args:
      documents: what is summarised.
      references: the person-written summaries.
      texts: the policy's summaries.
      ended: whether each stopped by itself; None if that is not known.

    Raises:
      UserError: no texts, or another number of references.
    """
    scores = rouge(texts, references)
    shares = [
        copied_share(document, text)
        for document, text in zip(documents, texts, strict=True)
    ]
    known = [share for share in shares if share == share]
    return SummaryStatistics(
        num_summaries=len(texts),
        num_distinct=len(set(texts)),
        words=float(np.mean([len(text.split()) for text in texts])),
        ended_share=float("nan") if ended is None else float(np.mean(list(ended))),
        copied_share=float(np.mean(known)) if known else float("nan"),
        **scores,
    )
