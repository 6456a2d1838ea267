# SPDX-License-Identifier: Apache-2.0
"""From gin text to a job's arguments and back to gin text, with jobs that only record.

The lint's own rules are in `gin_lint_test.py`.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping

import gin
import pytest

from nlhf_jax import gin_bindings, settings
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import JOBS
from nlhf_jax.types import Algorithm

received: list[dict] = []


def recording_job(
    *,
    model_dir: str,
    loop: settings.LoopSettings,
    algorithm: Algorithm | None = None,
    lengths: Mapping[str, int] | None = None,
    seed: int = 7,
) -> None:
    """Keeps what it was called with."""
    received.append(locals())


def failing_job(*, kind: str) -> None:
    """Raises what it is told to."""
    if kind == "user":
        raise UserError("the folder is full, got 'x'")
    raise KeyError("a defect")


def composing_job(*, stages: Mapping[str, Callable[..., None]]) -> None:
    """Calls its stages as `quickstart` does: with the folder, and bound to the rest."""
    for name, stage in stages.items():
        stage(model_dir=name)


FAKES = {job.__name__: job for job in (recording_job, failing_job, composing_job)}


@pytest.fixture(scope="module")
def bound():
    """Returns the fake jobs as gin made them; gin keeps names for the whole process."""
    return {name: gin.external_configurable(job, name) for name, job in FAKES.items()}


@pytest.fixture(autouse=True)
def fake_jobs(bound, monkeypatch):
    """Adds the fake jobs to the registry for one test."""
    gin_bindings.register()
    monkeypatch.setattr(gin_bindings, "_known", gin_bindings._known | FAKES)
    monkeypatch.setattr(gin_bindings, "_bound", gin_bindings._bound | bound)
    received.clear()
    yield
    gin.clear_config()


@pytest.fixture
def run_file(tmp_path):
    """Returns a gin file that is complete but for MODEL_DIR."""
    path = tmp_path / "run.gin"
    path.write_text(
        "MODEL_DIR = %gin.REQUIRED\n"
        "TRAIN_STEPS = 30\n"
        "TAU = 0.25\n"
        "recording_job.model_dir = %MODEL_DIR\n"
        "recording_job.loop = @LoopSettings()\n"
        "recording_job.algorithm = @self_play()\n"
        "self_play.tau = %TAU\n"
        "LoopSettings.train_steps = %TRAIN_STEPS\n"
        "LoopSettings.batch_size = 8\n"
    )
    return str(path)


def start(job, files, **overrides):
    """Loads and runs one job."""
    gin_bindings.load(job, files, overrides)
    gin_bindings.run(job)


def test_all_that_can_be_configured_is_registered():
    names = set(gin_bindings._known) - set(FAKES)
    classes = {one.__name__ for one in gin_bindings.SETTINGS}
    assert names == classes | set(ALGORITHMS) | set(JOBS)


def test_every_settings_class_is_in_the_table():
    defined = {
        one
        for one in vars(settings).values()
        if isinstance(one, type) and one.__name__.endswith("Settings")
    }
    assert defined <= set(gin_bindings.SETTINGS)


def test_algorithms_are_registered_under_their_registry_names():
    for name, factory in ALGORITHMS.items():
        assert factory.__name__ == name


def test_registering_twice_changes_nothing():
    before = dict(gin_bindings._known)
    gin_bindings.register()
    assert gin_bindings._known == before


@pytest.mark.parametrize("job", JOBS)
def test_a_job_is_its_function(job):
    assert gin_bindings.job_function(job).__name__ == job


def test_an_unknown_job_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'train'"):
        gin_bindings.job_function("trian")


def test_the_job_receives_what_the_file_says(run_file):
    start("recording_job", [run_file], MODEL_DIR="runs/one")
    (call,) = received
    assert call["model_dir"] == "runs/one"
    assert call["loop"] == settings.LoopSettings(train_steps=30, batch_size=8)
    assert call["algorithm"].name == "self_play"
    assert call["seed"] == 7


def test_overrides_win_over_files_and_later_files_over_earlier(run_file, tmp_path):
    later = tmp_path / "later.gin"
    later.write_text("TRAIN_STEPS = 40\nLoopSettings.batch_size = 16\n")
    overrides = {"MODEL_DIR": "a", "TRAIN_STEPS": "50", "recording_job.seed": "3"}
    start("recording_job", [run_file, str(later)], **overrides)
    (call,) = received
    assert call["loop"] == settings.LoopSettings(train_steps=50, batch_size=16)
    assert call["seed"] == 3


def test_search_paths_are_looked_through_in_order(tmp_path):
    for folder, steps in (("first", 1), ("second", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "steps.gin").write_text(f"TRAIN_STEPS = {steps}\n")
    top = tmp_path / "top.gin"
    top.write_text(
        "include 'steps.gin'\n"
        "recording_job.model_dir = ''\n"
        "recording_job.loop = @LoopSettings()\n"
        "LoopSettings.train_steps = %TRAIN_STEPS\n"
        "LoopSettings.batch_size = 1\n"
    )
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    for expected, search_paths in ((1, folders), (2, folders[::-1])):
        gin_bindings.load("recording_job", [str(top)], {}, search_paths)
        gin_bindings.run("recording_job")
        assert received.pop()["loop"].train_steps == expected


def test_scopes_keep_stages_apart(tmp_path):
    path = tmp_path / "stages.gin"
    path.write_text(
        "composing_job.stages = {\n"
        "    'a': @short/recording_job,  # two stages of one job\n"
        "    'b': @long/recording_job,\n"
        "}\n"
        "recording_job.seed = 5\n"
        "short/recording_job.loop = @short/LoopSettings()\n"
        "long/recording_job.loop = @long/LoopSettings()\n"
        "LoopSettings.batch_size = 4\n"
        "short/LoopSettings.train_steps = 1\n"
        "long/LoopSettings.train_steps = 100\n"
    )
    start("composing_job", [str(path)])
    assert [call["model_dir"] for call in received] == ["a", "b"]
    assert [call["loop"].train_steps for call in received] == [1, 100]
    assert [call["loop"].batch_size for call in received] == [4, 4]
    assert [call["seed"] for call in received] == [5, 5]


def test_a_setting_out_of_range_is_one_sentence(run_file):
    with pytest.raises(UserError) as caught:
        start("recording_job", [run_file], MODEL_DIR="a", TRAIN_STEPS="0")
    message = "train_steps must be an integer of at least 1, got 0"
    assert str(caught.value) == message
    assert received == []


def test_a_job_s_own_complaint_is_kept_and_gin_s_remarks_are_not():
    with pytest.raises(UserError) as caught:
        start("failing_job", [], **{"failing_job.kind": "user"})
    assert str(caught.value) == "the folder is full, got 'x'"


def test_defects_keep_their_type():
    with pytest.raises(KeyError, match="a defect"):
        start("failing_job", [], **{"failing_job.kind": "defect"})


def test_operative_config_holds_defaults_too(run_file):
    start("recording_job", [run_file], MODEL_DIR="runs/one")
    lines = gin_bindings.operative_config().splitlines()
    assert "MODEL_DIR = 'runs/one'" in lines
    assert "recording_job.seed = 7" in lines
    assert "LoopSettings.train_steps = %TRAIN_STEPS" in lines


def test_operative_config_holds_the_defaults_of_settings():
    # In a fresh interpreter: the tests' type checker hides a dataclass's signature.
    code = (
        "import gin\n"
        "from nlhf_jax import gin_bindings, settings\n"
        "gin_bindings.register()\n"
        "gin.parse_config('LoopSettings.train_steps = 3')\n"
        "gin_bindings._bound['LoopSettings'](batch_size=8)\n"
        "print(gin_bindings.operative_config())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "LoopSettings.train_steps = 3" in lines, done.stderr
    assert "LoopSettings.keep_checkpoints = 2" in lines


def test_operative_config_is_a_run_of_its_own(run_file, tmp_path):
    # Long values: gin breaks their lines with backslashes and brackets.
    lengths = {f"feature_{'x' * 30}_{i}": i for i in range(4)}
    overrides = {"MODEL_DIR": "runs/" + "long/" * 30, "TAU": "0.125"}
    overrides["recording_job.lengths"] = repr(lengths)
    start("recording_job", [run_file], **overrides)
    written = gin_bindings.operative_config()
    assert "\\\n" in written
    path = tmp_path / "config.gin"
    path.write_text(written)
    start("recording_job", [str(path)])
    first, second = received
    for name in ("model_dir", "loop", "lengths", "seed"):
        assert first[name] == second[name]
    assert gin_bindings.operative_config() == written


def test_a_new_load_forgets_the_old_one(run_file):
    start("recording_job", [run_file], MODEL_DIR="a", **{"recording_job.seed": "3"})
    start("recording_job", [run_file], MODEL_DIR="b")
    assert [call["seed"] for call in received] == [3, 7]


def test_nothing_runs_when_the_lint_complains(run_file):
    with pytest.raises(UserError, match=r"required and not set.*MODEL_DIR"):
        start("recording_job", [run_file])
    assert received == []
