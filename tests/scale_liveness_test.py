# SPDX-License-Identifier: Apache-2.0
"""What a program holds at once, counted by hand on programs small enough for it.

N floats of 4 bytes are one array; every expectation is a number of arrays.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from nlhf_jax.scale import flat, liveness

N = 256
ARRAY_BYTES = 4.0 * N
ROWS = jnp.zeros(N)
SQUARE = jnp.zeros((16, 16))


def num_arrays(fn, *args, **named) -> float:
    return liveness.peak_bytes(jax.make_jaxpr(fn)(*args), **named) / ARRAY_BYTES


def product(x):
    """A product always leaves its result in memory."""
    return x @ x


def test_a_chain_holds_an_input_and_an_output_at_a_time():
    assert num_arrays(product, SQUARE) == 1
    assert num_arrays(lambda x: product(product(product(product(x)))), SQUARE) == 2


def test_what_is_read_late_stays_alive():
    def late(x):
        first = product(x)
        second = product(first)
        return product(second) @ first

    # `first`, `second` and its square; then `first`, the square and the result.
    assert num_arrays(late, SQUARE) == 3


def test_elementwise_operations_are_fused():
    assert num_arrays(lambda x: (x * 2 + 1) * x - 3, ROWS) == 1
    # The exponential is read twice and not computed twice; the quotient lies over it.
    found = num_arrays(lambda x: (lambda e: e / e.sum())(jnp.exp(x)), ROWS)
    assert found == pytest.approx(1, abs=0.01)


def test_an_elementwise_result_lies_over_what_nobody_reads_after_it():
    assert num_arrays(lambda x: jnp.exp(product(x)), SQUARE) == 1
    assert num_arrays(lambda x: (lambda p: (jnp.exp(p), p))(product(x)), SQUARE) == 2
    # Nor over an argument, which is the caller's.
    assert num_arrays(jnp.exp, SQUARE) == 1
    # A product reads its operands until it is done.
    assert num_arrays(lambda x: product(product(x)), SQUARE) == 2
    # Of another size it does not fit.
    wider = lambda x: jnp.concatenate([product(x)] * 2)  # noqa: E731
    assert num_arrays(wider, SQUARE) == 1 + 2


def test_what_a_loop_is_given_lies_in_memory():
    def add_up(x):
        zeros = jnp.zeros((16, 16)) + x[0, 0]
        step = lambda total, _: (total + product(x), None)  # noqa: E731
        return jax.lax.scan(step, zeros.T.reshape(16, 16), length=5)[0]

    # The total and one product; without a loop nothing is made of the zeros.
    assert num_arrays(add_up, SQUARE) == pytest.approx(2, abs=0.01)


def test_side_by_side_all_that_can_run_runs():
    def chains(x):
        first = (product(product(product(x)))).sum()
        second = (product(product(product(x.T)))).sum()
        return first + second

    assert num_arrays(chains, SQUARE) == pytest.approx(2, abs=0.01)
    # Two chains go on together; of each an operand and a result.
    found = num_arrays(chains, SQUARE, is_concurrent=True)
    assert found == pytest.approx(3, abs=0.01)


def test_a_scan_holds_what_it_stacks_and_one_body():
    def body(x):
        return product(product(x)), x

    def stacked(x):
        return jax.lax.scan(lambda x, _: body(x), x, length=5)

    # Five stacked, what goes round, and the product between the two.
    assert num_arrays(stacked, SQUARE) == 5 + 1 + 1
    # Nothing is stacked where nobody reads it.
    assert num_arrays(lambda x: stacked(x)[0], SQUARE) == 1 + 1


def test_a_scan_of_one_step_is_no_loop():
    def once(x):
        return jax.lax.scan(lambda x, _: (product(x), None), x, length=1)[0]

    assert num_arrays(once, SQUARE) == num_arrays(product, SQUARE) == 1


def test_a_while_loop_goes_round_in_place():
    def loop(x):
        advance = lambda c: (c[0] + 1, product(product(c[1])))  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < 9, advance, (0, product(x)))[1]

    assert num_arrays(loop, SQUARE) == pytest.approx(2, abs=0.02)


def test_a_cache_in_a_loop_is_written_in_place():
    def fill(cache, x):
        def advance(carry):
            step, cache = carry
            rows = jax.lax.dynamic_update_slice(cache, x[None] * step, (step, 0))
            return step + 1, rows

        start = (0, cache * 2.0)
        return jax.lax.while_loop(lambda c: c[0] < 8, advance, start)[1]

    # Eight rows of an array each: the whole cache is there once.
    found = num_arrays(fill, jnp.zeros((8, N)), ROWS)
    assert found == pytest.approx(8, abs=0.02)


def test_the_dearest_branch_counts():
    def branches(x):
        cheap = lambda x: product(x)  # noqa: E731
        dear = lambda x: product(product(product(x)))  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, dear, cheap, x)

    # The result, and two products on the way to it.
    assert num_arrays(branches, SQUARE) == pytest.approx(1 + 2, abs=0.01)


def test_a_donated_output_lies_where_its_input_lay():
    def update(x, gradient):
        return x - gradient @ gradient, (x * x).sum()

    # The product, and over it the new x; donated, the product alone.
    assert num_arrays(update, SQUARE, SQUARE) == pytest.approx(1, abs=0.01)
    donated = num_arrays(update, SQUARE, SQUARE, donated=[0])
    assert donated == pytest.approx(1, abs=0.01)


def test_repeats_and_waste_are_left_out():
    def twice(x):
        wasted = product(x @ x.T)
        del wasted
        return product(x) + product(x)

    assert num_arrays(twice, SQUARE) == 1
    assert [u.name for u in flat.Flat(jax.make_jaxpr(twice)(SQUARE)).uses] == [
        "dot_general",
        "add",
    ]


# --------------------------------------------------------------------------- layouts


@pytest.fixture
def mesh():
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axes)
    with jax.set_mesh(mesh):
        yield mesh


def put(x, *spec):
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def test_a_split_parameter_counts_in_parts_until_it_is_gathered(mesh):
    def moments(w):
        return jnp.concatenate([w * 2.0, w])

    split = {"split": [1], "num_parts": 4}
    assert num_arrays(moments, SQUARE, **split) == 2 / 4
    # Gathered it is whole, and so is what a product makes of it.
    whole = lambda w: put(w * 2.0, None, "tensor")  # noqa: E731
    assert num_arrays(whole, SQUARE, **split) == 1
    gathered = lambda w: product(whole(w))  # noqa: E731
    assert num_arrays(gathered, SQUARE, **split) == 2
    # A gradient is made whole, and split again.
    gradient = lambda w: put(gathered(w), "fsdp", "tensor")  # noqa: E731
    assert num_arrays(gradient, SQUARE, **split) == 2


def test_what_is_put_together_along_another_axis_is_turned(mesh):
    whole = lambda w: put(w, None, None)  # noqa: E731
    assert num_arrays(whole, SQUARE, split=[1], num_parts=4) == 1
    assert num_arrays(whole, SQUARE, split=[2], num_parts=4) == 2


def test_a_tables_gradient_is_split_from_its_first_zero(mesh):
    def gradient(rows):
        table = jnp.zeros((16, 16)).at[jnp.arange(16)].add(rows @ rows)
        return put(table, None, "fsdp") * 2

    # A product of all rows; the table in parts, also where it is only zeros.
    found = num_arrays(gradient, SQUARE, split=[0], num_parts=4)
    assert found == pytest.approx(1 + 1 / 4, abs=0.1)


def test_a_fast_memory_holds_what_is_read_at_once():
    chain = lambda x: product(product(product(x)))  # noqa: E731
    assert num_arrays(chain, SQUARE) == 2
    # Half of it is room; the result is the caller's and stays in the main memory.
    assert num_arrays(chain, SQUARE, fast_bytes=2 * 2 * ARRAY_BYTES) == 1
    assert num_arrays(chain, SQUARE, fast_bytes=ARRAY_BYTES) == 2

    def late(x):
        first = product(x)
        for _ in range(2 * liveness.SHORT):
            x = product(x) @ x
        return x @ first

    # What is read long after it was made does not stay there.
    assert num_arrays(late, SQUARE, fast_bytes=9 * ARRAY_BYTES) == 2


def test_rows_are_not_split_by_a_parameter(mesh):
    def norm(scale, x):
        return product(x) * scale[None]

    found = num_arrays(norm, jnp.zeros(16), SQUARE, split=[1, 0], num_parts=4)
    assert found == 1
    rows = lambda x: put(product(x), ("data", "fsdp"), None)  # noqa: E731
    assert num_arrays(rows, SQUARE, split=[0], num_parts=4) == 2


def test_messages_are_sent_again_inside_a_loop_of_one_step(mesh):
    whole = lambda w: put(w, None, None)  # noqa: E731

    def twice(w):
        return whole(w).sum() + (whole(w) * 2).sum()

    def again(w):
        step = lambda total, _: (total + whole(w).sum(), None)  # noqa: E731
        return jax.lax.scan(step, whole(w).sum(), length=1)[0]

    def count(fn):
        uses = flat.Flat(jax.make_jaxpr(fn)(SQUARE)).uses
        return [use.name for use in uses].count("whole")

    assert (count(twice), count(again)) == (1, 2)


def test_stacked_weights_and_gradients_stay_split(mesh):
    def stack(a, b):
        def layer(x, w):
            return product(x) @ put(w, None, None), None

        return jax.lax.scan(layer, a @ b, jnp.stack([a, b]))[0]

    split = {"split": [1, 1], "num_parts": 4}
    # The stack in parts and what goes round; inside, a product and one whole weight.
    assert num_arrays(stack, SQUARE, SQUARE, **split) == 2 / 4 + 1 + 2
