# SPDX-License-Identifier: Apache-2.0
"""Copies of weights that Nash-MD-PG holds, with and without adapters, per family.

    python -m benchmarks.memory_table            writes docs/memory.md

Every figure is `nlhf compile --plan`'s: shapes alone, one device, no compiler.
"""

import argparse
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from nlhf_jax import compile_command
from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.jobs import compile as compile_job
from nlhf_jax.jobs import folders
from nlhf_jax.settings import LoraSettings, MemorySettings

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "memory.md"
MODELS = {
    "T5 1.1 Large": "t5_1_1_large",
    "Llama 3.2 1B": "llama_3_2_1b",
    "Gemma 2 2B": "gemma_2_2b",
    "Qwen 2.5 0.5B": "qwen_2_5_0_5b",
}
LORA = LoraSettings(
    rank=16,
    alpha=32.0,
    targets=("query", "key", "value", "out", "wi_0", "wi_1", "wo"),
)
LENGTHS = {"inputs": 512, "targets": 128}
BATCH = 8
WAYS = ("all weights", "LoRA", "LoRA, judge too")
COLUMNS = {
    "policy": ("parameters",),
    "optimiser": ("optimiser",),
    "base": ("frozen base",),
    "reference": ("frozen reference",),
    "preference": ("frozen preference",),
    "caches": ("caches",),
}
HEAD = f"""# Memory in numbers

Made by `python -m benchmarks.memory_table`; every figure is one that `nlhf compile
--plan` prints, none is written by hand. GiB on one device of a step of Nash-MD-PG with
Adam (`configs/algorithms/nash_md_pg.gin`), the preference model of the policy's shape;
{BATCH} prompts of {LENGTHS["inputs"]} tokens, responses of {LENGTHS["targets"]}.
Parameters that are trained and their two moments are float32, frozen weights bfloat16
(`MemorySettings.frozen_dtype`). Adapters ([lora.md](lora.md)) have rank {LORA.rank} on
every attention and feed-forward kernel.

* *all weights*: policy, reference and preference model are three sets of weights.
* *LoRA*: policy and reference are one base; the policy's adapters and their moments are
  what is trained. The preference model is one more set of weights.
* *LoRA, judge too*: the preference model is adapters on that base as well.

`temporaries` is the plan's estimate of what is alive at once besides, caches and
gradients among them, with a loop over layers, everything recomputed and the vocabulary
in 8 chunks. [scale.md](scale.md) says how far from the compiler's a plan is: for
`train`, compile before you trust a close verdict.

## Attention's weights

Beside the layers' inputs, a decoder-only model keeps for its backward pass the
attention weights of all queries and keys, which grow with the square of prompt plus
response. `MemorySettings.attention` says otherwise; all ways agree to rounding.

* `plain`, the default, keeps them.
* `recomputed` (`--gin.ATTENTION='"recomputed"'`) makes them again in the backward pass,
  one layer at a time.
* `chunked` makes them for `attention_chunk` queries at a time
  (`--gin.ATTENTION_CHUNK=128`), so that all of them never exist at once.
* `automatic` takes the platform's kernel: JAX's splash attention on TPUs, cuDNN's on
  GPUs in bfloat16, without a soft cap on the logits, with heads whose width is a
  multiple of 8 up to 128. It is `recomputed` elsewhere: on CPUs, in models with a
  sliding window (all their layers), and on several devices outside the train step, as
  in evaluations.

A step of decoding keeps nothing for a backward pass and reads its cache as ever.

T5 has `plain` alone and refuses the rest; `MemorySettings.remat = 'full'` computes its
attention again, as all of a layer. A T5 judge beside a decoder-only policy stays
`plain`. The table below is of `plain`.

## The table

"""


def figures(
    settings: ModelSettings, way: str, bindings: Mapping[str, Any], target: Any
) -> dict[str, Any]:
    """Returns the plan's memory of one model, trained in one way."""
    said = dict(bindings)
    given: dict[str, Any] = {"reference_model": settings, "preference_model": settings}
    if way == WAYS[0]:
        return compile_job.estimate("train", said, given, target)["memory"]
    said["lora"] = LORA
    if way == WAYS[1]:
        return compile_job.estimate("train", said, given, target)["memory"]
    # Descriptions are all that a plan reads of a folder.
    with tempfile.TemporaryDirectory() as place:
        for kind, name in (("language_model", "reference"), ("preference", "judge")):
            one = folders.ModelDescription(
                kind, settings, LENGTHS, lora=LORA, base=place, base_digest="a base"
            )
            folders.describe(pathlib.Path(place, name), one, folders.BYTE_VOCABULARY)
        said["reference_checkpoint"] = f"{place}/reference"
        said["preference_checkpoint"] = f"{place}/judge"
        return compile_job.estimate("train", said, {}, target)["memory"]


def job_bindings() -> dict[str, Any]:
    """Returns the arguments of `train` that all rows share."""
    words = [
        f"--gin_file={ROOT}/configs/algorithms/nash_md_pg.gin",
        f"--gin.BATCH_SIZE={BATCH}",
        f"--gin.MAX_DECODE_LENGTH={LENGTHS['targets']}",
        f"--gin.TASK_FEATURE_LENGTHS={LENGTHS!r}",
    ]
    found = compile_command.resolve(
        "train", words, ["reference_checkpoint", "preference_checkpoint"]
    )
    memory = MemorySettings(
        remat="full",
        scan_layers=True,
        num_vocab_chunks=8,
        frozen_dtype="bfloat16",
    )
    optimizer = dataclasses.replace(found["optimizer"], name="adamw")
    return found | {"memory": memory, "optimizer": optimizer}


def row(name: str, way: str, memory: Mapping[str, Any]) -> str:
    """Returns a line of the table."""
    parts = memory["parts"]
    cells = [sum(parts.get(p, 0) for p in names) for names in COLUMNS.values()]
    held = sum(size for part, size in parts.items() if part != "caches")
    cells += [held, memory["temporaries"], memory["total"]]
    return "| " + " | ".join([name, way, *(gib(size) for size in cells)]) + " |"


def gib(size: float) -> str:
    """Returns bytes in GiB; small ones with more digits, none as a dash."""
    if not size:
        return "-"
    return f"{size / 2**30:.2f}" if size >= 2**30 / 10 else f"{size / 2**30:.3f}"


def table(models: Mapping[str, ModelSettings], bindings: Mapping[str, Any]) -> str:
    """Returns the whole table, three ways of each model."""
    titles = ["model", "trained", *COLUMNS, "weights and moments", "temporaries", "sum"]
    lines = ["| " + " | ".join(titles) + " |"]
    lines += ["|" + " --- |" * 2 + " ---: |" * (len(titles) - 2)]
    target = compile_job.target_of(compile_job.Options(cpu_devices=1), 1)
    for name, settings in models.items():
        for way in WAYS:
            memory = figures(settings, way, bindings, target)
            lines.append(row(name, way, memory))
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=PAGE)
    output = parser.parse_args(words).output
    models = {
        name: compile_command.read_shape(str(ROOT / "configs/models" / f"{file}.gin"))
        for name, file in MODELS.items()
    }
    output.write_text(HEAD + table(models, job_bindings()))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    raise SystemExit(main())
