# SPDX-License-Identifier: Apache-2.0
"""Small GGUF files, written as llama.cpp's converter of Hugging Face models does."""

import pathlib

import numpy as np

from nlhf_jax.conversion import hugging_face
from nlhf_jax.conversion.shapes import flat
from nlhf_jax.decoder_settings import DecoderOnlySettings
from tests.decoder_only_toys import GEMMA, parameters


def shape(num_layers: int = 2, **switches) -> DecoderOnlySettings:
    """Returns a network all of whose rows are of 32 numbers or more, as blocks are."""
    widths = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | switches
    return DecoderOnlySettings(
        vocab_size=48, emb_dim=32, mlp_dim=64, num_layers=num_layers, **widths
    )


# Architecture -> a network of its own; caps, windows and bases are the architecture's.
NETWORKS = {
    "llama": shape(norm_epsilon=1e-5, rope_base=500.0, eos_id=2),
    "gemma": shape(num_kv_heads=1, **GEMMA),
    "gemma2": shape(
        num_layers=3,
        post_norms=True,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        attention_pattern=("local", "global"),
        sliding_window=4,
        **GEMMA,
    ),
    "gemma3": shape(
        num_layers=7,
        post_norms=True,
        query_key_norm=True,
        attention_pattern=("local",) * 5 + ("global",),
        sliding_window=4,
        rope_base=1e6,
        local_rope_base=1e4,
        **GEMMA,
    ),
    "qwen2": shape(query_key_value_bias=True, tied_output=True, rope_base=1e6),
    "qwen3": shape(query_key_norm=True, rope_base=1e6, head_dim=16),
}


def metadata_of(settings: DecoderOnlySettings, name: str) -> dict:
    """Returns the keys that the converter writes, without the architecture's name."""
    keys = {
        "block_count": settings.num_layers,
        "context_length": 64,
        "embedding_length": settings.emb_dim,
        "feed_forward_length": settings.mlp_dim,
        "attention.head_count": settings.num_heads,
        "attention.head_count_kv": settings.num_kv_heads,
        "attention.key_length": settings.head_dim,
        "attention.value_length": settings.head_dim,
        "attention.layer_norm_rms_epsilon": settings.norm_epsilon,
        "rope.freq_base": settings.rope_base,
        "vocab_size": settings.vocab_size,
    }
    if settings.sliding_window:
        keys["attention.sliding_window"] = settings.sliding_window
    if name == "gemma2":
        keys["attn_logit_softcapping"] = settings.attention_soft_cap
        keys["final_logit_softcapping"] = settings.logit_soft_cap
    return keys


def pairs(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns rows with those that turn together side by side, head by head."""
    heads = array.reshape(num_heads, -1, *array.shape[1:])
    half = heads.shape[1] // 2
    turned = np.stack([heads[:, :half], heads[:, half:]], axis=2)
    return turned.reshape(array.shape)


def tensors_of(settings: DecoderOnlySettings, name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by GGUF's names, float32."""
    import gguf

    arch = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[name]
    names = gguf.get_tensor_name_map(arch, settings.num_layers)
    found = {}
    for path, leaf in flat(parameters(settings)).items():
        theirs = hugging_face.their_name(path, settings)
        array = np.asarray(leaf).T if path.endswith("/kernel") else np.asarray(leaf)
        if name == "llama" and "/query/" in path:
            array = pairs(array, settings.num_heads)
        if name == "llama" and "/key/" in path:
            array = pairs(array, settings.num_kv_heads)
        if name.startswith("gemma") and path.endswith("/scale"):
            array = array + np.float32(1.0)
        end = path.rpartition("/")[2].replace("kernel", "weight")
        end = "bias" if end == "bias" else "weight"
        found[names.get_name(theirs.removesuffix(f".{end}")) + f".{end}"] = array
    return found


def write(
    path: pathlib.Path,
    name: str,
    tensors: dict[str, np.ndarray],
    keys: dict,
    kind: str = "F32",
) -> pathlib.Path:
    """Writes a file.

    Args:
      path: of the file.
      name: the architecture.
      tensors: by GGUF's names; matrices are stored as `kind` says, vectors as float32.
      keys: metadata without the architecture's name.
      kind: of the quantisation, by GGUF's name.
    """
    import gguf

    writer = gguf.GGUFWriter(path, name)
    for key, value in keys.items():
        full = key if key.startswith("tokenizer.") else f"{name}.{key}"
        if isinstance(value, list):
            writer.add_array(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)
    for tensor, array in tensors.items():
        number = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        data = np.ascontiguousarray(gguf.quants.quantize(array, number))
        writer.add_tensor(tensor, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def toy(path: pathlib.Path, name: str, kind: str = "F32", **changes) -> pathlib.Path:
    """Writes the network of an architecture; `changes` replace or drop (None) keys."""
    settings = NETWORKS[name]
    keys = metadata_of(settings, name) | changes.pop("keys", {})
    keys = {key: value for key, value in keys.items() if value is not None}
    tensors = tensors_of(settings, name) | changes.pop("tensors", {})
    tensors = {key: array for key, array in tensors.items() if array is not None}
    keys |= {
        "tokenizer.ggml.eos_token_id": settings.eos_id,
        "tokenizer.ggml.padding_token_id": settings.pad_id,
    }
    return write(path, name, tensors, keys, kind)
