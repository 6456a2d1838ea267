# SPDX-License-Identifier: Apache-2.0
"""Convergent meta-alignment: INPO whose reference follows the policy."""

import dataclasses

import jax

from nlhf_jax import losses
from nlhf_jax.algorithms.regressions import (
    PREVIOUS,
    on_labelled_pairs,
    proximal_anchor,
)
from nlhf_jax.checks import UserError, check_integer, check_range
from nlhf_jax.parameter_sets import in_turn, moves_when, snapshots
from nlhf_jax.types import (
    POLICY,
    Algorithm,
    Feedback,
    LossFn,
    LossOutput,
    ScoredSample,
    Speaker,
)

MAGNET, INNER_GAP = "magnet", "comal/inner_gap"


def comal(
    *,
    tau: float,
    step_size: float,
    period: int = 10,
    magnet_period: int = 200,
    inner_gap: float = 0.0,
) -> Algorithm:
    """Returns COMAL.

        `inpo` with a magnet in place of the reference, and magnet <- pi
        every `magnet_period` steps, and when a period ends with a gap < `inner_gap`
        gap = E[(d(y) - d(y'))^2] / (4 tau s^2),  d = log pi - log pi_t

    Each outer round looks for the Nash equilibrium regularised at tau to the magnet,
    the last round's policy: a proximal point method, whose policies converge to an
    equilibrium of the game **without** regularisation. It starts where the
    policy does, and nothing else holds it there. The rounds must be long enough for
    `inpo` to come close to their equilibria.

    The gap is that of pi_t in the round's own game, to second order near its
    equilibrium, if the period's steps reached their minimiser: there d is s times
    P(y > pi_t) - tau log pi_t/magnet up to a constant, and the best response to pi_t
    gains tau log E exp(. / tau) - E of that, Var / (2 tau) to second order. It is
    measured before the period's last update, and steps that fall short of their
    minimiser (too few of them, a small learning rate) make it look smaller. It is
    `comal/inner_gap` in the metrics.

    Args:
      tau: strength of the KL to the magnet, per nat, > 0; large values make short,
        safe rounds.
      step_size: s in (0, 1 / tau] of the inner steps.
      period: steps with the same pi_t, >= 1.
      magnet_period: most steps with the same magnet, >= 1.
      inner_gap: of a round that is over before, >= 0; with 0 only `magnet_period` ends
        one.

    Raises:
      UserError: an argument out of range.

    Source: Liu et al., 2024, arXiv 2410.23223; docs/math.md (24), (45),
    (57).
    """
    check_range("tau", tau, 0.0, low_open=True)
    check_integer("period", period, 1)
    check_integer("magnet_period", magnet_period, 1)
    check_range("inner_gap", inner_gap, 0.0)
    if inner_gap > 0 and period == 1:
        raise UserError("inner_gap must be 0 where period is 1: pi_t is the policy")

    def is_over(step, metrics):
        is_near = (step % period == 0) & (metrics[INNER_GAP] < inner_gap)
        return (step % magnet_period == 0) | is_near

    inner = on_labelled_pairs(
        "comal",
        Speaker({PREVIOUS: 1.0}),
        anchors=proximal_anchor(tau, step_size, magnet=MAGNET),
        scale=step_size,
        is_regularised=False,
        derived_sets=(PREVIOUS, MAGNET),
        update_sets=in_turn(
            snapshots({PREVIOUS: POLICY}, period=period),
            moves_when(is_over, {MAGNET: POLICY}),
        ),
    )
    return dataclasses.replace(
        inner,
        scored_under=tuple(dict.fromkeys((*inner.scored_under, PREVIOUS))),
        loss=_WithInnerGap(inner.loss, tau, step_size),
    )


@dataclasses.dataclass(frozen=True)
class _WithInnerGap:
    loss: LossFn
    tau: float
    step_size: float

    def __call__(
        self, samples: tuple[ScoredSample, ...], feedback: Feedback
    ) -> LossOutput:
        output = self.loss(samples, feedback)
        first_B, second_B = (
            jax.lax.stop_gradient(losses.log_ratio(one, {PREVIOUS: 1.0}))
            for one in samples
        )
        gap_B = (first_B - second_B) ** 2 / (4 * self.tau * self.step_size**2)
        return LossOutput(output.loss_B, output.metrics | {INNER_GAP: gap_B})
