# SPDX-License-Identifier: Apache-2.0
"""`python -m nlhf_jax JOB ...` is `nlhf JOB ...`."""

import sys

from nlhf_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
