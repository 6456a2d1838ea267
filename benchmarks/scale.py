# SPDX-License-Identifier: Apache-2.0
"""Asks `nlhf compile` for pods of TPUs, and writes docs/scale.md: no TPU is needed.

    python -m benchmarks.scale                  all cases; hours on two cores
    python -m benchmarks.scale v5e-xl --plan    one case, from shapes alone

What was found before stays in docs/scale.json, and the page is made of all of it.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import plans
from nlhf_jax.scale import words

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "docs" / "scale.json", ROOT / "docs" / "scale.md"
RUN = ["--job=train", "--gin_file=configs/runs/paper_scale.gin"]
RUN += ["--reference_model=configs/models/t5_1_1_large.gin"]
CASES = {
    f"{chip}-{judge}": [
        *RUN,
        f"--preference_model=configs/models/t5_1_1_{judge}.gin",
        f"--topology={topology}",
    ]
    for judge in ("xl", "xxl")
    for chip, topology in (("v5e", "v5e:16x16"), ("v4", "v4:4x4x4"))
}
HEAD = """# What a step of a pod's size needs

Made by `python -m benchmarks.scale`; every figure of a case is printed by `nlhf
compile`, none is written by hand. Policy and reference are T5 1.1 Large, the preference
model is T5 1.1 XL or XXL: `configs/runs/paper_scale.gin`. Where a table says
"compiled", the TPU compiler made the whole step (rollout, score, update) for that slice
on a machine without a TPU. Nothing was run: a roofline is the least time a step can
take, not the time it takes.

Where it says "planned", arguments are exact and temporaries an estimate from shapes: it
counts weights gathered along `fsdp`, caches, padding, what is written over what, and
the order in which a compiler runs operations; not the code, holes between arrays, nor
what is fetched early. Its total over the compiler's, where both were asked
(`python -m benchmarks.plans`; heads of 64, prompts of 128, 96 or 64 tokens):

{table}

So on fake CPU devices it is within 10 % where layers are in a loop, also for `train`
(tests/scale_plans_test.py holds four of them to it), but 13 % too low with TENSOR=2,
where the compiler lays out some arrays anew. Where every layer is kept it is up to 22 %
too low: CPUs run whatever can run side by side, so the judge and the
update at the same time, and how their phases meet is not foreseen; nor is a library of
the CPU's that takes a whole layer at once and wants its constants as arrays. For
`train` on TPUs it is below: at these sizes most of what is missing is code, which is
not estimated; in a step of a pod's size, arrays. There, compile before you trust a
close verdict.
"""


def ask(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns what `nlhf compile --json` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "nlhf_jax", "compile", *arguments, "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns docs/scale.md."""
    compared = json.loads(plans.DATA.read_text())
    parts = [HEAD.format(table=plans.table(compared))]
    for name, figures in sorted(found.items()):
        how = "planned" if figures["planned"] else "compiled"
        command = " ".join(["nlhf compile", *CASES[name.split("/")[0]]])
        command += " --plan" * figures["planned"]
        parts.append(
            f"## {name.split('/')[0]}, {how}\n\n    {command}\n\n```\n"
            f"{words.report(figures)}\n```\n"
        )
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    """Asks for the cases named, all if none is, and writes the page anew."""
    is_plan = "--plan" in arguments
    names = [name for name in arguments if not name.startswith("--")] or list(CASES)
    found = json.loads(DATA.read_text()) if DATA.exists() else {}
    for name in names:
        print(name, flush=True)
        key = f"{name}/plan" if is_plan else name
        found[key] = ask([*CASES[name], *["--plan"] * is_plan])
        DATA.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
