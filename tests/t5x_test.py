# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints: its own are read and written again bit for bit, damage is named."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import (
    t5x,
    t5x_arrays,
    t5x_index,
    t5x_layouts,
    t5x_settings,
    t5x_writer,
)
from nlhf_jax.conversion.shapes import check_complete, flat, nested
from nlhf_jax.jobs import conversions
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import PromptBatch
from tests.decoder_only_toys import FAMILIES, parameters
from tests.t5_toys import T5_1_0, T5_1_1, initialised
from tests.t5x_toys import (
    NATIVE,
    ORBAX,
    SCANNED,
    arrays_of,
    assert_same,
    params_of,
    unpack,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")
IN_EACH = dataclasses.replace(T5_1_1, num_encoder_layers=2, bias_in_each_layer=True)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder with T5X's own checkpoints."""
    return unpack(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def native(sample, tmp_path):
    """A copy of one in T5X's own layout, to be damaged: the checkpoint's folder."""
    shutil.copytree(sample / NATIVE, tmp_path / NATIVE)
    return tmp_path / NATIVE / "checkpoint_1"


# --- T5X's own files


@pytest.mark.parametrize("name", [NATIVE, ORBAX, SCANNED])
def test_the_sample_says_what_t5x_says(sample, name):
    weights = t5x.open_t5x(sample / name, {})
    shape = {"num_heads": 4, "head_dim": 3, "bias_in_each_layer": name == SCANNED}
    wanted = T5Settings(384, 8, 4, 3, 16, 2, 3)
    assert weights.settings == dataclasses.replace(wanted, **shape)
    expected = np.load(sample / name.removesuffix("_orbax") / "expected.npz")
    sources_BS = jnp.asarray(expected["in_encoder_input_tokens"])
    prompts = PromptBatch(sources_BS, sources_BS > 0)
    targets_BT = jnp.asarray(expected["in_decoder_target_tokens"])
    counts_BT = expected["in_decoder_loss_weights"] > 0
    model, params = t5_language_model(weights.settings), params_of(weights)
    logits_BTV = np.asarray(jax.jit(model.logits)(params, prompts, targets_BT, None))
    # After a response's end T5X masks what nobody scores.
    np.testing.assert_allclose(
        logits_BTV[counts_BT], expected["logits"][counts_BT], atol=1e-4
    )
    scores = jax.jit(model.token_scores)(params, prompts, targets_BT, None)
    sums_B = (np.asarray(scores.log_probs_BT) * counts_BT).sum(axis=1)
    np.testing.assert_allclose(sums_B, expected["score_batch"], atol=1e-4)


@pytest.mark.parametrize("name", [NATIVE, SCANNED])
def test_every_parameter_of_the_list_has_its_place(sample, name):
    lines = (sample / name / "params.tsv").read_text().splitlines()
    listed = {
        line.split("\t")[0].removeprefix("target/"): eval(line.split("\t")[1])
        for line in lines
        if line.startswith("target/")
    }
    arrays = t5x_arrays.open_checkpoint(sample / name).arrays
    assert {key: array.shape for key, array in arrays.items()} == listed
    weights = t5x.open_t5x(sample / name, {})
    assert sum(t.read().size for t in weights.tensors.values()) == sum(
        np.prod(shape) for shape in listed.values()
    )


def test_both_layouts_hold_the_same_bits(sample):
    ours = [t5x.open_t5x(sample / name, {}) for name in (NATIVE, ORBAX)]
    assert_same(*ours)


def _decoded(folder):
    index = t5x_index.read_index(folder)
    return dict(t5x_arrays._leaves(index["target"])), index["state"]["step"]


@pytest.mark.parametrize("name", [NATIVE, SCANNED])
def test_written_again_it_is_the_same_file_by_file(sample, tmp_path, name):
    weights = t5x.open_t5x(sample / name, {})
    options = {"step": "1", "optimizer": "false"}
    t5x_writer.write_t5x(tmp_path / "out", weights, options)
    theirs, ours = sample / name / "checkpoint_1", tmp_path / "out" / "checkpoint_1"
    files = [f.relative_to(ours) for f in ours.rglob("*") if f.is_file()]
    assert len(files) == 1 + 2 * len(_decoded(theirs)[0])
    for file in files:
        if str(file) != "checkpoint":
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    assert _decoded(ours) == _decoded(theirs)
    raw = msgpack.unpackb((ours / "checkpoint").read_bytes(), raw=False)
    raw_theirs = msgpack.unpackb((theirs / "checkpoint").read_bytes(), raw=False)
    del raw_theirs["optimizer"]["state"]["param_states"]
    assert raw == raw_theirs
    assert list(raw["optimizer"]) == list(raw_theirs["optimizer"])


@pytest.mark.battery
def test_as_orbax_it_has_the_tree_shapes_and_dtypes_of_t5x(sample, tmp_path):
    weights = t5x.open_t5x(sample / NATIVE, {})
    options = {"step": "1", "t5x_layout": "orbax"}
    t5x_writer.write_t5x(tmp_path, weights, options)

    def tree(folder):
        text = (folder / "checkpoint_1" / "state" / "_METADATA").read_text()
        entries = json.loads(text)["tree_metadata"]
        return {
            name: (entry["key_metadata"], entry["value_metadata"]["write_shape"])
            for name, entry in entries.items()
            if "'param_states'" not in name
        }

    assert tree(tmp_path) == tree(sample / ORBAX)
    theirs = t5x_arrays.open_checkpoint(sample / ORBAX).arrays
    ours = t5x_arrays.open_checkpoint(tmp_path).arrays
    assert {n: (a.shape, a.dtype) for n, a in ours.items()} == {
        n: (a.shape, a.dtype) for n, a in theirs.items()
    }
    assert_same(t5x.open_t5x(tmp_path, {}), weights)


def test_orbax_itself_reads_what_is_written(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    _, params = initialised(T5_1_0)
    options = {"step": "7", "t5x_layout": "orbax"}
    t5x_writer.write_t5x(tmp_path, weights_of(T5_1_0, params), options)
    state = ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoint_7" / "state")
    assert int(state["state"]["step"]) == 7
    jax.tree.map(np.testing.assert_array_equal, state["target"], params)


# --- networks of our own


@pytest.mark.parametrize("layout", t5x_arrays.LAYOUTS)
@pytest.mark.parametrize(
    "settings, scan",
    [(T5_1_0, ""), (T5_1_1, "false"), (IN_EACH, "true"), (IN_EACH, "false")],
    ids=["1.0", "1.1", "scanned", "heads_apart"],
)
def test_there_and_back_is_bit_for_bit(tmp_path, settings, scan, layout):
    _, params = initialised(settings)
    weights = weights_of(settings, params)
    options = {"t5x_layout": layout, "scan_layers": scan}
    t5x_writer.write_t5x(tmp_path, weights, options)
    back = t5x.open_t5x(tmp_path, {})
    assert back.settings == settings
    assert_same(back, weights)
    names = set(t5x_arrays.open_checkpoint(tmp_path).arrays)
    assert ("encoder/encoder/mlp/wo/kernel" in names) == (scan == "true")


@pytest.mark.parametrize("layout", t5x_arrays.LAYOUTS)
def test_bfloat16_stays_bfloat16(tmp_path, layout):
    _, params = initialised(T5_1_1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    weights = weights_of(T5_1_1, params)
    t5x_writer.write_t5x(tmp_path, weights, {"t5x_layout": layout})
    back = t5x.open_t5x(tmp_path, {})
    assert {t.dtype for t in back.tensors.values()} == {np.dtype(jnp.bfloat16)}
    assert_same(back, weights)


def test_tensors_are_read_one_at_a_time_and_from_a_scanned_array_a_layer(sample):
    weights = t5x.open_t5x(sample / SCANNED, {})
    whole = t5x_arrays.open_checkpoint(sample / SCANNED).arrays
    name = "decoder/{}/self_attention/out/kernel"
    stacked_HLKD = whole[name.format("decoder")].read(())
    for layer in range(3):
        ours = weights.tensors[name.format(f"layers_{layer}")].read()
        np.testing.assert_array_equal(ours, stacked_HLKD[:, layer].reshape(12, 8))


def test_layers_that_are_scanned_along_the_first_axis(tmp_path):
    _, params = initialised(IN_EACH)
    weights = weights_of(IN_EACH, params)
    arrays = t5x_writer.their_arrays(weights, True)
    turned = {
        name: t5x_arrays.StoredArray(
            np.moveaxis(tensor.read(), 1, 0).shape,
            tensor.dtype,
            lambda index, t=tensor: np.moveaxis(t.read(), 1, 0)[index],
        )
        if "coder/" in name and "norm/" not in name.split("/", 1)[1][:13]
        else t5x_arrays.StoredArray(
            tensor.shape, tensor.dtype, lambda index, t=tensor: t.read()[index]
        )
        for name, tensor in arrays.items()
        if "logits" not in name
    }
    layers = t5x_layouts.separate_layers(turned)
    for name in ("encoder/layers_1/mlp/wo/kernel", "decoder/layers_0/mlp/wi_1/kernel"):
        np.testing.assert_array_equal(
            layers[name].read(()), weights.tensors[name].read()
        )


def test_a_large_array_is_cut_and_read_as_one(tmp_path, monkeypatch):
    assert t5x_writer.chunks_of((250112, 4096), 4) == [15632, 4096]
    assert t5x_writer.chunks_of((32128, 1024), 4) == [32128, 1024]
    assert t5x_writer.chunks_of((3, 2**28), 4) == [1, 2**28]
    assert t5x_writer.chunks_of((), 4) == []
    monkeypatch.setattr(t5x_writer, "LARGEST_CHUNK", 100)
    _, params = initialised(T5_1_1)
    weights = weights_of(T5_1_1, params)
    t5x_writer.write_t5x(tmp_path, weights, {})
    table = tmp_path / "checkpoint_0" / "target.token_embedder.embedding"
    assert len(list(table.glob("*.0"))) > 10
    assert_same(t5x.open_t5x(tmp_path, {}), weights)
    for block in (1, 300):  # bytes: less than a chunk's, a few chunks'
        monkeypatch.setattr(t5x_arrays, "BLOCK", block)
        assert_same(t5x.open_t5x(tmp_path, {}), weights)


def test_the_vocabulary_goes_along_and_comes_back(tmp_path):
    _, params = initialised(T5_1_1)
    spm = tmp_path / "any.model"
    spm.write_bytes(b"pieces")
    weights = weights_of(T5_1_1, params)
    weights = dataclasses.replace(weights, files={"vocabulary.model": spm})
    t5x_writer.write_t5x(tmp_path / "out", weights, {})
    assert (tmp_path / "out" / "vocabulary.model").read_bytes() == b"pieces"
    back = t5x.open_t5x(tmp_path / "out", {})
    assert back.files == {"vocabulary.model": tmp_path / "out" / "vocabulary.model"}


def test_the_newest_of_several_steps_is_opened(tmp_path):
    _, params = initialised(T5_1_1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    t5x_writer.write_t5x(tmp_path, weights_of(T5_1_1, params), {"step": "20"})
    t5x_writer.write_t5x(tmp_path, weights_of(T5_1_1, zeros), {"step": "9"})
    assert_same(t5x.open_t5x(tmp_path, {}), weights_of(T5_1_1, params))
    nine = t5x.open_t5x(tmp_path / "checkpoint_9", {})
    assert not any(array.any() for array in arrays_of(nine).values())


def test_what_is_recognised(sample, tmp_path):
    for name in (NATIVE, ORBAX, SCANNED):
        assert t5x.recognises(sample / name)
        assert t5x.recognises(sample / name / "checkpoint_1")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000"\n')
    assert not t5x.recognises(tmp_path)
    assert not t5x.recognises(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no T5X checkpoint: neither a file"):
        t5x.open_t5x(tmp_path, {})


# --- arrays in the index


def test_arrays_within_the_index_are_read(tmp_path):
    _, params = initialised(T5_1_1)
    wanted = weights_of(T5_1_1, params)
    leaves = {name: t5x_index._packed(leaf) for name, leaf in flat(params).items()}
    name = "token_embedder/embedding"
    table = np.asarray(params["token_embedder"]["embedding"])
    pieces = [table.ravel()[:100], table.ravel()[100:]]
    leaves[name] = {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): size for i, size in enumerate(table.shape)},
        "chunks": {str(i): t5x_index._packed(piece) for i, piece in enumerate(pieces)},
    }
    t5x_index.write_index(tmp_path, nested(leaves), 3)
    assert_same(t5x.open_t5x(tmp_path, {}), wanted)


def test_specifications_of_other_times_and_places_are_read(native):
    def change(spec):
        path = spec.pop("kvstore")["path"]
        return spec | {
            "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"},
            "path": path,
        }

    wanted = arrays_of(t5x.open_t5x(native, {}))
    _rewrite(native, change)
    for file in native.glob("target.*/.zarray"):
        file.unlink()  # the index alone says what they are
    found = arrays_of(t5x.open_t5x(native, {}))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def _rewrite(folder, change):
    """Changes each specification of the index."""
    index = t5x_index.read_index(folder)
    leaves = dict(t5x_arrays._leaves(index["target"]))
    changed = {name: change(dict(spec)) for name, spec in leaves.items()}
    t5x_index.write_index(folder, nested(changed), 1)


# --- settings


def test_what_shapes_do_not_say_is_said(sample, caplog):
    t5x.open_t5x(sample / NATIVE, {})
    said = "\n".join(caplog.messages)
    assert "does not say its mlp_activations; those of T5 1.1 are taken" in said
    caplog.clear()
    weights = t5x.open_t5x(sample / NATIVE, {"mlp_activations": "relu,linear"})
    assert weights.settings.mlp_activations == ("relu", "linear")
    assert "mlp_activations" not in "\n".join(caplog.messages)


def test_the_config_of_the_run_is_read(native, caplog):
    (native.parent / "config.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "network.T5Config.mlp_activations = \\\n    ('relu', 'linear')\n"
        "network.T5Config.dropout_rate = %DROPOUT\n"
        "network.T5Config.num_heads = 4\n"
        "network.T5Config.dtype = 'bfloat16'\n"
    )
    weights = t5x.open_t5x(native, {})
    assert weights.settings.mlp_activations == ("relu", "linear")
    assert weights.settings.dropout_rate == 0.0
    assert "mlp_activations" not in "\n".join(caplog.messages)
    # What the user says goes before it.
    weights = t5x.open_t5x(native, {"mlp_activations": "gelu,linear"})
    assert weights.settings.mlp_activations == ("gelu", "linear")
    (native.parent / "config.gin").write_text("T5Config.num_decoder_layers = 4\n")
    with pytest.raises(
        UserError, match=r"num_decoder_layers must be 3.* got 4 from .*"
    ):
        t5x.open_t5x(native, {})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"mlp_activations": "relu"}, "mlp_activations must name 2, .* got 'relu'"),
        ({"mlp_activations": "silu,linear"}, "mlp_activations must be one of gelu"),
    ],
)
def test_options_that_the_tensors_contradict(sample, options, said):
    with pytest.raises(UserError, match=said):
        t5x.open_t5x(sample / NATIVE, options)


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            lambda s: s.pop("encoder/relpos_bias/rel_embedding"),
            "tensor encoder/relpos_bias/rel_embedding is missing, so this is no enc",
        ),
        (
            lambda s: s.update({"encoder/relpos_bias/rel_embedding": (2, 16)}),
            "rel_embedding must have 32 buckets, got 16",
        ),
        (
            lambda s: s.update({"encoder/layers_0/attention/query/kernel": (8, 7)}),
            "query/kernel must have a multiple of 2 columns, .* got 7",
        ),
        (
            lambda s: s.update({"token_embedder/embedding": (8,)}),
            r"token_embedder/embedding must have 2 axes, got the shape \(8,\)",
        ),
        (
            lambda s: s.update({"decoder/layers_987654321/mlp/wo/kernel": (10, 8)}),
            "all tensors of decoder/layers_2 are missing, .* of layers_987654321",
        ),
    ],
)
def test_shapes_that_are_no_t5(tmp_path, damage, said):
    shapes = dict(t5x.wanted_shapes(T5_1_1))
    assert t5x_settings.settings_of(shapes, {}, tmp_path) == T5_1_1
    damage(shapes)
    with pytest.raises(UserError, match=said):
        t5x_settings.settings_of(shapes, {}, tmp_path)


