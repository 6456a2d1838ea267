# SPDX-License-Identifier: Apache-2.0
"""How many times as long other ways take for the same game.

Both sides run once a round; a goal is met when the round in which we are least far
ahead meets it. A library that is not installed is named and left out.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog

from benchmarks.common import LEAST_ROUNDS, interleaved
from nlhf_jax.games import methods, nash, solutions, solvers

TAU, STEP_SIZE = 0.1, 1.0
EXPLOITABILITY = 1e-9  # of an equilibrium that counts as exact
THEIR_EXPLOITABILITY = 1e-6  # of theirs, by their own tolerances
READERS = 2  # threads that read a matrix
READINGS = 3  # iterations of ours for one reading of theirs


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
      exact: actions of a game -> how often it is solved in a round.
      num_actions: of the game that is iterated on.
      num_steps: iterations of ours in a round, and of numpy's.
      num_slow: those of the libraries, and of the runs at once.
      num_runs: runs at once on one game.
      largest: actions of the game whose reading takes the time.
    """

    exact: Mapping[int, int]
    num_actions: int
    num_steps: int
    num_slow: int
    num_runs: int
    largest: int


SIZES = {
    "tiny": Size({5: 2}, 6, 5, 3, 4, 16),
    "full": Size({100: 20, 1000: 1}, 100, 5000, 500, 64, 10_000),
}


@dataclasses.dataclass(frozen=True)
class Lead:
    """How many times as long the other side takes.

    Attributes:
      name: what is done, and by whom else.
      values: seconds of theirs / seconds of ours, of each round.
      goal: what the least of them should reach; None where there is no goal.
    """

    name: str
    values: tuple[float, ...]
    goal: float | None = None

    def verdict(self) -> str:
        """Returns "met", "missed", "too few rounds", or "" without a goal."""
        if self.goal is None:
            return ""
        if len(self.values) < LEAST_ROUNDS:
            return "too few rounds"
        return "met" if min(self.values) >= self.goal else "missed"

    def line(self) -> str:
        """Returns the lead as one line of text."""
        middle = statistics.median(self.values)
        low, high = min(self.values), max(self.values)
        text = f"{self.name}: {low:.2f} / {middle:.2f} / {high:.2f} x"
        if self.goal is None:
            return text
        return f"{text}, goal >= {self.goal:g}: {self.verdict()}"

    def record(self) -> dict[str, Any]:
        """Returns the lead for the results file."""
        return {
            "name": self.name,
            "min": min(self.values),
            "median": statistics.median(self.values),
            "max": max(self.values),
            "rounds": len(self.values),
            "goal": self.goal,
            "verdict": self.verdict(),
        }


def lead(
    name: str,
    seconds: Mapping[str, list[float]],
    theirs: str,
    goal: float | None = None,
    share: float = 1.0,
) -> Lead:
    """Returns the lead of "ours" before `theirs`.

    Args:
      name: of the row.
      seconds: side -> seconds of each round.
      theirs: the other side.
      goal: of the row.
      share: work of ours in a round / work of theirs.
    """
    rounds = zip(seconds[theirs], seconds["ours"], strict=True)
    return Lead(name, tuple(share * other / our for other, our in rounds), goal)


def random_matrix(size: int, dtype: type = np.float64) -> np.ndarray:
    """Returns a random preference matrix."""
    entry_NN = np.random.default_rng(size).random((size, size), dtype)
    return dtype(0.5) + (entry_NN - entry_NN.T) / dtype(2)


def linear_program(preference_NN: np.ndarray, method: str) -> np.ndarray:
    """Returns the equilibrium by SciPy: the largest v with P(p > y) >= v for all y."""
    size = len(preference_NN)
    found = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=np.hstack([-preference_NN.T, np.ones((size, 1))]),
        b_ub=np.zeros(size),
        A_eq=np.append(np.ones(size), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * size + [(None, None)],
        method=method,
    )
    return found.x[:size]


