# SPDX-License-Identifier: Apache-2.0
"""Runs the tabular algorithms of `games.methods`: one game, or many at once.

    path = solve("nash_md", make_game(matrix, reference, tau), start, num_steps=1000)

A method's program is compiled once per shape; games, taus, references and step sizes
are its arguments.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nlhf_jax.checks import UserError, check_integer, check_range
from nlhf_jax.games.gaps import averaged_gap, gap, gaps
from nlhf_jax.games.matrices import check_preference_matrix
from nlhf_jax.games.methods import (
    ALIASES,
    METHODS,
    Game,
    Iterate,
    Knobs,
    Method,
    begin,
    decreasing,
    extragradient,
    find_method,
    payoff,
)
from nlhf_jax.games.solutions import Policy, regularised_nash
from nlhf_jax.types import Schedule

__all__ = [
    "ALIASES",
    "METHODS",
    "Game",
    "Outcome",
    "averaged_gap",
    "decreasing",
    "equilibrium",
    "find_method",
    "gap",
    "gaps",
    "make_game",
    "make_games",
    "path",
    "proximal_point",
    "solve",
    "solve_many",
]

# Rounding may put the first of the decreasing sizes above 1 / tau.
ROUNDING = 1e-12
STEPS_A_LOOK = 10  # between two looks at how far the equilibrium is


class Outcome(NamedTuple):
    """What many runs end at: their last policies, and the means of all but the last.

    The mean counts the start, and not the policy after the last step: it is that of
    the policies played.
    """

    last_BN: Float[Array, "B N"]
    average_BN: Float[Array, "B N"]


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


def make_games(
    preference_BNN: np.ndarray, reference_N: np.ndarray, tau: float | np.ndarray
) -> Game:
    """Returns B games as one `Game` for `solve_many` if their parts are valid.

    Args:
      preference_BNN: B matrices of one size: different games, or the prompts of a
        contextual game.
      reference_N: one reference for all, or one each, [B, N].
      tau: one tau for all, or one each, [B].

    Raises:
      UserError: as for `make_game`, by the first game that is wrong.
    """
    preference_BNN = np.asarray(preference_BNN, np.float64)
    if preference_BNN.ndim != 3 or not len(preference_BNN):
        raise UserError(
            f"games must be an array of matrices [B, N, N], got shape "
            f"{preference_BNN.shape}"
        )
    num_games, size = preference_BNN.shape[:2]
    reference_BN = _broadcast("reference", reference_N, (num_games, size))
    tau_B = _broadcast("tau", tau, (num_games,))
    for parts in zip(preference_BNN, reference_BN, tau_B.tolist(), strict=True):
        make_game(*parts)
    return Game(*(jnp.asarray(part) for part in (preference_BNN, reference_BN, tau_B)))


def path(
    advance: Callable[[Game, Iterate, Knobs], Iterate],
    game: Game,
    start_N: Float[Array, "N"],
    sizes_T: Float[Array, "T"],
    beta: Float[Array, ""] | float = 0.0,
    interval: int = 0,
) -> Float[Array, "T N"]:
    """Returns the policies after steps 1 to T: `solve` without its checks.

    It is pure, so it may be mapped (`jax.vmap`) over games, taus, references, starts,
    step sizes and betas, and differentiated.
    """
    steps = (jnp.arange(sizes_T.shape[0]), sizes_T)

    def body(iterate: Iterate, now):
        iterate = _step(advance, game, iterate, now, beta, interval)
        return iterate, iterate.logits_N

    return jax.nn.softmax(jax.lax.scan(body, begin(game, start_N), steps)[1], axis=-1)


def solve(
    method: str,
    game: Game,
    start_N: np.ndarray,
    *,
    step_size: float | Schedule | None = None,
    num_steps: int,
    beta: float | None = None,
    interval: int | None = None,
) -> Float[Array, "T N"]:
    """Returns the policies after steps 1 to T of a method.

    Args:
      method: a name of `METHODS` or `ALIASES`.
      game: what is played, from `make_game`.
      start_N: the policy before the first step, above 0 everywhere.
      step_size: s, or step number (from 0) -> s; 0 < s and s tau <= 1. None takes the
        method's usual one.
      num_steps: T.
      beta: weight of the reference in a fixed mixture, or decay of a moving average;
        None takes the method's usual one.
      interval: steps after which the magnet moves to the policy and a schedule begins
        again; 0 is never, None takes the method's usual one.

    Raises:
      UserError: an unknown method, a start that is no distribution with full support,
        a step size out of range, or a beta the method does not read.
    """
    recipe = find_method(method)
    interval = _interval(recipe, interval)
    start_N = _check_policy("start", start_N, len(game.reference_N))
    if not recipe.is_regularised:
        game = game._replace(tau=0.0)
    sizes_T = _step_sizes(recipe, step_size, float(game.tau), num_steps, interval)
    return _jitted_path(
        recipe.advance,
        game,
        jnp.asarray(start_N),
        jnp.asarray(sizes_T),
        _beta(method, recipe, beta),
        interval,
    )


def solve_many(
    method: str,
    games: Game,
    start_N: np.ndarray,
    *,
    step_size: float | np.ndarray | Schedule | None = None,
    num_steps: int,
    beta: float | None = None,
    interval: int | None = None,
) -> Outcome:
    """Returns where B runs of a method end, in one program for all.

    Args:
      method: a name of `METHODS` or `ALIASES`.
      games: B games of one size, from `make_games`.
      start_N: one start for all, or one each, [B, N].
      step_size: as for `solve`, or one number each, [B].
      num_steps: T.
      beta: as for `solve`.
      interval: as for `solve`.

    Raises:
      UserError: as for `solve`.
    """
    recipe = find_method(method)
    interval = _interval(recipe, interval)
    start_BN = _broadcast("start", start_N, games.reference_N.shape)
    for policy_N in start_BN:
        _check_policy("start", policy_N, len(policy_N))
    if not recipe.is_regularised:
        games = games._replace(tau=jnp.zeros_like(games.tau))
    sizes_BT = _sizes_of_all(recipe, step_size, games, num_steps, interval)
    return _jitted_ends(
        recipe.advance,
        games,
        jnp.asarray(start_BN),
        jnp.asarray(sizes_BT),
        _beta(method, recipe, beta),
        interval,
    )


def equilibrium(
    game: Game, *, tolerance: float = 1e-10, max_steps: int = 100_000
) -> Float[Array, "N"]:
    """Returns the Nash equilibrium at tau by mirror prox, for games of any size.

    Steps until no entry of the best response to the policy differs from it by more
    than `tolerance`; each costs two matrix-vector products, where
    `solutions.regularised_nash` solves linear systems; docs/math.md (7), (20).

    Args:
      game: from `make_game`, with tau > 0.
      tolerance: largest |BR(pi) - pi| of an entry. Below 1e-6 it needs float64
        (`jax.enable_x64`).
      max_steps: about log(1 / tolerance) / tau steps are needed at most.

    Raises:
      UserError: tau is 0, or `max_steps` did not suffice.
    """
    check_range("tau", float(game.tau), 0.0, low_open=True)
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


def _step(advance, game, iterate, now, beta, interval) -> Iterate:
    """Advances once, and moves the magnet where its interval is over."""
    number, size = now
    iterate = advance(game, iterate, Knobs(size, beta))
    if not interval:
        return iterate
    is_over = (number + 1) % interval == 0
    magnet_N = jnp.where(is_over, iterate.logits_N, iterate.log_magnet_N)
    return iterate._replace(log_magnet_N=magnet_N)


def _ends(advance, games, start_BN, sizes_BT, beta, interval) -> Outcome:
    def one(game, start_N, sizes_T):
        def body(carry, now):
            iterate, total_N = carry
            total_N = total_N + jax.nn.softmax(iterate.logits_N)
            return (_step(advance, game, iterate, now, beta, interval), total_N), None

        steps = (jnp.arange(sizes_T.shape[0]), sizes_T)
        start = (begin(game, start_N), jnp.zeros_like(start_N))
        (iterate, total_N), _ = jax.lax.scan(body, start, steps)
        return jax.nn.softmax(iterate.logits_N), total_N / sizes_T.shape[0]

    return Outcome(*jax.vmap(one)(games, start_BN, sizes_BT))


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


# One program per method, interval and shape, for as long as Python runs.
_static = functools.partial(jax.jit, static_argnums=(0, 5))
_jitted_path, _jitted_ends = _static(path), _static(_ends)
_jitted_settle = jax.jit(_settle)


def _interval(recipe: Method, interval: int | None) -> int:
    return recipe.interval if interval is None else check_integer("interval", interval)


def _beta(name: str, recipe: Method, beta: float | None) -> Float[Array, ""]:
    if beta is not None and recipe.beta is None:
        raise UserError(f"method {name!r} reads no beta, got {beta}")
    beta = recipe.beta if beta is None else check_range("beta", beta, 0.0, 1.0)
    return jnp.asarray(beta or 0.0)


def _step_sizes(
    recipe: Method,
    step_size: float | Schedule | None,
    tau: float,
    num_steps: int,
    interval: int,
) -> np.ndarray:
    numbers_T = np.arange(check_integer("num_steps", num_steps, 1))
    if interval:
        numbers_T = numbers_T % interval
    given = recipe.step_size(tau) if step_size is None else step_size
    given = given(numbers_T) if callable(given) else given
    sizes_T = np.broadcast_to(np.asarray(given, np.float64), num_steps)
    largest = recipe.largest(tau)
    is_good_T = (sizes_T > 0) & (sizes_T <= largest * (1 + ROUNDING))
    if not is_good_T.all():
        raise UserError(
            f"step_size must be above 0 and at most {largest:g} at tau {tau:g} "
            f"(step_size * tau <= 1), got {sizes_T[~is_good_T][0]}"
        )
    return sizes_T


def _sizes_of_all(recipe, step_size, games: Game, num_steps, interval) -> np.ndarray:
    """Returns step sizes [B, T]; games of one tau and size share the work."""
    tau_B = np.asarray(games.tau, np.float64).tolist()
    if step_size is None or callable(step_size):
        given_B = [step_size] * len(tau_B)
    else:
        given_B = _broadcast("step_size", step_size, games.tau.shape).tolist()
    kinds_B = list(zip(given_B, tau_B, strict=True))
    rows = {
        kind: _step_sizes(recipe, *kind, num_steps, interval) for kind in {*kinds_B}
    }
    return np.stack([rows[kind] for kind in kinds_B])


def _broadcast(name: str, given, shape: tuple[int, ...]) -> np.ndarray:
    given = np.asarray(given, np.float64)
    if given.shape not in (shape, shape[1:]):
        raise UserError(
            f"{name} must have shape {shape} or {shape[1:]}, got {given.shape}"
        )
    return np.broadcast_to(given, shape)


def _check_policy(name: str, policy_N: np.ndarray, size: int) -> np.ndarray:
    policy_N = np.asarray(policy_N, np.float64)
    is_good = policy_N.shape == (size,) and (policy_N > 0).all()
    if not is_good or abs(policy_N.sum() - 1) > 1e-6:
        raise UserError(
            f"{name} must be {size} probabilities above 0 that sum to 1, got {policy_N}"
        )
    return policy_N
