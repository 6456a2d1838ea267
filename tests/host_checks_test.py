# SPDX-License-Identifier: Apache-2.0
"""What the doctor thinks of facts: every check in good health and in bad."""

import dataclasses

import pytest

from nlhf_jax.jobs import host_checks
from nlhf_jax.jobs.host_facts import FolderFacts, Holder, HostFacts

GIB = 2**30


def host(**changes) -> HostFacts:
    """Returns the facts of a TPU host in good health, with changes."""
    healthy = HostFacts(
        name="host-0",
        process=0,
        versions={"python": "3.11.7", "jax": "0.10.2"},
        platform="tpu",
        device_kind="TPU v5 lite",
        num_devices=4,
        jax_error="",
        asked_platforms="",
        device_files=("/dev/accel0", "/dev/accel1"),
        holders=(),
        has_lock_file=True,
        can_open_lock=True,
        folder=FolderFacts("gs://bucket/run", "", None, 0.0),
        cache=FolderFacts("/home/user/.cache/nlhf_jax/xla", "", 50 * GIB, 0.0),
        package_differences=(),
        num_pinned=111,
        memory_bytes=100 * GIB,
        num_cores=96,
        nproc=0,
        port_error="",
        clock=1000.0,
    )
    return dataclasses.replace(healthy, **changes)


def cpu(**changes) -> HostFacts:
    plain = {"platform": "cpu", "device_kind": "cpu", "num_devices": 1}
    return host(**(plain | {"device_files": (), "has_lock_file": False} | changes))


def other(number: int = 1, **changes) -> HostFacts:
    return host(**({"name": f"host-{number}", "process": number} | changes))


def test_a_healthy_pod_has_only_good_lines_and_code_0():
    hosts = [host(), other(1), other(2), other(3)]
    found = host_checks.examine(hosts, expected_devices=16, with_port=True)
    assert {one.level for one in found} == {"ok"}
    assert host_checks.exit_code(found) == 0
    assert [one.check for one in found] == [
        "devices",
        "versions",
        "python",
        "packages",
        "accelerator",
        "folder",
        "disk",
        "cache",
        "memory",
        "threads",
        "clock",
        "port",
    ]
    # Nothing to do where all is well.
    assert {one.fix for one in found} == {""}


