# SPDX-License-Identifier: Apache-2.0
"""Warnings that a policy or its judge has collapsed, from the metrics that are logged.

Whether an alarm is on is a function of the lines of metrics so far and of nothing else:
a run that is continued reads its own lines first, and writes what it would have written
without a stop.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, SupportsFloat, SupportsIndex

from nlhf_jax.checks import check_integer, check_range
from nlhf_jax.metrics import MetricWriter

Line = Mapping[str, SupportsFloat | None]


@dataclasses.dataclass(frozen=True)
class AlarmSettings:
    """When the figures of a step are a reason to look at the run.

    Attributes:
      min_entropy_per_token: policy/entropy over response/length, nats; below it the
        policy says nearly always the same. 0 turns it off.
      max_kl_per_token: policy/kl over response/length, nats; above it the policy has
        left what the reference could say. 0 turns it off.
      min_distinct_share: response/distinct_share; below it nearly all of a batch is
        one response. 0 turns it off.
      max_identical_share: response/identical_share; above it the responses to a prompt
        are nearly always the same, so that comparing them tells nothing. 1 turns it
        off.
      max_undecided_share: preference/undecided_share; above it the judge calls nearly
        everything a tie. 1 turns it off.
      patience: logged lines in a row that must say so before it is believed.
    """

    min_entropy_per_token: float = 0.02
    max_kl_per_token: float = 2.0
    min_distinct_share: float = 0.02
    max_identical_share: float = 0.95
    max_undecided_share: float = 0.95
    patience: int = 3

    def __post_init__(self):
        for name in ("min_entropy_per_token", "max_kl_per_token"):
            check_range(name, getattr(self, name), 0.0, high_open=True)
        for name in ("min_distinct_share", "max_identical_share"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        check_range("max_undecided_share", self.max_undecided_share, 0.0, 1.0)
        check_integer("patience", self.patience, 1)


class _Limit(NamedTuple):
    """One figure and the bound that it should not pass.

    Attributes:
      name: metric.
      setting: field of the settings with the bound.
      is_upper: whether more than the bound is bad, or less.
      per_token: whether the metric is divided by response/length.
      off: value of the setting that turns it off.
    """

    name: str
    setting: str
    is_upper: bool
    per_token: bool
    off: float

    def is_bad(self, line: Line, settings: AlarmSettings) -> bool | None:
        """Whether a line passes the bound; None where it does not say."""
        bound, value = getattr(settings, self.setting), self._value(line)
        if bound == self.off or value is None:
            return None
        return value > bound if self.is_upper else value < bound

    def _value(self, line: Line) -> float | None:
        names = [self.name] + ["response/length"] * self.per_token
        if not all(name in line for name in names):
            return None
        # What is not finite is null in the file, and passes no bound.
        found = [math.nan if line[n] is None else float(line[n]) for n in names]
        return found[0] / max(found[1], 1.0) if self.per_token else found[0]


# Alarm -> what is wrong in a few words, and the figures that say so, each by itself.
_KINDS: dict[str, tuple[str, tuple[_Limit, ...]]] = {
    "alarm/entropy": (
        "the policy's entropy has collapsed",
        (_Limit("policy/entropy", "min_entropy_per_token", False, True, 0.0),),
    ),
    "alarm/kl": (
        "the policy's KL to the reference has exploded",
        (_Limit("policy/kl", "max_kl_per_token", True, True, 0.0),),
    ),
    "alarm/same_response": (
        "the responses are all alike",
        (
            _Limit("response/distinct_share", "min_distinct_share", False, False, 0.0),
            _Limit("response/identical_share", "max_identical_share", True, False, 1.0),
        ),
    ),
    "alarm/undecided_judge": (
        "the judge calls nearly every comparison a tie",
        (
            _Limit(
                "preference/undecided_share", "max_undecided_share", True, False, 1.0
            ),
        ),
    ),
}


class Alarms:
    """Which alarms are on, line after line."""

    def __init__(self, settings: AlarmSettings, earlier: Iterable[Line] = ()):
        """Starts from what earlier lines of the same run say."""
        self._settings = settings
        self._streaks = dict.fromkeys(_KINDS, 0)
        for line in earlier:
            self.read(line)

    def read(self, line: Line) -> tuple[dict[str, float], list[str]]:
        """Returns the alarms of the next line, and a sentence for each that starts.

        An alarm is 1 from the last of `patience` bad lines in a row until the first
        good one. It is left out where the line has none of its figures.
        """
        found, sentences = {}, []
        for kind, (what, limits) in _KINDS.items():
            bad = {one: one.is_bad(line, self._settings) for one in limits}
            if all(is_bad is None for is_bad in bad.values()):
                continue
            passed = [one for one, is_bad in bad.items() if is_bad]
            self._streaks[kind] = self._streaks[kind] + 1 if passed else 0
            found[kind] = float(self._streaks[kind] >= self._settings.patience)
            if self._streaks[kind] == self._settings.patience:
                figures = ", ".join(self._figure(one, line) for one in passed)
                sentences.append(f"warning: {what}: {figures}")
        return found, sentences

    def _figure(self, limit: _Limit, line: Line) -> str:
        unit = " a token" if limit.per_token else ""
        bound = getattr(self._settings, limit.setting)
        side = "above" if limit.is_upper else "below"
        value = limit._value(line)
        return f"{limit.name} {value:.3g}{unit} is {side} {limit.setting} {bound:g}"


class WatchedWriter:
    """A writer of metrics that adds the alarms to each line and says when one starts.

    Args:
      writer: writes the lines.
      settings: when an alarm is on; None knows none.
      earlier: lines of the same run that are there already.
      say: shows a sentence.
    """

    def __init__(
        self,
        writer: MetricWriter,
        settings: AlarmSettings | None,
        earlier: Iterable[Line],
        say: Callable[[str], None],
    ):
        self._writer, self._say = writer, say
        self._alarms = None if settings is None else Alarms(settings, earlier)

    def write(self, step: SupportsIndex, metrics: Mapping[str, SupportsFloat]) -> None:
        """Writes one line with its alarms."""
        if self._alarms is not None:
            found, sentences = self._alarms.read(metrics)
            metrics = {**metrics, **found}
            for sentence in sentences:
                self._say(f"{sentence} (step {int(step)})")
        self._writer.write(step, metrics)

    def sync(self) -> None:
        """Returns when what was written would outlast a failure of the machine."""
        self._writer.sync()

    def close(self) -> None:
        """Closes the writer."""
        self._writer.close()
