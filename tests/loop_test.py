# SPDX-License-Identifier: Apache-2.0
"""The loop: what is done when, resuming bit for bit, signals, divergence."""

import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import divergence, guards, loop, partitioning, speed
from nlhf_jax.checkpoints import Checkpointer, CheckpointError
from nlhf_jax.metrics import MetricWriter
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.settings import LoopSettings, MeshSettings, OptimizerSettings
from nlhf_jax.supervised_step import init_state, make_sft_evaluation, make_sft_step
from nlhf_jax.types import POLICY
from tests import supervised_toys as toys


class Recorder:
    """Stands for writer, progress and checkpointer; keeps the calls in order."""

    def __init__(self):
        self.calls = []
        self.states = {}

    def write(self, step, metrics):
        self.calls.append(("write", step, dict(metrics)))

    def update(self, step, metrics):
        self.calls.append(("update", step, dict(metrics)))

    def sync(self):
        pass

    def say(self, text):
        pass

    def retry_is_due(self, done):
        return False

    def save(self, step, state, meta):
        self.calls.append(("save", step, dict(meta)))
        self.states[step] = jax.device_get(state)

    def wait(self):
        self.calls.append(("wait", None, {}))

    def steps(self, kind):
        return [step for name, step, _ in self.calls if name == kind]


class _Talker(Recorder):
    """A recorder that keeps what is said."""

    def __init__(self):
        super().__init__()
        self.said = []

    def say(self, text):
        self.said.append(text)


def _count(state, batch, key):
    """A step whose parameter and loss are the number of steps done."""
    del batch, key
    step = state.step + 1
    metrics = {"loss/token_nll": step.astype(jnp.float32)}
    return state._replace(step=step), metrics


def _run(recorder, settings, step_fn=_count, state=None, **options):
    if state is None:
        state = init_state({"w": jnp.zeros(())}, make_optimizer(OptimizerSettings(), 1))
    return loop.train_loop(
        step_fn,
        state,
        options.pop("batches", lambda step: step),
        settings=settings,
        checkpointer=recorder,
        writer=recorder,
        progress=recorder,
        key=jax.random.key(0),
        **options,
    )


def _settings(**changes):
    defaults = {
        "train_steps": 7,
        "batch_size": 4,
        "log_period": 2,
        "checkpoint_period": 3,
        "eval_period": 4,
    }
    return LoopSettings(**(defaults | changes))


def test_what_is_done_when():
    recorder, asked = Recorder(), []

    def batches(step):
        asked.append(step)
        return step

    def evaluate(state):
        return {"eval/kl": float(state.step)}

    state = _run(
        recorder, _settings(), batches=batches, evaluate=evaluate, meta={"seed": 3}
    )
    assert int(state.step) == 7
    assert asked == list(range(7))
    assert recorder.steps("update") == [1, 2, 3, 4, 5, 6, 7]
    assert recorder.steps("save") == [3, 6, 7]
    saved = [m for name, _, m in recorder.calls if name == "save"]
    facts = {"seed": 3, "skipped_steps": 0, "owes_evaluation": False}
    assert saved == [facts, facts, facts | {"evaluation": {"eval/kl": 7.0}}]
    lines = [(s, m) for name, s, m in recorder.calls if name == "write"]
    trained = {s: m["loss/token_nll"] for s, m in lines if "loss/token_nll" in m}
    assert trained == {2: 2.0, 4: 4.0, 6: 6.0, 7: 7.0}
    evaluated = {s: m["eval/kl"] for s, m in lines if "eval/kl" in m}
    assert evaluated == {4: 4.0, 7: 7.0}
    assert recorder.calls[-1][0] == "wait"


def test_everything_of_a_step_is_written_before_its_checkpoint():
    recorder = Recorder()
    settings = _settings(log_period=1, checkpoint_period=2, eval_period=2)
    _run(recorder, settings, evaluate=lambda state: {"eval/kl": 0.0})
    for index, (name, step, _) in enumerate(recorder.calls):
        if name == "save":
            before = [call[:2] for call in recorder.calls[:index]]
            assert before.count(("write", step)) == 2
            assert ("write", step + 1) not in before


def test_the_saved_state_is_the_one_after_the_step():
    recorder = Recorder()
    _run(recorder, _settings())
    assert {k: int(s.step) for k, s in recorder.states.items()} == {3: 3, 6: 6, 7: 7}


