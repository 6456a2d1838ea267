# SPDX-License-Identifier: Apache-2.0
"""Where each algorithm ends on games whose equilibrium is known, trained by sampling.

A tabular model of a few tokens plays a matrix game: its responses are the actions. The
rollout, the judging, the loss and the update are those that train a large model; only
then is the policy enumerated and its distance to the equilibrium computed exactly. G is
the number of games, S the seeds, K the records, N the responses.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from nlhf_jax import train_step
from nlhf_jax.evaluation import exact
from nlhf_jax.evaluation.laboratory import (
    ConvergenceSettings,
    Laboratory,
    algorithms,
    make_laboratory,
)
from nlhf_jax.games import solutions
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import POLICY, REFERENCE, Algorithm

# By whether gaps are those of the game at tau.
REFERENCE_ROWS = {True: "the reference", False: "the reference, no regularisation"}
FOUND = 1e-9  # last move of Newton's method, nats, where a fixed point was found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One algorithm on one game.

    Gaps are duality gaps of the game at tau, or without regularisation for an algorithm
    that pursues its equilibrium.

    Attributes:
      algorithm: its name in the registry, and what is special about the run.
      game: kind of the game.
      start: gap of the reference, where training begins.
      steps_K: updates done at each record, 0 first.
      gaps_SK: gap of each seed then.
      policies_SN: each seed's policy at the end.
      theory: gap of the algorithm's own fixed point; NaN where none was found.
      fixed_point_N: that policy.
      is_regularised: whether the gaps are those of the game at tau.
    """

    algorithm: str
    game: str
    start: float
    steps_K: Int[np.ndarray, "K"]
    gaps_SK: Float[np.ndarray, "S K"]
    policies_SN: Float[np.ndarray, "S N"]
    theory: float
    fixed_point_N: Float[np.ndarray, "N"]
    is_regularised: bool

    @property
    def end(self) -> float:
        """Mean of the gaps at the end, over seeds."""
        return float(self.gaps_SK[:, -1].mean())

    @property
    def spread(self) -> float:
        """Standard error of one run: the standard deviation over seeds."""
        return float(self.gaps_SK[:, -1].std(ddof=1))


def train(
    lab: Laboratory, algorithm: Algorithm, key: jax.Array
) -> Float[np.ndarray, "G S K N"]:
    """Trains one run per game and seed, all in one compiled scan of `train_step`.

    Returns the policies at the recorded steps, the reference first.
    """
    settings = lab.settings
    optimizer = optax.sgd(
        optax.cosine_decay_schedule(settings.learning_rate, settings.train_steps)
    )
    reference = jax.tree.map(jnp.asarray, lab.reference)
    start = train_step.init_state(reference, algorithm, optimizer)
    prompts = tabular.empty_prompts(settings.batch_size)

    def policy_of(state):
        params = state.param_sets[POLICY]
        return tabular.response_policy(lab.model, params, settings.length)

    def run(preference_NN, reward_N, key):
        judge = table_judge(lab.model, preference_NN, reward_N)
        step = train_step.make_train_step(
            lab.model, algorithm, judge, optimizer, max_length=settings.length
        )

        def advance(state, _):
            return step(state, {REFERENCE: reference}, prompts, key)[0], None

        def record(state, _):
            period = settings.train_steps // settings.num_records
            state, _ = jax.lax.scan(advance, state, length=period)
            return state, policy_of(state)

        _, policies_KN = jax.lax.scan(record, start, length=settings.num_records)
        return jnp.concatenate([policy_of(start)[None], policies_KN])

    over_seeds = jax.vmap(run, in_axes=(None, None, 0))
    policies_GSKN = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None)))(
        jnp.asarray(np.stack([game.preference_NN for game in lab.games.values()])),
        jnp.asarray(np.stack([game.reward_N for game in lab.games.values()])),
        jax.random.split(key, settings.num_seeds),
    )
    return np.asarray(policies_GSKN, np.float64)


def duality_gap(
    preference_NN: Float[np.ndarray, "N N"],
    reference_N: Float[np.ndarray, "N"],
    tau: float,
    policy_N: Float[np.ndarray, "N"],
) -> float:
    """Returns max P_tau(pi' > pi) - min P_tau(pi > pi'): twice the regularised gap."""
    policy_N = policy_N / policy_N.sum()  # float32 sums to one only nearly
    if tau == 0:
        return 2 * solutions.exploitability(preference_NN, policy_N)
    return 2 * solutions.regularised_gap(preference_NN, reference_N, tau, policy_N)


