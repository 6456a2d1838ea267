# SPDX-License-Identifier: Apache-2.0
"""The pieces of a T5 network, with T5X's parameter names and fused 2-D kernels.

Every parameter carries logical axis names, and so do activations where a layer begins
and ends, its hidden units and its heads: rows stay where they are, and weights come to
them. Attention has no 1/sqrt(K): the scale is
folded into the initialiser of the query (Raffel et al., 2020, arXiv 1910.10683; the
T5X layout). Activations carry a query axis Q, or T in the decoder, and a key axis S.
Keys and values keep heads before positions, so that the products of a decode step read
the cache as it lies: with positions first, each step copies all of it.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nlhf_jax.constraints import constrain, gather
from nlhf_jax.models.products import product
from nlhf_jax.models.shared_prompts import as_queries, as_rows
from nlhf_jax.t5_settings import T5Settings

NUM_BUCKETS = 32
MAX_DISTANCE = 128
MASKED = -1e10  # added to the logits of keys that must not be seen
NORM_EPSILON = 1e-6
ADAPTERS = "adapters"  # flax's collection of what `types.Adapted` adds
RANK = "lora_rank"

# T5X's initialisers; with inputs of variance 1 all outputs but the query's have it too.
TRUNCATED = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
PROJECTION = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "linear": lambda x: x}


def relative_position_bucket(
    offset: Int[Array, "*shape"], *, bidirectional: bool
) -> Int[Array, "*shape"]:
    """Returns the bucket in [0, 32) of each offset key position - query position.

    Half of the buckets hold one distance each, the other half grow logarithmically to
    distance 128, and all larger distances share the last. With `bidirectional`, keys
    after the query have 16 buckets of their own; without, they share bucket 0.

    Source: Raffel et al., 2020, arXiv 1910.10683, section 2.1.
    """
    num_buckets, first = NUM_BUCKETS, 0
    distance = jnp.maximum(-offset, 0)
    if bidirectional:
        num_buckets //= 2
        first = jnp.where(offset > 0, num_buckets, 0)
        distance = jnp.abs(offset)
    exact = num_buckets // 2
    # The small constant keeps log(0) finite; distance 0 never takes this branch.
    ratio = jnp.log(distance.astype(jnp.float32) / exact + jnp.finfo(jnp.float32).eps)
    scale = (num_buckets - exact) / math.log(MAX_DISTANCE / exact)
    logarithmic = exact + (ratio * scale).astype(jnp.int32)
    logarithmic = jnp.minimum(logarithmic, num_buckets - 1)
    return first + jnp.where(distance < exact, distance, logarithmic)


def rows_of(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the activations with their rows split over the mesh, where one is set."""
    return constrain(x_BTD, ("batch", "length", "embed"))


class Dense(nn.Module):
    """A product with a kernel (inputs, features), and a bias if asked.

    Attributes:
      features: size of the last axis of the result.
      axes: logical names of the kernel's two axes.
      dtype: of the product.
      initializer: of the kernel.
      use_bias: adds a vector, 0 at first, to the product.
    """

    features: int
    axes: tuple[str, str]
    dtype: str
    initializer: nn.initializers.Initializer = TRUNCATED
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Returns x @ kernel (+ bias)."""
        kernel_DF = self.param(
            "kernel",
            nn.with_logical_partitioning(self.initializer, self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        kernel_DF = gather(kernel_DF.astype(self.dtype), self.axes)
        made = product(x.astype(self.dtype), kernel_DF)
        if self.has_variable(ADAPTERS, "lora_a"):
            made = made + self._adapter(x.astype(self.dtype))
        if not self.use_bias:
            return made
        axes = self.axes[1:]
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        bias_F = self.param("bias", zeros, (self.features,), jnp.float32)
        bias_F = gather(bias_F.astype(self.dtype), axes)
        return made + bias_F.reshape((1,) * (x.ndim - 1) + (-1,))

    def _adapter(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Returns x A B; see `types.Adapted` for the axis that rows may have."""
        leaves = {"lora_a": (self.axes[0], RANK), "lora_b": (RANK, self.axes[1])}
        for name, axes in leaves.items():
            leaf = self.get_variable(ADAPTERS, name).astype(self.dtype)
            if leaf.ndim == 2:
                x = x @ gather(leaf, axes)
                continue
            leaf_NDF = gather(leaf, (None, *axes))
            x_BN = x.reshape(-1, len(leaf_NDF), *x.shape[1:])
            x_BN = jnp.einsum("bn...d,ndf->bn...f", x_BN, leaf_NDF)
            x = x_BN.reshape(-1, *x_BN.shape[2:])
        return x


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale, computed in float32."""

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalised activations in the module's dtype."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale_D = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + NORM_EPSILON)
        return (x * scale_D.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class Embedding(nn.Module):
    """The token table, also the output layer of tied models."""

    vocab_size: int
    emb_dim: int
    dtype: str
    stddev: float = 1.0  # of the table at first

    def setup(self):
        init = nn.with_logical_partitioning(
            nn.initializers.normal(self.stddev), ("vocab", "embed")
        )
        self.embedding = self.param(
            "embedding", init, (self.vocab_size, self.emb_dim), jnp.float32
        )

    def __call__(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Returns the rows of the table."""
        table_VD = gather(self.embedding.astype(self.dtype), ("vocab", "embed"))
        x = table_VD[tokens]
        return rows_of(x) if x.ndim == 3 else x

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns the tied logits x @ embedding^T / sqrt(D), float32."""
        table_VD = gather(self.embedding, ("vocab", "embed"))
        return x.astype(jnp.float32) @ table_VD.T / math.sqrt(self.emb_dim)


class RelativeBias(nn.Module):
    """A learned bias for each head and bucket of relative position."""

    num_heads: int
    bidirectional: bool

    @nn.compact
    def __call__(
        self, query_positions_Q: Int[Array, "Q"], key_positions_S: Int[Array, "S"]
    ) -> Float[Array, "1 H Q S"]:
        """Returns the bias added to the attention logits, float32."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table_HN = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (self.num_heads, NUM_BUCKETS),
            jnp.float32,
        )
        offset_QS = key_positions_S[None, :] - query_positions_Q[:, None]
        bucket_QS = relative_position_bucket(
            offset_QS, bidirectional=self.bidirectional
        )
        return table_HN[:, bucket_QS][None]