def test_eval_period_zero_evaluates_at_the_end_only():
    recorder = Recorder()
    _run(recorder, _settings(eval_period=0), evaluate=lambda state: {"eval/kl": 1.0})
    written = [s for name, s, m in recorder.calls if "eval/kl" in m]
    assert written == [7]


def test_a_finished_run_returns_at_once():
    recorder = Recorder()
    state = _run(recorder, _settings())
    again = _run(recorder := Recorder(), _settings(), state=state)
    assert again is state
    assert recorder.calls == []


class SlowMetric:
    """A metric that tells when the host reads it."""

    def __init__(self, events, step):
        self.events, self.step = events, step

    def __float__(self):
        self.events.append(("read", self.step))
        return 0.0


def test_one_step_is_in_flight(monkeypatch):
    # The metrics of step s are read after step s + 1 is dispatched, before s + 2 is.
    events = []
    monkeypatch.setattr(loop.jax, "device_get", lambda tree: tree)

    def step_fn(state, batch, key):
        del batch, key
        step = int(state.step) + 1
        events.append(("dispatch", step))
        metrics = {"token/count": SlowMetric(events, step)}
        return state._replace(step=jnp.asarray(step)), metrics

    _run(Recorder(), _settings(train_steps=4, checkpoint_period=100), step_fn)
    assert events == [
        ("dispatch", 1),
        ("dispatch", 2),
        ("read", 1),
        ("dispatch", 3),
        ("read", 2),
        ("dispatch", 4),
        ("read", 3),
        ("read", 4),
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["loss/token_nll", "optimizer/gradient_norm"])
def test_divergence_stops_before_saving(name, value):
    recorder = Recorder()

    def step_fn(state, batch, key):
        state, _ = _count(state, batch, key)
        return state, {name: jnp.where(state.step == 6, value, 1.0)}

    with pytest.raises(
        divergence.TrainingDiverged, match=rf"{name} is -?\w+ at step 6"
    ):
        _run(recorder, _settings(), step_fn)
    assert recorder.steps("save") == [3]
    assert recorder.calls[-1][0] == "wait"
    # The line that shows it is on disk.
    assert recorder.steps("write")[-1] == 6


def test_other_metrics_may_be_infinite():
    def step_fn(state, batch, key):
        state, metrics = _count(state, batch, key)
        return state, metrics | {"policy/kl": jnp.asarray(jnp.inf)}

    assert int(_run(Recorder(), _settings(), step_fn).step) == 7


def test_a_save_that_failed_is_tried_again_between_two_that_are_due():
    recorder = Recorder()
    recorder.retry_is_due = lambda done: done == 5
    _run(recorder, _settings())
    assert recorder.steps("save") == [3, 5, 6, 7]
    assert int(recorder.states[5].step) == 5


def test_a_failed_last_checkpoint_is_raised():
    recorder = Recorder()

    def fail():
        raise CheckpointError("disk full")

    recorder.wait = fail
    with pytest.raises(CheckpointError, match="disk full"):
        _run(recorder, _settings())


def test_the_loops_own_error_is_not_hidden_by_the_checkpointers():
    recorder = Recorder()

    def fail():
        raise CheckpointError("disk full")

    def batches(step):
        raise KeyError(f"no batch {step}")

    recorder.wait = fail
    with pytest.raises(KeyError, match="no batch 0"):
        _run(recorder, _settings(), batches=batches)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_this_step_and_returns(number):
    recorder = Recorder()
    before = signal.getsignal(number)

    def batches(step):
        if step == 4:
            signal.raise_signal(number)
        return step

    evaluated = []
    settings = _settings(eval_period=5)
    state = _run(recorder, settings, batches=batches, evaluate=evaluated.append)
    assert int(state.step) == 5
    assert recorder.steps("save") == [3, 5]
    assert recorder.steps("update") == [1, 2, 3, 4, 5]
    assert evaluated == []
    assert signal.getsignal(number) is before


def test_a_signal_at_the_last_step_leaves_nothing_out():
    """A complete run is never continued, so its last evaluation must be there."""

    def batches(step):
        if step == 6:
            signal.raise_signal(signal.SIGTERM)
        return step

    recorder, evaluated = Recorder(), []

    def evaluate(state):
        evaluated.append(int(state.step))
        return {"eval/kl": 0.0}

    _run(recorder, _settings(), batches=batches, evaluate=evaluate)
    assert evaluated[-1] == _settings().train_steps == 7
    assert recorder.steps("save")[-1] == 7


