# SPDX-License-Identifier: Apache-2.0
"""FLOPs, bytes, messages and trip counts of programs whose costs are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import flops
from nlhf_jax.scale import costs, hlo, needs
from nlhf_jax.scale.chips import CHIPS
from nlhf_jax.scale.costs import Collective, Times

ROWS, WIDTH, LAYERS = 4, 8, 5
ONE = 2 * ROWS * WIDTH * WIDTH  # FLOPs of one product


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def open_loop(x, weights):
    def goes_on(carry):
        return (carry[0] < 7) & (carry[1].max() < 1e9)

    return jax.lax.while_loop(goes_on, lambda c: (c[0] + 1, c[1] @ weights[0]), (0, x))


def arguments():
    return jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x, w: x @ w[0], Times(ONE, 0)),
        (scanned, Times(LAYERS * ONE, 0)),
        (open_loop, Times(0, ONE)),
        (lambda x, w: open_loop(scanned(x, w), w), Times(LAYERS * ONE, ONE)),
        # Three products a layer in forward and backward: x w, g w^T and x^T g.
        (jax.grad(lambda x, w: scanned(x, w).sum(), (0, 1)), Times(15 * ONE, 0)),
    ],
    ids=["product", "scan", "open", "both", "gradient"],
)
def test_loops_count_as_often_as_they_run(fn, expected):
    jitted = jax.jit(fn)
    assert flops.of_traced(jitted.trace(*arguments())) == expected
    assert flops.of_compiled(jitted.lower(*arguments()).compile()) == expected


def test_xla_itself_counts_a_body_once():
    """Why this module exists; when it fails, the module can go."""
    compiled = jax.jit(scanned).lower(*arguments()).compile()
    assert compiled.cost_analysis()["flops"] < 2 * ONE


def test_a_total_multiplies_open_loops_only():
    assert Times(3.0, 2.0).total(10) == 23.0
    assert Times(3.0, 2.0) * 4 == Times(12.0, 8.0)
    assert Times(1.0, 2.0).plus(Times(3.0, 4.0)) == Times(4.0, 6.0)


def test_the_dearest_branch_counts():
    def fn(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w[0] @ w[1], lambda: x)

    assert flops.of_traced(jax.jit(fn).trace(*arguments())).once == 2 * ONE


def module(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


MESSAGES = {
    "%a = f32[4]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}": (
        Collective("all-reduce", 2, Times(1, 0), Times(16, 0))
    ),
    "%a = f32[32]{0} all-gather(%p), replica_groups=[2,8]<=[16]": (
        Collective("all-gather", 8, Times(1, 0), Times(128, 0))
    ),
    "%a = f32[1]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}": (
        Collective("reduce-scatter", 4, Times(1, 0), Times(16, 0))
    ),
    "%a = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[1,2]<=[2]": (
        Collective("all-gather", 2, Times(1, 0), Times(32, 0))
    ),
    "%a = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1}}": (
        Collective("collective-permute", 2, Times(1, 0), Times(16, 0))
    ),
}


@pytest.mark.parametrize("line", MESSAGES, ids=lambda line: line.split("(")[0])
def test_a_message_is_read(line):
    text = module("%p = f32[4]{0} parameter(0)", line)
    assert costs.analyse(text).collectives == (MESSAGES[line],)


def test_the_end_of_a_message_is_not_another():
    text = module(
        "%p = f32[4]{0} parameter(0)",
        "%a = f32[4]{0} all-reduce-start(%p), replica_groups={{0,1}}",
        "%b = f32[4]{0} all-reduce-done(%a)",
    )
    (found,) = costs.analyse(text).collectives
    assert found.count == Times(1, 0)
    assert found.num_bytes == Times(16, 0)


def test_a_product_that_tpus_write_as_a_convolution():
    """16 batched products of 8 x 32 and 32 x 4: an axis of the window is the batch."""
    text = module(
        "%x = bf16[16,8,32]{2,1,0} parameter(0)",
        "%w = bf16[16,4,32]{2,1,0} parameter(1)",
        "%c = bf16[16,8,4]{2,1,0} convolution(%x, %w), window={size=16 stride=15 "
        "lhs_dilate=16}, dim_labels=0bf_0oi->0bf",
    )
    assert costs.analyse(text).flops == Times(16 * 2 * 8 * 32 * 4, 0)


def test_memory_on_the_chip_is_no_hbm():
    lines = ["%p = f32[4]{0} parameter(0)", "%a = f32[4]{0:S(1)} add(%p, %p)"]
    assert costs.analyse(module(*lines)).num_bytes == Times(32, 0)
    lines[1] = "%a = f32[4]{0} add(%p, %p)"
    assert costs.analyse(module(*lines)).num_bytes == Times(48, 0)


def test_a_slice_moves_the_slice():
    whole = jnp.ones((64, 128))
    fn = jax.jit(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 1) + 1.0)
    moved = costs.analyse(fn.lower(whole, 3).compile().as_text()).num_bytes.once
    assert moved < 4 * 128 * 4


def loop(condition: str, rest: str = "") -> tuple:
    text = (
        "HloModule m\n\n%cond (p: (s32[])) -> pred[] {\n"
        "  %p = (s32[]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n"
        "  %n = s32[] constant(12)\n"
        f"{condition}}}\n\n"
        "ENTRY %main (q: (s32[])) -> (s32[]) {\n  %q = (s32[]) parameter(0)\n"
        f"  ROOT %w = (s32[]) while(%q), condition=%cond, body=%body{rest}\n}}\n"
    )
    computations, entry = hlo.parse(text)
    return computations[entry]["w"], computations


COMPARE = "  ROOT %c = pred[] compare(%i, %n), direction=LT\n"


def test_trip_counts():
    assert hlo.trip_count(*loop(COMPARE)) == 12
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert hlo.trip_count(*loop(COMPARE, known)) == 5
    early = COMPARE.replace("ROOT ", "") + "  ROOT %a = pred[] and(%c, %c)\n"
    assert hlo.trip_count(*loop(early)) is None
    assert hlo.trip_count(*loop(COMPARE.replace("LT", "NE"))) is None


@pytest.mark.parametrize(
    ("dtype", "size"), [("f32", 4), ("bf16", 2), ("pred", 1), ("s64", 8), ("f8e4m3", 1)]
)
def test_bytes_of_arrays(dtype, size):
    assert hlo.Array(dtype, (3, 5), False).num_bytes == 15 * size


# ------------------------------------------------------------------- chips, rooflines


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_of_a_chip_stands_in_its_source(name):
    chip = CHIPS[name]
    assert f"/{name}:" in chip.source
    assert f"{chip.flops / 1e12:.0f} TFLOP/s" in chip.source
    assert f"{chip.hbm_bandwidth / 1e9:.0f} GB/s" in chip.source
    assert f"links {chip.link_bandwidth * 8 / 1e9:.0f}" in " ".join(chip.source.split())
    assert f"{chip.hbm_bytes / 2**30:.0f} G" in chip.source
    assert 0.9 < chip.usable_bytes / chip.hbm_bytes < 1.01


def test_a_roofline_is_the_longest_of_three():
    chip = CHIPS["v5e"]
    message = Collective("all-reduce", 4, Times(1, 0), Times(chip.link_bandwidth, 0))
    analysis = costs.Analysis(
        Times(chip.flops, chip.flops), Times(chip.hbm_bandwidth, 0), (message,), 1
    )
    limits = needs.roofline(analysis, chip, 2)
    # A ring of four sends three quarters, twice.
    np.testing.assert_allclose(limits, (3.0, 1.0, 1.5, 0.0))
    assert (limits.step, limits.bound_by) == (3.0, "compute")


SEND = """
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[8,128]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %host = (f32[8,128]{1,0}, u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true
  ROOT %done = f32[8,128]{1,0} copy(%x)
}
"""  # noqa: E501


def test_what_leaves_a_slice_is_counted_once_and_apart():
    (found,) = costs.analyse(SEND).collectives
    assert found.kind == costs.BETWEEN_SLICES + "all-reduce"
    assert (found.group_size, found.count, found.num_bytes) == (
        *(4, Times(1, 0)),
        Times(8 * 128 * 4, 0),
    )
    two = SEND.replace("{1:4}x", "{1,2}x")
    assert costs.analyse(two).collectives[0].group_size == 2
    chip = CHIPS["v5e"]
    analysis = costs.Analysis(costs.NEVER, costs.NEVER, (found,), 0)
    limits = needs.roofline(analysis, chip, 1)
    # A ring of four, as above, but over the slower network.
    assert limits.slices == pytest.approx(1.5 * 4096 / chip.dcn_bandwidth)
    assert (limits.network, limits.bound_by) == (0.0, "slices")
    assert needs.roofline(analysis, CHIPS["v4"], 1).slices == 0.0


@pytest.mark.parametrize(
    ("chip", "published", "chips"),
    [("v5e", 6.4e12, 256), ("v5p", 50e9, 1), ("v6e", 25.6e12, 256)],
)
def test_the_network_between_slices_as_published(chip, published, chips):
    # Bits a second of a pod, or of a chip.
    assert CHIPS[chip].dcn_bandwidth == published / 8 / chips
    shown = f"{published / 1e12:g} T" if chips > 1 else f"{published / 1e9:g} G"
    assert f"between slices {shown}b/s" in " ".join(CHIPS[chip].source.split())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("temporaries (298.12G) exceeds available HBM (15.75G)", 298.12 * 2**30),
        ("Ran out of memory in memory space hbm. Used 17.5M of 1M", 17.5 * 2**20),
        ("out of memory", 0.0),
    ],
)
def test_what_the_compiler_would_have_needed(message, expected):
    assert needs.refused_bytes(message) == pytest.approx(expected)


def test_bytes_of_a_device():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = {"a": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)}
    assert needs.device_bytes(tree, {"a": device}) == 24


def test_aliased_outputs_need_no_room():
    assert needs.Memory(10, 8, 7, 5, 1).total == 17


def test_a_compiled_program_reports_itself():
    fn = functools.partial(jax.jit(scanned).trace, *arguments())
    found = needs.as_json(needs.compile_traced(fn), {"x": 1}, CHIPS["v4"], 1)
    assert found["flops"] == LAYERS * ONE
    assert found["memory"]["total"] > found["memory"]["arguments"] > 0
    assert found["roofline"]["bound_by"] in needs.Roofline._fields
