# SPDX-License-Identifier: Apache-2.0
"""Which cases of a parametrised test wait for the battery, the longer run of CI."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def all_but(
    kept: Collection[Any], cases: Iterable[Any], key: Callable[[Any], Any] = lambda c: c
) -> list:
    """Returns the cases, marked for the battery where `key` of them is not in `kept`.

    Raises:
      ValueError: one of `kept` is no case, so that the suite would not run it.
    """
    cases = list(cases)
    missing = set(kept) - {key(case) for case in cases}
    if missing:
        raise ValueError(f"no such cases: {sorted(map(str, missing))}")
    return [
        case if key(case) in kept else pytest.param(case, marks=pytest.mark.battery)
        for case in cases
    ]