def test_a_second_signal_acts_at_once():
    def batches(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return step

    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt):
        _run(recorder, _settings(), batches=batches)
    assert recorder.steps("save") == []


def test_speed_counts_tokens_and_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def step_fn(state, batch, key):
        now[0] += 2.0
        state, metrics = _count(state, batch, key)
        return state, metrics | {"token/count": jnp.asarray(50.0)}

    def evaluate(state):
        del state
        now[0] += 1000.0
        return {"eval/kl": 0.0}

    recorder = Recorder()
    settings = _settings(train_steps=8, log_period=4, eval_period=2)
    _run(recorder, settings, step_fn, evaluate=evaluate)
    written = [(s, m) for name, s, m in recorder.calls if name == "write"]
    lines = {s: m for s, m in written if "time/seconds_per_step" in m}
    assert lines.keys() == {4, 8}
    for line in lines.values():
        assert line["time/seconds_per_step"] == pytest.approx(2.0)
        assert line["time/tokens_per_second"] == pytest.approx(25.0)


@functools.cache
def _compiled():
    model = toys.toy_language_model(dropout_rate=0.3)
    optimizer = make_optimizer(
        OptimizerSettings(name="adamw", learning_rate=0.05, warmup_steps=2), 6
    )
    mesh = partitioning.make_mesh(MeshSettings())
    step_fn = partitioning.compile_step(
        make_sft_step(model, optimizer, num_microbatches=2),
        mesh,
        partitioning.replicated(mesh),
    )
    step_fn.compile = functools.partial(speed.compile_ahead, step_fn)
    return model, optimizer, step_fn, jax.jit(make_sft_evaluation(model))


def _train(folder, train_steps, *, batches_until=99, stop_at=0):
    """Trains the toy language model in `folder`, from its newest checkpoint.

    The batch of a step may be missing, as when a process is killed; and a signal may
    come while a batch is made.
    """

    def batches(step):
        if step == batches_until:
            raise KeyError(step)
        if step + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return jax.device_get(toys.supervised_batch(step))

    model, optimizer, step_fn, evaluate = _compiled()
    state = init_state(model.init(jax.random.key(1)), optimizer)
    with Checkpointer(folder / "checkpoints") as checkpointer:
        latest = checkpointer.latest_step()
        progressed = loop.Progressed()
        if latest is not None:
            state = checkpointer.restore(latest, state)
            meta = checkpointer.read_meta(latest)
            progressed = loop.Progressed(meta["skipped_steps"], meta["owes_evaluation"])
        writer = MetricWriter(folder, int(state.step), tensorboard=False)
        state = loop.train_loop(
            step_fn,
            jax.device_put(state, partitioning.replicated(step_fn.mesh)),
            batches,
            settings=_settings(
                train_steps=train_steps, log_period=1, checkpoint_period=3
            ),
            progressed=progressed,
            checkpointer=checkpointer,
            writer=writer,
            progress=Recorder(),
            evaluate=lambda state: {
                "eval/loss_token_nll": float(
                    evaluate(state.param_sets[POLICY], toys.supervised_batch(99)).sums[
                        "loss/token_nll"
                    ]
                )
            },
            key=jax.random.key(2),
        )
        writer.close()
    return state


def _written(folder):
    return (folder / "metrics.jsonl").read_bytes()


def _assert_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)),
        left,
        right,
    )


