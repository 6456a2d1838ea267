# SPDX-License-Identifier: Apache-2.0
"""The tournament: every policy against every other, judged twice, and the report."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import metrics
from nlhf_jax.checks import UserError, check_choice, check_integer
from nlhf_jax.data import batches as data_batches
from nlhf_jax.evaluation import cyclicity, report, summaries, tournament
from nlhf_jax.jobs import adapters, folders, generation, judges, runs
from nlhf_jax.jobs.policies import Policy, load_policy
from nlhf_jax.preferences.raters import RaterPopulation
from nlhf_jax.progress import Progress
from nlhf_jax.sequences import has_eos
from nlhf_jax.settings import DataSettings, SamplingSettings
from nlhf_jax.types import POLICY, REFERENCE, PromptBatch, Responses

PLAYED = "tournament/played.json"  # written last: what a finished tournament was given


@dataclasses.dataclass(frozen=True)
class Asked:
    """The held-out prompts of a tournament.

    Attributes:
      prompts: as tokens.
      documents: as texts.
      targets: the person-written answers.
    """

    prompts: PromptBatch
    documents: list[str]
    targets: list[str]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one policy answered: one response per prompt, and its figures."""

    texts: list[str]
    responses: Responses
    figures: report.PolicyFigures


def evaluate(
    *,
    model_dir: str,
    policies: Mapping[str, str],
    data: DataSettings,
    raters: RaterPopulation,
    reference_checkpoint: str,
    preference_checkpoint: str,
    reward_checkpoint: str = "",
    comparisons_dir: str = "",
    baseline: str = "",
    rlhf: tuple[str, ...] = (),
    nash: tuple[str, ...] = (),
    num_prompts: int = 256,
    num_examples: int = 12,
    temperature: float = 1.0,
    max_decode_length: int = 0,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Plays a round-robin tournament on held-out prompts and writes `report.html`.

    Every policy answers every prompt once. Each pair of policies is judged by the
    learned preference model and by the held-out population of raters. A tournament that
    has been played with the same settings between the same parameters is not played
    again.

    Args:
      model_dir: folder for `tournament/`, `samples/` and `report.html`.
      policies: name -> model folder, in the report's order.
      data: the task whose evaluation split is answered.
      raters: the held-out population.
      reference_checkpoint: model folder of the reference, for the KL.
      preference_checkpoint: model folder of the learned judge.
      reward_checkpoint: model folder of the reward model, for its learning curve only.
      comparisons_dir: folder of a `collect` job, whose cyclicity the report states.
      baseline: the policy the report compares with; empty is the first one.
      rlhf: names of policies trained on a scalar reward, for the report's verdict.
      nash: names of policies that pursue the equilibrium, for the report's verdict.
      num_prompts: prompts answered.
      num_examples: prompts shown with every answer in the report.
      temperature: of the policies; 0 is greedy.
      max_decode_length: tokens of an answer at most; 0 takes the length of the
        reference's training.
      batch_size: prompts decoded and judged at once.
      seed: of the prompts' choice, of sampling and of the bootstrap.

    Raises:
      UserError: fewer than two policies, a folder that is missing or of another kind,
        a name in `baseline`, `rlhf` or `nash` that is no policy, or bad data.
    """
    for name, value in (("num_prompts", num_prompts), ("batch_size", batch_size)):
        check_integer(name, value, 1)
    check_integer("max_decode_length", max_decode_length, 0)
    _check_policies(policies, (*((baseline,) if baseline else ()), *rlhf, *nash))
    given = _what_is_given(locals())
    if _is_played(pathlib.Path(model_dir), given):
        print(f"tournament: played already, {model_dir}", file=sys.stderr)
        return
    folders.check_same_vocabulary(
        reference_checkpoint, preference_checkpoint, *policies.values()
    )
    reference = load_policy(reference_checkpoint)
    judge = judges.load_judge(preference_checkpoint=preference_checkpoint)
    asked = _choose_prompts(data, reference, num_prompts, seed)
    folder = runs.open_folder(model_dir)
    batch_size = min(batch_size, len(asked.documents))
    answers = _answer_all(
        policies,
        reference,
        asked,
        temperature=temperature,
        max_decode_length=max_decode_length or reference.response_length,
        batch_size=batch_size,
        seed=seed,
    )

    def population(first: Answers, second: Answers) -> np.ndarray:
        return raters.preference(
            asked.documents, asked.targets, first.texts, second.texts
        )

    def learned(first: Answers, second: Answers) -> np.ndarray:
        return judge.preferences_in_batches(
            asked.prompts, first.responses, second.responses, batch_size=batch_size
        )

    draws = {name: [answer] for name, answer in answers.items()}
    with Progress(2, "judging") as bar:
        by_raters = tournament.win_rates(draws, population, seed=seed)
        bar.update(1)
        by_model = tournament.win_rates(draws, learned, seed=seed)
        bar.update(2)
    models = {"preference model": preference_checkpoint}
    if reward_checkpoint:
        models["reward model"] = reward_checkpoint
    page = report.ReportData(
        title="Nash Learning from Human Feedback: the tournament",
        population=by_raters,
        baseline=baseline or next(iter(policies)),
        learned=by_model,
        rlhf=tuple(rlhf),
        nash=tuple(nash),
        figures={name: answer.figures for name, answer in answers.items()},
        stages=_learning_curves(dict(policies) | models),
        cyclicity=_read_cyclicity(comparisons_dir),
        raters=dict(raters.weights),
        examples=_examples(asked, answers, num_examples),
        config=runs.operative_config(),
        versions=runs.versions(),
    )
    _write(folder, page, asked, answers)
    folders.write_atomically(folder / PLAYED, given)


def _what_is_given(arguments: Mapping[str, Any]) -> str:
    """Returns all that decides a tournament as text: settings, and whose parameters."""
    places = {
        name: _state_of(arguments[name])
        for name in ("reference_checkpoint", "preference_checkpoint")
    }
    if arguments["reward_checkpoint"]:  # the report shows its curve
        places["reward_checkpoint"] = _state_of(arguments["reward_checkpoint"])
    cycles = _read_cyclicity(arguments["comparisons_dir"])
    players = arguments["policies"].items()
    policies = {name: _state_of(place) for name, place in players}
    settings = {
        name: repr(value) for name, value in arguments.items() if name != "model_dir"
    }
    given = settings | places | {"policies": policies, "cyclicity": repr(cycles)}
    return json.dumps(given, indent=2) + "\n"


def _state_of(checkpoint: str) -> list[str | int]:
    """Returns which parameters a path leads to; what they stand on must be as it was.

    Raises:
      UserError: there are none, or the base of adapters has gone or has changed.
    """
    adapters.check_bases(checkpoint)
    return folders.newest_state(checkpoint)


def _is_played(folder: pathlib.Path, given: str) -> bool:
    played = folder / PLAYED
    is_there = played.is_file() and (folder / "report.html").is_file()
    return is_there and played.read_text(encoding="utf-8") == given


def _check_policies(policies: Mapping[str, str], named: tuple[str, ...]) -> None:
    if len(policies) < 2:
        raise UserError(
            f"policies must name at least two model folders, got {dict(policies)!r}"
        )
    for name in named:
        check_choice("policy", name, policies)
    for checkpoint in policies.values():
        folders.read_description(checkpoint)


def _choose_prompts(
    data: DataSettings, reference: Policy, num_prompts: int, seed: int
) -> Asked:
    held_out = data_batches.load_supervised(data, "evaluation", reference.vocabulary)
    count = min(num_prompts, held_out.num_examples)
    rows = np.random.default_rng(seed).permutation(held_out.num_examples)[:count]
    return Asked(
        held_out.take(rows).prompts,
        [held_out.prompt_texts[row] for row in rows],
        [held_out.target_texts[row] for row in rows],
    )


def _answer_all(
    policies: Mapping[str, str],
    reference: Policy,
    asked: Asked,
    *,
    temperature: float,
    max_decode_length: int,
    batch_size: int,
    seed: int,
) -> dict[str, Answers]:
    sampling = SamplingSettings(max_decode_length, temperature)
    decode = generation.Generator(
        reference.network,
        reference.vocabulary,
        speaker=generation.policy_speaker(sampling),
        max_decode_length=max_decode_length,
        batch_size=batch_size,
    )
    log_ratio = generation.LogRatio(reference.network, batch_size)
    answers = {}
    with Progress(len(policies), "answers") as bar:
        for index, (name, checkpoint) in enumerate(policies.items()):
            policy = load_policy(checkpoint)
            if policy.description.settings != reference.description.settings:
                raise UserError(
                    f"policy {name!r} must have the reference's shape "
                    f"{reference.description.settings}, got "
                    f"{policy.description.settings}"
                )
            key = jax.random.fold_in(jax.random.key(seed), index)
            drawn = decode({POLICY: policy.params}, asked.prompts, key)
            param_sets = {POLICY: policy.params, REFERENCE: reference.params}
            ratio_B = log_ratio(param_sets, asked.prompts, drawn.responses)
            answers[name] = _with_figures(drawn, ratio_B, asked, reference)
            bar.update(index + 1)
    return answers


def _with_figures(
    drawn: generation.Generations, ratio_B: np.ndarray, asked: Asked, reference: Policy
) -> Answers:
    tokens_BT, mask_BT = (jnp.asarray(leaf) for leaf in drawn.responses)
    ended_B = np.asarray(has_eos(tokens_BT, mask_BT, reference.network.eos_id))
    figures = report.PolicyFigures(
        kl=float(ratio_B.mean()),
        kl_standard_error=float(ratio_B.std() / np.sqrt(len(ratio_B))),
        statistics=summaries.describe(
            asked.documents, asked.targets, drawn.texts, ended_B.tolist()
        ),
    )
    return Answers(drawn.texts, drawn.responses, figures)


def _learning_curves(places: Mapping[str, str]) -> dict:
    found = {}
    for name, checkpoint in places.items():
        folder = folders.find_model_dir(checkpoint)
        if (folder / metrics.METRICS_FILE).is_file():
            found[name] = metrics.read_metrics(folder)
    return found


def _read_cyclicity(comparisons_dir: str) -> cyclicity.Cyclicity | None:
    path = pathlib.Path(comparisons_dir) / "cyclicity.json"
    if not comparisons_dir or not path.is_file():
        return None
    try:
        return cyclicity.Cyclicity(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: delete it, and `collect` writes it again"
        ) from error


def _examples(
    asked: Asked, answers: Mapping[str, Answers], count: int
) -> tuple[report.Example, ...]:
    return tuple(
        report.Example(
            asked.documents[row],
            asked.targets[row],
            {name: answer.texts[row] for name, answer in answers.items()},
        )
        for row in range(min(count, len(asked.documents)))
    )


def _write(
    folder: pathlib.Path,
    page: report.ReportData,
    asked: Asked,
    answers: Mapping[str, Answers],
) -> None:
    """Writes the report, the win rates as JSON and every answer as JSON lines."""
    (folder / "tournament").mkdir(exist_ok=True)
    (folder / "samples").mkdir(exist_ok=True)
    judged = {"population": page.population, "preference_model": page.learned}
    table = {
        judge: {
            "names": list(rates.names),
            "mean": rates.mean_NN.tolist(),
            "low": rates.low_NN.tolist(),
            "high": rates.high_NN.tolist(),
        }
        for judge, rates in judged.items()
    }
    figures = {name: dataclasses.asdict(one) for name, one in page.figures.items()}
    text = json.dumps({"win_rates": table, "figures": figures}, indent=2)
    (folder / "tournament" / "tournament.json").write_text(text + "\n")
    with open(folder / "samples" / "tournament.jsonl", "w", encoding="utf-8") as file:
        for example in _examples(asked, answers, len(asked.documents)):
            file.write(json.dumps(dataclasses.asdict(example)) + "\n")
    report.write_report(folder / "report.html", page)
