# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names of parameters, as tables; tensors in and out.

Both sides hold the same numbers. Theirs are flat, by dotted names, with projections
stored outputs first; ours are named by paths, with kernels (inputs, outputs). Nothing
here reads a tensor, save two that must be equal.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.conversion import t5_names
from nlhf_jax.conversion.shapes import flat, parameter_shapes
from nlhf_jax.conversion.tensors import Tensor, turned
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings

# Ours -> theirs of decoder-only models. A kernel is transposed.
OUTSIDE = {
    "token_embedder/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "logits_dense/kernel": "lm_head.weight",
}
PROJECTIONS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
}
NORMS = {
    "pre_attention_norm": "input_layernorm",
    "pre_mlp_norm": "post_attention_layernorm",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}
# Where what a block adds is normalised too, the second norm has another's name.
POST_NORMS = NORMS | {
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
# Ends of names in old files: numbers that follow from the configuration.
COMPUTED = (".rotary_emb.inv_freq", ".self_attn.masked_bias", ".self_attn.bias")


def their_name(path: str, settings: ModelSettings) -> str:
    """Returns Hugging Face's name of one of our parameters, by its `a/b/c` path."""
    if not isinstance(settings, DecoderOnlySettings):
        return t5_names.their_name(path, settings)
    if path in OUTSIDE:
        return OUTSIDE[path]
    layer, _, rest = path.partition("/")
    module, _, leaf = rest.rpartition("/")
    names = PROJECTIONS | (POST_NORMS if settings.post_norms else NORMS)
    end = "bias" if leaf == "bias" else "weight"
    return f"model.{layer.replace('_', '.')}.{names[module]}.{end}"


def _in_other_layout(path: str, tensor: Tensor) -> Tensor:
    """Returns a tensor in the other side's layout; twice is once and back."""
    return turned(tensor) if t5_names.is_turned(path) else tensor


def to_hugging_face(
    tensors: Mapping[str, Tensor], settings: ModelSettings
) -> dict[str, Tensor]:
    """Returns our tensors, by path, under their names and in their layout."""
    return {
        their_name(path, settings): _in_other_layout(path, tensor)
        for path, tensor in tensors.items()
    }


def from_hugging_face(
    tensors: Mapping[str, Tensor], settings: ModelSettings
) -> dict[str, Tensor]:
    """Returns their tensors, by name, under our paths and in our layout.

    What is there twice (an output layer that is the embedding) must be equal, and what
    follows from the configuration (waves of rotary positions) is left out.

    Args:
      tensors: by their names.
      settings: the network.

    Raises:
      UserError: names the first tensor that is missing, not known, or of another shape.
    """
    shapes = flat(parameter_shapes(settings))
    wanted = {their_name(path, settings): path for path in shapes}
    table = their_name("token_embedder/embedding", settings)
    tensors = {name: t for name, t in tensors.items() if not _is_left_out(name)}
    for name in ("lm_head.weight", *t5_names.EMBEDDINGS):
        if name in tensors and name not in wanted and table in tensors:
            _check_same(name, tensors.pop(name), table, tensors[table])
    for name in wanted:
        if name not in tensors:
            raise UserError(f"tensor {name} is missing{nearest(name, tensors)}")
    for name in tensors:
        if name not in wanted:
            raise UserError(
                f"tensor {name} has no place in this network{nearest(name, wanted)}"
            )
    ours = {path: _in_other_layout(path, tensors[n]) for n, path in wanted.items()}
    for path, tensor in ours.items():
        _check_shape(path, tensor, shapes[path], settings)
    return ours


def _is_left_out(name: str) -> bool:
    return name.endswith(COMPUTED) or name in t5_names.UNREAD


def _check_same(name: str, found: Tensor, other: str, wanted: Tensor) -> None:
    is_same = found.shape == wanted.shape
    if not is_same or not np.array_equal(found.read(), wanted.read()):
        raise UserError(
            f"tensor {name} must equal {other}, since the output is tied to the "
            "embedding; it does not"
        )


def _check_shape(path: str, tensor: Tensor, known: Any, settings) -> None:
    if tuple(tensor.shape) == tuple(known.shape):
        return
    is_turned = t5_names.is_turned(path)
    wanted = tuple(known.shape)[::-1] if is_turned else tuple(known.shape)
    found = tensor.shape[::-1] if is_turned else tensor.shape
    raise UserError(
        f"tensor {their_name(path, settings)} must have the shape {wanted}, got {found}"
    )
