# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline in one command: feedback, judges, policies, tournament, report."""

from collections.abc import Mapping

from nlhf_jax.checks import UserError
from nlhf_jax.jobs import runs, stages
from nlhf_jax.jobs.stages import Stage


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
    preference_starts_from: str = "sft",
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
      preference_starts_from: "sft" or "reward", the judge it goes on from.

    Raises:
      UserError: whatever a stage finds wrong with the user's input.
    """
    if not policies:
        raise UserError("policies must name at least one training job, got {}")
    folder = runs.open_folder(model_dir)
    where = {name: str(folder / name) for name in ("sft", "preference", "reward")}
    feedback = str(folder / "comparisons")
    checkpoints = {name: str(folder / "policies" / name) for name in policies}
    todo = stages.first_stages(
        where,
        feedback,
        sft=sft_from_scratch if from_scratch else sft,
        collect=collect,
        preference=preference,
        reward=reward,
        preference_starts_from=preference_starts_from,
    )
    for name, job in policies.items():
        todo[name] = stages.policy_stage(job, checkpoints[name], where)
    todo["tournament"] = lambda: evaluate(
        model_dir=str(folder),
        policies={"SFT": where["sft"]} | checkpoints,
        reference_checkpoint=where["sft"],
        preference_checkpoint=where["preference"],
        reward_checkpoint=where["reward"],
        comparisons_dir=feedback,
    )
    stages.run_all(todo)
    stages.say(f"report: {folder / 'report.html'}")
