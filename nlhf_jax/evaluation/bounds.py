# SPDX-License-Identifier: Apache-2.0
"""Bounds of what a policy can lose, where it cannot be enumerated."""

import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError


def gain_of_the_best(
    preference_BNC: Float[np.ndarray, "B N C"],
) -> Float[np.ndarray, "B"]:
    """Returns what the best of N candidates wins against a policy, for each prompt.

        gain = 1/2 sum over halves h of  mean over z in the other half of
               P(y_best(h) > z) - 1/2
        y_best(h) = argmax_y mean over z in h of P(y > z)

    Candidates y and opponents z are independent draws from the policy. The best one is
    chosen with one half of the opponents and judged by the other, so the mean over
    prompts is an unbiased estimate of P(best of N > policy) - 1/2, and that is a lower
    bound of max over pi' of P(pi' > pi) - 1/2, half the duality gap without
    regularisation. Judged by the opponents it was chosen with, it would be none.

    Args:
      preference_BNC: P(candidate > opponent), candidates first; at least two opponents.

    Raises:
      UserError: fewer than two opponents.

    Source: own; docs/math.md (10), (56).
    """
    num_opponents = preference_BNC.shape[2]
    if num_opponents < 2:
        raise UserError(
            "num_gap_samples must be 0 or an integer of at least 2, got "
            f"{num_opponents}"
        )
    halves = np.array_split(np.arange(num_opponents), 2)
    rows = np.arange(len(preference_BNC))
    gains = []
    for chosen_with, judged_by in (halves, halves[::-1]):
        best_B = preference_BNC[:, :, chosen_with].mean(axis=2).argmax(axis=1)
        gains.append(preference_BNC[rows, best_B][:, judged_by].mean(axis=1) - 0.5)
    return np.mean(gains, axis=0)