# --- damage


def _folder(native, name):
    return native / ("target." + name.replace("/", "."))


def _truncate(native):
    file = _folder(native, "encoder/layers_1/mlp/wo/kernel") / "0.0"
    file.write_bytes(file.read_bytes()[:40])


def _lose_chunk(native):
    (_folder(native, "encoder/layers_1/mlp/wo/kernel") / "0.0").unlink()


def _lose_array(native):
    shutil.rmtree(_folder(native, "encoder/layers_1/mlp/wo/kernel"))


def _not_json(native):
    (_folder(native, "encoder/layers_1/mlp/wo/kernel") / ".zarray").write_text("{")


def _elsewhere(path):
    def damage(native):
        wrong = "encoder.layers_1.mlp.wo.kernel"

        def change(spec):
            if wrong in spec["kvstore"]["path"]:
                spec["kvstore"] = {"driver": "file", "path": path}
            return spec

        _rewrite(native, change)

    return damage


def _link(native):
    place = _folder(native, "encoder/layers_1/mlp/wo/kernel")
    shutil.move(place, native.parent / "outside")
    place.symlink_to(native.parent / "outside")


@pytest.mark.parametrize(
    "damage, said",
    [
        (_truncate, "cannot be read: .*truncated"),
        (_lose_chunk, "cannot be read: .*is missing"),
        (_lose_array, "is missing: there is no folder"),
        (_not_json, "cannot be read: .*"),
        (_elsewhere("../../secret/"), "the path in the index must be a plain name"),
        (_elsewhere("/etc/"), "the path in the index must be a plain name"),
        (_elsewhere(".."), "the path in the index must be a plain name"),
        (_elsewhere(7), "the path in the index must be a plain name, got 7"),
        (_link, "leads out of the checkpoint's folder"),
    ],
)
def test_a_damaged_array_is_named(native, damage, said):
    damage(native)
    wanted = f"tensor encoder/layers_1/mlp/wo/kernel .*{said}"
    with pytest.raises(UserError, match=wanted) as caught:
        arrays_of(t5x.open_t5x(native, {}))
    assert "\n" not in str(caught.value)


