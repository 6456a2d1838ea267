# SPDX-License-Identifier: Apache-2.0
"""What decoding two speakers at once, and a whole step at once, cost against parts.

The model cannot say its end token, so every decode takes all its steps and both sides
of a ratio do the same work.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import (
    Counted,
    Figure,
    interleaved,
    machine,
    write_results,
)
from nlhf_jax import decoding, huge_pages, train_step
from nlhf_jax.algorithms import nash_md_pg
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings
from nlhf_jax.models.families import language_model
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.preferences.inputs import pairwise_template
from nlhf_jax.preferences.judges import learned_judge
from nlhf_jax.preferences.pairwise import pairwise_preference_model
from nlhf_jax.settings import OptimizerSettings
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import POLICY, REFERENCE, PromptBatch

NEVER = -1  # an end token that no logit belongs to


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of a benchmark: the network, prompts B x S, responses of T tokens."""

    settings: ModelSettings
    batch_size: int
    prompt_length: int
    response_length: int


SIZES = {
    "tiny": Size(T5Settings(64, 16, 2, 8, 16, 1, 1), 2, 4, 4),
    "small": Size(T5Settings(8192, 256, 4, 64, 1024, 4, 4), 16, 64, 64),
    "decoder": Size(DecoderOnlySettings(8192, 256, 8, 8, 32, 768, 4), 16, 64, 64),
}


class Bench:
    """The parts of a Nash-MD step on random weights, each compiled by itself."""

    def __init__(self, size: Size):
        self.size = size
        model = language_model(size.settings)
        self.model = model._replace(eos_id=NEVER)
        self.algorithm = nash_md_pg(tau=0.1, beta=0.25)
        self.policy_speaker, self.mixture_speaker = self.algorithm.speakers
        preference = pairwise_preference_model(
            size.settings,
            # The template's words are beside the point: their number of tokens counts.
            pairwise_template(lambda text: [2 + ord(c) % 50 for c in text[:4]]),
            prompt_length=size.prompt_length,
            response_length=size.response_length,
        )
        self.judge = learned_judge(preference, None)
        keys = jax.random.split(jax.random.key(0), 3)
        policy, reference = (jax.jit(model.init)(key) for key in keys[:2])
        judge_params = jax.jit(preference.init)(keys[2])
        self.optimizer = make_optimizer(OptimizerSettings(), 1000)
        self.state = train_step.init_state(policy, self.algorithm, self.optimizer)
        self.frozen = {REFERENCE: reference, "preference": judge_params}
        shape = (size.batch_size, size.prompt_length)
        tokens = np.random.default_rng(0).integers(2, size.settings.vocab_size, shape)
        self.prompts = PromptBatch(
            jnp.asarray(tokens, jnp.int32), jnp.ones(shape, bool)
        )
        self.key = jax.random.key(1)

    def decode(self, name: str, speakers: Sequence[Any], max_length: int) -> Counted:
        """Returns (param_sets, prompts, key) -> rollout of the speakers, compiled."""

        def run(param_sets, prompts, key):
            return decoding.sample(
                self.model, param_sets, speakers, prompts, key, max_length=max_length
            )

        return Counted(name, run)

    def decode_args(self) -> tuple[Any, ...]:
        """Returns the arguments of what `decode` made."""
        sets = {POLICY: self.state.param_sets[POLICY]}
        return sets | {REFERENCE: self.frozen[REFERENCE]}, self.prompts, self.key

    def step_parts(self) -> dict[str, Counted]:
        """Returns the whole step, and its scoring and update by themselves."""
        model, algorithm, optimizer = self.model, self.algorithm, self.optimizer
        whole = train_step.make_train_step(
            model,
            algorithm,
            self.judge,
            optimizer,
            max_length=self.size.response_length,
        )

        def update(state, frozen, examples):
            return train_step.update(
                model,
                algorithm,
                optimizer,
                state,
                dict(frozen) | state.param_sets,
                examples,
                num_microbatches=1,
            )

        score = functools.partial(train_step.score, algorithm, self.judge)
        return {
            "step": Counted("step", whole),
            "score": Counted("score", score),
            "update": Counted("update", update),
        }


