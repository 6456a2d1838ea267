# SPDX-License-Identifier: Apache-2.0
"""What the tabular solvers cost against bare products, numpy loops and other libraries.

Iterations run inside one compiled loop, as the solvers run them. Other libraries find
the equilibrium without regularisation, each in a process of its own with a time limit.
"""

import argparse
import dataclasses
import functools
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import games_leads
from benchmarks.common import (
    Counted,
    Figure,
    interleaved,
    machine,
    write_results,
)
from nlhf_jax.games import matrices, methods, solutions, solvers

TAU, STEP_SIZE = 0.1, 1.0
TOLERANCE = 1e-10
START_SECONDS = 60  # for a fresh process to import another library


@dataclasses.dataclass(frozen=True)
class Size:
    """What is solved.

    Attributes:
      iterations: actions of a game -> iterations in one timed loop.
      num_games: games of three actions solved at once.
      num_steps: iterations of each of them.
      num_numpy: how many of them the numpy loop solves; its time is scaled up.
      num_actions: sizes of the game whose equilibrium is found; a library that cannot
        finish the first in time is given the next.
      limit_s: seconds a library may take for one equilibrium.
    """

    iterations: Mapping[int, int]
    num_games: int
    num_steps: int
    num_numpy: int
    num_actions: tuple[int, ...]
    limit_s: float


SIZES = {
    "tiny": Size({8: 3, 16: 3}, 4, 10, 2, (12, 6), 60.0),
    "full": Size(
        {100: 5000, 1000: 500, 10_000: 3}, 1000, 1000, 10, (1000, 600, 300, 100), 60.0
    ),
}


def random_matrix(size: int, dtype: type = np.float64) -> np.ndarray:
    """Returns a random preference matrix, without copies in another precision."""
    entry_NN = np.random.default_rng(size).random((size, size), dtype)
    return dtype(0.5) + (entry_NN - entry_NN.T) / dtype(2)


def numpy_nash_md(
    preference_NN: np.ndarray, log_reference_N: np.ndarray, num_steps: int
) -> np.ndarray:
    """Returns the logits after Nash-MD steps written in plain numpy."""
    weight, logits_N = STEP_SIZE * TAU, log_reference_N
    for _ in range(num_steps):
        mixture_N = (1 - weight) * logits_N + weight * log_reference_N
        share_N = np.exp(mixture_N - mixture_N.max())
        value_N = preference_NN @ (share_N / share_N.sum())
        logits_N = mixture_N + STEP_SIZE * (value_N - 0.5)
    return logits_N


def iterate_parts(
    size: int, num_steps: int
) -> tuple[dict[str, Callable[[], Any]], list[Counted]]:
    """Returns what is timed for one size: `num_steps` iterations of each kind."""
    matrix_NN = random_matrix(size, np.float32)
    reference_N = np.full(size, 1 / size, np.float32)
    log_reference_N = np.log(reference_N)
    knobs = methods.Knobs(jnp.float32(STEP_SIZE))

    def nash_md(game, iterate):
        def body(iterate, _):
            return methods.nash_md(game, iterate, knobs), None

        return jax.lax.scan(body, iterate, length=num_steps)[0].logits_N

    def product(matrix_NN, vector_N):
        def body(vector_N, _):
            return matrix_NN @ vector_N, None

        return jax.lax.scan(body, vector_N, length=num_steps)[0]

    game = methods.Game(
        jnp.asarray(matrix_NN), jnp.asarray(reference_N), jnp.float32(TAU)
    )
    # Powers of this matrix neither grow nor vanish.
    scaled_NN = game.preference_NN * (2 / size)
    iteration, bare = Counted(f"nash_md_{size}", nash_md), Counted(f"p_{size}", product)
    one = Counted(f"nash_md_once_{size}", lambda *args: methods.nash_md(*args).logits_N)
    once = Counted(f"p_once_{size}", jnp.matmul)
    begun = methods.begin(game, game.reference_N)
    parts = {
        "nash_md": functools.partial(iteration, game, begun),
        "product": functools.partial(bare, scaled_NN, game.reference_N),
        "nash_md calls": _repeated(one, num_steps, game, begun, knobs),
        "product calls": _repeated(once, num_steps, scaled_NN, game.reference_N),
        "numpy": functools.partial(
            numpy_nash_md, matrix_NN, log_reference_N, num_steps
        ),
    }
    return parts, [iteration, bare, one, once]


