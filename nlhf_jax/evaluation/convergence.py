# SPDX-License-Identifier: Apache-2.0
"""Where each algorithm ends on games whose equilibrium is known, trained by sampling.

A tabular model of a few tokens plays a matrix game: its responses are the actions. The
rollout, the judging, the loss and the update are those that train a large model; only
then is the policy enumerated and its distance to the equilibrium computed exactly. G is
the number of games, S the seeds, N the responses.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from nlhf_jax import train_step
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import UserError, check_choice, check_integer, check_range
from nlhf_jax.evaluation import exact
from nlhf_jax.games import matrices, solutions
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import POLICY, REFERENCE, Algorithm, LanguageModel, Params

# A seed with which the reference is far from every equilibrium.
GAMES_SEED, REFERENCE_SPREAD, REWARD_SPREAD, MARGIN = 9, 0.7, 0.7, 0.4
ANNEALED = ", beta to 0"  # what marks a second run of an algorithm, its beta annealed
FOUND = 1e-9  # last move of Newton's method, nats, where a fixed point was found


@dataclasses.dataclass(frozen=True)
class ConvergenceSettings:
    """How the algorithms are trained.

    Attributes:
      tau: strength of the KL to the reference, per nat, > 0.
      beta: weight of the reference in a mixed opponent, in [0, 1].
      train_steps: updates.
      batch_size: responses of each speaker per update.
      num_seeds: runs that differ in nothing but their samples, at least 2.
      learning_rate: peak step of plain gradient descent; it falls to 0 as a cosine.
      vocab_size: tokens.
      length: tokens of every response.
      num_records: times at which the gap is recorded; divides `train_steps`.
    """

    tau: float = 0.1
    beta: float = 0.25
    train_steps: int = 1500
    batch_size: int = 128
    num_seeds: int = 8
    learning_rate: float = 8.0
    vocab_size: int = 3
    length: int = 2
    num_records: int = 50

    def __post_init__(self):
        check_range("tau", self.tau, 0.0, low_open=True)
        check_range("beta", self.beta, 0.0, 1.0)
        check_integer("num_seeds", self.num_seeds, 2)
        check_range("learning_rate", self.learning_rate, 0.0, low_open=True)
        for name in ("train_steps", "batch_size", "num_records"):
            check_integer(name, getattr(self, name), 1)
        if self.train_steps % self.num_records:
            raise UserError(
                f"num_records must divide train_steps {self.train_steps}, "
                f"got {self.num_records}"
            )


@dataclasses.dataclass(frozen=True)
class Game:
    """A game over the responses of the model.

    Attributes:
      preference_NN: P(row preferred to column).
      reward_N: what a scalar judge says: the mean log-odds of being preferred to a
        response, over 4, so that a small difference of two rewards is the difference
        of preferences it stands for. In a Bradley-Terry game these are its scores,
        over 4 and up to a constant.
    """

    preference_NN: Float[np.ndarray, "N N"]
    reward_N: Float[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One algorithm on one game; gaps are duality gaps of the game at tau.

    Attributes:
      algorithm: its name in the registry, and what is special about the run.
      game: kind of the game.
      start: gap of the reference, where training begins.
      steps_K: updates done at each record, 0 first.
      gaps_SK: gap of each seed then.
      policies_SN: each seed's policy at the end.
      theory: gap of the algorithm's own fixed point; NaN where none was found.
      fixed_point_N: that policy.
    """

    algorithm: str
    game: str
    start: float
    steps_K: Int[np.ndarray, "K"]
    gaps_SK: Float[np.ndarray, "S K"]
    policies_SN: Float[np.ndarray, "S N"]
    theory: float
    fixed_point_N: Float[np.ndarray, "N"]

    @property
    def end(self) -> float:
        """Mean of the gaps at the end, over seeds."""
        return float(self.gaps_SK[:, -1].mean())

    @property
    def spread(self) -> float:
        """Standard error of one run: the standard deviation over seeds."""
        return float(self.gaps_SK[:, -1].std(ddof=1))


class Laboratory(typing.NamedTuple):
    """What all algorithms share: who speaks, where training begins, what is played."""

    model: LanguageModel
    reference: Params
    games: Mapping[str, Game]
    settings: ConvergenceSettings

    @property
    def reference_N(self) -> Float[np.ndarray, "N"]:
        """The reference as a policy of the games, in float64."""
        with jax.enable_x64(True):
            policy_N = tabular.response_policy(
                self.model, self.reference, self.settings.length
            )
            return np.asarray(policy_N)


