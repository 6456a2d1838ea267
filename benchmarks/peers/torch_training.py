# SPDX-License-Identifier: Apache-2.0
"""Training steps with `transformers` on torch, eager and compiled, in float32.

python -m benchmarks.peers.torch_training reward --size tiny
"""

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.peers import torch_models
from benchmarks.protocol import Work, main
from benchmarks.sizes import Size

IGNORED = -100  # the label of a token that has no loss


def reward(size: Size, is_best: bool) -> Work:
    """Bradley-Terry on B comparisons: 2 B rows of S + T tokens, AdamW."""
    torch = torch_models.torch_here()
    model = torch_models.reward_model(size, 0).train()
    length = size.prompt_length + size.response_length
    ids = torch_models.token_ids(size, 2 * size.batch_size, length)
    mask = torch.ones_like(ids)
    model.config.use_cache = not is_best

    def loss() -> Any:
        score_R = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        first_B, second_B = score_R.chunk(2)
        return torch.nn.functional.softplus(second_B - first_B).mean()

    return _work(model, loss, is_best)


def language(size: Size, is_best: bool) -> Work:
    """2 B rows of S + T tokens, the loss over T.

    Best computes the logits of the response only, as we do, and keeps no cache, which
    `transformers` does by default in training too.
    """
    torch = torch_models.torch_here()
    model = torch_models.causal_model(size, 0).train()
    length = size.prompt_length + size.response_length
    ids = torch_models.token_ids(size, 2 * size.batch_size, length)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, : size.prompt_length] = IGNORED
    target = ids[:, size.prompt_length :].flatten()
    keep = size.response_length + 1
    model.config.use_cache = not is_best

    def loss() -> Any:
        if not is_best:
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss
        found = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep)
        logits = found.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, target)

    return _work(model, loss, is_best)


def t5(size: Size, is_best: bool) -> Work:
    """B rows, S tokens in and T out, AdamW."""
    torch = torch_models.torch_here()
    model = torch_models.t5_model(size, 0).train()
    ids = torch_models.token_ids(size, size.batch_size, size.prompt_length)
    labels = torch_models.token_ids(size, size.batch_size, size.response_length, 1)
    mask = torch.ones_like(ids)
    model.config.use_cache = not is_best

    def loss() -> Any:
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return _work(model, loss, is_best)


def _work(model: Any, loss: Callable[[], Any], is_best: bool) -> Work:
    if is_best:
        model.forward = torch_models.torch_here().compile(model.forward, dynamic=False)
    return Work(torch_models.training_unit(model, loss))


VARIANTS = {
    "reward": functools.partial(reward, is_best=False),
    "reward_best": functools.partial(reward, is_best=True),
    "language": functools.partial(language, is_best=False),
    "language_best": functools.partial(language, is_best=True),
    "t5": functools.partial(t5, is_best=False),
    "t5_best": functools.partial(t5, is_best=True),
}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, torch_models.PACKAGES))
