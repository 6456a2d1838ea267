# SPDX-License-Identifier: Apache-2.0
"""Jobs in one, two and four real processes: the same rows, numbers and checkpoints."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from nlhf_jax import checkpoints, metrics
from nlhf_jax.data import batches
from tests import process_toys
from tests.jobs_test import RUN, TINY, WORDS, read_lines, write_lines

WORKER = process_toys.ROOT / "tests" / "processes_worker.py"
BATCH, SECONDS = 8, 400
LAID_OUT = {1: 4, 2: 2, 4: 1}  # processes -> devices of each, always four in all
battery = pytest.mark.battery
slow = pytest.mark.timeout(1500)  # the runs before a test are made in its fixtures
LOOP = f"""
BATCH_SIZE = {BATCH}
LoopSettings.log_period = 1
LoopSettings.checkpoint_period = 2
LoopSettings.keep_checkpoints = 9
OptimizerSettings.schedule = 'constant'
OptimizerSettings.warmup_steps = 0
"""


# ----------------------------------------------------------------------- the jobs


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Returns a folder with gin files and data."""
    folder = tmp_path_factory.mktemp("processes")
    targets = [{"prompt": f"say {word}", "target": word[:4]} for word in WORDS]
    pairs = [
        {"prompt": f"say {w}", "response_a": w[:4], "response_b": "no", "preference": p}
        for w, p in zip(WORDS, np.linspace(0.2, 1.0, len(WORDS)), strict=True)
    ]
    for name in ("train", "evaluation"):
        write_lines(folder / f"sft_{name}.jsonl", targets)
        write_lines(folder / f"preference_{name}.jsonl", pairs)

    def write(name, include, data, more):
        files = (
            f"TRAIN_FILE = '{folder}/{data}_train.jsonl'\n"
            f"EVALUATION_FILE = '{folder}/{data}_evaluation.jsonl'\n"
        )
        text = f"include '{include}'\n{more}{RUN}{LOOP}{files}"
        (folder / f"{name}.gin").write_text(text)

    write("sft", "configs/runs/sft.gin", "sft", TINY)
    write("preference", "configs/runs/preference.gin", "preference", TINY)
    nash = (
        "MAX_DECODE_LENGTH = 4\ntrain.num_eval_examples = 4\n"
        "train.num_gap_samples = 2\n"
    )
    write("train", "configs/algorithms/nash_md_pg.gin", "sft", nash)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLHF_CACHE", str(folder / "cache"))
        yield folder


def words_for(work, job, name, steps, *more, **macros):
    macros = {"MODEL_DIR": work / name} | macros
    given = [f"--gin.{key}='{value}'" for key, value in macros.items()]
    file = f"--gin_file={work / job}.gin"
    return [job, file, f"--gin.TRAIN_STEPS={steps}", *given, *more]


def run_in(num_processes, work, job, name, steps, *more, **macros):
    """Runs a job in some processes on four devices; returns what each of them took."""
    process_toys.run_together(
        work / "logs" / name,
        num_processes,
        [WORKER, work / name, *words_for(work, job, name, steps, *more, **macros)],
        devices=LAID_OUT[num_processes],
        seconds=SECONDS,
    )
    paths = [pathlib.Path(f"{work / name}.{n}.json") for n in range(num_processes)]
    return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def sft(work):
    """Six steps in one and in two processes, four of them in four."""
    plan = {1: ("sft_1", 6), 2: ("sft_2", 6), 4: ("sft_4", 4)}
    return {
        number: (work / name, run_in(number, work, "sft", name, steps))
        for number, (name, steps) in plan.items()
    }


@pytest.fixture(scope="module")
def preference(work, sft):
    start = {"INITIAL_CHECKPOINT_PATH": sft[1][0]}
    found = run_in(1, work, "preference", "preference_1", 3, **start)
    return {1: (work / "preference_1", found)}


@pytest.fixture(scope="module")
def nash(work, sft, preference):
    """Three steps of Nash-MD; two processes each hold a half of the parameters."""
    given = {
        "REFERENCE_CHECKPOINT": sft[1][0],
        "PREFERENCE_CHECKPOINT": preference[1][0],
    }
    meshes = {1: (), 2: ("--gin.FSDP=4",)}
    return {
        number: (
            work / f"nash_{number}",
            run_in(number, work, "train", f"nash_{number}", 3, *more, **given),
        )
        for number, more in meshes.items()
    }


def same_parameters(one, other):
    """Asserts that two folders hold the same numbers, sums in another order apart."""
    ours, theirs = (checkpoints.load_params(folder) for folder in (one, other))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, theirs
    )


