# SPDX-License-Identifier: Apache-2.0
"""The window of steps that is traced: what is in the trace, and what is refused."""

import collections
import contextlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from nlhf_jax import cli, gin_bindings, loop, profiling
from nlhf_jax.checks import UserError
from nlhf_jax.settings import LoopSettings
from nlhf_jax.types import TrainState

ROOT = pathlib.Path(__file__).resolve().parent.parent


def settings(**changes) -> LoopSettings:
    defaults = {"train_steps": 9, "batch_size": 4, "checkpoint_period": 100}
    return LoopSettings(**(defaults | changes))


class Sinks:
    """Stands for writer, progress and checkpointer; keeps what is said and written."""

    def __init__(self):
        self.said, self.lines = [], []

    def write(self, step, metrics):
        self.lines.append((step, dict(metrics)))

    def sync(self):
        pass

    def update(self, step, metrics):
        pass

    def say(self, text):
        self.said.append(text)

    def save(self, step, state, meta):
        pass

    def wait(self):
        pass

    def retry_is_due(self, done):
        return False


def counter(step: int = 0) -> TrainState:
    """Returns a state that only counts its steps."""
    return TrainState(step, {}, {})


@jax.jit
def marked(x):
    return jnp.sin(x) @ x


def step_fn(state, batch, key):
    del batch, key
    loss = marked(jnp.full((64, 64), float(state.step)))[0, 0]
    return counter(state.step + 1), {"policy/kl": loss}


def run(folder, sinks, **options):
    """Runs a loop of nine steps and returns its last state."""
    chosen = options.pop("settings", settings(profile_steps=(3, 5)))
    return loop.train_loop(
        options.pop("step_fn", step_fn),
        options.pop("state", counter()),
        options.pop("batches", lambda step: step),
        settings=chosen,
        checkpointer=sinks,
        writer=sinks,
        progress=sinks,
        key=jax.random.key(0),
        profile_folder=folder,
        **options,
    )


