# SPDX-License-Identifier: Apache-2.0
"""How much memory a conversion takes: that of one tensor, not that of all."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from nlhf_jax.conversion.hugging_face_folders import write_shards
from nlhf_jax.conversion.tensors import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIB = 1 << 20
LAYERS, WIDTH, HIDDEN, ROWS = 6, 1024, 16 * 1024, 512
LARGEST = WIDTH * HIDDEN * 2  # bytes: 32 MiB
# Interpreter and libraries first, then the conversion, in one process.
PROGRAM = """
import json, pathlib, resource, sys
from nlhf_jax.conversion import formats
from nlhf_jax.conversion.shapes import check_complete
from nlhf_jax.conversion.tensors import cast

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

source, target, back = map(pathlib.Path, sys.argv[1:])
lengths = {"feature_lengths": {"inputs": 8, "targets": 8}}
ours, theirs = formats.load("nlhf"), formats.load("hugging_face")
weights = theirs.open(source, {})
check_complete(weights)
before = peak()
target.mkdir()
ours.write(target, weights.__class__(
    weights.settings, weights.tensors, weights.files, "byte"), lengths)
imported = peak()
weights = ours.open(target, {})
back.mkdir()
given = {"max_positions": 16, "shard_bytes": 200 << 20}
theirs.write(back, cast(weights, "bfloat16"), given)
print(json.dumps([before, imported, peak()]))
"""


def _made_up(folder: pathlib.Path) -> int:
    """Writes a sharded Llama and returns its bytes."""
    config = {
        "model_type": "llama",
        "vocab_size": ROWS,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens": (ROWS, WIDTH), "norm": (WIDTH,)}
    for layer in range(LAYERS):
        place = f"layers.{layer}"
        for name, shape in (
            ("input_layernorm", (WIDTH,)),
            ("post_attention_layernorm", (WIDTH,)),
            ("self_attn.q_proj", (WIDTH, WIDTH)),
            ("self_attn.k_proj", (WIDTH // 4, WIDTH)),
            ("self_attn.v_proj", (WIDTH // 4, WIDTH)),
            ("self_attn.o_proj", (WIDTH, WIDTH)),
            ("mlp.gate_proj", (HIDDEN, WIDTH)),
            ("mlp.up_proj", (HIDDEN, WIDTH)),
            ("mlp.down_proj", (WIDTH, HIDDEN)),
        ):
            shapes[f"{place}.{name}"] = shape
    import jax.numpy as jnp

    dtype = jnp.dtype("bfloat16")

    def tensor(shape):
        return Tensor(shape, dtype, lambda: np.full(shape, 0.5, dtype))

    tensors = {f"model.{name}.weight": tensor(s) for name, s in shapes.items()}
    write_shards(folder, tensors, 200 * MIB)
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.battery
def test_memory_is_that_of_one_tensor(tmp_path):
    """0.6 GiB goes in and out again; what grows is far less than the issue's bound.

    A transpose is copied by blocks, and a cast holds both dtypes, so three times the
    largest tensor, and some room for the allocator, is the most there can be.
    """
    total = _made_up(tmp_path / "source")
    assert total > 600 * MIB
    folders = [str(tmp_path / name) for name in ("source", "ours", "back")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    before, imported, exported = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "back/model.safetensors.index.json").is_file()
    assert imported - before < 3 * LARGEST + 64 * MIB
    assert exported - before < 3 * LARGEST + 64 * MIB
    # All at once would have been this.
    assert total / 3 > 3 * LARGEST + 64 * MIB
    print(f"{(imported - before) / MIB:.0f} and {(exported - before) / MIB:.0f} MiB")
