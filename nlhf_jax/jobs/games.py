# SPDX-License-Identifier: Apache-2.0
"""nlhf games: equilibria, algorithms and rankings of a game of preferences.

    nlhf games solve   GAME   its equilibria, with and without regularisation
    nlhf games compare GAME   how near the algorithms come, step by step
    nlhf games sweep   GAME   how near one of them comes under many settings
    nlhf games analyze GAME   rankings, cycles, what no score can say

GAME is a name (`nlhf games list`) or a file of win rates, .csv or .json.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from nlhf_jax.checks import UserError, check_choice, check_integer, check_range
from nlhf_jax.games import cycles, rankings, solutions
from nlhf_jax.games.catalogue import NAMED, find_game
from nlhf_jax.games.nash import solve_nash
from nlhf_jax.games.win_tables import FILLS, WinTable
from nlhf_jax.jobs import folders, game_sweeps

DEFAULT_TAU, LARGEST_TAU = 0.1, 1e6
MOST_NUMBERS = 10**8  # policies of all steps are kept
COMPARED = "nash_md,mirror_descent,extragradient,optimistic,mwu"
SHOWN_CYCLES = 5


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"games: {message} (nlhf games --help)")


def main(words: Sequence[str]) -> int:
    """Equilibria, algorithms and rankings of a game of preferences, or of win rates.

    Returns the exit code.

    Raises:
      UserError: an unknown command or flag, a value out of range, or a game that is
        none.
    """
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise UserError(f"{flag} is given twice")
    options = _parser().parse_args(list(words))
    if options.command == "list":
        for name, (players, _) in NAMED.items():
            print(f"{name}: {', '.join(players)}")
        return 0
    table = find_game(
        options.game, cells=options.cells, totals=options.totals, fill=options.fill
    )
    found, show = COMMANDS[options.command](table, options)
    if options.json:
        print(json.dumps(found, allow_nan=False))
    else:
        show()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nlhf games",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the named games")
    for name in COMMANDS:
        command = commands.add_parser(
            name, help=COMMANDS[name].__doc__, allow_abbrev=False
        )
        command.add_argument("game", help="a name, or a .csv or .json file")
        command.add_argument("--json", action="store_true", help="full precision")
        command.add_argument(
            "--cells", default="preference", help="preference or wins (counts)"
        )
        command.add_argument("--totals", default="", help="table of games played")
        command.add_argument(
            "--fill", default="", help=f"for pairs that never met: {', '.join(FILLS)}"
        )
        if name == "analyze":
            command.add_argument("--alpha", type=float, default=10.0, help="alpha-rank")
            continue
        command.add_argument(
            "--reference", default="uniform", help="mu: uniform, or p1,p2,..."
        )
        if name == "sweep":
            game_sweeps.add_flags(command, DEFAULT_TAU)
            continue
        command.add_argument("--tau", type=float, default=DEFAULT_TAU, help="of the KL")
        if name == "compare":
            command.add_argument("--methods", default=COMPARED, help=_method_names())
            command.add_argument("--steps", type=int, default=1000)
            command.add_argument("--step_size", type=float, default=None)
            command.add_argument("--plot", default="", help="PNG file to write")
    return parser


def _method_names() -> str:
    from nlhf_jax.games.methods import ALIASES, METHODS

    return f"by commas: {', '.join(METHODS)}; or {', '.join(ALIASES)}"


Answer = tuple[dict[str, Any], Callable[[], None]]


def solve(table: WinTable, options: argparse.Namespace) -> Answer:
    """Equilibria with and without regularisation."""
    tau = check_range("tau", options.tau, 0.0, LARGEST_TAU, low_open=True)
    reference_N = read_reference(options.reference, table.names)
    nash_N, is_unique = solve_nash(table.preference_NN)
    policy_N = solutions.regularised_nash(table.preference_NN, reference_N, tau)
    found = {
        "names": list(table.names),
        "policy": nash_N.tolist(),
        "value": 0.5,
        "exploitability": solutions.exploitability(table.preference_NN, nash_N),
        "unique": is_unique,
        "tau": tau,
        "reference": reference_N.tolist(),
        "regularised_policy": policy_N.tolist(),
        "regularised_gap": solutions.regularised_gap(
            table.preference_NN, reference_N, tau, policy_N
        ),
        "regularised_exploitability": solutions.exploitability(
            table.preference_NN, policy_N
        ),
        "kl_to_reference": solutions.kl(policy_N, reference_N),
    }

    def show() -> None:
        rows = sorted(
            zip(table.names, nash_N, policy_N, strict=True), key=lambda row: -row[1]
        )
        several = ", of largest entropy among several, or undecided (docs/games.md)"
        several = "" if found["unique"] else several
        print_table(
            ("", f"Nash{several}", f"Nash at tau {tau:g}"),
            [(name, f"{p:.6f}", f"{q:.6f}") for name, p, q in rows],
        )
        print(f"value 0.5, exploitability {found['exploitability']:.3g}")
        print(
            f"at tau {tau:g}: gap {found['regularised_gap']:.3g}, exploitability "
            f"{found['regularised_exploitability']:.6f}, KL to the reference "
            f"{found['kl_to_reference']:.6f} nats"
        )

    return found, show


@dataclasses.dataclass(frozen=True)
class Run:
    """One method's way: policies, gaps and KL(equilibrium, policy) after each step."""

    path_TN: np.ndarray
    gap_T: np.ndarray
    divergence_T: np.ndarray


