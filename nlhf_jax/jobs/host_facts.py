# SPDX-License-Identifier: Apache-2.0
"""What `nlhf doctor` looks at: the facts of one host, and those of all hosts.

Nothing is judged here, and nothing is read that may hold a secret: no environment
variable but NPROC, of other processes their number and name only.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nlhf_jax import __version__, compilation_cache
from nlhf_jax.jobs import runs

LOCK_FILE = pathlib.Path("/tmp/libtpu_lockfile")
# TPUs are /dev/accel0 ... or, behind a virtual bus, /dev/vfio/0 ...
DEVICE_FILES = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")
COMPARED_PACKAGES = (*runs.REPORTED_PACKAGES, "jaxlib", "numpy", "libtpu")
PROBE = ".nlhf_doctor_{process}_{number}"


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that has a device, or the lock of the devices, open."""

    pid: int
    program: str
    file: str


@dataclasses.dataclass(frozen=True)
class FolderFacts:
    """What came of writing a file into a folder.

    Attributes:
      path: as the user gave it.
      error: why it failed; "" if it didn't.
      free_bytes: on its disk; None for a bucket.
      clock_skew: seconds that the folder's clock is ahead of this host's; None where
        nothing was written.
    """

    path: str
    error: str = ""
    free_bytes: int | None = None
    clock_skew: float | None = None


@dataclasses.dataclass(frozen=True)
class HostFacts:
    """The facts of one process on one host.

    Attributes:
      name: of the host.
      process: its number, from 0.
      versions: of Python, the package and what decides the numbers.
      platform: where JAX computes: "cpu", "gpu" or "tpu"; "" where it cannot.
      device_kind: what the devices call themselves.
      num_devices: of this process.
      jax_error: why there are none; "" if there are.
      asked_platforms: the platforms that JAX was told to use; "" is its own choice.
      device_files: accelerators that the host's kernel shows.
      holders: other processes that hold them or their lock.
      has_lock_file: whether libtpu's lock exists.
      can_open_lock: whether it may be opened for writing.
      folder: MODEL_DIR, or where the command was started.
      cache: the folder of compiled programs.
      package_differences: pinned packages that are missing or of other versions.
      num_pinned: packages that the lock pins; 0 where there is no lock.
      memory_bytes: that a new program may take.
      num_cores: that this process may use.
      nproc: the environment's NPROC; 0 where it is not set.
      port_error: why the port that was asked for cannot be had; "" if it can.
      clock: seconds since 1970, read by all hosts at one moment.
    """

    name: str
    process: int
    versions: Mapping[str, str]
    platform: str
    device_kind: str
    num_devices: int
    jax_error: str
    asked_platforms: str
    device_files: tuple[str, ...]
    holders: tuple[Holder, ...]
    has_lock_file: bool
    can_open_lock: bool
    folder: FolderFacts
    cache: FolderFacts
    package_differences: tuple[str, ...]
    num_pinned: int
    memory_bytes: int
    num_cores: int
    nproc: int
    port_error: str
    clock: float = 0.0


def gather(folder: str, lock: str, port: int = 0) -> HostFacts:
    """Returns the facts of this host.

    Args:
      folder: where a run would write; "" is the current folder.
      lock: file of pinned requirements; "" is the repository's.
      port: that this host should be able to listen on; 0 asks for none.
    """
    # Before JAX starts: from then on this process itself holds the devices.
    files = device_files()
    held = holders({*files, str(LOCK_FILE)})
    has_lock_file = LOCK_FILE.exists()
    can_open_lock = not has_lock_file or os.access(LOCK_FILE, os.W_OK)
    found = _devices()
    pins = read_pins(pathlib.Path(lock) if lock else runs_lock())
    return HostFacts(
        name=socket.gethostname(),
        versions=versions(),
        asked_platforms=jax.config.jax_platforms or "",
        device_files=files,
        holders=held,
        has_lock_file=has_lock_file,
        can_open_lock=can_open_lock,
        folder=probe(folder or os.curdir),
        cache=probe(str(compilation_cache.folder())),
        package_differences=differences(pins, installed(), required_directly()),
        num_pinned=len(pins),
        memory_bytes=available_memory(),
        num_cores=len(os.sched_getaffinity(0)),
        nproc=_nproc(os.environ.get("NPROC", "")),
        port_error=port_error(port) if port else "",
        **found,
    )


def _devices() -> dict[str, Any]:
    """The devices of this process, or why there are none."""
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        nothing = {"platform": "", "device_kind": "", "num_devices": 0, "process": 0}
        return nothing | {"jax_error": first_line(error)}
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "process": jax.process_index(),
        "jax_error": "",
    }


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def device_files(root: pathlib.Path = pathlib.Path("/dev")) -> tuple[str, ...]:
    """Returns the device files of accelerators, in order."""
    found = (path for pattern in DEVICE_FILES for path in root.glob(pattern))
    return tuple(sorted(map(str, found)))


def holders(
    files: Collection[str], processes: pathlib.Path = pathlib.Path("/proc")
) -> tuple[Holder, ...]:
    """Returns the other processes that have one of these files open.

    Processes of other users can be seen by the superuser only.
    """
    found = []
    for folder in processes.glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        for file in sorted(_open_files(folder) & set(files)):
            with contextlib.suppress(OSError):
                program = (folder / "comm").read_text().strip()
                found.append(Holder(int(folder.name), program, file))
    return tuple(found)


def _open_files(process: pathlib.Path) -> set[str]:
    """The files that a process has open; empty if it is gone or somebody else's."""
    found = set()
    with contextlib.suppress(OSError):
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(link))
    return found


