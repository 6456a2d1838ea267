# SPDX-License-Identifier: Apache-2.0
"""`nlhf import` and `nlhf export` of Hugging Face folders, without `transformers`."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from nlhf_jax import cli
from nlhf_jax.checks import UserError
from nlhf_jax.conversion import formats
from nlhf_jax.jobs import conversions, folders, policies
from tests import conversion_toys
from tests.conversion_toys import (
    SHAPES,
    change_json,
    exported,
    imported,
    model_folder,
    numbers_of,
    refused,
    same_numbers,
)

BYTE = "--vocabulary=byte"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model folder, and its export in one file and in several."""
    place = tmp_path_factory.mktemp("llama")
    model_folder(place / "ours", "llama")
    assert exported(place / "ours", place / "whole") == 0
    assert exported(place / "ours", place / "parts", "--shard_gigabytes=1e-5") == 0
    return place


@pytest.fixture
def whole(llama, tmp_path):
    """A copy of the export in one file that a test may damage."""
    return _copied(llama / "whole", tmp_path / "whole")


@pytest.fixture
def parts(llama, tmp_path):
    """A copy of the export in several files."""
    return _copied(llama / "parts", tmp_path / "parts")


def _copied(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# --- there and back


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bit_for_bit(tmp_path, name, dtype):
    source = model_folder(tmp_path / "ours", name, dtype)
    assert exported(source, tmp_path / "theirs") == 0
    assert imported(tmp_path / "theirs", tmp_path / "back", BYTE) == 0
    same_numbers(numbers_of(tmp_path / "back"), numbers_of(source))
    description = folders.read_description(tmp_path / "back")
    assert description.settings == SHAPES[name]
    assert description.vocabulary == "byte"


def test_several_files_hold_what_one_does(llama, tmp_path):
    files = sorted(f.name for f in (llama / "parts").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((llama / "parts/model.safetensors.index.json").read_text())
    whole = safetensors.numpy.load_file(llama / "whole/model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    total = sum(array.nbytes for array in whole.values())
    assert index["metadata"]["total_size"] == total
    # A file is larger than asked only where it holds one tensor.
    for file in files:
        found = safetensors.numpy.load_file(llama / "parts" / file)
        size = sum(array.nbytes for array in found.values())
        assert len(found) == 1 or size <= 1e4
    assert imported(llama / "parts", tmp_path / "back", BYTE) == 0
    same_numbers(numbers_of(tmp_path / "back"), numbers_of(llama / "ours"))


def test_an_import_is_a_model_folder_that_jobs_run_on(llama, tmp_path, capsys):
    lengths = ("--inputs_length=9", "--targets_length=4")
    assert imported(llama / "whole", tmp_path / "back", BYTE, *lengths) == 0
    capsys.readouterr()
    policy = policies.load_policy(str(tmp_path / "back"))
    assert policy.description.feature_lengths == {"inputs": 9, "targets": 4}
    assert policy.response_length == 4
    said = []
    for folder in (tmp_path / "back", llama / "ours"):
        words = [f"--checkpoint={folder}", "--prompt=abc", "--max_decode_length=4"]
        assert cli.main(["sample", *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_what_goes_along_goes_along(llama, whole, tmp_path):
    files = {
        "generation_config.json": '{"eos_token_id": [1, 5], "pad_token_id": 0}',
        "chat_template.jinja": "{{ messages[0].content }}",
        "special_tokens_map.json": "{}",
    }
    for name, text in files.items():
        (whole / name).write_text(text)
    change_json(whole / "config.json", max_position_embeddings=77, extra_key="kept")
    assert imported(whole, tmp_path / "ours") == 0
    assert exported(tmp_path / "ours", tmp_path / "back") == 0
    for name, text in files.items():
        assert (tmp_path / "back" / name).read_text() == text
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["max_position_embeddings"], config["extra_key"]) == (77, "kept")


@pytest.mark.parametrize(
    "text, is_said",
    [
        ('{"eos_token_id": [1, 5]}', True),
        ('{"eos_token_id": [1]}', False),
        ('{"eos_token_id": 1}', False),
        ("no JSON", False),
    ],
)
def test_ends_that_are_none_here_are_said(whole, tmp_path, caplog, text, is_said):
    (whole / "generation_config.json").write_text(text)
    assert imported(whole, tmp_path / "ours") == 0
    said = "ends a response with any of [1, 5]; here id 1 alone does"
    assert (said in caplog.text) == is_said


@pytest.mark.parametrize(
    "said, written",
    [
        ([9, 1], {"eos_token_id": [9, 1], "pad_token_id": None}),
        ([9, 8], {"eos_token_id": 1, "pad_token_id": None}),
        (1, {"eos_token_id": 1, "pad_token_id": None}),
        (None, {"eos_token_id": 1, "pad_token_id": None}),
    ],
)
def test_ends_of_a_kept_configuration_stay_if_ours_is_among_them(
    whole, tmp_path, said, written
):
    file = whole / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"eos_token_id": said, "pad_token_id": None}))
    assert imported(whole, tmp_path / "ours", BYTE) == 0
    assert exported(tmp_path / "ours", tmp_path / "back") == 0
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert {key: config[key] for key in written} == written


def test_a_t5s_vocabulary_has_t5s_ids(tmp_path, capsys):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"] * 9),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "llama.model").write_bytes(model.getvalue())
    assert exported(model_folder(tmp_path / "ours", "t5_1_1"), tmp_path / "hf") == 0
    capsys.readouterr()
    words = (f"--vocabulary={tmp_path / 'llama.model'}",)
    code = imported(tmp_path / "hf", tmp_path / "target", *words)
    said = refused(capsys, tmp_path / "target", code)
    assert "the vocabulary of a T5 must have padding 0 and end 1, got" in said


def test_a_configuration_that_no_longer_fits_is_written_anew(llama, whole, tmp_path):
    assert imported(whole, tmp_path / "ours", BYTE) == 0
    kept = tmp_path / "ours/hugging_face_config.json"
    change_json(kept, rope_theta=5.0, extra_key="stale")
    assert exported(tmp_path / "ours", tmp_path / "back") == 0
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["rope_theta"] == 10_000.0
    assert "extra_key" not in config


def test_a_checkpoint_of_a_run_is_exported(tmp_path):
    """The policy of a step's state, and not the optimiser's arrays beside it."""
    from nlhf_jax import checkpoints
    from nlhf_jax.types import TrainState

    name = "qwen_3"
    source = model_folder(tmp_path / "ours", name)
    (source / "params.safetensors").unlink()
    tree = conversions_tree(conversion_toys.parameters(name))
    for step, factor in ((1, 1.0), (2, 3.0)):
        params = {"params": scaled(tree, factor), "average": scaled(tree, 7.0)}
        state = TrainState(jnp.int32(step), params, {"params": scaled(tree, 5.0)})
        saver = checkpoints.Checkpointer(source / "checkpoints")
        saver.save(step, state, {})
        saver.close()
    for path, factor in (("ours", 3.0), ("ours/checkpoints/1", 1.0)):
        target = tmp_path / f"to{factor}"
        assert exported(tmp_path / path, target) == 0
        assert imported(target, tmp_path / f"back{factor}", BYTE) == 0
        found = numbers_of(tmp_path / f"back{factor}")
        for place, array in conversion_toys.parameters(name).items():
            expected = array * np.float32(factor)
            np.testing.assert_array_equal(found[place], expected)


def conversions_tree(leaves):
    from nlhf_jax.conversion.shapes import nested

    return nested({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def scaled(tree, factor):
    import jax

    return jax.tree.map(lambda leaf: leaf * jnp.float32(factor), tree)


def test_a_step_that_is_damaged_is_not_exported(llama, tmp_path, capsys):
    source = model_folder(tmp_path / "ours", "llama")
    file = source / "params.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(bytes(raw))
    capsys.readouterr()
    code = exported(source, tmp_path / "theirs")
    assert "digest differs" in refused(capsys, tmp_path / "theirs", code)


def test_float16_is_taken_as_it_is(whole, tmp_path):
    file = whole / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    safetensors.numpy.save_file(halves, file)
    assert imported(whole, tmp_path / "ours", BYTE) == 0
    found = numbers_of(tmp_path / "ours")
    assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
    assert imported(whole, tmp_path / "wide", BYTE, "--dtype=float32") == 0
    wide = numbers_of(tmp_path / "wide")
    for path, array in found.items():
        np.testing.assert_array_equal(wide[path], array.astype(np.float32))
    # Jobs read either.
    for folder in ("ours", "wide"):
        policies.load_policy(str(tmp_path / folder))


def test_t5_files_of_all_ages_are_read(tmp_path):
    """Copies of the embedding, a table nobody reads, and an output that is shared."""
    model_folder(tmp_path / "ours", "t5_1_0")
    assert exported(tmp_path / "ours", tmp_path / "theirs") == 0
    file = tmp_path / "theirs/model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    table = arrays["shared.weight"]
    arrays["encoder.embed_tokens.weight"] = table
    arrays["decoder.embed_tokens.weight"] = table
    arrays["lm_head.weight"] = table
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    arrays[unread] = np.ones((32, 2), np.float32)
    safetensors.numpy.save_file(arrays, file)
    assert imported(tmp_path / "theirs", tmp_path / "old", BYTE) == 0
    same_numbers(numbers_of(tmp_path / "old"), numbers_of(tmp_path / "ours"))
    # As transformers 5 writes a T5 1.1 whose two tables are equal.
    for name in ("lm_head.weight", unread):
        del arrays[name]
    safetensors.numpy.save_file(arrays, file)
    config = tmp_path / "theirs/config.json"
    change_json(config, tie_word_embeddings=True, scale_decoder_outputs=False)
    assert imported(tmp_path / "theirs", tmp_path / "new", BYTE) == 0
    description = folders.read_description(tmp_path / "new")
    assert not description.settings.logits_via_embedding
    kernel = numbers_of(tmp_path / "new")["decoder/logits_dense/kernel"]
    np.testing.assert_array_equal(kernel, table.T)


# --- what is refused


def _arrays(change):
    """Damages the tensors of a folder's one file."""

    def damage(folder):
        file = folder / "model.safetensors"
        arrays = safetensors.numpy.load_file(file)
        change(arrays)
        safetensors.numpy.save_file(arrays, file)

    return damage


def _config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES = {
    "vocabulary": (
        _config(vocab_size=300),
        r"lm_head.weight must have the shape \(300, 16\), got",
    ),
    "small_vocabulary": (
        lambda folder: (
            _config(vocab_size=258)(folder),
            _arrays(
                lambda a: a.update(
                    {
                        name: a[name][:258].copy()
                        for name in ("model.embed_tokens.weight", "lm_head.weight")
                    }
                )
            )(folder),
        ),
        "the vocabulary has 259 ids, but the model has only 258 rows",
    ),
    "deeper": (_config(num_hidden_layers=3), r"tensor model.layers.2.\S+ is missing"),
    "shallower": (
        _config(num_hidden_layers=1),
        r"tensor model.layers.1.\S+ has no place",
    ),
    "wider": (_config(intermediate_size=24), r"mlp.\w+_proj.\w+ must have"),
    "extra": (
        _arrays(lambda a: a.update({"model.layers.0.extra": np.ones(2)})),
        "tensor model.layers.0.extra has no place",
    ),
    "missing": (_arrays(lambda a: a.pop(NORM)), f"tensor {NORM} is missing"),
    "misshapen": (
        _arrays(lambda a: a.update({NORM: np.ones(15, np.float32)})),
        rf"tensor {NORM} must have the shape \(16,\), got \(15,\)",
    ),
    "truncated": (_truncate, "model.safetensors must have .* bytes"),
    "pickled": (_pickle, "pytorch_model.bin is pickled and is not read"),
    "no_tensors": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has no model.safetensors and no model.safetensors.index.json",
    ),
    "family": (_config(model_type="phi3"), "model_type must be one of gemma"),
    "switch": (_config(hidden_act="relu"), "hidden_act must be one of"),
    "text_for_a_number": (_config(hidden_size="16"), "config.json"),
    "no_config": (
        lambda folder: (folder / "config.json").unlink(),
        "is in no format that is known .*nlhf: .*hugging_face: a folder with config",
    ),
    "no_json": (
        lambda folder: (folder / "config.json").write_text("{"),
        "is in no format that is known",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_taken_whole_is_refused(whole, tmp_path, capsys, name):
    damage, said = DAMAGES[name]
    damage(whole)
    code = imported(whole, tmp_path / "ours", BYTE)
    sentence = refused(capsys, tmp_path / "ours", code)
    assert re.search(said, sentence), sentence


def _map(change):
    def damage(folder):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return damage


def _outside(folder):
    """A file outside of the folder that would be read."""
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    (folder.parent / "outside.safetensors").write_bytes(shard.read_bytes())
    _map(
        lambda places: places.update(
            {
                name: "../outside.safetensors"
                for name, file in places.items()
                if file == shard.name
            }
        )
    )(folder)


def _shard(folder, number):
    return sorted(folder.glob("*.safetensors"))[number]


def _elsewhere(folder):
    """The index says of one tensor that it is in another file than it is."""
    file = _shard(folder, 0)
    if NORM in safetensors.numpy.load_file(file):
        file = _shard(folder, 1)
    _map(lambda places: places.update({NORM: file.name}))(folder)


PART_DAMAGES = {
    "missing_file": (
        lambda folder: _shard(folder, 1).unlink(),
        r"model-00002-of-\d+.safetensors is missing, which should hold \w",
    ),
    "outside": (_outside, r"must name files of its own folder, got '../outside"),
    "not_in_index": (_map(lambda places: places.pop(NORM)), f"tensor {NORM} is in"),
    "other_file": (_elsewhere, f"tensor {NORM} is"),
    "not_in_file": (
        _map(lambda places: places.update({"ghost": places[NORM]})),
        "tensor ghost is missing in",
    ),
    "twice": (
        lambda folder: _shard(folder, 2).write_bytes(_shard(folder, 1).read_bytes()),
        r"is in .*model-00003-of-\d+.safetensors, and the index says",
    ),
    "no_map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("name", PART_DAMAGES)
def test_files_that_do_not_belong_together_are_refused(parts, tmp_path, capsys, name):
    damage, said = PART_DAMAGES[name]
    damage(parts)
    code = imported(parts, tmp_path / "ours", BYTE)
    sentence = refused(capsys, tmp_path / "ours", code)
    assert re.search(said, sentence), sentence


def test_rounding_must_be_allowed(llama, tmp_path, capsys):
    target = tmp_path / "ours"
    code = imported(llama / "whole", target, BYTE, "--dtype=bfloat16")
    sentence = refused(capsys, target, code)
    assert "is float32 and bfloat16 would round its numbers" in sentence
    assert "--allow_rounding" in sentence
    words = (BYTE, "--dtype=bfloat16", "--allow_rounding")
    assert imported(llama / "whole", target, *words) == 0
    assert {array.dtype.name for array in numbers_of(target).values()} == {"bfloat16"}
    capsys.readouterr()
    code = exported(llama / "ours", tmp_path / "theirs", "--dtype=bfloat16")
    assert "would round" in refused(capsys, tmp_path / "theirs", code)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer of at l"),
        (
            {"model_type": "gemma2", "sliding_window_pattern": 0},
            "sliding_window_pattern must be an integer of at least 1, got 0",
        ),
        ({"rope_scaling": "x"}, "rope_scaling must be an object, got 'x'"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object, got [1]"),
        (
            {"rope_parameters": {"full_attention": [1]}},
            "rope_parameters must hold objects, got [1]",
        ),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be in [0, inf), got inf"),
        ({"eos_token_id": {}}, "special tokens must be named by their ids, got {}"),
        ({"pad_token_id": float("inf")}, "must be named by their ids, got inf"),
        ({"rope_theta": 10**400}, "too large"),
    ],
)
def test_a_value_that_no_network_has_is_one_sentence(
    whole, tmp_path, capsys, change, said
):
    change_json(whole / "config.json", **change)
    code = imported(whole, tmp_path / "ours", BYTE)
    assert said in refused(capsys, tmp_path / "ours", code)


def test_what_goes_with_a_vocabulary_goes_with_it(whole, tmp_path):
    """Its special tokens, ends and template say nothing of another one's."""
    for name in ("special_tokens_map.json", "generation_config.json"):
        (whole / name).write_text('{"eos_token_id": 7}')
    (whole / "added_tokens.json").write_text("{}")
    (whole / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert imported(whole, tmp_path / "ours", BYTE) == 0
    kept = {"model.json", "params.safetensors", "hugging_face_config.json"}
    assert {file.name for file in (tmp_path / "ours").iterdir()} == kept


def test_a_target_that_is_there_is_not_touched(llama, tmp_path, capsys):
    target = tmp_path / "ours"
    target.mkdir()
    (target / "mine").write_text("kept")
    assert imported(llama / "whole", target, BYTE) == 2
    assert "there is already something at" in capsys.readouterr().err
    assert [file.name for file in target.iterdir()] == ["mine"]
    assert exported(llama / "ours", target) == 2
    assert [file.name for file in target.iterdir()] == ["mine"]


def test_folders_made_on_the_way_go_too(whole, tmp_path, capsys):
    _arrays(lambda a: a.update({NORM: a[NORM] / 3}))(whole)
    target = tmp_path / "new" / "deep" / "ours"
    assert imported(whole, target, BYTE, "--dtype=bfloat16") == 2
    assert not (tmp_path / "new").exists()
    assert imported(whole, target, BYTE) == 0
    assert (target / "model.json").is_file()


def test_an_interrupted_import_leaves_nothing(whole, tmp_path, monkeypatch):
    from nlhf_jax.jobs import our_weights

    def stop(folder, weights, options):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(our_weights, "write_folder", stop)
    assert imported(whole, tmp_path / "ours", BYTE) == 130
    assert sorted(f.name for f in tmp_path.iterdir()) == ["whole"]


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        pytest.raises(UserError, match=r"ours' is not written: .*No space left"),
        conversions.written_whole(tmp_path / "ours") as folder,
    ):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_must_be_named_if_there_is_none(whole, tmp_path, capsys):
    (whole / "tokenizer_config.json").unlink()
    code = imported(whole, tmp_path / "ours")
    sentence = refused(capsys, tmp_path / "ours", code)
    assert "the source holds no vocabulary: --vocabulary must name" in sentence
    code = imported(whole, tmp_path / "ours", "--vocabulary=nowhere.model")
    assert "nowhere.model" in refused(capsys, tmp_path / "ours", code)


@pytest.mark.parametrize(
    "words, said",
    [
        (["import"], "the following arguments are required"),
        (["import", "--from=x", "--to=y", "--colour=3"], "unrecognized arguments"),
        (["import", "--from=nowhere", "--to=y"], "there is nothing to import at"),
        (["import", "--from=x", "--to="], "to must be a folder"),
        (["import", "--from=x", "--to=gs://b/c"], "mount the bucket"),
        (["import", "--from=x", "--to=y", "--format=onnx"], "invalid choice: 'onnx'"),
        (["import", "--from=x", "--to=y", "--inputs_length=0"], "at least 1, got 0"),
        (["import", "--from=x", "--to=y", "--prompt=a"], "--prompt is read by --check"),
        (["export", "--checkpoint=x", "--to=y"], "required: --format"),
        (
            ["export", "--checkpoint=nowhere", "--to=y", "--format=hugging_face"],
            "'nowhere' does not exist",
        ),
        (
            ["export", "--checkpoint=x", "--to=y", "--format=nlhf", "--shard_gig=0"],
            "unrecognized arguments",
        ),
    ],
)
def test_wrong_words_are_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sentence = refused(capsys, tmp_path / "y", cli.main(words))
    assert said in sentence


@pytest.mark.parametrize("size", ["inf", "1e300", "nan", "0"])
def test_a_size_of_files_that_cannot_be_is_one_sentence(llama, tmp_path, capsys, size):
    target = tmp_path / "theirs"
    code = exported(llama / "ours", target, f"--shard_gigabytes={size}")
    assert "shard_gigabytes must be in (0.0, 1000000" in refused(capsys, target, code)


@pytest.mark.parametrize("flag", ["from", "to", "vocabulary", "checkpoint", "base"])
def test_the_home_of_nobody_is_one_sentence(llama, tmp_path, capsys, flag):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    source = tmp_path / "adapter" if flag == "base" else llama / "whole"
    words = {"from": source, "to": tmp_path / "new"}
    if flag == "checkpoint":
        words = {"to": tmp_path / "new", "format": "nlhf"}
    words |= {flag: "~nobody_of_that_name/x"}
    command = "export" if flag == "checkpoint" else "import"
    code = cli.main([command, *(f"--{k}={v}" for k, v in words.items())])
    sentence = refused(capsys, tmp_path / "new", code)
    assert "there is no home folder for '~nobody_of_that_name/x'" in sentence


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_check_without_the_libraries_is_refused_first(
    llama, tmp_path, monkeypatch, capsys, missing
):
    import sys

    for name in ("torch", "transformers"):
        there = type(sys)(name) if name != missing else None
        monkeypatch.setitem(sys.modules, name, there)
    target = tmp_path / "target"
    for run, source in ((imported, "whole"), (exported, "ours")):
        sentence = refused(capsys, target, run(llama / source, target, "--check"))
        assert f"--check needs {missing}, which is not installed" in sentence
        assert "nlhf_jax[hf]" in sentence


def test_a_judge_without_parameters_is_not_exported(tmp_path, capsys):
    description = folders.ModelDescription(
        "preference", SHAPES["t5_1_1"], {"inputs": 5, "targets": 3}
    )
    folders.describe(tmp_path / "judge", description, "byte")
    code = exported(tmp_path / "judge", tmp_path / "theirs")
    sentence = refused(capsys, tmp_path / "theirs", code)
    assert "no checkpoint in" in sentence


def test_ours_again_in_another_dtype(llama, tmp_path):
    words = ["export", f"--checkpoint={llama / 'ours'}", f"--to={tmp_path / 'half'}"]
    words += ["--format=nlhf", "--dtype=bfloat16", "--allow_rounding", "--check"]
    assert cli.main(words) == 0
    half = numbers_of(tmp_path / "half")
    for path, array in numbers_of(llama / "ours").items():
        np.testing.assert_array_equal(half[path], array.astype(jnp.bfloat16))


def test_every_format_is_complete():
    for name in formats.FORMATS:
        found = formats.load(name)
        assert found.looks_for
        assert callable(found.open)
    with pytest.raises(UserError, match=r"format must be one of .*did you mean"):
        formats.load("huging_face")


def test_nothing_is_recognised_in_rubbish(tmp_path):
    for number, text in enumerate(["", "[]", '"model_type"', "{", "\0" * 50]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(text)
        (folder / "model.json").mkdir()
        with pytest.raises(UserError, match="in no format that is known"):
            formats.recognised(folder)