def measure(
    settings: ConvergenceSettings,
    extra: Mapping[str, Mapping[str, typing.Any]] | None = None,
    seed: int = 0,
) -> list[Outcome]:
    """Trains every registered algorithm on a game of each kind and judges the ends.

    Args:
      settings: of the training.
      extra: algorithm -> parameter -> value, for parameters besides tau and beta.
      seed: of the samples; games and reference are always the same.

    Raises:
      UserError: settings out of range, or an algorithm lacks a value.
    """
    lab = make_laboratory(settings)
    return [
        outcome
        for name, algorithm in algorithms(settings, extra or {}).items()
        for outcome in measure_algorithm(lab, name, algorithm, seed)
    ]


def measure_algorithm(
    lab: Laboratory, name: str, algorithm: Algorithm, seed: int
) -> list[Outcome]:
    """Returns the outcomes of one algorithm, in the order of the laboratory's games."""
    policies_GSKN = train(lab, algorithm, jax.random.key(seed))
    points = exact.fixed_points(
        lab.model,
        algorithm,
        [(game.preference_NN, game.reward_N) for game in lab.games.values()],
        {REFERENCE: lab.reference},
        lab.reference,
        lab.settings.length,
        step=lab.settings.train_steps,
    )
    return [
        _judge(lab, name, algorithm, kind, policies_SKN, point)
        for kind, policies_SKN, point in zip(
            lab.games, policies_GSKN, points, strict=True
        )
    ]


def _judge(lab, name, algorithm, kind, policies_SKN, point) -> Outcome:
    fixed_point_N, move = point
    tau = lab.settings.tau if algorithm.is_regularised else 0.0
    gap = functools.partial(
        duality_gap, lab.games[kind].preference_NN, lab.reference_N, tau
    )
    return Outcome(
        algorithm=name,
        game=kind,
        start=gap(lab.reference_N),
        steps_K=np.linspace(
            0, lab.settings.train_steps, lab.settings.num_records + 1, dtype=int
        ),
        gaps_SK=np.array([[gap(one_N) for one_N in run] for run in policies_SKN]),
        policies_SN=policies_SKN[:, -1],
        theory=gap(fixed_point_N) if move < FOUND else math.nan,
        fixed_point_N=fixed_point_N,
        is_regularised=algorithm.is_regularised,
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns the outcomes as a Markdown table, a line per algorithm.

    A cell is: mean gap at the end +- standard error of that mean (gap of the
    algorithm's own fixed point).
    """
    kinds = list(dict.fromkeys(outcome.game for outcome in outcomes))
    lines: dict[str, list[str]] = {}
    for outcome in outcomes:
        where = REFERENCE_ROWS[outcome.is_regularised]
        if len(lines.setdefault(where, [])) < len(kinds):
            lines[where].append(_figure(outcome.start))
    for outcome in outcomes:
        error = outcome.spread / math.sqrt(len(outcome.policies_SN))
        cell = f"{outcome.end:.5f} ± {error:.5f} ({_figure(outcome.theory)})"
        lines.setdefault(outcome.algorithm, []).append(cell)
    rows = [["algorithm", *kinds], ["---"] * (len(kinds) + 1)]
    rows += [[name, *cells] for name, cells in lines.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _figure(gap: float) -> str:
    if math.isnan(gap):
        return "?"
    return f"{gap:.5f}" if gap > 1e-8 else "0"


def records(outcomes: Sequence[Outcome]) -> list[dict[str, typing.Any]]:
    """Returns the outcomes in full precision for JSON; what is not finite is None."""
    return [
        {
            "algorithm": outcome.algorithm,
            "game": outcome.game,
            "start": outcome.start,
            "end": outcome.end,
            "spread": outcome.spread,
            "num_seeds": len(outcome.policies_SN),
            "theory": None if math.isnan(outcome.theory) else outcome.theory,
            "fixed_point": outcome.fixed_point_N.tolist(),
            "steps": outcome.steps_K.tolist(),
            "gaps": outcome.gaps_SK.tolist(),
        }
        for outcome in outcomes
    ]
