# SPDX-License-Identifier: Apache-2.0
"""Our settings as config.json and back, and T5's configurations by hand."""

import dataclasses
import json

import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import t5_config, t5_names
from nlhf_jax.conversion.hugging_face import their_name
from nlhf_jax.conversion.hugging_face_config import (
    settings_from_config,
    shortest_pattern,
)
from nlhf_jax.conversion.hugging_face_folders import same_network, settings_of
from nlhf_jax.conversion.hugging_face_writing import ARCHITECTURES, config_of, plain
from nlhf_jax.conversion.shapes import flat, parameter_shapes
from nlhf_jax.conversion.t5_config import config_of_t5, t5_settings
from tests import conversion_test, conversion_toys, decoder_only_toys
from tests.conversion_toys import SMALL_DECODER, SMALL_T5

FROM_THEIRS = {
    name: settings_from_config(conversion_test.config_of(name))
    for name in conversion_test.CONFIGS
}
# The toys' own mixture of families is none of theirs.
OF_TOYS = {
    name: settings
    for name, settings in decoder_only_toys.FAMILIES.items()
    if name not in ("biases",)
}


@pytest.mark.parametrize("name", FROM_THEIRS)
def test_a_configuration_is_written_as_it_was_read(name):
    settings = FROM_THEIRS[name]
    config = config_of(settings, 64)
    assert settings_from_config(json.loads(json.dumps(config))) == plain(settings)
    assert plain(settings) == plain(plain(settings))
    # The switches of some networks are those of more than one family.
    family = conversion_test.CONFIGS[name][0]
    if family in ("gemma2", "gemma3_text"):
        assert config["model_type"] == family
    assert config["architectures"] == [ARCHITECTURES[config["model_type"]]]
    assert config["max_position_embeddings"] == 64


@pytest.mark.parametrize("name", OF_TOYS)
def test_every_family_of_the_toys_is_one_of_theirs(name):
    config = config_of(OF_TOYS[name], 64)
    assert settings_from_config(config) == plain(OF_TOYS[name])


def test_old_and_new_readers_find_the_rotary_settings():
    """As files before transformers 5 have them; the new ones read these too."""
    config = config_of(FROM_THEIRS["llama_3"], 64)
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == conversion_test.LLAMA_3
    assert "rope_parameters" not in config


@pytest.mark.parametrize(
    "switches, said",
    [
        ({"logit_soft_cap": 3.0}, "llama, the nearest, has logit_soft_cap 0.0, and"),
        ({"norm_plus_one": True}, "has norm_plus_one False, and this network has True"),
        ({"output_bias": True}, "has query_key_value_bias True|output_bias False"),
        ({"post_norms": True, "scale_embedding": True}, "no Hugging Face family has"),
    ],
)
def test_a_network_of_no_family_is_refused_by_its_switch(switches, said):
    settings = SMALL_DECODER(num_layers=3, **switches)
    with pytest.raises(UserError, match=said):
        config_of(settings, 8)


def test_a_window_of_any_pattern_is_a_qwen():
    """Layers that no number tells apart are named one by one."""
    pattern = {"attention_pattern": ("global", "local", "local"), "sliding_window": 3}
    settings = SMALL_DECODER(num_layers=4, query_key_value_bias=True, **pattern)
    config = config_of(settings, 8)
    assert config["model_type"] == "qwen2"
    assert config["layer_types"].count("full_attention") == 2
    assert settings_from_config(config) == settings


def test_switches_that_are_not_read_do_not_matter():
    settings = SMALL_DECODER(
        rope_factor=3.0,
        local_rope_base=7.0,
        query_scalar=6.0,
        dtype="bfloat16",
        attention_pattern=("global", "global"),
    )
    assert plain(settings) == SMALL_DECODER()
    assert same_network(settings, SMALL_DECODER(pad_id=5, eos_id=7))
    assert not same_network(settings, SMALL_DECODER(mlp_bias=True))
    assert not same_network(settings, SMALL_T5())
    assert same_network(SMALL_T5(dropout_rate=0.1), SMALL_T5())
    assert settings_from_config(config_of(settings, 8)) == SMALL_DECODER()


@pytest.mark.parametrize(
    "kinds, pattern",
    [
        (["local", "global", "local"], ("local", "global")),
        (["global"] * 4, ("global",)),
        (["local", "local", "global"], ("local", "local", "global")),
    ],
)
def test_the_shortest_pattern(kinds, pattern):
    assert shortest_pattern(kinds) == pattern


def test_a_mistral_has_a_window_unless_it_is_null():
    config = conversion_test.config_of("llama_2") | {"model_type": "mistral"}
    settings = settings_from_config(config)
    assert settings.attention_pattern == ("local",)
    assert settings.sliding_window == 4096
    assert settings_from_config(config | {"sliding_window": None}) == (
        settings_from_config(config | {"model_type": "llama"})
    )


# --- T5

T5 = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
}


