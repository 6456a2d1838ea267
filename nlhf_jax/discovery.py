# SPDX-License-Identifier: Apache-2.0
"""How the processes of one job find each other: flags, variables, cloud metadata.

The first source that is there is taken, in the order of `SOURCES`; what it says must be
complete. Without any there is one process, and nothing is set up.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping

from nlhf_jax.checks import UserError

FLAGS = ("coordinator", "num_processes", "process_id")
OWN_VARIABLES = tuple(f"NLHF_{name.upper()}" for name in FLAGS)
JOBSET_VARIABLES = (
    "JOBSET_NAME",
    "REPLICATED_JOB_NAME",
    "PODS_PER_JOB",
    "JOB_COMPLETION_INDEX",
)
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
SLURM_VARIABLES = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_NTASKS")
DEFAULT_PORT = 8482  # what JAX itself takes on TPU hosts
LARGEST_PORT = 65535


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of one job, and which of them this is.

    Attributes:
      coordinator: HOST:PORT where process 0 listens; empty for a single process.
      num_processes: how many there are.
      process_id: this one, from 0.
      source: where this was read, for messages.
    """

    coordinator: str = ""
    num_processes: int = 1
    process_id: int = 0
    source: str = "a single process"

    def __post_init__(self):
        if self.num_processes < 1:
            raise UserError(
                f"num_processes must be at least 1, got {self.num_processes} "
                f"(from {self.source})"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"process_id must be in [0, {self.num_processes - 1}] for "
                f"{self.num_processes} processes of {self.coordinator}, got "
                f"{self.process_id} (from {self.source})"
            )
        if self.coordinator:
            self.address  # noqa: B018 checks it

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0.

        Raises:
          UserError: it is not HOST:PORT with a port in [1, 65535].
        """
        host, colon, port = self.coordinator.rpartition(":")
        is_port = port.isdecimal() and 1 <= int(port) <= LARGEST_PORT
        if not (host and colon and is_port):
            raise UserError(
                f"coordinator must be HOST:PORT with a port in [1, {LARGEST_PORT}], "
                f"got {self.coordinator!r} (from {self.source})"
            )
        return host.strip("[]"), int(port)


def find(
    flags: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> Processes:
    """Returns the processes of this job, from the first source that is there.

    Args:
      flags: `coordinator`, `num_processes` and `process_id` as far as they are given.
      environment: this process's own if None.

    Raises:
      UserError: the source lacks a part, or a part is not what it must be.
    """
    environment = os.environ if environment is None else environment
    for source in SOURCES:
        found = source(flags, environment)
        if found is not None:
            return found
    return Processes()


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"-?\d+", text.strip()):
        raise UserError(f"{name} must be an integer, got {text!r}")
    return int(text)


def _complete(names: tuple[str, ...], given: Mapping[str, str], of: str) -> bool:
    """Whether all names are given; raises a UserError where only a part of them is."""
    there = [name for name in names if given.get(name, "") != ""]
    missing = [name for name in names if name not in there]
    if there and missing:
        raise UserError(
            f"{of} must be given together: there is {', '.join(there)}, but not "
            f"{', '.join(missing)}"
        )
    return bool(there)


def _from_three(names, given, of) -> Processes | None:
    if not _complete(names, given, of):
        return None
    coordinator, num_processes, process_id = (given[name] for name in names)
    return Processes(
        coordinator,
        _integer(names[1], num_processes),
        _integer(names[2], process_id),
        of,
    )


def from_flags(flags, environment) -> Processes | None:
    """Reads `--coordinator=HOST:PORT --num_processes=N --process_id=K`."""
    del environment
    given = {f"--{name}": value for name, value in flags.items()}
    return _from_three(tuple(f"--{name}" for name in FLAGS), given, "the flags")


def from_variables(flags, environment) -> Processes | None:
    """Reads NLHF_COORDINATOR, NLHF_NUM_PROCESSES and NLHF_PROCESS_ID."""
    del flags
    return _from_three(OWN_VARIABLES, environment, "the NLHF_ variables")


def from_tpu_pods(flags, environment) -> Processes | None:
    """Reads what Kubernetes gives a pod with TPUs: hosts of its slice, and its number.

    With several slices MEGASCALE_COORDINATOR_ADDRESS, _NUM_SLICES and _SLICE_ID say
    which slice it is; processes are counted slice by slice.
    """
    del flags
    hosts = next((environment[n] for n in TPU_HOSTS if environment.get(n)), "")
    if not hosts or "TPU_WORKER_ID" not in environment:
        return None
    of = "the variables of a TPU pod"
    slices = ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID")
    names = tuple(f"MEGASCALE_{name}" for name in slices)
    workers = [host.strip() for host in hosts.split(",")]
    first, num_slices, slice_id = workers[0], 1, 0
    if _complete(names, environment, of):
        first = environment[names[0]]
        num_slices, slice_id = (_integer(n, environment[n]) for n in names[1:])
    worker = _integer("TPU_WORKER_ID", environment["TPU_WORKER_ID"])
    return _on_hosts(first, workers, worker, num_slices, slice_id, of)


def _on_hosts(first, workers, worker, num_slices, slice_id, of) -> Processes:
    num_processes = len(workers) * num_slices
    if num_processes == 1:
        return Processes(source=of)
    if not 0 <= worker < len(workers):
        raise UserError(
            f"the worker's number must be in [0, {len(workers) - 1}] for the hosts "
            f"{', '.join(workers)}, got {worker} (from {of})"
        )
    coordinator = f"{first.partition(':')[0]}:{DEFAULT_PORT}"
    return Processes(coordinator, num_processes, worker + slice_id * len(workers), of)


def from_jobset(flags, environment) -> Processes | None:
    """Reads the variables of a JobSet's pod; its first pod is process 0.

    JOB_INDEX and NUM_JOBS count the jobs of the set where there are several.
    """
    del flags
    if not environment.get("JOBSET_NAME"):
        return None
    of = "the variables of a JobSet"
    _complete(JOBSET_VARIABLES, environment, of)
    name, job, pods, index = (environment[n] for n in JOBSET_VARIABLES)
    pods, index = (
        _integer("PODS_PER_JOB", pods),
        _integer("JOB_COMPLETION_INDEX", index),
    )
    jobs = _integer("NUM_JOBS", environment.get("NUM_JOBS", "1"))
    number = _integer("JOB_INDEX", environment.get("JOB_INDEX", "0"))
    if pods * jobs == 1:
        return Processes(source=of)
    coordinator = f"{name}-{job}-0-0.{name}:{DEFAULT_PORT}"
    return Processes(coordinator, pods * jobs, number * pods + index, of)


def from_slurm(flags, environment) -> Processes | None:
    """Reads the variables of a step that `srun` started; its first node is process 0.

    A shell of `salloc` is no step, and one process.
    """
    del flags
    if not environment.get("SLURM_STEP_NODELIST"):
        return None
    of = "the variables of SLURM"
    _complete((*SLURM_VARIABLES, "SLURM_PROCID"), environment, of)
    num_processes = _integer("SLURM_NTASKS", environment["SLURM_NTASKS"])
    if num_processes == 1:
        return Processes(source=of)
    # Derived from the job's number, so that two jobs on a node don't meet.
    port = LARGEST_PORT - _integer("SLURM_JOB_ID", environment["SLURM_JOB_ID"]) % 4096
    first = first_node(environment["SLURM_STEP_NODELIST"])
    process_id = _integer("SLURM_PROCID", environment["SLURM_PROCID"])
    return Processes(f"{first}:{port}", num_processes, process_id, of)


def first_node(nodes: str) -> str:
    """Returns the first host of a SLURM list.

    a1,b2 -> a1      node[007-015,020],b2 -> node007      rack[1-2]n[3,4] -> rack1n3
    """
    depth, end = 0, len(nodes)
    for position, letter in enumerate(nodes):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            end = position
            break
    return re.sub(r"\[([^\]\-,]+)[^\]]*\]", r"\1", nodes[:end])


def from_metadata(flags, environment) -> Processes | None:
    """Asks the metadata server of a Cloud TPU host, through JAX's own detection.

    It is asked on TPU hosts only, or where GCE_METADATA_IP names a server.

    Raises:
      UserError: the server that GCE_METADATA_IP names does not answer as one.
    """
    del flags
    from jax._src import cloud_tpu_init
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, get_tpu_env_value

    if environment.get("GCE_METADATA_IP"):
        where = environment["GCE_METADATA_IP"]
    elif cloud_tpu_init.running_in_cloud_tpu_vm and GceTpuCluster.is_env_present():
        where = "metadata.google.internal"
    else:
        return None
    of = f"the metadata server {where}"
    try:
        workers = GceTpuCluster._get_worker_list_in_slice()
        worker = GceTpuCluster._get_process_id_in_slice()
        first = get_tpu_env_value("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
        num_slices = GceTpuCluster._get_num_slices()
        slice_id = GceTpuCluster._get_slice_id()
    except (OSError, ValueError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{of} does not say who this process is: {line}") from error
    return _on_hosts(first, workers, worker, num_slices, slice_id, of)


Source = Callable[[Mapping[str, str], Mapping[str, str]], Processes | None]
SOURCES: tuple[Source, ...] = (
    from_flags,
    from_variables,
    from_tpu_pods,
    from_jobset,
    from_slurm,
    from_metadata,
)
