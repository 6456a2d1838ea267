# SPDX-License-Identifier: Apache-2.0
"""Random models of `transformers`, of the shapes in `benchmarks.sizes`, on torch.

No end token can be drawn: its id is one past the last logit. Products are float32.
"""

import os
from collections.abc import Callable
from typing import Any

from benchmarks.sizes import Size

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy")
FIRST_WORD = 10
LEARNING_RATE = 1e-5
LARGEST_NORM = 1.0


def torch_here() -> Any:
    """Returns torch with the threads that every side gets."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    return torch


def llama_config(size: Size, **more: Any) -> Any:
    """Returns the configuration of the Llama-like decoder of a size."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.mlp_dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=size.prompt_length + 8 * size.response_length,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=None,
        **more,
    )


def causal_model(size: Size, seed: int) -> Any:
    """Returns a random policy."""
    import transformers

    torch_here().manual_seed(seed)
    return transformers.LlamaForCausalLM(llama_config(size))


def reward_model(size: Size, seed: int) -> Any:
    """Returns a random model of one score a row."""
    import transformers

    torch_here().manual_seed(seed)
    config = llama_config(size, num_labels=1)
    return transformers.LlamaForSequenceClassification(config)


def t5_model(size: Size, seed: int) -> Any:
    """Returns a random T5 1.1."""
    import transformers

    torch_here().manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=size.vocab_size,
        d_model=size.width,
        d_kv=size.head_dim,
        d_ff=size.mlp_dim,
        num_layers=size.num_layers,
        num_decoder_layers=size.num_layers,
        num_heads=size.num_heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.T5ForConditionalGeneration(config)


def token_ids(size: Size, rows: int, length: int, seed: int = 0) -> Any:
    """Returns [rows, length] word ids."""
    torch = torch_here()
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    return torch.randint(FIRST_WORD, size.vocab_size, shape, generator=generator)


def adamw(model: Any) -> Any:
    """Returns the optimiser of every training side, fused over all parameters."""
    return torch_here().optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def training_unit(model: Any, loss_of: Callable[[], Any]) -> Callable[[], None]:
    """Returns one update: loss, backward, clipping, AdamW."""
    torch, optimizer = torch_here(), adamw(model)

    def unit() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()

    return unit