def test_t5_by_hand():
    old = t5_settings(T5)
    assert old.mlp_activations == ("relu",)
    assert old.logits_via_embedding
    assert (old.emb_dim, old.head_dim, old.mlp_dim, old.num_heads) == (512, 64, 1024, 6)
    assert (old.num_encoder_layers, old.num_decoder_layers) == (8, 8)
    assert old.dropout_rate == 0.1
    new = t5_settings(
        T5
        | {
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "num_decoder_layers": 3,
            "dropout_rate": 0.0,
            "pad_token_id": None,
        }
    )
    assert new.mlp_activations == ("gelu", "linear")
    assert not new.logits_via_embedding
    assert new.num_decoder_layers == 3
    multilingual = t5_settings(T5 | {"model_type": "mt5"})
    assert multilingual.mlp_activations == ("gelu", "linear")
    assert not multilingual.logits_via_embedding


@pytest.mark.parametrize(
    "config, scaled, shared",
    [
        ({}, True, False),
        ({"tie_word_embeddings": False}, False, False),
        # transformers 5 ties always, and says the scale.
        (
            {"tie_word_embeddings": True, "scale_decoder_outputs": False},
            False,
            True,
        ),
        ({"scale_decoder_outputs": True}, True, False),
        ({"model_type": "mt5"}, False, True),
        ({"model_type": "mt5", "tie_word_embeddings": False}, False, True),
    ],
)
def test_when_the_output_is_scaled_and_when_it_is_the_table(config, scaled, shared):
    assert t5_config.is_scaled(T5 | config) is scaled
    assert t5_config.may_share_table(T5 | config) is shared


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"d_model": None}, "must have the key 'd_model', got none"),
        ({"relative_attention_num_buckets": 16}, "num_buckets must be 32, got 16"),
        ({"relative_attention_max_distance": 64}, "max_distance must be 128, got 64"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon must be 1e-06, got 1e-05"),
        ({"eos_token_id": 2}, "eos_token_id must be 1, got 2"),
        ({"decoder_start_token_id": 2}, "decoder_start_token_id must be 0, got 2"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj must be one of"),
        ({"model_type": "umt5"}, "model_type must be one of .*; got 'umt5'"),
    ],
)
def test_what_our_t5_cannot_do_is_refused(changed, said):
    with pytest.raises(UserError, match=said):
        settings_of(T5 | changed)


@pytest.mark.parametrize("name", ["t5_1_0", "t5_1_1"])
def test_a_t5_is_written_as_it_is_read(name):
    settings = conversion_toys.SHAPES[name]
    config = json.loads(json.dumps(config_of(settings, 8)))
    assert settings_of(config) == settings
    assert config["tie_word_embeddings"] == settings.logits_via_embedding
    odd = dataclasses.replace(settings, mlp_activations=("gelu",))
    with pytest.raises(UserError, match=r"mlp_activations must be one of .*'gelu',\)"):
        config_of_t5(odd)


def test_names_of_a_t5_by_hand():
    settings = SMALL_T5()
    names = {
        "token_embedder/embedding": "shared.weight",
        "encoder/layers_1/attention/query/kernel": (
            "encoder.block.1.layer.0.SelfAttention.q.weight"
        ),
        "encoder/layers_1/mlp/wi_0/kernel": (
            "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
        ),
        "encoder/layers_0/pre_mlp_layer_norm/scale": (
            "encoder.block.0.layer.1.layer_norm.weight"
        ),
        "encoder/relpos_bias/rel_embedding": (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
        "decoder/layers_0/self_attention/out/kernel": (
            "decoder.block.0.layer.0.SelfAttention.o.weight"
        ),
        "decoder/layers_0/encoder_decoder_attention/value/kernel": (
            "decoder.block.0.layer.1.EncDecAttention.v.weight"
        ),
        "decoder/layers_0/pre_cross_attention_layer_norm/scale": (
            "decoder.block.0.layer.1.layer_norm.weight"
        ),
        "decoder/layers_0/mlp/wo/kernel": (
            "decoder.block.0.layer.2.DenseReluDense.wo.weight"
        ),
        "decoder/layers_0/pre_mlp_layer_norm/scale": (
            "decoder.block.0.layer.2.layer_norm.weight"
        ),
        "decoder/logits_dense/kernel": "lm_head.weight",
    }
    for ours, theirs in names.items():
        assert their_name(ours, settings) == theirs
    assert t5_names.is_turned("decoder/relpos_bias/rel_embedding")
    assert not t5_names.is_turned("token_embedder/embedding")


@pytest.mark.parametrize("name", conversion_toys.SHAPES)
def test_no_two_parameters_have_one_name(name):
    settings = conversion_toys.SHAPES[name]
    paths = flat(parameter_shapes(settings))
    assert len({their_name(path, settings) for path in paths}) == len(paths)


@pytest.mark.parametrize("layers", [1001, 10**9])
def test_a_depth_that_no_model_has_is_refused_at_once(layers):
    """Names of so many layers would be made for minutes."""
    config = conversion_test.config_of("gemma_2") | {"num_hidden_layers": layers}
    config.pop("layer_types", None)
    said = rf"num_hidden_layers must be in \[1, 1000\], got {layers}"
    with pytest.raises(UserError, match=said):
        settings_from_config(config)
    with pytest.raises(UserError, match=r"num_layers must be in \[1, 1000\]"):
        SMALL_DECODER(num_layers=layers)
    with pytest.raises(UserError, match=r"num_decoder_layers must be in \[1, 1000\]"):
        SMALL_T5(num_decoder_layers=layers)