def laboratory(settings: ConvergenceSettings) -> Laboratory:
    """Returns a tabular model with a random reference, and a game of each kind.

    Raises:
      UserError: more responses than can be enumerated.
    """
    model = tabular.tabular_model(settings.vocab_size, settings.length)
    reference = jax.tree.map(
        lambda leaf: REFERENCE_SPREAD * np.asarray(leaf, np.float64),
        model.init(jax.random.key(1)),
    )
    return Laboratory(
        model, reference, games(model.vocab_size**settings.length), settings
    )


def games(size: int, seed: int = GAMES_SEED) -> dict[str, Game]:
    """Returns a game of each kind: "cyclic", "bradley_terry" and "random".

    cyclic: responses on a circle in random order; each is preferred to the half that
    follows it by 0.9, so that no score explains anything. bradley_terry: normal
    rewards. random: independent uniform preferences.
    """
    rng = np.random.default_rng(seed)
    place_N = rng.permutation(size)
    ahead_NN = (place_N[None, :] - place_N[:, None]) % size
    wins_NN = np.sign((size / 2 - ahead_NN) * (ahead_NN > 0))
    preferences = {
        "cyclic": 0.5 + MARGIN * wins_NN,
        "bradley_terry": matrices.bradley_terry(REWARD_SPREAD * rng.normal(size=size)),
        "random": matrices.random_game(rng, size),
    }
    return {
        kind: Game(found, (np.log(found) - np.log(found.T)).mean(axis=1) / 4)
        for kind, found in preferences.items()
    }


def algorithms(
    settings: ConvergenceSettings, extra: Mapping[str, Mapping[str, typing.Any]]
) -> dict[str, Algorithm]:
    """Returns every registered algorithm, ready to train.

    An algorithm gets those of `tau` and `beta` that it has, and what `extra` says of
    it. One whose beta may be a schedule comes twice: with the fixed beta, and with one
    that falls from there to 0 in the first half of the training.

    Raises:
      UserError: an algorithm needs a parameter that nothing gives a value; `extra`
        names an unknown algorithm.
    """
    for name in extra:
        check_choice("algorithm", name, ALGORITHMS)
    made = {}
    for name, factory in ALGORITHMS.items():
        parameters = inspect.signature(factory).parameters
        common = {"tau": settings.tau, "beta": settings.beta}
        values = {k: v for k, v in common.items() if k in parameters}
        values |= dict(extra.get(name, {}))
        for parameter in parameters.values():
            if parameter.default is parameter.empty and parameter.name not in values:
                raise UserError(
                    f"{name} needs a value of {parameter.name}: "
                    f"--extra=\"{{'{name}': {{'{parameter.name}': ...}}}}\""
                )
        made[name] = factory(**values)
        if "beta" in parameters and _may_be_schedule(factory):
            made[name + ANNEALED] = factory(**values | {"beta": _falling(settings)})
    return made


def _may_be_schedule(factory) -> bool:
    hint = typing.get_type_hints(factory).get("beta")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(o) is collections.abc.Callable for o in options)


def _falling(settings: ConvergenceSettings):
    half = settings.train_steps / 2
    return lambda step: settings.beta * jnp.maximum(0.0, 1.0 - step / half)


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
    lab = laboratory(settings)
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
        _judge(lab, name, kind, policies_SKN, point)
        for kind, policies_SKN, point in zip(
            lab.games, policies_GSKN, points, strict=True
        )
    ]


def _judge(lab, name, kind, policies_SKN, point) -> Outcome:
    fixed_point_N, move = point
    gap = functools.partial(
        duality_gap, lab.games[kind].preference_NN, lab.reference_N, lab.settings.tau
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
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns the outcomes as a Markdown table, a line per algorithm.

    A cell is: mean gap at the end +- standard error of that mean (gap of the
    algorithm's own fixed point).
    """
    kinds = list(dict.fromkeys(outcome.game for outcome in outcomes))
    lines: dict[str, list[str]] = {"the reference": []}
    for outcome in outcomes:
        if len(lines["the reference"]) < len(kinds):
            lines["the reference"].append(_figure(outcome.start))
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
