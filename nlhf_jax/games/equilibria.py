# SPDX-License-Identifier: Apache-2.0
"""Equilibria of games of any size and any tau, by what is fastest there."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nlhf_jax.checks import UserError, check_integer, check_range
from nlhf_jax.games.methods import Game, Iterate, Knobs, begin, extragradient, payoff
from nlhf_jax.games.nash import nash
from nlhf_jax.games.solutions import Policy, regularised_nash

STEPS_A_LOOK = 10  # between two looks at how far the equilibrium is


def equilibrium(
    game: Game, *, tolerance: float = 1e-10, max_steps: int = 100_000
) -> Float[Array, "N"]:
    """Returns the Nash equilibrium at tau, for games of any size.

    At tau = 0 it is the exact one of `nash.nash`, of largest entropy where there are
    several. Above, mirror prox steps until no entry of the best response to the policy
    differs from it by more than `tolerance`; each costs two matrix-vector products,
    where `solutions.regularised_nash` solves linear systems; docs/math.md (7), (20).

    Args:
      game: from `make_game`.
      tolerance: largest |BR(pi) - pi| of an entry. Below 1e-6 it needs float64
        (`jax.enable_x64`).
      max_steps: about log(1 / tolerance) / tau steps are needed at most.

    Raises:
      UserError: tau is below 0, or `max_steps` did not suffice.
    """
    if not check_range("tau", float(game.tau), 0.0):
        preference_NN = np.asarray(game.preference_NN, np.float64)
        # float32 rounds P and 1 - P apart.
        return jnp.asarray(nash(0.5 + (preference_NN - preference_NN.T) / 2))
    check_range("tolerance", tolerance, 0.0, low_open=True)
    check_integer("max_steps", max_steps, 1)
    policy_N, distance = _jitted_settle(game, tolerance, max_steps)
    if not distance <= tolerance:
        raise UserError(
            f"max_steps must suffice to come within {tolerance:g} of the equilibrium; "
            f"{max_steps} steps in {policy_N.dtype} came within {distance:.1g}"
        )
    return policy_N


def proximal_point(
    preference_NN: np.ndarray, reference_N: Policy, tau: float, num_steps: int
) -> list[Policy]:
    """Returns references mu_1 to mu_T, each the regularised Nash at the one before.

    The sequence converges to a Nash equilibrium without regularisation;
    docs/math.md (24).

    Source: Liu et al., 2024, arXiv 2410.23223 (COMAL), with exact inner solutions.
    """
    references = []
    for _ in range(check_integer("num_steps", num_steps, 1)):
        reference_N = regularised_nash(preference_NN, reference_N, tau)
        references.append(reference_N)
    return references


def _settle(game: Game, tolerance, max_steps) -> tuple[jax.Array, jax.Array]:
    """Returns the policy mirror prox comes to, and how far from it its answer is."""
    size = 2 / (1 + 2 * game.tau)

    def distance(iterate: Iterate):
        value_N = payoff(game, iterate.logits_N)
        answer_N = jax.nn.softmax(iterate.log_magnet_N + value_N / game.tau)
        return jnp.abs(answer_N - jax.nn.softmax(iterate.logits_N)).max()

    def is_far(carry):
        iterate, number = carry
        return (number < max_steps) & (distance(iterate) > tolerance)

    def advance(carry):
        iterate, number = carry
        for _ in range(STEPS_A_LOOK):
            iterate = extragradient(game, iterate, Knobs(size))
        return iterate, number + STEPS_A_LOOK

    start = (begin(game, game.reference_N), 0)
    iterate, _ = jax.lax.while_loop(is_far, advance, start)
    return jax.nn.softmax(iterate.logits_N), distance(iterate)


_jitted_settle = jax.jit(_settle)
