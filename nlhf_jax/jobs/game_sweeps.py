# SPDX-License-Identifier: Apache-2.0
"""nlhf games sweep: one method on one game under many settings at once.

All runs are one program, in which a step is one product of the game's matrix and the
matrix of their policies.
"""

import argparse
import itertools
from typing import Any

import numpy as np

from nlhf_jax.checks import UserError, check_integer, check_range
from nlhf_jax.games import solutions
from nlhf_jax.games.win_tables import WinTable

MOST_RUNS = 10_000
MOST_RUN_STEPS = 10**8  # of all runs together
LARGEST_TAU = 1e6


def add_flags(command: argparse.ArgumentParser, default_tau: float) -> None:
    """Adds what a sweep is told, besides the game and the reference."""
    command.add_argument("--method", default="nash_md", help="a name of `compare`")
    command.add_argument(
        "--taus", default=str(default_tau), help="t1,t2,...: of the KL"
    )
    command.add_argument(
        "--step_sizes", default="", help="s1,s2,...; usual if not given"
    )
    command.add_argument("--steps", type=int, default=1000)


def read_numbers(name: str, text: str) -> list[float]:
    """Returns numbers written with commas between them.

    Raises:
      UserError: a part that is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{name} must be numbers separated by commas, got {text!r}"
        ) from None


def run_all(
    table: WinTable, options: argparse.Namespace, reference_N: np.ndarray
) -> list[dict[str, Any]]:
    """Returns tau, step size, last policy, gap and exploitability of every run.

    The runs are all pairs of a tau and a step size; a step size of None is the usual
    one of the method at that tau.

    Raises:
      UserError: an unknown method, or a number that is none or out of range.
    """
    import jax

    from nlhf_jax.games import solvers

    check_integer("steps", options.steps, 1)
    taus = read_numbers("taus", options.taus)
    for tau in taus:
        check_range("taus", tau, 0.0, LARGEST_TAU)
    sizes = [None]
    if options.step_sizes:
        sizes = read_numbers("step_sizes", options.step_sizes)
    pairs = list(itertools.product(taus, sizes))
    check_range("number of runs", len(pairs), 1, MOST_RUNS)
    check_range("steps", options.steps, 1, MOST_RUN_STEPS // len(pairs))
    with jax.enable_x64(True):
        tau_B = np.array([tau for tau, _ in pairs])
        runs = solvers.make_runs(table.preference_NN, reference_N, tau_B)
        policy_BN = solvers.solve_runs(
            options.method,
            runs,
            reference_N,
            step_size=None
            if sizes[0] is None
            else np.array([size for _, size in pairs]),
            num_steps=options.steps,
        )
        gap_B = solvers.gaps(runs, policy_BN)
    return [
        {
            "tau": tau,
            "step_size": size,
            "policy": policy_N.tolist(),
            "gap": float(gap),
            "exploitability": solutions.exploitability(table.preference_NN, policy_N),
        }
        for (tau, size), policy_N, gap in zip(
            pairs, np.asarray(policy_BN), gap_B, strict=True
        )
    ]
