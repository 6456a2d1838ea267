# SPDX-License-Identifier: Apache-2.0
"""A manifest sees any change of a file, of an array's piece and of itself."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from nlhf_jax import manifests, retention
from nlhf_jax.checks import CheckpointError
from tests import process_toys

ARRAYS = {
    "matrix": jnp.arange(12, dtype=jnp.float32).reshape(3, 4),
    "half": jnp.asarray([1, 2, 3], jnp.bfloat16),
    "step": jnp.asarray(7),
    "none": jnp.zeros((0, 3)),
}


def described():
    pieces = {name: manifests.host_pieces(leaf) for name, leaf in ARRAYS.items()}
    digests = manifests.digests_of_pieces(pieces)
    return manifests.describe_arrays(ARRAYS, [1, 2, 3, 4], digests)


def committed(folder):
    """Returns a folder with two files and their manifest."""
    manifests.begin(folder)
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "data").write_bytes(bytes(range(200)))
    (folder / "state" / "empty").touch()
    files = manifests.describe_files(folder)
    manifests.commit(
        folder,
        {"step": 5, "seed": 3, "arrays": described(), "files": files},
    )
    return folder


def test_it_says_what_the_arrays_and_files_are(tmp_path):
    manifest = manifests.read(committed(tmp_path / "5"))
    assert manifest["format"] == 1 and manifest["step"] == 5 and manifest["seed"] == 3
    matrix = np.asarray(ARRAYS["matrix"])
    assert manifest["arrays"]["matrix"] == {
        "shape": [3, 4],
        "dtype": "float32",
        "checksum": 1,
        "pieces": [
            {
                "bounds": [[0, 3], [0, 4]],
                "xxh3_128": xxhash.xxh3_128(matrix.tobytes()).hexdigest(),
            }
        ],
    }
    assert manifest["arrays"]["half"]["dtype"] == "bfloat16"
    assert manifest["arrays"]["step"]["shape"] == []
    assert manifest["files"] == {
        "state/d/data": {
            "size": 200,
            "xxh3_128": xxhash.xxh3_128(bytes(range(200))).hexdigest(),
        },
        "state/empty": {"size": 0, "xxh3_128": xxhash.xxh3_128(b"").hexdigest()},
    }


def test_it_is_there_once_all_is_and_never_before(tmp_path):
    place = tmp_path / "5"
    manifests.begin(place)
    assert manifests.is_leftover(place) and not manifests.is_complete(place)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        manifests.read(place)
    manifests.commit(place, {"step": 5, "arrays": {}, "files": {}})
    assert manifests.is_complete(place) and not manifests.is_leftover(place)
    assert [path.name for path in place.iterdir()] == ["manifest.json"]
    with pytest.raises(FileExistsError):
        manifests.begin(place)


def test_the_name_comes_after_the_bytes(tmp_path, monkeypatch):
    # Whatever the power does: what has the name has its bytes.
    calls, sync, rename = [], manifests.os.fsync, pathlib.Path.rename
    monkeypatch.setattr(
        manifests.os, "fsync", lambda f: (calls.append("bytes"), sync(f))
    )
    monkeypatch.setattr(
        pathlib.Path, "rename", lambda p, t: (calls.append("name"), rename(p, t))
    )
    manifests.begin(tmp_path / "5")
    manifests.commit(tmp_path / "5", {"step": 5, "arrays": {}, "files": {}})
    # The file; the name; the folder that has it, and the folder of steps.
    assert calls == ["bytes", "name", "bytes", "bytes"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: f.unlink(), "state/d/data is missing"),
        (lambda f: (f.unlink(), f.mkdir()), "state/d/data (has|cannot be read)"),
        (lambda f: f.write_bytes(bytes(199)), "state/d/data has 199 bytes, not 200"),
        (lambda f: f.write_bytes(bytes(200)), "state/d/data differs from its digest"),
    ],
)
def test_a_file_that_differs_is_named_and_how(tmp_path, damage, sentence):
    place = committed(tmp_path / "5")
    manifest = manifests.read(place)
    manifests.check_files(place, manifest)
    damage(place / "state" / "d" / "data")
    with pytest.raises(CheckpointError, match=f"^{sentence}"):
        manifests.check_files(place, manifest)
    # Of two processes one has it in its share.
    found = 0
    for number in range(2):
        try:
            manifests.check_files(place, manifest, (number, 2))
        except CheckpointError:
            found += 1
    assert found == 1


def test_a_file_more_is_named(tmp_path):
    place = committed(tmp_path / "5")
    manifest = manifests.read(place)
    assert manifests.unlisted_files(place, manifest) == []
    (place / "state" / "note").touch()
    assert manifests.unlisted_files(place, manifest) == ["state/note"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return committed(tmp_path_factory.mktemp("steps") / "5")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_of_a_manifest_is_seen(folder, data):
    path = folder / "manifest.json"
    good = path.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "anything"]))
    place = data.draw(st.integers(0, len(good) - 1))
    if kind == "flip":
        bit = 1 << data.draw(st.integers(0, 7))
        bad = good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :]
    elif kind == "cut":
        bad = good[:place]
    elif kind == "insert":
        bad = good[:place] + data.draw(st.binary(min_size=1)) + good[place:]
    else:
        bad = data.draw(st.binary())
    try:
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            manifests.read(folder)
    finally:
        path.write_bytes(good)
    assert manifests.read(folder)["step"] == 5


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["step", "files", "arrays", "size", "shape", "xxh3_128", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["step", "files", "arrays"]), VALUES))
def test_a_manifest_of_another_form_is_refused_in_one_sentence(tmp_path_factory, body):
    place = tmp_path_factory.mktemp("any") / "5"
    manifests.begin(place)
    manifests.commit(place, body)
    try:
        manifest = manifests.read(place)
        manifests.check_files(place, manifest)
    except CheckpointError as error:
        assert "\n" not in str(error).replace(repr(body), "")
    else:
        assert manifest["files"] == {}


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    place = tmp_path / "5"
    manifests.begin(place)
    files = {name: {"size": 1, "xxh3_128": "0" * 32}}
    manifests.commit(place, {"step": 5, "arrays": {}, "files": files})
    with pytest.raises(CheckpointError, match="outside its folder"):
        manifests.read(place)


@pytest.mark.parametrize("which", ["folder", "its parent"])
def test_a_name_that_may_not_last_is_taken_back(tmp_path, monkeypatch, which):
    """A sync that fails after the rename is a failed save, which can be tried again."""
    place = tmp_path / "5"
    failing = place if which == "folder" else tmp_path
    sync = manifests._sync

    def fail(path):
        if path == failing:
            raise OSError(5, "Input/output error")
        sync(path)

    manifests.begin(place)
    monkeypatch.setattr(manifests, "_sync", fail)
    with pytest.raises(OSError, match="Input/output"):
        manifests.commit(place, {"step": 5, "arrays": {}, "files": {}})
    assert manifests.is_leftover(place)
    monkeypatch.undo()
    retention.discard(tmp_path, 5)
    manifests.begin(place)
    manifests.commit(place, {"step": 5, "arrays": {}, "files": {}})
    assert manifests.read(place)["step"] == 5


def test_another_format_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "FORMAT", 2)
    place = committed(tmp_path / "5")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2, not 1"):
        manifests.read(place)


def test_pieces_are_compared_where_they_have_the_same_bounds():
    manifest = {"arrays": described()}
    manifests.check_pieces(ARRAYS, manifest)
    for name in ("matrix", "half", "step"):
        changed = ARRAYS | {name: ARRAYS[name] + 1}
        with pytest.raises(CheckpointError, match=f"the digest of {name} differs"):
            manifests.check_pieces(changed, manifest)
    # Another layout has other pieces, which nobody has named.
    other = ARRAYS | {"matrix": jnp.ones((4, 3))}
    manifests.check_pieces(other, manifest)


def test_parts_of_other_processes_are_taken_and_gone(tmp_path):
    manifests.begin(tmp_path / "5")
    part = {"pieces": {"w": []}, "files": {"state/a": {"size": 1}}}
    manifests.write_part(tmp_path / "5", 3, part)
    assert manifests.files_in(tmp_path / "5") == []
    assert manifests.take_part(tmp_path / "5", 3) == part
    assert len(list((tmp_path / "5").iterdir())) == 1


PIECES = """
import json, jax, jax.numpy as jnp, numpy as np
from nlhf_jax import manifests
mesh = jax.make_mesh((2, 2), ("a", "b"))
value = np.arange(16.0, dtype=np.float32).reshape(4, 4)
split = jax.NamedSharding(mesh, jax.P("a", None))
pieces = manifests.host_pieces(jax.device_put(value, split))
print(json.dumps([[bounds, part.tolist()] for bounds, part in pieces]))
"""


@pytest.mark.battery
def test_of_copies_the_first_is_named(tmp_path):
    # Rows over one axis of a 2 x 2 mesh: two pieces, each on two devices.
    with process_toys.gang(tmp_path) as gang:
        gang.start(["-c", PIECES], devices=4)
        assert gang.wait(60) == [0], gang.logs()
        found = json.loads(gang.logs()[0].splitlines()[-1])
    value = np.arange(16.0).reshape(4, 4)
    assert [bounds for bounds, _ in found] == [[[0, 2], [0, 4]], [[2, 4], [0, 4]]]
    assert [part for _, part in found] == [value[:2].tolist(), value[2:].tolist()]


def test_a_view_is_what_it_was_after_its_array_is_donated():
    array = jnp.arange(1000, dtype=jnp.float32)
    ((_, view),) = manifests.host_pieces(array)
    jax.jit(lambda x: x * 2, donate_argnums=0)(array).block_until_ready()
    np.testing.assert_array_equal(view, np.arange(1000, dtype=np.float32))
