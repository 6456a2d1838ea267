# SPDX-License-Identifier: Apache-2.0
"""Attention of whole sequences behind one function: what it keeps, and who computes it.

    read_q = sum_k softmax_k(cap(scale q . k)) v_k     over the keys that q may see

Notation as in `models/decoder_layers.py`: Q queries, N keys, G key-value heads, U query
heads that share one of them. The weights of all queries are [B, G, U, Q, N], which at
long sequences is more than all else that a layer keeps; every way but "plain" is rid of
them, and all ways agree to rounding.

Source of the kernels' method: Dao et al., 2022, arXiv 2205.14135; of reading in parts
without one: Rabe and Staats, 2021, arXiv 2112.05682.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nlhf_jax.constraints import may_be_cut_up, per_device, platform
from nlhf_jax.models.unembedding import soft_capped
from nlhf_jax.settings import MemorySettings

MASKED = -1e10  # logit of a key that must not be seen
KERNEL_BLOCK = 128  # positions; a TPU kernel's lengths are multiples of it
LARGEST_BLOCK = 512
LARGEST_HEAD = 128  # of cuDNN's kernel on every GPU that has it; Hopper takes 256
HEAD_PARTS = 8  # a head's width is a multiple of it, for cuDNN
Queries = Float[Array, "B G U Q K"]
Keys = Float[Array, "B G N K"]
Visible = Bool[Array, "B Q N"]


def attention(
    query_BGUQK: Queries,
    keys_BGNK: Keys,
    values_BGNK: Keys,
    visible_BQN: Visible,
    *,
    scale: float,
    soft_cap: float,
    is_causal: bool,
    memory: MemorySettings,
) -> Queries:
    """Returns what each query reads, as `memory.attention` says.

    "plain" keeps the weights for the backward pass, "recomputed" computes them again
    there, "chunked" does so for `memory.attention_chunk` queries at a time, forward
    too. "automatic" takes the kernel of the platform that is compiled for where there
    is one: on a TPU `splash`, on a GPU cuDNN's for bfloat16 without a cap and heads
    that are multiples of 8 up to 128 wide. It is "recomputed" elsewhere, where keys are
    not seen in order (a sliding window), and on several devices without a mesh.

    Args:
      query_BGUQK: queries, not scaled.
      keys_BGNK: keys.
      values_BGNK: values.
      visible_BQN: which keys a query sees.
      scale: of the logits.
      soft_cap: of the scaled logits; 0 caps nothing.
      is_causal: queries and keys are the same columns, and of the keys that are no
        padding a query sees its own and all before.
      memory: which way, and how many queries at a time.
    """
    how = {"scale": scale, "soft_cap": soft_cap}
    given = (query_BGUQK, keys_BGNK, values_BGNK)
    way = memory.attention
    if way == "automatic":
        kernel = _kernel(query_BGUQK, is_causal, soft_cap)
        if kernel is not None:
            # A key that is no padding is seen by the query of its own column.
            is_key_BN = jnp.diagonal(visible_BQN, axis1=1, axis2=2)
            return kernel(*given, is_key_BN, **how)
        way = "recomputed"
    read = functools.partial(plain, **how)
    if way == "recomputed":
        return jax.checkpoint(read)(*given, visible_BQN)
    if way == "chunked" and query_BGUQK.shape[3] > memory.attention_chunk:
        return _chunked(read, *given, visible_BQN, memory.attention_chunk)
    return read(*given, visible_BQN)


def plain(
    query_BGUQK: Queries,
    keys_BGNK: Keys,
    values_BGNK: Keys,
    visible_BQN: Visible,
    *,
    scale: float,
    soft_cap: float,
) -> Queries:
    """Returns what each query reads, all weights at once; softmax in float32."""
    logits_BGUQN = jnp.einsum(
        "bguqk,bgnk->bguqn",
        query_BGUQK,
        keys_BGNK,
        preferred_element_type=jnp.promote_types(query_BGUQK.dtype, jnp.float32),
    )
    weights_BGUQN = weights_of(logits_BGUQN, visible_BQN, scale, soft_cap)
    weights_BGUQN = weights_BGUQN.astype(values_BGNK.dtype)
    return jnp.einsum("bguqn,bgnk->bguqk", weights_BGUQN, values_BGNK)


def weights_of(
    logits_BGUQN: Float[Array, "B G U Q N"],
    visible_BQN: Visible,
    scale: float,
    soft_cap: float,
) -> Float[Array, "B G U Q N"]:
    """Returns softmax(cap(scale logits)) over the keys that are seen, float32."""
    logits_BGUQN = soft_capped(logits_BGUQN * scale, soft_cap)
    logits_BGUQN = jnp.where(visible_BQN[:, None, None], logits_BGUQN, MASKED)
    return jax.nn.softmax(logits_BGUQN, axis=-1)


def _chunked(
    read: Callable[..., Queries],
    query_BGUQK: Queries,
    keys_BGNK: Keys,
    values_BGNK: Keys,
    visible_BQN: Visible,
    chunk: int,
) -> Queries:
    """Reads for `chunk` queries at a time; the last ones are filled up and cut off."""
    length = query_BGUQK.shape[3]
    num_chunks = -(-length // chunk)
    missing = num_chunks * chunk - length

    def in_chunks(array: Array, axis: int) -> Array:
        shape = (*array.shape[:axis], num_chunks, chunk, *array.shape[axis + 1 :])
        return jnp.moveaxis(_filled(array, axis, missing).reshape(shape), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(part: tuple[Queries, Visible]) -> Queries:
        return read(part[0], keys_BGNK, values_BGNK, part[1])

    parts = (in_chunks(query_BGUQK, 3), in_chunks(visible_BQN, 1))
    found = jnp.moveaxis(jax.lax.map(one, parts), 0, 3)
    shape = (*query_BGUQK.shape[:3], num_chunks * chunk, query_BGUQK.shape[4])
    return found.reshape(shape)[:, :, :, :length]


def _kernel(
    query_BGUQK: Queries, is_causal: bool, soft_cap: float
) -> Callable[..., Queries] | None:
    """Returns the platform's kernel for such an attention, or None."""
    if not is_causal or may_be_cut_up():
        return None
    if platform() == "tpu":
        return splash
    if platform() not in ("gpu", "cuda") or soft_cap:
        return None
    width = query_BGUQK.shape[-1]
    fits = width <= LARGEST_HEAD and width % HEAD_PARTS == 0
    return cudnn if fits and query_BGUQK.dtype == jnp.bfloat16 else None


