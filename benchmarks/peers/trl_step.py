# SPDX-License-Identifier: Apache-2.0
"""TRL's Nash-MD step: as shipped, with its cache on, repaired, and compiled.

    python -m benchmarks.peers.trl_step shipped --size tiny

As shipped, gradient checkpointing is on by default and turns the key-value cache off.
With checkpointing off, policy and reference write into one cache: what is sampled is
wrong (the next token's law is off by half in total variation), and its time is kept as
an estimate of what a repaired TRL would take. `repaired` gives each model a cache of
its own, and `compiled` also static caches and `torch.compile` for all three models.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.peers import torch_models, words
from benchmarks.peers.stepping import Stepper
from benchmarks.protocol import Work, main, timed
from benchmarks.sizes import Size

PARTS = {
    "_generate_completions": "generate",
    "_compute_rewards": "score",
    "_compute_logprobs": "log_probs",
}
NUM_STEPS = 10_000


def config(size: Size, folder: str, is_checkpointed: bool) -> Any:
    """Returns the trainer's configuration: its defaults, but float32 and silent."""
    from trl.experimental.nash_md import NashMDConfig

    return NashMDConfig(
        output_dir=folder,
        per_device_train_batch_size=size.batch_size,
        max_new_tokens=size.response_length,
        max_length=8 * (size.prompt_length + size.response_length),
        max_steps=NUM_STEPS,
        learning_rate=torch_models.LEARNING_RATE,
        gradient_checkpointing=is_checkpointed,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def decode(
    models: Sequence[Any],
    weights: Sequence[float],
    prompt_ids: Any,
    length: int,
    make_cache: Callable[[Any], Any],
) -> Any:
    """Returns prompts and responses drawn from a mixture, a cache for each model.

    Logits are mixed with the weights and one token a row is drawn, `length` times.
    """
    torch = torch_models.torch_here()
    caches = [make_cache(model) for model in models]
    ids, newest = [prompt_ids], prompt_ids
    for _ in range(length):
        logits = 0.0
        for model, weight, cache in zip(models, weights, caches, strict=True):
            found = model(
                input_ids=newest,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = logits + weight * found.logits[:, -1].float()
        newest = torch.multinomial(torch.softmax(logits, dim=-1), 1)
        ids.append(newest)
    return torch.cat(ids, dim=1)


def dynamic_cache(model: Any) -> Any:
    """Returns an empty cache that grows."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def static_caches(size: Size) -> Callable[[Any], Any]:
    """Returns (model) -> its one cache of full length, emptied: the same arrays each
    time, so that what was compiled for them is used again."""
    from transformers import StaticCache

    length, kept = size.prompt_length + size.response_length, {}

    def make(model: Any) -> Any:
        if id(model) not in kept:
            kept[id(model)] = StaticCache(config=model.config, max_cache_len=length)
        kept[id(model)].reset()
        return kept[id(model)]

    return make


def repaired(make_cache: Callable[[Any], Any]) -> type:
    """Returns the trainer whose two decodes have a cache for each model."""
    from trl.experimental.nash_md import NashMDTrainer

    torch = torch_models.torch_here()

    class Repaired(NashMDTrainer):
        """`NashMDTrainer` with another way to draw, the rest as shipped."""

        def _generate_completions(self, model, prompts):
            length, weight = self.args.max_new_tokens, self.mixture_coef
            ids, was_training = prompts["input_ids"], model.training
            model.eval()
            with torch.no_grad():
                draw = functools.partial(
                    decode, prompt_ids=ids, length=length, make_cache=make_cache
                )
                policy = draw([model], [1.0])
                mixed = draw([model, self.ref_model], [1 - weight, weight])
            model.train(was_training)
            return policy, mixed

    return Repaired


def make_trainer(size: Size, kind: str, callback: Any) -> Any:
    """Returns the trainer of one variant, with random models."""
    from datasets import Dataset
    from trl.experimental.nash_md import NashMDTrainer

    trainer = NashMDTrainer
    if kind == "repaired":
        trainer = repaired(dynamic_cache)
    if kind == "compiled":
        trainer = repaired(static_caches(size))
    texts = words.prompts(size, 4 * size.batch_size)
    models = {
        "model": torch_models.causal_model(size, 0),
        "ref_model": torch_models.causal_model(size, 1).eval(),
        "reward_funcs": torch_models.reward_model(size, 2).eval(),
    }
    if kind == "compiled":
        compile_fn = torch_models.torch_here().compile
        for model in models.values():
            model.forward = compile_fn(model.forward, dynamic=False)
    return trainer(
        args=config(size, tempfile.mkdtemp(), kind == "shipped"),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=words.tokenizer(size),
        callbacks=[callback],
        **models,
    )


def step(size: Size, kind: str) -> Work:
    """One step of `trainer.train()`, and the seconds of its parts."""
    import transformers

    parts: dict[str, float] = {}
    decoded: dict[str, int] = {}

    def loop(stepper: Stepper) -> None:
        class Pausing(transformers.TrainerCallback):
            """Stands still between steps."""

            def on_step_begin(self, *given: Any, **named: Any) -> None:
                stepper.begin()

            def on_step_end(self, *given: Any, **named: Any) -> None:
                stepper.done()

        trainer = make_trainer(size, kind, Pausing())
        for method, part in PARTS.items():
            setattr(trainer, method, timing(getattr(trainer, method), part))
        trainer.train()

    def timing(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            parts[part], result = timed(lambda: method(*given, **named))
            if part == "generate":
                drawn = {one.shape[1] - size.prompt_length for one in result}
                decoded["decode_steps"] = min(drawn)
            return result

        return call

    stepper = Stepper(loop)

    def unit() -> dict[str, float]:
        stepper.step()
        return parts

    return Work(unit, lambda: decoded)


VARIANTS = {
    kind: functools.partial(step, kind=kind)
    for kind in ("shipped", "cached", "repaired", "compiled")
}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, torch_models.PACKAGES))