def traces(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that TensorBoard's profiler reads, by their place."""
    return sorted(folder.glob("plugins/profile/*/*.xplane.pb"))


def events(path: pathlib.Path) -> list[tuple[str, dict]]:
    """Returns name and facts of every event of the host and its devices."""
    return [
        (event.name, dict(event.stats))
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
    ]


def traced_steps(path: pathlib.Path) -> list[int]:
    found = [facts for name, facts in events(path) if name == profiling.STEP_NAME]
    return sorted(facts["step_num"] for facts in found)


def test_the_trace_holds_the_steps_of_the_window_and_no_others(tmp_path):
    jax.block_until_ready(marked(jnp.ones((64, 64))))  # compiled before
    sinks = Sinks()
    assert run(tmp_path, sinks).step == 9
    (file,) = traces(tmp_path)
    assert traced_steps(file) == [3, 4, 5]
    # And what the device did: each operation of the step's program, three times.
    ops = collections.Counter(
        facts["hlo_op"]
        for _, facts in events(file)
        if facts.get("hlo_module") == "jit_marked"
    )
    assert set(ops.values()) == {3}
    (said,) = [said for said in sinks.said if "trace" in said]
    assert said.startswith("steps 3 to 5 are traced")
    assert f"--logdir {tmp_path}" in said


def test_a_trace_is_beside_the_other_results_for_tensorboard(tmp_path):
    run(tmp_path / profiling.PROFILE_FOLDER, Sinks())
    # The plug-in looks for plugins/profile/RUN under the folder it is given.
    (file,) = traces(tmp_path / "profile")
    assert file.stat().st_size > 1000
    assert file.with_name(file.name.replace(".xplane.pb", ".trace.json.gz")).exists()


def test_without_a_window_nothing_is_traced(tmp_path):
    sinks = Sinks()
    run(tmp_path, sinks, settings=settings())
    assert list(tmp_path.iterdir()) == []
    assert not any("trace" in said for said in sinks.said)


@pytest.mark.parametrize("window", [(1, 1), (9, 9)])
def test_one_step_at_either_end(tmp_path, window):
    run(tmp_path, Sinks(), settings=settings(profile_steps=window))
    (file,) = traces(tmp_path)
    assert traced_steps(file) == [window[0]]


def test_a_run_that_continues_inside_the_window_traces_the_rest(tmp_path):
    run(tmp_path, Sinks(), state=counter(4))
    (file,) = traces(tmp_path)
    assert traced_steps(file) == [5]


def test_a_run_that_continues_after_the_window_says_so(tmp_path):
    sinks = Sinks()
    run(tmp_path, sinks, state=counter(5))
    assert traces(tmp_path) == []
    assert sinks.said[0] == "no trace: the window (3, 5) is over at step 5"


def test_a_run_that_fails_inside_the_window_leaves_its_trace(tmp_path):
    def batches(step):
        if step == 4:
            raise KeyError("no batch 4")
        return step

    with pytest.raises(KeyError, match="no batch 4"):
        run(tmp_path, Sinks(), batches=batches)
    (file,) = traces(tmp_path)
    assert traced_steps(file)[:2] == [3, 4]
    # The profiler is free again.
    run(tmp_path / "again", Sinks())
    assert len(traces(tmp_path / "again")) == 1


def test_of_several_processes_the_first_traces(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling.jax, "process_index", lambda: 1)
    run(tmp_path, Sinks())
    assert traces(tmp_path) == []


def test_the_devices_are_waited_for_at_both_ends():
    order = []

    @contextlib.contextmanager
    def idle():
        order.append("idle")
        yield
        order.append("end of idle")

    window = profiling.ProfileWindow("unused", (2, 3), order.append)
    window._open = lambda step: (
        order.append(f"open {step}") or vars(window).update(_since=step)
    )
    window._close = lambda: order.append("close")
    for step in range(1, 5):
        with window.around(step, idle):
            order.append(step)
    opened = ["idle", "open 2", "end of idle", 2]
    assert order == [1, *opened, 3, "idle", "close", "end of idle", 4]


def test_the_time_of_starting_and_writing_a_trace_is_no_time_of_training(
    tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(loop.speed.time, "perf_counter", lambda: now[0])

    def slow(*args, **options):
        now[0] += 100.0

    monkeypatch.setattr(profiling.jax.profiler, "start_trace", slow)
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", slow)

    def timed(state, batch, key):
        now[0] += 2.0
        return step_fn(state, batch, key)

    sinks = Sinks()
    chosen = settings(profile_steps=(3, 5), log_period=9)
    run(tmp_path, sinks, step_fn=timed, settings=chosen)
    ((_, line),) = sinks.lines
    assert line["time/seconds_per_step"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("window", "said"),
    [
        ((5, 3), r"two steps counted from 1, got \(5, 3\)"),
        ((0, 3), r"two steps counted from 1, got \(0, 3\)"),
        ((3,), r"must be \(\) or \(first, last\)"),
        ((3, 5, 7), r"must be \(\) or \(first, last\)"),
        ((3, 10), r"profile_steps \(3, 10\) must end by the last of train_steps 9"),
    ],
)
def test_a_bad_window_is_refused(window, said):
    with pytest.raises(UserError, match=said):
        settings(profile_steps=window)


def test_truth_values_are_no_steps():
    with pytest.raises(UserError, match="two steps"):
        settings(profile_steps=(True, 3))


@pytest.mark.parametrize(
    ("value", "said"),
    [("3", "must be of type"), ("'3:5'", "must be of type"), ("(1.5, 3)", "got (1.5")],
)
def test_a_window_that_is_none_is_found_before_anything_is_built(capsys, value, said):
    flags = [f"--gin.PROFILE_STEPS={value}", "--gin.MODEL_DIR=somewhere", "--dry_run"]
    assert cli.main(["sft", "--gin_file=configs/runs/sft.gin", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "profile_steps" in err
    assert said in err


@pytest.mark.parametrize("job", ["sft", "preference", "reward"])
def test_a_window_reaches_the_loop_by_its_macro(job):
    overrides = {"PROFILE_STEPS": "(3, 5)", "PEAK_FLOPS": "1e12", "MODEL_DIR": "x"}
    file = ROOT / "configs" / "runs" / f"{job}.gin"
    if "TRAIN_FILE" in file.read_text():
        overrides["TRAIN_FILE"] = "x"
    gin_bindings.load(job, [str(file)], overrides)
    found = gin_bindings._bound["LoopSettings"]()
    assert (found.profile_steps, found.peak_flops) == ((3, 5), 1e12)
