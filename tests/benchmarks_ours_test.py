# SPDX-License-Identifier: Apache-2.0
"""Our sides do the work they say, once compiled; nothing here is about time."""

import jax
import numpy as np
import pytest

from benchmarks import (
    ours,
    ours_compile,
    ours_decode,
    ours_step,
    ours_training,
    peaks,
    rows,
    sizes,
)
from nlhf_jax import flops
from nlhf_jax.types import POLICY, REFERENCE

SMALLEST = sizes.Size(1, 8, 2, 16, 64, 2, 4, 4)


@pytest.fixture(scope="module")
def run():
    found = ours.PolicyRun(SMALLEST)
    found.first = jax.device_get(found.state.param_sets[POLICY])
    found.reference = jax.device_get(found.frozen[REFERENCE])
    for _ in range(2):
        found.unit()
    return found


def moved(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.battery
def test_a_step_is_compiled_once_and_decodes_to_the_end(run):
    assert run.facts() == {"compilations": 1, "decode_steps": SMALLEST.response_length}
    assert int(run.state.step) == 2


@pytest.mark.battery
def test_a_step_moves_the_policy_and_not_the_reference(run):
    assert moved(run.first, jax.device_get(run.state.param_sets[POLICY]))
    assert not moved(run.reference, jax.device_get(run.frozen[REFERENCE]))
    assert float(run.metrics["token/count"]) == 2 * 2 * SMALLEST.response_length


@pytest.mark.battery
def test_what_the_compiler_counts_is_bounded(run):
    compiled = run.compiled.lower(*run.arguments()).compile()
    counted = ours.counts(compiled)
    # 0.031 MiB and 1.40 times what is needed when it was written: attention, which
    # `Needed` leaves out, large at this size, and the judge's second reading.
    assert 0 < counted["temporary_mib"] < 0.04
    done = flops.of_compiled(compiled).total(SMALLEST.response_length)
    assert 1.0 < done / sizes.Needed.of(SMALLEST).step < 1.5
    held = jax.tree.leaves((run.state, run.frozen))
    # Key, prompts and the step's count are small beside parameters and moments.
    expected = sum(leaf.nbytes for leaf in held) / 2**20
    assert counted["argument_mib"] == pytest.approx(expected, rel=0.05)


@pytest.mark.battery
def test_three_programs_are_compiled_once_and_their_parts_add_up():
    work = ours_step.three(SMALLEST)
    for _ in range(2):
        parts = work.unit()
    assert set(parts) == {"generate", "score", "update"}
    assert all(value > 0 for value in parts.values())
    assert work.facts() == {"compilations": 1}


@pytest.mark.battery
def test_every_kind_of_decode_ends_where_it_says():
    work = ours_decode.kinds(SMALLEST)
    parts = work.unit()
    assert parts["separate"] == parts["plain"] + parts["mixture"]
    facts, length = work.facts(), SMALLEST.response_length
    steps = {
        name.removesuffix("_steps"): n for name, n in facts.items() if "_s" in name
    }
    assert steps == {
        "plain": length,
        "mixture": length,
        "fused": length,
        "four_times": 4 * length,
        "ends_at_quarter": length // 4,
        "ends_at_last": length,
    }
    assert {n for name, n in facts.items() if "_compilations" in name} == {1}


def test_kinds_begin_with_another_each_time():
    order = ours_decode._turned(["a", "b", "c"])
    assert ["".join(order()) for _ in range(4)] == ["abc", "bca", "cab", "abc"]


@pytest.mark.battery
@pytest.mark.parametrize("variant", ["reward", "t5"])
def test_a_training_step_is_compiled_once(variant):
    work = ours_training.VARIANTS[variant](SMALLEST)
    for _ in range(2):
        assert work.unit() == {}
    assert work.facts() == {"compilations": 1}


def test_compiling_asks_a_fresh_process_twice(monkeypatch):
    asked = []

    def ask(size, cache):
        asked.append(cache)
        seconds = 3.0 if len(asked) == 1 else 0.5
        counted = {"flops": 1.0, "temporary_mib": 2.0, "argument_mib": 3.0}
        return {"trace": 1.0, "compile": seconds} | counted

    monkeypatch.setattr(ours_compile, "ask", ask)
    work = ours_compile.step(sizes.SIZES["tiny"])
    assert work.num_warm_ups == 0
    assert work.unit() == {"cold": 4.0, "warm": 1.5}
    assert len(asked) == 2 and asked[0] == asked[1]
    assert work.facts() == {"flops": 1.0, "temporary_mib": 2.0, "argument_mib": 3.0}


def test_a_size_is_known_by_its_name():
    for name, size in sizes.SIZES.items():
        assert ours_compile.name_of(size) == name


def test_peaks_are_the_best_of_all_tries(monkeypatch):
    seconds = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr(peaks, "TRIES", 3)
    monkeypatch.setattr(peaks, "timed", lambda fn: (next(seconds), fn()))
    assert peaks.best(lambda side: lambda: None, sizes.SIZES["tiny"]) == (
        2 * 256**3 / 0.25
    )
    assert peaks.sides_of(sizes.SIZES["small"])[-1] == 4096


def test_peaks_of_jax_are_measured(monkeypatch):
    monkeypatch.setattr(peaks, "TRIES", 1)
    monkeypatch.setattr(peaks, "READ_BYTES", 1024)
    work = peaks.with_jax(sizes.SIZES["tiny"])
    work.unit()
    facts = work.facts()
    assert facts["flops_per_s"] > 0 and facts["read_bytes_per_s"] > 0
    assert facts["device"] == jax.devices()[0].device_kind


def test_batches_are_full_and_hold_no_special_id():
    batch = ours.comparisons_of(SMALLEST)
    rows_, prompt, new = 2, SMALLEST.prompt_length, SMALLEST.response_length
    assert batch.prompts.tokens_BS.shape == (rows_, prompt)
    assert batch.first.tokens_BT.shape == batch.second.tokens_BT.shape == (rows_, new)
    assert not np.array_equal(batch.first.tokens_BT, batch.second.tokens_BT)
    for tokens, mask in batch[:3]:
        assert mask.all() and tokens.min() >= ours.FIRST_WORD
        assert tokens.max() < SMALLEST.vocab_size
    assert sorted(batch.preference_B) == [0.0, 1.0]
    assert ours.targets_of(SMALLEST, 6).targets.tokens_BT.shape == (6, new)


def test_words_of_a_template_are_special_ids():
    ids = ours.template_ids("Which summary is better, 1 or 2? Text:")
    assert len(ids) == 8 and all(2 <= one < ours.FIRST_WORD for one in ids)


def test_settings_have_the_size():
    size = sizes.SIZES["small"]
    decoder, t5 = ours.decoder_settings(size), ours.t5_settings(size)
    for settings in (decoder, t5):
        assert (settings.vocab_size, settings.emb_dim) == (8192, 256)
        assert (settings.num_heads, settings.head_dim, settings.mlp_dim) == (8, 32, 768)
    assert decoder.num_layers == t5.num_encoder_layers == t5.num_decoder_layers == 4
    assert not decoder.tied_output and decoder.dtype == "float32"
    assert ours.endless(decoder).eos_id == ours.NEVER


@pytest.mark.parametrize("size", sizes.SIZES.values(), ids=sizes.SIZES)
def test_matrix_products_are_counted_as_the_network_has_them(size):
    from nlhf_jax.models.families import language_model

    model = language_model(ours.decoder_settings(size))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    products = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1)
    table = size.vocab_size * size.width  # the embedding is looked up, not multiplied
    assert products - table == size.body_products + size.head_products


def test_every_side_of_ours_has_its_program():
    modules = {
        "benchmarks.peaks": peaks.VARIANTS,
        "benchmarks.ours_step": ours_step.VARIANTS,
        "benchmarks.ours_decode": ours_decode.VARIANTS,
        "benchmarks.ours_training": ours_training.VARIANTS,
        "benchmarks.ours_compile": ours_compile.VARIANTS,
    }
    for many in rows.GROUPS.values():
        for side in many:
            if not side.module.startswith(rows.PEERS):
                assert side.variant in modules[side.module], side.name
