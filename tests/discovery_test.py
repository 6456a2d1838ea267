# SPDX-License-Identifier: Apache-2.0
"""Each way in which a process learns who it is, and each way of being told half."""

import contextlib
import dataclasses
import http.server
import pathlib
import threading

import pytest

from nlhf_jax import discovery
from nlhf_jax.checks import UserError
from nlhf_jax.discovery import Processes
from nlhf_jax.distributed import Patience

FLAGS = {"coordinator": "10.0.0.1:1234", "num_processes": "4", "process_id": "2"}
OWN = {f"NLHF_{name.upper()}": value for name, value in FLAGS.items()}
TPU_POD = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "s-0.svc:8080",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
}
JOBSET = {
    "JOBSET_NAME": "nash",
    "REPLICATED_JOB_NAME": "workers",
    "PODS_PER_JOB": "4",
    "JOB_COMPLETION_INDEX": "3",
}
SLURM = {
    "SLURM_STEP_NODELIST": "node[007-015,020],b2",
    "SLURM_JOB_ID": "8193",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "5",
}


def three(found: Processes) -> tuple[str, int, int]:
    return found.coordinator, found.num_processes, found.process_id


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (FLAGS, {}, ("10.0.0.1:1234", 4, 2)),
        ({}, OWN, ("10.0.0.1:1234", 4, 2)),
        ({}, TPU_POD, ("t-0.svc:8482", 2, 1)),
        # Third slice of two hosts each: the last of six.
        ({}, TPU_POD | SLICES, ("s-0.svc:8482", 6, 5)),
        (
            {},
            {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_ID": "0"},
            ("a:8482", 2, 0),
        ),
        ({}, JOBSET, ("nash-workers-0-0.nash:8482", 4, 3)),
        (
            {},
            JOBSET | {"NUM_JOBS": "2", "JOB_INDEX": "1"},
            ("nash-workers-0-0.nash:8482", 8, 7),
        ),
        # 65535 - 8193 mod 4096
        ({}, SLURM, ("node007:65534", 6, 5)),
        ({}, {}, ("", 1, 0)),
        # One process needs nobody, whoever says so.
        ({}, {"TPU_WORKER_HOSTNAMES": "t-0", "TPU_WORKER_ID": "0"}, ("", 1, 0)),
        ({}, JOBSET | {"PODS_PER_JOB": "1"}, ("", 1, 0)),
        ({}, SLURM | {"SLURM_NTASKS": "1"}, ("", 1, 0)),
        # A shell that SLURM gave is no step.
        (
            {},
            {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            ("", 1, 0),
        ),
    ],
)
def test_every_source_says_who_this_process_is(flags, environment, expected):
    assert three(discovery.find(flags, environment)) == expected


def test_the_first_source_that_is_there_is_taken():
    given = [OWN, TPU_POD, JOBSET, SLURM]
    found = []
    while given:
        everything = {name: value for one in given for name, value in one.items()}
        found.append(discovery.find({}, everything).source)
        given.pop(0)
    assert discovery.find(FLAGS, OWN | SLURM).source == "the flags"
    assert found == [
        "the NLHF_ variables",
        "the variables of a TPU pod",
        "the variables of a JobSet",
        "the variables of SLURM",
    ]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("a1,b2", "a1"),
        ("node[007-015,020],b2", "node007"),
        ("node[3,5-7]", "node3"),
        ("rack[1-2]n[3,4],x", "rack1n3"),
    ],
)
def test_first_node_of_a_slurm_list(nodes, first):
    assert discovery.first_node(nodes) == first