def compare(table: WinTable, options: argparse.Namespace) -> Answer:
    """Gaps of several algorithms by step."""
    import jax

    from nlhf_jax.games.methods import find_method

    tau = check_range("tau", options.tau, 0.0, LARGEST_TAU, low_open=True)
    num_steps = check_integer("steps", options.steps, 1)
    check_range("steps", num_steps, 1, MOST_NUMBERS // len(table.names))
    methods = [name.strip() for name in options.methods.split(",")]
    recipes = {name: find_method(name) for name in methods}
    target = folders.plot_path(options.plot) if options.plot else None
    reference_N = read_reference(options.reference, table.names)
    nash_N = solutions.regularised_nash(table.preference_NN, reference_N, tau)
    with jax.enable_x64(True):
        runs = {
            method: _run(table, method, reference_N, tau, nash_N, options)
            for method in recipes
        }
    bounds = {
        "8 / (tau^2 (T + 1))": 8 / (tau**2 * np.arange(2, num_steps + 2)),
        "1 / (2 tau^2 (T + 1))": 1 / (2 * tau**2 * np.arange(2, num_steps + 2)),
    }
    if target:
        _plot(target, table, runs, bounds, nash_N)
    found = {
        "names": list(table.names),
        "tau": tau,
        "reference": reference_N.tolist(),
        "equilibrium": nash_N.tolist(),
        "methods": {
            name: {
                "goes_to": recipes[name].ends,
                "policy": run.path_TN[-1].tolist(),
                "gap": run.gap_T.tolist(),
                # JSON has no infinity: null where an action's weight is lost.
                "kl_from_equilibrium": [
                    x if np.isfinite(x) else None for x in run.divergence_T.tolist()
                ],
            }
            for name, run in runs.items()
        },
    }

    def show() -> None:
        powers = (10**k for k in range(1, 9))
        steps = sorted({1, num_steps, *(step for step in powers if step < num_steps)})
        rows = [
            (
                name,
                *(f"{max(run.gap_T[step - 1], 0):.3g}" for step in steps),
                recipes[name].ends,
            )
            for name, run in runs.items()
        ]
        print_table(("gap after steps", *map(str, steps), "goes to"), rows)
        print(
            f"gap: what the best policy wins above 1/2 at tau {tau:g}, less its KL; a "
            "method that goes elsewhere keeps one"
        )
        if options.plot:
            print(f"figure: {options.plot}")

    return found, show


def _run(table, method, reference_N, tau, nash_N, options) -> Run:
    from nlhf_jax.games import solvers

    game = solvers.make_game(table.preference_NN, reference_N, tau)
    path_TN = np.asarray(
        solvers.solve(
            method,
            game,
            reference_N,
            step_size=options.step_size,
            num_steps=options.steps,
        )
    )
    gap_T = [
        solutions.regularised_gap(table.preference_NN, reference_N, tau, policy_N)
        for policy_N in path_TN
    ]
    # A policy that has lost an action's whole weight is infinitely far.
    with np.errstate(divide="ignore"):
        divergence_T = [solutions.kl(nash_N, policy_N) for policy_N in path_TN]
    return Run(path_TN, np.array(gap_T), np.array(divergence_T))


def _plot(target, table: WinTable, runs: dict[str, Run], bounds, nash_N) -> None:
    from nlhf_jax.evaluation import game_plots, plots

    figure = game_plots.convergence_figure(
        {name: run.gap_T for name, run in runs.items()},
        {name: run.divergence_T for name, run in runs.items()},
        bounds if "nash_md" in runs else {},
        paths={name: run.path_TN for name, run in runs.items()},
        names=table.names,
        nash_N=nash_N,
    )
    plots.save_png(figure, target)


def sweep(table: WinTable, options: argparse.Namespace) -> Answer:
    """Gaps of one algorithm under many taus and step sizes at once."""
    reference_N = read_reference(options.reference, table.names)
    runs = game_sweeps.run_all(table, options, reference_N)
    found = {
        "names": list(table.names),
        "reference": reference_N.tolist(),
        "method": options.method,
        "steps": options.steps,
        "runs": runs,
    }

    def show() -> None:
        rows = [
            (
                f"{run['tau']:g}",
                "usual" if run["step_size"] is None else f"{run['step_size']:g}",
                f"{max(run['gap'], 0):.3g}",
                f"{max(run['exploitability'], 0):.3g}",
            )
            for run in runs
        ]
        print_table(("tau", "step size", "gap at tau", "exploitability"), rows)
        print(f"{options.method}, after {options.steps} steps")

    return found, show


def analyze(table: WinTable, options: argparse.Namespace) -> Answer:
    """Rankings, cycles, and what no score can say."""
    preference_NN = table.preference_NN
    average = rankings.nash_averaging(preference_NN)
    columns = {
        "mean_win_rate": rankings.mean_win_rate(preference_NN),
        "elo": rankings.elo(preference_NN),
        "nash_weight": average.weight_N,
        "nash_skill": average.skill_N,
        "alpha_rank": rankings.alpha_rank(preference_NN, alpha=options.alpha),
    }
    winner = rankings.condorcet_winner(preference_NN)
    strict_B, cyclic_B = cycles.count_triples(preference_NN[None])
    examples = cycles.strongest_cycles(preference_NN, SHOWN_CYCLES)
    found = {
        "names": list(table.names),
        **{name: value_N.tolist() for name, value_N in columns.items()},
        "condorcet_winner": None if winner is None else table.names[winner],
        "num_strict_triples": int(strict_B[0]),
        "num_cyclic_triples": int(cyclic_B[0]),
        "cyclic_energy_share": cycles.cyclic_energy_share(preference_NN[None]),
        "strongest_cycles": [[table.names[i] for i in cycle] for cycle in examples],
    }

    def show() -> None:
        order = np.argsort(-columns["mean_win_rate"], kind="stable")
        rows = [
            (
                table.names[i],
                f"{columns['mean_win_rate'][i]:.3f}",
                f"{columns['elo'][i]:.0f}",
                f"{columns['nash_weight'][i]:.4f}",
                f"{columns['nash_skill'][i]:.4f}",
                f"{columns['alpha_rank'][i]:.4f}",
            )
            for i in order
        ]
        head = ("", "mean win rate", "Elo", "Nash weight", "Nash skill", "alpha-rank")
        print_table(head, rows)
        print(f"beats all others: {found['condorcet_winner'] or 'nobody'}")
        print(
            f"cycles: {found['num_cyclic_triples']} of {found['num_strict_triples']} "
            "triples without a tie"
        )
        for cycle in found["strongest_cycles"]:
            print(f"    {' > '.join((*cycle, cycle[0]))}")
        print(
            f"{found['cyclic_energy_share']:.1%} of the squared margins are no "
            "difference of scores"
        )

    return found, show


COMMANDS: dict[str, Callable[[WinTable, argparse.Namespace], Answer]] = {
    "solve": solve,
    "compare": compare,
    "sweep": sweep,
    "analyze": analyze,
}


def read_reference(text: str, names: Sequence[str]) -> np.ndarray:
    """Returns mu: "uniform", or one number above 0 for each name that sum to 1.

    Raises:
      UserError: another number of entries, one that is not above 0, or another sum.
    """
    size = len(names)
    if text == "uniform":
        return np.full(size, 1 / size)
    try:
        reference_N = np.array([float(part) for part in text.split(",")])
    except ValueError:
        check_choice("reference", text, ("uniform", "numbers separated by commas"))
        raise
    is_good = reference_N.shape == (size,) and (reference_N > 0).all()
    if not is_good or abs(reference_N.sum() - 1) > 1e-6:
        raise UserError(
            f"reference must be {size} numbers above 0 that sum to 1, got {text}"
        )
    return reference_N / reference_N.sum()


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns, the first to the left and numbers to the right."""
    from rich import box, console, table

    shown = table.Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(head):
        shown.add_column(name, justify="right" if index else "left")
    for row in rows:
        shown.add_row(*row)
    console.Console(highlight=False, markup=False).print(shown)
