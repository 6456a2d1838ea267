# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names of a T5's parameters; ours are T5X's."""

from nlhf_jax.t5_settings import T5Settings

OUTSIDE = {
    "token_embedder/embedding": "shared.weight",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
}
# The positions' table belongs to the stack; theirs lies in its first block.
TABLE = "relpos_bias/rel_embedding"
THEIR_TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
# Of each stack: our module -> the number of their sublayer and its module.
BLOCKS = {
    "encoder": {
        "pre_attention_layer_norm": "layer.0.layer_norm",
        "attention": "layer.0.SelfAttention",
        "pre_mlp_layer_norm": "layer.1.layer_norm",
        "mlp": "layer.1.DenseReluDense",
    },
    "decoder": {
        "pre_self_attention_layer_norm": "layer.0.layer_norm",
        "self_attention": "layer.0.SelfAttention",
        "pre_cross_attention_layer_norm": "layer.1.layer_norm",
        "encoder_decoder_attention": "layer.1.EncDecAttention",
        "pre_mlp_layer_norm": "layer.2.layer_norm",
        "mlp": "layer.2.DenseReluDense",
    },
}
# Copies of the embedding that some files hold too.
EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In the files of T5 1.0: a table that no version of the network has read.
UNREAD = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def their_name(path: str, settings: T5Settings) -> str:
    """Returns Hugging Face's name of one of our parameters, by its `a/b/c` path."""
    del settings
    if path in OUTSIDE:
        return OUTSIDE[path]
    stack, _, rest = path.partition("/")
    if rest == TABLE:
        return f"{stack}.{THEIR_TABLE}"
    layer, module, *names = rest.split("/")
    number = layer.removeprefix("layers_")
    place = f"{stack}.block.{number}.{BLOCKS[stack][module]}"
    if names == ["scale"]:
        return f"{place}.weight"
    return f"{place}.{PROJECTIONS.get(names[0], names[0])}.weight"


def is_turned(path: str) -> bool:
    """Whether the parameter's matrix is the transpose of theirs."""
    return path.endswith(("/kernel", "/rel_embedding"))
