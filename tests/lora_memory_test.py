# SPDX-License-Identifier: Apache-2.0
"""The table of memory: its columns are what a plan says, whoever shares what."""

import pytest

from benchmarks import memory_table
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.jobs import compile as compile_job
from nlhf_jax.models.adapters import num_parameters

WIDE = DecoderOnlySettings(
    vocab_size=384,
    emb_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=128,
    num_layers=2,
)


@pytest.fixture(scope="module")
def found():
    bindings = memory_table.job_bindings()
    target = compile_job.target_of(compile_job.Options(cpu_devices=1), 1)
    return {
        way: memory_table.figures(WIDE, way, bindings, target)["parts"]
        for way in memory_table.WAYS
    }


@pytest.mark.battery
def test_what_is_held_of_the_weights(found):
    whole, lora, judge_too = (found[way] for way in memory_table.WAYS)
    # float32 and its two moments; bfloat16 where frozen.
    size = whole["parameters"]
    assert 1.9 * size < whole["optimiser"] < 2.1 * size
    assert 2 * whole["frozen reference"] == 2 * whole["frozen preference"] == size
    assert 2 * lora["frozen base"] == size
    assert lora["frozen reference"] == 0
    assert lora["frozen preference"] == whole["frozen preference"]
    adapters = lora["parameters"]
    assert adapters < size / 3
    assert judge_too["frozen preference"] == judge_too["frozen reference"] == adapters
    assert len({parts["caches"] for parts in found.values()}) == 1


def test_cells():
    assert memory_table.gib(0) == "-"
    assert memory_table.gib(3 * 2**30) == "3.00"
    assert memory_table.gib(2**25) == "0.031"
    parts = {"parameters": 2**30, "optimiser": 2**31, "caches": 2**30}
    memory = {"parts": parts, "temporaries": 2**30, "total": 2**32}
    line = memory_table.row("one", "LoRA", memory)
    assert line == (
        "| one | LoRA | 1.00 | 2.00 | - | - | - | 1.00 | 3.00 | 1.00 | 4.00 |"
    )


def test_every_model_of_the_table_has_a_shape():
    for file in memory_table.MODELS.values():
        assert (memory_table.ROOT / "configs/models" / f"{file}.gin").is_file()
    assert num_parameters({}) == 0
