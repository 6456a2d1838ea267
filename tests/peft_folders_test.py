# SPDX-License-Identifier: Apache-2.0
"""`nlhf import` and `nlhf export` of adapters alone, and of models made of them."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from nlhf_jax import cli
from nlhf_jax.conversion import agreement, peft, safetensors_files
from nlhf_jax.conversion.shapes import flat
from nlhf_jax.jobs import adapters, folders, our_weights
from nlhf_jax.jobs.policies import load_policy
from nlhf_jax.models.adapters import merged
from nlhf_jax.parameter_files import save_params
from nlhf_jax.settings import LoraSettings
from nlhf_jax.t5_settings import T5Settings
from tests.lora_peft_test import LORA, adapters_of, base_of

MODEL = T5Settings(384, 16, 2, 8, 20, 1, 1)
LENGTHS = {"inputs": 12, "targets": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A whole model's folder."""
    folder = tmp_path_factory.mktemp("peft") / "base"
    folders.describe(
        folder,
        folders.ModelDescription("language_model", MODEL, LENGTHS),
        folders.BYTE_VOCABULARY,
    )
    save_params(folder, base_of(MODEL), "float32")
    return folder


@pytest.fixture(scope="module")
def theirs(base):
    """A folder as `peft` writes it."""
    made = adapters_of(MODEL, LORA)
    return peft.write_adapter(base.parent / "theirs", LORA, made, MODEL)


@pytest.fixture(scope="module")
def ours(base, theirs):
    """The model folder that an import makes of it."""
    target = base.parent / "ours"
    words = [f"--from={theirs}", f"--base={base}", f"--to={target}"]
    assert cli.main(["import", *words]) == 0
    return target


def test_an_import_stands_on_its_base(base, ours):
    found = folders.read_description(ours)
    assert found.settings == MODEL
    assert found.lora == LoraSettings(LORA.rank, LORA.alpha, found.lora.targets)
    assert set(found.lora.targets) == set(LORA.targets)
    assert found.base == str(base / "params.safetensors")
    size = (ours / "params.safetensors").stat().st_size
    assert size < 0.5 * (base / "params.safetensors").stat().st_size
    # As a model it is the base with the adapters merged.
    wanted = merged(base_of(MODEL), adapters_of(MODEL, LORA), LORA)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        load_policy(str(ours)).params,
        wanted,
    )


def test_an_export_of_adapters_is_what_came_in(theirs, ours, tmp_path, capsys):
    words = [f"--checkpoint={ours}", f"--to={tmp_path / 'out'}", "--format=peft"]
    assert cli.main(["export", *words, "--base_name=their/base", "--check"]) == 0
    assert "read again, all" in capsys.readouterr().out
    files = [f / peft.TENSORS_FILE for f in (tmp_path / "out", theirs)]
    out, came = (safetensors_files.tensors_of(file) for file in files)
    assert out.keys() == came.keys()
    for name, tensor in came.items():
        np.testing.assert_array_equal(out[name].read(), tensor.read())
    config = json.loads((tmp_path / "out" / peft.CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "their/base"


@pytest.mark.parametrize("form", ["nlhf", "hugging_face"])
def test_an_export_for_others_is_merged(base, ours, tmp_path, form):
    target = tmp_path / "out"
    words = [f"--checkpoint={ours}", f"--to={target}", f"--format={form}"]
    assert cli.main(["export", *words]) == 0
    if form == "hugging_face":
        back = tmp_path / "back"
        words = [f"--from={target}", f"--to={back}", "--vocabulary=byte"]
        assert cli.main(["import", *words]) == 0
        target = back
    assert folders.read_description(target).lora is None
    found = our_weights.open_folder(target, {}).tensors
    wanted = flat(merged(base_of(MODEL), adapters_of(MODEL, LORA), LORA))
    assert found.keys() == wanted.keys()
    for path, tensor in found.items():
        np.testing.assert_allclose(tensor.read(), wanted[path], atol=1e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["import", "--from={theirs}"], "--base must name its model folder"),
        (["import", "--from={theirs}", "--base=nowhere"], "'nowhere' does not exist"),
        (["import", "--from={theirs}", "--base={ours}"], "must be a whole model, and"),
        (["export", "--checkpoint={base}", "--format=peft"], "the checkpoint has none"),
        (["import", "--from={base}", "--base={base}"], "has no flag --base"),
    ],
)
def test_what_makes_no_adapter_is_one_sentence(
    base, theirs, ours, tmp_path, capsys, words, expected
):
    named = {"base": base, "theirs": theirs, "ours": ours}
    words = [word.format(**named) for word in words]
    assert cli.main([*words, f"--to={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
    assert not list(tmp_path.iterdir())


def test_adapters_on_adapters_are_exported_merged_only(ours, tmp_path, capsys):
    """`peft` would put them on another base than they were trained on."""
    stand = adapters.stand_on(str(ours), LoraSettings(2, 4.0, ("query",)))
    folder = tmp_path / "second"
    whole = folders.ModelDescription("language_model", MODEL, LENGTHS)
    folders.describe(folder, stand.describes(whole), folders.BYTE_VOCABULARY)
    save_params(folder, adapters_of(MODEL, stand.lora), "float32")
    words = ["export", f"--checkpoint={folder}", f"--to={tmp_path / 'out'}"]
    capsys.readouterr()
    assert cli.main([*words, "--format=peft"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is adapters itself: export them merged" in line
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "--format=nlhf"]) == 0


def test_a_check_of_an_import_asks_peft(base, theirs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="transformers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    words = ["import", f"--from={theirs}", f"--base={base}", "--check"]
    assert cli.main([*words, f"--to={tmp_path / 'good'}"]) == 0
    assert "agrees with transformers" in capsys.readouterr().out
    # A mistake of ours in reading them is found.
    read = peft.read_adapter

    def doubled(*arguments):
        lora, leaves = read(*arguments)
        return dataclasses.replace(lora, alpha=2 * lora.alpha), leaves

    monkeypatch.setattr(peft, "read_adapter", doubled)
    assert cli.main([*words, f"--to={tmp_path / 'bad'}"]) == 2
    assert "transformers does not agree" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["good"]


def test_a_check_without_peft_is_refused_first(
    base, theirs, tmp_path, monkeypatch, capsys
):
    libraries = {name: type(sys)(name) for name in ("torch", "transformers")}
    for name, there in (libraries | {"peft": None}).items():
        monkeypatch.setitem(sys.modules, name, there)
    monkeypatch.setattr(agreement, "_quiet", lambda: None)
    words = ["import", f"--from={theirs}", f"--base={base}", "--check"]
    assert cli.main([*words, f"--to={tmp_path / 'out'}"]) == 2
    assert "--check needs peft, which is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_base_that_has_changed_is_one_sentence(base, theirs, tmp_path, capsys):
    copy, target = tmp_path / "base", tmp_path / "on_it"
    words = [f"--from={base}", f"--to={copy}"]
    assert cli.main(["import", *words]) == 0
    words = [f"--from={theirs}", f"--base={copy}", f"--to={target}"]
    assert cli.main(["import", *words]) == 0
    save_params(copy, jax.tree.map(lambda leaf: leaf + 1, base_of(MODEL)), "float32")
    words = [f"--checkpoint={target}", f"--to={tmp_path / 'out'}", "--format=nlhf"]
    capsys.readouterr()
    assert cli.main(["export", *words]) == 2
    assert "has changed since they were trained" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
