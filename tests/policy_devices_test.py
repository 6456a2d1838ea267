# SPDX-License-Identifier: Apache-2.0
"""The policy step on one and on eight devices: same numbers, and rows stay put."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from nlhf_jax.algorithms import ALGORITHMS
from tests.policy_devices_worker import RUN

HERE = pathlib.Path(__file__).parent
MESHES = ["data", "all"]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What `policy_devices_worker.py` found on eight fake devices."""
    path = tmp_path_factory.mktemp("policy") / "found.json"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the programs are small and run twice
        "PYTHONPATH": str(HERE.parent),
    }
    run = subprocess.run(
        [sys.executable, str(HERE / "policy_devices_worker.py"), str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(path.read_text())
    assert found["num_devices"] == 8
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_one_and_eight_devices_draw_and_measure_the_same(eight, mesh):
    # Sums run in another order: the last digits of float32 may differ. Other tokens
    # would show in the second digit.
    for one, other in zip(eight["one"]["metrics"], eight[mesh]["metrics"], strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
def test_one_and_eight_devices_end_at_the_same_parameters(eight, mesh):
    pairs = zip(eight["one"]["params"], eight[mesh]["params"], strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


def test_steps_differ_from_each_other(eight):
    first, second = eight["one"]["metrics"]
    assert first["policy/kl"] != second["policy/kl"]
    assert first["optimizer/gradient_norm"] > 0


@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_the_step_is_compiled_once(eight, mesh):
    assert eight[mesh]["num_compilations"] == 1


@pytest.mark.parametrize("part", ["rollout", "gradient"])
def test_rows_stay_on_their_device(eight, part):
    # With the batch split by rows and whole parameters, nothing but the sum of the
    # gradients has to cross devices.
    assert eight[part] == {"all-gather": 0, "all-to-all": 0, "collective-permute": 0}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_set_and_moment_lies_where_its_parameter_does(eight, name):
    found = eight["kept"][name]
    assert found["in_place"]
    # Every set, and two moments of each that is trained; most leaves are split.
    assert found["num_trees"] == found["num_sets"] + 2 * found["num_trained"]
    assert found["num_split"] > 10 * found["num_trees"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_keeps_shapes_and_dtypes(eight, name):
    found = eight["kept"][name]
    before, after = (
        {path: one[:2] for path, one in found[when].items()}
        for when in ("before", "after")
    )
    assert before == after


@pytest.mark.parametrize("name", RUN)
def test_a_step_keeps_the_sharding(eight, name):
    found = eight["kept"][name]
    assert found["before"] == found["after"]