def _index_without(native, change):
    index = t5x_index.read_index(native)
    leaves = dict(t5x_arrays._leaves(index["target"]))
    change(leaves)
    t5x_index.write_index(native, nested(leaves), 1)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda t: t.pop("decoder/layers_1/self_attention/key/kernel"),
            "tensor decoder/layers_1/self_attention/key/kernel is missing",
        ),
        (
            lambda t: t.update({"decoder/extra/kernel": t5x_index._packed([1.0])}),
            "tensor decoder/extra/kernel has no place in this network",
        ),
        (
            lambda t: t.update(
                {"decoder/decoder_norm/scale": t5x_index._packed([1.0])}
            ),
            r"tensor decoder/decoder_norm/scale must have the shape \(8,\), got \(1,\)",
        ),
        (
            lambda t: t.update(
                {"decoder/decoder_norm/scale": t5x_index._packed(np.arange(8))}
            ),
            "tensor decoder/decoder_norm/scale must be of float32 or bfloat16, got int",
        ),
        (
            lambda t: t.update({"decoder/decoder_norm/scale": "PLACEHOLDER"}),
            "tensor decoder/decoder_norm/scale .*the index says 'PLACEHOLDER' of it",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(native, change, said):
    _index_without(native, change)
    with pytest.raises(UserError, match=said):
        t5x.open_t5x(native, {})


def test_scanned_layers_of_another_number(sample):
    arrays = dict(t5x_arrays.open_checkpoint(sample / SCANNED).arrays)
    name = "decoder/decoder/mlp/wo/kernel"
    arrays[name] = arrays[name]._replace(shape=(16, 4, 8))
    with pytest.raises(UserError, match=f"{name} must have 3 layers on axis 1, got"):
        t5x_layouts.separate_layers(arrays)
    arrays["encoder/encoder/pre_mlp_layer_norm/scale"] = arrays[name]
    with pytest.raises(UserError, match="must have two axes, the width and the layers"):
        t5x_layouts.separate_layers(arrays)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"\x82\xa7version", "is no T5X index"),
        (b"\x82" + b"\xff" * 50, "is no T5X index"),
        (b"\x82" * 3000, "is no T5X index"),
        (msgpack.packb({"version": 1, "optimizer": {}}), "of version 2 or 3, got ver"),
        (msgpack.packb({"params": {}, "a": 1}), "version 2 or 3, got version None"),
        (msgpack.packb({"version": 3, "optimizer": 1}), "must hold optimizer/target"),
        (
            msgpack.packb({"version": 3, "optimizer": msgpack.ExtType(1, b"junk")}),
            "is no T5X index",
        ),
        (
            msgpack.packb({"version": 3, "optimizer": msgpack.ExtType(9, b"junk")}),
            "is no T5X index: extension type 9 is not known",
        ),
        (
            msgpack.packb(
                {
                    "version": 3,
                    "optimizer": msgpack.ExtType(
                        1, msgpack.packb(((1,), "object", b"12345678"))
                    ),
                }
            ),
            "dtype 'object' is none of numbers",
        ),
    ],
)
def test_an_index_that_is_none(tmp_path, content, said):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        t5x.open_t5x(tmp_path, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file", ["checkpoint", "target.decoder.decoder_norm.scale/.zarray"]
)
def test_bytes_that_are_wrong(native, file):
    whole, rng = (native / file).read_bytes(), np.random.default_rng(0)
    for _ in range(15):
        place = int(rng.integers(len(whole)))
        changed = bytes([int(rng.integers(256))])
        (native / file).write_bytes(whole[:place] + changed + whole[place + 1 :])
        try:
            weights = t5x.open_t5x(native, {})
            weights.tensors["decoder/decoder_norm/scale"].read()
        except UserError as error:
            assert "\n" not in str(error)
        else:  # a byte that nothing hangs on, of the optimiser's say
            check_complete(weights)


