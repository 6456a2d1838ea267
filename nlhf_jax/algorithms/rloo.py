# SPDX-License-Identifier: Apache-2.0
"""REINFORCE leave-one-out: RLHF with the rest of the group as baseline."""

from nlhf_jax.algorithms.policy_gradients import in_group
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.types import Algorithm, Feedback


def rloo(
    *, tau: float, num_responses: int = 4, clip_range: float = CLIP_RANGE
) -> Algorithm:
    """Returns RLHF with K responses, each the others' baseline.

        y_1 .. y_K ~ pi;  ascend
        1/K sum_i grad log pi(y_i) (r_i - 1/(K-1) sum_{j != i} r_j - tau lr(y_i))

    The expected gradient is that of E[r] - tau KL(pi, mu); the fixed point is pi(y)
    proportional to mu(y) exp(r(y) / tau), not a Nash equilibrium.

    Args:
      tau: strength of the KL to the reference, in rewards per nat, >= 0.
      num_responses: K >= 2, answers to each prompt.
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau, num_responses or clip_range out of range.

    Source: Kool et al., 2019, "Buy 4 REINFORCE samples, get a baseline for free!";
    Ahmadian et al., 2024, arXiv 2402.14740; docs/math.md (29).
    """
    return leave_one_out("rloo", num_responses, tau=tau, clip_range=clip_range)


def leave_one_out(
    name: str, num_responses: int, *, tau: float, clip_range: float
) -> Algorithm:
    """Returns the policy gradient of the reward less the others' mean reward."""
    return in_group(
        name,
        num_responses,
        _over_the_others,
        tau=tau,
        clip_range=clip_range,
        is_rated=True,
    )


def _over_the_others(feedback: Feedback):
    total_B, others = sum(feedback.rewards), len(feedback.rewards) - 1
    return tuple(
        reward_B - (total_B - reward_B) / others for reward_B in feedback.rewards
    )
