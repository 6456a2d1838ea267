# SPDX-License-Identifier: Apache-2.0
"""The registry: one file and one line each."""

from collections.abc import Callable

from nlhf_jax.algorithms.best_response import best_response
from nlhf_jax.algorithms.comal import comal
from nlhf_jax.algorithms.egpo import egpo
from nlhf_jax.algorithms.enpo import enpo, enpo_closed_form, iterative_nlhf
from nlhf_jax.algorithms.grpo import grpo
from nlhf_jax.algorithms.inpo import inpo
from nlhf_jax.algorithms.ipo_md import ipo_md
from nlhf_jax.algorithms.mpo import mpo
from nlhf_jax.algorithms.nash_ema_pg import nash_ema_pg
from nlhf_jax.algorithms.nash_md_pg import nash_md_pg
from nlhf_jax.algorithms.nash_mirror_prox import nash_mirror_prox
from nlhf_jax.algorithms.online_dpo import online_dpo
from nlhf_jax.algorithms.online_ipo import online_ipo
from nlhf_jax.algorithms.onpo import onpo
from nlhf_jax.algorithms.reward_pg import reward_pg
from nlhf_jax.algorithms.rloo import rloo
from nlhf_jax.algorithms.self_play import self_play
from nlhf_jax.algorithms.spo import spo
from nlhf_jax.algorithms.sppo import sppo
from nlhf_jax.algorithms.xpo import xpo
from nlhf_jax.types import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "nash_md_pg": nash_md_pg,
    "nash_ema_pg": nash_ema_pg,
    "self_play": self_play,
    "spo": spo,
    "best_response": best_response,
    "online_ipo": online_ipo,
    "ipo_md": ipo_md,
    "inpo": inpo,
    "iterative_nlhf": iterative_nlhf,
    "enpo": enpo,
    "enpo_closed_form": enpo_closed_form,
    "egpo": egpo,
    "nash_mirror_prox": nash_mirror_prox,
    "sppo": sppo,
    "onpo": onpo,
    "mpo": mpo,
    "comal": comal,
    "reward_pg": reward_pg,
    "rloo": rloo,
    "grpo": grpo,
    "online_dpo": online_dpo,
    "xpo": xpo,
}
