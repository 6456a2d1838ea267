# SPDX-License-Identifier: Apache-2.0
"""The family of tabular algorithms: one rule with different opponents and steps.

    log pi' = (1 - s tau) log pi + s tau log mu + s v + const                    (U)

with step size s > 0 and payoff v = P(. > opponent); docs/math.md (16). The notation is
that of `games.solutions`; logits are natural logarithms of policies up to a constant.
A method is a pure function of the game and where it stands, so that jit, scan and vmap
over games, taus, step sizes and references need no help from it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nlhf_jax.checks import UserError, check_range, nearest
from nlhf_jax.games import folds
from nlhf_jax.games.products import product
from nlhf_jax.types import Schedule

# The largest squared frequency at which a game of preferences turns: docs/math.md (25).
LARGEST_TURN = 1 / 8
INPO_RATIO = 1 / 3  # tau / eta of the published runs
MAGNET_STEPS = 100  # steps with one magnet; few enough to see it move

Logits = Float[Array, "N"]


class Game(NamedTuple):
    """A preference game regularised to a reference; tau = 0 leaves it unregularised.

    Several games at once are one `Game` whose leaves have a first axis more.
    """

    preference_NN: Float[Array, "*B N N"]
    reference_N: Float[Array, "*B N"]
    tau: float | Float[Array, "*B"]


class Iterate(NamedTuple):
    """Where an algorithm stands.

    Attributes:
      logits_N: its policy, up to a constant.
      log_magnet_N: logarithm of what rule (U) pulls towards: the reference, or for
        algorithms that move it, a policy of their own past.
      last_payoff_N: the payoff met one step earlier.
      average_N: the moving average of its logits, the current ones included.
    """

    logits_N: Logits
    log_magnet_N: Logits
    last_payoff_N: Logits
    average_N: Logits


class Knobs(NamedTuple):
    """What a step is told: step size s, and beta where the method reads one."""

    size: jax.Array | float
    beta: jax.Array | float = 0.0


def begin(game: Game, start_N: Float[Array, "N"]) -> Iterate:
    """Returns where an algorithm that starts at the policy `start_N` stands."""
    logits_N = jnp.log(start_N)
    magnet_N = jnp.log(game.reference_N)
    return Iterate(logits_N, magnet_N, payoff(game, logits_N), logits_N)


def payoff(game: Game, logits_N: Logits) -> Logits:
    """Returns P(y > opponent) for each y, against softmax(logits); docs/math.md (2)."""
    share_N = jnp.exp(logits_N - folds.largest(logits_N))
    # Divided after the product, so that the product need not wait for the sum.
    return product(game.preference_NN, share_N) / folds.total(share_N)


def blend(logits_N: Logits, magnet_N: Logits, weight: jax.Array | float) -> Logits:
    """Returns logits of the geometric mixture with weight on the magnet.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 3; docs/math.md (11).
    """
    return (1 - weight) * logits_N + weight * magnet_N


def rule(
    game: Game, iterate: Iterate, payoff_N: Logits, size: jax.Array | float
) -> Logits:
    """Returns the logits after rule (U); docs/math.md (16)."""
    pulled_N = blend(iterate.logits_N, iterate.log_magnet_N, size * game.tau)
    # A constant of (U): with it the logits stay near 0 and need no normaliser.
    return pulled_N + size * (payoff_N - 0.5)


def _after(
    game: Game, iterate: Iterate, payoff_N: Logits, size: jax.Array | float
) -> Iterate:
    return iterate._replace(logits_N=rule(game, iterate, payoff_N, size))


def mirror_descent(game: Game, iterate: Iterate, knobs: Knobs) -> Iterate:
    """Plays against itself: online mirror descent; docs/math.md (18).

    At tau > 0 the last iterate converges where s is small against tau, else it cycles.
    At tau = 0 this is multiplicative weights: only the average iterate converges.
    With s = 1 / eta it is INPO's exact step, with s = eta / (1 + eta tau) magnetic
    mirror descent.

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 8; Zhang et al., 2024,
    arXiv 2407.00617; Sokota et al., 2023, arXiv 2206.05825.
    """
    value_N = payoff(game, iterate.logits_N)
    return _after(game, iterate, value_N, knobs.size)


def nash_md(game: Game, iterate: Iterate, knobs: Knobs) -> Iterate:
    """Plays against its mixture with the magnet, of weight s tau; docs/math.md (12).

    With s_t = 2 / (tau (t + 2)) the last iterate converges to the Nash equilibrium at
    tau; with a constant s it does not, but stops at the policy that best-responds to
    its mixture (where it does not cycle).

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 3 to 5 and Theorem 1.
    """
    # The mixture is also what (U) adds s v to, so it is formed once.
    weight = knobs.size * game.tau
    mixture_N = blend(iterate.logits_N, iterate.log_magnet_N, weight)
    value_N = payoff(game, mixture_N)
    return iterate._replace(logits_N=mixture_N + knobs.size * (value_N - 0.5))


def fixed_mixture(game: Game, iterate: Iterate, knobs: Knobs) -> Iterate:
    """Plays against its mixture with the magnet, of weight beta whatever the step.

    It is Nash-MD-PG in expectation, by natural gradient. It stops where the policy
    best-responds to its own mixture: the mixture is the Nash equilibrium at
    tau / (1 - beta), the policy none; docs/math.md (21).

    Source: Munos et al., 2024, arXiv 2312.00886, eq. 13 to 15, exact.
    """
    mixture_N = blend(iterate.logits_N, iterate.log_magnet_N, knobs.beta)
    return _after(game, iterate, payoff(game, mixture_N), knobs.size)


def moving_average(game: Game, iterate: Iterate, knobs: Knobs) -> Iterate:
    """Plays against the moving average of its logits, of decay beta; docs/math.md (19).

        average_t = (1 - beta) logits_t + beta average_{t-1},   average_0 = logits_0

    beta = 0 is mirror descent, beta = 1 the best response to the start. Where it comes
    to rest it is at the Nash equilibrium at tau, for every beta < 1.

    Source: Munos et al., 2024, arXiv 2312.00886, Appendix F.3, read as a recursion; the
    formula printed there averages with the start instead.
    """
    opponent_N = iterate.average_N
    after = _after(game, iterate, payoff(game, opponent_N), knobs.size)
    average_N = blend(after.logits_N, opponent_N, knobs.beta)
    return after._replace(average_N=average_N)


def extragradient(game: Game, iterate: Iterate, knobs: Knobs) -> Iterate:
    """Plays against the policy that one step of mirror descent would give.

    The last iterate converges linearly, also where mirror descent cycles. With
    s = 2 / (1 + 2 tau) it is Nash mirror prox and KL(pi*, pi) shrinks by
    1 / (1 + 2 tau) or more each step; docs/math.md (20).

    Source: Zhou et al., 2025, arXiv 2503.08942; Tiapkin et al., 2025,
    arXiv 2505.19731.
    """
    half = mirror_descent(game, iterate, knobs)
    return _after(game, iterate, payoff(game, half.logits_N), knobs.size)


def optimistic(game: Game, iterate: Iterate, knobs: Knobs) -> Iterate:
    """Plays against a guess: twice the payoff met now, less the one met before.

    At tau = 0 this is optimistic multiplicative weights, whose last iterate converges
    where the equilibrium has full support; docs/math.md (22).

    Source: Daskalakis and Panageas, 2019, arXiv 1807.04252.
    """
    value_N = payoff(game, iterate.logits_N)
    guess_N = 2 * value_N - iterate.last_payoff_N
    after = _after(game, iterate, guess_N, knobs.size)
    return after._replace(last_payoff_N=value_N)


def best_response(game: Game, iterate: Iterate, knobs: Knobs) -> Iterate:
    """Plays against the magnet; s = 1 / tau gets there in one step; docs/math.md (8).

    Source: Munos et al., 2024, arXiv 2312.00886, section 7 (beta = 1), exact.
    """
    return _after(game, iterate, payoff(game, iterate.log_magnet_N), knobs.size)


def fictitious_play(game: Game, iterate: Iterate, knobs: Knobs) -> Iterate:
    """Adds the best response to its average policy to that average; docs/math.md (23).

    The iterate is the average, and `size` the weight of the response in it: 1 / (t + 2)
    is the plain mean with the start. At tau = 0 the response is pure, the first of the
    best. This is the one method whose iterates are averaged as probabilities.

    Source: Brown, 1951; with tau > 0 Hofbauer and Sandholm, 2002.
    """
    value_N = payoff(game, iterate.logits_N)
    is_soft = jnp.asarray(game.tau) > 0
    tau = jnp.where(is_soft, game.tau, 1.0)
    soft_N = jax.nn.softmax(iterate.log_magnet_N + value_N / tau)
    pure_N = jax.nn.one_hot(value_N.argmax(), value_N.size, dtype=value_N.dtype)
    response_N = jnp.where(is_soft, soft_N, pure_N)
    policy_N = jax.nn.softmax(iterate.logits_N)
    mean_N = policy_N + knobs.size * (response_N - policy_N)
    return iterate._replace(logits_N=jnp.log(mean_N))


def decreasing(tau: float) -> Schedule:
    """Returns Nash-MD's step sizes t -> 2 / (tau (t + 2)), from t = 0.

    Raises:
      UserError: tau is not above 0.

    Source: Munos et al., 2024, arXiv 2312.00886, Theorem 1; docs/math.md (13).
    """
    check_range("tau", tau, 0.0, low_open=True)
    return lambda t: 2 / (tau * (t + 2))


def stable_step(tau: float) -> float:
    """Returns half the step below which mirror descent is stable in every game.

    s = tau / (tau^2 + 1/8) at tau > 0, and 1 at tau = 0, where none is stable;
    docs/math.md (25).
    """
    return tau / (tau**2 + LARGEST_TURN) if tau else 1.0


def critical_step(preference_NN: np.ndarray, tau: float, nash_N: np.ndarray) -> float:
    """Returns the s above which mirror descent leaves its equilibrium and cycles.

    2 tau / (tau^2 + lambda^2) with lambda the largest frequency of the linearised
    dynamics, the spectral norm of C^{1/2} (P - 1/2) C^{1/2}, C = diag(pi) - pi pi^T.

    Source: docs/math.md (25).
    """
    covariance_NN = np.diag(nash_N) - np.outer(nash_N, nash_N)
    turning = np.linalg.eigvals((preference_NN - 0.5) @ covariance_NN)
    return 2 * tau / (tau**2 + np.abs(turning.imag).max() ** 2)


def _whole_step(tau: float) -> float:
    check_range("tau", tau, 0.0, low_open=True)
    return 1 / tau


def _largest_of_rule(tau: float) -> float:
    return 1 / tau if tau else np.inf


class Method(NamedTuple):
    """An algorithm by name: what a step does, and how it is usually run.

    Attributes:
      advance: (game, iterate, knobs) -> iterate.
      step_size: tau -> the usual step size, a number or step number (from 0) -> s.
      ends: what its iterates converge to.
      beta: the usual beta; None where the method reads none.
      interval: steps after which the magnet moves to the policy; 0 is never.
      is_regularised: False where tau plays no part; it is then solved at tau = 0.
      largest: tau -> the largest step size there is.
    """

    advance: Callable[[Game, Iterate, Knobs], Iterate]
    step_size: Callable[[float], float | Schedule]
    ends: str
    beta: float | None = None
    interval: int = 0
    is_regularised: bool = True
    largest: Callable[[float], float] = _largest_of_rule


AT_TAU, UNREGULARISED = "Nash at tau", "Nash without regularisation"

METHODS: dict[str, Method] = {
    "nash_md": Method(nash_md, decreasing, AT_TAU),
    "nash_md_constant": Method(
        nash_md, lambda tau: 0.125 * _whole_step(tau), "near Nash at tau, or a cycle"
    ),
    "fixed_mixture": Method(
        fixed_mixture, stable_step, "best response to its own mixture", beta=0.125
    ),
    "ema": Method(
        moving_average,
        # An opponent ten steps behind turns the policy outwards ten times as much.
        lambda tau: 0.05 * stable_step(tau),
        f"{AT_TAU} for small steps",
        beta=0.9,
    ),
    "mirror_descent": Method(mirror_descent, stable_step, f"{AT_TAU} for small steps"),
    "inpo": Method(
        mirror_descent,
        lambda tau: INPO_RATIO * _whole_step(tau),
        f"{AT_TAU} for small steps",
    ),
    "mmd": Method(
        mirror_descent, lambda tau: 1 / (1 + tau), f"{AT_TAU} for small steps"
    ),
    "mpo": Method(
        mirror_descent,
        lambda tau: 1 / (1 + tau),
        f"{UNREGULARISED} for small steps",
        interval=MAGNET_STEPS,
    ),
    "extragradient": Method(extragradient, lambda tau: 1 / (1 + tau), AT_TAU),
    "nash_mp": Method(extragradient, lambda tau: 2 / (1 + 2 * tau), AT_TAU),
    "comal": Method(
        extragradient,
        lambda tau: 2 / (1 + 2 * tau),
        UNREGULARISED,
        interval=MAGNET_STEPS,
    ),
    "optimistic": Method(
        optimistic, lambda tau: 1 / (1 + tau), f"{AT_TAU} for small steps"
    ),
    "mwu": Method(
        mirror_descent,
        lambda tau: 1.0,
        f"{UNREGULARISED}, on average",
        is_regularised=False,
    ),
    "omwu": Method(
        optimistic,
        lambda tau: 1.0,
        f"{UNREGULARISED} of full support",
        is_regularised=False,
    ),
    "best_response": Method(
        best_response, _whole_step, "best response to the reference"
    ),
    "fictitious_play": Method(
        fictitious_play,
        lambda tau: lambda t: 1 / (t + 2),
        AT_TAU,
        largest=lambda tau: 1.0,
    ),
}

# Other names in the literature, and the method that takes their exact step.
ALIASES: dict[str, str] = {
    "omd": "mirror_descent",
    "mtpo": "mirror_descent",
    "self_play": "mirror_descent",
    "online_ipo": "mirror_descent",
    "ipo_md": "fixed_mixture",
    "nash_md_pg": "fixed_mixture",
    "nash_ema": "ema",
    "magnetic_mirror_descent": "mmd",
    "egpo": "extragradient",
    "mirror_prox": "nash_mp",
    "nash_mirror_prox": "nash_mp",
    "proximal_point": "comal",
    "oomd": "optimistic",
    "sppo": "mwu",
    "dno": "mwu",
    "spo": "mwu",
    "hedge": "mwu",
    "multiplicative_weights": "mwu",
    "onpo": "omwu",
    "br": "best_response",
    "fp": "fictitious_play",
}


def find_method(name: str) -> Method:
    """Returns the method of a name of `METHODS` or `ALIASES`.

    Raises:
      UserError: an unknown name; lists the known ones and the nearest.
    """
    known = (*METHODS, *ALIASES)
    if name not in known:
        raise UserError(
            f"method must be one of {', '.join(sorted(METHODS))}; got {name!r}"
            f"{nearest(str(name), known)}"
        )
    return METHODS[ALIASES.get(name, name)]
