# SPDX-License-Identifier: Apache-2.0
"""Models that `transformers` makes, imported, exported, and read by it again."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from nlhf_jax import cli
from nlhf_jax.checks import UserError
from nlhf_jax.conversion import agreement
from nlhf_jax.conversion.tensors import Tensor
from nlhf_jax.jobs import folders, our_weights
from tests import conversion_test
from tests.conversion_toys import (
    exported,
    imported,
    model_folder,
    numbers_of,
    refused,
    same_numbers,
)

pytestmark = [pytest.mark.battery, pytest.mark.usefixtures("compiled_quickly")]
BYTE = "--vocabulary=byte"
SMALL_T5 = {
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
# Name -> (model_type, what its config.json says beside SMALL_T5).
T5 = {
    "t5_1_0": ("t5", {}),
    "t5_1_1": (
        "t5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5_gated_relu": ("t5", {"feed_forward_proj": "gated-relu"}),
    "mt5": ("mt5", {}),
    "byt5": ("t5", {"num_decoder_layers": 1, "feed_forward_proj": "gated-gelu"}),
}
NAMES = (*T5, *conversion_test.CONFIGS, "mistral")
# Several files, and bfloat16, for some.
PARTS = ("t5_1_1", "gemma_2", "qwen_3")
HALVES = ("mt5", "llama_3", "gemma_3")


@pytest.fixture(scope="module")
def transformers():
    """The libraries, on one thread."""
    reason = "transformers is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    found = pytest.importorskip("transformers", reason=reason)
    torch.set_num_threads(1)
    agreement.require()
    return found


def random_model(transformers, name):
    """Returns their model, every array of it random, and what is equal unequal."""
    import torch

    torch.manual_seed(0)
    if name in T5:
        family, switches = T5[name]
        config = {"model_type": family} | SMALL_T5 | switches
    elif name == "mistral":
        config = {"model_type": "mistral", "sliding_window": 5}
        config = conversion_test.config_of("llama_2") | config
    else:
        config = conversion_test.config_of(name)
    config |= {"vocab_size": 300}
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    pair, alone = transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM
    model = (pair if config.is_encoder_decoder else alone).from_config(config).float()
    with torch.no_grad():
        if config.is_encoder_decoder and not getattr(
            config, "scale_decoder_outputs", False
        ):
            head = torch.randn_like(model.lm_head.weight)
            model.lm_head.weight = torch.nn.Parameter(head)
        for path, tensor in model.named_parameters():
            if tensor.ndim == 1:
                centre = 0.0 if "bias" in path or "gemma" in name else 1.0
                tensor.copy_(centre + 0.3 * torch.randn_like(tensor))
            elif "relative_attention_bias" in path:
                tensor.copy_(torch.randn_like(tensor))
    return model.eval()


@pytest.fixture(scope="module", params=NAMES)
def saved(request, transformers, tmp_path_factory):
    """(name, a folder that transformers has written)."""
    import torch

    name = request.param
    place = tmp_path_factory.mktemp(name)
    model = random_model(transformers, name)
    if name in HALVES:
        model = model.to(torch.bfloat16)
    size = "20KB" if name in PARTS else "5GB"
    model.save_pretrained(place / "theirs", max_shard_size=size)
    assert (name in PARTS) == (len(list((place / "theirs").glob("*.safetensors"))) > 1)
    return name, place


def test_import_agrees_and_export_loads_and_nothing_changes(saved, capsys):
    """The issue's three claims, of one model of every family."""
    name, place = saved
    assert imported(place / "theirs", place / "ours", BYTE, "--check") == 0
    said = capsys.readouterr().out
    assert "agrees with transformers" in said
    assert "96 of 96 greedy tokens the same" in said
    assert exported(place / "ours", place / "back", "--check") == 0
    assert "agrees with transformers" in capsys.readouterr().out
    assert imported(place / "back", place / "again", BYTE) == 0
    same_numbers(numbers_of(place / "again"), numbers_of(place / "ours"))
    description = folders.read_description(place / "ours")
    assert folders.read_description(place / "again") == description
    # Their very tensors are back, in their dtype.
    dtypes = {array.dtype.name for array in numbers_of(place / "ours").values()}
    assert dtypes == {"bfloat16" if name in HALVES else "float32"}
    same_numbers(all_arrays(place / "back"), all_arrays(place / "theirs"))


