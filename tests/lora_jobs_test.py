# SPDX-License-Identifier: Apache-2.0
"""Every training job with adapters: what moves, what is written, what is read."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from nlhf_jax import algorithms, checkpoints, manifests, partitioning
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import adapters, folders, programs, trained
from nlhf_jax.jobs import compile as compile_job
from nlhf_jax.jobs.judges import load_judge
from nlhf_jax.jobs.policies import load_policy
from nlhf_jax.jobs.supervised import preference, reward, sft
from nlhf_jax.jobs.train import train
from nlhf_jax.models.adapters import adapted_paths, merged, num_parameters
from nlhf_jax.models.families import language_model
from nlhf_jax.settings import LoraSettings, MemorySettings, MeshSettings
from nlhf_jax.types import PromptBatch, Responses
from tests.decoder_only_toys import shape
from tests.jobs_pipeline_test import (
    ADAM,
    LENGTHS,
    MODEL,
    WORDS,
    data_in,
    read_rows,
    steps,
    write_lines,
)

pytestmark = [pytest.mark.usefixtures("compiled_quickly"), pytest.mark.battery]

LORA = LoraSettings(rank=2, alpha=4.0, targets=("query", "value", "wo"))
LLAMA = (
    shape(1, vocab_size=384) if False else dataclasses.replace(shape(1), vocab_size=384)
)


def write_base(folder, settings):
    """Writes a whole model with random weights."""
    description = folders.ModelDescription("language_model", settings, LENGTHS)
    folders.describe(folder, description, "byte")
    params = language_model(settings).init(jax.random.key(0))
    checkpoints.save_params(folder / "checkpoints", params, "float32")
    return folder


def comparisons_in(folder):
    rows = [
        {"prompt": w, "response_a": w, "response_b": w[::-1], "preference": i % 2}
        for i, w in enumerate(WORDS)
    ]
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "evaluation.jsonl", rows[:4])
    return str(folder)


class Work:
    """A folder with a base and data, and the jobs on them."""

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, settings
        self.data, self.base = data_in(folder), write_base(folder / "base", settings)
        (folder / "comparisons").mkdir()
        self.comparisons = comparisons_in(folder / "comparisons")

    def sft(self, name="sft", count=2, **changes):
        fields = {"initial_checkpoint_path": str(self.base), "lora": LORA}
        fields |= {"loop": steps(count), "data": self.data, "optimizer": ADAM}
        sft(
            model_dir=str(self.folder / name),
            model=self.settings,
            num_eval_examples=2,
            **(fields | changes),
        )
        return self.folder / name

    def judge(self, job, count=2, **changes):
        fields = {"initial_checkpoint_path": str(self.base), "lora": LORA}
        fields |= {"loop": steps(count), "data": self.data, "optimizer": ADAM}
        job(
            model_dir=str(self.folder / job.__name__),
            comparisons_dir=self.comparisons,
            num_eval_examples=4,
            **(fields | changes),
        )
        return self.folder / job.__name__

    def train(self, name, algorithm, count=2, **changes):
        fields = {"reference_checkpoint": str(self.base), "lora": LORA}
        fields |= {"loop": steps(count), "data": self.data, "optimizer": ADAM}
        fields |= {"preference_checkpoint": str(self.folder / "preference")}
        train(
            model_dir=str(self.folder / name),
            algorithm=algorithm,
            num_eval_examples=2,
            num_gap_samples=0,
            **(fields | changes),
        )
        return self.folder / name


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    one = Work(tmp_path_factory.mktemp("lora"), LLAMA)
    one.judge(preference)
    return one


def stored(folder, step=2):
    """Returns a checkpoint's arrays by name, as its manifest has them."""
    return manifests.read(folder / "checkpoints" / str(step))["arrays"]


def losses_of(folder):
    """Returns the metrics of each step."""
    return [row for row in read_rows(folder) if "loss/policy" in row]


def shapes_of(settings):
    return jax.eval_shape(language_model(settings).init, jax.random.key(0))


def assert_holds_adapters_alone(folder, settings, sets=1):
    """Moments are the adapters' too: for Adam, two of each."""
    arrays = {k: v for k, v in stored(folder).items() if v["shape"]}
    assert all(name.endswith(("lora_a", "lora_b")) for name in arrays)
    paths = adapted_paths(shapes_of(settings), LORA.targets)
    assert len(arrays) == 2 * len(paths) * (sets + 2)
    assert max(min(a["shape"]) for a in arrays.values()) == LORA.rank


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- each job: what moves