CASES = {
    # check -> facts that are wrong -> level, part of the text, part of the fix
    "python": [
        ({"versions": {"python": "3.10.1"}}, "problem", "3.10.1", "Python 3.12"),
        ({"versions": {"python": "3.13.0"}}, "warning", "3.11 and 3.12", "Python 3.12"),
    ],
    "packages": [
        ({"num_pinned": 0}, "warning", "no requirements.lock", "--lock=FILE"),
        (
            {"package_differences": ("numpy 1.0 (pinned 2.4.6)",)},
            "warning",
            "numpy 1.0 (pinned 2.4.6)",
            "pip install --require-hashes -r requirements.lock",
        ),
        (
            {"package_differences": ("flax missing", "numpy 1 (pinned 2)")},
            "problem",
            "flax missing",
            "pip install",
        ),
    ],
    "accelerator": [
        (
            {"holders": (Holder(17, "python3", "/dev/accel0"),)},
            "problem",
            "process 17 (python3) has /dev/accel0",
            "kill 17",
        ),
        ({"can_open_lock": False}, "problem", "another user", "rm /tmp/libtpu_lock"),
        (
            {"platform": "cpu", "device_files": ()},
            "warning",
            "no process of yours",
            "rm /tmp/libtpu_lockfile",
        ),
    ],
    "folder": [
        (
            {"folder": FolderFacts("gs://b/run", "403 denied")},
            "problem",
            "gs://b/run cannot be written: 403 denied",
            "--model_dir",
        ),
    ],
    "disk": [
        (
            {"folder": FolderFacts("/data", "", GIB // 2, 0.0)},
            "problem",
            "0.5 GiB free in /data",
            "delete old runs",
        ),
        (
            {"folder": FolderFacts("/data", "", 3 * GIB, 0.0)},
            "warning",
            "3.0 GiB",
            "delete old runs",
        ),
    ],
    "cache": [
        (
            {"cache": FolderFacts("/ro", "Read-only file system")},
            "warning",
            "/ro cannot be written: Read-only",
            "NLHF_CACHE",
        ),
        ({"cache": FolderFacts("", "no folder is set")}, "warning", "", "NLHF_CACHE"),
    ],
    "memory": [
        ({"memory_bytes": GIB // 4}, "problem", "0.2 GiB free", "larger machine"),
        ({"memory_bytes": 2 * GIB}, "warning", "2.0 GiB free", "larger machine"),
    ],
    "threads": [
        (
            {"platform": "cpu", "num_devices": 8, "num_cores": 2},
            "problem",
            "NPROC is not set: 2 cores",
            "export NPROC=16",
        ),
        (
            {"platform": "cpu", "num_devices": 32, "num_cores": 2, "nproc": 16},
            "problem",
            "NPROC=16, and 32 devices",
            "export NPROC=64",
        ),
    ],
    "port": [
        ({"port_error": "Address already in use"}, "problem", "already in use", "other")
    ],
}
ROWS = [(check, *row) for check, rows in CASES.items() for row in rows]


def test_every_check_of_one_host_has_a_case_that_is_not_fine():
    names = {check.__name__ for check in host_checks.PER_HOST}
    assert names | {"port"} == set(CASES)


@pytest.mark.parametrize(("check", "changes", "level", "text", "fix"), ROWS)
def test_what_is_wrong_on_one_host(check, changes, level, text, fix):
    found = getattr(host_checks, check)(host(**changes))
    assert (found.level, found.check) == (level, check)
    assert text in found.text
    assert fix in found.fix
    # And the same check of the healthy host is fine: the change alone made it.
    assert getattr(host_checks, check)(host()).level == "ok"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device_files": (), "has_lock_file": False, "platform": "cpu"}, "has none"),
        ({}, "nobody else has /dev/accel0, /dev/accel1"),
        ({"has_lock_file": False}, "nobody else"),
    ],
)
def test_an_accelerator_of_ones_own_is_fine(changes, text):
    found = host_checks.accelerator(host(**changes))
    assert found.level == "ok"
    assert text in found.text


@pytest.mark.parametrize(
    ("num_devices", "num_cores", "nproc", "level"),
    [
        (1, 1, 0, "ok"),
        (8, 2, 16, "ok"),
        (8, 16, 0, "ok"),
        (8, 15, 0, "problem"),
        (8, 96, 2, "problem"),  # NPROC counts, not the cores
    ],
)
def test_devices_of_one_cpu_need_two_threads_each(num_devices, num_cores, nproc, level):
    facts = cpu(num_devices=num_devices, num_cores=num_cores, nproc=nproc)
    assert host_checks.threads(facts).level == level


def test_devices_that_are_not_the_cpu_need_no_threads():
    assert host_checks.threads(host(num_cores=1, num_devices=8)).level == "ok"


def test_devices_are_counted_over_all_hosts():
    found = host_checks.devices([host(), other()], 8)
    assert found.level == "ok"
    assert found.text == "8 of tpu (TPU v5 lite) in 2 process(es)"


def test_a_host_that_lost_a_chip_is_named_and_is_the_machines_fault():
    found = host_checks.devices([host(), other(num_devices=3)], 8)
    assert found.level == "problem"
    assert "expected 8: host-0 4, host-1 3" in found.text
    assert "look at host-1" in found.fix
    assert host_checks.exit_code([found]) == 70


@pytest.mark.parametrize(
    ("hosts", "expected", "fix"),
    [
        ([cpu()], 8, "XLA_FLAGS=--xla_force_host_platform_device_count=8"),
        ([cpu(), cpu(name="b")], 4, "start as many processes"),
        ([host()], 2, "correct --expected_devices"),
    ],
)
def test_another_number_of_devices_is_the_users_fault(hosts, expected, fix):
    found = host_checks.devices(hosts, expected)
    assert found.level == "problem"
    assert fix in found.fix
    assert host_checks.exit_code([found]) == 2


@pytest.mark.parametrize(
    ("files", "asked", "level", "fix"),
    [
        (("/dev/accel0",), "", "problem", "nlhf_jax[tpu]"),
        (("/dev/nvidia0",), "", "problem", "nlhf_jax[gpu]"),
        (("/dev/accel0",), "cpu", "warning", "unset JAX_PLATFORMS"),
    ],
)
def test_accelerators_that_jax_does_not_use(files, asked, level, fix):
    facts = cpu(device_files=files, asked_platforms=asked)
    found = host_checks.devices([facts])
    assert found.level == level
    assert fix in found.fix


def test_jax_that_cannot_start_is_told_with_its_reason():
    facts = host(platform="", num_devices=0, jax_error="TPU is already in use")
    found = host_checks.devices([facts], 4)
    assert found.level == "problem"
    assert "host-0: TPU is already in use" in found.text


def test_versions_must_be_the_same_everywhere():
    assert host_checks.versions([host(), other()]).level == "ok"
    older = other(versions={"python": "3.11.7", "jax": "0.9.0"})
    found = host_checks.versions([host(), older])
    assert found.level == "problem"
    assert found.text == "jax differs: host-0 0.10.2, host-1 0.9.0"
    lacking = other(versions={"python": "3.11.7"})
    found = host_checks.versions([lacking, host()])
    assert found.text == "jax differs: host-1 missing, host-0 0.10.2"


def test_processes_that_share_a_host_are_told_apart():
    one, two = host(), host(process=1, versions={"python": "3.11.7", "jax": "0.9.0"})
    found = host_checks.versions([one, two])
    assert found.text == "jax differs: host-0[0] 0.10.2, host-0[1] 0.9.0"
    found = host_checks.devices([one, host(process=1, num_devices=3)], 8)
    assert "host-0[0] 4, host-0[1] 3" in found.text


@pytest.mark.parametrize(
    ("skew", "level", "text"),
    [
        (0.0, "ok", "0.0 s"),
        (-1.0, "ok", "1.0 s"),
        (10.0, "warning", "host-0 is behind"),
        (-10.0, "warning", "host-0 is ahead"),
        (-600.0, "problem", "600.0 s"),
    ],
)
def test_the_folders_clock_against_the_hosts(skew, level, text):
    found = host_checks.clock([host(folder=FolderFacts("/shared", "", None, skew))])
    assert found.level == level
    assert text in found.text
    assert bool(found.fix) == (level != "ok")


@pytest.mark.parametrize(
    ("seconds", "level"), [(0.5, "ok"), (5.0, "warning"), (61.0, "problem")]
)
def test_the_clocks_of_hosts_against_each_other(seconds, level):
    found = host_checks.clock([host(), other(clock=1000.0 - seconds)])
    assert found.level == level
    assert f"{seconds:.1f} s between hosts" in found.text


@pytest.mark.parametrize("furthest", [20.0, -20.0])
def test_of_all_clocks_the_one_that_is_furthest_off_counts(furthest):
    near = host(folder=FolderFacts("/shared", "", None, 1.0))
    far = other(folder=FolderFacts("/shared", "", None, furthest))
    found = host_checks.clock([near, far])
    assert found.level == "warning"
    assert found.text.startswith("20.0 s")
    assert "host-1" in found.text


def test_a_folder_that_cannot_be_written_has_no_clock():
    facts = host(folder=FolderFacts("gs://b/run", "denied"))
    assert host_checks.clock([facts]).level == "ok"
    assert "see folder" not in host_checks.disk(facts).text
    local = host(folder=FolderFacts("/proc/x", "denied"))
    assert "see folder" in host_checks.disk(local).text


def test_the_worst_host_stands_for_all_and_the_others_are_named():
    full = FolderFacts("/data", "", GIB // 2, 0.0)
    little = FolderFacts("/data", "", 3 * GIB, 0.0)
    hosts = [host(folder=little)] + [other(i, folder=full) for i in range(1, 7)]
    found = host_checks.on_every_host(host_checks.disk, hosts)
    assert found.level == "problem"
    assert found.text.startswith("0.5 GiB free")
    assert "6 of 7 processes (host-1, host-2, host-3, host-4 and 2 more)" in found.text


def test_one_host_is_not_called_one_of_one():
    assert "of 1" not in host_checks.on_every_host(host_checks.disk, [host()]).text


def test_warnings_alone_end_with_0_and_a_users_problem_counts_before_the_machines():
    finding = host_checks.Finding
    warning = finding("warning", "disk", "little", "delete")
    machine = finding("problem", "devices", "lost", "again", host_checks.MACHINES)
    user = finding("problem", "folder", "denied", "rights")
    assert host_checks.exit_code([warning]) == 0
    assert host_checks.exit_code([warning, machine]) == 70
    assert host_checks.exit_code([machine, user]) == 2


def test_a_finding_is_one_line_with_its_fix():
    found = host_checks.Finding("problem", "disk", "0.5 GiB free", "delete old runs")
    assert found.line() == "problem  disk: 0.5 GiB free; fix: delete old runs"
    assert host_checks.Finding("ok", "disk", "fine").line() == "ok       disk: fine"
