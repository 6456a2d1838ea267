# SPDX-License-Identifier: Apache-2.0
"""The shape of a T5 network, read off the shapes of its parameters.

T5X writes no description of its network into a checkpoint. What shapes do not say, its
activations above all, is taken from the user's options, then from the `config.gin` of
the run that wrote it, then from what T5's versions have in common, and that is said.
"""

import ast
import dataclasses
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from nlhf_jax.checks import UserError
from nlhf_jax.t5_settings import T5Settings

NUM_BUCKETS = 32
LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/")
# T5 1.0 has one inner kernel, 1.1 and what came after it two.
ACTIVATIONS = {1: ("relu",), 2: ("gelu", "linear")}
CONFIG_FILE = "config.gin"
# T5Config has the names of ours; what the tensors and the job say is left out.
FIELDS = {field.name for field in dataclasses.fields(T5Settings)}
FIELDS -= {"dtype", "bias_in_each_layer"}
_log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]


def settings_of(
    shapes: Shapes, options: Mapping[str, Any], folder: pathlib.Path
) -> T5Settings:
    """Returns the network whose parameters have these shapes.

    Args:
      shapes: by our names, a layer at a time; attention's kernels may keep their heads
        apart, (D, H, K), or join them, (D, H*K).
      options: `mlp_activations` ("gelu,linear") where the user says.
      folder: of the checkpoint; `config.gin` is looked for in it and in the one above.

    Raises:
      UserError: it is no encoder-decoder of T5's, or two sources disagree.
    """
    found = _sizes(shapes)
    said = _from_config(folder) | _from_options(options)
    for name, (value, source) in said.items():
        if name in found and found[name] != value:
            raise UserError(
                f"{name} must be {found[name]!r}, as the checkpoint's tensors are, got "
                f"{value!r} from {source}"
            )
        found[name] = value
    num_inner = _num_inner(shapes)
    if "mlp_activations" not in found:
        found["mlp_activations"] = ACTIVATIONS[num_inner]
        _log.warning(
            "%s does not say its mlp_activations; those of T5 1.%d are taken: %s",
            folder,
            num_inner - 1,
            ",".join(ACTIVATIONS[num_inner]),
        )
    if len(found["mlp_activations"]) != num_inner:
        raise UserError(
            f"mlp_activations must name {num_inner}, one for each inner kernel of the "
            f"checkpoint, got {','.join(found['mlp_activations'])!r}"
        )
    return T5Settings(**found)


def _shape(shapes: Shapes, name: str, ranks: tuple[int, ...] = (2,)) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(
            f"tensor {name} is missing, so this is no encoder-decoder of T5's; T5X's "
            "other networks cannot be read"
        )
    if len(shapes[name]) not in ranks:
        raise UserError(
            f"tensor {name} must have {' or '.join(map(str, ranks))} axes, got the "
            f"shape {shapes[name]}"
        )
    return shapes[name]


def _sizes(shapes: Shapes) -> dict[str, Any]:
    """Returns the settings that shapes decide."""
    vocab_size, emb_dim = _shape(shapes, "token_embedder/embedding")
    in_each = "encoder/layers_0/relpos_bias/rel_embedding" in shapes
    table = "encoder/layers_0/" if in_each else "encoder/"
    num_heads, num_buckets = _shape(shapes, f"{table}relpos_bias/rel_embedding")
    if num_buckets != NUM_BUCKETS:
        raise UserError(
            f"tensor {table}relpos_bias/rel_embedding must have {NUM_BUCKETS} buckets, "
            f"got {num_buckets}"
        )
    query = "encoder/layers_0/attention/query/kernel"
    joined = _shape(shapes, query, (2, 3))[1:]
    if len(joined) == 1 and joined[0] % num_heads:
        raise UserError(
            f"tensor {query} must have a multiple of {num_heads} columns, one part for "
            f"each head of the relative bias, got {joined[0]}"
        )
    inner = "wi" if _num_inner(shapes) == 1 else "wi_0"
    return {
        "vocab_size": vocab_size,
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "head_dim": joined[0] // num_heads if len(joined) == 1 else joined[1],
        "mlp_dim": _shape(shapes, f"encoder/layers_0/mlp/{inner}/kernel")[1],
        "num_encoder_layers": _num_layers(shapes, "encoder"),
        "num_decoder_layers": _num_layers(shapes, "decoder"),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in shapes,
        "bias_in_each_layer": in_each,
    }


def _num_layers(shapes: Shapes, stack: str) -> int:
    matches = [LAYER.match(name) for name in shapes]
    found = {int(match[2]) for match in matches if match and match[1] == stack}
    missing = min(set(range(len(found) + 1)) - found)
    if missing < len(found):
        raise UserError(
            f"all tensors of {stack}/layers_{missing} are missing, though there are "
            f"some of layers_{max(found)}"
        )
    return len(found)


def _num_inner(shapes: Shapes) -> int:
    return 1 if "encoder/layers_0/mlp/wi/kernel" in shapes else 2


def _from_options(options: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    text = options.get("mlp_activations") or ""
    names = tuple(text.replace(" ", "").split(","))
    return {"mlp_activations": (names, "--mlp_activations")} if text else {}


def _from_config(folder: pathlib.Path) -> dict[str, tuple[Any, str]]:
    """Returns the literal values of `...T5Config.NAME = VALUE` in a `config.gin`."""
    said: dict[str, tuple[Any, str]] = {}
    for file in (folder.parent / CONFIG_FILE, folder / CONFIG_FILE):
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r"\\\n\s*", " ", text)
        for name, value in re.findall(
            r"^\s*(?:[\w./]*\.)?T5Config\.(\w+)\s*=\s*(.+?)\s*$", text, re.MULTILINE
        ):
            try:
                literal = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                continue  # a macro, whose value the shapes say
            if name in FIELDS:
                literal = tuple(literal) if isinstance(literal, list) else literal
                said[name] = (literal, str(file))
    return said