def gumbel_draw(key: jax.Array, logits_RV: jax.Array, temperature: float = 1.0):
    """Draws one id per row with one Gumbel number per logit, as JAX does."""
    del temperature
    return jax.random.categorical(key, logits_RV, axis=-1).astype(jnp.int32)


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Returns {"figures": [Figure], "compilations": {...}, "decode_steps": {...}}.

    `compilations` counts how often each compiled function was compiled: each is called
    with one shape, so 1 is right. `decode_steps` counts the steps each decode took.
    """
    bench = Bench(size)
    length = size.response_length
    both = bench.algorithm.speakers
    decodes = {
        "fused": bench.decode("fused", both, length),
        "policy": bench.decode("policy", (bench.policy_speaker,), length),
        "mixture": bench.decode("mixture", (bench.mixture_speaker,), length),
        "twice_as_long": bench.decode("twice_as_long", both, 2 * length),
        "gumbel": bench.decode("gumbel", both, length),
        "shared": bench.decode("shared", both, length),
    }
    args = bench.decode_args()
    with mock.patch.object(decoding, "draw", gumbel_draw):
        # The draw is chosen when the function is traced, in its first call.
        decodes["gumbel"](*args)
    with mock.patch.object(decoding, "platform", lambda: "any that shares"):
        decodes["shared"](*args)
    drawn = {name: decode(*args) for name, decode in decodes.items()}
    samples = drawn["fused"].samples
    responses = tuple(one.responses for one in samples)
    steps = bench.step_parts()
    judged = (bench.frozen, bench.prompts, responses)
    examples = (bench.prompts, samples, steps["score"](*judged))
    calls = {
        name: functools.partial(decode, *args) for name, decode in decodes.items()
    } | {
        "step": functools.partial(
            steps["step"], bench.state, bench.frozen, bench.prompts, bench.key
        ),
        "score": functools.partial(steps["score"], *judged),
        "update": functools.partial(
            steps["update"], bench.state, bench.frozen, examples
        ),
    }
    seconds = interleaved(calls, rounds)
    return {
        "figures": figures(seconds, length),
        "compilations": {
            name: fn.num_compilations for name, fn in (decodes | steps).items()
        },
        "decode_steps": {name: int(one.num_steps) for name, one in drawn.items()},
    }


def figures(seconds: dict[str, list[float]], length: int) -> list[Figure]:
    """Returns the ratios with their goals, from the seconds of every round."""
    rows = (
        ("both speakers at once / apart", ["fused"], ["policy", "mixture"], 1.0),
        (
            "whole step / rollout + score + update",
            ["step"],
            ["fused", "score", "update"],
            1.1,
        ),
        (f"{2 * length} tokens / {length} tokens", ["twice_as_long"], ["fused"], 2.2),
        ("decode, inverse-CDF / Gumbel", ["fused"], ["gumbel"], None),
        ("a prompt's keys once / as by default", ["shared"], ["fused"], None),
    )
    return [
        Figure.of(name, seconds, above, below, goal)
        for name, above, below, goal in rows
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints one line per figure, and writes the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for verdicts")
    parser.add_argument("--output", default="", help="JSON file for the results")
    options = parser.parse_args(words)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    described = machine()
    found = measure(SIZES[options.size], options.rounds)
    print(f"machine: {described}")
    for figure in found["figures"]:
        print(figure.line())
    again = {name: n for name, n in found["compilations"].items() if n != 1}
    print(f"compilations per function and shape: {again or 1}, goal 1")
    print(f"decode steps: {found['decode_steps']}")
    records = [figure.record() for figure in found["figures"]]
    write_results(
        options.output,
        {
            "size": options.size,
            "machine": described,
            "figures": records,
            "compilations": found["compilations"],
            "decode_steps": found["decode_steps"],
        },
    )
    return 0


if __name__ == "__main__":
    huge_pages.start_again()  # as the command line does
    raise SystemExit(main())