class Attention(nn.Module):
    """Multi-head attention as projections and a read, so that keys can be cached."""

    settings: T5Settings

    def setup(self):
        s = self.settings
        joined, inner = s.num_heads * s.head_dim, ("embed", "joined_kv")
        query = nn.initializers.variance_scaling(1.0 / s.head_dim, "fan_in", "normal")
        self.query = Dense(joined, inner, s.dtype, query)
        self.key = Dense(joined, inner, s.dtype, PROJECTION)
        self.value = Dense(joined, inner, s.dtype, PROJECTION)
        self.out = Dense(s.emb_dim, ("joined_kv", "embed"), s.dtype, PROJECTION)

    def _heads(self, x_BSJ):
        batch, length, _ = x_BSJ.shape
        heads = (self.settings.num_heads, self.settings.head_dim)
        x_BHSK = x_BSJ.reshape(batch, length, *heads).swapaxes(1, 2)
        return constrain(x_BHSK, ("batch", "heads", "length", "kv"))

    def keys_values(
        self, x_BSD: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B H S K"], Float[Array, "B H S K"]]:
        """Returns what a decoder keeps of the positions `x_BSD`."""
        return self._heads(self.key(x_BSD)), self._heads(self.value(x_BSD))

    def read(
        self,
        x_BQD: Float[Array, "B Q D"],
        keys_values: tuple[Float[Array, "P H S K"], Float[Array, "P H S K"]],
        bias: Float[Array, "b h q S"],
        dropout=lambda x: x,
    ) -> Float[Array, "B Q D"]:
        """Returns softmax(q k + bias) v, projected; the softmax is in float32.

        Keys, values and bias may have one row for several rows of x beside each other.
        """
        keys_BHSK, values_BHSK = keys_values
        num_rows = len(x_BQD)
        query_BHQK = self._heads(self.query(x_BQD))
        query_BHQK = as_queries(query_BHQK, len(keys_BHSK))
        logits_BHQS = jnp.einsum(
            "bhqk,bhsk->bhqs",
            query_BHQK,
            keys_BHSK,
            preferred_element_type=jnp.float32,
        )
        weights_BHQS = dropout(jax.nn.softmax(logits_BHQS + bias, axis=-1))
        weights_BHQS = weights_BHQS.astype(values_BHSK.dtype)
        read_BHQK = jnp.einsum("bhqs,bhsk->bhqk", weights_BHQS, values_BHSK)
        read_BHQK = as_rows(read_BHQK, num_rows)
        read_BQHK = read_BHQK.swapaxes(1, 2)
        return self.out(read_BQHK.reshape(*read_BQHK.shape[:2], -1))

    def __call__(self, x_BSD, bias, dropout=lambda x: x) -> Float[Array, "B S D"]:
        """Returns self-attention over whole sequences."""
        return self.read(x_BSD, self.keys_values(x_BSD), bias, dropout)


class FeedForward(nn.Module):
    """wo(product of activation_i(wi_i(x))); T5 1.0 has one factor, named `wi`."""

    settings: T5Settings

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], dropout=lambda x: x):
        """Returns the block's output, [B, T, D]."""
        s = self.settings
        hidden = 1.0
        for index, name in enumerate(s.mlp_activations):
            layer = "wi" if len(s.mlp_activations) == 1 else f"wi_{index}"
            dense = Dense(s.mlp_dim, ("embed", "mlp"), s.dtype, name=layer)
            hidden = hidden * ACTIVATIONS[name](dense(x))
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        out = Dense(s.emb_dim, ("mlp", "embed"), s.dtype, name="wo")
        return out(dropout(hidden))


def dropout_module(settings: T5Settings) -> nn.Dropout:
    """Returns dropout with one mask for all positions of a row, as T5X drops."""
    return nn.Dropout(settings.dropout_rate, broadcast_dims=(-2,))


def key_bias(mask_BS: Bool[Array, "B S"]) -> Float[Array, "B 1 1 S"]:
    """Returns 0 for keys that may be seen and -1e10 for the others."""
    return jnp.where(mask_BS, 0.0, MASKED)[:, None, None, :].astype(jnp.float32)
