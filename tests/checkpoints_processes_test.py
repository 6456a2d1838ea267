# SPDX-License-Identifier: Apache-2.0
"""Two real processes that save together: what one cannot write, both know of."""

import json

import pytest

from nlhf_jax import manifests
from tests import process_toys

WORKER = process_toys.ROOT / "tests" / "checkpoints_worker.py"


@pytest.mark.battery
def test_a_save_that_fails_in_one_process_is_tried_again_by_both(tmp_path):
    port = process_toys.free_port()
    with process_toys.gang(tmp_path / "logs") as gang:
        for number in range(2):
            gang.start([WORKER, tmp_path, number, port], devices=2)
        assert gang.wait(120) == [0, 0], "\n".join(gang.logs())
    found = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]
    # At the same step, and once.
    (again,) = found[0]["asked"]
    assert found[1]["asked"] == [again] and again > 1
    for one in found:
        assert one["steps"] == [again]
        assert one["number"] == again
    sentence = f"checkpoint 20 in {tmp_path / 'steps'} could not be written: "
    assert found[1]["error"].startswith(sentence + "[Errno 28] No space left")
    assert found[0]["error"].startswith(sentence + "process 1 found: [Errno 28]")
    # The first says what came of it, the other at once what it could not do.
    first, other = (one["said"] for one in found)
    assert [line.partition(" in ")[0] for line in first] == [
        "checkpoint 1",
        "checkpoint 20",
    ]
    assert [line.partition(" of ")[0] for line in other] == [
        "process 1 could not write its part"
    ] * 2
    # The manifest names the pieces of both, each once.
    manifest = manifests.read(tmp_path / "steps" / str(again))
    name = "param_sets/params/w"
    bounds = [piece["bounds"] for piece in manifest["arrays"][name]["pieces"]]
    assert sorted(bounds) == [[[16 * n, 16 * n + 16], [0, 65]] for n in range(4)]
    assert any("process_1" in file for file in manifest["files"])
    left = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert left == [str(again)]
