# SPDX-License-Identifier: Apache-2.0
"""T5X, which is on no package index: absent, and why.

    python -m benchmarks.peers.t5x decode --size tiny

A side would build `t5x.models.EncoderDecoderModel` of the size, decode with its
`predict_batch` under `temperature_sample`, and train with its `Trainer` and Adafactor.
It was measured once from a copy of its repository; until an environment has one, the
rows say that there is none.
"""

import functools

from benchmarks.protocol import Absent, Work, main
from benchmarks.sizes import Size


def side(size: Size, what: str) -> Work:
    """Raises `Absent`: not installed or, if it is, not written."""
    import t5x

    raise Absent(f"{t5x.__name__} is installed, but its {what} side is not written")


VARIANTS = {
    "decode": functools.partial(side, what="decode"),
    "training": functools.partial(side, what="training"),
}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, ("t5x",)))