def all_arrays(folder):
    """Returns the arrays of all files of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


@pytest.mark.parametrize("name", ["t5_1_0", "t5_1_1", "gemma_2", "mistral"])
def test_a_configuration_of_ours_loads_there(transformers, tmp_path, name, capsys):
    """Without one that was imported, the configuration is written from settings."""
    source = model_folder(tmp_path / "ours", name)
    assert exported(source, tmp_path / "theirs", "--check", "--prompt=abc") == 0
    assert "32 of 32 greedy tokens" in capsys.readouterr().out


def test_rounded_weights_are_compared_as_rounded(transformers, tmp_path):
    words = ("--dtype=bfloat16", "--allow_rounding", "--check")
    source = model_folder(tmp_path / "ours", "llama")
    assert exported(source, tmp_path / "theirs", *words) == 0
    assert exported(source, tmp_path / "wide") == 0
    assert imported(tmp_path / "wide", tmp_path / "half", BYTE, *words) == 0


@pytest.mark.parametrize("command", ["import", "export"])
def test_what_does_not_agree_leaves_nothing(
    transformers, tmp_path, command, monkeypatch, capsys
):
    """A change of one kernel by a part in a thousand is seen on either way."""
    source = model_folder(tmp_path / "ours", "qwen_3")
    assert exported(source, tmp_path / "theirs") == 0
    change_on_the_way(monkeypatch)
    target = tmp_path / "target"
    capsys.readouterr()
    if command == "import":
        code = imported(tmp_path / "theirs", target, BYTE, "--check")
    else:
        code = exported(source, target, "--check")
    sentence = refused(capsys, target, code)
    assert "transformers does not agree: largest difference of logits" in sentence


def change_on_the_way(monkeypatch):
    """Lets what is opened be other than what is written."""
    true = our_weights.open_folder

    def opened(path, options):
        weights = true(path, options)
        name = "layers_0/attention/value/kernel"
        tensor = weights.tensors[name]
        calls = []

        def read():
            calls.append(1)
            # The first reading is the writer's, the next that of the comparison.
            factor = 1.001 if len(calls) > 1 or "partial" in str(path) else 1.0
            return (tensor.read() * np.float32(factor)).astype(np.float32)

        changed = {name: Tensor(tensor.shape, tensor.dtype, read)}
        object.__setattr__(weights, "tensors", dict(weights.tensors) | changed)
        return weights

    monkeypatch.setattr(our_weights, "open_folder", opened)


def test_a_tensor_that_theirs_has_no_place_for_is_seen(transformers, tmp_path):
    source = model_folder(tmp_path / "ours", "llama")
    assert exported(source, tmp_path / "theirs") == 0
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    for change, said in (
        ({"mlp_bias": False}, "unexpected_keys in .*mlp.down_proj.bias"),
        ({"attention_bias": True}, "missing_keys in .*k_proj.bias"),
        ({"model_type": "nothing"}, "transformers cannot load"),
    ):
        (tmp_path / "theirs/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            agreement.load_theirs(tmp_path / "theirs")


def test_numbers_that_are_none_do_not_agree(transformers, tmp_path):
    source = model_folder(tmp_path / "ours", "llama")
    assert exported(source, tmp_path / "theirs") == 0
    weights = our_weights.open_folder(source, {})
    name = "final_norm/scale"
    shape = weights.tensors[name].shape
    none = Tensor(shape, np.dtype(np.float32), lambda: np.full(shape, np.nan))
    broken = dict(weights.tensors) | {name: none}
    object.__setattr__(weights, "tensors", broken)
    model = agreement.load_theirs(tmp_path / "theirs")
    assert not agreement.compare(weights, model, [[3, 4]], length=4).is_good


def test_sampling_from_an_import_says_what_generate_says(
    transformers, tmp_path, capsys
):
    """The whole way, as users go it: `nlhf sample` beside `model.generate`."""
    import torch

    model = random_model(transformers, "t5_1_1")
    model.save_pretrained(tmp_path / "theirs")
    words = (BYTE, "--targets_length=16")
    assert imported(tmp_path / "theirs", tmp_path / "ours", *words) == 0
    capsys.readouterr()
    command = [f"--checkpoint={tmp_path / 'ours'}", "--prompt=hello there"]
    assert cli.main(["sample", *command]) == 0
    said = capsys.readouterr().out
    ids = torch.tensor([[byte + 3 for byte in b"hello there"] + [1]])
    with torch.no_grad():
        found = model.generate(ids, do_sample=False, num_beams=1, max_new_tokens=16)
    tokens = found[0, 1:].tolist()
    tokens = tokens[: tokens.index(1)] if 1 in tokens else tokens
    read = bytes(i - 3 for i in tokens if 3 <= i < 259)
    assert said.rstrip("\n") == read.decode("utf-8", "ignore").rstrip("\n")
    assert jax.default_backend() == "cpu"
