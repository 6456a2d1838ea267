# SPDX-License-Identifier: Apache-2.0
"""In which order a compiler runs the operations of a program that leave arrays behind.

Operations are numbers, `before[n]` those whose results n reads. The order decides how
much is alive at once, and compilers order for different ends: for few arrays at a time
(TPUs), or for as many operations side by side as there can be (CPUs).
"""

import collections
from collections.abc import Mapping, Sequence

Before = Mapping[int, Sequence[int]]


def breadth_first(before: Before) -> list[int]:
    """Returns an order in which everything runs as soon as what it reads is there.

    Those that become ready first run first: Kahn's order, with a queue.
    """
    after = _after(before)
    missing = {number: len(reads) for number, reads in before.items()}
    ready = collections.deque(n for n, count in missing.items() if not count)
    order = []
    while ready:
        number = ready.popleft()
        order.append(number)
        for reader in after[number]:
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)
    return order


def depth_first(before: Before, sizes: Mapping[int, float]) -> list[int]:
    """Returns an order in which everything runs just before who needs it.

    Of what an operation reads, that with most other readers upstream runs first, and of
    equals that with most bytes upstream.

    Args:
      before: see above; numbers ascend along it.
      sizes: bytes that each operation leaves.
    """
    after = _after(before)
    readers, bytes_ = {}, {}
    most_readers, most_bytes = 0, 0.0
    for number, reads in before.items():
        extra = max(len(after[number]) - 1, 0)
        most_readers += extra
        most_bytes += sizes[number]
        # What several read is counted by each: never more than there is.
        readers[number] = min(extra + sum(readers[n] for n in reads), most_readers)
        bytes_[number] = min(sizes[number] + sum(bytes_[n] for n in reads), most_bytes)
    order, seen = [], set()
    ends = [n for n in before if not after[n]]
    for last in sorted(ends, key=lambda n: (readers[n], bytes_[n]), reverse=True):
        stack = [(last, False)]
        while stack:
            number, is_ready = stack.pop()
            if is_ready:
                order.append(number)
            elif number not in seen:
                seen.add(number)
                stack.append((number, True))
                reads = sorted(before[number], key=lambda n: (readers[n], bytes_[n]))
                stack.extend((n, False) for n in reads if n not in seen)
    return order


def _after(before: Before) -> dict[int, list[int]]:
    """Returns who reads each operation's results, in order."""
    after: dict[int, list[int]] = {number: [] for number in before}
    for number, reads in before.items():
        for read in reads:
            after[read].append(number)
    return after
