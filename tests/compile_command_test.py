# SPDX-License-Identifier: Apache-2.0
"""`nlhf compile`: what it compiles is what the job runs, and what it refuses."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from nlhf_jax import cli, compile_command, partitioning
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import abstract_batches, plans, programs, runs, train
from nlhf_jax.jobs import compile as compile_job
from nlhf_jax.jobs.judges import LoadedJudge
from nlhf_jax.jobs.policies import Policy
from nlhf_jax.scale import chips, words
from nlhf_jax.settings import MeshSettings

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPE = """
WIDTH = 16
T5Settings.vocab_size = 64
T5Settings.emb_dim = %WIDTH
T5Settings.num_heads = 2
T5Settings.head_dim = 8
T5Settings.mlp_dim = 32
T5Settings.num_encoder_layers = 1
T5Settings.num_decoder_layers = 1
"""
TRAIN = ["--gin_file=configs/algorithms/nash_md_pg.gin", "--gin.BATCH_SIZE=8"]
TRAIN += ["--gin.MAX_DECODE_LENGTH=3"]
TRAIN += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 5, 'targets': 3}"]
CPU = ["--job=train", "--cpu_devices=1", *TRAIN]


@pytest.fixture
def shape(tmp_path) -> str:
    """Returns the path of a toy network's gin file."""
    path = tmp_path / "toy.gin"
    path.write_text(SHAPE)
    return str(path)


@pytest.fixture
def models(shape) -> list[str]:
    return [f"--reference_model={shape}", f"--preference_model={shape}"]


def test_bindings_are_those_of_the_job(shape):
    found = compile_command.resolve("train", TRAIN, ["reference_checkpoint"])
    assert found["loop"].batch_size == 8
    assert found["algorithm"].name == "nash_md_pg"
    assert (found["model_dir"], found["reference_checkpoint"]) == ("", "")
    assert compile_command.read_shape(shape).emb_dim == 16


def program(models_dir, shape) -> programs.Program:
    settings = compile_command.read_shape(shape)
    bindings = compile_command.resolve("train", TRAIN, ["reference_checkpoint"])
    given = {"reference_model": settings, "preference_model": settings}
    return programs.program("train", bindings, given)


@pytest.mark.battery
def test_what_is_compiled_is_what_the_job_runs(shape, tmp_path, monkeypatch):
    """The job is run up to its loop, with random models; the programs are equal."""
    one = program(tmp_path, shape)
    settings = compile_command.read_shape(shape)
    key = jax.random.key(0)
    network = one.network
    params = network.init(key)
    captured = {}

    def load_judge(**named):
        del named
        model = programs._judge_network(
            "preference", programs.Model(settings), 5, 3, one.memory, programs.WHOLE
        )
        judge = programs.learned_judge(model, None)
        axes = {"preference": model.logical_axes}
        return LoadedJudge(judge, {"preference": model.init(key)}, axes)

    class Prompts(train.data_batches.SupervisedData):
        num_truncated_prompts = 0

        def __init__(self):
            pass

    description = train.folders.ModelDescription(
        "language_model", settings, {"inputs": 5, "targets": 3}, "byte"
    )
    policy = Policy(description, network, params, None, "byte")
    monkeypatch.setattr(train.folders, "check_same_vocabulary", lambda *_: None)
    monkeypatch.setattr(train, "load_policy", lambda *_: policy)
    monkeypatch.setattr(train.judges, "load_judge", load_judge)
    monkeypatch.setattr(train.data_batches, "load_supervised", lambda *_: Prompts())
    monkeypatch.setattr(train, "HeldOut", lambda *_, **__: lambda state: {})
    begin = runs.initial_state
    monkeypatch.setattr(
        runs, "initial_state", lambda init, _, *rest: begin(init, "", *rest)
    )

    def run(training, *, initial_state, **_):
        captured["run"] = training, initial_state.shapes
        return initial_state.shapes

    monkeypatch.setattr(runs, "run", run)
    bindings = compile_command.resolve("train", TRAIN, ["reference_checkpoint"])
    bindings |= {"model_dir": str(tmp_path / "run"), "preference_checkpoint": "judge"}
    train.train(**bindings)
    training, state = captured["run"]
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (state, dict(training.frozen)),
    )
    assert (one.state, one.frozen) == abstract
    mesh = partitioning.make_mesh(MeshSettings())
    step = runs._FrozenStep(training, state, mesh)
    lowered = step._step.lower(state, step._frozen, one.batch, key)
    assert one.trace(mesh).lower().as_text() == lowered.as_text()


KEYS = {
    "job",
    "target",
    "num_devices",
    "mesh",
    "batch_size",
    "num_microbatches",
    "rows_per_device",
    "prompt_length",
    "response_length",
    "remat",
    "source",
    "memory",
    "compile",
    "flops",
    "bytes_moved",
    "collectives",
    "fits",
    "planned",
}


