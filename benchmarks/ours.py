# SPDX-License-Identifier: Apache-2.0
"""Our side of every comparison, put together as the jobs put it together.

Networks come from settings, steps from `jobs.steps`, compiled and donated as a run
does it. One thing is not a user's: the policy cannot say its end token, so that every
decode takes all its steps and all sides do the same work.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.sizes import Size
from nlhf_jax import partitioning
from nlhf_jax.algorithms import nash_md_pg
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.jobs import judges, steps
from nlhf_jax.models.families import language_model
from nlhf_jax.preferences.judges import bradley_terry_judge, learned_judge
from nlhf_jax.settings import (
    LoopSettings,
    MemorySettings,
    MeshSettings,
    OptimizerSettings,
)
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    ComparisonBatch,
    LanguageModel,
    PromptBatch,
    Responses,
    SupervisedBatch,
)

PACKAGES = ("nlhf_jax", "jax", "jaxlib", "flax", "optax", "numpy")
NEVER = -1  # an end token that no logit belongs to
FIRST_WORD = 10  # ids below it are left to padding, end and templates
ALGORITHM = nash_md_pg(tau=0.1, beta=0.5)
OPTIMIZER = OptimizerSettings(name="adamw", learning_rate=1e-5)


def decoder_settings(size: Size) -> DecoderOnlySettings:
    """Returns the Llama-like decoder of a size."""
    return DecoderOnlySettings(
        vocab_size=size.vocab_size,
        emb_dim=size.width,
        num_heads=size.num_heads,
        num_kv_heads=size.num_heads,
        head_dim=size.head_dim,
        mlp_dim=size.mlp_dim,
        num_layers=size.num_layers,
    )


def t5_settings(size: Size) -> T5Settings:
    """Returns the T5 1.1 of a size, as many layers in the encoder and the decoder."""
    return T5Settings(
        vocab_size=size.vocab_size,
        emb_dim=size.width,
        num_heads=size.num_heads,
        head_dim=size.head_dim,
        mlp_dim=size.mlp_dim,
        num_encoder_layers=size.num_layers,
        num_decoder_layers=size.num_layers,
    )


def endless(
    settings: DecoderOnlySettings | T5Settings,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 frozen, can be shared
) -> LanguageModel:
    """Returns the network of some settings, which never ends a response."""
    return language_model(settings, memory)._replace(eos_id=NEVER)


def token_ids(size: Size, rows: int, length: int, seed: int) -> np.ndarray:
    """Returns [rows, length] word ids."""
    shape = (rows, length)
    rng = np.random.default_rng(seed)
    return rng.integers(FIRST_WORD, size.vocab_size, shape, dtype=np.int32)


def prompts_of(size: Size, rows: int = 0) -> PromptBatch:
    """Returns full prompts in host memory, B of them unless `rows` says otherwise."""
    tokens_BS = token_ids(size, rows or size.batch_size, size.prompt_length, 0)
    return PromptBatch(tokens_BS, np.ones(tokens_BS.shape, bool))


def responses_of(size: Size, rows: int, seed: int, length: int = 0) -> Responses:
    """Returns full responses in host memory."""
    tokens_BT = token_ids(size, rows, length or size.response_length, seed)
    return Responses(tokens_BT, np.ones(tokens_BT.shape, bool))


def comparisons_of(size: Size) -> ComparisonBatch:
    """Returns B labelled comparisons: 2 B rows of S + T tokens."""
    rows = size.batch_size
    label_B = (np.arange(rows) % 2).astype(np.float32)
    pair = (responses_of(size, rows, seed) for seed in (1, 2))
    return ComparisonBatch(prompts_of(size), *pair, label_B)


def targets_of(size: Size, rows: int) -> SupervisedBatch:
    """Returns prompts with a response each."""
    return SupervisedBatch(prompts_of(size, rows), responses_of(size, rows, 1))


def template_ids(text: str) -> list[int]:
    """Returns one id a word: the words are beside the point, their number counts."""
    return [2 + sum(map(ord, word)) % (FIRST_WORD - 2) for word in text.split()]


def judge_network(size: Size, kind: str) -> Any:
    """Returns the "reward" or the "preference" model of a size, as a job builds it."""
    return judges.NETWORKS[kind](
        decoder_settings(size),
        template_ids,
        prompt_length=size.prompt_length,
        response_length=size.response_length,
    )


def judge_of(kind: str, network: Any) -> Any:
    """Returns the judge of a network: sigmoid(r - r') of rewards, or the learned P."""
    if kind == "reward":
        return bradley_terry_judge(network)
    return learned_judge(network, None)


def made(init: Callable[[jax.Array], Any], seed: int) -> Any:
    """Returns random parameters."""
    return jax.jit(init)(jax.random.key(seed))


class PolicyRun:
    """A Nash-MD step of a size with everything it is called with.

    Attributes:
      network: of policy and reference.
      judge: who compares, see `judge_of`.
      step: what a job makes of them.
      compiled: the step as a run compiles it; the state is donated.
      state: of the next step.
      frozen: reference and judge, in their place.
      prompts: in host memory, as a run hands them over.
      key: of the run.
    """

    def __init__(self, size: Size, kind: str = "reward"):
        self.size, self.network = size, endless(decoder_settings(size))
        reward = judge_network(size, kind)
        self.judge = judge_of(kind, reward)
        self.step = steps.policy_step(
            self.network,
            ALGORITHM,
            self.judge,
            optimizer=OPTIMIZER,
            loop=LoopSettings(train_steps=1000, batch_size=size.batch_size),
            max_decode_length=size.response_length,
            num_updates_per_rollout=1,
        )
        self.mesh = partitioning.make_mesh(MeshSettings())
        self.state = self.step.init_state(made(self.network.init, 0))
        frozen = {REFERENCE: made(self.network.init, 1), kind: made(reward.init, 2)}
        lie = partitioning.step_shardings(
            self.mesh,
            self.state,
            self.state.param_sets[POLICY],
            self.network.logical_axes,
            frozen,
            {REFERENCE: self.network.logical_axes, kind: reward.logical_axes},
        )
        self.state = jax.device_put(self.state, lie.state)
        self.frozen = jax.device_put(frozen, lie.frozen)
        self.compiled = steps.compiled(self.step.step_fn, self.mesh, lie)
        self.prompts, self.key = prompts_of(size), jax.random.key(7)

    def arguments(self) -> tuple[Any, ...]:
        """Returns what the next step is called with."""
        return self.state, self.frozen, self.prompts, self.key

    def unit(self) -> dict[str, float]:
        """Takes one step and waits for it."""
        self.state, self.metrics = self.compiled(*self.arguments())
        jax.block_until_ready((self.state, self.metrics))
        return {}

    def facts(self) -> dict[str, float]:
        """Returns how often it was compiled and how many decode steps were taken."""
        return {
            "compilations": self.compiled.num_compilations,
            "decode_steps": float(self.metrics["decode/steps"]),
        }


def counts(compiled: Any) -> dict[str, float]:
    """Returns what the compiler says of one compiled program.

    `flops` counts the body of a loop once; `temporary_mib` is what is alive at once
    besides arguments and results.
    """
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": float(cost["flops"]),
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        "argument_mib": memory.argument_size_in_bytes / 2**20,
    }


def supervised_run(
    make_step: Callable[..., Any], network: Any, batch: Any
) -> tuple[Callable[[], Mapping[str, float]], Any]:
    """Returns one training step as a job compiles it, to be called; and that step.

    Args:
      make_step: of `supervised_step`.
      network: what is trained.
      batch: in host memory.
    """
    loop = LoopSettings(train_steps=1000, batch_size=len(batch.prompts.tokens_BS))
    step = steps.supervised(make_step, network, optimizer=OPTIMIZER, loop=loop)
    mesh = partitioning.make_mesh(MeshSettings())
    held = {"state": step.init_state(made(network.init, 0))}
    params = held["state"].param_sets[POLICY]
    lie = partitioning.step_shardings(
        mesh, held["state"], params, network.logical_axes, {}, {}
    )
    held["state"] = jax.device_put(held["state"], lie.state)
    compiled, key = steps.compiled(step.step_fn, mesh, lie), jax.random.key(7)

    def unit() -> Mapping[str, float]:
        held["state"], metrics = compiled(held["state"], {}, batch, key)
        jax.block_until_ready((held["state"], metrics))
        return {}

    return unit, compiled
