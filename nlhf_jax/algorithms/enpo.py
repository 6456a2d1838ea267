# SPDX-License-Identifier: Apache-2.0
"""Exploratory Nash preference optimisation, and the iterative method it improves on.

pi_t is the policy at the last refreshment, q_t the adversary that proposes the second
response of a pair.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nlhf_jax import losses
from nlhf_jax.algorithms.regressions import (
    PREVIOUS,
    Comparator,
    proximal_anchor,
    with_comparators,
)
from nlhf_jax.checks import UserError, check_integer, check_range
from nlhf_jax.parameter_sets import snapshots
from nlhf_jax.types import (
    POLICY,
    Algorithm,
    Feedback,
    LossOutput,
    ScoredSample,
    Speaker,
)

ADVERSARY, OLDER = "adversary", "older"


def iterative_nlhf(
    *,
    tau: float,
    step_size: float,
    num_candidates: int = 2,
    num_comparators: int = 1,
    period: int = 10,
) -> Algorithm:
    """Returns standard iterative NLHF: ENPO without exploration.

        y_1 .. y_K, z_0 .. z_n ~ pi_t, h as in `inpo`
        y, y' = the best and the worst of the y_i by P(y_i > z_0)
        descend  (h - s mean_k (P(y > z_k) - P(y' > z_k)))^2 / (4 s),  k = 1 .. n

    and every `period` steps pi_t <- pi. With K = 2 both are taken and there is no z_0.
    The exact minimiser is the step of online mirror descent for every K: what chooses
    the pair (z_0) has no part in its target. (Labelled with the answers that chose
    them, as INPO is often run, they give a step against another opponent.) It converges
    to the Nash equilibrium at tau while s is small against tau, but a response that
    pi_t hardly ever says is hardly ever learned about.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      step_size: s in (0, 1 / tau].
      num_candidates: K >= 2.
      num_comparators: n >= 1, shared by both responses.
      period: steps with the same pi_t, >= 1.

    Raises:
      UserError: an argument out of range.

    Source: Nan et al., 2026, arXiv 2606.01382, the method without its bonus;
    docs/math.md (16), (18), (52).
    """
    return _exploit(
        "iterative_nlhf",
        Speaker({PREVIOUS: 1.0}),
        tau=tau,
        step_size=step_size,
        alpha=0.0,
        num_candidates=num_candidates,
        num_comparators=num_comparators,
        derived_sets=(PREVIOUS,),
        update_sets=snapshots({PREVIOUS: POLICY}, period=period),
    )


def enpo(
    *,
    tau: float,
    step_size: float,
    alpha: float = 1e-3,
    adversary_tau: float = 0.05,
    sign: int = 1,
    num_comparators: int = 4,
    num_proposals: int = 2,
    period: int = 10,
) -> Algorithm:
    """Returns ENPO with a trained adversary, for language models.

        A. y ~ pi_t, y' ~ q, z_1 .. z_n ~ pi_t, h as in `inpo`
           d = mean_k (P(y > z_k) - P(y' > z_k))
           descend  [(h - s d)^2 - alpha log pi(y)] / (4 s)
        B. x_1 .. x_K ~ pi_t, r = sign (log pi(x) - log pi_t(x)), best and worst by r
           q descends  -log sigma(b (log q/pi_t (best) - log q/pi_t (worst))) / (2 b)

    and every `period` steps pi_t <- pi. Step A's target has the right mean whoever
    proposes y', so the minimiser at alpha = 0 is the step of online mirror descent;
    alpha keeps pi near pi_t, E_{pi_t} -log pi being KL(pi_t, pi) up to a constant.
    Step B lets the adversary propose what the policy has just moved towards (sign 1,
    the authors' code) or away from (-1; the square of the paper's theory has no sign).
    Its exact solution is q proportional to pi_t (pi / pi_t)^{sign / b}, of which K = 2
    proposals give a much weaker form. The fixed point is the Nash equilibrium at tau.
    The authors alternate A and B by whole rounds; here both take a step at a time.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      step_size: s in (0, 1 / tau], one over the eta of the authors' code.
      alpha: weight of the pull to pi_t, >= 0.
      adversary_tau: b > 0, strength of the adversary's KL to pi_t, per nat.
      sign: 1 or -1, what the adversary is drawn to.
      num_comparators: n >= 1, shared by both responses.
      num_proposals: K >= 2.
      period: steps with the same pi_t, >= 1.

    Raises:
      UserError: an argument out of range.

    Source: Nan et al., 2026, arXiv 2606.01382; docs/math.md (52), (53), (54).
    """
    check_range("adversary_tau", adversary_tau, 0.0, low_open=True)
    _check_sign(sign)
    check_integer("num_proposals", num_proposals, 2)
    follower = Algorithm(
        name="enpo_adversary",
        speakers=(Speaker({PREVIOUS: 1.0}),) * num_proposals,
        comparisons=(),
        ratings=(),
        trained_on=tuple(range(num_proposals)),
        scored_under=(PREVIOUS, POLICY),
        loss=_FollowTheMove(adversary_tau, sign),
        trains=ADVERSARY,
    )
    return _exploit(
        "enpo",
        Speaker({ADVERSARY: 1.0}),
        tau=tau,
        step_size=step_size,
        alpha=alpha,
        num_comparators=num_comparators,
        derived_sets=(PREVIOUS, ADVERSARY),
        update_sets=snapshots({PREVIOUS: POLICY}, period=period),
        followers=(follower,),
    )


def enpo_closed_form(
    *,
    tau: float,
    step_size: float,
    alpha: float = 1e-3,
    adversary_tau: float = 0.5,
    sign: int = 1,
    num_comparators: int = 4,
    period: int = 10,
) -> Algorithm:
    """Returns ENPO whose adversary is the closed form of step B, without training it.

        y' ~ q_t,  log q_t = log pi_{t-1} + (sign / b) (log pi_t - log pi_{t-1}) + const

    taken one token at a time, so it is the exact adversary for one-token responses, and
    costs one more parameter set in the decode loop and nothing else. The rest is
    `enpo`. For small b the adversary goes far beyond pi_t: at b = 0.05 its exponent is
    20, and it all but forgets responses that matter.

    Args:
      tau: strength of the KL to the reference, per nat, >= 0.
      step_size: s in (0, 1 / tau].
      alpha: weight of the pull to pi_t, >= 0.
      adversary_tau: b > 0, strength of the adversary's KL to pi_{t-1}, per nat.
      sign: 1 or -1, what the adversary is drawn to, as in `enpo`.
      num_comparators: n >= 1, shared by both responses.
      period: steps with the same pi_t, >= 1.

    Raises:
      UserError: an argument out of range.

    Source: Nan et al., 2026, arXiv 2606.01382; docs/math.md (28), (52), (54).
    """
    check_range("adversary_tau", adversary_tau, 0.0, low_open=True)
    _check_sign(sign)
    exponent = sign / adversary_tau
    return _exploit(
        "enpo_closed_form",
        Speaker({PREVIOUS: exponent, OLDER: 1.0 - exponent}),
        tau=tau,
        step_size=step_size,
        alpha=alpha,
        num_comparators=num_comparators,
        derived_sets=(PREVIOUS, OLDER),
        update_sets=snapshots({PREVIOUS: POLICY, OLDER: PREVIOUS}, period=period),
    )


def _check_sign(sign: int) -> None:
    if sign not in (1, -1):
        raise UserError(f"sign must be 1 or -1, got {sign!r}")


def _exploit(
    name: str,
    proposer: Speaker,
    *,
    tau: float,
    step_size: float,
    alpha: float,
    num_comparators: int,
    num_candidates: int = 2,
    **more: Any,
) -> Algorithm:
    """Returns step A: the regression with comparators from pi_t."""
    check_range("alpha", alpha, 0.0)
    check_integer("num_comparators", num_comparators, 1)
    check_integer("num_candidates", num_candidates, 2)
    previous = Speaker({PREVIOUS: 1.0})
    return with_comparators(
        name,
        (*(previous,) * (num_candidates - 1), proposer),
        [Comparator(previous, 1.0 / num_comparators)] * num_comparators,
        anchors=proximal_anchor(tau, step_size),
        scale=step_size,
        alpha=alpha,
        **more,
    )


@dataclasses.dataclass(frozen=True)
class _FollowTheMove:
    """Step B: what the policy has moved most is to be said more often, or less."""

    tau: float
    sign: int

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        del feedback
        moved_KB = jnp.stack(
            [losses.log_ratio(one, {PREVIOUS: 1.0}) for one in samples]
        )
        ratio_KB = jnp.stack(
            [
                losses.log_ratio(one, {PREVIOUS: 1.0}, trained=ADVERSARY)
                for one in samples
            ]
        )
        moved_KB = self.sign * jax.lax.stop_gradient(moved_KB)
        best_1B = moved_KB.argmax(axis=0, keepdims=True)
        worst_1B = moved_KB.argmin(axis=0, keepdims=True)
        lead_B = jnp.take_along_axis(ratio_KB, best_1B, axis=0)[0]
        lead_B -= jnp.take_along_axis(ratio_KB, worst_1B, axis=0)[0]
        # Where the policy has not moved there is nothing to follow.
        has_moved_B = moved_KB.max(axis=0) > moved_KB.min(axis=0)
        loss_B = jax.nn.softplus(-self.tau * lead_B) / (2 * self.tau)
        loss_B = jnp.where(has_moved_B, loss_B, 0.0)
        # k1 of KL(pi_t, q): the proposals are pi_t's.
        return LossOutput(loss_B, {"adversary/kl": -ratio_KB.mean(axis=0)})
