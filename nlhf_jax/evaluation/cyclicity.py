# SPDX-License-Identifier: Apache-2.0
"""How cyclic a judge is on given candidates, and what a scalar reward cannot say.

For each prompt there is an N x N matrix P with P[i, j] the preference of candidate i
over candidate j. The figures describe that judge on those candidates and nothing
else: another set of candidates can have more cycles, or none.

Notation: B prompts, N candidates of a prompt.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError

# A margin below this is a tie: sums of group sizes carry rounding errors.
TIE = 1e-9


@dataclasses.dataclass(frozen=True)
class Cyclicity:
    """How cyclic a judge is on a set of prompts with N candidates each.

    Attributes:
      num_prompts: prompts B.
      num_candidates: candidates N of a prompt.
      num_triples: B * N * (N-1) * (N-2) / 6 triples of candidates of one prompt.
      num_strict_triples: those in which no pair is a tie.
      num_cyclic_triples: strict triples with y1 > y2 > y3 > y1 by majority.
      cyclic_share: num_cyclic_triples / num_triples; 0 without triples.
      cyclic_prompt_share: prompts with at least one cyclic triple.
      no_winner_share: prompts where every candidate loses to another by majority.
      cyclic_energy_share: share of the squared margins (P - 1/2)^2 that no difference
        of candidate scores explains (Hodge split), in [0, 1].
      bradley_terry_error: mean over pairs of |P - P_BT|, with P_BT the best-fitting
        Bradley-Terry model of each prompt, a reward of its own for every candidate.
      bradley_terry_wrong_share: pairs without a tie whose majority that model reverses
        or calls a tie.
    """

    num_prompts: int
    num_candidates: int
    num_triples: int
    num_strict_triples: int
    num_cyclic_triples: int
    cyclic_share: float
    cyclic_prompt_share: float
    no_winner_share: float
    cyclic_energy_share: float
    bradley_terry_error: float
    bradley_terry_wrong_share: float


def measure(preference_BNN: Float[np.ndarray, "B N N"]) -> Cyclicity:
    """Returns how cyclic the preferences are.

    Args:
      preference_BNN: P[b, i, j] in [0, 1] with P[b, j, i] = 1 - P[b, i, j].

    Raises:
      UserError: a matrix is not in [0, 1] or not antisymmetric, or there are fewer
        than two candidates.
    """
    preference_BNN = np.asarray(preference_BNN, np.float64)
    _check(preference_BNN)
    num_prompts, num_candidates, _ = preference_BNN.shape
    strict_B, cyclic_B = count_triples(preference_BNN)
    num_triples = num_prompts * math.comb(num_candidates, 3)
    beats_BNN = preference_BNN > 0.5 + TIE
    model_BNN = bradley_terry_preference(fit_bradley_terry(preference_BNN))
    upper = np.triu_indices(num_candidates, 1)
    margin_BE = (preference_BNN - 0.5)[:, *upper]
    model_margin_BE = (model_BNN - 0.5)[:, *upper]
    strict_BE = np.abs(margin_BE) > TIE
    wrong_BE = strict_BE & (margin_BE * np.sign(np.round(model_margin_BE, 9)) <= 0)
    return Cyclicity(
        num_prompts=num_prompts,
        num_candidates=num_candidates,
        num_triples=num_triples,
        num_strict_triples=int(strict_B.sum()),
        num_cyclic_triples=int(cyclic_B.sum()),
        cyclic_share=_share(cyclic_B.sum(), num_triples),
        cyclic_prompt_share=float(np.mean(cyclic_B > 0)),
        no_winner_share=float(beats_BNN.any(axis=1).all(axis=1).mean()),
        cyclic_energy_share=cyclic_energy_share(preference_BNN),
        bradley_terry_error=float(np.mean(np.abs(margin_BE - model_margin_BE))),
        bradley_terry_wrong_share=_share(wrong_BE.sum(), strict_BE.sum()),
    )


def _share(part, whole) -> float:
    return float(part / whole) if whole else 0.0


def _check(preference_BNN: np.ndarray) -> None:
    if preference_BNN.shape[0] < 1 or preference_BNN.shape[1] < 2:
        raise UserError(
            "cyclicity needs at least one prompt with two candidates, got matrices of "
            f"shape {preference_BNN.shape}"
        )
    # Written so that NaN is an error as well.
    if not (preference_BNN.min() >= 0 and preference_BNN.max() <= 1):
        raise UserError("preferences must be in [0, 1]")
    gap = np.abs(preference_BNN + preference_BNN.swapaxes(1, 2) - 1).max()
    if gap > 1e-6:
        raise UserError(f"P[i, j] + P[j, i] must be 1, got a difference of {gap:.3g}")


def count_triples(preference_BNN: Float[np.ndarray, "B N N"]):
    """Returns per prompt the triples without a tie, and those that form a cycle.

    With W[i, j] = 1 where i beats j, the trace of W^3 counts each cycle three times;
    with S = W + W^T it counts each tie-free triple six times.
    """
    wins_BNN = (preference_BNN > 0.5 + TIE).astype(np.int64)
    strict_BNN = wins_BNN + wins_BNN.swapaxes(1, 2)
    return _closed_walks(strict_BNN) // 6, _closed_walks(wins_BNN) // 3


def _closed_walks(edges_BNN: np.ndarray) -> np.ndarray:
    return np.trace(edges_BNN @ edges_BNN @ edges_BNN, axis1=1, axis2=2)


def cyclic_energy_share(preference_BNN: Float[np.ndarray, "B N N"]) -> float:
    """Returns the part of the margins that is no difference of scores.

    On a complete graph the best scores are row means, r_i = mean_j (P[i, j] - 1/2), and
    what is left of P - 1/2 after r_i - r_j is orthogonal to every such difference. The
    result is |rest|^2 / |P - 1/2|^2 over all prompts: 0 for linear utilities, 1 for
    rock-paper-scissors; 0 if every pair is a tie.

    Source: Jiang, Lim, Yao, Ye (2011), Statistical ranking and combinatorial Hodge
    theory, arXiv 0811.1067.
    """
    margin_BNN = preference_BNN - 0.5
    score_BN = margin_BNN.mean(axis=2)
    rest_BNN = margin_BNN - (score_BN[:, :, None] - score_BN[:, None, :])
    return _share((rest_BNN**2).sum(), (margin_BNN**2).sum())


def bradley_terry_preference(
    score_BN: Float[np.ndarray, "B N"],
) -> Float[np.ndarray, "B N N"]:
    """Returns P_BT[i, j] = 1 / (1 + exp(score_j - score_i))."""
    return 0.5 * (1 + np.tanh((score_BN[:, :, None] - score_BN[:, None, :]) / 2))


def fit_bradley_terry(
    preference_BNN: Float[np.ndarray, "B N N"],
    *,
    ridge: float = 1e-6,
    max_iterations: int = 500,
) -> Float[np.ndarray, "B N"]:
    """Returns the scores that minimise each prompt's cross-entropy; they sum to zero.

    min over r of  sum_{i<j} CE(P[i, j], sigmoid(r_i - r_j)) + ridge/2 |r|^2, every pair
    counting once. The ridge keeps scores finite where someone always wins; the fit
    depends on which candidates are there, as every Bradley-Terry fit does unless the
    preferences are of that form.

    Source: Bradley and Terry (1952), Rank analysis of incomplete block designs;
    Newton's method with bounded steps.
    """
    num_prompts, num_candidates, _ = preference_BNN.shape
    gauge_NN = np.full((num_candidates, num_candidates), 1.0 / num_candidates)
    fixed_1NN = (gauge_NN + ridge * np.eye(num_candidates))[None]
    score_BN = np.zeros((num_prompts, num_candidates))
    for _ in range(max_iterations):
        model_BNN = bradley_terry_preference(score_BN)
        weight_BNN = model_BNN * (1 - model_BNN)
        gradient_BN = (preference_BNN - model_BNN).sum(axis=2) - ridge * score_BN
        degree_BN = weight_BNN.sum(axis=2)
        hessian_BNN = fixed_1NN - weight_BNN
        hessian_BNN += degree_BN[:, :, None] * np.eye(num_candidates)[None]
        step_BN = np.linalg.solve(hessian_BNN, gradient_BN[:, :, None])[:, :, 0]
        # A full step overshoots where the model is saturated.
        largest_B = np.maximum(np.abs(step_BN).max(axis=1), 1.0)
        score_BN = score_BN + step_BN / largest_B[:, None]
        if np.abs(step_BN).max() < 1e-12:
            break
    return score_BN - score_BN.mean(axis=1, keepdims=True)
