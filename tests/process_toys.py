# SPDX-License-Identifier: Apache-2.0
"""Starts several real processes on this machine, each with its log and a time limit."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Gang:
    """Processes of one job; `wait` returns their exit codes, `logs` what they said."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, words, *, devices: int = 1, **variables: str) -> None:
        """Starts one more process with its own number of fake devices."""
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "NPROC": "16",
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the programs run a few times
            "PYTHONPATH": str(ROOT),
            "NLHF_START_SECONDS": "120",
            **variables,
        }
        with open(self.log(len(self.processes)), "w") as log:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-X", "faulthandler", *map(str, words)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=ROOT,
                )
            )

    def log(self, number: int) -> pathlib.Path:
        """Returns where a process writes."""
        return self.folder / f"{number}.log"

    def logs(self) -> list[str]:
        """Returns what each process has written so far."""
        return [self.log(n).read_text() for n in range(len(self.processes))]

    def wait(self, seconds: float) -> list[int]:
        """Returns the exit codes; who takes longer shows its stacks and fails."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGABRT)  # faulthandler prints stacks
            time.sleep(1.0)
            raise AssertionError("\n".join(["too slow", *self.logs()])) from None
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def gang(folder: pathlib.Path):
    """Yields a gang that leaves nothing running."""
    started = Gang(folder)
    try:
        yield started
    finally:
        started.kill()


def flags(num_processes: int, process_id: int, port: int) -> list[str]:
    """Returns the command-line flags of one process."""
    return [
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={num_processes}",
        f"--process_id={process_id}",
    ]


def run_together(
    folder: pathlib.Path, num_processes: int, words, *, devices: int, seconds: float
) -> list[str]:
    """Runs one command in several processes, all of which must succeed."""
    port = free_port()
    with gang(folder) as together:
        for number in range(num_processes):
            more = flags(num_processes, number, port) if num_processes > 1 else []
            together.start([*words, *more], devices=devices)
        codes = together.wait(seconds)
        assert codes == [0] * num_processes, "\n".join(together.logs())
        return together.logs()