def test_an_index_nested_too_deeply(tmp_path):
    target = {"leaf": None}
    for _ in range(900):
        target = {"a": target}
    t5x_index.write_index(tmp_path, target, 0)
    with pytest.raises(UserError, match="nested too deeply"):
        t5x.open_t5x(tmp_path, {})


@pytest.mark.parametrize(
    "content, said",
    [
        ("{\"('target', ", "is no metadata of Orbax"),
        ("{\"tree_metadata\": {\"('target', 'a')\": {}}}", "is no metadata of Orbax"),
        (
            '{"tree_metadata": {"(\'target\', \'a\')": {"key_metadata": '
            '[{"key": "target"}, {"key": "../../a"}]}}}',
            "tensor ../../a .*must be a plain name",
        ),
        (
            '{"tree_metadata": {"(\'target\', \'a\')": {"key_metadata": '
            '[{"key": "target"}, {"key": "a"}]}}}',
            "tensor a of .* cannot be read",
        ),
    ],
)
def test_orbax_metadata_that_is_none(tmp_path, content, said):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "_METADATA").write_text(content)
    with pytest.raises(UserError, match=said):
        t5x.open_t5x(tmp_path, {})


# --- what cannot be written


@pytest.mark.parametrize(
    "options, said",
    [
        ({"t5x_layout": "zarr"}, "t5x_layout must be one of native, orbax; got 'zarr'"),
        ({"step": "-1"}, "step must be an integer from 0 to 2147483647, got '-1'"),
        ({"scan_layers": "yes"}, "scan_layers must be one of"),
        ({"scan_layers": "true"}, "scan_layers must be false for a network with one"),
    ],
)
def test_options_of_writing(tmp_path, options, said):
    _, params = initialised(T5_1_1)
    with pytest.raises(UserError, match=said):
        t5x_writer.write_t5x(tmp_path / "out", weights_of(T5_1_1, params), options)
    assert not (tmp_path / "out").exists()


