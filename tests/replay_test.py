# SPDX-License-Identifier: Apache-2.0
"""What a run keeps of a bad step, what `nlhf replay` makes of it, changed settings.

That a real job's failure is played again is row 16 of the table of faults.
"""

import contextlib
import json
import pathlib
from unittest import mock

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import cli, divergence, gin_bindings, replay_command
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import failures, replay, run_records, runs
from nlhf_jax.settings import LoopSettings
from nlhf_jax.types import PromptBatch
from tests import runs_test
from tests import supervised_toys as toys

FACTS = {
    "job": "sft",
    "step": 3,
    "first_tensor": "gradient of out",
    "what": "the first tensor that is not finite is the gradient of out",
    "metrics": {"loss/token_nll": "nan"},
    "tensors": {"gradient of out": "nan"},
    "seed": 0,
    "checkpoint": 2,
    "command": ["sft", "--gin_file=nowhere.gin"],
    "working_folder": "/",
}
BATCH = PromptBatch(np.arange(6, dtype=np.int32).reshape(3, 2), np.ones((3, 2), bool))


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


def failure(folder, batch=BATCH, **changed):
    """Writes a folder of a failure and returns it."""
    target = folder / "run" / "failures" / "step_3"
    failures._write(target, FACTS | changed, batch)
    return target


def test_what_is_written_is_read(tmp_path):
    facts, arrays = failures.read(str(failure(tmp_path)))
    assert facts == FACTS
    assert arrays.keys() == {"tokens_BS", "mask_BS"}
    np.testing.assert_array_equal(arrays["tokens_BS"], BATCH.tokens_BS)
    # Once more in the place of the first, and nothing half-written is left.
    failure(tmp_path, step=4)
    assert [p.name for p in (tmp_path / "run" / "failures").iterdir()] == ["step_3"]


def bad_params(key):
    params = toys.toy_language_model().init(key)
    return params | {"out": params["out"].at[0, 0].set(jnp.nan)}


