# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines as named stages, each a job that is skipped where it is complete."""

import sys
import time
from collections.abc import Callable, Mapping

from nlhf_jax.checks import UserError, check_choice

STARTS = ("sft", "reward")
Stage = Callable[..., None]


def first_stages(
    where: Mapping[str, str],
    feedback: str,
    *,
    sft: Stage | None,
    collect: Stage | None,
    preference: Stage,
    reward: Stage | None,
    judge_checkpoint: str = "",
    preference_starts_from: str = "sft",
) -> dict[str, Callable[[], None]]:
    """Returns SFT, votes and the judges, in the order they need each other.

    Args:
      where: "sft", "preference" and "reward" -> model folder.
      feedback: folder of the comparisons that `collect` writes.
      sft: fine-tunes the reference policy; None where it is in its folder already.
      collect: writes comparisons labelled by sampled votes; None where the judges'
        own data holds comparisons.
      preference: trains the preference model.
      reward: trains the reward model; None for none.
      judge_checkpoint: where the judges start; empty is the SFT policy.
      preference_starts_from: "sft", as the reward model, or "reward": the preference
        model goes on from the reward model.

    Raises:
      UserError: another `preference_starts_from`, or "reward" without one.
    """
    check_choice("preference_starts_from", preference_starts_from, STARTS)
    if preference_starts_from == "reward" and reward is None:
        raise UserError(
            "preference_starts_from 'reward' needs a reward stage, got None"
        )

    def judge(job: Stage, kind: str, start: str) -> Callable[[], None]:
        return lambda: job(
            model_dir=where[kind],
            initial_checkpoint_path=start,
            comparisons_dir=feedback if collect else "",
        )

    start = judge_checkpoint or where["sft"]
    first = where["reward"] if preference_starts_from == "reward" else start

    found: dict[str, Callable[[], None]] = {}
    if sft:
        found["SFT"] = lambda: sft(model_dir=where["sft"])
    if collect:
        found["votes"] = lambda: collect(
            model_dir=feedback, policy_checkpoint=where["sft"]
        )
    if reward:
        found["reward model"] = judge(reward, "reward", start)
    found["preference model"] = judge(preference, "preference", first)
    return found


def policy_stage(
    job: Stage, model_dir: str, where: Mapping[str, str]
) -> Callable[[], None]:
    """Returns the training of one policy against the judges in `where`."""
    return lambda: job(
        model_dir=model_dir,
        reference_checkpoint=where["sft"],
        preference_checkpoint=where["preference"],
        reward_checkpoint=where.get("reward", ""),
    )


def run_all(stages: Mapping[str, Callable[[], None]]) -> None:
    """Runs the stages in order and says how long each took."""
    start = time.monotonic()
    for number, (name, stage) in enumerate(stages.items(), start=1):
        say(f"[{number}/{len(stages)}] {name}")
        began = time.monotonic()
        stage()
        now = time.monotonic()
        say(f"    {name}: {now - began:.0f} s, {(now - start) / 60:.1f} min in all")


def say(line: str) -> None:
    """Prints a line where the progress bars are."""
    print(line, file=sys.stderr, flush=True)
