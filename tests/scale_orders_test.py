# SPDX-License-Identifier: Apache-2.0
"""Orders of operations, on graphs small enough to be ordered by hand."""

import random

import pytest

from nlhf_jax.scale import orders

# 0 and 1 read nothing; 2 reads 0, 3 reads 2, 4 reads 1, 5 reads 3 and 4.
GRAPH = {0: [], 1: [], 2: [0], 3: [2], 4: [1], 5: [3, 4]}


def test_breadth_first_runs_whatever_can_run():
    assert orders.breadth_first(GRAPH) == [0, 1, 2, 4, 3, 5]


def test_depth_first_finishes_a_branch_before_it_begins_another():
    equal = dict.fromkeys(GRAPH, 1.0)
    # The branch with more bytes upstream comes first.
    assert orders.depth_first(GRAPH, equal) == [0, 2, 3, 1, 4, 5]
    assert orders.depth_first(GRAPH, equal | {1: 9.0}) == [1, 4, 0, 2, 3, 5]


def test_what_others_read_too_comes_before_what_is_large():
    # 0 is read by 2 and 3, so the branch through it comes first, though 1 is larger.
    graph = {0: [], 1: [], 2: [0], 3: [0, 1], 4: [2, 3]}
    sizes = dict.fromkeys(graph, 1.0) | {1: 5.0}
    found = orders.depth_first(graph, sizes)
    assert found.index(0) < found.index(1)


def test_long_chains_need_no_recursion():
    chain = {n: [n - 1] if n else [] for n in range(5000)}
    assert orders.depth_first(chain, dict.fromkeys(chain, 1.0)) == list(chain)
    assert orders.breadth_first(chain) == list(chain)


@pytest.mark.parametrize("seed", range(5))
def test_an_order_has_everything_once_and_after_what_it_reads(seed):
    random_ = random.Random(seed)
    graph = {
        n: sorted(random_.sample(range(n), min(n, random_.randrange(4))))
        for n in range(60)
    }
    sizes = {n: random_.random() for n in graph}
    for order in (orders.breadth_first(graph), orders.depth_first(graph, sizes)):
        assert sorted(order) == list(graph)
        place = {number: where for where, number in enumerate(order)}
        for number, reads in graph.items():
            assert all(place[read] < place[number] for read in reads)
