# SPDX-License-Identifier: Apache-2.0
"""Our decode as a side: alone beside peers, and its kinds beside each other.

python -m benchmarks.ours_decode plain --size tiny      # speaks the line protocol
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import ours
from benchmarks.common import Counted
from benchmarks.protocol import Work, main, timed
from benchmarks.sizes import Size
from nlhf_jax import decoding
from nlhf_jax.types import POLICY, REFERENCE, LanguageModel, Speaker

PLAIN = Speaker({POLICY: 1.0})
CERTAIN = 1e9  # a logit that leaves no other token a chance


def decode(
    model: LanguageModel, speakers: Sequence[Speaker], max_length: int, name: str
) -> Counted:
    """Returns (param_sets, prompts, key) -> rollout, compiled and counted."""

    def run(param_sets, prompts, key):
        return decoding.sample(
            model, param_sets, speakers, prompts, key, max_length=max_length
        )

    return Counted(name, run)


def plain(size: Size, is_t5: bool = False) -> Work:
    """One response to every prompt under one set of parameters."""
    settings = ours.t5_settings(size) if is_t5 else ours.decoder_settings(size)
    model = ours.endless(settings)
    fn = decode(model, (PLAIN,), size.response_length, "plain")
    sets, prompts = {POLICY: ours.made(model.init, 0)}, ours.prompts_of(size)
    key, taken = jax.random.key(7), {}

    def unit():
        taken["steps"] = fn(sets, prompts, key).num_steps

    def facts():
        steps = {"decode_steps": int(taken["steps"])}
        return steps | {"compilations": fn.num_compilations}

    return Work(unit, facts)


def ending_at(model: LanguageModel, last_step: int, eos_id: int = 1) -> LanguageModel:
    """Returns a model that says its end, for certain, at one step of the decode."""

    def decode_step(params, cache, tokens_R, step):
        logits_RV, cache = model.decode_step(params, cache, tokens_R, step)
        is_end_V = jnp.arange(logits_RV.shape[1]) == eos_id
        forced_RV = jnp.where(is_end_V, CERTAIN, logits_RV)
        return jnp.where(step >= last_step, forced_RV, logits_RV), cache

    return model._replace(decode_step=decode_step, eos_id=eos_id)


def kinds_of(size: Size) -> dict[str, Counted]:
    """Returns every kind of decode that is compared with another of ours.

    `ends_at_quarter` and `ends_at_last` differ in the step at which all rows end.
    """
    model = ours.endless(ours.decoder_settings(size))
    length, both = size.response_length, ours.ALGORITHM.speakers
    make = functools.partial(decode, model)
    quarter = ending_at(model, length // 4 - 1)
    last = ending_at(model, length - 1)
    return {
        "plain": make((both[0],), length, "plain"),
        "mixture": make((both[1],), length, "mixture"),
        "fused": make(both, length, "fused"),
        "four_times": make((both[0],), 4 * length, "four_times"),
        "ends_at_quarter": decode(quarter, (PLAIN,), length, "ends_at_quarter"),
        "ends_at_last": decode(last, (PLAIN,), length, "ends_at_last"),
    }


def _turned(names: Sequence[str]) -> Callable[[], list[str]]:
    turn = iter(range(2**31))

    def order():
        first = next(turn) % len(names)
        return [*names[first:], *names[:first]]

    return order


def kinds(size: Size) -> Work:
    """All kinds in turns; a unit does each once, and begins with the next each time."""
    fns = kinds_of(size)
    model = ours.endless(ours.decoder_settings(size))
    sets = {
        name: ours.made(model.init, i) for i, name in enumerate((POLICY, REFERENCE))
    }
    args = (sets, ours.prompts_of(size), jax.random.key(7))
    order, taken = _turned(list(fns)), {}

    def unit():
        parts = {}
        for name in order():
            parts[name], drawn = timed(lambda name=name: fns[name](*args))
            taken[name] = drawn.num_steps
        parts["separate"] = parts["plain"] + parts["mixture"]
        return parts

    def facts() -> dict[str, Any]:
        steps = {f"{name}_steps": int(count) for name, count in taken.items()}
        times = {
            f"{name}_compilations": fn.num_compilations for name, fn in fns.items()
        }
        return steps | times

    return Work(unit, facts)


VARIANTS = {
    "plain": plain,
    "t5": functools.partial(plain, is_t5=True),
    "kinds": kinds,
}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, ours.PACKAGES))
