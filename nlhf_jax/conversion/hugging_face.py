# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names of decoder-only parameters, as one table; arrays in and out.

Both sides hold the same numbers. Theirs are flat dicts of arrays by dotted names, with
projections stored outputs first; ours are nested dicts with kernels (inputs, outputs).
Everything is numpy; nothing here reads or writes a file.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.decoder_settings import DecoderOnlySettings

# Ours -> theirs; LAYER stands for a layer's number. A kernel is transposed.
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


def their_name(path: str, settings: DecoderOnlySettings) -> str:
    """Returns Hugging Face's name of one of our parameters, by its `a/b/c` path."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    layer, _, rest = path.partition("/")
    module, _, leaf = rest.rpartition("/")
    names = PROJECTIONS | (POST_NORMS if settings.post_norms else NORMS)
    end = "bias" if leaf == "bias" else "weight"
    return f"model.{layer.replace('_', '.')}.{names[module]}.{end}"


def flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their `a/b/c` paths."""
    leaves = {}
    for name, value in tree.items():
        path = f"{before}{name}"
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{path}/")
        else:
            leaves[path] = value
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts that `flat` made flat."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def _turned(path: str, array: np.ndarray) -> np.ndarray:
    """Returns an array in the other side's layout; twice is once and back."""
    return array.T if path.endswith("/kernel") else array


def to_hugging_face(
    params: Mapping[str, Any], settings: DecoderOnlySettings
) -> dict[str, np.ndarray]:
    """Returns our parameters under their names, in their layout; nothing is copied."""
    return {
        their_name(path, settings): _turned(path, np.asarray(leaf))
        for path, leaf in flat(params).items()
    }


def from_hugging_face(
    tensors: Mapping[str, np.ndarray],
    settings: DecoderOnlySettings,
    shapes: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns their parameters as ours, in their dtype; nothing is copied.

    With tied outputs a `lm_head.weight` may be there, if it is the embedding.

    Args:
      tensors: arrays by name.
      settings: the network.
      shapes: our parameters, abstract or not (`jax.eval_shape(init, key)`).

    Raises:
      UserError: names the first tensor that is missing, not known, or of another shape.
    """
    wanted = {their_name(path, settings): path for path in flat(shapes)}
    tensors = dict(tensors)
    head, table = OUTSIDE["logits_dense/kernel"], OUTSIDE["token_embedder/embedding"]
    if settings.tied_output and head in tensors and table in tensors:
        if not np.array_equal(tensors[head], tensors[table]):
            raise UserError(
                f"tensor {head} must equal {table}, since the output is tied to the "
                "embedding; it does not"
            )
        del tensors[head]
    for name in wanted:
        if name not in tensors:
            raise UserError(f"tensor {name} is missing{nearest(name, tensors)}")
    for name in tensors:
        if name not in wanted:
            raise UserError(
                f"tensor {name} has no place in this network{nearest(name, wanted)}"
            )
    ours = {path: _turned(path, tensors[name]) for name, path in wanted.items()}
    _check_shapes(ours, flat(shapes), settings)
    return nested(ours)


def _check_shapes(ours: Mapping[str, Any], known: Mapping[str, Any], settings) -> None:
    for path, array in ours.items():
        if array.shape != known[path].shape:
            theirs = _turned(path, np.empty(known[path].shape, "?")).shape
            found = _turned(path, array).shape
            raise UserError(
                f"tensor {their_name(path, settings)} must have the shape {theirs}, "
                f"got {found}"
            )