def versions() -> dict[str, str]:
    """Returns the versions of Python, of the package and of what it computes with."""
    found = {"python": platform.python_version(), "nlhf_jax": __version__}
    for name in COMPARED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def probe(path: str) -> FolderFacts:
    """Writes a small file into a folder or bucket, looks at its time, and deletes it.

    A folder that does not exist is made, as a run would make it, and taken away again.
    """
    from etils import epath

    if not path:
        return FolderFacts(path, "no folder is set")
    folder = epath.Path(path).expanduser()
    name = PROBE.format(process=os.getpid(), number=time.time_ns())
    try:
        # In a bucket there are no folders to take away.
        parts = () if "://" in path else (folder, *folder.parents)
        made = [one for one in parts if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        before = time.time()
        (folder / name).write_text("nlhf doctor\n")
        after = time.time()
        written = float((folder / name).stat().mtime)
        (folder / name).unlink()
        free = None if "://" in path else disk_free(path)
        with contextlib.suppress(OSError):  # another process of the job is in it
            for one in made:
                one.rmdir()
    # A bucket's client has errors of its own, and each is an answer here.
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        return FolderFacts(path, reason)
    return FolderFacts(path, "", free, skew(written, before, after))


def skew(written: float, before: float, after: float) -> float:
    """Returns how far a file's time lies outside the interval in which it was written.

    Positive if the file's clock is ahead.
    """
    return max(written - after, 0.0) - max(before - written, 0.0)


def disk_free(path: str) -> int:
    """Returns the bytes that may still be written beside `path`."""
    found = os.statvfs(pathlib.Path(path).expanduser())
    return found.f_bavail * found.f_frsize


def runs_lock() -> pathlib.Path:
    """Returns where the repository keeps its lock."""
    return pathlib.Path(__file__).resolve().parents[2] / "requirements.lock"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(lock: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Returns name -> versions that a lock pins; several where markers differ.

    A file that is not there pins nothing.
    """
    found: dict[str, tuple[str, ...]] = {}
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE):
        found[_normal(name)] = (*found.get(_normal(name), ()), version)
    return found


def installed() -> dict[str, str]:
    """Returns name -> version of every installed package."""
    return {
        _normal(one.name): one.version
        for one in importlib.metadata.distributions()
        if one.name
    }


def required_directly() -> frozenset[str]:
    """Returns the packages the project itself requires, its extras left out."""
    try:
        lines = importlib.metadata.requires("nlhf_jax") or ()
    except importlib.metadata.PackageNotFoundError:
        return frozenset()
    needed = (line for line in lines if "extra ==" not in line)
    return frozenset(_normal(re.match(r"[\w.-]+", line)[0]) for line in needed)


def differences(
    pins: Mapping[str, tuple[str, ...]],
    found: Mapping[str, str],
    required: Collection[str],
) -> tuple[str, ...]:
    """Returns one phrase for each pinned package that is not as pinned.

    Args:
      pins: name -> versions.
      found: name -> installed version.
      required: names whose absence is a difference; tests' own packages may be absent.
    """
    other = [
        f"{name} {found[name]} (pinned {' or '.join(versions)})"
        for name, versions in sorted(pins.items())
        if name in found and found[name] not in versions
    ]
    missing = sorted(set(pins) & set(required) - set(found))
    return (*(f"{name} missing" for name in missing), *other)


def available_memory(
    meminfo: pathlib.Path = pathlib.Path("/proc/meminfo"),
    group: pathlib.Path = pathlib.Path("/sys/fs/cgroup"),
) -> int:
    """Returns the bytes a new program may take: the host's, or its control group's."""
    text = meminfo.read_text()
    free = int(re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _nproc(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def port_error(port: int) -> str:
    """Returns why this host cannot listen on a port; "" if it can."""
    with socket.socket() as one:
        try:
            one.bind(("", port))
        except OSError as error:
            return error.strerror or first_line(error)
    return ""


def of_all_hosts(mine: HostFacts) -> tuple[HostFacts, ...]:
    """Returns the facts of every process, in their order, with clocks read together."""
    if mine.jax_error or jax.process_count() == 1:
        return (dataclasses.replace(mine, clock=time.time()),)
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("nlhf doctor")
    mine = dataclasses.replace(mine, clock=time.time())
    text_N = np.frombuffer(json.dumps(dataclasses.asdict(mine)).encode(), np.uint8)
    length = np.asarray(text_N.size, np.int32)
    lengths_P = multihost_utils.process_allgather(length)
    padded_N = np.zeros(int(lengths_P.max()), np.uint8)
    padded_N[: text_N.size] = text_N
    texts_PN = np.asarray(multihost_utils.process_allgather(padded_N))
    return tuple(_from_texts(texts_PN, lengths_P))


def _from_texts(texts_PN: np.ndarray, lengths_P: np.ndarray) -> Iterator[HostFacts]:
    for text_N, length in zip(texts_PN, lengths_P, strict=True):
        yield from_json(json.loads(text_N[: int(length)].tobytes()))


def from_json(record: Mapping[str, Any]) -> HostFacts:
    """Returns the facts that `dataclasses.asdict` and JSON made a record of."""
    return HostFacts(
        **dict(record)
        | {
            "device_files": tuple(record["device_files"]),
            "holders": tuple(Holder(**one) for one in record["holders"]),
            "folder": FolderFacts(**record["folder"]),
            "cache": FolderFacts(**record["cache"]),
            "package_differences": tuple(record["package_differences"]),
        }
    )
