# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured: a square product, and reading memory.

    python -m benchmarks.peaks jax --size small      # speaks the line protocol

A fraction of a limit is a fraction of the larger of what jax and torch reach here.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.protocol import Work, main, timed
from benchmarks.sizes import SIZES, Size

TRIES = 4
READ_BYTES = 256 * 2**20


def sides_of(size: Size) -> tuple[int, ...]:
    """Returns the sides of the square matrices that are tried."""
    return (256,) if size == SIZES["tiny"] else (1024, 2048, 4096)


def best(product: Callable[[int], Callable[[], Any]], size: Size) -> float:
    """Returns the most FLOP/s of any square product, best of several tries."""
    found = []
    for side in sides_of(size):
        run = product(side)
        run()
        seconds = min(timed(run)[0] for _ in range(TRIES))
        found.append(2.0 * side**3 / seconds)
    return max(found)


def work(
    product: Callable[[int], Callable[[], Any]],
    read: Callable[[], Any],
    size: Size,
    device: str = "cpu",
) -> Work:
    """Returns the side: a unit measures both, and the facts hold the best of all."""
    found = {"flops_per_s": 0.0, "read_bytes_per_s": 0.0}

    def unit():
        read()
        seconds = min(timed(read)[0] for _ in range(TRIES))
        new = {"flops_per_s": best(product, size)}
        new["read_bytes_per_s"] = READ_BYTES / seconds
        found.update({name: max(found[name], new[name]) for name in new})

    return Work(unit, lambda: found | {"device": device})


def with_jax(size: Size) -> Work:
    """Float32 products and a float32 sum in jax."""
    import jax
    import jax.numpy as jnp

    multiply, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    numbers = jnp.ones(READ_BYTES // 4, jnp.float32)

    def product(side: int):
        square = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
        return lambda: multiply(square, square).block_until_ready()

    def read():
        return total(numbers).block_until_ready()

    return work(product, read, size, jax.devices()[0].device_kind)


def with_torch(size: Size) -> Work:
    """The same in torch."""
    import torch

    numbers = torch.ones(READ_BYTES // 4)

    def product(side: int):
        square = torch.randn(side, side)
        return lambda: square @ square

    return work(product, lambda: float(numbers.sum()), size)


VARIANTS = {"jax": with_jax, "torch": with_torch}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, ("jax", "jaxlib", "torch")))
