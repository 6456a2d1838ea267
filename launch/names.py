# SPDX-License-Identifier: Apache-2.0
"""Names that are safe everywhere, and what TPU types and topologies there are."""

import difflib
import hashlib
import math
import re

from launch.errors import SubmitError

LONGEST = 40
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

# Generation -> (sizes of --accelerator_type, TPU cores or chips as the name counts
# them; how many of those a host has; the most on one single host).
ACCELERATOR_TYPES = {
    "v2": ((8, 32, 128, 256, 512), 8, 8),
    "v3": ((8, 32, 64, 128, 256, 512, 1024, 2048), 8, 8),
    "v4": (tuple(8 * n for n in range(1, 513)), 8, 8),
    "v5litepod": ((1, 4, 8, 16, 32, 64, 128, 256), 4, 8),
    "v5p": (tuple(8 * n for n in range(1, 1537)), 8, 8),
    "v6e": ((1, 4, 8, 16, 32, 64, 128, 256), 4, 8),
}
ALIASES = {"v5e": "v5litepod", "v5lite": "v5litepod", "v5": "v5p"}
# --accelerator of a GKE node pool -> number of dimensions of its topologies.
NODE_POOLS = {
    "tpu-v4-podslice": 3,
    "tpu-v5-lite-podslice": 2,
    "tpu-v5p-slice": 3,
    "tpu-v6e-slice": 2,
    "tpu7x": 3,
}


def safe_name(text: str) -> str:
    """Returns a name for cloud objects, labels and paths: [a-z][-a-z0-9]*, at most 40.

    A name that has to be changed ends in a digest of the text, so that two names
    never become one.
    """
    if _NAME.fullmatch(text) and len(text) <= LONGEST:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"nlhf-{plain}"
    return f"{plain[: LONGEST - 7].strip('-')}-{digest}"


def job_name(given: str, job: list[str]) -> str:
    """Returns the safe form of `--name`, or `nlhf-JOB` where none is given."""
    return safe_name(given or f"nlhf-{job[0].strip('-')}")


def check_place(flag: str, text: str) -> str:
    """Returns the name of a zone, project, image or account.

    Raises:
      SubmitError: it begins with a dash or holds other characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9][-A-Za-z0-9._:/@]*", text):
        raise SubmitError(
            f"--{flag} must be letters, digits and -._:/@, beginning with a letter or "
            f"digit, got {text!r}"
        )
    return text


def num_hosts(accelerator_type: str) -> int:
    """Returns how many hosts a slice of `--accelerator_type` has.

    Raises:
      SubmitError: there is no such type; names the nearest.
    """
    generation, _, size = accelerator_type.rpartition("-")
    sizes = ACCELERATOR_TYPES.get(generation, ((),))[0]
    if size not in map(str, sizes):
        raise SubmitError(
            "--accelerator_type must be one like v4-32 or v5litepod-16, of "
            f"{', '.join(ACCELERATOR_TYPES)}; got {accelerator_type!r}"
            f"{_nearest_type(accelerator_type)}"
        )
    _, per_host, alone = ACCELERATOR_TYPES[generation]
    return 1 if int(size) <= alone else int(size) // per_host


def _nearest_type(text: str) -> str:
    """The type that may be meant: the generation first, then the size."""
    generation, _, size = text.rpartition("-")
    generation = ALIASES.get(generation, generation)
    close = difflib.get_close_matches(generation, ACCELERATOR_TYPES, n=1, cutoff=0.5)
    if not close or not size.isdecimal():
        return ""
    best = min(ACCELERATOR_TYPES[close[0]][0], key=lambda n: abs(n - int(size)))
    return f" (did you mean '{close[0]}-{best}'?)"


def num_chips(topology: str, dimensions: tuple[int, ...] = (2, 3)) -> int:
    """Returns how many chips `--topology` has.

    Raises:
      SubmitError: it is not AxB or AxBxC of powers of two (or multiples of 4).
    """
    parts = topology.split("x")
    sizes = [int(part) if re.fullmatch(r"[1-9]\d{0,2}", part) else 0 for part in parts]
    regular = all(n in (1, 2) or (n and n % 4 == 0) for n in sizes)
    if len(parts) not in dimensions or not regular:
        wanted = " or ".join(
            {2: "AxB like 4x4", 3: "AxBxC like 4x4x8"}[d] for d in dimensions
        )
        raise SubmitError(
            f"--topology must be {wanted}, each side 1, 2 or a multiple of 4, got "
            f"{topology!r}"
        )
    return math.prod(sizes)


def chips_of_machine(machine_type: str) -> int:
    """Returns the TPU chips of a Compute Engine machine type; 0 if it has none."""
    found = re.fullmatch(r"(?:ct\w+|tpu\w+)-[a-z]+-(\d+)t", machine_type)
    return int(found[1]) if found else 0
