# SPDX-License-Identifier: Apache-2.0
"""Tunix: its sampler, and a step of GRPO with two generations a prompt.

    python -m benchmarks.peers.tunix_sides step --size tiny

It has no Nash-MD. GRPO-2 draws as many tokens, from the policy alone, scores them with
a Python function and trains on all of them: no mixture, no reward model, but 2 B rows
in the update.
"""

import functools
from typing import Any

from benchmarks.peers import words
from benchmarks.peers.stepping import Stepper
from benchmarks.protocol import Work, main
from benchmarks.sizes import Size

PACKAGES = ("google-tunix", "tunix", "jax", "jaxlib", "flax", "optax")
NUM_STEPS = 10_000
AXES = ("fsdp", "tp")


def mesh_here() -> Any:
    """Returns the mesh of one device that its models' shardings name."""
    import jax
    import numpy as np

    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return jax.sharding.Mesh(devices, AXES)


def model_of(size: Size, seed: int) -> Any:
    """Returns a random Llama 3 of a size."""
    from flax import nnx
    from tunix.models.llama3 import model

    config = model.ModelConfig(
        num_layers=size.num_layers,
        vocab_size=size.vocab_size,
        embed_dim=size.width,
        hidden_dim=size.mlp_dim,
        num_heads=size.num_heads,
        head_dim=size.head_dim,
        num_kv_heads=size.num_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    return model.Llama3(config, rngs=nnx.Rngs(seed))


def decode(size: Size) -> Work:
    """T tokens after full prompts by its `Sampler`, top-p at 1: plain sampling."""
    from tunix.generate import sampler as samplers

    cache = samplers.CacheConfig(
        cache_size=size.prompt_length + size.response_length + 1,
        num_layers=size.num_layers,
        num_kv_heads=size.num_heads,
        head_dim=size.head_dim,
    )
    texts, mesh = words.prompts(size, size.batch_size), mesh_here()
    with mesh:
        model = model_of(size, 0)
        sampler = samplers.Sampler(model, words.PlainTokenizer(size), cache)
    found: dict[str, Any] = {}

    def unit() -> None:
        with mesh:
            found["output"] = sampler(
                texts,
                max_generation_steps=size.response_length,
                max_prompt_length=size.prompt_length,
                temperature=1.0,
                top_p=1.0,
                seed=0,
            )

    def facts() -> dict[str, int]:
        return {"decode_steps": min(len(one) for one in found["output"].tokens)}

    return Work(unit, facts)


def cluster_of(size: Size, mesh: Any) -> Any:
    """Returns its cluster of policy, reference and sampler on one device."""
    import optax
    from tunix.rl import rl_cluster
    from tunix.rl.rollout import base_rollout

    roles = (
        rl_cluster.Role.ACTOR,
        rl_cluster.Role.REFERENCE,
        rl_cluster.Role.ROLLOUT,
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-5),
        eval_every_n_steps=NUM_STEPS,
        max_steps=NUM_STEPS,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=size.response_length,
        max_prompt_length=size.prompt_length,
        kv_cache_size=size.prompt_length + size.response_length + 1,
        temperature=1.0,
    )
    return rl_cluster.RLCluster(
        actor=model_of(size, 0),
        reference=model_of(size, 1),
        tokenizer=words.PlainTokenizer(size),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=training,
            rollout_config=rollout,
        ),
    )


def step(size: Size) -> Work:
    """One global step of `GRPOLearner.train`: generate, reward, update."""
    import numpy as np
    from tunix.rl.grpo import grpo_learner

    texts = np.array(words.prompts(size, size.batch_size))

    def reward(prompts: Any, completions: Any, **ignored: Any) -> list[float]:
        return [float(len(one) % 7) for one in completions]

    def loop(stepper: Stepper) -> None:
        mesh = mesh_here()
        with mesh:
            learner = grpo_learner.GRPOLearner(
                rl_cluster=cluster_of(size, mesh),
                reward_fns=reward,
                algo_config=grpo_learner.GRPOConfig(num_generations=2),
            )
            whole = learner._run_global_step

            @functools.wraps(whole)
            def paced(*given: Any, **named: Any) -> Any:
                stepper.begin()
                result = whole(*given, **named)
                stepper.done()
                return result

            learner._run_global_step = paced
            learner.train({"prompts": texts} for _ in range(NUM_STEPS))

    return Work(Stepper(loop).step)


VARIANTS = {"decode": decode, "step": step}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, PACKAGES))