def test_resuming_is_bit_identical(tmp_path):
    straight = _train(tmp_path / "straight", 6)
    with pytest.raises(KeyError):
        _train(tmp_path / "resumed", 6, batches_until=5)
    resumed = _train(tmp_path / "resumed", 6)
    _assert_identical(straight, resumed)
    assert _written(tmp_path / "straight") == _written(tmp_path / "resumed")
    lines = [json.loads(line) for line in _written(tmp_path / "straight").splitlines()]
    steps = [line["step"] for line in lines if "loss/token_nll" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    timing = (tmp_path / "straight" / "timing.jsonl").read_text().splitlines()
    assert {json.loads(line)["compile/count"] for line in timing} == {1.0}
    assert json.loads(timing[0])["compute/flops_per_step"] > 0


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(tmp_path):
    """Step 4 is one of an evaluation, and the run is stopped there twice over."""
    straight = _train(tmp_path / "straight", 6)
    folder = tmp_path / "stopped"
    assert int(_train(folder, 6, stop_at=4).step) == 4
    assert b"eval/" not in _written(folder)
    with pytest.raises(KeyError):  # killed after the evaluation, before a checkpoint
        _train(folder, 6, batches_until=4)
    assert _written(folder).count(b"eval/") == 1
    _assert_identical(straight, _train(folder, 6))
    assert _written(folder) == _written(tmp_path / "straight")


def _measured(step, sizes, skipped=None, loss=1.0):
    metrics = {"loss/token_nll": jnp.asarray(loss), guards.LARGEST: jnp.asarray(sizes)}
    if skipped is not None:
        metrics[guards.SKIPPED] = jnp.asarray(skipped)
    return metrics


def _with_sizes(bad_steps, *, skips):
    """A step whose parameter, the second tensor, is infinite after some steps."""

    def step_fn(state, batch, key):
        state, _ = _count(state, batch, key)
        is_bad = int(state.step) in bad_steps
        sizes = [1.0, jnp.inf if is_bad else 2.0, *[0.0] * _num_moments(state)]
        return state, _measured(state.step, sizes, float(is_bad) if skips else None)

    return step_fn


def _num_moments(state):
    return len(guards.tensor_names(state)) - 2


def test_the_first_tensor_that_is_not_finite_is_named_and_its_batch_kept():
    recorder = Recorder()
    with pytest.raises(divergence.TrainingDiverged) as caught:
        _run(recorder, _settings(), _with_sizes({5}, skips=False), batches=str)
    assert caught.value.first_tensor == "parameter w"
    assert caught.value.batch == "4" and caught.value.step == 5
    assert str(caught.value) == (
        "the first tensor that is not finite is the parameter w at step 5; nothing was "
        "saved after it"
    )
    assert recorder.steps("save") == [3]


def test_a_bad_tensor_at_the_step_of_a_checkpoint_is_not_saved():
    recorder = Recorder()
    with pytest.raises(divergence.TrainingDiverged, match="at step 3"):
        _run(recorder, _settings(), _with_sizes({3}, skips=False))
    assert recorder.steps("save") == []


def test_as_many_steps_are_left_out_as_may_be_and_counted_over_resumes():
    recorder, said = Recorder(), []
    recorder.say = said.append
    settings = _settings(max_skipped_steps=2, log_period=1)
    _run(recorder, settings, _with_sizes({2, 5}, skips=True))
    counted = [m[guards.SKIPPED] for name, _, m in recorder.calls if name == "write"]
    assert counted == [0, 1, 1, 1, 2, 2, 2]
    kept = [m["skipped_steps"] for name, _, m in recorder.calls if name == "save"]
    assert kept == [1, 2, 2]
    assert said[1].startswith("step 2 is left out, 1 of at most 2: the first tensor")
    # One more than may be, the first two of them before a resume.
    with pytest.raises(divergence.TrainingDiverged, match="at step 5, after 2 steps"):
        _run(
            Recorder(),
            settings,
            _with_sizes({5}, skips=True),
            progressed=loop.Progressed(skipped_steps=2),
        )


def test_the_writer_is_synced_before_each_checkpoint():
    recorder = Recorder()
    recorder.sync = lambda: recorder.calls.append(("sync", None, {}))
    _run(recorder, _settings())
    names = [name for name, _, _ in recorder.calls]
    saves = [index for index, name in enumerate(names) if name == "save"]
    assert len(saves) == 3 and all(names[index - 1] == "sync" for index in saves)


def test_the_first_evaluation_is_announced_for_it_compiles():
    talker = _Talker()
    settings = _settings(train_steps=6, eval_period=2)
    _run(talker, settings, evaluate=lambda state: {"eval/kl": 0.0})
    first, then = [text for text in talker.said if "evaluation" in text]
    assert first == "compiling the evaluation ..."
    assert then.startswith("the first evaluation took ")
    assert then.endswith(" s, its compilation included")
    # Where nothing is evaluated nothing is said.
    silent = _Talker()
    _run(silent, _settings(train_steps=2))
    assert not any("evaluation" in text for text in silent.said)
