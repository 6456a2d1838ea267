# SPDX-License-Identifier: Apache-2.0
"""Decoding with `transformers`: as shipped, and as fast as its settings make it.

python -m benchmarks.peers.torch_decode shipped --size tiny
"""

import functools
from typing import Any

from benchmarks.peers import torch_models
from benchmarks.protocol import Work, main
from benchmarks.sizes import Size


def sampling(size: Size, **more: Any) -> dict[str, Any]:
    """Returns the arguments of `generate`: plain sampling of T tokens."""
    length = size.response_length
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": length,
        "min_new_tokens": None,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    } | more


def decode(size: Size, is_t5: bool, is_best: bool) -> Work:
    """T tokens after full prompts, by `generate`.

    Best is a static cache and a forward pass that `torch.compile` has made for its one
    shape: `generate` compiles by itself on accelerators only.
    """
    torch = torch_models.torch_here()
    make = torch_models.t5_model if is_t5 else torch_models.causal_model
    model = make(size, 0).eval()
    options = sampling(size)
    if is_best:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward, dynamic=False)
    ids = torch_models.token_ids(size, size.batch_size, size.prompt_length)
    mask = torch.ones_like(ids)
    found = {}

    def unit() -> None:
        with torch.inference_mode():
            found["ids"] = model.generate(ids, attention_mask=mask, **options)

    def facts() -> dict[str, int]:
        before = 1 if is_t5 else size.prompt_length
        return {"decode_steps": int(found["ids"].shape[1]) - before}

    return Work(unit, facts)


VARIANTS = {
    "shipped": functools.partial(decode, is_t5=False, is_best=False),
    "best": functools.partial(decode, is_t5=False, is_best=True),
    "t5": functools.partial(decode, is_t5=True, is_best=False),
    "t5_best": functools.partial(decode, is_t5=True, is_best=True),
}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, torch_models.PACKAGES))
