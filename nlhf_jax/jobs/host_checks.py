# SPDX-License-Identifier: Apache-2.0
"""What `nlhf doctor` thinks of the facts of hosts: pure functions, a line each."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nlhf_jax.jobs.host_facts import FolderFacts, Holder, HostFacts

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LEVELS = (OK, WARNING, PROBLEM)
# A user can put it right; or the machine is at fault, and starting again won't help.
USERS, MACHINES = 2, 70

GIB = 2**30
LEAST_DISK, LITTLE_DISK = 1 * GIB, 10 * GIB
LEAST_MEMORY, LITTLE_MEMORY = 1 * GIB, 4 * GIB
# Seconds. File systems that round times to 2 s are in use; tokens of cloud services
# are refused by clocks that are minutes off.
SMALL_SKEW, LARGE_SKEW = 2.5, 60.0
TESTED_PYTHONS = ("3.11", "3.12")
SHOWN = 4


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
      level: "ok", "warning" or "problem".
      check: what was looked at.
      text: what was found.
      fix: what to do about it; "" where all is well.
      code: exit code of a problem.
    """

    level: str
    check: str
    text: str
    fix: str = ""
    code: int = USERS

    def line(self) -> str:
        """Returns the finding as it is printed."""
        fix = f"; fix: {self.fix}" if self.fix else ""
        return f"{self.level:<8} {self.check}: {self.text}{fix}"