def exact_leads(size: Size, rounds: int) -> list[Lead]:
    """Returns leads before SciPy's linear programs, all of them in full."""
    found = []
    goals = {"highs": {100: 5.0, 1000: 10.0}, "highs-ipm": {1000: 4.0}}
    for actions, times in size.exact.items():
        matrix_NN = random_matrix(actions)
        sides = {"ours": nash.nash} | {
            method: functools.partial(linear_program, method=method) for method in goals
        }
        for side, solve in sides.items():
            allowed = EXPLOITABILITY if side == "ours" else THEIR_EXPLOITABILITY
            gap = solutions.exploitability(matrix_NN, solve(matrix_NN))
            assert gap <= allowed, f"{side} leaves {gap:g}"
        parts = {
            side: _repeated(solve, times, matrix_NN) for side, solve in sides.items()
        }
        seconds = interleaved(parts, rounds)
        for method, goal in goals.items():
            name = f"exact Nash, SciPy's {method} / ours, n = {actions}"
            found.append(lead(name, seconds, method, goal.get(actions)))
    return found


def _repeated(fn: Callable[..., Any], times: int, *args: Any) -> Callable[[], None]:
    def run():
        for _ in range(times):
            fn(*args)

    return run


def numpy_nash_md(preference_NN, start_N, num_steps):
    """Returns the policy after Nash-MD steps in plain numpy, from logarithms on."""
    log_reference_N = np.log(np.full(len(start_N), 1 / len(start_N)))
    weight, logits_N = STEP_SIZE * TAU, np.log(start_N)
    for _ in range(num_steps):
        mixture_N = (1 - weight) * logits_N + weight * log_reference_N
        share_N = np.exp(mixture_N - mixture_N.max())
        value_N = preference_NN @ (share_N / share_N.sum())
        logits_N = mixture_N + STEP_SIZE * (value_N - 0.5)
    return solutions.normalise(logits_N)


def torch_nash_md(preference_NN, start_N, num_steps):
    """Returns the same in torch, eagerly."""
    import torch

    matrix_NN, start_N = torch.from_numpy(preference_NN), torch.from_numpy(start_N)
    log_reference_N = torch.full_like(start_N, 1 / len(start_N)).log()
    weight, logits_N = STEP_SIZE * TAU, start_N.log()
    for _ in range(num_steps):
        mixture_N = (1 - weight) * logits_N + weight * log_reference_N
        value_N = matrix_NN @ torch.softmax(mixture_N, 0)
        logits_N = mixture_N + STEP_SIZE * (value_N - 0.5)
    return torch.softmax(logits_N, 0).numpy()


def open_spiel_dynamics(preference_NN, start_N, num_steps):
    """Returns the mean policy of OpenSpiel's projected replicator dynamics."""
    from open_spiel.python.algorithms import projected_replicator_dynamics as dynamics

    margin_NN = preference_NN - 0.5
    return dynamics.projected_replicator_dynamics(
        [margin_NN, -margin_NN], [start_N, start_N], prd_iterations=num_steps
    )[0]


LIBRARIES = {
    "torch": ("torch", torch_nash_md, None),
    "OpenSpiel's replicator dynamics": ("pyspiel", open_spiel_dynamics, 15.0),
}


@functools.partial(jax.jit, static_argnums=2)
def our_nash_md(
    game: methods.Game, begun: methods.Iterate, num_steps: int
) -> jax.Array:
    """Returns the policy after Nash-MD steps in one compiled loop.

    Each reads the matrix once; for where it begins it was read before.
    """
    knobs = methods.Knobs(STEP_SIZE)

    def body(_, iterate):
        return methods.nash_md(game, iterate, knobs)

    return jax.nn.softmax(jax.lax.fori_loop(0, num_steps, body, begun).logits_N)


