# SPDX-License-Identifier: Apache-2.0
"""Vocabularies, seqio tasks and batches, on tiny corpora made in the test's folder."""

import subprocess
import sys

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.data import batches, docstrings, jsonl, tasks, vocabularies
from nlhf_jax.data import order as data_order
from nlhf_jax.settings import DataSettings
from nlhf_jax.types import ComparisonBatch, PromptBatch, Responses, SupervisedBatch

LENGTHS = {"inputs": 8, "targets": 6}


@pytest.fixture(scope="module")
def byte_vocabulary():
    """Ids of a text are its bytes plus 3."""
    return vocabularies.load_vocabulary("byte")


@pytest.fixture(scope="module")
def corpus():
    """200 pairs in 100 packages."""
    pairs = tuple(
        docstrings.Pair(
            f"package{number // 2}",
            f"package{number // 2}.f{number}",
            ("pipe", "valve"),
            f"It reads the pressure of pipe {number} and of every valve behind it."
            + " The values stay until the pipe is closed." * (number == 40),
            f"Measures pipe {number}",
        )
        for number in range(200)
    )
    signatures = (docstrings.Pair("package0", "package0.g", ("a",), "", "Opens it"),)
    return docstrings.Corpus(pairs, signatures, {"pairs": 200})


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    """Folder of the corpus, prepared by the builder as a cache would hold it."""
    from nlhf_jax.data import docstring_builder

    folder = str(tmp_path_factory.mktemp("corpus"))
    docstring_builder.prepare(folder, read_corpus=lambda: corpus)
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Path of a SentencePiece model of 320 pieces."""
    path = str(tmp_path_factory.mktemp("vocabulary") / "deep" / "small.model")
    texts = [text for pair in corpus.pairs for text in (pair.prompt, pair.summary)]
    vocabularies.train_vocabulary(texts, path, 320)
    return path


def _ids(text):
    return [byte + 3 for byte in text.encode()]


# --------------------------------------------------------------------- the fence


def test_reading_and_checking_do_not_import_tensorflow():
    code = (
        "import sys, nlhf_jax, nlhf_jax.data.batches, nlhf_jax.data.jsonl;"
        "import nlhf_jax.data.docstrings;"
        "found = {'tensorflow', 'seqio', 'tensorflow_datasets'} & set(sys.modules);"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize(
    "text",
    ["Measures pipe 7", "Ünseen ☂ 漢字 letters", "a", "valve (pipe, x_1): it's 100 %"],
)
def test_trained_vocabulary_gives_texts_back(trained, text):
    vocabulary = vocabularies.load_vocabulary(trained)
    ids = vocabularies.encode(text, vocabulary)
    assert vocabularies.decode(ids, vocabulary) == text
    assert vocabulary.unk_id not in ids
    assert max(ids) < vocabulary.vocab_size == 320


def test_trained_vocabulary_has_the_ids_of_t5(trained):
    vocabulary = vocabularies.load_vocabulary(trained)
    tokenizer = vocabulary.tokenizer
    ids = (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2)
    assert tokenizer.bos_id() == -1


def test_training_is_deterministic(trained, corpus, tmp_path):
    again = tmp_path / "again.model"
    texts = [text for pair in corpus.pairs for text in (pair.prompt, pair.summary)]
    vocabularies.train_vocabulary(texts, str(again), 320)
    one, other = (vocabularies.load_vocabulary(str(p)) for p in (trained, again))
    text = corpus.pairs[3].prompt
    assert vocabularies.encode(text, one) == vocabularies.encode(text, other)


def test_decoding_stops_at_the_first_end_and_drops_padding(byte_vocabulary):
    ids = [0, *_ids("ab"), 0, *_ids("c"), 1, *_ids("d"), 1]
    assert vocabularies.decode(ids, byte_vocabulary) == "abc"


def test_wrong_vocabularies_are_user_errors(tmp_path, byte_vocabulary):
    with pytest.raises(UserError, match=r"got '.*missing\.model', which is no file"):
        vocabularies.load_vocabulary(str(tmp_path / "missing.model"))
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="is no SentencePiece model"):
        vocabularies.load_vocabulary(str(tmp_path / "text.model"))
    with pytest.raises(UserError, match="vocabulary of 4096 can't be trained"):
        vocabularies.train_vocabulary(["few words"], str(tmp_path / "x.model"))
    assert not (tmp_path / "x.model").exists()
    vocabularies.check_vocabulary(byte_vocabulary, byte_vocabulary.vocab_size)
    with pytest.raises(UserError, match="has 259 ids, but the model has only 258 rows"):
        vocabularies.check_vocabulary(byte_vocabulary, 258)


def test_vocabulary_without_an_end_is_refused(tmp_path, corpus):
    import sentencepiece

    path = tmp_path / "other.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([pair.prompt for pair in corpus.pairs]),
            model_writer=file,
            vocab_size=60,
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(UserError, match=r"must have an end token, got eos_id -1"):
        vocabularies.load_vocabulary(str(path))


# --------------------------------------------------------------------- the order


@pytest.mark.parametrize(
    ("num_examples", "batch_size"), [(7, 3), (3, 7), (4, 4), (1, 2)]
)
def test_every_epoch_reads_every_example_exactly_once(num_examples, batch_size):
    num_epochs = 5
    num_steps = -(-num_epochs * num_examples // batch_size)
    parts = [
        batches.example_order(3, step, batch_size, num_examples)
        for step in range(num_steps)
    ]
    epochs, indices = (np.concatenate(part) for part in zip(*parts, strict=True))
    for epoch in range(num_epochs):
        assert sorted(indices[epochs == epoch]) == list(range(num_examples))
    assert (np.diff(epochs) >= 0).all()


def test_order_is_a_function_of_seed_and_step():
    order = lambda *a: batches.example_order(*a)[1].tolist()  # noqa: E731
    first = order(3, 11, 4, 50)
    order(8, 0, 4, 50)
    data_order._permutation.cache_clear()
    assert order(3, 11, 4, 50) == first
    assert order(4, 11, 4, 50) != first
    # Independent epochs: 20! orders, so equal ones would be no accident.
    assert order(3, 0, 20, 20) != order(3, 1, 20, 20)


def test_batch_size_does_not_change_the_stream():
    stream = lambda size: np.concatenate(  # noqa: E731
        [batches.example_order(3, step, size, 7)[1] for step in range(24 // size)]
    )
    np.testing.assert_array_equal(stream(3), stream(8))


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (0, -1, 1), (0, 0, 0)])
def test_negative_seeds_and_steps_are_user_errors(arguments):
    with pytest.raises(UserError, match="must be an integer of at least"):
        batches.example_order(*arguments, 5)


# ---------------------------------------------------------------------- padding


def test_prompts_keep_an_end_token_when_cut(byte_vocabulary):
    a, b, c = _ids("abc")
    texts = ["ab", "abc", "abcd"]
    prompts, num_cut = batches.prompt_batch(texts, byte_vocabulary, 4)
    expected_BS = [[a, b, 1, 0], [a, b, c, 1], [a, b, c, 1]]
    np.testing.assert_array_equal(prompts.tokens_BS, expected_BS)
    np.testing.assert_array_equal(prompts.mask_BS, np.array(expected_BS) != 0)
    assert num_cut == 1
    assert prompts.tokens_BS.dtype == np.int32
    assert prompts.mask_BS.dtype == bool


def test_responses_have_no_end_token_when_cut(byte_vocabulary):
    a, b, c, d = _ids("abcd")
    responses = batches.encode_responses(["ab", "abc", "abcd"], byte_vocabulary, 4)
    expected_BT = [[a, b, 1, 0], [a, b, c, 1], [a, b, c, d]]
    np.testing.assert_array_equal(responses.tokens_BT, expected_BT)
    np.testing.assert_array_equal(responses.mask_BT, np.array(expected_BT) != 0)
    texts = batches.decode_responses(*responses, byte_vocabulary)
    assert texts == ["ab", "abc", "abcd"]
    assert batches.pad_responses([[a, b, 1], [a, b, c, d, 1]], 4)[1] == 1


def test_decoding_ignores_what_the_mask_hides(byte_vocabulary):
    tokens_BT = np.array([_ids("abc"), _ids("def")], np.int32)
    mask_BT = np.array([[True, True, False], [False, False, False]])
    texts = batches.decode_responses(tokens_BT, mask_BT, byte_vocabulary)
    assert texts == ["ab", ""]


# ------------------------------------------------------------------- supervised


def test_supervised_rows_become_exact_arrays(byte_vocabulary):
    rows = [
        {"prompt": "ab", "target": "x"},
        {"prompt": "too long a prompt", "target": "too long"},
    ]
    data = batches.supervised_from_rows(rows, LENGTHS, byte_vocabulary)
    expected = SupervisedBatch(
        PromptBatch(
            np.array([[*_ids("ab"), 1, 0, 0, 0, 0, 0], [*_ids("too lon"), 1]]),
            np.arange(8)[None, :] < np.array([[3], [8]]),
        ),
        Responses(
            np.array([[*_ids("x"), 1, 0, 0, 0, 0], _ids("too lo")]),
            np.arange(6)[None, :] < np.array([[2], [6]]),
        ),
    )
    got = data.take([0, 1])
    for part, expected_part in zip(got, expected, strict=True):
        for array, expected_array in zip(part, expected_part, strict=True):
            np.testing.assert_array_equal(array, expected_array)
    assert (data.num_truncated_prompts, data.num_truncated_targets) == (1, 1)
    assert data.prompt_texts == ["ab", "too long a prompt"]
    assert data.target_texts == ["x", "too long"]
    np.testing.assert_array_equal(
        data.take([1, 0, 1]).targets.tokens_BT, got.targets.tokens_BT[[1, 0, 1]]
    )


def test_batches_are_the_rows_of_the_order(byte_vocabulary):
    rows = [{"prompt": f"p{n}", "target": f"t{n}"} for n in range(5)]
    data = batches.supervised_from_rows(rows, LENGTHS, byte_vocabulary)
    for step in range(4):
        batch = data.batch(seed=9, step=step, batch_size=3)
        _, indices_B = batches.example_order(9, step, 3, 5)
        texts = batches.decode_responses(*batch.targets, byte_vocabulary)
        assert texts == [f"t{index}" for index in indices_B]
        texts = batches.decode_responses(*batch.prompts, byte_vocabulary)
        assert texts == [f"p{index}" for index in indices_B]


def test_tokens_of_a_task_are_those_of_plain_encoding(trained, corpus):
    vocabulary = vocabularies.load_vocabulary(trained)
    rows = [
        {"prompt": f"{pair.prompt}\n\n☂", "target": pair.summary}
        for pair in corpus.pairs[:20]
    ]
    lengths = {"inputs": 40, "targets": 12}
    data = batches.supervised_from_rows(rows, lengths, vocabulary)
    prompts, num_cut = batches.prompt_batch(data.prompt_texts, vocabulary, 40)
    targets = batches.encode_responses(data.target_texts, vocabulary, 12)
    np.testing.assert_array_equal(data.examples.prompts.tokens_BS, prompts.tokens_BS)
    np.testing.assert_array_equal(data.examples.targets.tokens_BT, targets.tokens_BT)
    assert data.num_truncated_prompts == num_cut > 0


@pytest.mark.parametrize(
    ("task", "more"), [("docstrings", 0), ("docstrings_pretraining", 2)]
)
def test_docstring_tasks_read_the_prepared_corpus(prepared, corpus, task, more):
    lengths = {"inputs": 200, "targets": 40}
    settings = DataSettings(task, lengths, vocabulary_path="byte", data_dir=prepared)
    vocabulary = vocabularies.vocabulary_for(settings)
    splits = docstrings.split_pairs(corpus.pairs, corpus.signatures)
    data = batches.load_supervised(settings, "train", vocabulary)
    added = [*splits["signatures"], *splits["quotes"]] if more else []
    assert len(added) == more
    expected = [*splits["train"], *added]
    assert data.prompt_texts == [pair.prompt for pair in expected]
    assert data.target_texts == [pair.summary for pair in expected]
    data = batches.load_supervised(settings, "evaluation", vocabulary)
    assert data.target_texts == [pair.summary for pair in splits["evaluation"]]
    assert (data.num_truncated_prompts, data.num_truncated_targets) == (0, 0)
    assert len(expected) + data.num_examples == len(corpus.pairs) + more


def test_prepared_corpus_is_not_made_again(prepared):
    from nlhf_jax.data import docstring_builder

    def never():
        raise AssertionError("the corpus was read again")

    assert docstring_builder.prepare(prepared, read_corpus=never).is_prepared()


def test_docstring_vocabulary_is_trained_once(prepared, monkeypatch):
    monkeypatch.setattr(vocabularies, "VOCAB_SIZE", 320)
    settings = DataSettings("docstrings", LENGTHS, data_dir=prepared)
    assert vocabularies.vocabulary_for(settings).vocab_size == 320
    monkeypatch.setattr(vocabularies, "train_vocabulary", None)
    assert vocabularies.vocabulary_for(settings).vocab_size == 320


# ------------------------------------------------------------------ comparisons


def _comparisons(number=6):
    return [
        {
            "prompt": f"p{n}",
            "response_a": f"a{n}",
            "response_b": f"b{n}",
            "preference": n % 8 / 8,
        }
        for n in range(number)
    ]


def test_exchanged_sides_keep_the_judgement(byte_vocabulary):
    data = batches.comparisons_from_rows(_comparisons(), LENGTHS, byte_vocabulary)
    num_exchanged = 0
    for step in range(40):
        batch = data.batch(seed=2, step=step, batch_size=4)
        assert isinstance(batch, ComparisonBatch)
        _, indices_B = batches.example_order(2, step, 4, 6)
        first = batches.decode_responses(*batch.first, byte_vocabulary)
        second = batches.decode_responses(*batch.second, byte_vocabulary)
        for row, n in enumerate(indices_B):
            is_own = first[row] == f"a{n}"
            assert {first[row], second[row]} == {f"a{n}", f"b{n}"}
            expected = n / 8 if is_own else 1 - n / 8
            assert batch.preference_B[row] == expected  # eighths are exact
            num_exchanged += not is_own
        again = data.batch(seed=2, step=step, batch_size=4)
        np.testing.assert_array_equal(batch.first.tokens_BT, again.first.tokens_BT)
        assert batch.preference_B.dtype == np.float32
    # 160 fair coins: mean 80, standard deviation 6.3; four of them.
    assert abs(num_exchanged - 80) < 26


def test_each_epoch_draws_its_own_exchanges(byte_vocabulary):
    rows = _comparisons(30)
    data = batches.comparisons_from_rows(rows, LENGTHS, byte_vocabulary)
    sides = []
    for epoch in range(2):
        batch = data.batch(seed=0, step=epoch, batch_size=30)
        prompts = batches.decode_responses(*batch.prompts, byte_vocabulary)
        first = batches.decode_responses(*batch.first, byte_vocabulary)
        sides.append(dict(zip(prompts, (text[0] for text in first), strict=True)))
    assert sides[0].keys() == sides[1].keys()
    assert sides[0] != sides[1]


def test_taken_comparisons_are_not_exchanged(byte_vocabulary):
    long = {"prompt": "p", "response_a": "long answer", "response_b": "b"}
    rows = [*_comparisons(), long | {"preference": 1}]
    data = batches.comparisons_from_rows(rows, LENGTHS, byte_vocabulary)
    batch = data.take(np.arange(6))
    assert (
        batches.decode_responses(*batch.first, byte_vocabulary) == data.first_texts[:6]
    )
    np.testing.assert_array_equal(batch.preference_B, np.arange(6) / 8)
    assert data.preferences == [*(n / 8 for n in range(6)), 1.0]
    assert data.num_truncated_responses == 1
    assert data.second_texts[-1] == "b"


# ------------------------------------------------------------------------- tasks


def test_jsonl_files_load_as_tasks_of_both_kinds(tmp_path, byte_vocabulary):
    path = str(tmp_path / "rated.jsonl.gz")
    rows = [row | {"group": row["prompt"], "target": "t"} for row in _comparisons(10)]
    jsonl.write_rows(path, rows)
    settings = DataSettings(
        "jsonl", LENGTHS, vocabulary_path="byte", train_file=path, group_field="group"
    )
    train = batches.load_comparisons(settings, "train", byte_vocabulary)
    held_out = batches.load_comparisons(settings, "evaluation", byte_vocabulary)
    assert (train.num_examples, held_out.num_examples) == (8, 2)
    assert not set(train.prompt_texts) & set(held_out.prompt_texts)
    supervised = batches.load_supervised(settings, "train", byte_vocabulary)
    assert supervised.prompt_texts == train.prompt_texts
    assert supervised.target_texts == ["t"] * 8


def _error(load, *arguments):
    with pytest.raises(UserError) as error:
        load(*arguments)
    return str(error.value)


def test_tasks_and_splits_that_are_not_there(tmp_path, byte_vocabulary):
    load = batches.load_supervised
    settings = DataSettings("docstring", LENGTHS)
    message = _error(load, settings, "train", byte_vocabulary)
    assert "got 'docstring' (did you mean 'docstrings'?)" in message
    assert "rows" not in message  # what tests have registered is nobody's task
    settings = DataSettings("docstrings", LENGTHS)
    message = _error(batches.load_comparisons, settings, "train", byte_vocabulary)
    assert "'docstrings' has no features inputs, first, second" in message
    message = _error(load, settings, "test", byte_vocabulary)
    assert "split must be one of evaluation, train; got 'test'" in message
    path = str(tmp_path / "pairs.jsonl")
    jsonl.write_rows(path, [{"prompt": "p", "target": "t"}])
    settings = DataSettings("jsonl", LENGTHS, train_file=path)
    message = _error(load, settings, "evaluation", byte_vocabulary)
    assert message.endswith(
        "'evaluation': set evaluation_file, or group_field to 'prompt'"
    )


def test_registered_tasks_and_mixtures_of_the_user_are_found(byte_vocabulary):
    import seqio
    import tensorflow as tf

    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {"inputs": ["ab", "c"], "targets": ["x", "y"]}
        ),
        splits=["train"],
    )
    seqio.TaskRegistry.add(
        "my_pipes",
        source=source,
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={
            name: seqio.Feature(byte_vocabulary) for name in ("inputs", "targets")
        },
    )
    seqio.MixtureRegistry.add("my_mixture", [("my_pipes", 1)])
    try:
        for name in ("my_pipes", "my_mixture"):
            settings = DataSettings(name, LENGTHS)
            data = batches.load_supervised(settings, "train", byte_vocabulary)
            assert data.target_texts == ["x", "y"]
            message = _error(
                batches.load_comparisons, settings, "train", byte_vocabulary
            )
            assert f"{name!r} has no feature 'first'" in message
        with pytest.raises(UserError, match="another task named 'my_pipes'"):
            tasks.register("my_pipes", source, {}, tasks.SUPERVISED, byte_vocabulary)
    finally:
        seqio.MixtureRegistry.remove("my_mixture")
        seqio.TaskRegistry.remove("my_pipes")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task_feature_lengths": {"inputs": 3}}, "must have the keys 'inputs' and"),
        ({"task_feature_lengths": {"inputs": 3, "targets": 0}}, "at least 1, got 0"),
        ({"mixture_or_task_name": ""}, "must name a task"),
        ({"evaluation_share": 1.0}, r"evaluation_share must be in (0.0, 1.0), got 1.0"),
    ],
)
def test_data_settings_check_themselves(changes, expected):
    settings = {"mixture_or_task_name": "jsonl", "task_feature_lengths": LENGTHS}
    assert expected in _error(lambda: DataSettings(**(settings | changes)))
