# SPDX-License-Identifier: Apache-2.0
"""A population of raters of summaries: each consistent, together perhaps not.

Every group of raters scores a summary by one criterion and prefers the higher score,
so each group is transitive. The population prefers what the larger weight of groups
prefers, and three groups suffice for a cycle: the paper's examples of three types of
people, and of transitive individuals with a cyclic average (Munos et al., 2024, arXiv
2312.00886, Section 3.2 and Appendix C.2). Whether it is cyclic on given summaries is
an empirical question, answered by `nlhf_jax.evaluation.cyclicity`.

The raters are programs, not people. Texts go in, host numbers come out; nothing here
is traced by jax.

Notation: K groups (criteria); B comparisons.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError, check_choice, check_integer, check_range

MIN_WORDS = 3

_STOP_WORDS = """
a an and are as at be been but by can do does for from given has have if in into is it
its may not of on or so such than that the their them then these this those to used
using via was we were when where which will with you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

Texts = Sequence[str]
Criterion = Callable[[str, str, str], float]


def stem(word: str) -> str:
    """Returns `word` without the commonest English endings.

    parses, parsed, parsing, parse -> pars; copies, copied -> copy; calls, called ->
    cal. Stems are compared with stems only, so they need not be words.
    """
    if word.endswith(("ies", "ied")) and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    if word.endswith("e") and len(word) > 3:
        word = word[:-1]
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word


@functools.lru_cache(maxsize=65536)
def content_words(text: str) -> frozenset[str]:
    """Returns the stems of the words that carry content: no stop words, no repeats.

    A word is a run of letters and digits; `snake_case`, `dotted.names` and `CamelCase`
    are several words.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    words = re.findall(r"[^\W_]+", spaced.lower())
    return frozenset(stem(word) for word in words if word not in STOP_WORDS)


def _share_found(wanted: frozenset[str], where: frozenset[str]) -> float:
    return len(wanted & where) / len(wanted) if wanted else 0.0


def coverage(document: str, reference: str, summary: str) -> float:
    """Returns the share of the reference's content words that the summary has.

    In [0, 1]; 0 for an empty summary, and for every summary if the reference has no
    content words (then this group is indifferent).
    """
    del document
    return _share_found(content_words(reference), content_words(summary))


def faithfulness(document: str, reference: str, summary: str) -> float:
    """Returns the share of the summary's content words that the document has.

    In [0, 1]; 0 for a summary without content words: nothing it says is supported. It
    looks at words, not at meaning.
    """
    del reference
    return _share_found(content_words(summary), content_words(document))


def brevity(document: str, reference: str, summary: str) -> float:
    """Returns 3 / (number of words), and 0 for fewer than three words.

    In [0, 1]: the fewer words the better as long as there are three, 1 for exactly
    three. Words are separated by white space.
    """
    del document, reference
    num_words = len(summary.split())
    return MIN_WORDS / num_words if num_words >= MIN_WORDS else 0.0


CRITERIA: dict[str, Criterion] = {
    "coverage": coverage,
    "faithfulness": faithfulness,
    "brevity": brevity,
}


# Three words copied from the document are as faithful and as brief as can be, so equal
# groups leave them unbeaten: another faithful summary gets 1/3 + 1/2 * 1/3 = 1/2. With
# more who want coverage than who want brevity it loses, and cycles become common.
DEFAULT_WEIGHTS = {"coverage": 0.4, "faithfulness": 0.3, "brevity": 0.3}


@dataclasses.dataclass(frozen=True)
class RaterPopulation:
    """Groups of raters and how large they are.

    Each group prefers the summary its criterion scores higher; equal scores are a tie
    that counts one half. The population's preference is

        P(y > y' | x) = sum_k w_k * (1 if s_k(y) > s_k(y'), 1/2 if equal, else 0)

    with weights w scaled to sum to one. Every score is in [0, 1] and an empty summary
    has the lowest score, 0, under every criterion: it never beats anything.

    Attributes:
      weights: criterion name -> size of its group, >= 0, in any unit. The default is a
        population in which a short copy of the document is not beyond defeat.

    Raises:
      UserError: an unknown criterion, a negative weight, or no positive weight.
    """

    weights: Mapping[str, float] = dataclasses.field(
        default_factory=DEFAULT_WEIGHTS.copy
    )

    def __post_init__(self):
        for name, weight in self.weights.items():
            check_choice("criterion", name, CRITERIA)
            check_range(f"weight of {name!r}", weight, 0.0, high_open=True)
        if not sum(self.weights.values()) > 0:
            raise UserError(
                "weights must have a positive sum, got "
                f"{dict(self.weights)!r}; criteria: {', '.join(sorted(CRITERIA))}"
            )

    @property
    def shares_K(self) -> Float[np.ndarray, "K"]:
        """The groups' shares of the population; they sum to one."""
        weights_K = np.asarray(list(self.weights.values()), np.float64)
        return weights_K / weights_K.sum()

    def scores(
        self, documents: Texts, references: Texts, summaries: Texts
    ) -> dict[str, Float[np.ndarray, "B"]]:
        """Returns criterion name -> score in [0, 1] of each summary."""
        rows = list(zip(documents, references, summaries, strict=True))
        return {
            name: np.asarray([CRITERIA[name](*row) for row in rows], np.float64)
            for name in self.weights
        }

    def verdicts(
        self, documents: Texts, references: Texts, firsts: Texts, seconds: Texts
    ) -> Float[np.ndarray, "K B"]:
        """Returns each group's verdict: 1 for the first, -1 for the second, 0 a tie."""
        first = self.scores(documents, references, firsts)
        second = self.scores(documents, references, seconds)
        return np.stack([np.sign(first[name] - second[name]) for name in self.weights])

    def preference(
        self, documents: Texts, references: Texts, firsts: Texts, seconds: Texts
    ) -> Float[np.ndarray, "B"]:
        """Returns P(first > second) in [0, 1], float64.

        P(y, y') + P(y', y) is 1 without rounding error, for any weights: margins of
        swapped texts are negatives of each other, and 1/2 + x and 1/2 - x, each
        rounded, sum to one in binary floating point.
        """
        verdict_KB = self.verdicts(documents, references, firsts, seconds)
        margin_B = np.clip(self.shares_K @ verdict_KB, -1.0, 1.0)
        return 0.5 + 0.5 * margin_B

    def votes(
        self,
        rng: np.random.Generator,
        documents: Texts,
        references: Texts,
        firsts: Texts,
        seconds: Texts,
        *,
        num_votes: int,
    ) -> Float[np.ndarray, "B"]:
        """Returns the share of `num_votes` sampled raters who vote for the first.

        A rater is drawn by group size, independently for each vote, and says what its
        group prefers; a tie is decided by a fair coin. The mean of a vote is
        `preference`; its variance is P(1 - P), ties included.

        Raises:
          UserError: `num_votes` is not a positive integer.
        """
        check_integer("num_votes", num_votes, 1)
        verdict_KB = self.verdicts(documents, references, firsts, seconds)
        shape = (verdict_KB.shape[1], num_votes)
        group = rng.choice(len(self.shares_K), size=shape, p=self.shares_K)
        coin = rng.choice([-1.0, 1.0], size=shape)
        verdict = verdict_KB[group, np.arange(shape[0])[:, None]]
        return np.mean(np.where(verdict == 0, coin, verdict) > 0, axis=1)
