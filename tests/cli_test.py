# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, one sentence per mistake, flags."""

import inspect
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from nlhf_jax import __version__, cli, gin_bindings
from nlhf_jax.checks import CheckpointError, UserError
from nlhf_jax.jobs import JOBS, runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
SFT = "--gin_file=configs/runs/sft.gin"
READY = (SFT, "--gin.MODEL_DIR=somewhere")


def run(capsys, *words):
    """Returns (exit code, standard output, standard error)."""
    code = cli.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def mistake(capsys, *words) -> str:
    """Returns the one sentence that a mistake is answered with."""
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.startswith("nlhf: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_every_job_with_a_sentence(capsys, word):
    code, out, err = run(capsys, word)
    assert (code, err) == (0, "")
    for job in JOBS:
        (line,) = [text for text in out.splitlines() if text.split()[:1] == [job]]
        assert line.endswith(".")
        assert len(line.split()) > 3


def test_no_word_at_all_prints_the_usage_and_fails(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert out.startswith("usage: nlhf JOB")


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"nlhf_jax {__version__}\n", "")


@pytest.mark.parametrize("job", JOBS)
def test_help_of_a_job_describes_each_of_its_parameters(capsys, job):
    code, out, _ = run(capsys, job, "--help")
    assert code == 0
    for name in cli.parameters(job):
        assert f"--{name}" in out, name


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_are_quick_and_import_neither_jax_nor_a_job(word):
    code = (
        "import sys; from nlhf_jax import cli; "
        f"cli.main([{word!r}]); "
        "print([n for n in sys.modules if n in ('jax', 'gin') or '.jobs.' in n])"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"
    # Two cores may be busy with other tests; alone it takes a tenth of a second.
    assert time.monotonic() - start < 5


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "nlhf_jax"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert done.stdout == f"nlhf_jax {__version__}\n"
    done = subprocess.run([*command, "sfd"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'sft'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sfd"], "job must be one of"),
        (["sfd"], "got 'sfd' (did you mean 'sft'?)"),
        (["sft", "--modeldir=x"], "sft has no flag --modeldir (did you mean"),
        (["sft", "--model_dir=x", "--model_dir", "y"], "--model_dir is given twice"),
        (["sft", "--gin_fil=x"], "(did you mean 'gin_file'?)"),
        (["sft", "--dry_run=no"], "--dry_run takes no value, got 'no'"),
        (["sft", "--dryrun"], "(did you mean 'dry_run'?)"),
        (["sft", "stray"], "unexpected argument 'stray': flags begin with --"),
        (["sft", "--gin_file"], "--gin_file needs a value"),
        (["sft", "--gin.TRAIN_STEPS"], "--gin.TRAIN_STEPS needs a value"),
        (["sft", "--gin_file=configs/runs/sftt.gin"], "'configs/runs/sftt.gin'"),
        (["sft", "--gin_file=configs/runs/sftt.gin"], "mean 'configs/runs/sft.gin'?"),
        (["sft", SFT], "sft: required and not set: --gin.MODEL_DIR=..."),
        (["sft", *READY, "--gin.TRAIN_STEP=3"], "(did you mean 'TRAIN_STEPS'?)"),
        (["sft", *READY, "--gin.TRAIN_STEPS=many"], "must be an integer, got 'many'"),
        (["sft", *READY, "--gin.TRAIN_STEPS=1.5"], "must be an integer, got 1.5"),
        (["sft", *READY, "--gin.MODEL_DIR=7"], "must be a string in quotes, got 7"),
        (["sft", *READY, "--gin.TRAIN_STEPS=a b"], "a b (text needs quotes"),
        (["sft", *READY, "--gin.LoopSetings.seed=1"], "(did you mean 'LoopSettings'?)"),
        (["sft", *READY, "--seed=one"], "sft.seed must be an integer, got 'one'"),
        (["sft", *READY, "--gin.sft.data=@DataSettings"], "(@NAME()), got @Data"),
        (["sft", *READY, "--gin.sft.data=@LoopSettings()"], "of type DataSettings"),
        (["sft", *READY, "--gin.sft.data=@DataSetting()"], "mean 'DataSettings'?"),
        (["sft", *READY, "--gin.=3"], "--gin."),
        (["sft", *READY, "--gin.a b=3"], "--gin.a b"),
        (["sft", *READY, "--gin.sft.model.x=3"], "named 'sft.model'"),
    ],
)
def test_every_mistake_is_one_sentence(capsys, words, expected):
    assert expected in mistake(capsys, *words, "--dry_run")


def test_a_command_of_one_process_is_not_run_by_several(capsys, monkeypatch):
    for name, value in (("COORDINATOR", "127.0.0.1:9"), ("NUM_PROCESSES", "2")):
        monkeypatch.setenv(f"NLHF_{name}", value)
    monkeypatch.setenv("NLHF_PROCESS_ID", "0")
    said = mistake(capsys, "games", "solve", "skew")
    assert "games runs in one process, got 2 (from the NLHF_ variables)" in said


NEED_NOTHING = {"quickstart", "convergence", "exploration", "reproduce"}


@pytest.mark.parametrize("job", [job for job in JOBS if job not in NEED_NOTHING])
def test_a_job_without_configuration_names_everything_it_needs(capsys, job):
    err = mistake(capsys, job)
    parameters = inspect.signature(gin_bindings.job_function(job)).parameters
    for name, parameter in parameters.items():
        assert (f"{job}.{name}=" in err) == (parameter.default is parameter.empty)


def test_a_value_out_of_range_is_one_sentence_though_gin_adds_its_own(capsys):
    err = mistake(capsys, "sft", *READY, "--gin.BATCH_SIZE=-1")
    assert "batch_size must be an integer of at least 1, got -1" in err
    assert "configurable" not in err


def test_dry_run_checks_everything_and_makes_nothing(capsys, tmp_path):
    folder = tmp_path / "made"
    words = ("sft", SFT, f"--gin.MODEL_DIR={folder}", "--dry_run")
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert out.startswith("sft: ")
    assert not folder.exists()


def test_a_parameter_of_the_job_needs_no_gin_and_no_second_quotes(capsys, tmp_path):
    words = ("sft", SFT, f"--model_dir={tmp_path}/with a 'quote'", "--dry_run")
    assert run(capsys, *words)[0] == 0


def test_values_follow_after_a_space_too():
    words = ["--gin_file", "a.gin", "--gin.X", "3", "--gin_search_paths", "p,q"]
    arguments = cli.Arguments("sft", [*words, "--seed", "4"])
    assert arguments.files == ["a.gin"]
    assert arguments.search_paths == ["p", "q"]
    assert arguments.overrides == {"X": "3", "sft.seed": "4"}
    assert not arguments.dry_run


def test_quickstart_has_a_file_of_its_own():
    assert cli.Arguments("quickstart", []).files == cli.DEFAULT_FILES["quickstart"]
    assert cli.Arguments("quickstart", ["--gin_file=x"]).files == ["x"]


def test_files_are_found_in_the_search_paths(capsys, tmp_path):
    (tmp_path / "mine.gin").write_text("include 'configs/runs/sft.gin'\n")
    words = ("sft", "--gin_file=mine.gin", "--model_dir=x", "--dry_run")
    assert "'mine.gin'" in mistake(capsys, *words)
    assert run(capsys, *words, f"--gin_search_paths=nowhere,{tmp_path}")[0] == 0


@pytest.fixture
def rigged(monkeypatch, tmp_path):
    """Returns a function that makes every job raise what it is given."""
    monkeypatch.setenv("NLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(cli.compilation_cache, "enable", lambda: None)

    def rig(error):
        def fail(job):
            raise error

        monkeypatch.setattr(gin_bindings, "run", fail)

    return rig


def test_a_stopped_run_says_the_step_and_how_to_continue(capsys, rigged):
    rigged(runs.Stopped(17))
    code, out, err = run(capsys, "sft", *READY)
    assert (code, out) == (128 + signal.SIGTERM, "")
    assert err.count("\n") == 1
    assert "step 17" in err
    assert "the same command continues" in err


def test_a_stopped_run_is_still_known_after_gin_has_passed_it_on(
    monkeypatch,
):
    import gin

    def stopping(*, model_dir: str):
        raise runs.Stopped(5)

    monkeypatch.setitem(
        gin_bindings._bound,
        "sft",
        gin.external_configurable(stopping, "stopping_for_the_test"),
    )
    gin_bindings.load("sft", ["configs/runs/sft.gin"], {"MODEL_DIR": "x"})
    gin.bind_parameter("stopping_for_the_test.model_dir", "x")
    with pytest.raises(runs.Stopped) as caught:
        gin_bindings.run("sft")
    assert caught.value.step == 5


def test_ctrl_c_ends_with_130(capsys, rigged):
    rigged(KeyboardInterrupt())
    assert run(capsys, "sft", *READY) == (130, "", "nlhf: interrupted\n")


def test_a_users_mistake_inside_a_job_is_one_sentence(capsys, rigged):
    rigged(UserError("the corpus must not be empty"))
    assert mistake(capsys, "sft", *READY) == "nlhf: the corpus must not be empty\n"


def test_a_checkpoint_that_could_not_be_written_is_one_sentence_and_code_74(
    capsys, rigged
):
    sentence = "checkpoint 12 in x could not be written: No space left on device"
    rigged(CheckpointError(sentence))
    assert run(capsys, "sft", *READY) == (74, "", f"nlhf: {sentence}\n")


def test_a_defect_keeps_its_traceback(rigged):
    rigged(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        cli.main(["sft", *READY])
