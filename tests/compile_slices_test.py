# SPDX-License-Identifier: Apache-2.0
"""Several slices, as the real compiler lays them out: what goes from one to another."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from nlhf_jax.scale import costs, words
from tests.compile_command_test import ROOT, SHAPE, TRAIN


@pytest.mark.battery
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler: libtpu is not installed (requirements-tpu.lock)",
)
def test_the_tpu_compiler_takes_two_slices(tmp_path):
    """Rows are split over slices, parameters inside each: only gradients cross."""
    shape = tmp_path / "toy.gin"
    shape.write_text(SHAPE)
    models = [f"--reference_model={shape}", f"--preference_model={shape}"]
    command = [sys.executable, "-X", "faulthandler", "-m", "nlhf_jax", "compile"]
    command += ["--job=train", "--topology=v5e:2x2", "--json", "--gin.SLICE=2"]
    done = subprocess.run(
        [*command, "--gin.FSDP=4", *TRAIN, *models],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1}
    assert (found["num_devices"], found["rows_per_device"]) == (8, 1)
    between = {
        one["kind"].removeprefix(costs.BETWEEN_SLICES): one
        for one in found["collectives"]
        if one["kind"].startswith(costs.BETWEEN_SLICES)
    }
    sums = between.pop("all-reduce")
    assert sums["group_size"] == 2
    # Of every parameter's gradient the part that a device holds; of weights nothing,
    # besides some rows' worth of numbers.
    assert sums["bytes"] >= found["memory"]["parts"]["parameters"]
    assert sum(one["bytes"] for one in between.values()) < sums["bytes"] / 10
    assert found["roofline"]["slices_seconds"] > 0
    assert "between slices" in words.report(found)


def test_the_network_between_slices_is_said_where_there_are_several():
    limits = {f"{name}_seconds": 1.0 for name in ("step", "compute", "memory")}
    limits |= {"network_seconds": 1.0, "slices_seconds": 2.0, "bound_by": "slices"}
    given = {"roofline": limits, "source": "s", "response_length": 1, "flops": 1.0}
    for num_slices, time, said in (
        (1, 0.0, "network 1.00 s; s)"),
        (2, 2.0, "network 1.00 s, between slices 2.00 s; s)"),
        (2, 0.0, "between slices not known: no bandwidth is published; s)"),
    ):
        limits["slices_seconds"] = time
        lines = list(words._work(given | {"mesh": {"slice": num_slices}}))
        assert lines[-1].endswith(said)