def iteration_leads(size: Size, rounds: int) -> tuple[list[Lead], list[str]]:
    """Returns leads of one iteration in float64, and the libraries that are absent."""
    matrix_NN = random_matrix(size.num_actions)
    start_N = np.random.default_rng(1).dirichlet(np.ones(size.num_actions))
    uniform_N = np.full(size.num_actions, 1 / size.num_actions)
    game = solvers.make_game(matrix_NN, uniform_N, TAU)

    begun = methods.begin(game, jnp.asarray(start_N))

    def ours(num_steps):
        return jax.block_until_ready(our_nash_md(game, begun, num_steps))

    parts = {"ours": functools.partial(ours, size.num_steps)}
    rows = {"numpy": (numpy_nash_md, size.num_steps, 5.0)}
    notes = []
    for name, (module, fn, goal) in LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            notes.append(f"{name}: {module} is not installed")
        else:
            rows[name] = (fn, size.num_slow, goal)
    for name, (fn, num_steps, _) in rows.items():
        if fn is not open_spiel_dynamics:  # which is another method
            known_N = fn(matrix_NN, start_N, size.num_slow)
            np.testing.assert_allclose(ours(size.num_slow), known_N, atol=1e-9)
        parts[name] = functools.partial(fn, matrix_NN, start_N, num_steps)
    seconds = interleaved(parts, rounds)
    found = [
        lead(
            f"Nash-MD iteration, {name} / ours, n = {size.num_actions}",
            seconds,
            name,
            goal,
            size.num_steps / num_steps,
        )
        for name, (_, num_steps, goal) in rows.items()
    ]
    return found, notes


def runs_lead(size: Size, rounds: int) -> Lead:
    """Returns the lead of many runs on one game at once before a loop over them."""
    matrix_NN, num_runs = random_matrix(size.num_actions), size.num_runs
    uniform_N = np.full(size.num_actions, 1 / size.num_actions)
    start_BN = np.random.default_rng(1).dirichlet(uniform_N * 50, size=num_runs)
    start_BN = (start_BN + uniform_N) / 2
    runs = solvers.make_runs(matrix_NN, uniform_N, np.full(num_runs, TAU))

    def together():
        run = {"step_size": STEP_SIZE, "num_steps": size.num_slow}
        return jax.block_until_ready(
            solvers.solve_runs("nash_md", runs, start_BN, **run)
        )

    def in_a_loop():
        return np.stack(
            [numpy_nash_md(matrix_NN, one_N, size.num_slow) for one_N in start_BN]
        )

    np.testing.assert_allclose(together(), in_a_loop(), atol=1e-9)
    seconds = interleaved({"ours": together, "numpy": in_a_loop}, rounds)
    name = f"{num_runs} runs on one game, numpy loop / ours, n = {size.num_actions}"
    return lead(name, seconds, "numpy", 12.0)


def bandwidth_lead(size: Size, rounds: int) -> Lead:
    """Returns the share of the read bandwidth that an iteration of a large game has.

    The bandwidth is that of reading the same matrix, in float32, by the faster of two
    ways in that round: XLA's sum, and numpy's dot products in several threads.
    """
    num_actions = size.largest
    matrix_NN = random_matrix(num_actions, np.float32)
    uniform_N = jnp.full(num_actions, 1 / num_actions, jnp.float32)
    game = methods.Game(jnp.asarray(matrix_NN), uniform_N, jnp.float32(TAU))
    begun = methods.begin(game, uniform_N)
    rows = np.array_split(matrix_NN, READERS)
    total = jax.jit(jnp.sum)
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        parts = {
            "ours": lambda: jax.block_until_ready(our_nash_md(game, begun, READINGS)),
            "XLA": lambda: jax.block_until_ready(total(game.preference_NN)),
            "numpy": lambda: list(pool.map(lambda part: np.vdot(part, part), rows)),
        }
        seconds = interleaved(parts, rounds)
    seconds["read"] = [
        min(pair) for pair in zip(seconds["XLA"], seconds["numpy"], strict=True)
    ]
    name = f"share of read bandwidth, Nash-MD, n = {num_actions}"
    return lead(name, seconds, "read", 0.7, READINGS)


def measure(size: Size, rounds: int) -> tuple[list[Lead], list[str]]:
    """Returns all leads, and what could not be measured."""
    with jax.enable_x64(True):
        iterations, notes = iteration_leads(size, rounds)
        together = runs_lead(size, rounds)
    bandwidth = bandwidth_lead(size, rounds)
    found = [*exact_leads(size, rounds), *iterations, together, bandwidth]
    return found, notes