@pytest.mark.parametrize(
    ("flags", "environment", "complaint"),
    [
        (FLAGS | {"process_id": "4"}, {}, "process_id must be in [0, 3] for 4"),
        (FLAGS | {"process_id": "4"}, {}, "of 10.0.0.1:1234, got 4 (from the flags)"),
        (FLAGS | {"process_id": "-1"}, {}, "process_id must be in [0, 3]"),
        (FLAGS | {"num_processes": "0"}, {}, "num_processes must be at least 1, got 0"),
        (FLAGS | {"num_processes": "two"}, {}, "must be an integer, got 'two'"),
        (FLAGS | {"coordinator": "here"}, {}, "HOST:PORT with a port in [1, 65535]"),
        (FLAGS | {"coordinator": "h:0"}, {}, "got 'h:0' (from the flags)"),
        (FLAGS | {"coordinator": "h:65536"}, {}, "got 'h:65536'"),
        (FLAGS | {"coordinator": ":80"}, {}, "got ':80'"),
        (
            {"process_id": "1", "num_processes": "2"},
            {},
            "the flags must be given together: there is --num_processes, --process_id, "
            "but not --coordinator",
        ),
        ({}, OWN | {"NLHF_PROCESS_ID": ""}, "but not NLHF_PROCESS_ID"),
        ({}, OWN | {"NLHF_PROCESS_ID": "4"}, "got 4 (from the NLHF_ variables)"),
        ({}, TPU_POD | {"TPU_WORKER_ID": "2"}, "[0, 1] for the hosts t-0.svc, t-1.svc"),
        ({}, TPU_POD | {"MEGASCALE_SLICE_ID": "1"}, "but not MEGASCALE_COORDINATOR"),
        ({}, TPU_POD | SLICES | {"MEGASCALE_SLICE_ID": "3"}, "must be in [0, 5]"),
        ({}, {"JOBSET_NAME": "nash"}, "but not REPLICATED_JOB_NAME, PODS_PER_JOB"),
        ({}, JOBSET | {"JOB_COMPLETION_INDEX": "4"}, "process_id must be in [0, 3]"),
        ({}, {"SLURM_STEP_NODELIST": "a"}, "but not SLURM_JOB_ID, SLURM_NTASKS"),
        ({}, SLURM | {"SLURM_PROCID": "6"}, "got 6 (from the variables of SLURM)"),
    ],
)
def test_a_wrong_or_partial_set_is_one_sentence(flags, environment, complaint):
    with pytest.raises(UserError) as caught:
        discovery.find(flags, environment)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_address_of_the_coordinator():
    assert Processes("[::1]:80", 2, 0).address == ("::1", 80)
    assert Processes("host.name:65535", 2, 0).address == ("host.name", 65535)


@contextlib.contextmanager
def metadata_server(attributes: dict[str, str]):
    """Answers as the metadata server of a cloud host; yields its address."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            value = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()


ENDPOINTS = "unknown:8470:10.1.0.3,unknown:8470:10.1.0.4"


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"agent-worker-number": "1", "tpu-env": ""}, ("10.1.0.3:8482", 2, 1)),
        (
            {
                "agent-worker-number": "0",
                "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                "MEGASCALE_COORDINATOR_ADDRESS: '10.1.0.1:8080'\n",
            },
            ("10.1.0.1:8482", 4, 2),
        ),
    ],
)
def test_a_metadata_server_is_asked(monkeypatch, attributes, expected):
    with metadata_server({"worker-network-endpoints": ENDPOINTS} | attributes) as fake:
        address, asked = fake
        monkeypatch.setenv("GCE_METADATA_IP", address)
        assert three(discovery.find({})) == expected
    assert {flavor for _, flavor in asked} == {"Google"}
    assert "/computeMetadata/v1/instance/attributes/agent-worker-number" in dict(asked)


def test_a_metadata_server_that_is_none_is_named(monkeypatch):
    attributes = {"worker-network-endpoints": ENDPOINTS, "agent-worker-number": "first"}
    with metadata_server(attributes | {"tpu-env": ""}) as (address, _):
        monkeypatch.setenv("GCE_METADATA_IP", address)
        with pytest.raises(UserError, match=rf"metadata server {address} does not say"):
            discovery.find({})
    # Nobody listens there any more.
    with pytest.raises(UserError, match=rf"metadata server {address} does not say"):
        discovery.find({})


def test_what_is_said_before_keeps_the_metadata_server_from_being_asked(monkeypatch):
    with metadata_server({}) as (address, asked):
        monkeypatch.setenv("GCE_METADATA_IP", address)
        assert discovery.find(FLAGS).source == "the flags"
    assert asked == []


def test_the_page_names_every_flag_variable_and_default():
    page = pathlib.Path(__file__).parent.parent / "docs" / "processes.md"
    text = page.read_text(encoding="utf-8")
    names = [f"--{name}" for name in discovery.FLAGS]
    names += [*OWN, *TPU_POD, *discovery.TPU_HOSTS, *SLICES, *JOBSET, *SLURM]
    names += ["NUM_JOBS", "JOB_INDEX", "GCE_METADATA_IP"]
    assert [name for name in names if name not in text] == []
    for name, seconds in dataclasses.asdict(Patience()).items():
        assert f"| `NLHF_{name.upper()}_SECONDS` | {seconds:g} |" in text
