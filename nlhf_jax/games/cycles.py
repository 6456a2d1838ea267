# SPDX-License-Identifier: Apache-2.0
"""What is transitive in a game and what is a cycle: triples, Hodge split, scores.

Arrays hold B games of N actions; P[b, i, j] is the preference of i over j.
"""

import numpy as np
from jaxtyping import Float

# A margin below this is a tie: sums of group sizes carry rounding errors.
TIE = 1e-9


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


def strongest_cycles(
    preference_NN: Float[np.ndarray, "N N"], most: int
) -> list[tuple[int, int, int]]:
    """Returns the cycles i > j > k > i whose weakest margin is largest, at most `most`.

    Each is given once, from its smallest index on; docs/math.md (34).
    """
    margin_NN = np.asarray(preference_NN) - 0.5
    best: list[tuple[float, int, int, int]] = []
    for i in range(len(margin_NN)):
        # Entry [j, k] is the weakest link of i > j > k > i; i is the smallest.
        later_MM = margin_NN[i + 1 :, i + 1 :]
        won_M, lost_M = margin_NN[i, i + 1 :], margin_NN[i + 1 :, i]
        ends_MM = np.minimum(won_M[:, None], lost_M[None, :])
        weakest_MM = np.minimum(ends_MM, later_MM)
        found = np.argwhere(weakest_MM > TIE)
        strength = weakest_MM[tuple(found.T)]
        for place in np.argsort(-strength, kind="stable")[:most]:
            j, k = found[place] + i + 1
            best.append((-float(strength[place]), i, int(j), int(k)))
        best = sorted(best)[:most]
    return [(i, j, k) for _, i, j, k in best]


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
    total = (margin_BNN**2).sum()
    return float((rest_BNN**2).sum() / total) if total else 0.0


def bradley_terry_preference(
    score_BN: Float[np.ndarray, "B N"],
) -> Float[np.ndarray, "B N N"]:
    """Returns P_BT[i, j] = 1 / (1 + exp(score_j - score_i))."""
    return 0.5 * (1 + np.tanh((score_BN[:, :, None] - score_BN[:, None, :]) / 2))


def fit_bradley_terry(
    preference_BNN: Float[np.ndarray, "B N N"],
    *,
    weight_NN: Float[np.ndarray, "N N"] | None = None,
    ridge: float = 1e-6,
    max_iterations: int = 500,
) -> Float[np.ndarray, "B N"]:
    """Returns the scores that minimise each game's cross-entropy; they sum to zero.

    min over r of  sum_{i<j} w_ij CE(P[i, j], sigmoid(r_i - r_j)) + ridge/2 |r|^2. The
    ridge keeps scores finite where someone always wins. The fit depends on which
    candidates are there and how often each pair is seen, as every Bradley-Terry fit
    does unless the preferences are of that form.

    Args:
      preference_BNN: P in [0, 1].
      weight_NN: how often a pair is compared, symmetric; every pair once if not given.
        Pairs drawn from a policy have w = pi pi^T.
      ridge: >= 0; only 0 fits Bradley-Terry preferences exactly.
      max_iterations: Newton steps.

    Source: Bradley and Terry (1952), Rank analysis of incomplete block designs;
    Newton's method with bounded steps.
    """
    num_prompts, num_candidates, _ = preference_BNN.shape
    pair_NN = np.ones((num_candidates,) * 2) if weight_NN is None else weight_NN
    gauge_NN = np.full((num_candidates, num_candidates), 1.0 / num_candidates)
    fixed_1NN = (gauge_NN + ridge * np.eye(num_candidates))[None]
    score_BN = np.zeros((num_prompts, num_candidates))
    for _ in range(max_iterations):
        model_BNN = bradley_terry_preference(score_BN)
        weight_BNN = pair_NN * model_BNN * (1 - model_BNN)
        error_BNN = pair_NN * (preference_BNN - model_BNN)
        gradient_BN = error_BNN.sum(axis=2) - ridge * score_BN
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
