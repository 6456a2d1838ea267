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
counts weights gathered along `fsdp`, caches and padding, but not the code, holes
between arrays, what is fetched early, nor what stays in a TPU's vector memory. Its
total over the compiler's, where both were asked:

| job | devices | layers | plan / compiler |
| --- | --- | --- | --- |
| sft | 8 CPU, data=2 x fsdp=4 | kept | 0.98 |
| sft | 8 CPU, data=2 x fsdp=4 | scan, remat full, 4 chunks | 1.00 |
| sft | 8 CPU, data=2 x fsdp=2 x tensor=2 | kept | 0.97 |
| preference | 8 CPU, fsdp=8 | scan, remat full | 0.92 |
| train | 8 CPU, fsdp=8 | kept | 0.81 |
| train | 8 CPU, fsdp=8 | scan, remat full, 4 chunks | 0.71 |
| sft, 4 layers | v5e:2x2, fsdp=4 | scan, remat full, 4 chunks | 1.01 |
| sft, 2 layers | v5e:2x2, fsdp=4 | scan, remat full, 4 chunks | 1.06 |
| sft, 2 layers, 32 rows of 256 | v5e:2x2, fsdp=4 | scan, remat full, 4 chunks | 1.12 |
| train | v5e:2x2, fsdp=4 | scan, remat full, 4 chunks | 1.23 |
| train, T5 Large and XL | v5e:16x16, fsdp=16 | scan, remat full, 4 chunks | 0.65 |

So it is within 10 % for the supervised jobs above but one (tests/scale_plans_test.py
holds two of them to it), and not for `train`: there, compile before you trust a close
verdict. On the TPUs the temporaries of `sft` alone are 29 % and 16 % too high, and the
code that is left out (44 and 57 MiB) makes up for it: the sum is closer than its parts.
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
    parts = [HEAD]
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
