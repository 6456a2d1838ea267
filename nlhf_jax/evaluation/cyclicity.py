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
from nlhf_jax.games.cycles import (
    TIE,
    bradley_terry_preference,
    count_triples,
    cyclic_energy_share,
    fit_bradley_terry,
)


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
