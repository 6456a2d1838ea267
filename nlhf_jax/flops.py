# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a step, loops counted as often as they run.

`jax`'s cost analysis counts a loop's body once, so that a step with a scan over layers
and a decode loop looks many times cheaper than it is.
"""

import math
from collections.abc import Iterator
from typing import Any

from nlhf_jax.scale import costs
from nlhf_jax.scale.costs import NEVER, Times


def of_compiled(compiled: Any) -> Times:
    """Returns the FLOPs of one call on one device, as the compiler will run them.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`.

    Returns:
      FLOPs outside open loops and per iteration of them; `Times.total(decode_steps)`
      is the whole. Work that devices repeat is in it.
    """
    return costs.analyse(compiled.as_text()).flops


def of_traced(traced: Any) -> Times:
    """Returns the FLOPs of one call on all devices together, before compilation.

    What is computed again (remat) counts again; what devices repeat does not.

    Args:
      traced: a closed jaxpr, or what has one: `jax.jit(f).trace(...)`.
    """
    return _of_jaxpr(getattr(traced, "jaxpr", traced), Times(1.0, 0.0))


def _of_jaxpr(jaxpr: Any, times: Times) -> Times:
    total = NEVER
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total = total.plus(times * _product(equation))
        for inner, its_times in _inner(equation, times):
            total = total.plus(_of_jaxpr(inner, its_times))
    return total


def _product(equation: Any) -> float:
    """Returns 2 x outputs x terms of a matrix product; 0 for everything else."""
    if equation.primitive.name != "dot_general":
        return 0.0
    (contracting, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    terms = math.prod(left[axis] for axis in contracting)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * terms


def _inner(equation: Any, times: Times) -> Iterator[tuple[Any, Times]]:
    """Yields the programs inside an equation and how often each runs."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        yield params["jaxpr"], times * params["length"]
    elif name == "while":
        # The length is not in the program: JAX turns loops of known length into scans.
        yield params["body_jaxpr"], Times(0.0, times.once)
    elif name == "cond":
        # The dearest branch: a bound, where branches differ.
        yield max(params["branches"], key=lambda b: _of_jaxpr(b, times)), times
    else:
        for value in params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    yield part, times
