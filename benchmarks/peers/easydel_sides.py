# SPDX-License-Identifier: Apache-2.0
"""EasyDeL: its "Nash-MD" step, and its `generate`.

    python -m benchmarks.peers.easydel_sides step --size tiny

Its step draws from policy and from reference and lets a coin pick one of the two as the
opponent: there is no mixture, and a Python function scores, so it does less than
Nash-MD. Two ways round it are needed on a CPU:

* its paged engine, the default, budgets 4 GiB of pages whatever it is asked for and is
  ended by the kernel: `use_esurge_generation=False`;
* `generate` is compiled for the training state and then called with the reference's,
  which has no optimiser, and fails on the structure of the tree: here the reference is
  a training state with the reference's weights.
"""

import tempfile
from typing import Any

from benchmarks.peers import words
from benchmarks.peers.stepping import Stepper
from benchmarks.protocol import Work, main
from benchmarks.sizes import Size

PACKAGES = ("easydel", "jax", "jaxlib", "flax", "transformers")
NUM_STEPS = 1000


def model_of(size: Size, seed: int) -> Any:
    """Returns a random Llama of a size in float32."""
    import easydel
    import jax.numpy as jnp
    from flax import nnx
    from transformers import GenerationConfig

    config = easydel.LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.mlp_dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=size.prompt_length + size.response_length,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=size.vocab_size,
    )
    model = easydel.LlamaForCausalLM(
        config=config,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(seed),
    )
    # Only a model that was loaded gets one, and `generate` asks every model for it.
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def decode(size: Size) -> Work:
    """T tokens after full prompts by `generate`, sampled without truncation."""
    import jax
    import jax.numpy as jnp
    from transformers import GenerationConfig

    model = model_of(size, 0)
    tokenizer = words.tokenizer(size)
    texts = words.prompts(size, size.batch_size)
    ids = jnp.asarray(tokenizer(texts)["input_ids"], jnp.int32)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=size.response_length,
        max_length=size.prompt_length + size.response_length,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=size.vocab_size,
    )
    run = jax.jit(
        lambda ids, mask: (
            model.generate(
                ids, attention_mask=mask, generation_config=settings
            ).sequences
        )
    )
    found: dict[str, Any] = {}

    def unit() -> None:
        with model.mesh:
            found["ids"] = jax.block_until_ready(run(ids, jnp.ones_like(ids)))

    return Work(
        unit, lambda: {"decode_steps": found["ids"].shape[1] - size.prompt_length}
    )


def arguments(size: Size, folder: str) -> Any:
    """Returns the trainer's arguments: its defaults, but no paged engine and silent."""
    import easydel

    return easydel.NashMDConfig(
        save_directory=folder,
        total_batch_size=size.batch_size,
        max_prompt_length=size.prompt_length,
        max_completion_length=size.response_length,
        num_return_sequences=1,
        num_train_epochs=1,
        max_training_steps=NUM_STEPS,
        learning_rate=1e-5,
        use_esurge_generation=False,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_wandb=False,
        do_last_save=False,
        save_steps=None,
        report_steps=NUM_STEPS,
        log_steps=NUM_STEPS,
    )


def reward(prompts: Any, completions: Any, **ignored: Any) -> list[float]:
    """Returns a score a completion that costs nothing."""
    return [float(len(str(one)) % 7) for one in completions]


def step(size: Size) -> Work:
    """One step of `NashMDTrainer.train`."""
    import easydel
    from datasets import Dataset

    texts = words.prompts(size, 4 * size.batch_size)

    def loop(stepper: Stepper) -> None:
        trainer = easydel.NashMDTrainer(
            arguments=arguments(size, tempfile.mkdtemp()),
            model=model_of(size, 0),
            reward_funcs=reward,
            reference_model=model_of(size, 1),
            train_dataset=Dataset.from_dict({"prompt": texts * (NUM_STEPS // 4)}),
            processing_class=words.tokenizer(size),
        )
        weights = trainer.ref_state.graphstate
        whole, prepare = trainer._execute_train_step, trainer._preprocess_batch_input

        def prepared(state: Any, *given: Any, **named: Any) -> Any:
            trainer.ref_state = state.replace(graphstate=weights)
            return prepare(state, *given, **named)

        def paced(*given: Any, **named: Any) -> Any:
            stepper.begin()
            result = whole(*given, **named)
            stepper.done()
            return result

        trainer._preprocess_batch_input = prepared
        trainer._execute_train_step = paced
        trainer.train()

    return Work(Stepper(loop).step)


VARIANTS = {"decode": decode, "step": step}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, PACKAGES))