def _filled(array: Array, axis: int, missing: int) -> Array:
    """Returns the array with `missing` zeros (Falses) after the others of an axis."""
    return jnp.pad(array, [(0, missing * (i == axis)) for i in range(array.ndim)])


def splash(
    query_BGUQK: Queries,
    keys_BGNK: Keys,
    values_BGNK: Keys,
    is_key_BN: Bool[Array, "B N"],
    *,
    scale: float,
    soft_cap: float,
    interpret: bool = False,
) -> Queries:
    """Returns causal self-attention by JAX's splash kernel, for TPUs.

    Padding is another segment than the text: the rows of padded columns are not those
    of `plain`, and are read by nobody.

    Args:
      query_BGUQK: queries; Q = N, and filled up to a multiple of `KERNEL_BLOCK`.
      keys_BGNK: keys.
      values_BGNK: values.
      is_key_BN: False on padding.
      scale: of the logits.
      soft_cap: of the scaled logits; 0 caps nothing.
      interpret: runs the kernel step by step without a TPU.
    """
    # Imported late: it brings the compiler of TPU kernels with it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length = query_BGUQK.shape[3]
    missing = -length % KERNEL_BLOCK
    whole = length + missing
    block = next(b for b in (LARGEST_BLOCK, 256, 128) if whole % b == 0)

    def one(query_GUQK, keys_GNK, values_GNK, segment_N):
        heads, groups = query_GUQK.shape[0] * query_GUQK.shape[1], len(keys_GNK)
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask(
                [splash_attention_mask.CausalMask((whole, whole))] * heads
            ),
            block_sizes=splash_attention_kernel.BlockSizes(
                *(block,) * 3,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_kv_dkv_compute=block,
                use_fused_bwd_kernel=True,
            ),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=soft_cap or None,
            interpret=interpret,
        )
        segments = splash_attention_kernel.SegmentIds(segment_N, segment_N)
        query_HQK = query_GUQK.reshape(heads, whole, -1) * scale
        read_HQK = kernel(query_HQK, keys_GNK, values_GNK, segments)
        return read_HQK.reshape(groups, heads // groups, whole, -1)

    of_keys = ("batch", "heads", None, None)
    of_queries = ("batch", "heads", None, None, None)
    read = per_device(
        jax.vmap(one),
        (of_queries, of_keys, of_keys, ("batch", None)),
        of_queries,
    )
    found = read(
        _filled(query_BGUQK, 3, missing),
        _filled(keys_BGNK, 2, missing),
        _filled(values_BGNK, 2, missing),
        _filled(is_key_BN, 1, missing).astype(jnp.int32),
    )
    return found[:, :, :, :length]


def cudnn(
    query_BGUQK: Queries,
    keys_BGNK: Keys,
    values_BGNK: Keys,
    is_key_BN: Bool[Array, "B N"],
    *,
    scale: float,
    soft_cap: float,
    implementation: str | None = "cudnn",
) -> Queries:
    """Returns causal self-attention by cuDNN's fused kernel, for GPUs.

    Args:
      query_BGUQK: queries, bfloat16 for cuDNN; Q = N, and filled up to an even number.
      keys_BGNK: keys.
      values_BGNK: values.
      is_key_BN: False on padding.
      scale: of the logits.
      soft_cap: must be 0.
      implementation: of `jax.nn.dot_product_attention`.
    """
    del soft_cap
    batch, groups, shared, length, width = query_BGUQK.shape
    missing = length % 2  # its gradient of a mask takes no odd lengths
    whole = length + missing
    query_BGUQK = _filled(query_BGUQK, 3, missing)
    keys_BGNK, values_BGNK = (_filled(x, 2, missing) for x in (keys_BGNK, values_BGNK))
    is_key_BN = _filled(is_key_BN, 1, missing)
    query_BHQK = query_BGUQK.reshape(batch, groups * shared, whole, width)
    before_QN = np.tril(np.ones((whole, whole), bool))
    # A column of padding sees itself, for a row that sees nothing is no number.
    own_QN = jnp.eye(whole, dtype=bool)[None]
    mask_BQN = (is_key_BN[:, None, :] & before_QN[None]) | own_QN
    read_BQHK = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (query_BHQK, keys_BGNK, values_BGNK)),
        mask=mask_BQN[:, None],
        scale=scale,
        implementation=implementation,
    )
    read_BGUQK = read_BQHK.swapaxes(1, 2).reshape(query_BGUQK.shape)
    return read_BGUQK[:, :, :, :length]