def test_a_run_keeps_the_batch_and_names_folder_and_checkpoint(tmp_path, one_device):
    start = runs.initial_state(bad_params, "", 3, runs_test.make)
    with pytest.raises(divergence.TrainingDiverged) as caught:
        runs_test.run(tmp_path / "run", 5, initial_state=start)
    folder = tmp_path / "run" / "failures" / "step_1"
    assert str(caught.value) == caught.value.sentence
    assert str(caught.value) == (
        "toy: loss/token_nll is nan, and the first tensor that is not finite is the "
        "gradient of embed at step 1; nothing was saved after it; there is no "
        f"checkpoint yet. To see it again: nlhf replay {folder}"
    )
    facts, arrays = failures.read(str(folder))
    assert (facts["step"], facts["first_tensor"]) == (1, "gradient of embed")
    assert facts["metrics"]["loss/token_nll"] == "nan" and facts["checkpoint"] is None
    assert facts["tensors"]["parameter out"] == "nan"
    expected = toys.supervised_batch(0)
    np.testing.assert_array_equal(arrays["prompts.tokens_BS"], expected.prompts[0])
    np.testing.assert_array_equal(arrays["targets.mask_BT"], expected.targets[1])
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("facts.json", "{", "facts.json cannot be read: Expecting property name"),
        ("facts.json", "[]", "facts.json cannot be read: list indices must be"),
        ("facts.json", "{}", "facts.json cannot be read: 'job'"),
        (
            "facts.json",
            json.dumps(FACTS | {"step": 0}),
            "step must be at least 1, got 0",
        ),
        ("facts.json", json.dumps(FACTS | {"step": "x"}), "step is no int"),
        ("facts.json", json.dumps(FACTS | {"command": [1]}), "command must hold words"),
        ("facts.json", "[" * 99999, "facts.json cannot be read: maximum recursion"),
        ("batch.npz", "no archive", "batch.npz cannot be read"),
        ("batch.npz", "", "batch.npz cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_sentence(
    tmp_path, capsys, name, text, complaint
):
    folder = failure(tmp_path)
    (folder / name).write_text(text)
    assert cli.main(["replay", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nlhf: ") and complaint in line


def test_pickled_arrays_are_refused(tmp_path):
    folder = failure(tmp_path)
    np.savez(folder / "batch.npz", tokens_BS=np.asarray([{"a": 1}], object))
    with pytest.raises(UserError, match=r"batch\.npz cannot be read: Object arrays"):
        failures.read(str(folder))


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["{folder}"], "gin file 'nowhere.gin' (named by the command line) does not"),
        (["{folder}/.."], "there is no facts.json in it"),
        (["nowhere"], "'nowhere' must be a folder that a run wrote"),
        ([], "nlhf replay: the following arguments are required: folder"),
        (["a", "b"], "nlhf replay: unrecognized arguments: b"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(tmp_path, capsys, words, complaint):
    folder = failure(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["replay", *(w.format(folder=folder) for w in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_no_command_started_is_said(tmp_path):
    folder = failure(tmp_path, command=[])
    with pytest.raises(UserError, match="of a run that no command started"):
        replay.play(str(folder), pytest.fail)


def test_a_command_that_trains_something_else_is_said(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    folder = failure(tmp_path, working_folder=str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere\.gin does not train"):
        replay.play(str(folder), lambda model_dir, command: None)


def test_what_a_kept_command_lets_be_imported_does_not_count(tmp_path):
    (tmp_path / "run.gin").write_text("import this\n")
    command = ["sft", f"--gin_file={tmp_path / 'run.gin'}", "--allow_import=this"]
    with pytest.raises(UserError, match="import this is refused"):
        replay_command.rebuild(tmp_path, command)
    with pytest.raises(UserError, match="job must be one of"):
        replay_command.rebuild(tmp_path, ["doctor"])


# --------------------------------------------------------------- playing toy runs


def played(folder, *, first_run=None):
    """Replays the failure of the toy run in a folder and returns the exit code."""

    def rebuild(model_dir, command):
        del command
        run = run_records.open_folder(str(model_dir))
        assert run != model_dir
        runs_test.run(run, 9, **(first_run or {}))

    return replay.play(str(folder), rebuild)


@contextlib.contextmanager
def poisoned_at(step):
    """While it is open, one gradient of a step is infinite."""
    plain = runs_test.supervised_step.accumulate_gradients

    def spoilt(summed_loss, params, batch, key, **options):
        found, totals = plain(summed_loss, params, batch, key, **options)
        at = jax.random.fold_in(jax.random.key(0), step - 1)
        is_it = (jax.random.key_data(key) == jax.random.key_data(at)).all()
        return found | {"out": jnp.where(is_it, jnp.inf, found["out"])}, totals

    with mock.patch.object(runs_test.supervised_step, "accumulate_gradients", spoilt):
        yield


@pytest.fixture
def failed(tmp_path, one_device, monkeypatch):
    """Returns a run with checkpoints 2 and 4 that failed at step 5, and its failure."""
    run = tmp_path / "run"
    runs_test.run(run, 4)
    monkeypatch.setattr(run_records, "_command", ("sft",))
    said = pytest.raises(divergence.TrainingDiverged, match="checkpoints/4")
    with poisoned_at(5), said:
        runs_test.run(run, 9)
    return run / "failures" / "step_5"


def listing(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def test_the_same_tensor_at_the_same_step_is_a_reproduction(failed, capsys):
    run, before = failed.parent.parent, listing(failed.parent.parent)
    with poisoned_at(5):
        assert played(failed) == 0
    out = capsys.readouterr().out
    assert f"{run}: toy, played from step 4 to step 5" in out
    assert "batch of step 5: the kept one, and the one that is computed now" in out
    assert "gradient of out" in out and "largest absolute value inf" in out
    assert "tensors are finite; the largest absolute value in them is" in out
    assert "\nreproduced: optimizer/gradient_norm is inf, and the first tensor" in out
    assert listing(run) == before


def test_another_step_or_none_is_no_reproduction(failed, capsys):
    assert played(failed) == 1
    out = capsys.readouterr().out
    assert "not reproduced: every number of the step is finite" in out
    (failed.parent.parent / "checkpoints" / "4").rename(failed.parent / "4")
    with poisoned_at(4):
        assert played(failed) == 1
    out = capsys.readouterr().out
    assert "played from step 2 to step 5" in out
    assert "batch of step 5: was not reached" in out
    assert "at step 4; it was at step 5 that optimizer/gradient_norm is inf" in out


def test_data_that_have_changed_are_said_and_the_kept_batch_is_used(failed, capsys):
    given = []

    def others(step, rows):
        batch = runs_test.rows_of(step + 50, rows)
        given.append(step)
        return batch

    assert played(failed, first_run={"batches": others}) == 1
    out = capsys.readouterr().out
    assert given == [4]
    assert "the data have changed, they now give other prompts.tokens_BS" in out


def test_kept_arrays_take_the_place_of_those_computed():
    mine = PromptBatch(BATCH.tokens_BS[1:] + 1, BATCH.mask_BS[1:])
    kept = failures.named_arrays(BATCH)
    said, used = replay._compared(mine, kept, np.asarray([1, 2]))
    np.testing.assert_array_equal(used.tokens_BS, BATCH.tokens_BS[1:])
    assert said.endswith("they now give other tokens_BS")
    with pytest.raises(UserError, match="the job's data now give"):
        replay._compared(mine, {"other": BATCH.tokens_BS}, np.asarray([1, 2]))
    with pytest.raises(UserError, match=r"'tokens_BS' of shape \[3, 2\]"):
        replay._compared(
            PromptBatch(BATCH.tokens_BS[:, :1], BATCH.mask_BS[:, :1]),
            kept,
            np.asarray([0]),
        )


# -------------------------------------------------------- configurations and seeds


def test_a_run_that_keeps_the_best_is_played_and_what_is_owed_is_passed_over():
    settings = LoopSettings(
        train_steps=9,
        batch_size=2,
        checkpoint_period=2,
        eval_period=2,
        keep_best=1,
        best_metric="eval/kl",
        keep_every_steps=4,
    )
    played = replay.Played()
    toy = runs.Training("toy", str, {}, lambda s, r: BATCH, dict, {}, None)
    training, changed = replay._up_to(toy, settings, 5, {}, played)
    assert (changed.train_steps, changed.keep_best) == (5, 0)
    assert changed.keep_every_steps == 0
    # Before the step's batch is asked for there is only an evaluation that is owed.
    assert training.evaluate(None) == {}
    played.batch = "the kept one"
    with pytest.raises(replay._Done):
        training.evaluate(None)


def test_only_a_training_job_of_this_very_folder_is_called(tmp_path, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def only(is_wanted):
        asked.append(is_wanted)
        yield

    monkeypatch.setattr(gin_bindings, "only", only)
    monkeypatch.setattr(gin_bindings, "load", lambda *_, **__: None)
    monkeypatch.setattr(gin_bindings, "run", lambda job: None)
    replay_command.rebuild(tmp_path / "copy", ["sft", "--gin_file=x.gin"])
    (is_wanted,) = asked
    assert is_wanted("sft", {"model_dir": str(tmp_path / "copy")})
    for name, folder in (("sft", "original"), ("collect", "copy"), ("sft", "")):
        assert not is_wanted(name, {"model_dir": str(tmp_path / folder)})


def test_a_failure_that_cannot_be_kept_hides_nothing(tmp_path, one_device):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failures").write_text("a file in the way")
    start = runs.initial_state(bad_params, "", 3, runs_test.make)
    with pytest.raises(divergence.TrainingDiverged) as caught:
        runs_test.run(tmp_path / "run", 5, initial_state=start)
    assert "loss/token_nll is nan" in caught.value.sentence
    assert "What the step was given is not in" in caught.value.sentence


def test_a_home_that_nobody_has_is_a_plain_name(capsys):
    assert cli.main(["replay", "~nosuch/x"]) == 2
    assert "'~nosuch/x' must be a folder that a run wrote" in capsys.readouterr().err


def test_what_cannot_go_on_is_refused_before_anything_is_written(tmp_path, one_device):
    runs_test.run(tmp_path, 2)
    before = listing(tmp_path)
    init = toys.toy_language_model().init
    shapes = runs.initial_state(init, "", 0, runs_test.make).shapes
    with pytest.raises(UserError, match="was trained with seed 0 up to step 2, got s"):
        run_records.open_folder(str(tmp_path), runs.Continued(9, shapes))
    longer = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype), shapes
    )
    with pytest.raises(UserError, match=r"checkpoint .*/2 holds '.*' as .*, but .* is"):
        run_records.open_folder(str(tmp_path), runs.Continued(0, longer))
    without = shapes._replace(opt_states={})
    with pytest.raises(UserError, match="has the unexpected 'opt_states/"):
        run_records.open_folder(str(tmp_path), runs.Continued(0, without))
    assert listing(tmp_path) == before
    run_records.open_folder(str(tmp_path), runs.Continued(0, shapes))
    assert "config.gin" in {path.name for path in tmp_path.iterdir()}


def test_another_seed_is_refused(tmp_path, one_device, monkeypatch):
    runs_test.run(tmp_path, 2)
    run = runs.run
    monkeypatch.setattr(runs, "run", lambda *a, **k: run(*a, **(k | {"seed": 7})))
    with pytest.raises(UserError, match="was trained with seed 0 up to step 2, got"):
        runs_test.run(tmp_path, 4)


CONFIG = """
# Parameters for LoopSettings:
# ==============================================================================
LoopSettings.train_steps = 4
LoopSettings.batch_size = %BATCH
train.model_dir = '/a'
DataSettings.task_feature_lengths = \\
    {'inputs': 16,
     'targets': 8}
"""


def test_each_changed_binding_is_named_with_both_values():
    now = CONFIG.replace("= 4", "= 6").replace("'/a'", "'/b'").replace("8}", "9}")
    now += "other.parameter = 3\n"
    assert run_records.changed_bindings(CONFIG, now) == (
        "LoopSettings.train_steps 4 -> 6; DataSettings.task_feature_lengths "
        "{'inputs': 16, 'targets': 8} -> {'inputs': 16, 'targets': 9}"
    )
    assert run_records.changed_bindings(CONFIG, CONFIG + "more.x = 1\n") == ""
    assert run_records.changed_bindings("", CONFIG) == ""
    long = run_records.changed_bindings("a.b = 1\n", f"a.b = '{'x' * 500}'\n")
    assert long.endswith("...") and len(long) < 100


@pytest.fixture
def configured(monkeypatch):
    """Returns a function that sets the operative configuration."""

    def to(text):
        monkeypatch.setattr(run_records, "_config_source", lambda: text)

    return to


def test_a_run_under_another_configuration_says_so_and_keeps_the_first(
    tmp_path, configured, capsys
):
    def opened(text):
        configured(text)
        run_records.open_folder(str(tmp_path))
        return capsys.readouterr().err

    assert opened("a.b = 1\n") == ""
    assert opened("a.b = 2\n") == ""  # there is no checkpoint: it begins anew
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / "manifest.json").touch()
    assert opened("a.b = 2\n") == ""
    said = opened("a.b = 3\n")
    assert said.count("\n") == 1 and "a.b 2 -> 3" in said and "config.1.gin" in said
    assert "config.2.gin" in opened("a.b = 4\n")
    texts = [(tmp_path / f).read_text() for f in ("config.1.gin", "config.2.gin")]
    assert texts == ["a.b = 2\n", "a.b = 3\n"]
    assert (tmp_path / "config.gin").read_text() == "a.b = 4\n"


def test_a_redirected_folder_is_not_touched(tmp_path):
    run, instead = tmp_path / "run", tmp_path / "instead"
    run.mkdir()
    with run_records.redirected(run, instead):
        assert run_records.open_folder(str(run)) == instead
        assert run_records.open_folder(str(tmp_path / "other")) == tmp_path / "other"
    assert list(tmp_path.iterdir()) == [run] and not list(run.iterdir())


def test_only_the_jobs_that_are_wanted_are_called(monkeypatch):
    called = []

    def job(*, model_dir: str) -> None:
        called.append(model_dir)

    wrapped = gin_bindings._that_can_be_rehearsed(job)
    with gin_bindings.only(lambda name, given: given["model_dir"] == "a"):
        wrapped(model_dir="a")
        wrapped(model_dir="b")
    wrapped(model_dir="c")
    assert called == ["a", "c"]


def test_a_command_knows_what_it_was_told(monkeypatch):
    monkeypatch.setattr(run_records, "_command", ())
    monkeypatch.setattr(run_records, "_config_source", str)
    runs.set_source(lambda: "text", ["sft", "--gin.A=1"])
    assert run_records.command() == ("sft", "--gin.A=1")
    assert runs.operative_config() == "text"


def test_the_run_that_is_played_ends_at_its_step():
    training = runs.Training("toy", str, {}, lambda s, r: BATCH, dict, {}, None)
    settings = LoopSettings(9, 3, eval_period=1, profile_steps=(7, 8))
    kept, told = failures.named_arrays(BATCH), replay.Played()
    changed, loop = replay._up_to(training, settings, 5, kept, told)
    assert (loop.train_steps, loop.eval_period, loop.profile_steps) == (5, 0, ())
    assert changed.batches(3, np.arange(3)) is BATCH and told.batch == ""
    changed.batches(4, np.arange(3))
    assert told.batch == "the kept one, and the one that is computed now"
    with pytest.raises(replay._Done):
        changed.evaluate(None)


def test_the_folder_of_a_pipelines_stage_is_found(tmp_path, monkeypatch):
    """The job that is named is called, and of those it calls the one that failed."""
    wanted = []
    monkeypatch.setattr(gin_bindings, "load", lambda *given: None)
    monkeypatch.setattr(
        gin_bindings, "run", lambda job: wanted.append(gin_bindings._is_wanted)
    )
    folder = (tmp_path / "run" / "sft").resolve()
    replay_command.rebuild(folder, ["quickstart"])
    (is_wanted,) = wanted
    assert is_wanted("quickstart", {"model_dir": "elsewhere"})
    assert is_wanted("sft", {"model_dir": str(folder)})
    assert not is_wanted("reward", {"model_dir": str(folder.parent / "reward")})
    assert not is_wanted("evaluate", {})
    assert gin_bindings._is_wanted is None and pathlib.Path.cwd().is_dir()
    gin.clear_config()
