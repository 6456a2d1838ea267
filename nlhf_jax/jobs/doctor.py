# SPDX-License-Identifier: Apache-2.0
"""nlhf doctor: is this machine, or this pod, ready for a run?

One line for each check: ok, warning or problem, and what to do about it.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from nlhf_jax import discovery, distributed
from nlhf_jax.checks import UserError, check_integer
from nlhf_jax.jobs import host_checks, host_facts

LARGEST_PORT = 65535


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"doctor: {message} (nlhf doctor --help)")


def main(words: Sequence[str]) -> int:
    """Whether devices, versions, folders and clocks of all hosts are fit for a run.

    Returns the exit code: 0 if there is no problem, 2 if there is one that a user can
    put right, 70 if a machine is at fault.

    Raises:
      UserError: an unknown flag or a value out of range.
    """
    options = _options(words)
    # It names who is missing, and must have the time to.
    distributed.start(
        discovery.find({}), {"command": "doctor"}, _patience(options.timeout)
    )
    with _deadline(options.timeout, options.json):
        mine = host_facts.gather(options.model_dir, options.lock, options.port)
        hosts = host_facts.of_all_hosts(mine)
    findings = host_checks.examine(
        hosts, expected_devices=options.expected_devices, with_port=bool(options.port)
    )
    code = host_checks.exit_code(findings)
    if mine.process == 0:
        print(as_json(findings, hosts, code) if options.json else as_text(findings))
    return code


def as_text(findings: Sequence[host_checks.Finding]) -> str:
    """Returns the findings, a line each."""
    return "\n".join(finding.line() for finding in findings)


def as_json(
    findings: Sequence[host_checks.Finding],
    hosts: Sequence[host_facts.HostFacts],
    code: int,
) -> str:
    """Returns findings and facts as one JSON object."""
    found = {
        "exit_code": code,
        "findings": [finding._asdict() for finding in findings],
        "hosts": [dataclasses.asdict(host) for host in hosts],
    }
    return json.dumps(found, allow_nan=False)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="nlhf doctor", allow_abbrev=False, description=__doc__)
    parser.add_argument(
        "--model_dir", default="", help="folder or bucket of the run; default: here"
    )
    parser.add_argument(
        "--expected_devices", type=int, default=0, help="of all hosts together"
    )
    parser.add_argument(
        "--lock", default="", help="requirements that should be installed"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="that the first host should have free"
    )
    parser.add_argument(
        "--timeout", type=int, default=120, help="seconds for devices and hosts"
    )
    parser.add_argument("--json", action="store_true", help="everything, for tools")
    options = parser.parse_args(list(words))
    check_integer("expected_devices", options.expected_devices)
    check_integer("timeout", options.timeout, 1)
    if check_integer("port", options.port) > LARGEST_PORT:
        raise UserError(f"port must be at most {LARGEST_PORT}, got {options.port}")
    if options.lock and not pathlib.Path(options.lock).is_file():
        raise UserError(f"--lock: {options.lock!r} is no file")
    return options


def _patience(seconds: int) -> distributed.Patience:
    found = distributed.Patience.from_variables()
    return dataclasses.replace(found, start=min(found.start, seconds))


@contextlib.contextmanager
def _deadline(seconds: int, json_wanted: bool = False) -> Iterator[None]:
    """Ends the process if the devices, or the other hosts, do not answer in time."""

    def give_up() -> None:
        text = f"JAX or another host has not answered for {seconds} s"
        fix = "start it on every host at once, or look at their logs; or --timeout"
        problem = host_checks.Finding(host_checks.PROBLEM, "devices", text, fix)
        code = host_checks.MACHINES
        said = as_json([problem], [], code) if json_wanted else problem.line()
        print(said, flush=True)
        # Nothing that waits for devices can be asked to stop.
        os._exit(code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
