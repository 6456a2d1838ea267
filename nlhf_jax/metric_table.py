# SPDX-License-Identifier: Apache-2.0
"""The table of metric names: what each is, in which unit and range.

A name is `area/quantity`. `python -m nlhf_jax.metrics` prints the table as it stands in
`docs/metrics.md`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, SupportsFloat, SupportsIndex

INFINITY = math.inf


class Metric(NamedTuple):
    """One row of the table: unit, closed range of finite values, and meaning."""

    unit: str
    low: float | int
    high: float | int
    meaning: str


_SUPERVISED = {
    "loss/token_nll": Metric(
        "nats", 0, INFINITY, "mean negative log-probability of a target token"
    ),
    "loss/z_loss": Metric(
        "-", 0, INFINITY, "z_loss times the mean squared log normaliser"
    ),
    "token/accuracy": Metric(
        "share", 0, 1, "target tokens that are the most likely token"
    ),
    "loss/preference": Metric(
        "nats", 0, INFINITY, "soft-label cross-entropy of the preference model"
    ),
    "preference/accuracy": Metric(
        "share", 0, 1, "comparisons where model and label agree; ties count half"
    ),
    "preference/brier": Metric("-", 0, 1, "mean squared error of P against the label"),
    "preference/confidence": Metric(
        "share", 0.5, 1, "mean of max(P, 1 - P); the accuracy if it is calibrated"
    ),
    "loss/reward": Metric(
        "nats", 0, INFINITY, "Bradley-Terry loss on the difference of rewards"
    ),
    "reward/accuracy": Metric(
        "share", 0, 1, "comparisons where reward and label agree; ties count half"
    ),
    "reward/margin": Metric(
        "-", -INFINITY, INFINITY, "mean lead of the response the label favours"
    ),
    "reward/mean": Metric("-", -INFINITY, INFINITY, "mean reward of all responses"),
}

_POLICY = {
    "loss/policy": Metric(
        "-", -INFINITY, INFINITY, "mean policy loss per example; its gradient matters"
    ),
    "policy/kl": Metric(
        "nats",
        -INFINITY,
        INFINITY,
        "mean log-ratio to the reference of the responses trained on; where they are "
        "the policy's own (not a snapshot's, mixture's or adversary's) and none were "
        "selected, an unbiased estimate of the sequence-level KL; it can be negative",
    ),
    "policy/entropy": Metric(
        "nats",
        0,
        INFINITY,
        "mean negative log-probability of a response trained on",
    ),
    "policy/effective_share": Metric(
        "share",
        0,
        1,
        "effective sample size over the number of samples, E[w]^2 / E[w^2] with w the "
        "policy's probability of a trained response over that it was drawn with",
    ),
    "comal/inner_gap": Metric(
        "win probability",
        0,
        INFINITY,
        "estimated gap of the last snapshot in the round's own game, to second order",
    ),
    "adversary/kl": Metric(
        "nats",
        -INFINITY,
        INFINITY,
        "estimated KL from the last snapshot of the policy to the adversary",
    ),
    "preference/mean": Metric(
        "share",
        0,
        1,
        "mean preference of the first response over its opponents; of selected "
        "candidates the first is the best",
    ),
    "preference/undecided_share": Metric(
        "share", 0, 1, "comparisons that the judge calls a tie, |P - 1/2| <= 0.005"
    ),
    "response/length": Metric(
        "tokens",
        0,
        INFINITY,
        "mean length of the responses trained on, end token included",
    ),
    "response/distinct_share": Metric(
        "share",
        0,
        1,
        "(D - 1) / (B - 1) for D distinct ones of the first speaker's B responses; 0 "
        "where all are the same",
    ),
    "response/identical_share": Metric(
        "share", 0, 1, "prompts whose responses are all the same"
    ),
    "response/eos_rate": Metric(
        "share", 0, 1, "samples that ended by themselves, before the length limit"
    ),
    "decode/steps": Metric(
        "tokens",
        1,
        INFINITY,
        "steps of the decode loop, the longest sample's length; with a judge on the "
        "host the mean of the batch's parts",
    ),
}

_COUNTS = {
    "token/count": Metric(
        "tokens",
        0,
        INFINITY,
        "target tokens of the batch; of a policy's step, those of all responses drawn",
    ),
    "preference/count": Metric("comparisons", 0, INFINITY, "comparisons of the batch"),
    "reward/count": Metric("comparisons", 0, INFINITY, "comparisons of the batch"),
    "data/truncated_prompts": Metric(
        "prompts", 0, INFINITY, "prompts of the data set cut at the length limit"
    ),
    "data/truncated_share": Metric(
        "share", 0, 1, "prompts of the data set cut at the length limit"
    ),
}

_MACHINE = {
    "optimizer/gradient_norm": Metric(
        "-", 0, INFINITY, "global norm of the gradient before clipping"
    ),
    "optimizer/learning_rate": Metric("-", 0, INFINITY, "step size of this update"),
    "optimizer/skipped_steps": Metric(
        "steps",
        0,
        INFINITY,
        "steps so far that were left out, since a number was not finite",
    ),
}

_ALARMS = {
    "alarm/entropy": Metric("flag", 0, 1, "1 while policy/entropy says collapse"),
    "alarm/kl": Metric("flag", 0, 1, "1 while policy/kl says explosion"),
    "alarm/same_response": Metric(
        "flag", 0, 1, "1 while responses are all alike, of a prompt or of a batch"
    ),
    "alarm/undecided_judge": Metric(
        "flag", 0, 1, "1 while the judge calls nearly every comparison a tie"
    ),
}

# What a clock says.
_TIMES = {
    "time/seconds_per_step": Metric(
        "seconds", 0, INFINITY, "wall-clock time per step since the last line"
    ),
    "time/steps_per_second": Metric("steps/s", 0, INFINITY, "its inverse"),
    "time/tokens_per_second": Metric(
        "tokens/s", 0, INFINITY, "the tokens of token/count over that time"
    ),
    "time/tokens_per_second_per_chip": Metric(
        "tokens/s", 0, INFINITY, "that over the number of devices"
    ),
    "compile/seconds": Metric(
        "seconds", 0, INFINITY, "tracing, lowering and compiling the step"
    ),
    "compute/mfu": Metric(
        "share",
        0,
        INFINITY,
        "FLOPs of the steps since the last line over their time and the chip's peak; "
        "what is computed again to save memory counts. Left out where no peak is known",
    ),
}
TIMES = frozenset(_TIMES)

_PROGRAM = {
    "compile/count": Metric(
        "programs",
        1,
        INFINITY,
        "programs compiled for the step so far; 1 is right, with `length_buckets` one "
        "a width",
    ),
    "compute/flops_per_step": Metric(
        "FLOP",
        0,
        INFINITY,
        "of one chip in this step, counted in the compiled program, loops as often as "
        "they run: the decode loop decode/steps times",
    ),
}

# How a process began; written once.
_START = {
    "time/first_step": Metric(
        "seconds", 0, INFINITY, "from the start of the process to the first step's end"
    ),
    "compile/cache_hits": Metric(
        "programs", 0, INFINITY, "of the step's, read from the cache of compiled ones"
    ),
    "compile/cache_misses": Metric(
        "programs", 0, INFINITY, "of the step's, compiled since they were not there"
    ),
}

_JUDGE = {
    "time/judging": Metric(
        "seconds", 0, INFINITY, "that the judge on the host took in this step"
    ),
    "time/judging_waited": Metric(
        "seconds", 0, INFINITY, "those of them in which no device had work"
    ),
}

# What depends on the life of a process, and not on seed and step alone. It goes to a
# file of its own, so that the other is the same whether a run was stopped or not.
OF_THE_PROCESS = TIMES.union(_PROGRAM, _START, _JUDGE)

_EVALUATION = {
    "eval/win_rate_reference": Metric(
        "share", 0, 1, "mean learned preference over the reference, held-out prompts"
    ),
    "eval/kl": Metric(
        "nats",
        -INFINITY,
        INFINITY,
        "mean log-ratio to the reference of whole responses; an unbiased estimate of "
        "the sequence-level KL, so it can be negative",
    ),
    "eval/win_rate_last": Metric(
        "share",
        0,
        1,
        "mean learned preference over the answers given at the evaluation before",
    ),
    "eval/duality_gap": Metric(
        "-",
        -1,
        1,
        "lower bound of the duality gap without regularisation: twice what the best of "
        "some samples wins against the policy under the learned preference; an "
        "unbiased estimate, so it can be negative",
    ),
    "eval/duality_gap_error": Metric(
        "-", 0, INFINITY, "standard error of eval/duality_gap over prompts"
    ),
    "eval/eos_rate": Metric(
        "share", 0, 1, "answers that ended by themselves, before the length limit"
    ),
    "eval/length": Metric(
        "tokens", 0, INFINITY, "mean response length, end token included"
    ),
    "eval/rouge_l": Metric("share", 0, 1, "ROUGE-L F against the person-written text"),
}


def _evaluated(table: Mapping[str, Metric]) -> dict[str, Metric]:
    """Returns the rows of the same quantities on held-out data: eval/AREA_QUANTITY."""
    return {
        f"eval/{name.replace('/', '_')}": row._replace(
            meaning=f"{name} on held-out data"
        )
        for name, row in table.items()
    }


METRICS: dict[str, Metric] = (
    _SUPERVISED
    | _POLICY
    | _COUNTS
    | _MACHINE
    | _ALARMS
    | _TIMES
    | _PROGRAM
    | _START
    | _JUDGE
    | _EVALUATION
    | _evaluated(_SUPERVISED)
)


def check_names(metrics: Mapping[str, SupportsFloat]) -> None:
    """Asserts that every name stands in the table."""
    unknown = sorted(set(metrics) - set(METRICS))
    assert not unknown, f"no row in nlhf_jax.metrics.METRICS for {', '.join(unknown)}"


def format_line(step: SupportsIndex, metrics: Mapping[str, SupportsFloat]) -> str:
    """Returns `step 20  loss/token_nll 3.142 nats  ...`, units only where they help."""
    parts = [f"step {int(step)}"]
    for name, value in metrics.items():
        unit = METRICS[name].unit if name in METRICS else "-"
        suffix = "" if unit in ("-", "share") else f" {unit}"
        parts.append(f"{name} {float(value):.4g}{suffix}")
    return "  ".join(parts)


def _bound(value: float | int) -> str:
    return {INFINITY: "∞", -INFINITY: "-∞"}.get(value, f"{value:g}")


def markdown_table() -> str:
    """Returns METRICS as the Markdown table of `docs/metrics.md`."""
    lines = ["| name | unit | range | meaning |", "|---|---|---|---|"]
    for name, row in METRICS.items():
        interval = f"{_bound(row.low)} to {_bound(row.high)}"
        lines.append(f"| `{name}` | {row.unit} | {interval} | {row.meaning} |")
    return "\n".join(lines) + "\n"