def _repeated(fn: Callable[..., Any], times: int, *args: Any) -> Callable[[], None]:
    def run():
        for _ in range(times):
            fn(*args)

    return run


def iteration_figures(size: Size, rounds: int) -> tuple[list[Figure], dict[str, int]]:
    """Returns ratios per number of actions, and how often each loop was compiled."""
    found, compilations = [], {}
    for actions, num_steps in size.iterations.items():
        parts, counted = iterate_parts(actions, num_steps)
        seconds = interleaved(parts, rounds)
        rows = (
            (
                "Nash-MD iteration / product, a call each",
                "nash_md calls",
                "product calls",
            ),
            ("Nash-MD iteration / product, in a loop", "nash_md", "product"),
            ("Nash-MD iteration / numpy's, in a loop", "nash_md", "numpy"),
        )
        goals = (1.5, 1.5, 1.0 if actions >= 1000 else None)
        for (name, above, below), goal in zip(rows, goals, strict=True):
            name = f"{name}, n = {actions}"
            found.append(Figure.of(name, seconds, [above], [below], goal))
        compilations |= {one.name: one.num_compilations for one in counted}
    return found, compilations


def batch_figure(size: Size, rounds: int) -> Figure:
    """Returns many small games in one call / a Python loop of numpy solves."""
    rng = np.random.default_rng(0)
    matrix_BNN = np.stack([matrices.random_game(rng, 3) for _ in range(size.num_games)])
    uniform_N = np.ones(3) / 3
    games = solvers.make_games(matrix_BNN, uniform_N, TAU)

    def together():
        run = {"step_size": STEP_SIZE, "num_steps": size.num_steps}
        return jax.block_until_ready(
            solvers.solve_many("nash_md", games, uniform_N, **run)
        )

    def in_a_loop():
        return [
            numpy_nash_md(matrix_NN, np.log(uniform_N), size.num_steps)
            for matrix_NN in matrix_BNN[: size.num_numpy]
        ]

    _agree(together().last_BN[: size.num_numpy], in_a_loop())
    seconds = interleaved({"together": together, "loop": in_a_loop}, rounds)
    share = size.num_numpy / size.num_games
    name = (
        f"{size.num_games} games x {size.num_steps} steps at once / numpy loop "
        f"(timed on {size.num_numpy})"
    )
    return Figure.of(name, seconds, ["together"], ["loop"], 1 / 50, share)


def _agree(policy_BN: jax.Array, logits: Sequence[np.ndarray]) -> None:
    known_BN = np.stack([solutions.normalise(logits_N) for logits_N in logits])
    np.testing.assert_allclose(policy_BN, known_BN, atol=1e-4)


def solve_with_nashpy(margin_NN: np.ndarray) -> Callable[[], np.ndarray]:
    """Returns nashpy's linear program for a zero-sum game, ready to run."""
    import nashpy

    game = nashpy.Game(margin_NN)
    return lambda: game.linear_program()[0]


def solve_with_open_spiel(margin_NN: np.ndarray) -> Callable[[], np.ndarray]:
    """Returns OpenSpiel's linear program for a zero-sum game, ready to run."""
    import pyspiel
    from open_spiel.python.algorithms import lp_solver

    game = pyspiel.create_matrix_game(margin_NN.tolist(), (-margin_NN).tolist())
    return lambda: np.ravel(lp_solver.solve_zero_sum_matrix_game(game)[0])


PEERS = {
    "nashpy": ("nashpy", solve_with_nashpy),
    "OpenSpiel": ("pyspiel", solve_with_open_spiel),
}


def _answer(pipe, name: str, num_actions: int) -> None:
    """Solves once in this process and sends (seconds, exploitability)."""
    matrix_NN = random_matrix(num_actions)
    solve = PEERS[name][1](matrix_NN - 0.5)
    pipe.send("ready")
    start = time.perf_counter()
    policy_N = solve()
    seconds = time.perf_counter() - start
    pipe.send((seconds, solutions.exploitability(matrix_NN, policy_N)))


