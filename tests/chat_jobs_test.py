# SPDX-License-Identifier: Apache-2.0
"""Chat models in the jobs: what goes from folder to folder, and where the loss lies."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import algorithms, supervised_step
from nlhf_jax.checks import UserError
from nlhf_jax.data import batches, prompts
from nlhf_jax.data.special_tokens import COMPANIONS
from nlhf_jax.data.vocabularies import load_vocabulary
from nlhf_jax.decoding import sample as draw
from nlhf_jax.jobs import folders, judges
from nlhf_jax.jobs.policies import load_policy
from nlhf_jax.jobs.sample import sample
from nlhf_jax.jobs.supervised import preference, reward
from nlhf_jax.jobs.train import train
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.parameter_files import save_params
from nlhf_jax.preferences import inputs
from nlhf_jax.settings import DataSettings
from nlhf_jax.types import POLICY, PromptBatch, Responses, Speaker, SupervisedBatch
from tests.decoder_only_toys import numpy_logits, shape
from tests.jobs_pipeline_test import ADAM, read_rows, run_sft, steps, write_lines
from tests.small_tokenizers import CHATML, write_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_quickly")
LENGTHS = {"inputs": 48, "targets": 12}
# chatml's end and padding are 2; it has 381 ids.
SETTINGS = dataclasses.replace(shape(1), vocab_size=384, pad_id=2, eos_id=2)
DESCRIBED = folders.ModelDescription("language_model", SETTINGS, LENGTHS)


def write_chat_model(folder):
    """Writes a chat model's folder with random parameters and returns it."""
    path = write_tokenizer(folder / "tokenizer", "chatml")
    folders.describe(folder / "model", DESCRIBED, str(path))
    init = decoder_only_language_model(SETTINGS).init
    save_params(folder / "model", init(jax.random.key(0)), "float32")
    return folder / "model"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A chat model's folder with random parameters."""
    return write_chat_model(tmp_path_factory.mktemp("chat"))


# -------------------------------------------------------------- from folder to folder


def test_a_folder_takes_all_that_belongs_to_a_vocabulary_along(chat, tmp_path):
    assert folders.vocabulary_file(chat) == str(chat / "tokenizer.json")
    assert (
        json.loads((chat / "model.json").read_text())["vocabulary"] == "tokenizer.json"
    )
    folders.describe(tmp_path / "next", DESCRIBED, folders.vocabulary_file(chat))
    for name in ("tokenizer.json", *COMPANIONS):
        assert (tmp_path / "next" / name).exists() == (chat / name).exists()
    assert (tmp_path / "next" / "chat_template.jinja").read_text() == CHATML
    # Once more into the same folder, as a run that continues does.
    again = folders.vocabulary_file(tmp_path / "next")
    folders.describe(tmp_path / "next", DESCRIBED, again)
    assert load_vocabulary(again).eos_id == 2


def test_a_template_from_a_file_becomes_the_folder_s_own(chat, tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ messages[0].content }}")
    vocabulary = folders.vocabulary_file(chat)
    folders.describe(tmp_path / "next", DESCRIBED, vocabulary, str(mine))
    assert (tmp_path / "next" / "chat_template.jinja").read_text() == mine.read_text()
    folders.describe(tmp_path / "other", DESCRIBED, vocabulary, "model")
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == CHATML


def test_other_tokens_or_another_end_are_another_vocabulary(chat, tmp_path):
    vocabulary = folders.vocabulary_file(chat)
    folders.describe(tmp_path / "same", DESCRIBED, vocabulary)
    folders.check_same_vocabulary(str(chat), str(tmp_path / "same"))
    ends = dataclasses.replace(
        DESCRIBED, settings=dataclasses.replace(SETTINGS, eos_id=0)
    )
    folders.describe(tmp_path / "ends", ends, vocabulary)
    with pytest.raises(UserError, match="reads other tokens"):
        folders.check_same_vocabulary(str(chat), str(tmp_path / "ends"))
    other = write_tokenizer(tmp_path / "tokenizer", "llama3")
    folders.describe(tmp_path / "other", DESCRIBED, str(other))
    with pytest.raises(UserError, match="reads other tokens"):
        folders.check_same_vocabulary(str(chat), str(tmp_path / "other"))


def test_a_model_that_ends_otherwise_than_its_tokenizer_is_refused(chat, tmp_path):
    ends = dataclasses.replace(
        DESCRIBED, settings=dataclasses.replace(SETTINGS, eos_id=0)
    )
    folders.describe(tmp_path, ends, folders.vocabulary_file(chat))
    with pytest.raises(UserError, match="eos_id of DecoderOnlySettings must be 2"):
        load_policy(str(tmp_path))


