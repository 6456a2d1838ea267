# SPDX-License-Identifier: Apache-2.0
"""Rates and costs of a step: by hand, and of programs that really run."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import loop, metrics, partitioning, progress, speed, watchdog
from nlhf_jax.checks import UserError
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.scale import chips
from nlhf_jax.scale.costs import Times
from nlhf_jax.settings import LoopSettings, MeshSettings, OptimizerSettings
from nlhf_jax.supervised_step import init_state
from nlhf_jax.types import POLICY

COST = speed.StepCost(
    compile_seconds=3.5,
    flops=Times(2e9, 1e8),
    num_chips=4,
    peak_flops=1e12,
    chip="TPU v0",
)


def test_rates_by_hand():
    # 10 steps in 5 s, 6,000 tokens; each chip did 3e10 FLOPs of the 5e12 it could.
    found = speed.rates(10, 5.0, 6000, 3e10, COST)
    assert found == {
        "time/seconds_per_step": 0.5,
        "time/steps_per_second": 2.0,
        "time/tokens_per_second": 1200.0,
        "time/tokens_per_second_per_chip": 300.0,
        "compute/mfu": pytest.approx(0.006),
        "compile/seconds": 3.5,
    }
    assert set(found) == metrics.TIMES


@pytest.mark.parametrize(
    ("cost", "missing"),
    [
        (COST._replace(peak_flops=None), {"compute/mfu"}),
        (None, {"compute/mfu", "compile/seconds", "time/tokens_per_second_per_chip"}),
    ],
)
def test_what_is_not_known_is_not_claimed(cost, missing):
    assert set(speed.rates(10, 5.0, 6000, 3e10, cost)) == metrics.TIMES - missing


def test_without_tokens_or_flops_there_are_no_such_rates():
    found = set(speed.rates(1, 1.0, 0, 0, COST))
    assert metrics.TIMES - found == {
        "time/tokens_per_second",
        "time/tokens_per_second_per_chip",
        "compute/mfu",
    }


def test_the_decode_loop_counts_as_often_as_it_ran():
    assert COST.flops_with({}) == 2e9
    assert COST.flops_with({"decode/steps": 5.0}) == 2e9 + 5e8
    assert COST._replace(flops=None).flops_with({"decode/steps": 5.0}) == 0.0


def test_the_clock_adds_up_the_flops_of_its_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    clock = speed.Clock()
    clock.cost = COST
    for decode_steps in (1.0, 9.0):
        now[0] += 2.0
        clock.step_done({"decode/steps": decode_steps, "token/count": 8.0})
    with clock.paused():
        now[0] += 50.0
    found = clock.read()
    # 4e9 outside the loop and ten iterations of 1e8, in 4 s of 1e12 FLOP/s.
    assert found["compute/mfu"] == pytest.approx(5e9 / 4e12)
    assert found["time/tokens_per_second_per_chip"] == pytest.approx(1.0)
    now[0] += 1.0
    clock.step_done({})
    assert clock.read()["compute/mfu"] == pytest.approx(2e9 / 1e12)


class FakeDevice:
    """Stands for a chip."""

    def __init__(self, device_kind):
        self.device_kind = device_kind


class FakeProgram:
    """Stands for a compiled program whose text nobody can read."""

    def as_text(self):
        raise NotImplementedError("no text")


def compilation(kind, executable=None):
    return speed.Compilation(1.0, executable or FakeProgram(), (FakeDevice(kind),) * 2)


def test_published_peaks_and_those_that_are_given():
    assert speed.step_cost(compilation("TPU v4")).peak_flops == chips.CHIPS["v4"].flops
    assert speed.step_cost(compilation("TPU v4"), 5e12).peak_flops == 5e12
    assert speed.step_cost(compilation("cpu"), 5e12).peak_flops == 5e12
    assert speed.step_cost(compilation("cpu")).peak_flops is None
    assert speed.step_cost(compilation("cpu")).num_chips == 2


def test_a_program_that_cannot_be_read_has_no_flops():
    cost = speed.step_cost(compilation("TPU v4"))
    assert cost.flops is None
    assert speed.announcement(cost) == "compiled in 1.0 s; its FLOPs are not known"


def test_the_announcement_says_why_there_is_no_mfu():
    said = speed.announcement(COST)
    assert said == (
        "compiled in 3.5 s, 2e+09 FLOPs a step on each chip and 1e+08 for each token "
        "decoded"
    )
    said = speed.announcement(COST._replace(peak_flops=None, chip="cpu"))
    assert "no published peak of 'cpu', so no MFU (--gin.PEAK_FLOPS)" in said


WIDTH, DEPTH = 32, 5


def deep_step(state, frozen, batch, key):
    """A step whose loop runs DEPTH products of [B, D] by [D, D]."""
    del key
    weights = state.param_sets[POLICY]["w"]

    def body(x_BD, _):
        return jnp.tanh(x_BD @ weights), None

    out_BD, _ = jax.lax.scan(body, batch @ frozen, length=DEPTH)
    count = jnp.asarray(batch.size, jnp.float32)
    metrics = {"loss/token_nll": (out_BD**2).mean(), "token/count": count}
    return state._replace(step=state.step + 1), metrics


class BoundStep:
    """The step with its frozen argument, as a job binds it; counts backend compiles."""

    def __init__(self):
        self.mesh = partitioning.make_mesh(MeshSettings())
        whole = partitioning.replicated(self.mesh)
        self.step = partitioning.compile_step(
            deep_step,
            self.mesh,
            whole,
            whole,
            partitioning.batch_sharding(self.mesh),
            whole,
        )
        self.frozen = jax.device_put(np.eye(WIDTH, dtype=np.float32), whole)
        optimizer = make_optimizer(OptimizerSettings(), 1)
        start = init_state({"w": jnp.eye(WIDTH)}, optimizer)
        self.state = jax.device_put(start, whole)

    @property
    def num_compilations(self):
        return self.step.num_compilations

    def compile(self, state, batch, key):
        return speed.compile_ahead(self.step, state, self.frozen, batch, key)

    def __call__(self, state, batch, key):
        return self.step(state, self.frozen, batch, key)


def batch_of(rows):
    return np.full((rows, WIDTH), 0.5, np.float32)


@pytest.fixture
def backend_compiles():
    """Returns the list of programs that XLA compiles, as they are compiled."""
    found = []

    def listen(name, seconds, **facts):
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(facts.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_compiled_once_and_the_flops_are_those_of_what_runs(backend_compiles):
    bound = BoundStep()
    rows = 8 * bound.mesh.size
    key = jax.random.key(0)
    backend_compiles.clear()
    compiled = bound.compile(bound.state, batch_of(rows), key)
    assert compiled.seconds > 0
    state = bound.state
    for _ in range(3):
        state, _ = bound(state, batch_of(rows), key)
    assert len(backend_compiles) == 1
    assert bound.num_compilations == 1
    cost = speed.step_cost(compiled)
    # A product by `frozen` and DEPTH in the loop; each of 2 * B * D * D.
    products = (DEPTH + 1) * 2 * 8 * WIDTH * WIDTH
    assert cost.flops.per_iteration == 0
    assert products <= cost.flops.once < 1.2 * products


class Sinks:
    """Writer and checkpointer that keep their lines."""

    def __init__(self):
        self.lines = []

    def write(self, step, metrics):
        self.lines.append((step, dict(metrics)))

    def sync(self):
        pass

    def save(self, step, state, meta):
        pass

    def wait(self):
        pass

    def retry_is_due(self, done):
        return False


def loop_settings(**changes):
    defaults = {"train_steps": 4, "batch_size": 8, "log_period": 2}
    return LoopSettings(**(defaults | changes))


def looped(bound, settings, batches):
    """Runs the loop with a plain progress display; returns (lines, what was shown)."""
    stream, sinks = io.StringIO(), Sinks()
    with progress.Progress(4, "deep", stream=stream, period=0.0) as bar:
        loop.train_loop(
            bound,
            bound.state,
            batches,
            settings=settings,
            checkpointer=sinks,
            writer=sinks,
            progress=bar,
            key=jax.random.key(0),
        )
    return sinks.lines, stream.getvalue().splitlines()


def test_a_loop_announces_and_reports_what_its_program_costs():
    bound = BoundStep()
    rows = 8 * bound.mesh.size
    lines, shown = looped(
        bound, loop_settings(peak_flops=1e9), lambda step: batch_of(rows)
    )
    assert shown[0] == "deep: compiling the train step ..."
    assert shown[1].startswith("deep: compiled in ")
    assert shown[2].startswith("deep 1/4")
    assert shown[3].startswith("deep: first step after ")
    assert shown[-2].startswith("deep 4/4")
    assert "time/steps_per_second" in shown[-2]
    assert "compute/mfu" in shown[-2]
    assert shown[-1].startswith("deep: 4 steps in ")
    assert [step for step, _ in lines] == [2, 4]
    for _, line in lines:
        assert metrics.TIMES.issubset(line)
        metrics.check_names(line)
        flops = line["compute/flops_per_step"]
        assert line["compute/mfu"] == pytest.approx(
            flops / line["time/seconds_per_step"] / 1e9
        )
        per_chip = line["time/tokens_per_second"] / bound.mesh.size
        assert line["time/tokens_per_second_per_chip"] == pytest.approx(per_chip)
        assert line["compile/count"] == 1.0
    seconds = [line["compile/seconds"] for _, line in lines]
    assert seconds[0] == seconds[1]
    assert seconds[0] > 0


class SlowStep(BoundStep):
    """Takes 1000 s to compile and 2 s to run, by a clock of its own."""

    now = 0.0

    def compile(self, state, batch, key):
        self.now += 1000.0
        return super().compile(state, batch, key)

    def __call__(self, state, batch, key):
        self.now += 2.0
        return super().__call__(state, batch, key)


def test_compiling_is_no_time_of_training(monkeypatch):
    bound = SlowStep()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: bound.now)
    rows = 8 * bound.mesh.size
    settings = loop_settings(log_period=4)
    ((_, line),), _ = looped(bound, settings, lambda step: batch_of(rows))
    assert line["time/seconds_per_step"] == 2.0


def test_on_a_chip_without_a_peak_no_mfu_is_claimed():
    bound = BoundStep()
    rows = 8 * bound.mesh.size
    lines, shown = looped(bound, loop_settings(), lambda step: batch_of(rows))
    assert "compute/mfu" not in lines[-1][1]
    assert "no published peak of 'cpu', so no MFU" in shown[1]


def test_a_new_width_is_compiled_ahead_once_and_each_step_has_its_own_cost():
    bound = SlowStep()
    sizes = [8, 16, 8, 16]

    def batches(step):
        return batch_of(sizes[step] * bound.mesh.size)

    lines, shown = looped(bound, loop_settings(log_period=1), batches)
    assert [line["compile/count"] for _, line in lines] == [1.0, 2.0, 2.0, 2.0]
    flops = [line["compute/flops_per_step"] for _, line in lines]
    assert flops[0] == flops[2] and flops[1] == flops[3]
    assert 1.8 < flops[1] / flops[0] < 2.2
    said = [text for text in shown if "compil" in text]
    assert said[0] == "deep: compiling the train step ..."
    wide = [16 * bound.mesh.size, WIDTH]
    assert f"deep: compiling the train step for a new width, a batch of {wide} ..." in (
        said
    )
    assert sum("compiled in" in text for text in said) == 2
    assert not any("compiled again" in text for text in said)


def test_each_widths_compilation_is_no_time_of_training(monkeypatch):
    bound = SlowStep()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: bound.now)
    settings = loop_settings(log_period=4)
    sizes = [8, 8, 16, 16]
    ((_, line),), _ = looped(
        bound, settings, lambda step: batch_of(sizes[step] * bound.mesh.size)
    )
    assert line["time/seconds_per_step"] == 2.0


def test_a_new_width_is_compiled_without_the_steps_limit(monkeypatch):
    said = []

    class Dog(watchdog.Watchdog):
        def now(self, kind, doing=""):
            said.append(kind)

        def pause(self):
            said.append("pause")

    class Noted(BoundStep):
        def compile(self, state, batch, key):
            said.append("compile")
            return super().compile(state, batch, key)

    monkeypatch.setattr(loop, "watchdog_of", lambda settings: Dog(0))
    bound, sizes = Noted(), [8, 8, 16, 16]
    looped(
        bound,
        loop_settings(log_period=4),
        lambda step: batch_of(sizes[step] * bound.mesh.size),
    )
    first = said.index("compile")
    second = said.index("compile", first + 1)
    assert said[first - 1] == said[second - 1] == "pause"
    assert said.count("compile") == 2


def test_an_evaluation_that_is_owed_is_no_time_of_training(monkeypatch):
    bound = SlowStep()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: bound.now)
    rows, sinks = 8 * bound.mesh.size, Sinks()

    def evaluate(state):
        bound.now += 500.0
        return {"eval/kl": 0.0}

    with progress.Progress(4, "deep", stream=io.StringIO()) as bar:
        loop.train_loop(
            bound,
            bound.state,
            lambda step: batch_of(rows),
            settings=loop_settings(log_period=4),
            checkpointer=sinks,
            writer=sinks,
            progress=bar,
            key=jax.random.key(0),
            evaluate=evaluate,
            progressed=loop.Progressed(owes_evaluation=True),
        )
    (seconds,) = [
        line["time/seconds_per_step"]
        for _, line in sinks.lines
        if "time/seconds_per_step" in line
    ]
    assert seconds == 2.0


class UnaskedStep(BoundStep):
    """One that nobody can ask to compile."""

    compile = None


def test_a_second_compilation_is_an_alarm():
    bound = UnaskedStep()
    sizes = [8, 8, 16, 16]
    lines, shown = looped(
        bound, loop_settings(), lambda step: batch_of(sizes[step] * bound.mesh.size)
    )
    assert [line["compile/count"] for _, line in lines] == [1.0, 2.0]
    alarms = [text for text in shown if "compiled again" in text]
    assert alarms == ["deep: compiled again by step 4: shapes or dtypes have changed"]


def test_a_bar_shows_first_metrics_and_rates():
    found = {"loss/policy": 0.25, "policy/kl": 1.5, "response/length": 9.0}
    rates = speed.rates(10, 5.0, 6000, 3e10, COST)
    assert progress.bar_text(found | rates) == (
        "loss/policy 0.25  policy/kl 1.5  2 steps/s  300 tokens/s/chip  MFU 0.6%"
    )
    assert progress.bar_text({}) == ""


def test_everything_on_a_bar_has_a_row_in_the_table():
    assert metrics.TIMES.issuperset(progress.RATES)
    assert metrics.TIMES.issubset(metrics.METRICS)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_sentence_is_shown_on_its_own_line(stream):
    shown = stream()
    with progress.Progress(3, "sft [x]", stream=shown) as bar:
        bar.say("compiling [the] step ...")
        bar.update(3, {})
    assert "sft [x]: compiling [the] step ...\n" in shown.getvalue()


@pytest.mark.parametrize("peak", [-1.0, float("inf"), float("nan")])
def test_a_peak_is_a_number(peak):
    with pytest.raises(UserError, match="peak_flops must be in"):
        loop_settings(peak_flops=peak)
