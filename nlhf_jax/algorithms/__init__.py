# SPDX-License-Identifier: Apache-2.0
"""The registry: one file and one line each."""

from collections.abc import Callable

from nlhf_jax.algorithms.best_response import best_response
from nlhf_jax.algorithms.nash_md_pg import nash_md_pg
from nlhf_jax.algorithms.reward_pg import reward_pg
from nlhf_jax.algorithms.self_play import self_play
from nlhf_jax.types import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "nash_md_pg": nash_md_pg,
    "self_play": self_play,
    "best_response": best_response,
    "reward_pg": reward_pg,
}
