# SPDX-License-Identifier: Apache-2.0
"""How fast a loop runs: steps, tokens, and the share of the chips' peak in use."""

import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nlhf_jax import compilation_cache, flops
from nlhf_jax.compilation_cache import Counts
from nlhf_jax.partitioning import CompiledFunction
from nlhf_jax.progress import duration
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
      cache: how often the program was asked of the cache, and found there.
      others: programs that run besides in a step, and how often.
    """

    seconds: float
    executable: Any
    devices: tuple[Any, ...]
    cache: Counts = Counts()
    others: tuple[tuple[Any, int], ...] = ()

    def with_others(self, other: "Compilation", times: int) -> "Compilation":
        """Returns both; the other one runs `times` in a step."""
        return self._replace(
            seconds=self.seconds + other.seconds,
            cache=Counts(*map(sum, zip(self.cache, other.cache, strict=True))),
            others=(*self.others, (other.executable, times)),
        )


def compile_ahead(function: CompiledFunction, *args: Any) -> Compilation:
    """Compiles for arguments like these; a call with such runs this very program.

    Nothing is run and nothing donated.

    Args:
      function: keeps what it lowered and compiled, and finds it again when called.
      args: lying where those of the calls will lie.
    """
    start, before = time.perf_counter(), compilation_cache.counts()
    executable = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    found = compilation_cache.counts().since(before)
    return Compilation(seconds, executable, tuple(function.mesh.devices.flat), found)


class StepCost(NamedTuple):
    """What one step costs, as far as it is known.

    Attributes:
      compile_seconds: what it took to make the program.
      flops: of one chip in one step: outside the decode loop, and per token of it;
        None where the program cannot be read.
      num_chips: devices that run the step.
      peak_flops: FLOP/s of one chip at best; None if nobody has said.
      chip: what the devices call themselves.
      cache: how often its programs were asked of the cache, and found there.
    """

    compile_seconds: float
    flops: Times | None
    num_chips: int
    peak_flops: float | None
    chip: str
    cache: Counts = Counts()

    @property
    def is_cached(self) -> bool:
        """Whether nothing had to be compiled."""
        return self.cache.hits > 0 and not self.cache.misses

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
        _flops(compilation),
        len(compilation.devices),
        float(peak_flops) or published,
        device.device_kind,
        compilation.cache,
    )


def _flops(compilation: Compilation) -> Times | None:
    """Returns the FLOPs of a step's programs; None where one's cannot be counted."""
    runs = ((compilation.executable, 1), *compilation.others)
    found = [(flops_of(executable), times) for executable, times in runs]
    if any(one is None for one, _ in found):
        return None
    return Times(
        sum(times * one.once for one, times in found),
        sum(times * one.per_iteration for one, times in found),
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
    text += ", from the cache" * cost.is_cached
    if cost.flops is None:
        return f"{text}; its FLOPs are not known"
    text += f", {cost.flops.once:.3g} FLOPs a step on each chip"
    if cost.flops.per_iteration:
        text += f" and {cost.flops.per_iteration:.3g} for each token decoded"
    if cost.peak_flops is None:
        text += f"; no published peak of {cost.chip!r}, so no MFU (--gin.PEAK_FLOPS)"
    return text


def _age() -> float:
    """Returns the seconds since this process began; 0 where the system does not say."""
    try:
        # The second field is a name in brackets, which may hold spaces.
        facts = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(facts[19])  # starttime, the 22nd field: proc(5)
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        found = now - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
    # Some sandboxes write 0, which would be the age of the machine.
    return max(found, 0.0) if ticks > 0 else 0.0


_began = time.perf_counter() - _age()


def begin() -> None:
    """Begins to count the time to a first step: what came before is another's."""
    global _began
    _began = time.perf_counter()


def waited() -> float:
    """Returns the seconds since the process began, or since the last `begin`."""
    return max(time.perf_counter() - _began, 0.0)


class FirstStep(NamedTuple):
    """How long it took until a first step was done.

    Attributes:
      seconds: since the process began, or since the run before ended in it.
      cost: of the step, if it was compiled ahead.
    """

    seconds: float
    cost: StepCost | None

    def sentence(self) -> str:
        """Returns `first step after 12.3 s, 8.1 s of them compiling`."""
        text = f"first step after {self.seconds:.1f} s"
        if self.cost is None:
            return text
        text += f", {self.cost.compile_seconds:.1f} s of them compiling"
        if self.cost.is_cached:
            saved = self.cost.cache.saved_seconds
            text += f", from the cache, which saved {max(saved, 0.0):.1f} s"
        return text

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the start, which are written once."""
        found = {"time/first_step": self.seconds}
        if self.cost is None or not self.cost.cache.programs:
            return found
        return found | {
            "compile/cache_hits": float(self.cost.cache.hits),
            "compile/cache_misses": float(self.cost.cache.misses),
        }


class Clock:
    """Times of the steps since the last line, pauses left out.

    Attributes:
      cost: of one step, once it is known.
      steps, seconds, tokens: of all steps so far.
      judging, waited: seconds that a judge on the host took, and those of them in which
        no device had work.
    """

    def __init__(self):
        self.cost: StepCost | None = None
        self.steps, self.seconds, self.tokens = 0, 0.0, 0.0
        self.judging = self.waited = 0.0
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self._steps, self._seconds, self._since = 0, 0.0, now
        self._tokens = self._flops = 0.0

    def _advance(self) -> float:
        now = time.perf_counter()
        self._seconds += now - self._since
        self.seconds += now - self._since
        self._since = now
        return now

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """Counts one step, its tokens and its FLOPs."""
        self._steps += 1
        self._tokens += metrics.get("token/count", 0.0)
        self.steps += 1
        self.tokens += metrics.get("token/count", 0.0)
        self.judging += metrics.get("time/judging", 0.0)
        self.waited += metrics.get("time/judging_waited", 0.0)
        if self.cost is not None:
            self._flops += self.cost.flops_with(metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out."""
        self._advance()
        yield
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Returns the metrics of time, and starts anew."""
        now = self._advance()
        seconds = max(self._seconds, 1e-9)
        found = rates(self._steps, seconds, self._tokens, self._flops, self.cost)
        self._restart(now)
        return found

    def summary(self) -> str:
        """Returns one sentence about all steps so far: their pace, pauses left out."""
        self._advance()
        seconds = max(self.seconds, 1e-9)
        lasted = f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
        text = f"{self.steps} steps in {lasted}, {self.steps / seconds:.3g} steps/s"
        if self.tokens:
            text += f", {self.tokens / seconds:.4g} tokens/s"
        if self.cost is not None and self.cost.num_chips > 1:
            text += f" on {self.cost.num_chips} devices"
        if self.judging:
            text += (
                f", judge {self.judging / seconds:.0%} of the time and waited for "
                f"{self.waited / seconds:.0%}"
            )
        return text


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