# --------------------------------------------------------------- where the loss lies


@pytest.fixture(scope="module")
def templated(chat):
    """(network, parameters, a batch of templated prompts with targets)."""
    vocabulary = load_vocabulary(str(chat / "tokenizer.json"))
    form = prompts.prompt_format(vocabulary, "model")
    asked = ["Which pipe?", "user <|im_end|>", "a"]
    said = ["The one in the cellar.", "No", "It is 12.5 degrees"]
    batch = SupervisedBatch(
        batches.prompt_batch(asked, vocabulary, 48, form)[0],
        batches.encode_responses(said, vocabulary, 12),
    )
    network = decoder_only_language_model(SETTINGS)
    return network, network.init(jax.random.key(3)), jax.tree.map(jnp.asarray, batch)


def test_fine_tuning_s_loss_is_that_of_the_answer_s_tokens(templated):
    """Against a pass in plain numpy over prompt and answer, unpadded."""
    network, params, batch = templated
    total, count = 0.0, 0
    for row in range(3):
        asked = batch.prompts.tokens_BS[row][batch.prompts.mask_BS[row]]
        said = np.asarray(batch.targets.tokens_BT[row][batch.targets.mask_BT[row]])
        logits = numpy_logits(params, SETTINGS, np.asarray(asked), said)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_probs[np.arange(len(said)), said].sum()
        count += len(said)
    evaluate = supervised_step.make_sft_evaluation(network)
    found = supervised_step.mean_metrics([jax.jit(evaluate)(params, batch)])
    np.testing.assert_allclose(found["loss/token_nll"], total / count, rtol=1e-5)
    assert count == int(batch.targets.mask_BT.sum())


def _nll(network, params, batch):
    scores = network.token_scores(params, batch.prompts, batch.targets.tokens_BT, None)
    return -jnp.where(batch.targets.mask_BT, scores.log_probs_BT, 0.0)


def test_no_gradient_asks_for_a_prompt_s_tokens(templated):
    """Of an untied output only what follows answers is pulled up: its targets' columns.

    A loss on prompts would pull up the columns of the template's tokens as well.
    """
    network, params, batch = templated
    gradient = jax.jit(jax.grad(lambda p: _nll(network, p, batch).sum()))(params)
    kernel_DV = np.asarray(gradient["logits_dense"]["kernel"])
    features = np.asarray(params["final_norm"]["scale"])
    assert kernel_DV.shape == (len(features), 384)
    targets = set(
        np.asarray(batch.targets.tokens_BT)[np.asarray(batch.targets.mask_BT)]
    )
    # The column of v is the sum over positions of (p(v) - [target is v]) * features.
    scores = jax.jit(network.logits)(
        params, batch.prompts, batch.targets.tokens_BT, None
    )
    mask = np.asarray(batch.targets.mask_BT)[..., None]
    pushed_V = (np.asarray(jax.nn.softmax(scores)) * mask).sum((0, 1))
    asked = set(np.asarray(batch.prompts.tokens_BS)[np.asarray(batch.prompts.mask_BS)])
    assert asked - targets
    # What is asked only is pushed down like a token that stands nowhere.
    nowhere = sorted({*range(381)} - asked - targets)
    ratio = np.abs(kernel_DV).sum(0) / pushed_V
    for token in asked - targets:
        assert ratio[token] < 1.5 * ratio[nowhere].max()
    assert min(ratio[token] for token in targets) > 1.5 * ratio[nowhere].max()


def test_padding_is_inert_whatever_its_id(templated):
    """The end is this model's padding: poisoned entries, and real ones of that id."""
    network, params, batch = templated
    expected = np.asarray(_nll(network, params, batch))

    def poisoned(part, value):
        tokens, mask = part
        return type(part)(jnp.where(mask, tokens, value), mask)

    for value in (0, 2, 7):
        other = SupervisedBatch(*(poisoned(part, value) for part in batch))
        np.testing.assert_array_equal(_nll(network, params, other), expected)
    # A prompt with the padding's id inside counts it: without, the loss is another.
    tokens, mask = batch.prompts
    assert ((tokens == SETTINGS.pad_id) & mask).sum() >= 6
    without = PromptBatch(tokens, mask & (tokens != SETTINGS.pad_id))
    changed = SupervisedBatch(without, batch.targets)
    assert np.abs(np.asarray(_nll(network, params, changed)) - expected).max() > 1e-4


