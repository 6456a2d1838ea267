# SPDX-License-Identifier: Apache-2.0
"""Best response: policy gradient against the reference."""

from nlhf_jax.algorithms.policy_gradients import against
from nlhf_jax.losses import CLIP_RANGE
from nlhf_jax.types import REFERENCE, Algorithm


def best_response(*, tau: float, clip_range: float = CLIP_RANGE) -> Algorithm:
    """Returns the best response to the reference, Nash-MD-PG with beta = 1.

        y ~ pi, y' ~ mu; ascend grad log pi(y) (P(y > y') - 1/2 - tau lr(y))

    It converges to pi(y) proportional to mu(y) exp(P(y > mu) / tau): not an
    equilibrium, and exploitable where preferences are not transitive.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      clip_range: of the probability ratio at the updates after the first, > 0.

    Raises:
      UserError: tau or clip_range out of range.

    Source: Munos et al., 2024, arXiv 2312.00886, section 7 (beta = 1);
    docs/math.md (8), (26).
    """
    opponent = {REFERENCE: 1.0}
    return against("best_response", opponent, tau=tau, clip_range=clip_range)
