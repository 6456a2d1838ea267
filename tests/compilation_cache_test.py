# SPDX-License-Identifier: Apache-2.0
"""Programs kept between runs: found again, bounded, harmless; and how a run begins."""

import json
import os
import pathlib
import subprocess
import sys
import time
import warnings

import jax
import pytest
from jax._src import compilation_cache as jax_cache

from nlhf_jax import checkpoints, compilation_cache, metrics, speed
from nlhf_jax.checks import UserError
from nlhf_jax.compilation_cache import Counts
from nlhf_jax.scale.costs import Times

ROOT = pathlib.Path(__file__).resolve().parent.parent
COST = speed.StepCost(8.1, Times(2e9, 1e8), 1, None, "cpu")


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Restores what `enable` changes; the cache is in an empty folder."""
    monkeypatch.setenv("NLHF_CACHE", str(tmp_path / "cache"))
    for name in (compilation_cache.SWITCH, compilation_cache.OWN_FOLDER):
        monkeypatch.delenv(name, raising=False)
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    show = warnings.showwarning
    yield tmp_path / "cache" / "xla"
    warnings.showwarning = show
    for name, value in before.items():
        jax.config.update(name, value)


def folder_in_force():
    return jax.config.jax_compilation_cache_dir


def test_it_is_on_and_follows_the_environment(options):
    compilation_cache.enable()
    assert folder_in_force() == str(options)
    assert options.is_dir()
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    assert least == compilation_cache.LEAST_SECONDS


def test_without_a_variable_it_is_in_the_home_folder(options, monkeypatch):
    monkeypatch.delenv("NLHF_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    place = pathlib.Path("/home/somebody/.cache/nlhf_jax/xla")
    assert compilation_cache.folder() == place


def test_a_variable_turns_it_off(options, monkeypatch):
    compilation_cache.enable()
    monkeypatch.setenv(compilation_cache.SWITCH, "off")
    compilation_cache.enable()
    assert folder_in_force() is None


def test_another_word_is_a_mistake(options, monkeypatch):
    monkeypatch.setenv(compilation_cache.SWITCH, "of")
    with pytest.raises(UserError, match=r"NLHF_COMPILATION_CACHE must be .*'off'"):
        compilation_cache.enable()


def test_who_sets_the_variable_of_jax_means_it(options, monkeypatch):
    monkeypatch.setenv(compilation_cache.OWN_FOLDER, "/somewhere")
    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    compilation_cache.enable()
    assert folder_in_force() == "/somewhere"
    assert not options.exists()


def test_where_no_folder_can_be_made_the_run_goes_on_and_says_so(
    options, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NLHF_CACHE", str(tmp_path / "file"))
    compilation_cache.enable()
    assert folder_in_force() is None
    said = capsys.readouterr().err
    assert said.startswith("nlhf: compiled programs are not kept: ")
    assert "cannot be written" in said and said.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_read(options, monkeypatch, capsys):
    options.mkdir(parents=True)
    monkeypatch.setattr(compilation_cache, "_unwritable", lambda place: "read-only")
    compilation_cache.enable()
    assert folder_in_force() == str(options)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == float("inf")
    assert capsys.readouterr().err == ""


def entries(folder, sizes):
    """Writes entries, the first one the longest not in use."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        path = folder / f"jit_{number}-key-cache"
        path.write_bytes(b"x" * size)
        os.utime(path, (1000.0 + number, 1000.0 + number))


def packed(program):
    """Returns an entry as JAX packs it."""
    return jax_cache.compress_executable(program)


