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
from nlhf_jax.games.entrance import (
    broadcast,
    check_policy,
    make_game,
    make_games,
    make_runs,
)
from nlhf_jax.games.equilibria import equilibrium, proximal_point
from nlhf_jax.games.gaps import averaged_gap, gap, gaps
from nlhf_jax.games.methods import (
    ALIASES,
    METHODS,
    Game,
    Iterate,
    Knobs,
    Method,
    begin,
    decreasing,
    find_method,
)
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
    "make_runs",
    "path",
    "proximal_point",
    "solve",
    "solve_many",
    "solve_runs",
]

# Rounding may put the first of the decreasing sizes above 1 / tau.
ROUNDING = 1e-12


class Outcome(NamedTuple):
    """What many runs end at: their last policies, and the means of all but the last.

    The mean counts the start, and not the policy after the last step: it is that of
    the policies played.
    """

    last_BN: Float[Array, "B N"]
    average_BN: Float[Array, "B N"]


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
    start_N = check_policy("start", start_N, len(game.reference_N))
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
    start_BN, sizes_BT, games = _prepare(
        recipe, games, start_N, step_size, num_steps, interval
    )
    return _jitted_ends(
        recipe.advance,
        games,
        start_BN,
        sizes_BT,
        _beta(method, recipe, beta),
        interval,
    )


def solve_runs(
    method: str,
    runs: Game,
    start_N: np.ndarray,
    *,
    step_size: float | np.ndarray | Schedule | None = None,
    num_steps: int,
    beta: float | np.ndarray | None = None,
    interval: int | None = None,
) -> Float[Array, "B N"]:
    """Returns the last policies of B runs of a method on one game.

    A step reads the game's matrix once for all: it is one product of two matrices where
    B runs alone are B products of a matrix and a vector.

    Args:
      method: a name of `METHODS` or `ALIASES`.
      runs: from `make_runs`.
      start_N: one start for all, or one each, [B, N].
      step_size: as for `solve`, or one number each, [B].
      num_steps: T.
      beta: as for `solve`, or one number each, [B].
      interval: as for `solve`, one for all.

    Raises:
      UserError: as for `solve`.
    """
    recipe = find_method(method)
    interval = _interval(recipe, interval)
    start_BN, sizes_BT, runs = _prepare(
        recipe, runs, start_N, step_size, num_steps, interval
    )
    shape = runs.tau.shape
    given = [beta] * shape[0]
    if np.ndim(beta):
        given = broadcast("beta", beta, shape).tolist()
    beta_B = jnp.stack([_beta(method, recipe, one) for one in given])
    return _jitted_lasts(recipe.advance, runs, start_BN, sizes_BT, beta_B, interval)


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


def _lasts(advance, runs, start_BN, sizes_BT, beta_B, interval) -> jax.Array:
    def one(game, start_N, sizes_T, beta):
        def body(iterate, now):
            return _step(advance, game, iterate, now, beta, interval), None

        steps = (jnp.arange(sizes_T.shape[0]), sizes_T)
        iterate, _ = jax.lax.scan(body, begin(game, start_N), steps)
        return jax.nn.softmax(iterate.logits_N)

    axes = (Game(None, 0, 0), 0, 0, 0)
    return jax.vmap(one, in_axes=axes)(runs, start_BN, sizes_BT, beta_B)


# One program per method, interval and shape, for as long as Python runs.
_static = functools.partial(jax.jit, static_argnums=(0, 5))
_jitted_path, _jitted_ends = _static(path), _static(_ends)
_jitted_lasts = _static(_lasts)


def _prepare(recipe, games: Game, start_N, step_size, num_steps, interval):
    """Returns the starts [B, N], the step sizes [B, T] and what is played."""
    start_BN = broadcast("start", start_N, games.reference_N.shape)
    for policy_N in start_BN:
        check_policy("start", policy_N, len(policy_N))
    if not recipe.is_regularised:
        games = games._replace(tau=jnp.zeros_like(games.tau))
    sizes_BT = _sizes_of_all(recipe, step_size, games, num_steps, interval)
    return jnp.asarray(start_BN), jnp.asarray(sizes_BT), games


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
        given_B = broadcast("step_size", step_size, games.tau.shape).tolist()
    kinds_B = list(zip(given_B, tau_B, strict=True))
    rows = {
        kind: _step_sizes(recipe, *kind, num_steps, interval) for kind in {*kinds_B}
    }
    return np.stack([rows[kind] for kind in kinds_B])