def test_a_preference_model_of_adapters(work):
    folder = work.folder / "preference"
    assert_holds_adapters_alone(folder, LLAMA)
    judge = load_judge(preference_checkpoint=str(folder))
    base = checkpoints.load_params(work.base)
    moved = jax.tree.map(
        lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))),
        judge.frozen["preference"],
        base,
    )
    assert sum(jax.tree.leaves(moved)) == len(adapted_paths(base, LORA.targets))


@pytest.mark.parametrize(
    "name, algorithm, sets",
    [
        ("nash_md_pg", algorithms.nash_md_pg(tau=0.1, beta=0.25), 1),
        pytest.param(
            "self_play",
            algorithms.self_play(tau=0.1),
            1,
            marks=pytest.mark.battery,
        ),
        pytest.param(
            "nash_ema_pg",
            algorithms.nash_ema_pg(tau=0.1, decay=0.5),
            2,
            marks=pytest.mark.battery,
        ),
    ],
)
def test_training_moves_adapters_only_and_goes_on(work, name, algorithm, sets):
    before = (work.base / "checkpoints" / "params.safetensors").read_bytes()
    folder = work.train(name, algorithm)
    assert_holds_adapters_alone(folder, LLAMA, sets)
    rows = losses_of(folder)
    assert [row["step"] for row in rows] == [1, 2]
    # The policy starts at its reference.
    assert rows[0]["policy/kl"] == 0.0 < abs(rows[1]["policy/kl"])
    if name == "nash_md_pg":
        work.train(name, algorithm, 3)
        assert [row["step"] for row in losses_of(folder)] == [1, 2, 3]
        work.train("whole", algorithm, 3)
        assert stored(folder, 3) == stored(work.folder / "whole", 3)
    after = (work.base / "checkpoints" / "params.safetensors").read_bytes()
    assert before == after


@pytest.mark.battery
def test_a_t5_with_all_that_saves_memory(work, tmp_path):
    memory = MemorySettings(
        remat="full", scan_layers=True, frozen_dtype="bfloat16", num_vocab_chunks=2
    )
    one = Work(tmp_path, MODEL)
    how = {"memory": memory, "loop": steps(2, num_microbatches=2)}
    policy = one.sft(**how)
    assert_holds_adapters_alone(policy, MODEL)
    folder = one.train(
        "nash",
        algorithms.nash_md_pg(tau=0.1, beta=0.25),
        reference_checkpoint=str(policy),
        preference_checkpoint=str(work.folder / "preference"),
        **how,
    )
    # It goes on with the adapters that its reference has.
    assert folders.description_of(folder).base == folders.description_of(policy).base
    assert losses_of(folder)[0]["policy/kl"] == 0.0


@pytest.mark.battery
def test_a_reward_model_of_adapters(work):
    assert_holds_adapters_alone(work.judge(reward), LLAMA)


@pytest.mark.battery
def test_a_judge_of_adapters_shares_the_base_of_the_policy(work):
    """It says what it says when it is merged, and is no second copy."""
    digest = folders.description_of(work.folder / "preference").base_digest
    base = checkpoints.load_params(work.base)
    named = {"preference_checkpoint": str(work.folder / "preference")}
    shared = load_judge(**named, shared=(digest, base))
    assert {*shared.frozen} == {"base", "preference"}
    assert shared.frozen["base"] is base
    assert {*shared.frozen["preference"]["layers_0"]} == {"attention", "mlp"}
    apart = load_judge(**named, shared=("another base", base))
    assert {*apart.frozen} == {"preference"}
    prompts = PromptBatch(np.full((2, 5), 70, np.int32), np.ones((2, 5), bool))
    answers = [
        Responses(np.full((2, 4), token, np.int32), np.ones((2, 4), bool))
        for token in (80, 90)
    ]
    found = shared.preferences(prompts, *answers)
    assert abs(found - 0.5).max() > 1e-4
    np.testing.assert_allclose(found, apart.preferences(prompts, *answers), atol=1e-5)


def test_a_plan_counts_a_shared_base_once(work):
    """What a plan says of frozen sets is what the job would hold of them."""
    described = folders.ModelDescription("language_model", LLAMA, LENGTHS)
    on = adapters.stand_on(str(work.base), LORA).describes(described)
    folders.describe(work.folder / "described", on, "byte")
    found = programs.program(
        "train",
        {
            "model_dir": "",
            "algorithm": algorithms.nash_md_pg(tau=0.1, beta=0.25),
            "data": work.data,
            "optimizer": ADAM,
            "loop": steps(2),
            "lora": LORA,
            "reference_checkpoint": str(work.folder / "described"),
            "preference_checkpoint": str(work.folder / "preference"),
        },
        {},
    )
    sizes = {name: num_parameters(tree) for name, tree in found.frozen.items()}
    mine = num_parameters(found.state.param_sets["params"])
    assert sizes["reference"] == sizes["preference"] == mine < sizes["base"] / 10
    mesh = partitioning.make_mesh(MeshSettings(), jax.devices()[:1])
    parts = compile_job.parts_of(found, mesh)
    assert parts["frozen base"] == 4 * sizes["base"]
    assert parts["caches"] > 0
    assert found.jaxpr().in_avals