def listed(names: Sequence[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def labels(hosts: Sequence[HostFacts]) -> list[str]:
    """Returns a name for each process: its host, with a number where some share it."""
    names = [host.name for host in hosts]
    if len(set(names)) == len(names):
        return names
    return [f"{host.name}[{host.process}]" for host in hosts]


def devices(hosts: Sequence[HostFacts], expected: int = 0) -> Finding:
    """Judges the number of devices of all hosts.

    Args:
      hosts: in the order of their processes.
      expected: devices there should be; 0 expects none in particular.
    """
    for host in hosts:
        if host.jax_error:
            text = f"JAX finds none on {host.name}: {host.jax_error}"
            fix = "pip install 'nlhf_jax[tpu]' (or [gpu]), or free it if it is in use"
            return Finding(PROBLEM, "devices", text, fix)
    total = sum(host.num_devices for host in hosts)
    kinds = sorted({f"{host.platform} ({host.device_kind})" for host in hosts})
    text = f"{total} of {listed(kinds)} in {len(hosts)} process(es)"
    for host in hosts:
        if host.platform == "cpu" and host.device_files:
            return _unused(host, text)
    if expected and total != expected:
        return _other_number(hosts, text, total, expected)
    return Finding(OK, "devices", text)


def _unused(host: HostFacts, text: str) -> Finding:
    """The kernel shows accelerators, and JAX computes on the CPU."""
    text = f"{text}, but {host.name} has {listed(host.device_files)}"
    if host.asked_platforms:
        fix = "unset JAX_PLATFORMS to use them"
        return Finding(WARNING, "devices", text, fix)
    extra = "gpu" if "nvidia" in host.device_files[0] else "tpu"
    return Finding(PROBLEM, "devices", text, f"pip install 'nlhf_jax[{extra}]'")


def _other_number(
    hosts: Sequence[HostFacts], text: str, total: int, expected: int
) -> Finding:
    named = zip(labels(hosts), hosts, strict=True)
    counts = [f"{name} {host.num_devices}" for name, host in named]
    text = f"{text}, expected {expected}: {listed(counts)}"
    if all(host.platform == "cpu" for host in hosts):
        fix = f"XLA_FLAGS=--xla_force_host_platform_device_count={expected}"
        if len(hosts) > 1:
            fix = "start as many processes as the job has, or correct the number"
        return Finding(PROBLEM, "devices", text, fix)
    if total > expected:
        return Finding(PROBLEM, "devices", text, "correct --expected_devices")
    least = min(hosts, key=lambda host: host.num_devices)
    fix = f"look at {least.name}; delete the slice and create it again"
    return Finding(PROBLEM, "devices", text, fix, MACHINES)


def versions(hosts: Sequence[HostFacts]) -> Finding:
    """Judges whether all hosts run the same versions."""
    first = hosts[0].versions
    for name in sorted({name for host in hosts for name in host.versions}):
        found = [host.versions.get(name, "missing") for host in hosts]
        if len(set(found)) > 1:
            named = zip(labels(hosts), found, strict=True)
            said = [f"{host} {version}" for host, version in named]
            fix = "install requirements.lock on every host"
            return Finding(PROBLEM, "versions", f"{name} differs: {listed(said)}", fix)
    shown = [f"{name} {first[name]}" for name in sorted(first)]
    return Finding(OK, "versions", ", ".join(shown))


def python(host: HostFacts) -> Finding:
    """Judges the version of Python."""
    version = host.versions["python"]
    minor = ".".join(version.split(".")[:2])
    if minor in TESTED_PYTHONS:
        return Finding(OK, "python", version)
    text = f"{version}, and {' and '.join(TESTED_PYTHONS)} are tested"
    known = [tuple(map(int, one.split("."))) for one in TESTED_PYTHONS]
    is_old = tuple(map(int, minor.split("."))) < min(known)
    fix = f"use Python {TESTED_PYTHONS[-1]}"
    return Finding(PROBLEM if is_old else WARNING, "python", text, fix)


def packages(host: HostFacts) -> Finding:
    """Judges the installed packages against the lock."""
    if not host.num_pinned:
        text = "not compared: there is no requirements.lock"
        return Finding(WARNING, "packages", text, "name it with --lock=FILE")
    if not host.package_differences:
        return Finding(OK, "packages", f"as the lock pins them ({host.num_pinned})")
    missing = any(text.endswith(" missing") for text in host.package_differences)
    text = f"not as the lock pins them: {listed(host.package_differences)}"
    fix = "pip install --require-hashes -r requirements.lock"
    return Finding(PROBLEM if missing else WARNING, "packages", text, fix)


def accelerator(host: HostFacts) -> Finding:
    """Judges who holds the accelerators and the lock of libtpu."""
    if not host.device_files and not host.has_lock_file:
        return Finding(OK, "accelerator", "this host has none, and no lock of libtpu")
    if host.holders:
        said = [f"process {h.pid} ({h.program}) has {h.file}" for h in host.holders]
        return Finding(PROBLEM, "accelerator", listed(said), _stop(host.holders))
    if not host.can_open_lock:
        text = "the lock of libtpu belongs to another user"
        fix = "sudo rm /tmp/libtpu_lockfile"
        return Finding(PROBLEM, "accelerator", text, fix)
    if host.has_lock_file and host.platform != "tpu":
        text = "a lock of libtpu that no process of yours holds"
        fix = "if no other user's does (sudo nlhf doctor): rm /tmp/libtpu_lockfile"
        return Finding(WARNING, "accelerator", text, fix)
    return Finding(OK, "accelerator", f"nobody else has {listed(host.device_files)}")


def _stop(holders: Sequence[Holder]) -> str:
    numbers = sorted({holder.pid for holder in holders})
    return f"wait for it, or kill {' '.join(map(str, numbers))}"


def folder(host: HostFacts) -> Finding:
    """Judges whether the run's folder or bucket can be written."""
    return _writable("folder", host.folder, "give another --model_dir, or its rights")


def cache(host: HostFacts) -> Finding:
    """Judges whether compiled programs can be kept for the next start."""
    fix = "set NLHF_CACHE to a folder that can be written"
    found = _writable("cache", host.cache, fix)
    # Without it every start compiles again: slower, not wrong.
    return found if found.level == OK else found._replace(level=WARNING)


def _writable(check: str, found: FolderFacts, fix: str) -> Finding:
    if found.error:
        text = f"{found.path or 'it'} cannot be written: {found.error}"
        return Finding(PROBLEM, check, text, fix)
    return Finding(OK, check, f"{found.path} can be written")


def disk(host: HostFacts) -> Finding:
    """Judges the free space where the run writes."""
    free = host.folder.free_bytes
    if free is None:
        why = "it is a bucket" if "://" in host.folder.path else "see folder"
        return Finding(OK, "disk", f"not looked at: {why}")
    level = PROBLEM if free < LEAST_DISK else WARNING if free < LITTLE_DISK else OK
    text = f"{free / GIB:.1f} GiB free in {host.folder.path}"
    fix = "" if level == OK else "delete old runs, or write to another disk"
    return Finding(level, "disk", text, fix)


def memory(host: HostFacts) -> Finding:
    """Judges the memory and the cores of a host."""
    free = host.memory_bytes
    level = PROBLEM if free < LEAST_MEMORY else WARNING if free < LITTLE_MEMORY else OK
    text = f"{free / GIB:.1f} GiB free, {host.num_cores} cores"
    fix = "" if level == OK else "end other programs, or take a larger machine"
    return Finding(level, "memory", text, fix)


def threads(host: HostFacts) -> Finding:
    """Judges whether XLA's CPU client has threads for as many devices as it fakes.

    A collective waits in one thread per device; with too few it never ends.
    """
    found, needed = host.nproc or host.num_cores, 2 * host.num_devices
    said = f"NPROC={host.nproc}" if host.nproc else f"NPROC is not set: {found} cores"
    if host.platform != "cpu" or host.num_devices < 2:
        return Finding(OK, "threads", "enough for one device of the CPU, or none")
    if found < needed:
        text = f"{said}, and {host.num_devices} devices of one CPU may wait for ever"
        fix = f"export NPROC={max(16, needed)} before Python starts"
        return Finding(PROBLEM, "threads", text, fix)
    return Finding(OK, "threads", f"{said}, enough for {host.num_devices} devices")


def port(host: HostFacts) -> Finding:
    """Judges whether the port that was asked for is free."""
    if host.port_error:
        text = f"this host cannot listen on it: {host.port_error}"
        return Finding(PROBLEM, "port", text, "choose another one")
    return Finding(OK, "port", "free")


def clock(hosts: Sequence[HostFacts]) -> Finding:
    """Judges the clocks of hosts, against each other and against the folder's."""
    clocks = [host.clock for host in hosts]
    between = max(clocks) - min(clocks)
    found = [host.folder.clock_skew or 0.0 for host in hosts]
    off, furthest = max(zip(found, labels(hosts), strict=True), key=lambda x: abs(x[0]))
    worst = max(between, abs(off))
    said = f"{abs(off):.1f} s between the folder's clock and that of a host"
    if abs(off) > SMALL_SKEW:
        said = f"{said} ({furthest} is {'behind' if off > 0 else 'ahead'})"
    if len(hosts) > 1:
        said = f"{said}, {between:.1f} s between hosts"
    if worst <= SMALL_SKEW:
        return Finding(OK, "clock", said)
    fix = "sudo chronyc makestep, or another client of NTP"
    return Finding(PROBLEM if worst > LARGE_SKEW else WARNING, "clock", said, fix)


PER_HOST = (python, packages, accelerator, folder, disk, cache, memory, threads)


def on_every_host(
    check: Callable[[HostFacts], Finding], hosts: Sequence[HostFacts]
) -> Finding:
    """Returns the worst finding of a check, and which hosts it is true of."""
    found = [check(host) for host in hosts]
    worst = max(found, key=lambda one: LEVELS.index(one.level))
    if len(hosts) == 1:
        return worst
    named = zip(labels(hosts), found, strict=True)
    names = [name for name, one in named if one.level == worst.level]
    where = f"{len(names)} of {len(hosts)} processes ({listed(names)})"
    return worst._replace(text=f"{worst.text}; {where}")


def examine(
    hosts: Sequence[HostFacts], *, expected_devices: int = 0, with_port: bool = False
) -> list[Finding]:
    """Returns all findings, in the order in which they are printed.

    Args:
      hosts: the facts of every process.
      expected_devices: of all together; 0 expects none in particular.
      with_port: a port was asked for.
    """
    per_host = [on_every_host(check, hosts) for check in PER_HOST]
    asked = [on_every_host(port, hosts[:1])] * with_port
    together = [devices(hosts, expected_devices), versions(hosts)]
    return [*together, *per_host, clock(hosts), *asked]


def exit_code(findings: Sequence[Finding]) -> int:
    """Returns 0 without a problem, else 2; 70 if only the machine is at fault."""
    return min((one.code for one in findings if one.level == PROBLEM), default=0)
