# SPDX-License-Identifier: Apache-2.0
"""The convergence job: where every algorithm ends on games that are solved exactly."""

import json as json_text
from collections.abc import Mapping

from nlhf_jax.checks import LARGEST_SEED, check_range
from nlhf_jax.evaluation.convergence import measure, records, table
from nlhf_jax.evaluation.laboratory import ConvergenceSettings

DEFAULTS = ConvergenceSettings()


def convergence(
    *,
    tau: float = DEFAULTS.tau,
    beta: float = DEFAULTS.beta,
    step_size: float = DEFAULTS.step_size,
    decay: float = DEFAULTS.decay,
    train_steps: int = DEFAULTS.train_steps,
    batch_size: int = DEFAULTS.batch_size,
    num_seeds: int = DEFAULTS.num_seeds,
    vocab_size: int = DEFAULTS.vocab_size,
    length: int = DEFAULTS.length,
    num_records: int = DEFAULTS.num_records,
    extra: Mapping[str, Mapping[str, float]] | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Prints the duality gap at which each algorithm ends, by kind of game.

    Every registered algorithm trains a tabular model by sampling, through the step that
    trains language models. A cell is: gap at the end, mean over seeds and its standard
    error, then the gap of the algorithm's own fixed point, computed without sampling.

    Args:
      tau: strength of the KL to the reference, per nat, > 0.
      beta: weight of the reference in a mixed opponent, in [0, 1].
      step_size: s of the algorithms that regress to a step of mirror descent, in
        (0, 1 / tau].
      decay: of the average of past policies, in [0, 1].
      train_steps: updates.
      batch_size: responses of each speaker per update.
      num_seeds: runs that differ in nothing but their samples, at least 2.
      vocab_size: tokens.
      length: tokens of every response.
      num_records: times at which the gap is recorded, for `json`; divides train_steps.
        0 is the largest divisor up to 50.
      extra: algorithm -> parameter -> value, for parameters besides those.
      seed: of sampling.
      json: print everything in full precision as JSON, instead of the table.

    Raises:
      UserError: settings out of range, or an algorithm lacks a value.
    """
    settings = ConvergenceSettings(
        tau=tau,
        beta=beta,
        step_size=step_size,
        decay=decay,
        train_steps=train_steps,
        batch_size=batch_size,
        num_seeds=num_seeds,
        vocab_size=vocab_size,
        length=length,
        num_records=num_records,
    )
    outcomes = measure(settings, extra, int(check_range("seed", seed, 0, LARGEST_SEED)))
    print(json_text.dumps(records(outcomes)) if json else table(outcomes))
