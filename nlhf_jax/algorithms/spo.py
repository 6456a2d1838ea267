# SPDX-License-Identifier: Apache-2.0
"""Self-play with group win rates as rewards."""

import functools

from nlhf_jax import losses
from nlhf_jax.algorithms.policy_gradients import in_group, pairs
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.types import Algorithm, Feedback


def spo(
    *, tau: float, num_responses: int = 4, clip_range: float = CLIP_RANGE
) -> Algorithm:
    """Returns self-play where each response meets the rest of its group.

        y_1 .. y_K ~ pi,  w_i = mean over j != i of P(y_i > y_j)
        ascend  1/K sum_i grad log pi(y_i) (w_i - 1/2 - tau lr(y_i))

    The mean of w over a group is 1/2 exactly, so no baseline is to be learned. The
    expected gradient is that of `self_play`, with less variance per prompt, and so is
    the stationary point: the Nash equilibrium at tau. The paper has tau = 0, where the
    average of the iterates approaches the equilibrium and the last one may cycle.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      num_responses: K >= 2, answers to each prompt; K (K - 1) / 2 comparisons.
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau, num_responses or clip_range out of range.

    Source: Swamy et al., 2024, arXiv 2401.04056; docs/math.md (26), (48).
    """
    return in_group(
        "spo",
        num_responses,
        functools.partial(_win_rates, num_responses),
        tau=tau,
        clip_range=clip_range,
        is_rated=False,
    )


def _win_rates(num_responses: int, feedback: Feedback):
    wins = losses.group_win_rates(
        feedback.preferences, pairs(num_responses), num_responses
    )
    return tuple(win_B - 0.5 for win_B in wins)
