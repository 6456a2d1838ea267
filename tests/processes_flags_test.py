# SPDX-License-Identifier: Apache-2.0
"""Flags and variables of processes on the command line: one sentence per mistake."""

import socket
import time

import pytest

from nlhf_jax import cli
from tests import process_toys

READY = ("--gin_file=configs/runs/sft.gin", "--gin.MODEL_DIR=somewhere")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--coordinator=h:1", "--num_processes=2"], "but not --process_id"),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            "process_id must be in [0, 1] for 2 processes of h:1, got 2",
        ),
        (
            ["--coordinator=h", "--num_processes=2", "--process_id=0"],
            "coordinator must be HOST:PORT",
        ),
        (["--cordinator=h:1"], "did you mean 'coordinator'?"),
    ],
)
def test_wrong_flags_are_one_sentence(capsys, words, complaint):
    assert cli.main(["sft", *READY, *words]) == 2
    out, err = capsys.readouterr()
    assert complaint in err
    assert err.startswith("nlhf: ")
    assert err.count("\n") == 1
    assert out == ""


def test_variables_are_read_where_no_flag_is_given(capsys, monkeypatch):
    monkeypatch.setenv("NLHF_COORDINATOR", "h:1")
    assert cli.main(["sft", *READY]) == 2
    assert "but not NLHF_NUM_PROCESSES, NLHF_PROCESS_ID" in capsys.readouterr().err


def test_jobs_of_one_process_say_so(capsys):
    words = ["--prompt=x", "--checkpoint=nlhf_jax/pretrained/docstrings_t5"]
    code = cli.main(["sample", *words, *process_toys.flags(2, 0, 1)])
    assert code == 2
    assert (
        "sample runs in one process, got 2 (from the flags)" in capsys.readouterr().err
    )


def test_a_taken_port_and_a_missing_process_are_one_sentence(capsys, monkeypatch):
    monkeypatch.setenv("NLHF_START_SECONDS", "1")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert cli.main(["sft", *READY, *process_toys.flags(2, 0, port)]) == 2
        taken = capsys.readouterr().err
    start = time.monotonic()
    assert cli.main(["sft", *READY, *process_toys.flags(2, 0, port)]) == 2
    assert time.monotonic() - start < 10
    missing = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in taken
    assert f"process 1 of 2 did not come to 127.0.0.1:{port} within 1 s" in missing
    assert taken.count("\n") == missing.count("\n") == 1


def test_a_rehearsal_needs_nobody_else(capsys):
    words = [*READY, "--dry_run", *process_toys.flags(2, 1, 1)]
    assert cli.main(["sft", *words]) == 0
    assert "complete" in capsys.readouterr().out
