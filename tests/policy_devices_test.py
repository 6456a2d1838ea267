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
from tests.policy_devices_worker import MESHES, RUN

HERE = pathlib.Path(__file__).parent


pytestmark = [pytest.mark.battery, pytest.mark.timeout(620)]


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
        timeout=600,  # a minute or two alone, more beside others
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(path.read_text())
    assert found["num_devices"] == 8
    return found


each_mesh = pytest.mark.parametrize("mesh", MESHES)
each_job = pytest.mark.parametrize("job", ["policy", "preference"])


@each_job
@each_mesh
def test_one_and_eight_devices_draw_and_measure_the_same(eight, job, mesh):
    # Sums run in another order, and rows in two microbatches: the last digits of
    # float32 may differ. Other tokens would show in the second digit.
    found = eight[job]
    assert len(found["one"]["metrics"]) == 10
    for one, other in zip(found["one"]["metrics"], found[mesh]["metrics"], strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            np.testing.assert_allclose(
                other[name], value, rtol=1e-5, atol=1e-5, err_msg=name
            )


@each_job
@each_mesh
def test_one_and_eight_devices_end_at_the_same_parameters(eight, job, mesh):
    found = eight[job]
    for one, other in zip(found["one"]["params"], found[mesh]["params"], strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


@each_job
def test_the_parameters_have_moved_much_further_than_that(eight, job):
    found = eight[job]["one"]
    pairs = zip(found["params"], found["start"], strict=True)
    assert max(np.abs(np.subtract(*pair)).max() for pair in pairs) > 1e-2


@each_job
def test_steps_differ_from_each_other(eight, job):
    first, *_, last = eight[job]["one"]["metrics"]
    shared = set(first) & {"policy/kl", "loss/preference"}
    assert shared and all(first[name] != last[name] for name in shared)
    assert first["optimizer/gradient_norm"] > 0


@each_job
@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_the_step_is_compiled_once(eight, job, mesh):
    assert eight[job][mesh]["num_compilations"] == 1


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


@pytest.mark.parametrize("name", RUN)
def test_a_step_keeps_the_sharding(eight, name):
    found = eight["kept"][name]
    assert found["before"] == found["after"]


def test_a_judge_of_another_shape_is_split_too(eight):
    kernels = {
        path: spec
        for path, (shape, _, spec) in eight["judge"].items()
        if len(shape) > 1
    }
    of_the_judge = [spec for path, spec in kernels.items() if "preference" in path]
    assert len(of_the_judge) == len(kernels) / 2
    assert all("fsdp" in spec or "tensor" in spec for spec in kernels.values())
