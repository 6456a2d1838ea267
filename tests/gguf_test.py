# SPDX-License-Identifier: Apache-2.0
"""GGUF files: names, layouts and quantisations, damage, agreement with transformers."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import formats, gguf_files, gguf_settings
from nlhf_jax.conversion.shapes import check_complete, flat, nested
from nlhf_jax.jobs import conversions, our_weights
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.models.rotary import plain_frequencies, stretched
from nlhf_jax.types import PromptBatch
from tests.decoder_only_toys import parameters
from tests.gguf_toys import NETWORKS, metadata_of, pairs, toy

MISSING = "gguf is not installed"
gguf = pytest.importorskip("gguf", reason=MISSING)
pytestmark = pytest.mark.usefixtures("compiled_quickly")


def opened(path):
    """Returns the weights in a file, once it is known that they are complete."""
    weights = gguf_files.open_gguf(path, {})
    check_complete(weights)
    return weights


# --- what is read


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_is_read_as_the_network_it_was(tmp_path, name):
    settings = NETWORKS[name]
    weights = opened(toy(tmp_path / "toy.gguf", name))
    assert weights.settings == settings
    for path, leaf in flat(parameters(settings)).items():
        found, tensor = weights.tensors[path].read(), weights.tensors[path]
        assert (
            (found.shape, found.dtype)
            == (tensor.shape, tensor.dtype)
            == (
                leaf.shape,
                np.float32,
            )
        )
        # A norm's scale has lost what adding 1 rounds away.
        lost = 1e-7 if settings.norm_plus_one and path.endswith("scale") else 0.0
        np.testing.assert_allclose(found, leaf, rtol=0, atol=lost, err_msg=path)


def test_rows_of_heads_by_hand():
    rows = np.array([[0], [10], [1], [11], [2], [12], [5], [15], [6], [16], [7], [17]])
    wanted = [0, 1, 2, 10, 11, 12, 5, 6, 7, 15, 16, 17]
    assert gguf_files.halves(rows, 2).ravel().tolist() == wanted
    assert gguf_files.halves(rows[:, 0], 2).tolist() == wanted
    np.testing.assert_array_equal(pairs(gguf_files.halves(rows, 2), 2), rows)


def test_biases_of_llama_are_ordered_as_its_rows(tmp_path, monkeypatch):
    settings = dataclasses.replace(
        NETWORKS["llama"], query_key_value_bias=True, output_bias=True, mlp_bias=True
    )
    monkeypatch.setitem(NETWORKS, "llama", settings)
    weights = opened(toy(tmp_path / "toy.gguf", "llama"))
    assert weights.settings == settings
    for name in ("query", "key", "value", "out"):
        path = f"layers_1/attention/{name}/bias"
        wanted = parameters(settings)["layers_1"]["attention"][name]["bias"]
        np.testing.assert_array_equal(weights.tensors[path].read(), wanted)


@pytest.mark.parametrize(
    "kind, levels", [("Q8_0", 254), ("Q4_1", 15), ("Q5_0", 31), ("F16", 2000)]
)
def test_quantised_numbers_are_within_a_step(tmp_path, kind, levels):
    weights = opened(toy(tmp_path / "toy.gguf", "llama", kind))
    for path, leaf in flat(parameters(NETWORKS["llama"])).items():
        found = weights.tensors[path].read()
        assert found.dtype == np.float32
        if leaf.ndim < 2:
            np.testing.assert_array_equal(found, leaf)
            continue
        turn = path.endswith("kernel")
        theirs, wanted = (np.asarray(a.T if turn else a) for a in (found, leaf))
        blocks, exact = theirs.reshape(-1, 32), wanted.reshape(-1, 32)
        step = 2 * np.abs(exact).max(axis=1, keepdims=True) / levels
        assert (np.abs(blocks - exact) <= 1.1 * step).all(), path
        assert np.abs(blocks - exact).max() > 0


def test_a_large_tensor_is_unpacked_some_rows_at_a_time(tmp_path, monkeypatch):
    weights = opened(toy(tmp_path / "toy.gguf", "llama", "Q8_0"))
    table = weights.tensors["token_embedder/embedding"]
    wanted = table.read()
    monkeypatch.setattr(gguf_files, "BLOCK", 5 * 32 * 4)  # 48 rows, 5 at a time
    np.testing.assert_array_equal(table.read(), wanted)


def test_bfloat16_stays_bfloat16(tmp_path):
    weights = opened(toy(tmp_path / "toy.gguf", "qwen2", "BF16"))
    params = parameters(NETWORKS["qwen2"])
    table = weights.tensors["token_embedder/embedding"]
    assert table.dtype == table.read().dtype == np.dtype(jnp.bfloat16)
    wanted = np.asarray(params["token_embedder"]["embedding"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(table.read(), wanted)
    assert weights.tensors["final_norm/scale"].dtype == np.float32


def test_metadata_is_a_plain_dict(tmp_path):
    keys = {"tokenizer.ggml.tokens": ["a", "b", "ü"]}
    path = toy(tmp_path / "toy.gguf", "llama", keys=keys)
    found = gguf_files.metadata(path)
    assert found["general.architecture"] == "llama"
    assert found["tokenizer.ggml.tokens"] == ["a", "b", "ü"]
    assert found["llama.embedding_length"] == 32
    assert found["llama.rope.freq_base"] == 500.0


TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<pad>", "<bos>", "<eos>", *map(chr, range(65, 110))],
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 45,
    "tokenizer.ggml.merges": [],
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def test_the_tokenizer_goes_along(tmp_path, caplog):
    weights = opened(toy(tmp_path / "toy.gguf", "llama", keys=TOKENS))
    assert sorted(weights.files) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tokenizer = json.loads(weights.files["tokenizer.json"].read_text())
    assert tokenizer["model"]["vocab"]["C"] == 5
    assert not caplog.messages


def test_a_tokenizer_that_is_not_known_is_left_out_and_that_is_said(tmp_path, caplog):
    path = toy(tmp_path / "toy.gguf", "llama")
    assert opened(path).files == {}
    assert "its tokenizer is left out: tokenizer.ggml.model" in caplog.text


def test_from_a_file_to_a_model_folder(tmp_path, capsys):
    path, target = toy(tmp_path / "toy.gguf", "llama", keys=TOKENS), tmp_path / "ours"
    words = [f"--from={path}", f"--to={target}"]
    assert conversions.import_model(words) == 0
    assert "(gguf) into" in capsys.readouterr().out
    weights = our_weights.open_folder(target, {})
    assert weights.settings == NETWORKS["llama"]
    for name, leaf in flat(parameters(NETWORKS["llama"])).items():
        np.testing.assert_array_equal(weights.tensors[name].read(), leaf)
    # What is damaged leaves nothing behind.
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="is truncated or damaged"):
        conversions.import_model([f"--from={path}", f"--to={tmp_path / 'other'}"])
    assert sorted(child.name for child in tmp_path.iterdir()) == ["ours", "toy.gguf"]


def test_it_is_a_format_that_is_recognised_and_not_written(tmp_path):
    path = toy(tmp_path / "any_name", "llama")
    assert formats.recognised(path) == "gguf"
    assert formats.load("gguf").write is None
    assert not gguf_files.recognises(tmp_path)
    path.write_bytes(b"GGML" + bytes(20))
    assert not gguf_files.recognises(path)
    with pytest.raises(UserError, match="is no GGUF file: it does not begin with GGUF"):
        gguf_files.open_gguf(path, {})


def test_without_the_library_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    path = toy(tmp_path / "toy.gguf", "llama")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'nlhf_jax\[hf\]'"):
        gguf_files.open_gguf(path, {})


# --- settings


def _factors(base, head_dim, factor, original, low=1.0, high=4.0):
    """Returns what wave lengths are stretched by, number by number."""
    factors = []
    for pair in range(head_dim // 2):
        wave = 2 * math.pi * base ** (2 * pair / head_dim)
        if wave < original / high:
            factors.append(1.0)
        elif wave > original / low:
            factors.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_is_known_by_its_factors(tmp_path, factor):
    # Waves of 8 numbers from 6 to 2 * 10^4 positions: short, long, and between.
    factors_E = _factors(50_000.0, 8, factor, 8192)
    assert factors_E[0] == 1.0 and factors_E[-1] == np.float32(factor)
    path = toy(
        tmp_path / "toy.gguf",
        "llama",
        keys={"rope.freq_base": 50_000.0},
        tensors={"rope_freqs.weight": factors_E},
    )
    found = opened(path).settings
    assert found == dataclasses.replace(
        NETWORKS["llama"],
        rope_base=50_000.0,
        rope_scaling="llama3",
        rope_factor=factor,
    )
    plain_E = plain_frequencies(8, 50_000.0)
    np.testing.assert_allclose(plain_E / stretched(plain_E, found), factors_E, 1e-6)


@pytest.mark.parametrize(
    "factors_E", [_factors(500.0, 8, 8.0, 64), np.ones(3, np.float32)]
)
def test_other_factors_are_refused(tmp_path, factors_E):
    tensors = {"rope_freqs.weight": factors_E}
    path = toy(tmp_path / "toy.gguf", "llama", tensors=tensors)
    with pytest.raises(UserError, match=r"rope_freqs.weight must hold the factors of"):
        gguf_files.open_gguf(path, {})


def test_linear_scaling_and_the_width_of_a_head(tmp_path):
    keys = {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
        "attention.key_length": None,
        "attention.value_length": None,
        "rope.dimension_count": 8,
    }
    found = opened(toy(tmp_path / "toy.gguf", "llama", keys=keys)).settings
    assert found == dataclasses.replace(
        NETWORKS["llama"], rope_scaling="linear", rope_factor=4.0
    )


@pytest.mark.parametrize("name, layers", [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_divide_by_another_root(name, layers):
    settings = dataclasses.replace(NETWORKS[name], num_layers=layers, emb_dim=40)
    keys = {f"{name}.{k}": v for k, v in metadata_of(settings, name).items()}
    keys["general.architecture"] = name
    shapes = {f"blk.{i}.ffn_up.weight": () for i in range(layers)}
    shapes["token_embd.weight"] = (48, 40)
    assert gguf_settings.settings_of(keys, shapes).query_scalar == 10.0
    keys[f"{name}.block_count"] = layers - 1
    assert gguf_settings.settings_of(keys, shapes).query_scalar == 0.0


def test_fewer_layers_than_the_pattern_are_all_local(tmp_path):
    settings = dataclasses.replace(
        NETWORKS["gemma3"], num_layers=2, attention_pattern=("local", "local")
    )
    keys = {f"gemma3.{k}": v for k, v in metadata_of(settings, "gemma3").items()}
    keys["general.architecture"] = "gemma3"
    shapes = {"token_embd.weight": (48, 32), "blk.0.a": (), "blk.1.a": ()}
    assert gguf_settings.settings_of(keys, shapes) == settings


@pytest.mark.parametrize(
    "name, keys, said",
    [
        ("llama", {"block_count": None}, "llama.block_count must be one .* got none"),
        (
            "llama",
            {"block_count": [1, 2]},
            r"block_count must be one int.*\[1, 2\]",
        ),
        ("llama", {"block_count": 3}, "llama.block_count must be 2, since .* got 3"),
        ("llama", {"block_count": 2**31}, "block_count must be 2, since the file"),
        ("llama", {"attention.value_length": 6}, "value_length must be 8, the width"),
        ("llama", {"rope.dimension_count": 4}, "dimension_count must be 8, the width"),
        ("llama", {"expert_count": 8}, "expert_count must be 0, since mixtures"),
        (
            "llama",
            {"rope.scaling.type": "yarn"},
            "scaling.type must be one of linear",
        ),
        (
            "llama",
            {"attention.layer_norm_rms_epsilon": None},
            "layer_norm_rms_epsilon must be one number, got none",
        ),
        ("gemma2", {"attention.sliding_window": None}, "sliding_window must be one"),
    ],
)
def test_metadata_that_is_no_network_of_ours(tmp_path, name, keys, said):
    path = toy(tmp_path / "toy.gguf", name, keys=keys)
    with pytest.raises(UserError, match=said):
        gguf_files.open_gguf(path, {})


@pytest.mark.parametrize("number", [2**32 - 1, "two", None])
def test_tokens_that_are_none(number):
    settings = NETWORKS["llama"]
    keys = {f"llama.{k}": v for k, v in metadata_of(settings, "llama").items()}
    keys |= {"general.architecture": "llama", "tokenizer.ggml.padding_token_id": number}
    keys["tokenizer.ggml.eos_token_id"] = 7
    shapes = {"token_embd.weight": (48, 32), "blk.0.a": (), "blk.1.a": ()}
    found = gguf_settings.settings_of(keys, shapes)
    assert (found.pad_id, found.eos_id) == (0, 7)


def test_another_architecture(tmp_path):
    path = toy(tmp_path / "toy.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lambo"))
    with pytest.raises(UserError, match="architecture must be one of gemma, gemma2"):
        gguf_files.open_gguf(path, {})


# --- damage


NORM = "blk.1.ffn_norm.weight"


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({NORM: None}, f"tensor {NORM} is missing"),
        ({"token_embd.weight": None}, "tensor token_embd.weight is missing"),
        ({NORM: np.ones(31, np.float32)}, rf"{NORM} must have the shape \(32,\), got"),
        (
            {"blk.0.ffn_up.weight": np.ones((32, 64), np.float32)},
            r"blk.0.ffn_up.weight must have the shape \(64, 32\), got \(32, 64\)",
        ),
        (
            {"blk.2.ffn_norm.weight": np.ones(32, np.float32)},
            "tensor blk.2.ffn_norm.weight has no place in this network .did you mean",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, tensors, said):
    path = toy(tmp_path / "toy.gguf", "llama", tensors=tensors)
    with pytest.raises(UserError, match=said):
        gguf_files.open_gguf(path, {})


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_short(tmp_path, share):
    path = toy(tmp_path / "toy.gguf", "llama")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="is truncated or damaged: ") as caught:
        gguf_files.open_gguf(path, {})
    assert "\n" not in str(caught.value)


def test_bytes_that_are_wrong(tmp_path):
    path = toy(tmp_path / "toy.gguf", "llama")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    head = whole.index(b"token_embd")
    for _ in range(60):
        place = int(rng.integers(4, head + 100))
        path.write_bytes(
            whole[:place] + bytes([int(rng.integers(256))]) + whole[place + 1 :]
        )
        try:
            weights = gguf_files.open_gguf(path, {})
        except UserError as error:
            assert "\n" not in str(error)
        else:  # a byte that nothing hangs on
            check_complete(weights)


# --- agreement


@pytest.mark.battery
@pytest.mark.parametrize(
    "name, kind",
    [
        ("llama", "Q4_1"),
        ("llama", "F32"),
        ("qwen2", "Q8_0"),
        ("gemma2", "F16"),
        ("gemma3", "F32"),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, name, kind):
    reason = "transformers is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    path = toy(tmp_path / "toy.gguf", name, kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="toy.gguf", dtype=torch.float32
    ).eval()
    tokens = np.random.default_rng(0).integers(2, 48, (1, 20))
    with torch.no_grad():
        said_TV = model(torch.tensor(tokens)).logits[0, :-1].numpy()
    weights = opened(path)
    settings = weights.settings
    if name == "gemma3":
        # Theirs leaves out what the file does not say: the query's scale.
        assert model.config.query_pre_attn_scalar == 256
        settings = dataclasses.replace(settings, query_scalar=256.0)
    if name == "gemma2":
        settings = dataclasses.replace(settings, query_scalar=256.0)
    arrays = {key: jnp.asarray(t.read()) for key, t in weights.tensors.items()}
    network = decoder_only_language_model(settings)
    prompt = PromptBatch(jnp.asarray(tokens[:, :1]), jnp.ones((1, 1), bool))
    logits = jax.jit(network.logits)(nested(arrays), prompt, jnp.asarray(tokens[:, 1:]))
    np.testing.assert_allclose(logits[0], said_TV, atol=1e-4)
    # Logits of one size would agree with anything.
    assert said_TV.std() > 0.3