def test_sampled_answers_end_once_and_their_padding_is_masked(templated):
    network, params, batch = templated
    rollout = draw(
        network,
        {POLICY: params},
        (Speaker({POLICY: 1.0}),),
        batch.prompts,
        jax.random.key(1),
        max_length=12,
    )
    (tokens, mask) = (np.asarray(x) for x in rollout.samples[0].responses)
    for row, is_said in zip(tokens, mask, strict=True):
        ends = np.flatnonzero(row == 2)
        length = ends[0] + 1 if len(ends) else 12
        assert is_said.sum() == length and is_said[:length].all()


# ------------------------------------------------------------------- what judges read


def test_a_judge_begins_as_the_model_s_texts_do_and_keeps_a_template_s_turns():
    """Beginning 8, end 1: [8 5 1 6 1] is a prompt that ends a turn inside it."""
    template = dataclasses.replace(
        inputs.pairwise_template(lambda text: [20 + len(text.split())]),
        start=(8,),
        eos_id=1,
    )
    asked = PromptBatch(
        jnp.array([[8, 5, 1, 6, 1, 0], [5, 8, 6, 0, 0, 0]]),
        jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool),
    )
    said = Responses(jnp.array([[7, 1], [7, 9]]), jnp.ones((2, 2), bool))
    read = inputs.pairwise_input(
        template, asked, said, said, prompt_length=6, response_length=2
    )
    first = np.asarray(read.tokens_BS[0][read.mask_BS[0]]).tolist()
    second = np.asarray(read.tokens_BS[1][read.mask_BS[1]]).tolist()
    ask, one, two, end = (
        words[0]
        for words in (
            template.instruction,
            template.before_first,
            template.before_second,
            template.end,
        )
    )
    assert first == [8, ask, 5, 1, 6, one, 7, two, 7, end, 1]
    assert second == [8, ask, 5, 8, 6, one, 7, 9, two, 7, 9, end, 1]


def test_a_loaded_judge_has_the_beginning_of_its_vocabulary(tmp_path):
    path = write_tokenizer(tmp_path, "llama3")
    vocabulary = load_vocabulary(str(path))
    found = []
    judges._build(
        lambda settings, encode, start, **more: found.append(start),
        DESCRIBED,
        vocabulary,
    )
    assert found == [(0,)]


# ------------------------------------------------------------------------- all jobs


@pytest.mark.battery
@pytest.mark.timeout(280)
def test_the_pipeline_on_a_chat_model(chat, tmp_path, capsys):
    """Fine-tuning, two judges and the policy, each on the folder before it."""
    words = ("map", "sum", "log", "cut")
    rows = [{"prompt": f"the {w}?", "target": f"{w}."} for w in words]
    data = DataSettings(
        "jsonl",
        LENGTHS,
        train_file=write_lines(tmp_path / "train.jsonl", rows),
        evaluation_file=write_lines(tmp_path / "held_out.jsonl", rows),
        chat_template="model",
    )
    policy = run_sft(
        tmp_path / "sft",
        data,
        steps(8),
        model=SETTINGS,
        initial_checkpoint_path=str(chat),
    )
    key = "loss/token_nll"
    losses = [row[key] for row in read_rows(policy) if key in row]
    assert losses[-1] < 0.8 * losses[0]
    votes = [
        {"prompt": f"the {w}?", "response_a": w, "response_b": "no", "preference": 1.0}
        for w in words
    ]
    file = write_lines(tmp_path / "votes.jsonl", votes)
    for kind, job in {"preference": preference, "reward": reward}.items():
        job(
            model_dir=str(tmp_path / kind),
            data=dataclasses.replace(data, train_file=file, evaluation_file=file),
            optimizer=ADAM,
            loop=steps(1),
            initial_checkpoint_path=str(policy),
            num_eval_examples=4,
        )
    train(
        model_dir=str(tmp_path / "nash"),
        algorithm=algorithms.nash_md_pg(tau=0.1, beta=0.25),
        reference_checkpoint=str(policy),
        preference_checkpoint=str(tmp_path / "preference"),
        data=data,
        optimizer=ADAM,
        loop=steps(1),
        num_eval_examples=4,
        num_gap_samples=0,
    )
    for name in ("sft", "preference", "reward", "nash"):
        assert (tmp_path / name / "chat_template.jinja").read_text() == CHATML
        assert load_vocabulary(folders.vocabulary_file(tmp_path / name)).eos_id == 2
    rows = read_rows(tmp_path / "nash")
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    capsys.readouterr()
    sample(checkpoint=str(tmp_path / "nash"), prompt="the map?")
    assert len(capsys.readouterr().out.splitlines()) >= 1
