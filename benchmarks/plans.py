# SPDX-License-Identifier: Apache-2.0
"""Plans of a step's memory against the compiler's bytes, case by case: docs/plans.json.

    python -m benchmarks.plans                    asks for cases that are not there yet
    python -m benchmarks.plans t5-train-scan ...  asks for these, compiler and plan
    python -m benchmarks.plans --plan             plans all anew, without the compiler

`benchmarks.scale` prints the table. A case is a minute of a core, on TPUs several.
Cases of SEEN were looked at while the plan was made; those of UNSEEN were only compared
with it. On fake CPU devices LLVM is told not to optimise: that is most of the compile
time, and comes after the buffers have their places.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "plans.json"
SCAN = ("REMAT='full'", "SCAN_LAYERS=True", "NUM_VOCAB_CHUNKS=4")
KEPT = ("REMAT='none'", "SCAN_LAYERS=False", "NUM_VOCAB_CHUNKS=1")
NO_LLVM = "--xla_backend_optimization_level=0"
T5, DECODER = "T5Settings", "DecoderOnlySettings"


_LAYERS = {
    SCAN: "loop, remat full, 4 chunks",
    SCAN[:2]: "loop, remat full",
    KEPT: "kept",
}


class Case(NamedTuple):
    """A step, and where it is compiled.

    Attributes:
      job: train, sft or preference.
      kind: T5 or DECODER.
      width: of the model; heads of 64, hidden layers 11/4 as wide.
      layers: of each stack.
      vocabulary: ids.
      sizes: tokens of a prompt, tokens of a response, rows.
      target: cpu:N or a TPU topology, whose step computes in bfloat16.
      bindings: of gin, besides.
      algorithm: of `train`.
    """

    job: str
    kind: str
    width: int
    layers: int
    vocabulary: int
    sizes: tuple[int, int, int]
    target: str
    bindings: tuple[str, ...]
    algorithm: str = "nash_md_pg"


def _small(job: str, kind: str, target: str, *bindings: str) -> Case:
    return Case(job, kind, 256, 2, 8192, (128, 64, 64), target, bindings)


SEEN = {
    "decoder-train-scan": _small("train", DECODER, "cpu:8", "FSDP=8", *SCAN),
    "t5-train-kept": _small("train", T5, "cpu:8", "FSDP=8", *KEPT),
    "decoder-train-kept": _small("train", DECODER, "cpu:8", "FSDP=8", *KEPT),
    "t5-sft-scan": _small("sft", T5, "cpu:8", "FSDP=4", *SCAN),
    "t5-train-tpu": _small("train", T5, "v5e:2x2", "FSDP=4", *SCAN),
    "t5-train-half": Case(
        *("train", T5, 384, 3, 12288, (96, 48, 32), "cpu:4", ("FSDP=2", *SCAN))
    ),
    "decoder-dpo-scan": Case(
        *("train", DECODER, 384, 3, 12288, (64, 64, 64), "cpu:8", ("FSDP=8", *SCAN)),
        algorithm="online_dpo",
    ),
}
UNSEEN = {
    "t5-train-scan": _small("train", T5, "cpu:8", "FSDP=8", *SCAN),
    "t5-preference-scan": _small("preference", T5, "cpu:8", "FSDP=8", *SCAN[:2]),
    "decoder-train-tpu": _small("train", DECODER, "v5e:2x2", "FSDP=4", *SCAN),
    "decoder-dpo-tensor": Case(
        *("train", DECODER, 512, 2, 8192, (96, 32, 32), "cpu:8"),
        ("FSDP=2", "TENSOR=2", *SCAN),
        algorithm="online_dpo",
    ),
    "t5-self-play-four": Case(
        *("train", T5, 256, 4, 8192, (64, 64, 64), "cpu:4", ("FSDP=4", *SCAN)),
        algorithm="self_play",
    ),
}


def shape(case: Case) -> str:
    """Returns the gin file of a case's model."""
    heads = case.width // 64
    values: dict[str, Any] = {
        "vocab_size": case.vocabulary,
        "emb_dim": case.width,
        "num_heads": heads,
        "head_dim": 64,
        "mlp_dim": case.width * 11 // 4,
        "dtype": "float32" if case.target.startswith("cpu:") else "bfloat16",
    }
    if case.kind == T5:
        values |= dict.fromkeys(
            ("num_encoder_layers", "num_decoder_layers"), case.layers
        )
        values["mlp_activations"] = ("gelu", "linear")
    else:
        values |= {
            "num_layers": case.layers,
            "num_kv_heads": min(4, heads // 2),
            "eos_id": 1,
        }
    return "".join(f"{case.kind}.{k} = {v!r}\n" for k, v in values.items())


def words(case: Case, file: str) -> list[str]:
    """Returns the command line of a case, `file` being its shape."""
    prompt, response, rows = case.sizes
    where = case.target.removeprefix("cpu:")
    flag = "cpu_devices" if where != case.target else "topology"
    found = [
        f"--job={case.job}",
        f"--gin.BATCH_SIZE={rows}",
        f"--gin.TASK_FEATURE_LENGTHS={{'inputs': {prompt}, 'targets': {response}}}",
        *(f"--gin.{binding}" for binding in case.bindings),
        f"--{flag}={where}",
    ]
    if case.job != "train":
        files = ["--gin.TRAIN_FILE=a.jsonl"] if case.job == "preference" else []
        job = f"--gin_file=configs/runs/{case.job}.gin"
        return [*found, *files, job, f"--model={file}"]
    models = [f"--{kind}_model={file}" for kind in ("reference", "preference")]
    algorithm = f"--gin_file=configs/algorithms/{case.algorithm}.gin"
    return [*found, *models, algorithm, f"--gin.MAX_DECODE_LENGTH={response}"]


def ask(case: Case, *flags: str) -> dict[str, Any]:
    """Returns what `nlhf compile --json` says of a case's memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "shape.gin"
        file.write_text(shape(case))
        command = [sys.executable, "-m", "nlhf_jax", "compile"]
        done = subprocess.run(
            [*command, *words(case, str(file)), *flags, "--json"],
            cwd=ROOT,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "NPROC": "16", "XLA_FLAGS": NO_LLVM},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    memory = json.loads(done.stdout)["memory"]
    kept = ("arguments", "temporaries", "code", "total")
    return {name: memory[name] for name in kept if name in memory}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the cases as a table: where, what, and plan over compiler."""
    head = ["case", "devices", "layers", "seen while it was made", "compiler", "plan"]
    lines = ["| " + " | ".join([*head, "plan / compiler"]) + " |"]
    lines.append("| " + " | ".join(["---"] * len(head)) + " | ---: |")
    for name, case in (SEEN | UNSEEN).items():
        if name not in found or {"plan", "compiler"} - set(found[name]):
            continue
        plan, compiler = found[name]["plan"]["total"], found[name]["compiler"]["total"]
        cells = [
            f"{name}, width {case.width}, {case.layers} layers",
            case.target,
            _layout(case.bindings),
            "yes" if name in SEEN else "no",
            f"{compiler / 2**20:.0f} MiB",
            f"{plan / 2**20:.0f} MiB",
            f"{plan / compiler:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _layout(bindings: tuple[str, ...]) -> str:
    """Returns the mesh, and what is done with the layers, in words."""
    start = next(n for n in range(len(bindings)) if bindings[n:] in _LAYERS)
    return ", ".join([*bindings[:start], _LAYERS[bindings[start:]]])


def main(arguments: Sequence[str]) -> None:
    """Asks for the cases, and keeps what was said."""
    cases = SEEN | UNSEEN
    found = json.loads(DATA.read_text()) if DATA.exists() else {}
    only_plan = "--plan" in arguments
    named = [name for name in arguments if not name.startswith("--")]
    for name in named or list(cases):
        print(name, flush=True)
        one = found.setdefault(name, {})
        if not only_plan and (named or "compiler" not in one):
            one["compiler"] = ask(cases[name])
        one["plan"] = ask(cases[name], "--plan")
        DATA.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
