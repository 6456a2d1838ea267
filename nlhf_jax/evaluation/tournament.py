# SPDX-License-Identifier: Apache-2.0
"""Every policy against every other: win rates with intervals, and the game they form.

Notation: N policies, B prompts, E unordered pairs of policies, R bootstrap resamples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError, check_choice, check_integer, check_range
from nlhf_jax.games.solutions import regularised_nash


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class WinRates:
    """How often each policy is preferred to each other one.

    Entry [i, j] is about policy i against policy j; [j, i] is its mirror image, and the
    diagonal is 1/2.

    Attributes:
      names: the policies.
      mean_NN: mean preference over prompts and samples, in [0, 1].
      low_NN: lower ends of the bootstrap intervals.
      high_NN: upper ends.
      per_prompt_NNB: preference at each prompt, mean over samples.
      confidence: coverage the intervals aim at, each by itself.
    """

    names: tuple[str, ...]
    mean_NN: Float[np.ndarray, "N N"]
    low_NN: Float[np.ndarray, "N N"]
    high_NN: Float[np.ndarray, "N N"]
    per_prompt_NNB: Float[np.ndarray, "N N B"]
    confidence: float

    @property
    def num_prompts(self) -> int:
        """Prompts the means are over."""
        return self.per_prompt_NNB.shape[2]

    def interval(self, name: str, opponent: str) -> Interval:
        """Returns the win rate of `name` over `opponent` and its interval.

        Raises:
          UserError: a name is not in the tournament.
        """
        i, j = (
            self.names.index(check_choice("policy", policy, self.names))
            for policy in (name, opponent)
        )
        ends = (self.mean_NN[i, j], self.low_NN[i, j], self.high_NN[i, j])
        return Interval(*map(float, ends))


def win_rates(
    samples: Mapping[str, Sequence[Any]],
    preference: Callable[[Any, Any], Any],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRates:
    """Plays every policy against every other on the same prompts.

    Each unordered pair is judged once and mirrored, so P[i, j] + P[j, i] = 1 exactly.
    Where policies have several draws, every draw of the one meets every draw of the
    other, and a prompt counts with the mean.

    The intervals are percentiles of means over prompts drawn with replacement, the same
    prompts for all pairs. They speak of other prompts (and other samples) for these
    very policies; how another training seed would do, they cannot say.

    Args:
      samples: policy name -> draws; a draw holds one response per prompt, in whatever
        form `preference` takes: a list of texts, or arrays of tokens.
      preference: (draw of one policy, draw of another) -> P(first > second) in [0, 1]
        for each prompt, [B]. It is asked in one order only and has to be antisymmetric.
      num_resamples: bootstrap resamples R.
      confidence: coverage of an interval, in (0, 1).
      seed: of the resampling.

    Raises:
      UserError: fewer than two policies, one without draws, or a bad setting.

    Source: Efron (1979), Bootstrap methods; percentile intervals.
    """
    _check_samples(samples)
    check_integer("num_resamples", num_resamples, 1)
    check_range("confidence", confidence, 0.0, 1.0, low_open=True, high_open=True)
    names = tuple(samples)
    size = len(names)
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    per_prompt_EB = np.stack(
        [_meet(samples[names[i]], samples[names[j]], preference) for i, j in pairs]
    )
    low_E, high_E = bootstrap_interval(
        per_prompt_EB,
        num_resamples=num_resamples,
        confidence=confidence,
        rng=np.random.default_rng(seed),
    )
    per_prompt_NNB = np.full((size, size, per_prompt_EB.shape[1]), 0.5)
    low_NN, high_NN = np.full((2, size, size), 0.5)
    for pair, (i, j) in enumerate(pairs):
        per_prompt_NNB[i, j] = per_prompt_EB[pair]
        per_prompt_NNB[j, i] = 1 - per_prompt_EB[pair]
        low_NN[i, j], high_NN[i, j] = low_E[pair], high_E[pair]
        low_NN[j, i], high_NN[j, i] = 1 - high_E[pair], 1 - low_E[pair]
    return WinRates(
        names, _mirrored(per_prompt_NNB), low_NN, high_NN, per_prompt_NNB, confidence
    )


def _check_samples(samples: Mapping[str, Sequence[Any]]) -> None:
    if len(samples) < 2:
        raise UserError(
            f"a tournament needs at least two policies, got {list(samples)}"
        )
    for name, draws in samples.items():
        if len(draws) < 1:
            raise UserError(f"policy {name!r} has no samples")


def _meet(firsts: Sequence[Any], seconds: Sequence[Any], preference) -> np.ndarray:
    """Returns the preference per prompt, mean over all pairs of draws."""
    answers = [
        np.asarray(preference(first, second), np.float64)
        for first in firsts
        for second in seconds
    ]
    for answer in answers:
        assert answer.ndim == 1 and answer.size, f"shape {answer.shape}, not [B]"
        assert ((answer >= 0) & (answer <= 1)).all(), "a preference is not in [0, 1]"
    return np.mean(answers, axis=0)


def _mirrored(per_prompt_NNB: np.ndarray) -> np.ndarray:
    """Returns means whose mirror images sum to one without rounding error."""
    upper_NN = np.triu(per_prompt_NNB.mean(axis=2), 1)
    lower_NN = np.tril(1 - upper_NN.T, -1)
    return upper_NN + lower_NN + 0.5 * np.eye(len(upper_NN))


def bootstrap_interval(
    values_EB: Float[np.ndarray, "E B"],
    *,
    num_resamples: int,
    confidence: float,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "E"], Float[np.ndarray, "E"]]:
    """Returns the ends of percentile intervals of the means over B, paired over E."""
    num_prompts = values_EB.shape[1]
    uniform_B = np.full(num_prompts, 1 / num_prompts)
    counts_RB = rng.multinomial(num_prompts, uniform_B, size=num_resamples)
    means_RE = counts_RB @ values_EB.T / num_prompts
    tail = (1 - confidence) / 2
    low_E, high_E = np.quantile(means_RE, [tail, 1 - tail], axis=0)
    return low_E, high_E


def beats(rates: WinRates, name: str, opponent: str) -> bool:
    """Returns whether the whole interval of `name` over `opponent` lies above 1/2."""
    return rates.interval(name, opponent).low > 0.5


def mean_win_rates(rates: WinRates) -> dict[str, float]:
    """Returns each policy's mean win rate over all others."""
    size = len(rates.names)
    totals_N = rates.mean_NN.sum(axis=1) - 0.5
    return dict(zip(rates.names, (totals_N / (size - 1)).tolist(), strict=True))


def nash_average(rates: WinRates, *, tau: float = 1e-3) -> dict[str, float]:
    """Returns each policy's weight in the equilibrium of the game between policies.

    The game's payoff is the mean win rate. No mixture of the policies beats the
    equilibrium by more than tau log N; among equilibria it is close to the one of
    largest entropy, so policies that tie share their weight. Weights sum to one.

        w = softmax(P w / tau)

    Args:
      rates: the tournament.
      tau: strength of the entropy, in units of win rate, > 0.

    Raises:
      UserError: tau is not positive.

    Source: Balduzzi et al. (2018), Re-evaluating evaluation, arXiv 1806.02643.
    """
    uniform_N = np.full(len(rates.names), 1 / len(rates.names))
    weight_N = regularised_nash(rates.mean_NN, uniform_N, tau)
    return dict(zip(rates.names, weight_N.tolist(), strict=True))
