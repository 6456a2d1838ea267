# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names and configurations, and agreement with `transformers`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import hugging_face, shapes
from nlhf_jax.conversion.hugging_face_config import settings_from_config
from nlhf_jax.conversion.tensors import of_array
from nlhf_jax.models.decoder_only import decoder_only_language_model
from nlhf_jax.types import PromptBatch
from tests.decoder_only_toys import FAMILIES, parameters

pytestmark = pytest.mark.usefixtures("compiled_quickly")
VOCAB = 64
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Name -> (model_type, what its config.json says beside SMALL).
CONFIGS = {
    "llama_2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_3": (
        "llama",
        {"rope_theta": 500.0, "rope_scaling": LLAMA_3, "tie_word_embeddings": True},
    ),
    "llama_linear": (
        "llama",
        {
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
        },
    ),
    "gemma_1": (
        "gemma",
        {"num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu"},
    ),
    "gemma_2": (
        "gemma2",
        {
            "query_pre_attn_scalar": 11,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma_2_no_caps": (
        "gemma2",
        {
            "sliding_window": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
    ),
    "gemma_3": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 11,
            "sliding_window": 4,
            "sliding_window_pattern": 3,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "qwen_2": ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen_2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen_3": ("qwen3", {"head_dim": 12, "rope_theta": 1e6}),
}


def config_of(name):
    """Returns a config.json's content."""
    family, switches = CONFIGS[name]
    return {"model_type": family} | SMALL | switches


def as_theirs(params, settings):
    """Returns our parameters' arrays under their names."""
    tensors = {
        path: of_array(np.asarray(leaf)) for path, leaf in shapes.flat(params).items()
    }
    found = hugging_face.to_hugging_face(tensors, settings)
    return {name: tensor.read() for name, tensor in found.items()}


def as_ours(arrays, settings):
    """Returns the tree of our parameters of their arrays."""
    tensors = {name: of_array(array) for name, array in arrays.items()}
    found = hugging_face.from_hugging_face(tensors, settings)
    return shapes.nested({path: tensor.read() for path, tensor in found.items()})


# --- names


@pytest.mark.parametrize("family", ["llama_3", "gemma_3", "qwen_2", "biases"])
def test_there_and_back_is_bit_for_bit(family):
    settings, params = FAMILIES[family], parameters(FAMILIES[family])
    theirs = as_theirs(params, settings)
    assert len(theirs) == len(jax.tree.leaves(params))
    back = as_ours(theirs, settings)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_names_and_layouts_by_hand():
    settings, params = FAMILIES["gemma_3"], parameters(FAMILIES["gemma_3"])
    theirs = as_theirs(params, settings)
    layer = params["layers_2"]
    ours = {
        "model.embed_tokens.weight": params["token_embedder"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "model.layers.2.self_attn.k_proj.weight": layer["attention"]["key"]["kernel"].T,
        "model.layers.2.self_attn.k_norm.weight": layer["attention"]["key_norm"][
            "scale"
        ],
        "model.layers.2.mlp.up_proj.weight": layer["mlp"]["wi_1"]["kernel"].T,
        "model.layers.2.post_attention_layernorm.weight": layer["post_attention_norm"][
            "scale"
        ],
        "model.layers.2.pre_feedforward_layernorm.weight": layer["pre_mlp_norm"][
            "scale"
        ],
    }
    for name, expected in ours.items():
        np.testing.assert_array_equal(theirs[name], expected)
    # Without norms at the blocks' ends, the same name means another norm.
    params = parameters(FAMILIES["biases"])
    theirs = as_theirs(params, FAMILIES["biases"])
    np.testing.assert_array_equal(
        theirs["model.layers.0.post_attention_layernorm.weight"],
        params["layers_0"]["pre_mlp_norm"]["scale"],
    )
    np.testing.assert_array_equal(
        theirs["model.layers.1.mlp.down_proj.bias"],
        params["layers_1"]["mlp"]["wo"]["bias"],
    )


def _cut(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]


def _wide(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.zeros((3, 16))


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.v_proj.weight"),
            r"tensor model.layers.1.self_attn.v_proj.weight is missing",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros(3)}),
            r"tensor model.layers.2.mlp.up_proj.weight has no place",
        ),
        (_cut, r"model.norm.weight must have the shape \(16,\), got \(15,\)"),
        (_wide, r"mlp.up_proj.weight must have the shape \(20, 16\), got \(3, 16\)"),
    ],
    ids=["missing", "unknown", "short", "other"],
)
def test_what_does_not_fit_is_named(damage, said):
    settings, params = FAMILIES["llama_3"], parameters(FAMILIES["llama_3"])
    tensors = as_theirs(params, settings)
    damage(tensors)
    with pytest.raises(UserError, match=said):
        as_ours(tensors, settings)


def test_a_head_beside_a_tied_output_is_the_embedding_or_refused():
    settings, params = FAMILIES["qwen_2"], parameters(FAMILIES["qwen_2"])
    tensors = as_theirs(params, settings)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    back = as_ours(tensors, settings)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(UserError, match=r"lm_head.weight must equal model.embed"):
        as_ours(tensors, settings)