@pytest.mark.battery
def test_eight_fake_devices(models):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    command = [sys.executable, "-X", "faulthandler", "-m", "nlhf_jax", "compile"]
    command += ["--job=train", "--cpu_devices=8", "--json", "--gin.FSDP=2"]
    done = subprocess.run(
        [*command, "--gin.TENSOR=2", *TRAIN, *models],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == KEYS
    assert found["mesh"] == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert (found["num_devices"], found["rows_per_device"]) == (8, 2)
    assert found["fits"] is None
    memory = found["memory"]
    held = sum(memory["parts"].values()) - memory["parts"]["caches"]
    # Besides those: the batch, the key and the step.
    assert held < memory["arguments"] < held + 2000
    kinds = {(one["kind"], one["group_size"]) for one in found["collectives"]}
    assert any(kind == "all-gather" and size == 2 for kind, size in kinds)
    assert found["flops"] > 0
    assert found["compile"]["compile_seconds"] > 0


@pytest.mark.battery
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler: libtpu is not installed (requirements-tpu.lock)",
)
def test_the_tpu_compiler_takes_the_step(models):
    command = [sys.executable, "-X", "faulthandler", "-m", "nlhf_jax", "compile"]
    command += ["--job=train", "--topology=v5e:2x2", "--json", "--gin.FSDP=2"]
    done = subprocess.run(
        [*command, *TRAIN, *models],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == KEYS | {"roofline"}
    assert found["fits"] is True
    assert found["memory"]["usable"] == chips.CHIPS["v5e"].usable_bytes
    assert found["roofline"]["step_seconds"] > 0
    assert found["num_devices"] == 4


def test_the_plan_needs_no_compiler(models, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(compile_job.needs, "compile_traced", refuse)
    assert cli.main(["compile", *CPU, *models, "--plan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["planned"]
    assert set(found) == KEYS - {"compile", "bytes_moved", "collectives"}


SUPERVISED = ["--cpu_devices=1", "--gin.BATCH_SIZE=8", "--gin.TASK_FEATURE_LENGTHS="]
SUPERVISED[-1] += "{'inputs': 5, 'targets': 3}"


@pytest.mark.parametrize("job", ["sft", "preference", "reward"])
def test_every_supervised_job(job, shape, capsys):
    extra = [] if job == "sft" else ["--gin.TRAIN_FILE=a.jsonl"]
    file = f"--gin_file=configs/runs/{job}.gin"
    words_ = [f"--job={job}", file, f"--model={shape}", *SUPERVISED, *extra]
    assert cli.main(["compile", *words_, "--plan"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{job} on cpu:1: 1 devices")
    assert "optimiser" in out
    assert "caches" not in out


# ----------------------------------------------------------------------- what is wrong


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["compile", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


TOPOLOGY = ["--job=train", *TRAIN]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cpu_devices=8"], "compile needs --job=JOB"),
        (["--job=trian", "--cpu_devices=8"], "did you mean 'train'"),
        (["--job=train", "--cpu_devices=eight"], "an integer in [1, 65536], got 'ei"),
        (["--job=train", "--cpu_devices=0"], "an integer in [1, 65536], got '0'"),
        (["--job=train", "--cpu_devices=65537"], "65536], got '65537'"),
        (["--job=train", "--cpu_devices=٣"], "65536], got '٣'"),
        (["--job=train", "--cpu_device=8"], "--cpu_device (did you mean 'cpu_devices"),
        (["--job=train", "--topology"], "--topology needs a value"),
        (["--job=train", "--job=sft"], "--job is given twice"),
        (["--job=train", "--fit=yes", "--cpu_devices=1"], "--fit takes no value"),
        (["--job=sft", "--cpu_devices=1", "--reward_model=x"], "reads no --reward_mod"),
        ([*TOPOLOGY, "--topology=v5e:4x4", "--cpu_devices=8"], "got both"),
        (TOPOLOGY, "got neither"),
    ],
)
def test_flags_that_make_no_sense(arguments, complaint, capsys):
    assert complaint in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("topology", "complaint"),
    [
        ("v5e:16x61", "did you mean 'v5e:16x16'"),
        ("v5x:4x4", "no chip 'v5x' (did you mean 'v5e:4x4'"),
        ("v4:4x4", "v4 has 3 axes"),
        ("pod", "it must be CHIP:SHAPE"),
    ],
)
def test_unknown_topologies_name_the_nearest(topology, complaint, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda _: object())

    class Topologies:
        @staticmethod
        def get_topology_desc(**_):
            raise RuntimeError("INVALID_ARGUMENT: no such layout\nmore")

    monkeypatch.setattr("jax.experimental.topologies", Topologies, raising=False)
    monkeypatch.setitem(sys.modules, "jax.experimental.topologies", Topologies)
    with pytest.raises(UserError) as caught:
        chips.tpu(topology)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_tpu_compiler_it_says_how_to_get_it(models, capsys, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda _: None)
    line = refused(capsys, *TOPOLOGY, *models, "--topology=v5e:4x4")
    assert "pip install --require-hashes -r requirements-tpu.lock" in line
    assert (ROOT / "requirements-tpu.lock").is_file()


def test_models_that_are_not_there(models, shape, capsys):
    line = refused(capsys, *CPU, models[0], "--preference_model=configs/models/xl.gin")
    assert "'configs/models/xl.gin'" in line
    folder = "--gin.PREFERENCE_CHECKPOINT=nowhere"
    line = refused(capsys, *CPU, models[0], folder)
    assert "'nowhere' is not known" in line
    assert "--preference_model=" in line


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("A = 1\n", "binds no T5Settings"),
        ("T5Settings.vocab_size = %V\n", "the macro %V is not defined"),
        ("A = %B\nB = %A\nT5Settings.vocab_size = %A\n", "is defined by itself"),
        ("T5Settings.vocab_size = 3\n", "missing a required argument"),
        ("T5Settings.vocab_size = abc\n", "is not a literal: abc"),
        (SHAPE.replace("= 64", "= 0"), "vocab_size must be an integer of at least 1"),
    ],
)
def test_files_that_are_no_shape(text, complaint, tmp_path):
    (tmp_path / "bad.gin").write_text(text)
    with pytest.raises(UserError, match=complaint.replace("%", "%")):
        compile_command.read_shape(str(tmp_path / "bad.gin"))


def test_a_mesh_that_does_not_divide(models, capsys, monkeypatch):
    assert "must use all 1 devices" in refused(capsys, *CPU, *models, "--gin.FSDP=2")


def test_too_many_devices_for_a_jax_that_has_started():
    with pytest.raises(UserError, match="cpu_devices must be at most"):
        chips.cpu(len(jax.devices("cpu")) + 1)


# ------------------------------------------------------------- the largest, and advice


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 17, 100])
def test_the_largest_that_fits(limit):
    # A bend makes the line through the first two a bad guess.
    needed = lambda n: 10.0 * n + (500.0 if n > 5 else 0.0)  # noqa: E731
    usable = needed(limit) if limit else 9.0
    assert compile_job.largest(needed, usable) == limit