def test_decoder_only_models_are_refused(tmp_path):
    settings = FAMILIES["llama_3"]
    weights = weights_of(settings, parameters(settings))
    with pytest.raises(UserError, match="only encoder-decoders of T5's can be written"):
        t5x_writer.write_t5x(tmp_path / "out", weights, {})
    assert not (tmp_path / "out").exists()


# --- the commands


def test_import_and_export_give_back_t5x_its_files(sample, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    words = [f"--from={sample / NATIVE}", f"--to={ours}", "--vocabulary=byte"]
    assert conversions.import_model(words) == 0
    said = capsys.readouterr().out
    assert "imported 66 tensors, 11,512 parameters (t5x), with the state of" in said
    words = [f"--checkpoint={ours}", f"--to={back}", "--format=t5x"]
    assert conversions.export_model(words) == 0
    said = capsys.readouterr().out
    assert "with the state of adafactor after 1 updates, into" in said
    theirs = sample / NATIVE / "checkpoint_1"
    files = [f for f in (back / "checkpoint_1").rglob("*") if f.name != "checkpoint"]
    assert len(files) == len([*theirs.rglob("*")]) - 1
    for file in (back / "checkpoint_1").glob("*.*/*"):
        assert file.read_bytes() == (theirs / file.parent.name / file.name).read_bytes()
    assert_same(t5x.open_t5x(back, {}), t5x.open_t5x(theirs, {}))


@pytest.mark.parametrize("damage", [_truncate, _lose_array, _elsewhere("../x")])
def test_an_import_that_fails_leaves_nothing(native, tmp_path, damage):
    damage(native)
    before = sorted(tmp_path.iterdir())
    target = tmp_path / "new" / "ours"
    words = [f"--from={native}", f"--to={target}", "--vocabulary=byte"]
    with pytest.raises(UserError, match="tensor encoder/layers_1/mlp/wo/kernel "):
        conversions.import_model(words)
    assert sorted(tmp_path.iterdir()) == before


def test_hugging_face_has_no_place_for_biases_of_layers(sample, tmp_path):
    ours = tmp_path / "ours"
    words = [f"--from={sample / SCANNED}", f"--to={ours}", "--vocabulary=byte"]
    assert conversions.import_model(words) == 0
    words = [f"--checkpoint={ours}", f"--to={tmp_path / 'hf'}"]
    with pytest.raises(UserError, match="bias_in_each_layer must be False for Hugging"):
        conversions.export_model([*words, "--format=hugging_face"])
    assert [child.name for child in tmp_path.iterdir()] == ["ours"]


# --- a bias in each layer


@pytest.mark.battery
def test_decoding_with_a_bias_in_each_layer_is_the_whole_pass():
    model, params = initialised(IN_EACH)
    tokens_BS = jnp.asarray(np.random.default_rng(0).integers(2, 61, (2, 6)))
    prompts = PromptBatch(tokens_BS, jnp.ones((2, 6), bool))
    targets_BT = tokens_BS[:, ::-1]
    whole_BTV = jax.jit(model.logits)(params, prompts, targets_BT, None)
    tokens_R, cache = model.prefill(params, prompts, 6)
    step_of = jax.jit(model.decode_step)
    for step in range(6):
        said_RV, cache = step_of(params, cache, tokens_R, jnp.asarray(step))
        np.testing.assert_allclose(said_RV, whole_BTV[:, step], atol=1e-5)
        tokens_R = targets_BT[:, step]


@pytest.mark.battery
def test_each_layer_uses_its_own_table():
    model, params = initialised(IN_EACH)
    tokens_BS = jnp.asarray(np.random.default_rng(0).integers(2, 61, (1, 6)))
    prompts = PromptBatch(tokens_BS, jnp.ones((1, 6), bool))

    def total(params):
        return jnp.square(model.logits(params, prompts, tokens_BS, None)).sum()

    slopes = flat(jax.jit(jax.grad(total))(params))
    tables = [name for name in slopes if name.endswith("rel_embedding")]
    assert len(tables) == 4
    assert all(float(jnp.abs(slopes[name]).max()) > 1e-3 for name in tables)
    assert "relpos_bias" not in params["encoder"]
