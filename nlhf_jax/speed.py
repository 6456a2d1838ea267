# SPDX-License-Identifier: Apache-2.0
"""How fast a loop runs: steps, tokens, and the share of the chips' peak in use."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nlhf_jax import flops
from nlhf_jax.partitioning import CompiledFunction
from nlhf_jax.scale import chips
from nlhf_jax.scale.costs import Times

_DECODE_STEPS = "decode/steps"
_log = logging.getLogger(__name__)


class Compilation(NamedTuple):
    """A program that is ready to run.

    Attributes:
      seconds: what tracing, lowering and compiling took.
      executable: the program itself, for its costs.
      devices: those it runs on.
    """

    seconds: float
    executable: Any
    devices: tuple[Any, ...]


def compile_ahead(function: CompiledFunction, *args: Any) -> Compilation:
    """Compiles for arguments like these; a call with such runs this very program.

    Nothing is run and nothing donated.

    Args:
      function: keeps what it lowered and compiled, and finds it again when called.
      args: lying where those of the calls will lie.
    """
    start = time.perf_counter()
    executable = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    return Compilation(seconds, executable, tuple(function.mesh.devices.flat))


class StepCost(NamedTuple):
    """What one step costs, as far as it is known.

    Attributes:
      compile_seconds: what it took to make the program.
      flops: of one chip in one step: outside the decode loop, and per token of it;
        None where the program cannot be read.
      num_chips: devices that run the step.
      peak_flops: FLOP/s of one chip at best; None if nobody has said.
      chip: what the devices call themselves.
    """

    compile_seconds: float
    flops: Times | None
    num_chips: int
    peak_flops: float | None
    chip: str

    def flops_with(self, metrics: Mapping[str, float]) -> float:
        """Returns the FLOPs of a step whose decode loop took `decode/steps`."""
        return self.flops.total(metrics.get(_DECODE_STEPS, 0.0)) if self.flops else 0.0


def step_cost(compilation: Compilation, peak_flops: float | int = 0.0) -> StepCost:
    """Returns the cost of a compiled step.

    Args:
      compilation: the program that runs.
      peak_flops: FLOP/s of one chip; 0 takes the published figure, where there is one.
    """
    device = compilation.devices[0]
    chip = chips.chip_of(device)
    published = None if chip is None else chip.flops
    return StepCost(
        compilation.seconds,
        flops_of(compilation.executable),
        len(compilation.devices),
        float(peak_flops) or published,
        device.device_kind,
    )


def flops_of(executable: Any) -> Times | None:
    """Returns the FLOPs of one run on one chip; None where they cannot be counted."""
    try:
        found = flops.of_compiled(executable)
    # A new compiler may print what nobody has read yet: a run does not end over that.
    except (ValueError, LookupError, NotImplementedError) as error:
        _log.warning("the step's FLOPs are not known: %r", error)
        return None
    return found if found.once or found.per_iteration else None


def announcement(cost: StepCost) -> str:
    """Returns one sentence about a program that is ready."""
    text = f"compiled in {cost.compile_seconds:.1f} s"
    if cost.flops is None:
        return f"{text}; its FLOPs are not known"
    text += f", {cost.flops.once:.3g} FLOPs a step on each chip"
    if cost.flops.per_iteration:
        text += f" and {cost.flops.per_iteration:.3g} for each token decoded"
    if cost.peak_flops is None:
        text += f"; no published peak of {cost.chip!r}, so no MFU (--gin.PEAK_FLOPS)"
    return text


class Clock:
    """Times of the steps since the last line, pauses left out."""

    def __init__(self):
        self.cost: StepCost | None = None
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self._steps, self._seconds, self._since = 0, 0.0, now
        self._tokens = self._flops = 0.0

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """Counts one step, its tokens and its FLOPs."""
        self._steps += 1
        self._tokens += metrics.get("token/count", 0.0)
        if self.cost is not None:
            self._flops += self.cost.flops_with(metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out."""
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Returns the metrics of time, and starts anew."""
        now = time.perf_counter()
        seconds = max(self._seconds + now - self._since, 1e-9)
        found = rates(self._steps, seconds, self._tokens, self._flops, self.cost)
        self._restart(now)
        return found


def rates(
    steps: int,
    seconds: float | int,
    tokens: float | int,
    flops_per_chip: float | int,
    cost: StepCost | None,
) -> dict[str, float]:
    """Returns the metrics of `steps` steps that took `seconds`.

        compute/mfu = flops_per_chip / (seconds * peak of a chip)

    Args:
      steps: at least 1 is counted.
      seconds: wall-clock time of all of them, > 0.
      tokens: of all of them; 0 where a step counts none.
      flops_per_chip: of all of them; 0 where they are not known.
      cost: of one step, if it is known.
    """
    found = {
        "time/seconds_per_step": seconds / max(steps, 1),
        "time/steps_per_second": max(steps, 1) / seconds,
    }
    if tokens:
        found["time/tokens_per_second"] = tokens / seconds
    if cost is None:
        return found
    if tokens:
        found["time/tokens_per_second_per_chip"] = tokens / seconds / cost.num_chips
    if flops_per_chip and cost.peak_flops is not None:
        found["compute/mfu"] = flops_per_chip / (seconds * cost.peak_flops)
    return found | {"compile/seconds": cost.compile_seconds}
