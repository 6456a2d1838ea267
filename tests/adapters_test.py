# SPDX-License-Identifier: Apache-2.0
"""What a run with adapters stands on must be what it began with."""

import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.jobs import adapters, evaluate, folders, policies
from nlhf_jax.parameter_files import save_params
from nlhf_jax.settings import LoraSettings, MemorySettings
from nlhf_jax.t5_settings import T5Settings
from tests.lora_peft_test import adapters_of, base_of

LORA = LoraSettings(2, 4.0, ("query", "wo"))
MODEL = T5Settings(384, 16, 2, 8, 20, 1, 1)
LENGTHS = {"inputs": 12, "targets": 6}
WHOLE = folders.ModelDescription("language_model", MODEL, LENGTHS)


def folder_of(folder, description, params):
    folders.describe(folder, description, folders.BYTE_VOCABULARY)
    save_params(folder, params, "float32")
    return folder


@pytest.fixture
def reference(tmp_path):
    """A reference that is adapters on a base."""
    base = folder_of(tmp_path / "base", WHOLE, base_of(MODEL))
    stand = adapters.stand_on(str(base), LORA)
    assert (stand.start, stand.start_digest) == ("", "")
    on = adapters_of(MODEL, LORA)
    return folder_of(tmp_path / "reference", stand.describes(WHOLE), on)


def begun(reference, run):
    """A run on a reference, as `train` describes it."""
    stand = adapters.stand_on(str(reference), LORA)
    mine = adapters.starts_at(stand, str(reference))
    if not run.exists():
        folders.describe(run, mine.describes(WHOLE), folders.BYTE_VOCABULARY)
    return mine


def test_a_reference_that_trains_on_is_noticed_by_who_goes_on(reference, tmp_path):
    run = tmp_path / "run"
    mine = begun(reference, run)
    assert folders.description_of(run).reference_digest == mine.start_digest != ""
    adapters.check_goes_on(run, begun(reference, run))
    save_params(reference, adapters_of(MODEL, LORA, seed=5), "float32")
    with pytest.raises(
        UserError, match=r"reference's adapters have changed since"
    ) as e:
        adapters.check_goes_on(run, begun(reference, run))
    assert "must name the step that it began with" in str(e.value)
    # A run that begins now is one on the new reference.
    adapters.check_goes_on(tmp_path / "other", begun(reference, tmp_path / "other"))


def test_folders_from_before_go_on(reference, tmp_path):
    """A description that does not say which adapters its reference had."""
    stand = adapters.stand_on(str(reference), LORA)
    folders.describe(tmp_path / "run", stand.describes(WHOLE), "byte")
    assert "reference_digest" not in (tmp_path / "run" / "model.json").read_text()
    adapters.check_goes_on(tmp_path / "run", begun(reference, tmp_path / "run"))


def test_a_changed_base_is_noticed_before_a_tournament(reference, tmp_path):
    said = evaluate._state_of(str(reference))
    assert said == folders.newest_state(str(reference))
    on_it = adapters.stand_on(str(reference), LoraSettings(1, 1.0, ("key",)))
    second = tmp_path / "second"
    folder_of(second, on_it.describes(WHOLE), adapters_of(MODEL, on_it.lora))
    save_params(tmp_path / "base", base_of(MODEL) | {}, "bfloat16")
    for folder in (reference, second):  # the second stands on it by way of the first
        with pytest.raises(UserError, match=r"base/params.* has changed since they w"):
            evaluate._state_of(str(folder))


def test_a_rounded_base_is_said_and_an_unrounded_is_not(caplog):
    kept = MemorySettings(frozen_dtype="bfloat16")
    exact = {"a": jnp.asarray([1.0, 0.5, -3.0])}
    found = policies.as_frozen_base(exact, kept)
    assert found["a"].dtype == jnp.bfloat16
    assert not caplog.messages
    policies.as_frozen_base({"a": jnp.asarray([0.1])}, MemorySettings())
    assert not caplog.messages
    found = policies.as_frozen_base({"a": jnp.asarray([0.1])}, kept)
    np.testing.assert_array_equal(found["a"], jnp.asarray([0.1], jnp.bfloat16))
    (said,) = caplog.messages
    assert "frozen_dtype bfloat16 rounds the base's numbers" in said
    caplog.clear()
    for settings in (MemorySettings(), kept):
        policies.as_frozen_base({"a": jnp.asarray([jnp.nan, 0.5])}, settings)
    assert not caplog.messages