def peer_seconds(name: str, num_actions: int, limit_s: float) -> float | None:
    """Returns how long a library takes for one equilibrium; None if over the limit."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_answer, args=(there, name, num_actions))
    worker.start()
    there.close()
    try:
        if not here.poll(START_SECONDS) or here.recv() != "ready":
            return None
        if not here.poll(limit_s):
            return None
        seconds, exploitability = here.recv()
    except EOFError:  # it raised, and said why
        return None
    finally:
        worker.kill()
        worker.join()
    return seconds if exploitability < 1e-6 else None


def equilibrium_seconds(num_actions: int) -> float:
    """Returns how long the regularised equilibrium takes, to 1e-10 and checked."""
    with jax.enable_x64(True):
        matrix_NN = random_matrix(num_actions)
        reference_N = np.full(num_actions, 1 / num_actions)
        game = solvers.make_game(matrix_NN, reference_N, TAU)
        start = time.perf_counter()
        policy_N = np.asarray(solvers.equilibrium(game, tolerance=TOLERANCE))
        seconds = time.perf_counter() - start
    answer_N = solutions.best_response(matrix_NN, reference_N, TAU, policy_N)
    assert np.abs(answer_N - policy_N).max() <= 2 * TOLERANCE
    return seconds


def equilibrium_figures(size: Size, rounds: int) -> tuple[list[Figure], list[str]]:
    """Returns ours / theirs per installed library, and what could not be measured."""
    found, notes = [], []
    for name, (module, _) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            notes.append(f"{name} is not installed: benchmarks/requirements-games.txt")
            continue
        for num_actions in size.num_actions:
            theirs = peer_seconds(name, num_actions, size.limit_s)
            if theirs is not None:
                break
            notes.append(
                f"{name} found no equilibrium of {num_actions} actions in "
                f"{size.limit_s:g} s"
            )
        else:
            continue
        equilibrium_seconds(num_actions)  # compiles
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            theirs = peer_seconds(name, num_actions, size.limit_s)
            if theirs is not None:
                seconds["theirs"].append(theirs)
                seconds["ours"].append(equilibrium_seconds(num_actions))
        if seconds["ours"]:
            title = f"equilibrium at tau to 1e-10 / {name}'s without tau"
            title += f", n = {num_actions}"
            found.append(Figure.of(title, seconds, ["ours"], ["theirs"], 0.1))
    return found, notes


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Returns {"figures": [Figure], "compilations": {...}, "notes": [...]}."""
    iterations, compilations = iteration_figures(size, rounds)
    equilibria, notes = equilibrium_figures(size, rounds)
    return {
        "figures": [*iterations, batch_figure(size, rounds), *equilibria],
        "compilations": compilations,
        "notes": notes,
    }


def no_figures(size: Size, rounds: int) -> dict[str, Any]:
    """Returns what `measure` does where it measures nothing."""
    del size, rounds
    return {"figures": [], "compilations": {}, "notes": []}


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints one line per figure, and writes the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for verdicts")
    parser.add_argument("--output", default="", help="JSON file for the results")
    parser.add_argument("--only", choices=("figures", "leads"), help="one half of it")
    options = parser.parse_args(words)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    described = machine()
    take = no_figures if options.only == "leads" else measure
    found = take(SIZES[options.size], options.rounds)
    leads, absent = [], []
    if options.only != "figures":
        leads, absent = games_leads.measure(
            games_leads.SIZES[options.size], options.rounds
        )
    print(f"machine: {described}")
    for row in (*found["figures"], *leads):
        print(row.line())
    for note in (*found["notes"], *absent):
        print(note)
    again = {name: n for name, n in found["compilations"].items() if n != 1}
    print(f"compilations per function and shape: {again or 1}, goal 1")
    write_results(
        options.output,
        {
            "size": options.size,
            "machine": described,
            "figures": [figure.record() for figure in found["figures"]],
            "leads": [lead.record() for lead in leads],
            "compilations": found["compilations"],
            "notes": [*found["notes"], *absent],
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