# --- what is written, and what others read


@pytest.fixture(scope="module")
def policy(work):
    return work.sft()


def test_the_folder_names_its_base(work, policy):
    found = folders.description_of(policy)
    assert found.lora == LORA
    assert found.base == str(work.base / "checkpoints" / "params.safetensors")
    assert len(found.base_digest) == 32
    fields = json.loads((policy / "model.json").read_text())
    assert fields["lora"]["targets"] == list(LORA.targets)
    assert "lora" not in json.loads((work.base / "model.json").read_text())


def test_a_folder_of_adapters_is_a_model_like_any_other(work, policy):
    loaded = load_policy(str(policy)).params
    base = checkpoints.load_params(work.base)
    on = checkpoints.load_params(policy)
    assert {*on["layers_0"]["attention"]} == {"query", "value"}
    assert_same(loaded, merged(base, on, LORA))
    assert not np.array_equal(
        loaded["layers_0"]["mlp"]["wo"]["kernel"],
        base["layers_0"]["mlp"]["wo"]["kernel"],
    )
    assert load_policy(str(policy / "checkpoints" / "2")).params is not None


def test_the_reference_of_adapters_is_its_adapters_on_its_base(work, policy):
    stand = adapters.stand_on(str(policy), LORA)
    assert stand.start == str(policy)
    assert stand.base == str(work.base / "checkpoints" / "params.safetensors")
    other = dataclasses.replace(LORA, rank=3)
    merged_into_a_base = adapters.stand_on(str(policy), other)
    assert (merged_into_a_base.start, merged_into_a_base.lora) == ("", other)
    assert merged_into_a_base.base == str(policy / "checkpoints" / "2")
    of_this = dataclasses.replace(stand, reference_digest=stand.start_digest)
    assert adapters.starts_at(stand, str(policy)) == of_this
    with pytest.raises(UserError, match="initial_checkpoint_path must hold LoraS"):
        adapters.starts_at(stand, str(work.base))


def test_all_weights_trained_from_adapters_are_a_whole_model(work, policy):
    """The reference's folder has adapters; the run's folder says of none."""
    network = language_model(LLAMA)
    whole = trained.whole(network, str(policy), 0, lambda params: params)
    described = folders.description_of(policy)
    whole.describe(work.folder / "full", described, "byte")
    found = folders.description_of(work.folder / "full")
    assert (found.lora, found.base, found.base_digest) == (None, "", "")
    assert jax.tree.structure(whole.start.params) == jax.tree.structure(
        load_policy(str(policy)).params
    )


# --- mistakes


def test_a_base_that_has_gone_or_changed_is_named(work, policy, tmp_path):
    copy = tmp_path / "policy"
    shutil.copytree(policy, copy)
    file = copy / "model.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"base": "/no/such/base"}))
    with pytest.raises(UserError, match=r"stand on '/no/such/base', which does not"):
        load_policy(str(copy))
    other = write_base(tmp_path / "other", dataclasses.replace(LLAMA, num_layers=2))
    file.write_text(json.dumps(fields | {"base": str(other)}))
    with pytest.raises(UserError, match=r"stand on .*which has changed since"):
        load_policy(str(copy))
    # Nor does training go on from it.
    lora = folders.description_of(policy).lora
    with pytest.raises(UserError, match=r"stand on .*which has changed since"):
        adapters.stand_on(str(copy), lora)


def test_a_run_does_not_go_on_with_other_adapters(work, policy):
    with pytest.raises(UserError, match=r"was trained with LoraSettings\(rank=2.*got"):
        work.sft(lora=dataclasses.replace(LORA, rank=1))
    with pytest.raises(UserError, match=r"was trained with LoraSettings.*no adapters"):
        work.sft(lora=None)


def test_adapters_need_a_base(work):
    with pytest.raises(UserError, match="with lora, initial_checkpoint_path must name"):
        work.sft("new", initial_checkpoint_path="")
    assert not (work.folder / "new").exists()


def test_an_unknown_target_leaves_no_folder(work):
    with pytest.raises(UserError, match=r"targets must be one of .* got 'qeury'"):
        work.sft("new", lora=LoraSettings(targets=("qeury",)))
    assert not (work.folder / "new").exists()
