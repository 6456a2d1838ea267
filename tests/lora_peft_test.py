# SPDX-License-Identifier: Apache-2.0
"""Adapters in `peft`'s folders: names, both ways, mistakes, and `peft` itself."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import agreement, hugging_face_folders, safetensors_files
from nlhf_jax.conversion import peft as ours
from nlhf_jax.conversion.hugging_face import to_hugging_face
from nlhf_jax.conversion.shapes import flat
from nlhf_jax.conversion.tensors import Weights, cast, of_array
from nlhf_jax.decoder_settings import DecoderOnlySettings
from nlhf_jax.models import adapters as lora_of
from nlhf_jax.models.families import language_model
from nlhf_jax.settings import LoraSettings
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import PromptBatch

LLAMA = DecoderOnlySettings(
    vocab_size=40,
    emb_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=20,
    num_layers=2,
)
T5 = T5Settings(40, 16, 2, 8, 20, 1, 1)
TARGETS = ("query", "value", "wo")
LORA = LoraSettings(rank=3, alpha=6.0, targets=TARGETS)
STABLE = LoraSettings(rank=4, alpha=6.0, targets=("key", "out"), rank_stabilized=True)
NETWORKS = {"llama": LLAMA, "t5": T5}


def drawn(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
    )


def adapters_of(settings, lora, seed=1):
    model = lora_of.with_base(language_model(settings), None, lora)
    return drawn(jax.eval_shape(model.init, jax.random.key(0)), seed)


def base_of(settings):
    return drawn(
        jax.eval_shape(language_model(settings).init, jax.random.key(0)), seed=0
    )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    return ours.write_adapter(path, LORA, adapters_of(LLAMA, LORA), LLAMA)


def rewrite(folder, change):
    """Writes the file of tensors anew, as `change` makes it."""
    file = folder / ours.TENSORS_FILE
    tensors = {n: t.read() for n, t in safetensors_files.tensors_of(file).items()}
    change(tensors)
    made = {n: of_array(np.ascontiguousarray(t)) for n, t in tensors.items()}
    safetensors_files.write(file, made)


# --- names and files


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("lora", [LORA, STABLE], ids=["plain", "stabilized"])
def test_what_is_written_is_read_again(tmp_path, name, lora):
    settings = NETWORKS[name]
    wanted = adapters_of(settings, lora)
    written = ours.write_adapter(tmp_path / "a", lora, wanted, settings)
    found_lora, found = ours.read_adapter(written, settings)
    assert {*found_lora.targets} == {*lora.targets}
    assert found_lora.scale == lora.scale
    assert flat(found).keys() == flat(wanted).keys()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_names_and_shapes_are_pefts(folder):
    tensors = safetensors_files.tensors_of(folder / ours.TENSORS_FILE)
    start = "base_model.model.model.layers.1"
    assert tensors[f"{start}.self_attn.q_proj.lora_A.weight"].shape == (3, 16)
    assert tensors[f"{start}.self_attn.v_proj.lora_B.weight"].shape == (8, 3)
    assert tensors[f"{start}.mlp.down_proj.lora_A.weight"].shape == (3, 20)
    assert len(tensors) == 2 * 3 * 2
    config = json.loads((folder / ours.CONFIG_FILE).read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6.0, "LORA")


def test_a_t5s_attentions_have_their_own_names():
    names = ours.kernels(T5)
    block = "decoder.block.0"
    assert names[f"{block}.layer.1.EncDecAttention.v"][0] == (
        "decoder/layers_0/encoder_decoder_attention/value"
    )
    assert names[f"{block}.layer.2.DenseReluDense.wo"][1] == (20, 16)


# --- merging, one tensor at a time


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_weights_are_the_merged_model(name):
    settings = NETWORKS[name]
    base, on = base_of(settings), adapters_of(settings, LORA)
    reads = []

    def watched(path, array):
        tensor = of_array(array)
        return tensor._replace(read=lambda: (reads.append(path), array)[1])

    tensors = {path: watched(path, array) for path, array in flat(base).items()}
    found = ours.merged(Weights(settings, tensors), LORA, on)
    assert not reads
    wanted = flat(lora_of.merged(base, on, LORA))
    for path, tensor in found.tensors.items():
        np.testing.assert_allclose(tensor.read(), wanted[path], rtol=0, atol=1e-6)
    assert sorted(reads) == sorted(tensors)


def test_what_is_merged_is_float32_and_rounded_only_if_allowed():
    """The base has bfloat16, in which a small adapter would add nothing."""
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base_of(LLAMA))
    on = jax.tree.map(lambda leaf: leaf * 1e-2, adapters_of(LLAMA, LORA))
    tensors = {path: of_array(array) for path, array in flat(base).items()}
    found = ours.merged(Weights(LLAMA, tensors), LORA, on)
    wanted = flat(
        lora_of.merged(jax.tree.map(lambda x: x.astype(np.float32), base), on, LORA)
    )
    for path, tensor in found.tensors.items():
        assert tensor.dtype == tensor.read().dtype == np.float32
        np.testing.assert_allclose(tensor.read(), wanted[path], rtol=0, atol=1e-7)
    place = "layers_0/attention/query/kernel"
    with pytest.raises(UserError, match=f"{place} is float32 .* --allow_rounding"):
        cast(found, "bfloat16").tensors[place].read()
    rounded = cast(found, "bfloat16", allow_rounding=True).tensors[place].read()
    assert rounded.dtype == jnp.dtype("bfloat16")


def test_adapters_of_another_base_are_refused():
    base, other = base_of(T5), adapters_of(LLAMA, LORA)
    tensors = {path: of_array(array) for path, array in flat(base).items()}
    with pytest.raises(UserError, match=r"adapter layers_0/.* needs a .* got none"):
        ours.merged(Weights(T5, tensors), LORA, other)
    wide = T5Settings(40, 16, 4, 8, 20, 1, 1)
    with pytest.raises(UserError, match=r"needs a .* of \(16, 32\), got one of \(16, "):
        ours.merged(Weights(T5, tensors), LORA, adapters_of(wide, LORA))


# --- mistakes


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _misspelt(tensors):
    tensors[Q.replace("q_proj", "q_prox")] = tensors.pop(Q)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop(Q), f"tensor {Q} is missing"),
        (_misspelt, r"tensor .*q_prox.* has no place in this .*did you mean.*q_proj"),
        (
            lambda t: t.update({Q: t[Q][:2]}),
            r"q_proj.lora_A.weight must have the shape \(3, 16\), .* got \(2, 16\)",
        ),
        (lambda t: t.clear(), "must hold adapters, got no tensor"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(folder, change, sentence):
    rewrite(folder, change)
    with pytest.raises(UserError, match=sentence):
        ours.read_adapter(folder, LLAMA)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"r": 4}, r"must have the shape \(4, 20\), of rank 4 .* got \(3, 20\)"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora must be false, got true"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save must be null, got \[\"l"),
        ({"r": "3"}, "r and lora_alpha must be numbers, got '3'"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights must be true, got "pissa"'),
        ({"init_lora_weights": "eva"}, "init_lora_weights must be true"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must be true"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens must be null, g"),
        ({"use_qalora": True}, "use_qalora must be null, got true"),
        ({"layers_to_transform": 0}, "layers_to_transform must be null, got 0"),
        ({"layers_to_transform": [1]}, r"layers_to_transform must be null, got \[1\]"),
        ({"kasa_config": {"a": 1}}, "kasa_config must be null"),
        ({"use_bdlora": {"a": 1}}, "use_bdlora must be null"),
        ({"arrow_config": {"a": 1}}, "arrow_config must be null"),
        ({"of_a_later_version": "x"}, 'of_a_later_version must be null, got "x"'),
        ({"use_rslora": "false"}, "use_rslora must be a bool, got 'false'"),
    ],
)
def test_a_config_that_means_more_is_refused(folder, change, sentence):
    file = folder / ours.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=sentence):
        ours.read_adapter(folder, LLAMA)


def test_a_config_that_says_no_more_is_read(folder):
    file = folder / ours.CONFIG_FILE
    more = {"init_lora_weights": "gaussian", "use_dora": None, "lora_dropout": 0.1}
    more |= {"kasa_config": None, "use_qalora": False, "qalora_group_size": 16}
    more |= {"of_a_later_version": {}, "loftq_config": {}, "layers_pattern": "layers"}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    assert ours.read_adapter(folder, LLAMA)[0].rank == LORA.rank


def test_a_config_that_nests_too_deeply_is_refused(folder):
    (folder / ours.CONFIG_FILE).write_text("[" * 200_000)
    with pytest.raises(UserError, match="does not describe an adapter"):
        ours.read_adapter(folder, LLAMA)


def test_an_adapter_of_another_base_is_refused(folder, tmp_path):
    wide = DecoderOnlySettings(40, 32, 4, 2, 4, 20, 2)
    with pytest.raises(UserError, match=r"must have the shape \(32, 3\)"):
        ours.read_adapter(folder, wide)
    with pytest.raises(UserError, match="has no place in this network's adapters"):
        ours.read_adapter(folder, T5)
    with pytest.raises(UserError, match="is missing"):
        ours.write_adapter(tmp_path / "b", LORA, adapters_of(T5, LORA), LLAMA)
    assert not (tmp_path / "b").exists()


def test_a_folder_is_neither_guessed_nor_overwritten(folder, tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        ours.read_adapter(tmp_path, LLAMA)
    with pytest.raises(UserError, match="exists already"):
        ours.write_adapter(folder, LORA, adapters_of(LLAMA, LORA), LLAMA)
    file = tmp_path / "file"
    file.write_text("mine")
    for place, said in ((file, "and is a file"), (file / "in", "is not written")):
        with pytest.raises(UserError, match=said):
            ours.write_adapter(place, LORA, adapters_of(LLAMA, LORA), LLAMA)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("is_there", [False, True])
def test_after_an_error_no_half_of_an_adapter_is_left(tmp_path, monkeypatch, is_there):
    """Not after a full disk, and not after Ctrl-C; the same folder is then taken."""
    target = tmp_path / "a"
    if is_there:
        target.mkdir()
    before = list(tmp_path.rglob("*"))
    given = target, LORA, adapters_of(LLAMA, LORA), LLAMA
    for error, raised in ((OSError(28, "full"), UserError), (KeyboardInterrupt,) * 2):
        with monkeypatch.context() as patch:

            def stop(*_, error=error, **unused):
                raise error

            patch.setattr(pathlib.Path, "write_text", stop)
            with pytest.raises(raised):
                ours.write_adapter(*given)
        assert list(tmp_path.rglob("*")) == before
    assert ours.write_adapter(*given) == target
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert list(tmp_path.iterdir()) == [target]


# --- peft itself


def their_llama():
    """Returns transformers' network with our base's numbers."""
    pytest.importorskip("torch", reason="transformers is not installed")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    import torch

    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=20,
        num_hidden_layers=2,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    network = transformers.LlamaForCausalLM(config).eval()
    tensors = {path: of_array(array) for path, array in flat(base_of(LLAMA)).items()}
    state = to_hugging_face(tensors, LLAMA)
    network.load_state_dict(
        {k: torch.tensor(np.ascontiguousarray(t.read())) for k, t in state.items()}
    )
    return network


TOKENS = np.array([[5, 6, 7, 8, 9, 10]])


def their_logits(network):
    import torch

    with torch.no_grad():
        return network(torch.tensor(TOKENS)).logits[0, 1:-1].numpy()


def our_logits(lora, on):
    """The logits after each token of a response, given a prompt of two tokens."""
    prompts = PromptBatch(jnp.asarray(TOKENS[:, :2]), jnp.ones((1, 2), bool))
    base = jax.tree.map(jnp.asarray, base_of(LLAMA))
    model = lora_of.with_base(language_model(LLAMA), base, lora)
    on = jax.tree.map(jnp.asarray, on)
    logits_BTV = jax.jit(model.logits)(on, prompts, jnp.asarray(TOKENS[:, 2:]))
    return np.asarray(logits_BTV)[0]


@pytest.mark.parametrize("lora", [LORA, STABLE], ids=["plain", "stabilized"])
def test_peft_loads_ours_and_says_the_same(tmp_path, lora):
    network = their_llama()
    peft = pytest.importorskip("peft", reason="peft is not installed")
    on = adapters_of(LLAMA, lora)
    without = their_logits(network)
    ours.write_adapter(tmp_path / "a", lora, on, LLAMA)
    loaded = peft.PeftModel.from_pretrained(network, str(tmp_path / "a"))
    found = their_logits(loaded)
    assert abs(found - without).max() > 1e-2
    np.testing.assert_allclose(our_logits(lora, on), found, rtol=0, atol=1e-4)


def test_ours_loads_pefts_and_says_the_same(tmp_path):
    network = their_llama()
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import torch

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["k_proj", "gate_proj"], lora_dropout=0.1
    )
    made = peft.get_peft_model(network, config).eval()
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    made.save_pretrained(str(tmp_path / "theirs"))
    lora, on = ours.read_adapter(tmp_path / "theirs", LLAMA)
    assert lora == LoraSettings(rank=4, alpha=8.0, targets=("key", "wi_0"))
    found = our_logits(lora, jax.tree.map(jnp.asarray, on))
    np.testing.assert_allclose(found, their_logits(made), rtol=0, atol=1e-4)


# --- peft itself, on a T5


def their_t5(folder):
    """Returns transformers' T5 1.1 with our base's numbers, as it loads our export."""
    pytest.importorskip("torch", reason="transformers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    tensors = {path: of_array(array) for path, array in flat(base_of(T5)).items()}
    folder.mkdir()
    options = {"max_positions": 16, "shard_bytes": 1 << 30}
    whole = Weights(T5, tensors, vocabulary="byte")
    hugging_face_folders.write_folder(folder, whole, options)
    return agreement.load_theirs(folder)


def t5_logits(network):
    """Their logits after each token of a response, given a prompt of two tokens."""
    import torch

    prompt, response = TOKENS[:, :2], TOKENS[:, 2:]
    shifted = np.concatenate([np.zeros((1, 1), int), response[:, :-1]], axis=1)
    with torch.no_grad():
        found = network(
            input_ids=torch.tensor(prompt), decoder_input_ids=torch.tensor(shifted)
        )
    return found.logits[0].numpy()


def our_t5_logits(lora, on):
    prompts = PromptBatch(jnp.asarray(TOKENS[:, :2]), jnp.ones((1, 2), bool))
    base = jax.tree.map(jnp.asarray, base_of(T5))
    model = lora_of.with_base(language_model(T5), base, lora)
    on = jax.tree.map(jnp.asarray, on)
    response = jnp.asarray(TOKENS[:, 2:])
    return np.asarray(jax.jit(model.logits)(on, prompts, response))[0]


def test_on_a_t5_peft_and_ours_load_each_other(tmp_path):
    network = their_t5(tmp_path / "base")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import torch

    on, without = adapters_of(T5, LORA), t5_logits(network)
    ours.write_adapter(tmp_path / "ours", LORA, on, T5)
    loaded = peft.PeftModel.from_pretrained(network, str(tmp_path / "ours"))
    found = t5_logits(loaded)
    np.testing.assert_allclose(our_t5_logits(LORA, {}), without, rtol=0, atol=1e-4)
    assert abs(found - without).max() > 1e-2
    np.testing.assert_allclose(our_t5_logits(LORA, on), found, rtol=0, atol=1e-4)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["k", "wi_1"])
    made = peft.get_peft_model(their_t5(tmp_path / "again"), config).eval()
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    made.save_pretrained(str(tmp_path / "theirs"))
    lora, on = ours.read_adapter(tmp_path / "theirs", T5)
    assert lora == LoraSettings(rank=4, alpha=8.0, targets=("key", "wi_1"))
    found = our_t5_logits(lora, on)
    np.testing.assert_allclose(found, t5_logits(made), rtol=0, atol=1e-4)
