# SPDX-License-Identifier: Apache-2.0
"""A flax network handed out as the pure functions of a `LanguageModel`.

A network has the methods `__call__`, `token_scores` (prompts, tokens_BT, use_dropout),
`logits_of` (prompts, tokens_BT, token_id), `prefill` (prompts, max_length) and
`decode_step` (cache, tokens_R, step), and the attribute `settings`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nlhf_jax.constraints import gather
from nlhf_jax.models.layers import ADAPTERS
from nlhf_jax.types import (
    Adapted,
    Cache,
    LanguageModel,
    Params,
    PromptBatch,
    TokenScores,
)


def language_model_of(
    network: Any,
    *,
    pad_id: int,
    eos_id: int,
    dropout_rate: float = 0.0,
    share: Callable[[Cache, int], Cache] | None = None,
    reads_prompts_once: bool = False,
) -> LanguageModel:
    """Returns a network's functions.

    Args:
      network: an unbound flax module, see above.
      pad_id: fills the padding.
      eos_id: ends a response.
      dropout_rate: at 0, keys are ignored.
      share: as in `LanguageModel`.
      reads_prompts_once: likewise.
    """
    settings = network.settings
    prompts = PromptBatch(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    tokens_BT = jnp.zeros((1, 2), jnp.int32)

    def boxed(key: jax.Array):
        return network.init(key, prompts, tokens_BT)["params"]

    def init(key: jax.Array) -> Params:
        return nn.unbox(boxed(key))

    def apply(method, params, *given, **how):
        return network.apply(_variables(params), *given, method=method, **how)

    def forward(method, params, prompts, tokens_BT, dropout_key):
        use_dropout = dropout_key is not None and dropout_rate > 0
        rngs = {"dropout": dropout_key} if use_dropout else None
        return apply(method, params, prompts, tokens_BT, use_dropout, rngs=rngs)

    def logits(
        params: Params,
        prompts: PromptBatch,
        tokens_BT: Int[Array, "B T"],
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T V"]:
        return forward(None, params, prompts, tokens_BT, dropout_key)

    def token_scores(
        params: Params,
        prompts: PromptBatch,
        tokens_BT: Int[Array, "B T"],
        dropout_key: jax.Array | None = None,
    ) -> TokenScores:
        return forward("token_scores", params, prompts, tokens_BT, dropout_key)

    def logits_of(
        params: Params,
        prompts: PromptBatch,
        tokens_BT: Int[Array, "B T"],
        token_id: int,
    ) -> Float[Array, "B T"]:
        return apply("logits_of", params, prompts, tokens_BT, token_id)

    def prefill(params: Params, prompts: PromptBatch, max_length: int):
        return apply("prefill", params, prompts, max_length)

    def decode_step(params: Params, cache: Cache, tokens_R: Int[Array, "R"], step):
        return apply("decode_step", params, cache, tokens_R, step)

    axes = nn.get_partition_spec(jax.eval_shape(boxed, jax.random.key(0)))
    axes = jax.tree.map(
        tuple, axes, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)
    )
    return LanguageModel(
        init=init,
        logical_axes=axes,
        logits=logits,
        logits_of=logits_of,
        token_scores=token_scores,
        prefill=prefill,
        decode_step=decode_step,
        vocab_size=settings.vocab_size,
        pad_id=pad_id,
        eos_id=eos_id,
        for_decoding=functools.partial(_for_decoding, settings.dtype, axes),
        share=share,
        reads_prompts_once=reads_prompts_once,
    )


def _variables(params: Params) -> dict[str, Any]:
    """Returns what flax applies: the parameters, and adapters beside them."""
    if isinstance(params, Adapted):
        return {"params": params.base, ADAPTERS: params.adapters}
    return {"params": params}


def _for_decoding(dtype: str, axes: Any, params: Params) -> Params:
    """Returns the decoder's weights cast and gathered as a step would, all at once."""
    if isinstance(params, Adapted):
        return params._replace(base=_for_decoding(dtype, axes, params.base))

    def one(path, leaf, names):
        # The output layer and what is added to float32 stay as they are.
        is_cast = path[-1].key == "kernel" and path[-2].key != "logits_dense"
        return gather(leaf.astype(dtype) if is_cast else leaf, names)

    return jax.tree_util.tree_map_with_path(one, params, axes)
