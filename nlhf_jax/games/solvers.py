# SPDX-License-Identifier: Apache-2.0
"""Tabular algorithms as scans of one rule with different opponents.

    log pi' = (1 - s tau) log pi + s tau log mu + s v + const                    (U)

with step size s and payoff v = P(. > opponent). The notation is that of
`games.solutions`; logits are natural logarithms of policies up to a constant.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nlhf_jax.checks import UserError, check_choice, check_integer, check_range
from nlhf_jax.games.matrices import check_preference_matrix
from nlhf_jax.games.solutions import Policy, regularised_nash
from nlhf_jax.types import Schedule


class Game(NamedTuple):
    """A preference game regularised to a reference; tau = 0 leaves it unregularised."""

    preference_NN: Float[Array, "N N"]
    reference_N: Float[Array, "N"]
    tau: float


class Iterate(NamedTuple):
    """Where an algorithm stands: its policy, and the payoff it met one step earlier."""

    logits_N: Float[Array, "N"]
    last_payoff_N: Float[Array, "N"]


Logits = Float[Array, "N"]
Method = Callable[[Game, Iterate, jax.Array], Iterate]


def payoff(game: Game, logits_N: Logits) -> Logits:
    """Returns P(y > opponent) for each action y against softmax(logits)."""
    return game.preference_NN @ jax.nn.softmax(logits_N)


def rule(game: Game, logits_N: Logits, payoff_N: Logits, size: jax.Array) -> Logits:
    """Returns the logits after rule (U), shifted to log-probabilities."""
    weight = size * game.tau
    log_reference_N = jnp.log(game.reference_N)
    return jax.nn.log_softmax(
        (1 - weight) * logits_N + weight * log_reference_N + size * payoff_N
    )


def mirror_descent(game: Game, iterate: Iterate, size: jax.Array) -> Iterate:
    """Plays against itself: online mirror descent.

    At tau > 0 the last iterate converges where s is small against tau, else it cycles.
    At tau = 0 this is multiplicative weights: only the average iterate converges.
    With s = eta / (1 + eta tau) it is magnetic mirror descent with magnet mu.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 8; Sokota et al., 2023,
    arXiv 2206.05825.
    """
    value_N = payoff(game, iterate.logits_N)
    return Iterate(rule(game, iterate.logits_N, value_N, size), value_N)


def nash_md(game: Game, iterate: Iterate, size: jax.Array) -> Iterate:
    """Plays against its geometric mixture with the reference, of weight s tau.

    With s_t = 2 / (tau (t + 2)) the last iterate converges to the Nash equilibrium at
    tau; with a constant s it does not, but stops at the policy that best-responds to
    its mixture (where it does not cycle).

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 3 to 5 and Theorem 1.
    """
    weight = size * game.tau
    log_reference_N = jnp.log(game.reference_N)
    mixture_N = (1 - weight) * iterate.logits_N + weight * log_reference_N
    value_N = payoff(game, mixture_N)
    return Iterate(rule(game, iterate.logits_N, value_N, size), value_N)


def extragradient(game: Game, iterate: Iterate, size: jax.Array) -> Iterate:
    """Plays against the policy that one step of mirror descent would give.

    The last iterate converges linearly, also where mirror descent cycles. With
    s = 2 / (1 + 2 tau) it is mirror prox and KL(pi*, pi) shrinks by 1 / (1 + 2 tau).

    Source: Zhou et al., 2025, arXiv 2503.08942; Tiapkin et al., 2025,
    arXiv 2505.19731.
    """
    half_N = mirror_descent(game, iterate, size).logits_N
    value_N = payoff(game, half_N)
    return Iterate(rule(game, iterate.logits_N, value_N, size), value_N)


def optimistic(game: Game, iterate: Iterate, size: jax.Array) -> Iterate:
    """Plays against a guess: twice the payoff met now, less the one met before.

    At tau = 0 this is optimistic multiplicative weights, whose last iterate converges
    where the equilibrium has full support.

    Source: Daskalakis and Panageas, 2019, arXiv 1807.04252.
    """
    value_N = payoff(game, iterate.logits_N)
    guess_N = 2 * value_N - iterate.last_payoff_N
    return Iterate(rule(game, iterate.logits_N, guess_N, size), value_N)


METHODS: dict[str, Method] = {
    "mirror_descent": mirror_descent,
    "nash_md": nash_md,
    "extragradient": extragradient,
    "optimistic": optimistic,
}


def decreasing(tau: float) -> Schedule:
    """Returns Nash-MD's step sizes t -> 2 / (tau (t + 2)), from t = 0.

    Raises:
      UserError: tau is not above 0.
    """
    check_range("tau", tau, 0.0, low_open=True)
    return lambda t: 2 / (tau * (t + 2))


def make_game(preference_NN: np.ndarray, reference_N: np.ndarray, tau: float) -> Game:
    """Returns the game if its parts are valid.

    Raises:
      UserError: no preference matrix, a reference that is no distribution with full
        support, or tau below 0.
    """
    check_range("tau", tau, 0.0)
    matrix = check_preference_matrix(preference_NN)
    reference_N = _check_policy("reference", reference_N, len(matrix))
    return Game(jnp.asarray(matrix), jnp.asarray(reference_N), tau)


def solve(
    method: str,
    game: Game,
    start_N: np.ndarray,
    *,
    step_size: float | Schedule,
    num_steps: int,
) -> Float[Array, "T N"]:
    """Returns the policies after steps 1 to T of a method.

    Args:
      method: a name of `METHODS`.
      game: what is played, from `make_game`.
      start_N: the policy before the first step, above 0 everywhere.
      step_size: s, or step number (from 0) -> s; 0 < s and s tau <= 1.
      num_steps: T.

    Raises:
      UserError: an unknown method, a start that is no distribution with full support,
        or a step size out of range.
    """
    advance = METHODS[check_choice("method", method, METHODS)]
    check_integer("num_steps", num_steps, 1)
    start_N = _check_policy("start", start_N, len(game.reference_N))
    sizes_T = jnp.asarray(_step_sizes(step_size, game.tau, num_steps))
    logits_N = jnp.log(jnp.asarray(start_N))
    start = Iterate(logits_N, payoff(game, logits_N))

    def body(iterate: Iterate, size: jax.Array):
        iterate = advance(game, iterate, size)
        return iterate, jax.nn.softmax(iterate.logits_N)

    return jax.lax.scan(body, start, sizes_T)[1]


def proximal_point(
    preference_NN: np.ndarray, reference_N: Policy, tau: float, num_steps: int
) -> list[Policy]:
    """Returns references mu_1 to mu_T, each the regularised Nash at the one before.

    The sequence converges to a Nash equilibrium without regularisation.

    Source: Liu et al., 2024, arXiv 2410.23223 (COMAL), with exact inner solutions.
    """
    path = []
    for _ in range(check_integer("num_steps", num_steps, 1)):
        reference_N = regularised_nash(preference_NN, reference_N, tau)
        path.append(reference_N)
    return path


def _step_sizes(step_size: float | Schedule, tau: float, num_steps: int) -> np.ndarray:
    given = step_size(np.arange(num_steps)) if callable(step_size) else step_size
    sizes_T = np.broadcast_to(np.asarray(given, np.float64), num_steps)
    # Rounding may put the first of the decreasing sizes above 1 / tau.
    is_good_T = (sizes_T > 0) & (sizes_T * tau <= 1 + 1e-12)
    if not is_good_T.all():
        bad = sizes_T[~is_good_T][0]
        raise UserError(
            f"step_size must be above 0 with step_size * tau <= 1, got {bad} at tau "
            f"{tau}"
        )
    return sizes_T


def _check_policy(name: str, policy_N: np.ndarray, size: int) -> np.ndarray:
    policy_N = np.asarray(policy_N, np.float64)
    is_good = policy_N.shape == (size,) and (policy_N > 0).all()
    if not is_good or abs(policy_N.sum() - 1) > 1e-6:
        raise UserError(
            f"{name} must be {size} probabilities above 0 that sum to 1, got {policy_N}"
        )
    return policy_N
