# SPDX-License-Identifier: Apache-2.0
"""What the algorithms are compared on: a tabular model, its reference, three games.

N is the number of responses, which are the actions of the games.
"""

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import UserError, check_choice, check_integer, check_range
from nlhf_jax.games import matrices
from nlhf_jax.models import tabular
from nlhf_jax.types import Algorithm, LanguageModel, Params

# A seed with which the reference is far from every equilibrium.
GAMES_SEED, REFERENCE_SPREAD, REWARD_SPREAD, MARGIN = 9, 0.7, 0.7, 0.4
ANNEALED = ", beta to 0"  # what marks a second run of an algorithm, its beta annealed


COMMON = ("tau", "beta", "step_size", "decay")
# Few speakers, so that all they may say together can be enumerated.
SMALL = {"num_responses": 2, "num_comparators": 1}
MOST_RECORDS = 50
MOST_RESPONSES = 64  # fixed points are found by differences in every parameter at once


@dataclasses.dataclass(frozen=True)
class ConvergenceSettings:
    """How the algorithms are trained.

    Attributes:
      tau: strength of the KL to the reference, per nat, > 0.
      beta: weight of the reference in a mixed opponent, in [0, 1].
      step_size: s of the algorithms that regress to a step of mirror descent, > 0.
      decay: of the average of past policies, in [0, 1].
      train_steps: updates.
      batch_size: responses of each speaker per update.
      num_seeds: runs that differ in nothing but their samples, at least 2.
      learning_rate: peak step of plain gradient descent; it falls to 0 as a cosine.
      vocab_size: tokens.
      length: tokens of every response.
      num_records: times at which the gap is recorded; divides `train_steps`. 0 is the
        largest divisor up to 50.
    """

    tau: float = 0.1
    beta: float = 0.25
    step_size: float = 4.0
    decay: float = 0.9
    train_steps: int = 1500
    batch_size: int = 128
    num_seeds: int = 8
    learning_rate: float = 8.0
    vocab_size: int = 3
    length: int = 2
    num_records: int = 0

    def __post_init__(self):
        check_range("tau", self.tau, 0.0, low_open=True)
        check_range("beta", self.beta, 0.0, 1.0)
        check_range("step_size", self.step_size, 0.0, 1.0 / self.tau, low_open=True)
        check_range("decay", self.decay, 0.0, 1.0)
        check_integer("num_seeds", self.num_seeds, 2)
        check_range("learning_rate", self.learning_rate, 0.0, low_open=True)
        for name in ("train_steps", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        if not check_integer("num_records", self.num_records):
            choices = range(1, min(MOST_RECORDS, self.train_steps) + 1)
            largest = max(n for n in choices if self.train_steps % n == 0)
            object.__setattr__(self, "num_records", largest)
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


def make_laboratory(settings: ConvergenceSettings) -> Laboratory:
    """Returns a tabular model with a random reference, and a game of each kind.

    Raises:
      UserError: more responses than are compared exactly, 64.
    """
    check_integer("vocab_size", settings.vocab_size, 2)
    check_integer("length", settings.length, 1)
    # By logarithms: long before the power is too long to print.
    if settings.length * np.log(settings.vocab_size) > np.log(MOST_RESPONSES) + 1e-9:
        raise UserError(
            f"vocab_size ** length must be at most {MOST_RESPONSES}, got "
            f"{settings.vocab_size} ** {settings.length}"
        )
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

    An algorithm gets those of `tau`, `beta`, `step_size` and `decay` that it needs, as
    few responses and comparators as it works with, and what `extra` says of it. One
    whose beta may be a schedule comes twice: with the fixed beta, and with one that
    falls from there to 0 in the first half of the training.

    Raises:
      UserError: an algorithm needs a parameter that nothing gives a value; `extra`
        names an unknown algorithm.
    """
    for name in extra:
        check_choice("algorithm", name, ALGORITHMS)
    made = {}
    for name, factory in ALGORITHMS.items():
        parameters = inspect.signature(factory).parameters
        values = {
            k: getattr(settings, k)
            for k, parameter in parameters.items()
            if k in COMMON and parameter.default is parameter.empty
        } | {k: v for k, v in SMALL.items() if k in parameters}
        for parameter in extra.get(name, {}):
            check_choice(f"parameter of {name}", parameter, parameters)
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
