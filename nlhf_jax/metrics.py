# SPDX-License-Identifier: Apache-2.0
"""The table of metric names, and the host writer: JSON lines and TensorBoard events.

A name is `area/quantity`. A name that is not in the table is not written: the
assertion points at the row that is missing. `python -m nlhf_jax.metrics` prints the
table as it stands in `docs/metrics.md`.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple, SupportsFloat, SupportsIndex

import numpy as np
from jaxtyping import Float, Int

from nlhf_jax import event_files

INFINITY = math.inf
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


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
    "response/length": Metric(
        "tokens",
        0,
        INFINITY,
        "mean length of the responses trained on, end token included",
    ),
    "response/eos_rate": Metric(
        "share", 0, 1, "samples that ended by themselves, before the length limit"
    ),
    "decode/steps": Metric(
        "tokens", 1, INFINITY, "steps of the decode loop, the longest sample's length"
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
}

# What a clock says: two runs that compute the same differ in these, and only in these.
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
        "programs", 1, INFINITY, "programs compiled for the step so far; 1 is right"
    ),
    "compute/flops_per_step": Metric(
        "FLOP",
        0,
        INFINITY,
        "of one chip in this step, counted in the compiled program, loops as often as "
        "they run: the decode loop decode/steps times",
    ),
}

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
    | _TIMES
    | _PROGRAM
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


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and, for TensorBoard, to an event file.

    A line is strict JSON, `{"step": 20, "loss/token_nll": 3.1}`; a value that is not
    finite is null. Lines appear in the file at once. When a run resumes, lines of
    later steps than the checkpoint's are cut off, and TensorBoard is told to drop them
    too, so the file reads as if the run had never stopped.

    Args:
      folder: output folder of the run; made if it is missing.
      resume_step: updates the restored state has seen; 0 starts the file anew.
      tensorboard: also write event files.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        resume_step: int = 0,
        *,
        tensorboard: bool = True,
    ):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        _cut_after(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed by close
        self._events = (
            event_files.EventFile(folder / TENSORBOARD_FOLDER, resume_step)
            if tensorboard
            else None
        )

    def write(self, step: SupportsIndex, metrics: Mapping[str, SupportsFloat]) -> None:
        """Writes one line; an unknown name raises an AssertionError."""
        check_names(metrics)
        values = {name: float(value) for name, value in metrics.items()}
        strict = {
            name: value if math.isfinite(value) else None
            for name, value in values.items()
        }
        line = json.dumps({"step": int(step)} | strict, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.scalars(int(step), values)

    def close(self) -> None:
        """Closes the files; writing after that is an error."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _cut_after(path: pathlib.Path, step: int) -> None:
    """Drops lines of steps after `step` and a last line that was not finished."""
    if not path.exists():
        return
    kept = [
        json.dumps(record)
        for record in _records(path)
        if step and record["step"] <= step
    ]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def _records(path: pathlib.Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed while it wrote this line
        if isinstance(record, dict) and "step" in record:
            yield record


def read_metrics(
    folder: str | os.PathLike,
) -> dict[str, tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]]:
    """Reads a run's `metrics.jsonl` into name -> (steps, values), null as NaN.

    A folder without the file gives an empty dict.
    """
    path = pathlib.Path(folder) / METRICS_FILE
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for record in _records(path) if path.exists() else ():
        for name, value in record.items():
            if name != "step":
                steps, values = columns.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(math.nan if value is None else value)
    return {
        name: (np.asarray(steps, int), np.asarray(values, float))
        for name, (steps, values) in columns.items()
    }


def _bound(value: float | int) -> str:
    return {INFINITY: "∞", -INFINITY: "-∞"}.get(value, f"{value:g}")


def markdown_table() -> str:
    """Returns METRICS as the Markdown table of `docs/metrics.md`."""
    lines = ["| name | unit | range | meaning |", "|---|---|---|---|"]
    for name, row in METRICS.items():
        interval = f"{_bound(row.low)} to {_bound(row.high)}"
        lines.append(f"| `{name}` | {row.unit} | {interval} | {row.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
