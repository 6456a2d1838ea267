# SPDX-License-Identifier: Apache-2.0
"""The paper's experiment: fourteen policies, two judges, its tables beside ours."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping

from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.evaluation import reproduction
from nlhf_jax.jobs import folders, runs, stages
from nlhf_jax.jobs.stages import Stage

BASELINE = "SFT"


def reproduce(
    *,
    model_dir: str,
    sft: Stage,
    preference: Stage,
    reward: Stage,
    policies: Mapping[str, Stage],
    evaluate: Stage,
    collect: Stage | None = None,
    averages: Mapping[str, tuple[str, str]] | None = None,
    sweeps: Mapping[str, Mapping[str, Stage | str]] | None = None,
    evaluate_sweep: Stage | None = None,
    judge_checkpoint: str = "",
) -> None:
    """Trains the paper's fourteen policies, plays its tournament and sweeps.

    The policies start from one SFT checkpoint and learn from one preference model (RLHF
    from a reward model on the same votes). All are compared in pairs by the population
    of raters, on prompts that training has not seen, and by the preference model:
    `reproduction.md` has both tables with intervals beside the paper's numbers, and a
    table per sweep.

    Every stage is a job with its settings bound. A stage that is complete is not run
    again, so the same command continues an interrupted run and ends in the same tables.

    Args:
      model_dir: folder of the whole run.
      sft: fine-tunes the reference policy.
      preference: trains the preference model.
      reward: trains the reward model.
      policies: name in the paper's tables -> training job.
      evaluate: plays a tournament and writes a report.
      collect: writes comparisons labelled by sampled votes; None where the data of the
        judges are comparisons.
      averages: name in the tables -> (policy, parameter set it has written), the
        paper's EMA1* and EMA2*.
      sweeps: title -> value -> training job, or the name of a policy that has it.
      evaluate_sweep: plays the tournament of one sweep; None without sweeps.
      judge_checkpoint: where the judges start; empty is the SFT policy.

    Raises:
      UserError: a name in `averages` or `sweeps` is no policy, or whatever a stage
        finds wrong with the user's input.

    Source: Munos et al., 2024, arXiv 2312.00886, section 8, Tables 1 to 3.
    """
    averages, sweeps = dict(averages or {}), dict(sweeps or {})
    _check_names(policies, averages, sweeps, evaluate_sweep)
    folder = runs.open_folder(model_dir)
    where = {name: str(folder / name) for name in ("sft", "preference", "reward")}
    feedback = str(folder / "comparisons")
    todo = stages.first_stages(
        where,
        feedback,
        sft=sft,
        collect=collect,
        preference=preference,
        reward=reward,
        judge_checkpoint=judge_checkpoint,
    )
    trained = {name: str(folder / "policies" / name) for name in policies}
    for name, job in policies.items():
        todo[name] = stages.policy_stage(job, trained[name], where)
    places = {BASELINE: where["sft"]} | trained
    for name, (policy, written) in averages.items():
        places[name] = str(pathlib.Path(trained[policy]) / "sets" / written)
    judged_by = {
        "reference_checkpoint": where["sft"],
        "preference_checkpoint": where["preference"],
    }
    todo["tournament"] = functools.partial(
        evaluate,
        model_dir=str(folder),
        policies=places,
        reward_checkpoint=where["reward"],
        comparisons_dir=feedback if collect else "",
        **judged_by,
    )
    for title, values in sweeps.items():
        todo |= _sweep_stages(title, values, folder, places, where)
        todo[f"{title}: tournament"] = functools.partial(
            evaluate_sweep,
            model_dir=str(folder / "sweeps" / title),
            policies=_sweep_places(title, values, folder, places),
            **judged_by,
        )
    labels = {title: list(values) for title, values in sweeps.items()}
    todo["tables"] = lambda: write_tables(folder, labels)
    stages.run_all(todo)
    stages.say(f"tables: {folder / 'reproduction.md'}")
    stages.say(f"report: {folder / 'report.html'}")


def _check_names(policies, averages, sweeps, evaluate_sweep) -> None:
    if not policies:
        raise UserError("policies must name at least one training job, got {}")
    for policy, _ in averages.values():
        check_choice("policy of an average", policy, policies)
    for values in sweeps.values():
        for value in values.values():
            if isinstance(value, str):
                check_choice("policy of a sweep", value, policies)
    if sweeps and evaluate_sweep is None:
        raise UserError("evaluate_sweep must be set where sweeps are, got None")


def _sweep_places(title, values, folder, places) -> dict[str, str]:
    """Returns the baseline's and each value's model folder."""
    return {BASELINE: places[BASELINE]} | {
        label: places[value]
        if isinstance(value, str)
        else str(folder / "sweeps" / title / "policies" / label)
        for label, value in values.items()
    }


def _sweep_stages(title, values, folder, places, where) -> dict[str, Callable]:
    found = _sweep_places(title, values, folder, places)
    return {
        f"{title} {label}": stages.policy_stage(value, found[label], where)
        for label, value in values.items()
        if not isinstance(value, str)
    }


def write_tables(folder: pathlib.Path, sweeps: Mapping[str, list[str]]) -> None:
    """Writes `reproduction.md` and `reproduction.json` from finished tournaments."""
    found = reproduction.comparison(_tournament(folder)["win_rates"])
    text = reproduction.markdown(found)
    for title, labels in sweeps.items():
        played = _tournament(folder / "sweeps" / title)
        table = reproduction.sweep_table(
            labels, played["win_rates"], played["figures"], BASELINE
        )
        text += f"\n## {title}\n\nWin rate over SFT, 95 % intervals.\n\n{table}\n"
    folders.write_atomically(folder / "reproduction.md", text)
    numbers = json.dumps(found, indent=2) + "\n"
    folders.write_atomically(folder / "reproduction.json", numbers)


def _tournament(folder: pathlib.Path) -> dict:
    return json.loads((folder / "tournament" / "tournament.json").read_text())
