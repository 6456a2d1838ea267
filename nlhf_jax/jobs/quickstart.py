# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline in one command: feedback, judges, policies, tournament, report."""

import sys
import time
from collections.abc import Callable, Mapping

from nlhf_jax.checks import UserError
from nlhf_jax.jobs import runs

Stage = Callable[..., None]


def quickstart(
    *,
    model_dir: str,
    sft: Stage,
    sft_from_scratch: Stage,
    collect: Stage,
    preference: Stage,
    reward: Stage,
    policies: Mapping[str, Stage],
    evaluate: Stage,
    from_scratch: bool = False,
) -> None:
    """Runs SFT, collects votes, trains both judges and every policy, and reports.

    Every stage is a job with its settings bound; it gets its folder and the folders of
    the stages before it. A stage that is complete is not run again, so the same
    command continues an interrupted run.

    Args:
      model_dir: folder of the whole run.
      sft: fine-tunes from the checkpoint that ships with the project.
      sft_from_scratch: fine-tunes from random parameters, with a new vocabulary.
      collect: writes comparisons labelled by sampled votes.
      preference: trains the preference model.
      reward: trains the reward model.
      policies: policy name -> training job, in the report's order.
      evaluate: plays the tournament and writes the report.
      from_scratch: take `sft_from_scratch` in place of `sft`.

    Raises:
      UserError: whatever a stage finds wrong with the user's input.
    """
    if not policies:
        raise UserError("policies must name at least one training job, got {}")
    folder = runs.open_folder(model_dir)
    where = {name: str(folder / name) for name in ("sft", "preference", "reward")}
    feedback = str(folder / "comparisons")
    checkpoints = {name: str(folder / "policies" / name) for name in policies}
    base = sft_from_scratch if from_scratch else sft
    stages: dict[str, Callable[[], None]] = {
        "SFT": lambda: base(model_dir=where["sft"]),
        "votes": lambda: collect(model_dir=feedback, policy_checkpoint=where["sft"]),
    }
    for kind, job in (("preference", preference), ("reward", reward)):
        stages[f"{kind} model"] = _judge_stage(job, where[kind], where["sft"], feedback)
    for name, job in policies.items():
        stages[name] = _policy_stage(job, checkpoints[name], where)
    stages["tournament"] = lambda: evaluate(
        model_dir=str(folder),
        policies={"SFT": where["sft"]} | checkpoints,
        reference_checkpoint=where["sft"],
        preference_checkpoint=where["preference"],
        reward_checkpoint=where["reward"],
        comparisons_dir=feedback,
    )
    _run_all(stages)
    _say(f"report: {folder / 'report.html'}")


def _judge_stage(job: Stage, model_dir: str, sft: str, feedback: str) -> Stage:
    return lambda: job(
        model_dir=model_dir,
        initial_checkpoint_path=sft,
        comparisons_dir=feedback,
    )


def _policy_stage(job: Stage, model_dir: str, where: Mapping[str, str]) -> Stage:
    return lambda: job(
        model_dir=model_dir,
        reference_checkpoint=where["sft"],
        preference_checkpoint=where["preference"],
        reward_checkpoint=where["reward"],
    )


def _run_all(stages: Mapping[str, Callable[[], None]]) -> None:
    start = time.monotonic()
    for number, (name, stage) in enumerate(stages.items(), start=1):
        _say(f"[{number}/{len(stages)}] {name}")
        began = time.monotonic()
        stage()
        now = time.monotonic()
        _say(f"    {name}: {now - began:.0f} s, {(now - start) / 60:.1f} min in all")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
