# SPDX-License-Identifier: Apache-2.0
"""Small model folders for conversions: every family, with bytes as their vocabulary."""

import functools
import json
import pathlib

import jax
import numpy as np

from nlhf_jax import cli
from nlhf_jax.conversion.tensors import Weights
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings
from nlhf_jax.jobs import folders, our_weights
from nlhf_jax.models.families import language_model
from nlhf_jax.parameter_files import names_of, save_params
from nlhf_jax.t5_settings import T5Settings

ROWS = 259  # ids of the byte vocabulary
SMALL_T5 = functools.partial(
    T5Settings,
    vocab_size=ROWS,
    emb_dim=16,
    num_heads=2,
    head_dim=6,
    mlp_dim=20,
    num_encoder_layers=2,
    num_decoder_layers=1,
)
SMALL_DECODER = functools.partial(
    DecoderOnlySettings,
    vocab_size=ROWS,
    emb_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    num_layers=2,
)
SHAPES: dict[str, ModelSettings] = {
    "t5_1_0": SMALL_T5(mlp_activations=("relu",), logits_via_embedding=True),
    "t5_1_1": SMALL_T5(),
    "llama": SMALL_DECODER(
        rope_scaling="llama3", rope_factor=8.0, rope_original_length=32, mlp_bias=True
    ),
    "mistral": SMALL_DECODER(attention_pattern=("local",), sliding_window=4),
    "gemma_2": SMALL_DECODER(
        activation="gelu",
        tied_output=True,
        post_norms=True,
        norm_plus_one=True,
        scale_embedding=True,
        query_scalar=11.0,
        attention_soft_cap=2.0,
        logit_soft_cap=3.0,
        attention_pattern=("local", "global"),
        sliding_window=4,
    ),
    "qwen_3": SMALL_DECODER(query_key_norm=True, tied_output=True),
}


@functools.cache
def parameters(name: str) -> dict[str, np.ndarray]:
    """Returns random parameters by path, norms and tables too."""
    shapes = jax.eval_shape(language_model(SHAPES[name]).init, jax.random.key(0))
    rng = np.random.default_rng(3)
    return {
        path: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32)
        for path, leaf in names_of(shapes).items()
    }


def model_folder(
    folder: pathlib.Path, name: str, dtype: str = "float32"
) -> pathlib.Path:
    """Makes a model folder as the jobs do, and returns it."""
    description = folders.ModelDescription(
        "language_model", SHAPES[name], {"inputs": 12, "targets": 6}
    )
    folders.describe(folder, description, "byte")
    save_params(folder, parameters(name), dtype)
    return folder


def numbers_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all parameters of a model folder by path."""
    weights: Weights = our_weights.open_folder(folder, {})
    return {path: tensor.read() for path, tensor in weights.tensors.items()}


def same_numbers(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    """Checks that names, dtypes and bits are the same."""
    assert first.keys() == second.keys()
    for path, array in first.items():
        assert array.dtype == second[path].dtype, path
        assert array.shape == second[path].shape, path
        assert array.tobytes() == second[path].tobytes(), path


def exported(source: pathlib.Path, target: pathlib.Path, *words: str) -> int:
    """Runs `nlhf export` into Hugging Face's format and returns its code."""
    command = ["export", f"--checkpoint={source}", f"--to={target}"]
    return cli.main([*command, "--format=hugging_face", *words])


def imported(source: pathlib.Path, target: pathlib.Path, *words: str) -> int:
    """Runs `nlhf import` and returns its code."""
    return cli.main(["import", f"--from={source}", f"--to={target}", *words])


def refused(capsys, target: pathlib.Path, code: int) -> str:
    """Returns the one sentence of a command that ended with 2 and left nothing."""
    said = capsys.readouterr()
    assert code == 2, said
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}*"))
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    return said.err


def change_json(file: pathlib.Path, **changes) -> None:
    """Changes keys of a JSON object in a file; None removes one."""
    content = json.loads(file.read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(content))
