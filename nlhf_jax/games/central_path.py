# SPDX-License-Identifier: Apache-2.0
"""The way to an equilibrium without regularisation, through the inside of the simplex.

A = P - 1/2 is antisymmetric, so the linear program of the equilibrium is its own dual:
one policy x and its slack s = t - A x say everything, and t = x.s is the gap. The
central path has x_i s_i = t / N for every action i. A step follows the curve on which
all products shrink alike by its Taylor series, each of whose terms is one more solution
of one N x N linear system: docs/math.md (58) to (61).

The step is written for numpy's arrays and for jax's: `follow` solves one game by
LAPACK, with nothing to compile, `follow_many` games of one size in one program.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.linalg import lapack

from nlhf_jax.games.matrices import Matrix

# A term of the series costs N^2, the factors that all terms share N^3.
MANY_ACTIONS, FEW_TERMS, MANY_TERMS = 200, 4, 8
SOLVED = 1e-15  # the gap, in units of the largest margin; rounding rules below
MOST_STEPS = 100
CENTRAL = 1e-2  # least x_i s_i of a step's end, in units of their mean
# Shares of the way to gap 0 that a step tries; it takes the first that stays inside.
SHARES = np.append(1 - np.geomspace(1e-3, 0.8, 28), [0.1, 0.03, 0.01, 0.0])
STAYS = SHARES == 0
SHORT_STEP, CENTRING = 0.1, 0.5  # after so short a step the next one aims at the middle
LEAST_START = 1e-3  # gap of the start where the uniform policy is an equilibrium

Vector = Float[np.ndarray | Array, "N"]
Number = Float[np.ndarray | Array, ""] | float
Margins = Float[np.ndarray | Array, "N N"]
Solve = Callable[[Vector], Vector]


class Point(NamedTuple):
    """A point inside: policy x > 0 and slack s > 0.

    Attributes:
      policy_N: x, which sums to 1.
      slack_N: s = t - A x; t bounds what any action wins against x.
      gap: t = x.s.
      is_played_N: whether an action's slack vanishes faster than its weight, as it does
        where an equilibrium plays it.
      share: how far the step before went, in [0, 1].
    """

    policy_N: Vector
    slack_N: Vector
    gap: Number
    is_played_N: Bool[np.ndarray | Array, "N"]
    share: Number


def num_terms(num_actions: int) -> int:
    """Returns how many terms of the series pay in a game of so many actions."""
    return FEW_TERMS if num_actions < MANY_ACTIONS else MANY_TERMS


def begin(margin_NN: Margins) -> Point:
    """Returns the uniform policy, with a gap of twice what an action wins against it.

    Args:
      margin_NN: A, antisymmetric, with entries of at most 1.
    """
    xp = margin_NN.__array_namespace__()
    size = margin_NN.shape[0]
    policy_N = xp.full(size, 1 / size, dtype=margin_NN.dtype)
    wins_N = margin_NN @ policy_N
    gap = 2 * xp.maximum(xp.abs(wins_N).max(), LEAST_START)
    return Point(policy_N, gap - wins_N, gap, policy_N > 0, gap / gap)


def series(
    margin_NN: Margins,
    point: Point,
    centring: Number,
    solve: Solve,
    num_terms: int,
) -> tuple[list[Vector], list[Vector]]:
    """Returns the Taylor coefficients 1 to K of policy and slack; docs/math.md (60).

    They are those of the curve x_i(u) s_i(u) = (1 - u) x_i s_i + u c t / N for u in
    [0, 1], on which t(u) = (1 - u (1 - c)) t.

    Args:
      margin_NN: A.
      point: where the curve starts.
      centring: c in [0, 1]; 0 keeps the proportions of the products, 1 the gap.
      solve: r -> (diag(s / x) - A)^-1 r.
      num_terms: K.
    """
    policy_N, slack_N, gap = point[:3]
    falls, slope_N = (1 - centring) * gap, slack_N / policy_N
    right_N = centring * gap / policy_N.shape[0] / policy_N - slack_N + falls
    policies, slacks = [], []
    for _ in range(num_terms):
        change_N = solve(right_N)
        # The system says what A times it is. A product would read all of A, and small
        # ones on all cores wait for each other on a busy machine.
        wins_N = slope_N * change_N - right_N
        # The sum is 0 but for rounding, which would add up.
        excess = change_N.sum()
        policies.append(change_N - excess * policy_N)
        slacks.append(excess * (gap - slack_N) - wins_N - falls)
        falls = 0.0  # the gap is linear in u
        if len(policies) < num_terms:
            pairs = zip(policies, reversed(slacks), strict=True)
            right_N = -sum(first * second for first, second in pairs) / policy_N
    return policies, slacks


def advance(
    margin_NN: Margins,
    point: Point,
    factorise: Callable[[Vector], Solve],
    num_terms: int,
) -> Point:
    """Returns the point after a step.

    Args:
      margin_NN: A.
      point: where the step starts.
      factorise: d -> (r -> (diag(d) - A)^-1 r).
      num_terms: K of the series.
    """
    xp = margin_NN.__array_namespace__()
    policy_N, slack_N, gap = point[:3]
    centring = xp.where(point.share < SHORT_STEP, CENTRING, 0.0)
    solve = factorise(slack_N / policy_N)
    policies, slacks = series(margin_NN, point, centring, solve, num_terms)
    power_JK = _powers(num_terms)
    path_JN = policy_N[None] + power_JK @ xp.asarray(policies)
    slack_JN = slack_N[None] + power_JK @ xp.asarray(slacks)
    gap_J = (1 - SHARES * (1 - centring)) * gap
    least_J = (path_JN * slack_JN).min(axis=1)
    is_central_J = least_J > CENTRAL / policy_N.shape[0] * gap_J
    chosen = (is_central_J & (path_JN.min(axis=1) > 0) | STAYS).argmax()
    policies[0], slacks[0] = policies[0] / policy_N, slacks[0] / slack_N
    return Point(
        path_JN[chosen],
        slack_JN[chosen],
        gap_J[chosen],
        xp.abs(policies[0]) < xp.abs(slacks[0]),
        xp.asarray(SHARES)[chosen],
    )


@functools.cache
def _powers(num_terms: int) -> Float[np.ndarray, "J K"]:
    return SHARES[:, None] ** np.arange(1, num_terms + 1)


def follow(margin_NN: Matrix) -> Iterator[Point]:
    """Yields the points after each step, until the gap is 1e-15 or no step helps.

    Args:
      margin_NN: A, antisymmetric, with entries of at most 1.
    """
    factorise = functools.partial(_factorise, margin_NN)
    point, before = begin(margin_NN), 1.0
    for _ in range(MOST_STEPS):
        if point.gap <= SOLVED or _is_stuck(point, before):
            return
        before = point.share
        point = advance(margin_NN, point, factorise, num_terms(len(margin_NN)))
        yield point


def _is_stuck(point: Point, before: Number) -> Bool[Array, ""] | np.bool_:
    """Whether the last step led nowhere though it aimed at the middle."""
    return (point.share == 0) & (before < SHORT_STEP)


def _factorise(margin_NN: Matrix, diagonal_N: Vector) -> Solve:
    # LAPACK reads by columns, so it is given the transpose, diag(d) + A by rows.
    system_NN = margin_NN.copy()
    system_NN.ravel()[:: len(diagonal_N) + 1] += diagonal_N
    factors_NN, pivot_N, _ = lapack.dgetrf(system_NN.T, overwrite_a=True)
    return lambda right_N: lapack.dgetrs(factors_NN, pivot_N, right_N)[0]


def _end(margin_NN: Float[Array, "N N"], gap: float) -> Point:
    def factorise(diagonal_N):
        factors = jax.scipy.linalg.lu_factor(jnp.diag(diagonal_N) - margin_NN)
        return functools.partial(jax.scipy.linalg.lu_solve, factors)

    def is_going(carry):
        point, before, number = carry
        return (point.gap > gap) & ~_is_stuck(point, before) & (number < MOST_STEPS)

    def body(carry):
        point, _, number = carry
        terms = num_terms(margin_NN.shape[0])
        after = advance(margin_NN, point, factorise, terms)
        return after, point.share, number + 1

    start = begin(margin_NN)
    return jax.lax.while_loop(is_going, body, (start, start.share, 0))[0]


@jax.jit
def follow_many(
    margin_BNN: Float[Array, "B N N"], gap: Float[Array, ""] | float = 1e-11
) -> Point:
    """Returns where the paths of B games of one size end, leaves with a first axis B.

    Args:
      margin_BNN: the games' A in float64, entries of at most 1.
      gap: where a path may end, in the units of A.
    """
    return jax.vmap(_end, in_axes=(0, None))(margin_BNN, gap)