def test_a_need_that_grows_without_saying_how():
    needed = lambda n: 10.0 * n if n <= 6 else float("inf")  # noqa: E731
    assert compile_job.largest(needed, 1000.0) == 6


def found(**changes):
    base = {
        "memory": {"parts": {"parameters": 1, "caches": 50}, "usable": 10, "total": 20},
        "mesh": {"fsdp": 2, "tensor": 4},
        "rows_per_device": 4,
        "num_microbatches": 1,
        "remat": "none",
        "fits": False,
    }
    return base | changes


def test_advice_names_what_takes_the_room():
    large = {"parts": {"parameters": 6}, "usable": 10, "total": 20}
    assert "raise FSDP from 2" in words.advice(found(memory=large))
    assert "raise NUM_MICROBATCHES from 1" in words.advice(found())
    one = {"rows_per_device": 1}
    assert "REMAT" in words.advice(found(**one))
    assert "raise TENSOR from 4" in words.advice(found(**one, remat="full"))


def test_verdicts():
    assert words.verdict(found()).startswith("does not fit: 20 B of 10 B a chip; 4 row")
    assert words.verdict(found(fits=True)) == "fits: 20 B of 10 B a chip (200%)"
    assert "no chip" in words.verdict(found(fits=None))


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3 B"), (2048, "2.00 KiB"), (3 * 2**30, "3.00 GiB")]
)
def test_sizes(value, text):
    assert words.size(value) == text


def test_shapes_of_parameters_are_made_once(shape, tmp_path):
    program(tmp_path, shape)
    before = abstract_batches._made_by.cache_info()
    # The search for the largest batch builds the program anew for each size.
    program(tmp_path, shape)
    after = abstract_batches._made_by.cache_info()
    assert after.misses == before.misses
    assert after.hits > before.hits


def test_plans_count_arguments_exactly(shape, tmp_path):
    one = program(tmp_path, shape)
    mesh = partitioning.make_mesh(MeshSettings(), jax.devices("cpu")[:1])
    bindings = compile_command.resolve("train", TRAIN, ["reference_checkpoint"])
    settings = compile_command.read_shape(shape)
    given = {"reference_model": settings, "preference_model": settings}
    planned = plans.plan("train", bindings, given, mesh, one)
    leaves = jax.tree.leaves((one.state, one.frozen, one.batch))
    assert planned.arguments == sum(x.size * x.dtype.itemsize for x in leaves)
    assert planned.flops.once > 0
    assert planned.flops.per_iteration > 0