def cut_off(entry):
    return entry[: len(entry) // 2]


def put(folder, name, content, when):
    path = folder / name
    path.write_bytes(content)
    os.utime(path, (when, when))
    return path


def names(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


def test_within_the_bound_nothing_is_deleted(tmp_path):
    entries(tmp_path, [40, 30, 30])
    compilation_cache.prune(tmp_path, 100)
    assert len(names(tmp_path)) == 3


def test_beyond_it_the_longest_unused_go_until_a_quarter_is_free(tmp_path):
    entries(tmp_path, [40, 30, 30, 20])
    (tmp_path / "notes.txt").write_text("y" * 1000)
    compilation_cache.prune(tmp_path, 100)
    # 120 bytes: 80 are left without the first, 50 without the second.
    assert names(tmp_path) == ["jit_2", "jit_3", "notes.txt"]


def test_one_that_was_read_lately_stays(tmp_path):
    entries(tmp_path, [40, 40, 40])
    first = tmp_path / "jit_0-key-cache"
    os.utime(first, (2000.0, 1000.0))
    compilation_cache.prune(tmp_path, 100)
    assert names(tmp_path) == ["jit_0"]


def test_an_entry_that_cannot_be_read_is_deleted_and_other_warnings_are_shown(
    options, capsys
):
    entries(options, [10, 10])
    cut = cut_off(packed(b"program" * 100))
    old = put(options, "jit_1-bad-cache", cut, 1000.0)
    young = put(options, "jit_1-young-cache", cut, time.time())
    whole = put(options, "jit_1-key-cache", packed(b"program"), 1000.0)
    seen = []
    warnings.showwarning = lambda message, *_: seen.append(str(message))
    compilation_cache.enable()
    compilation_cache.enable()  # the second time hooks nothing more
    for text in (
        "Error reading persistent compilation cache entry for 'jit_1': EOFError: cut",
        "something else",
    ):
        warnings.showwarning(UserWarning(text), UserWarning, "file.py", 1)
    assert not old.exists()
    assert young.exists()  # somebody may be writing it
    assert whole.exists()
    assert names(options) == ["jit_0", "jit_1", "jit_1"]
    assert seen == ["something else"]
    said = capsys.readouterr().err
    assert said == "nlhf: a kept program, jit_1, cannot be read and is compiled again\n"


def test_counts_are_differences():
    later, before = Counts(5, 3, 2.5), Counts(2, 2, 1.0)
    assert later.since(before) == Counts(3, 1, 1.5)
    assert later.since(before).misses == 2


# ------------------------------------------------------------------- the first step


def test_the_first_steps_sentence():
    said = speed.FirstStep(12.34, COST).sentence()
    assert said == "first step after 12.3 s, 8.1 s of them compiling"
    cached = COST._replace(compile_seconds=0.4, cache=Counts(2, 2, 7.0))
    assert speed.FirstStep(3.0, cached).sentence() == (
        "first step after 3.0 s, 0.4 s of them compiling, from the cache, which saved "
        "7.0 s"
    )
    half = COST._replace(cache=Counts(2, 1, 7.0))
    assert "cache" not in speed.FirstStep(3.0, half).sentence()
    assert speed.FirstStep(3.0, None).sentence() == "first step after 3.0 s"


def test_the_first_steps_metrics():
    assert speed.FirstStep(3.0, COST).metrics() == {"time/first_step": 3.0}
    found = speed.FirstStep(3.0, COST._replace(cache=Counts(3, 1, 0.0))).metrics()
    assert found == {
        "time/first_step": 3.0,
        "compile/cache_hits": 1.0,
        "compile/cache_misses": 2.0,
    }
    assert metrics.OF_THE_PROCESS.issuperset(found)


def test_the_time_to_a_first_step_counts_from_the_last_runs_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed, "_began", 0.0)
    speed.begin()
    now[0] += 7.0
    assert speed.waited() == 7.0
    speed.begin()
    assert speed.waited() == 0.0


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="no /proc")
def test_it_counts_from_the_start_of_the_process():
    words = "import time; time.sleep(1.5); from nlhf_jax import speed; "
    done = subprocess.run(
        [sys.executable, "-c", words + "print(speed.waited(), speed._age())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    waited, age = map(float, done.stdout.split())
    assert age > 1.4 and abs(waited - age) < 0.5


def test_where_no_start_is_known_it_counts_from_the_import(monkeypatch):
    for content in ("1 (a b) c) " + "0 " * 40, "", "1 (x) R"):
        monkeypatch.setattr(
            speed.pathlib.Path, "read_text", lambda self, content=content: content
        )
        assert speed._age() == 0.0


def test_the_summary_counts_all_steps_and_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    clock = speed.Clock()
    for _ in range(3):
        now[0] += 20.0
        clock.step_done({"token/count": 100.0})
        clock.read()
        with clock.paused():
            now[0] += 1000.0
    assert clock.summary() == "3 steps in 1:00, 0.05 steps/s, 5 tokens/s"
    clock.cost = COST._replace(num_chips=4)
    assert clock.summary().endswith("5 tokens/s on 4 devices")


# --------------------------------------------------------------- in real processes


def everything_else():
    """Returns the environment without the folder of the tests' own programs."""
    mine = (compilation_cache.OWN_FOLDER, compilation_cache.SWITCH)
    return {name: value for name, value in os.environ.items() if name not in mine}


def run(cache, **variables):
    """Runs the worker; returns what it printed and what it said on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compilation_cache_worker"],
        cwd=ROOT,
        env=everything_else() | {"NLHF_CACHE": str(cache)} | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def cold_and_warm(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return run(cache)[0], run(cache)[0], cache


def first_line(found):
    return found["lines"][0]


@pytest.mark.battery
def test_a_second_process_compiles_nothing(cold_and_warm):
    cold, warm, _ = cold_and_warm
    assert first_line(cold)["compile/cache_misses"] == 1.0
    assert first_line(cold)["compile/cache_hits"] == 0.0
    assert first_line(warm)["compile/cache_misses"] == 0.0
    assert first_line(warm)["compile/cache_hits"] == 1.0
    assert "from the cache" not in "".join(cold["shown"])
    assert sum("from the cache" in line for line in warm["shown"]) == 3


def test_a_run_tells_how_it_began_once_and_how_fast_it_was(cold_and_warm):
    for found in cold_and_warm[:2]:
        assert first_line(found)["time/first_step"] > 0
        assert "time/first_step" not in found["lines"][-1]
        (began,) = [x for x in found["shown"] if x.startswith("toy: first step after")]
        end = found["shown"][-1]
        assert end.startswith("toy: 3 steps in ") and "tokens/s" in end
        assert end.endswith(began.removeprefix("toy: "))


def without_times(found):
    return [
        {k: v for k, v in line.items() if k not in metrics.OF_THE_PROCESS}
        for line in found["lines"]
    ]


@pytest.mark.battery
def test_numbers_are_the_same_cold_warm_and_without_a_cache(cold_and_warm, tmp_path):
    cold, warm, _ = cold_and_warm
    off, _ = run(tmp_path, **{compilation_cache.SWITCH: "off"})
    assert cold["digest"] == warm["digest"] == off["digest"]
    assert without_times(cold) == without_times(warm) == without_times(off)
    assert not any("cache" in name for line in off["lines"] for name in line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.battery
def test_a_damaged_entry_is_compiled_again_and_replaced(cold_and_warm):
    cold, _, cache = cold_and_warm
    (entry,) = (cache / "xla").glob("jit_step_fn-*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(cut_off(whole))
    os.utime(entry, (1000.0, 1000.0))
    found, said = run(cache)
    assert found["digest"] == cold["digest"]
    assert "nlhf: a kept program, jit_step_fn, cannot be read" in said
    assert "Traceback" not in said
    assert len(entry.read_bytes()) > len(whole) // 2
    assert first_line(run(cache)[0])["compile/cache_misses"] == 0.0


JOB = """
include 'configs/runs/sft.gin'
VOCAB_SIZE = 384
T5Settings.emb_dim = 16
T5Settings.num_heads = 2
T5Settings.head_dim = 8
T5Settings.mlp_dim = 16
T5Settings.num_encoder_layers = 1
T5Settings.num_decoder_layers = 1
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 6}
MIXTURE_OR_TASK_NAME = 'jsonl'
VOCABULARY_PATH = 'byte'
BATCH_SIZE = 4
TRAIN_STEPS = 3
"""


@pytest.mark.battery
def test_the_command_line_keeps_programs_and_no_record_tells_of_them(tmp_path):
    rows = [{"prompt": f"say {word}", "target": word} for word in "abcdefgh"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    files = f"TRAIN_FILE = '{tmp_path}/rows.jsonl'\n"
    (tmp_path / "run.gin").write_text(
        JOB + files + files.replace("TRAIN", "EVALUATION")
    )

    def job(name, **variables):
        words = ["sft", f"--gin_file={tmp_path}/run.gin"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "nlhf_jax",
                *words,
                f"--model_dir={tmp_path}/{name}",
            ],
            cwd=ROOT,
            env=everything_else() | {"NLHF_CACHE": str(tmp_path / "cache")} | variables,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        return tmp_path / name, done.stderr

    cold, _ = job("cold")
    warm, said = job("warm")
    off, _ = job("off", **{compilation_cache.SWITCH: "off"})
    assert "from the cache, which saved" in said
    found = metrics.read_metrics(warm)
    assert found["compile/cache_hits"][1].tolist() == [1.0]
    assert found["compile/cache_misses"][1].tolist() == [0.0]
    for other in (warm, off):
        for ours, theirs in zip(
            jax.tree.leaves(checkpoints.load_params(cold)),
            jax.tree.leaves(checkpoints.load_params(other)),
            strict=True,
        ):
            assert ours.tobytes() == theirs.tobytes()
        name = "metrics.jsonl"
        assert (cold / name).read_bytes() == (other / name).read_bytes()
    kept = [
        p for p in cold.rglob("*") if p.is_file() and b"/cache/xla" in p.read_bytes()
    ]
    assert kept == []