def moved(folder, start):
    """Returns how far the parameters have gone from those of another folder."""
    ours, theirs = (checkpoints.load_params(path) for path in (folder, start))
    far = jax.tree.map(lambda a, b: float(abs(a - b).max()), ours, theirs)
    return max(jax.tree.leaves(far))


@battery
@slow
def test_sft_in_processes_ends_where_one_does(sft):
    same_parameters(sft[2][0], sft[1][0])
    same_parameters(sft[4][0], sft[1][0] / "checkpoints" / "4")
    assert moved(sft[1][0], sft[1][0] / "checkpoints" / "2") > 1e-4


@battery
@slow
def test_nash_md_in_processes_ends_where_one_does(nash, sft):
    same_parameters(nash[2][0], nash[1][0])
    assert moved(nash[1][0], sft[1][0]) > 1e-4


@battery
@slow
def test_metrics_and_answers_are_those_of_one_process(nash):
    one, other = (read_lines(nash[n][0] / "metrics.jsonl") for n in (1, 2))
    assert [row["step"] for row in other] == [row["step"] for row in one]
    for ours, theirs in zip(other, one, strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            # The compiler may make another program for another number of processes.
            if name not in {*metrics.TIMES, "compute/flops_per_step"}:
                np.testing.assert_allclose(
                    ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name
                )
    answers = "samples/held_out/3.npz"
    with np.load(nash[1][0] / answers) as a, np.load(nash[2][0] / answers) as b:
        np.testing.assert_array_equal(a["tokens_BT"], b["tokens_BT"])


@battery
@slow
def test_each_process_takes_its_own_rows_only(sft, preference, nash):
    data_orders = {"sft": sft, "preference": preference, "nash": nash}
    for name, runs in data_orders.items():
        for number, (_, found) in runs.items():
            share = BATCH // number
            for process, one in enumerate(found):
                mine = list(range(process * share, (process + 1) * share))
                for part in one["taken"]:
                    assert part["rows"] == mine, (name, number)
                    assert part["examples"] == order(part["step"])[mine].tolist()
            assert len(found[0]["taken"]) >= 3


def order(step):
    """Returns the examples of a whole batch, from the definition."""
    return batches.example_order(0, step, BATCH, len(WORDS))[1]


@battery
@slow
def test_the_step_is_compiled_once_in_every_process(sft, preference, nash):
    for runs in (sft, preference, nash):
        for _, found in runs.values():
            for one in found:
                assert set(one["compilations"]) == {1}
                assert len(one["compilations"]) >= 3


@battery
@slow
def test_one_process_writes_what_is_no_checkpoint(sft, nash):
    cases = ((2, sft, sft[1][0]), (4, sft, sft[1][0]), (2, nash, nash[1][0]))
    for number, runs, alone in cases:
        folder, found = runs[number]
        for file in ("metrics.jsonl", "config.gin", "versions.json", "model.json"):
            assert (folder / file).is_file()
        assert len(list((folder / "tensorboard").iterdir())) == 1
        assert not list(folder.rglob("*.partial"))
        kinds = {path.name for path in folder.iterdir()}
        assert kinds == {path.name for path in alone.iterdir()}
        logs = [
            (folder.parent / "logs" / folder.name / f"{n}.log").read_text()
            for n in range(len(found))
        ]
        shown = ["left" in log for log in logs]
        assert shown == [True] + [False] * (number - 1)


@battery
@slow
def test_every_process_writes_its_part_of_a_checkpoint(sft, nash):
    for number, folder, step in ((4, sft[4][0], 4), (2, nash[2][0], 3)):
        (state,) = (folder / "checkpoints" / str(step)).glob("state")
        parts = {path.name for path in state.glob("ocdbt.process_*")}
        assert parts == {f"ocdbt.process_{n}" for n in range(number)}


@battery
@slow
@pytest.mark.parametrize("number", [1, 2])
def test_a_checkpoint_of_four_processes_goes_on_in_fewer(work, sft, number):
    name = f"sft_4_then_{number}"
    shutil.copytree(sft[4][0], work / name)
    run_in(number, work, "sft", name, 6)
    steps = sorted(int(p.name) for p in (work / name / "checkpoints").iterdir())
    assert steps == [2, 4, 6]
    same_parameters(work / name, sft[1][0])
    (line,) = [
        text
        for text in (work / "logs" / name / "0.log").read_text().splitlines()
        if "continuing" in text
    ]
    assert f"sft: continuing from step 4 in {work / name}" in line
    rows = [row["step"] for row in read_lines(work / name / "metrics.jsonl")]
    assert sorted(set(rows)) == [0, 1, 2, 3, 4, 5, 6]
