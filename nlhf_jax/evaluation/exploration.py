# SPDX-License-Identifier: Apache-2.0
"""Does exploring help where the best response is hardly ever said?

Three responses of one token: A beats B, and C beats both, but the reference says C once
in a hundred. As tau falls the equilibrium moves to C, while steps of mirror descent on
a policy's own samples first move to A, and C is said even less. S seeds, K records.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import check_range
from nlhf_jax.evaluation import convergence
from nlhf_jax.evaluation.laboratory import ConvergenceSettings, Game, Laboratory
from nlhf_jax.games import solutions
from nlhf_jax.models import tabular
from nlhf_jax.types import Algorithm

PREFERENCE = ((0.5, 0.8, 0.1), (0.2, 0.5, 0.1), (0.9, 0.9, 0.5))
STEP_RATIO = 0.5  # s tau: half of each step goes back to the reference
NORMAL_95 = 1.96  # standard errors of a 95 % interval


@dataclasses.dataclass(frozen=True)
class Curve:
    """The regret of one method at one tau.

    Attributes:
      method: its name here.
      tau: strength of the KL to the reference.
      steps_K: training steps done at each record.
      gaps_SK: duality gap of the policy then, by seed.
      best_S: probability of C at the end, by seed.
      best_at_tau: probability of C at the equilibrium.
    """

    method: str
    tau: float
    steps_K: Int[np.ndarray, "K"]
    gaps_SK: Float[np.ndarray, "S K"]
    best_S: Float[np.ndarray, "S"]
    best_at_tau: float

    @property
    def regret_SK(self) -> Float[np.ndarray, "S K"]:
        """Sum of the gaps over training steps so far, by seed (left sums)."""
        width_K = np.diff(self.steps_K)[None, :]
        sums_SK = np.cumsum(self.gaps_SK[:, :-1] * width_K, axis=1)
        return np.concatenate([np.zeros((len(sums_SK), 1)), sums_SK], axis=1)


def methods_at(tau: float) -> dict[str, Algorithm]:
    """Returns the standard iterative method and ENPO in its four forms."""
    common = {"tau": tau, "step_size": STEP_RATIO / tau, "num_comparators": 4}
    found = {"iterative NLHF": ALGORITHMS["iterative_nlhf"](**common)}
    for name, title in (("enpo_closed_form", "closed form"), ("enpo", "trained")):
        for sign in (1, -1):
            found[f"ENPO, {title}, sign {sign:+d}"] = ALGORITHMS[name](
                **common, sign=sign
            )
    return found


def measure(
    taus: Sequence[float],
    *,
    rarity: float,
    train_steps: int,
    num_seeds: int,
    seed: int,
) -> list[Curve]:
    """Trains every method at every tau on few samples and returns the regrets.

    Args:
      taus: strengths of the KL to the reference, > 0.
      rarity: how often the reference says the best response, in (0, 1).
      train_steps: updates of four prompts each.
      num_seeds: runs that differ in their samples only.
      seed: of the samples.

    Raises:
      UserError: an argument out of range.
    """
    check_range("rarity", rarity, 0.0, 1.0, low_open=True, high_open=True)
    for tau in taus:
        check_range("tau", tau, 0.0, low_open=True)
    game = np.array(PREFERENCE)
    reference_N = np.array([2 * (1 - rarity) / 3, (1 - rarity) / 3, rarity])
    curves = []
    for tau in taus:
        settings = ConvergenceSettings(
            tau=tau,
            step_size=STEP_RATIO / tau,
            vocab_size=3,
            length=1,
            train_steps=train_steps,
            batch_size=4,
            num_seeds=num_seeds,
            learning_rate=4.0,
        )
        lab = Laboratory(
            tabular.tabular_model(3, 1),
            tabular.table(np.log(reference_N)),
            {"rare": Game(game, np.zeros(3))},
            settings,
        )
        curves += [
            _curve(lab, name, algorithm, seed)
            for name, algorithm in methods_at(tau).items()
        ]
    return curves


def _curve(lab: Laboratory, name: str, algorithm: Algorithm, seed: int) -> Curve:
    (policies_SKN,) = convergence.train(lab, algorithm, jax.random.key(seed))
    game, reference_N = lab.games["rare"].preference_NN, lab.reference_N
    tau = lab.settings.tau
    nash_N = solutions.regularised_nash(game, reference_N, tau)
    return Curve(
        method=name,
        tau=tau,
        steps_K=np.linspace(
            0, lab.settings.train_steps, lab.settings.num_records + 1, dtype=int
        ),
        gaps_SK=np.array(
            [
                [convergence.duality_gap(game, reference_N, tau, one) for one in run]
                for run in policies_SKN
            ]
        ),
        best_S=policies_SKN[:, -1, 2],
        best_at_tau=float(nash_N[2]),
    )


def mean_and_half(values_S: Float[np.ndarray, "S"]) -> tuple[float, float]:
    """Returns the mean over seeds and half of its 95 % interval."""
    error = values_S.std(ddof=1) / np.sqrt(len(values_S))
    return float(values_S.mean()), float(NORMAL_95 * error)


def table(curves: Sequence[Curve]) -> str:
    """Returns a Markdown table: total regret, and how often C is said in the end."""
    rows = [["tau", "method", "regret", "P(C) at the end", "P(C) at the equilibrium"]]
    rows.append(["---"] * len(rows[0]))
    for curve in curves:
        regret, best = (
            "{:.3g} ± {:.2g}".format(*mean_and_half(values))
            for values in (curve.regret_SK[:, -1], curve.best_S)
        )
        rows.append(
            [f"{curve.tau:g}", curve.method, regret, best, f"{curve.best_at_tau:.3f}"]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def figure(curves: Sequence[Curve]) -> Figure:
    """Returns a panel per tau: regret against steps, with 95 % intervals over seeds."""
    by_tau: Mapping[float, list[Curve]] = {}
    for curve in curves:
        by_tau.setdefault(curve.tau, []).append(curve)
    drawn = Figure(figsize=(3.2 * len(by_tau), 3.4), layout="constrained")
    axes = drawn.subplots(1, len(by_tau), squeeze=False)[0]
    for axis, (tau, group) in zip(axes, by_tau.items(), strict=True):
        for curve in group:
            mean_K, half_K = np.transpose(
                [mean_and_half(column) for column in curve.regret_SK.T]
            )
            axis.plot(curve.steps_K, mean_K, label=curve.method)
            axis.fill_between(
                curve.steps_K, mean_K - half_K, mean_K + half_K, alpha=0.2
            )
        axis.set(title=f"tau {tau:g}", xlabel="steps", ylim=(0, None))
    axes[0].set_ylabel("regret (sum of duality gaps)")
    axes[-1].legend(fontsize="x-small", loc="upper left")
    return drawn
