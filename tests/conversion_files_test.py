# SPDX-License-Identifier: Apache-2.0
"""Safetensors files and tensors that pass one at a time."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from nlhf_jax import parameter_files
from nlhf_jax.checks import UserError
from nlhf_jax.conversion import safetensors_files
from nlhf_jax.conversion.tensors import Tensor, Weights, cast, of_array, turned
from nlhf_jax.t5_settings import T5Settings

SHAPE = T5Settings(8, 4, 1, 4, 4, 1, 1)


def arrays():
    """Returns arrays of all dtypes, an empty one and a scalar among them."""
    rng = np.random.default_rng(0)
    found = {
        f"of/{name}": rng.normal(size=(3, 5)).astype(dtype) if name != "BOOL" else True
        for name, dtype in safetensors_files.DTYPES.items()
    }
    found["of/BOOL"] = rng.normal(size=(2, 3, 4)) > 0
    found["empty"] = np.zeros((0, 4), np.float32)
    found["scalar"] = np.array(2.5, np.float32)
    found["é 日"] = np.arange(7, dtype=np.int32)
    return found


def lazily(found):
    return {name: of_array(np.asarray(array)) for name, array in found.items()}


def test_the_library_reads_what_is_written(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors_files.write(file, lazily(arrays()), {"format": "pt"})
    found = safetensors.numpy.load_file(file)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
    with safetensors.safe_open(file, framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays(), file, {"some": "thing"})
    found = safetensors_files.tensors_of(file)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        tensor = found[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
        assert tensor.read().tobytes() == array.tobytes()


def test_each_tensor_is_read_once_and_when_it_is_written(tmp_path):
    """Two of them are never here at once."""
    alive, most, reads = [0], [0], []

    class Counted(np.ndarray):
        def __del__(self):
            if self.base is None or not isinstance(self.base, Counted):
                alive[0] -= 1

    def read(name):
        reads.append(name)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return np.ones((4, 4), np.float32).view(Counted)

    def tensor(name):
        return Tensor((4, 4), np.dtype(np.float32), lambda: read(name))

    tensors = {name: tensor(name) for name in "cab"}
    safetensors_files.write(tmp_path / "a.safetensors", tensors)
    assert (reads, most[0]) == (["a", "b", "c"], 1)


def test_the_digest_is_that_of_parameter_files(tmp_path):
    found = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "a/a": np.ones(4)}
    file = parameter_files.save_params(tmp_path, parameter_files_tree(found), "float32")
    said = parameter_files.read_params_metadata(file)["sha256"]
    tensors = safetensors_files.tensors_of(file)
    assert safetensors_files.digest_of(tensors) == said
    again = tmp_path / "again.safetensors"
    header = {"nlhf_jax": json.dumps({"sha256": safetensors_files.DIGEST})}
    assert safetensors_files.write(again, tensors, header) == said
    # It is the very file.
    assert parameter_files.read_params_metadata(again)["sha256"] == said
    parameter_files.read_params_file(again)


def parameter_files_tree(found):
    return {"a": {name.removeprefix("a/"): array for name, array in found.items()}}


@pytest.mark.parametrize("block", [1, 24, 1 << 20])
def test_blocks_are_rows_in_order_whatever_the_layout(block, monkeypatch):
    monkeypatch.setattr(safetensors_files, "BLOCK", block)
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for view in (array, array.T, array[:, ::2], array[0, 0], array[0, 0, 0]):
        view = np.asarray(view)
        assert b"".join(safetensors_files.blocks(view)) == view.tobytes()


def _cut(raw):
    return raw[:-1]


def _longer(raw):
    return raw + b"\0"


def _long_header(raw):
    return struct.pack("<Q", 1 << 40) + raw[8:]


def _header(change):
    def damage(raw):
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]

    return damage


def _offsets(*spans):
    """Gives tensors of a, b and further names these places in the file."""

    def change(header):
        for name, span in zip("abcdef", spans, strict=False):
            length = max(0, int(span[1]) - int(span[0]))
            entry = {"dtype": "U8", "shape": [length], "data_offsets": span}
            header[name] = entry

    return _header(change)


DAMAGES = {
    "cut": (_cut, "must have .* bytes"),
    "longer": (_longer, "must have .* bytes"),
    "empty": (lambda raw: b"", "no safetensors file, or was cut short"),
    "long_header": (_long_header, "no safetensors file, or was cut short"),
    "no_json": (lambda raw: raw[:8] + b"!" + raw[9:], "no safetensors file"),
    "list": (lambda raw: struct.pack("<Q", 2) + b"[]", "no safetensors file"),
    "dtype": (_header(lambda h: h["b"].update(dtype="F8")), "tensor b of .* described"),
    "shape": (_header(lambda h: h["b"].update(shape=[9])), "tensor b of .* described"),
    "float_shape": (
        _header(lambda h: h["b"].update(shape=[3.0])),
        "tensor b of .* described",
    ),
    "negative_shape": (
        _header(lambda h: h["b"].update(shape=[-1, -3])),
        "tensor b of .* described",
    ),
    "float_offsets": (_offsets([0.0, 12.0], [12.0, 24.0]), "its header"),
    "same_place": (_offsets([0, 12], [0, 12]), "its header"),
    # As many bytes as there are, and the last is the last.
    "overlap": (_offsets([0, 10], [5, 10], [15, 24]), "its header"),
    "gap": (_offsets([0, 12], [24, 24], [12, 12], [0, 12]), "its header"),
    "late": (_offsets([0, 12], [999, 1011]), "its header"),
    "backwards": (_offsets([0, 24], [24, 12], [12, 24]), "its header"),
    "deep": (
        lambda raw: struct.pack("<Q", 200_000) + b"[" * 200_000,
        "its header",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named(tmp_path, name):
    file = tmp_path / "a.safetensors"
    found = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    safetensors_files.write(file, lazily(found))
    damage, said = DAMAGES[name]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=said) as caught:
        safetensors_files.tensors_of(file)
    assert str(file) in str(caught.value)


def test_a_file_cut_after_it_was_opened_is_named(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors_files.write(file, lazily({"a": np.ones(300, np.float32)}))
    tensor = safetensors_files.tensors_of(file)["a"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"tensor a of .* was cut short"):
        tensor.read()


def test_a_tensor_that_is_not_what_it_said_is_named(tmp_path):
    wrong = Tensor((3,), np.dtype(np.float32), lambda: np.ones(4, np.float32))
    with pytest.raises(UserError, match=r"tensor a must be float32\[3\], got float32"):
        safetensors_files.write(tmp_path / "a.safetensors", {"a": wrong})


# --- dtypes


def weights_of(array):
    return Weights(SHAPE, {"a/b": of_array(array)})


def test_a_cast_that_loses_nothing_passes():
    halves = np.array([0.5, -2.0, np.inf, np.nan, 0.0], np.float32)
    found = cast(weights_of(halves), "bfloat16").tensors["a/b"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.read().astype(np.float32), halves)
    back = cast(weights_of(found.read()), "float32").tensors["a/b"].read()
    np.testing.assert_array_equal(back, halves)


def test_a_cast_that_rounds_is_refused_unless_allowed():
    thirds = np.full((2, 3), 1 / 3, np.float32)
    tensor = cast(weights_of(thirds), "bfloat16").tensors["a/b"]
    with pytest.raises(UserError, match=r"tensor a/b is float32 and bfloat16 would"):
        tensor.read()
    allowed = cast(weights_of(thirds), "bfloat16", allow_rounding=True)
    # 8 bits of precision round to the nearest within 2^-9.
    found = allowed.tensors["a/b"].read().astype(np.float32)
    np.testing.assert_allclose(found, thirds, rtol=2**-9)
    assert (found != thirds).all()


def test_one_number_of_millions_that_is_rounded_is_seen():
    array = np.zeros((1 << 20) + 5, np.float32)
    array[-1] = 1 / 3
    with pytest.raises(UserError, match="would round"):
        cast(weights_of(array), "bfloat16").tensors["a/b"].read()


def test_integers_and_no_dtype_stay():
    integers = np.arange(3, dtype=np.int32)
    assert cast(weights_of(integers), "bfloat16").tensors["a/b"].dtype == np.int32
    weights = weights_of(integers)
    assert cast(weights, "") is weights
    with pytest.raises(UserError, match="dtype must be one of"):
        cast(weights_of(integers), "float16")


def test_turned_is_the_transpose():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = turned(of_array(array))
    assert tensor.shape == (3, 2)
    np.testing.assert_array_equal(tensor.read(), array.T)
