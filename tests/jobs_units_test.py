# SPDX-License-Identifier: Apache-2.0
"""Parts of the jobs by themselves: folders, fixed-shape decoding, votes."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.data import tasks, vocabularies
from nlhf_jax.jobs import (
    collect,
    evaluate,
    first_states,
    folders,
    generation,
    runs,
    supervised,
)
from nlhf_jax.preferences.raters import RaterPopulation
from nlhf_jax.settings import DataSettings, SamplingSettings
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import POLICY, REFERENCE, PromptBatch, Responses
from tests.lora_peft_test import LLAMA
from tests.supervised_toys import supervised_batch, toy_language_model

pytestmark = pytest.mark.timeout(60)

SHAPE = T5Settings(384, 8, 1, 8, 8, 1, 1, mlp_activations=("relu",))
DESCRIPTION = folders.ModelDescription(
    "reward", SHAPE, {"inputs": 5, "targets": 3}, folders.VOCABULARY_FILE
)


# --------------------------------------------------------------------------- folders


def test_a_description_survives_json():
    assert folders.ModelDescription.from_json(DESCRIPTION.to_json()) == DESCRIPTION


def test_a_folder_is_found_from_its_checkpoints_and_steps(tmp_path):
    folders.describe(tmp_path, DESCRIPTION, "byte")
    step = tmp_path / "checkpoints" / "7"
    step.mkdir(parents=True)
    for path in (tmp_path, step.parent, step, str(step)):
        assert folders.find_model_dir(path) == tmp_path
        assert folders.kind_of(path) == "reward"


def test_sft_takes_the_shape_of_what_it_starts_from(tmp_path):
    folders.describe(tmp_path, DESCRIPTION, "byte")
    shape_of = first_states.settings_of
    assert shape_of(None, str(tmp_path)) == SHAPE
    assert shape_of(SHAPE, "") == SHAPE
    dropping = dataclasses.replace(SHAPE, dropout_rate=0.1, dtype="bfloat16")
    assert shape_of(dropping, str(tmp_path)) == dropping
    # A switch of the same sizes is another network, which the arrays don't tell.
    other = dataclasses.replace(SHAPE, logits_via_embedding=True)
    with pytest.raises(
        UserError, match=r"logits_via_embedding of sft\.model must be .* got"
    ):
        shape_of(other, str(tmp_path))
    with pytest.raises(UserError, match=r"must be T5Settings .* got DecoderOnlySett"):
        shape_of(LLAMA, str(tmp_path))
    with pytest.raises(UserError, match=r"got None and ''"):
        shape_of(None, "")


def test_a_byte_vocabulary_has_no_file(tmp_path):
    folders.describe(tmp_path, DESCRIPTION, "byte")
    assert folders.vocabulary_file(tmp_path) == "byte"
    assert [path.name for path in tmp_path.iterdir()] == [folders.DESCRIPTION_FILE]


def test_the_vocabulary_goes_with_the_model(tmp_path):
    source = tmp_path / "pieces.model"
    source.write_bytes(b"pieces")
    first, second = tmp_path / "first", tmp_path / "second"
    folders.describe(first, DESCRIPTION, str(source))
    source.unlink()
    folders.describe(second, DESCRIPTION, folders.vocabulary_file(first))
    # Describing a folder again by its own vocabulary leaves that in place.
    folders.describe(second, DESCRIPTION, folders.vocabulary_file(second))
    assert (second / folders.VOCABULARY_FILE).read_bytes() == b"pieces"


def test_a_lost_vocabulary_is_named(tmp_path):
    folders.describe(tmp_path, DESCRIPTION, "byte")
    (tmp_path / folders.DESCRIPTION_FILE).write_text(DESCRIPTION.to_json())
    with pytest.raises(UserError, match=r"has no vocabulary\.model"):
        folders.vocabulary_file(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path):
    folders.describe(tmp_path, DESCRIPTION, "byte")
    assert folders.read_description(tmp_path, "reward").settings == SHAPE
    with pytest.raises(UserError, match="must hold a preference model, got a reward"):
        folders.read_description(tmp_path, "preference")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "reward"}', '{"settings":'])
def test_a_damaged_description_is_named(tmp_path, text):
    (tmp_path / folders.DESCRIPTION_FILE).write_text(text)
    with pytest.raises(UserError, match=r"model\.json is not a model description"):
        folders.kind_of(tmp_path)


def test_a_folder_without_description_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"is not a model folder: there is no model"):
        folders.find_model_dir(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        folders.find_model_dir(tmp_path / "nowhere")


def test_an_output_folder_must_be_writable(tmp_path):
    with pytest.raises(UserError, match="got an empty string"):
        runs.open_folder("")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        runs.open_folder(str(tmp_path / "file"))
    folder = runs.open_folder(str(tmp_path / "a" / "b"))
    assert "jax" in json.loads((folder / "versions.json").read_text())


# ------------------------------------------------------------------------ generation


class Digits:
    """A vocabulary whose texts are its ids."""

    eos_id = 1
    vocab_size = 11

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids)


@pytest.mark.parametrize("num_rows", range(1, 8))
def test_slices_cover_all_rows_in_order_with_one_shape(num_rows):
    slices = list(generation.batch_slices(num_rows, 3))
    assert {rows.shape for rows in slices} == {(3,)}
    flat = np.concatenate(slices)
    np.testing.assert_array_equal(flat[:num_rows], np.arange(num_rows))
    assert (flat[num_rows:] == num_rows - 1).all()
    assert len(slices) == -(-num_rows // 3)


def test_no_rows_are_no_slices():
    assert list(generation.batch_slices(0, 3)) == []


def test_take_keeps_the_kind_of_batch():
    batch = PromptBatch(np.arange(6).reshape(3, 2), np.ones((3, 2), bool))
    taken = generation.take(batch, np.array([2, 2, 0]))
    assert isinstance(taken, PromptBatch)
    np.testing.assert_array_equal(taken.tokens_BS, [[4, 5], [4, 5], [0, 1]])


def counted_model():
    """Returns the toy model and a list that grows with each trace of its prefill."""
    model, traces = toy_language_model(), []

    def prefill(*args):
        traces.append(args)
        return model.prefill(*args)

    return model._replace(prefill=prefill), traces


def generator(model, batch_size, temperature=1.0):
    return generation.Generator(
        model,
        Digits(),
        speaker=generation.policy_speaker(SamplingSettings(4, temperature)),
        max_decode_length=4,
        batch_size=batch_size,
    )


def test_a_generator_compiles_once_for_any_number_of_prompts():
    model, traces = counted_model()
    decode = generator(model, 3)
    params = {POLICY: model.init(jax.random.key(0))}
    for rows in (1, 3, 7):
        prompts = supervised_batch(0, rows).prompts
        found = decode(params, prompts, jax.random.key(rows))
        assert found.responses.tokens_BT.shape == (rows, 4)
        assert len(found.texts) == rows
    assert len(traces) == 1


def test_batches_do_not_change_greedy_answers():
    model = toy_language_model()
    params = {POLICY: model.init(jax.random.key(0))}
    prompts = supervised_batch(0, 7).prompts
    together, apart = (
        generator(model, size, 0.0)(params, prompts, jax.random.key(1))
        for size in (7, 2)
    )
    assert together.texts == apart.texts
    np.testing.assert_array_equal(*(g.responses.mask_BT for g in (together, apart)))


def test_further_rows_leave_a_rows_draw_alone():
    model = toy_language_model()
    params = {POLICY: model.init(jax.random.key(0))}
    prompts, key = supervised_batch(0, 7).prompts, jax.random.key(1)
    fewer = jax.tree.map(lambda leaf: leaf[:5], prompts)
    decode = generator(model, 3)
    assert decode(params, fewer, key).texts == decode(params, prompts, key).texts[:5]
    # Rows of different batches with the same prompt must not share their draws.
    same = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 30, axis=0), prompts)
    assert len(set(decode(params, same, key).texts[::3])) > 1


def test_the_policys_speaker_carries_the_settings_over():
    sampling = SamplingSettings(4, temperature=0.5, top_k=3, top_p=0.9)
    speaker = generation.policy_speaker(sampling)
    assert speaker.weights == {POLICY: 1.0}
    assert (speaker.temperature, speaker.top_k, speaker.top_p) == (0.5, 3, 0.9)
    mixed = generation.policy_speaker(sampling, {POLICY: 0.5, REFERENCE: 0.5})
    assert mixed.weights == {POLICY: 0.5, REFERENCE: 0.5}


def test_the_log_ratio_is_the_sum_over_counted_tokens():
    model = toy_language_model()
    sets = {
        name: model.init(jax.random.key(seed))
        for seed, name in enumerate((POLICY, REFERENCE))
    }
    batch = supervised_batch(3, 7)
    prompts, (tokens_BT, mask_BT) = batch.prompts, batch.targets
    expected_B = np.zeros(7)
    for name, sign in ((POLICY, 1.0), (REFERENCE, -1.0)):
        logits_BTV = np.asarray(model.logits(sets[name], prompts, tokens_BT, None))
        chosen_BT = np.take_along_axis(
            logits_BTV, np.asarray(tokens_BT)[..., None], axis=-1
        )[..., 0]
        chosen_BT = chosen_BT - np.log(np.exp(logits_BTV).sum(axis=-1))
        expected_B += sign * np.where(mask_BT, chosen_BT, 0.0).sum(axis=1)
    for batch_size in (7, 3):
        found_B = generation.LogRatio(model, batch_size)(sets, prompts, batch.targets)
        np.testing.assert_allclose(found_B, expected_B, rtol=1e-4, atol=1e-4)
    same = {POLICY: sets[POLICY], REFERENCE: sets[POLICY]}
    zero_B = generation.LogRatio(model, 3)(same, prompts, Responses(*batch.targets))
    np.testing.assert_array_equal(zero_B, np.zeros(7))


# --------------------------------------------------------------------------- collect


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("title\nthe first words of it", "the first"),
        ("title\n\n  the\n first", "the first"),
        ("only one line here", "only one"),
        ("title\nshort", "short"),
        ("title\n", ""),
        ("os.path.join(a, b, ...): Puts parts together.", "Puts parts"),
        ("f(): Puts parts together.", "Puts parts"),
        ("Calls f(x): now", "Calls f(x):"),
    ],
)
def test_leading_words_are_the_bodys(document, expected):
    assert collect.leading(document, 2) == expected


def candidates(texts):
    prompts = [f"title {row}\nalpha beta gamma" for row in range(len(texts))]
    return collect.Candidates(
        prompts, ["alpha beta"] * len(texts), texts, ("one", "two", "three")
    )


def ask(texts, pairs=3, votes=1, seed=0):
    rng = np.random.default_rng(seed)
    return collect.vote(candidates(texts), RaterPopulation(), rng, pairs, votes)


def test_every_pair_is_asked_once_and_none_with_itself():
    rows = ask([["alpha beta gamma", "beta", "delta"]], pairs=9)
    pairs = [{row["response_a"], row["response_b"]} for row in rows]
    assert len(pairs) == 3
    assert all(len(pair) == 2 for pair in pairs)
    assert len({frozenset(pair) for pair in pairs}) == 3


def test_the_number_of_pairs_is_per_prompt():
    rows = ask([["alpha", "beta", "delta"]] * 5, pairs=2)
    prompts = [row["prompt"] for row in rows]
    assert len(rows) == 10
    assert all(prompts.count(prompt) == 2 for prompt in prompts)


def test_empty_and_equal_candidates_are_left_out():
    rows = ask([["alpha", " ", "alpha"], ["alpha", "", "beta"]])
    assert [row["prompt"] for row in rows] == ["title 1\nalpha beta gamma"]
    with pytest.raises(UserError, match="no prompt has two different candidates"):
        ask([["alpha", "", "alpha"]])


def test_both_orders_are_shown():
    firsts = {
        ask([["alpha", "beta", ""]], seed=seed)[0]["response_a"] for seed in range(20)
    }
    assert firsts == {"alpha", "beta"}


def test_a_preference_is_a_share_of_votes_near_the_populations():
    texts = [["alpha beta gamma", "delta epsilon zeta", ""]]
    (row,) = ask(texts, votes=4000)
    probability = RaterPopulation().preference(
        [row["prompt"]], ["alpha beta"], [row["response_a"]], [row["response_b"]]
    )[0]
    assert (row["preference"] * 4000) % 1 == 0
    assert abs(row["preference"] - probability) < 4 * 0.5 / np.sqrt(4000)
    assert {*row} == {"prompt", "response_a", "response_b", "preference"}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    collect.write_lines(path, [{"a": 1}, {"b": "ü"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"a": 1},
        {"b": "ü"},
    ]
    assert [found.name for found in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    collect.write_lines(path, [{"a": 1}])

    def write_half(self, text, encoding):
        with open(self, "w", encoding=encoding) as file:
            file.write(text[: len(text) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space"):
        collect.write_lines(path, [{"a": 2}, {"b": 3}])
    assert json.loads(path.read_text()) == {"a": 1}


def test_comparisons_take_the_place_of_the_datas_files(tmp_path):
    data = DataSettings("docstrings", {"inputs": 5, "targets": 3}, "byte")
    for name in collect.FILES.values():
        (tmp_path / name).write_text("")
    found = collect.comparison_data(data, str(tmp_path))
    assert found.mixture_or_task_name == "jsonl"
    assert found.train_file == str(tmp_path / "train.jsonl")
    assert found.evaluation_file == str(tmp_path / "evaluation.jsonl")
    assert found.vocabulary_path == "byte"
    (tmp_path / "evaluation.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no file .*evaluation\.jsonl"):
        collect.comparison_data(data, str(tmp_path))


@pytest.mark.parametrize("name", ["num_prompts", "votes_per_pair", "batch_size"])
def test_numbers_of_collect_must_be_positive(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} must be an integer of at least 1"):
        collect.collect(
            model_dir=str(tmp_path / "out"),
            policy_checkpoint="nowhere",
            data=DataSettings("docstrings", {"inputs": 5, "targets": 3}, "byte"),
            raters=RaterPopulation(),
            **{name: 0},
        )
    assert not (tmp_path / "out").exists()


def test_what_ships_is_found_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = "nlhf_jax/pretrained/docstrings_t5"
    found = folders.find_model_dir(shipped)
    assert found.is_absolute() and (found / folders.DESCRIPTION_FILE).is_file()
    # A folder of that name here comes first.
    mine = tmp_path / shipped
    mine.mkdir(parents=True)
    assert folders.resolve(shipped).resolve() == mine.resolve()


@pytest.mark.parametrize("text", ['{"x":', '{"x": 1}', "[1]"])
def test_a_damaged_measure_of_cycles_is_one_sentence(text, tmp_path):
    (tmp_path / "cyclicity.json").write_text(text)
    with pytest.raises(UserError, match=r"cyclicity.json is damaged: delete it"):
        evaluate._read_cyclicity(str(tmp_path))


@pytest.mark.parametrize(
    "text, said",
    [('{"kind":\n', "no JSON from line 2 on"), ("{}", "settings"), ("[]", "")],
)
def test_a_damaged_description_is_one_sentence(text, said, tmp_path):
    (tmp_path / folders.DESCRIPTION_FILE).write_text(text)
    with pytest.raises(UserError, match="is not a model description: .*" + said) as e:
        folders.read_description(tmp_path)
    assert "\n" not in str(e.value)


def test_a_users_file_is_read_before_a_vocabulary_is_made(tmp_path, monkeypatch):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p", "target": 3}\n')
    settings = DataSettings(
        "jsonl", {"inputs": 4, "targets": 4}, train_file=str(path), group_field="prompt"
    )
    monkeypatch.setattr(
        vocabularies, "docstring_vocabulary_path", lambda _: pytest.fail("made one")
    )
    with pytest.raises(UserError, match=r"bad\.jsonl line 1"):
        supervised._vocabulary_path(settings, "", tasks.SUPERVISED)