# --- configurations


def test_a_configuration_by_hand():
    settings = settings_from_config(config_of("gemma_3"))
    assert settings.attention_pattern == ("local", "local", "global")
    assert (settings.rope_base, settings.local_rope_base) == (1000.0, 50.0)
    assert (settings.rope_scaling, settings.rope_factor) == ("linear", 8.0)
    assert settings.sliding_window == 4 and settings.query_scalar == 11
    assert settings.norm_plus_one and settings.post_norms and settings.query_key_norm
    assert settings.tied_output and settings.activation == "gelu"
    assert (settings.attention_soft_cap, settings.logit_soft_cap) == (0, 0)
    written = {
        "rope_parameters": {
            GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            LOCAL: {"rope_type": "default", "rope_theta": 50.0},
        },
        "layer_types": [LOCAL, LOCAL, GLOBAL],
    }
    kept = config_of("gemma_3")
    for key in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        del kept[key]
    del kept["sliding_window_pattern"]
    # As the newer files have it.
    assert settings_from_config(kept | written) == settings


def test_null_is_no_default():
    config = config_of("gemma_2")
    del config["final_logit_softcapping"]
    assert settings_from_config(config).logit_soft_cap == 30.0
    config["final_logit_softcapping"] = None
    assert settings_from_config(config).logit_soft_cap == 0.0


def test_ids_are_the_files_unless_told():
    config = config_of("llama_2") | {"eos_token_id": [9, 8], "pad_token_id": None}
    settings = settings_from_config(config)
    assert (settings.pad_id, settings.eos_id) == (0, 9)
    settings = settings_from_config(config, pad_id=4, eos_id=5)
    assert (settings.pad_id, settings.eos_id) == (4, 5)


@pytest.mark.parametrize(
    "name, changed, said",
    [
        ("llama_2", {"model_type": "llamma"}, "model_type .*did you mean 'llama'"),
        ("llama_2", {"hidden_size": None}, "must have the key 'hidden_size'"),
        ("llama_2", {"hidden_act": "relu"}, "hidden_act must be one of"),
        (
            "llama_2",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type must be one of default, linear, llama3; got 'yarn'",
        ),
        ("llama_2", {"partial_rotary_factor": 0.5}, "must be 1, got 0.5"),
        ("gemma_2", {"layer_types": [LOCAL]}, "must name 3 layers, got 1"),
        ("gemma_3", {"use_bidirectional_attention": True}, "must be false, got true"),
    ],
)
def test_what_the_network_cannot_do_is_refused(name, changed, said):
    with pytest.raises(UserError, match=said):
        settings_from_config(config_of(name) | changed)


# --- agreement


@pytest.fixture(scope="module")
def transformers():
    """The libraries, on one thread."""
    reason = "transformers is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    found = pytest.importorskip("transformers", reason=reason)
    torch.set_num_threads(1)
    return found


def theirs(transformers, name):
    """Returns their random model, every array of it random."""
    import torch

    torch.manual_seed(0)
    config = config_of(name)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for path, tensor in model.named_parameters():
            if tensor.ndim == 1:
                centre = 0.0 if "bias" in path or "gemma" in name else 1.0
                tensor.copy_(centre + 0.3 * torch.randn_like(tensor))
    return model


def ours(model, name):
    """Returns (settings, our functions, our parameters) of their model."""
    settings = settings_from_config(config_of(name))
    network = decoder_only_language_model(settings)
    tensors = {path: leaf.numpy() for path, leaf in model.state_dict().items()}
    params = as_ours(tensors, settings)
    return settings, network, jax.tree.map(jnp.asarray, params)


@pytest.mark.battery
def test_a_switch_that_is_off_would_be_seen(transformers):
    """The comparison fails for a network that lacks one of its family's switches."""
    import torch

    model = theirs(transformers, "gemma_2")
    settings, _, params = ours(model, "gemma_2")
    tokens = np.random.default_rng(0).integers(2, VOCAB, (1, 12))
    with torch.no_grad():
        said = model(torch.tensor(tokens)).logits[0, :-1].numpy()
    prompt = PromptBatch(jnp.asarray(tokens[:, :1]), jnp.ones((1, 1), bool))

    def difference(settings):
        network = decoder_only_language_model(settings)
        logits = network.logits(params, prompt, jnp.asarray(tokens[:, 1:]))
        return np.abs(np.asarray(logits[0]) - said).max()

    assert difference(settings) < 1e-4
    for switch in (
        {"query_scalar": 0.0},
        {"attention_soft_cap": 0.0},
        {"logit_soft_cap": 0.0},
        {"sliding_window": 5},
        {"attention_pattern": ("global", "local")},
        {"scale_embedding": False},
        {"norm_plus_one": False},
        {"activation": "silu"},
        {"rope_base": 9000.0},
    ):
        assert difference(dataclasses.replace(settings, **switch)) > 1e-3, switch
