# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline in one command: feedback, judges, policies, tournament, report."""

from collections.abc import Mapping

from nlhf_jax.checks import UserError
from nlhf_jax.jobs import folders, runs, stages
from nlhf_jax.jobs.stages import Stage

START = "before"  # how the report calls a reference that no stage of ours trained


def quickstart(
    *,
    model_dir: str,
    collect: Stage,
    preference: Stage,
    policies: Mapping[str, Stage],
    evaluate: Stage,
    sft: Stage | None = None,
    sft_from_scratch: Stage | None = None,
    reward: Stage | None = None,
    start: str = "",
    from_scratch: bool = False,
    preference_starts_from: str = "sft",
) -> None:
    """Runs SFT, collects votes, trains the judges and every policy, and reports.

    Every stage is a job with its settings bound; it gets its folder and the folders of
    the stages before it. A stage that is complete is not run again, so the same
    command continues an interrupted run.

    Args:
      model_dir: folder of the whole run.
      collect: writes comparisons labelled by sampled votes.
      preference: trains the preference model.
      policies: policy name -> training job, in the report's order.
      evaluate: plays the tournament and writes the report.
      sft: fine-tunes the reference from a checkpoint.
      sft_from_scratch: fine-tunes it from random parameters, with a new vocabulary.
      reward: trains the reward model; None where no policy is rated by one.
      start: model folder of the reference, in place of `sft`.
      from_scratch: take `sft_from_scratch` in place of `sft`.
      preference_starts_from: "sft" or "reward", the judge it goes on from.

    Raises:
      UserError: no reference or two, or whatever a stage finds wrong with the user's
        input.
    """
    if not policies:
        raise UserError("policies must name at least one training job, got {}")
    first = sft_from_scratch if from_scratch else sft
    if (first is None) == (not start):
        name = "sft_from_scratch" if from_scratch else "sft"
        raise UserError(
            f"a pipeline needs either a stage {name} or a model folder in start, got "
            f"{'neither' if first is None else 'both'}"
        )
    if start:
        folders.read_description(start)
    folder = runs.open_folder(model_dir)
    kinds = ("sft", "preference", *(("reward",) if reward else ()))
    where = {name: str(folder / name) for name in kinds}
    where |= {"sft": start} if start else {}
    reference = START if start else "SFT"
    feedback = str(folder / "comparisons")
    checkpoints = {name: str(folder / "policies" / name) for name in policies}
    todo = stages.first_stages(
        where,
        feedback,
        sft=first,
        collect=collect,
        preference=preference,
        reward=reward,
        preference_starts_from=preference_starts_from,
    )
    for name, job in policies.items():
        todo[name] = stages.policy_stage(job, checkpoints[name], where)
    todo["tournament"] = lambda: evaluate(
        model_dir=str(folder),
        policies={reference: where["sft"]} | checkpoints,
        reference_checkpoint=where["sft"],
        preference_checkpoint=where["preference"],
        reward_checkpoint=where.get("reward", ""),
        comparisons_dir=feedback,
    )
    stages.run_all(todo)
    stages.say(f"report: {folder / 'report.html'}")
