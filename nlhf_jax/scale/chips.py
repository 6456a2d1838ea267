# SPDX-License-Identifier: Apache-2.0
"""Published figures of accelerators, and devices of machines that are not at hand."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from nlhf_jax.checks import UserError, check_integer, nearest

GIB, MIB = 2**30, 2**20


class Chip(NamedTuple):
    """What one chip can do at best, as its maker publishes it.

    Attributes:
      kind: `device_kind` of its JAX device.
      flops: bfloat16 FLOP/s.
      hbm_bytes: size of its memory.
      usable_bytes: what of it the compiler gives to programs, as its own error says.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s that leave the chip over all its fast links; 0 unknown.
      dcn_bandwidth: bytes/s of a chip to other slices, over the data-centre network; 0
        where none is published.
      vmem_bytes: of a core's vector memory, which holds what the next operation reads.
      axes: of a topology's name: 2 for 4x4, 3 for 4x4x4.
      config: further arguments of the topology.
      known: common topologies.
      source: where the figures stand.
    """

    kind: str
    flops: float
    hbm_bytes: float
    usable_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    vmem_bytes: float
    axes: int
    config: dict[str, Any]
    known: tuple[str, ...]
    source: str


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Vector memory is as jax/_src/pallas/mosaic/tpu_info.py of jax has it, for each core.
CHIPS = {
    "v4": Chip(
        "TPU v4",
        275e12,
        32 * GIB,
        30.75 * GIB,
        1200e9,
        300e9,
        0.0,
        16 * MIB,
        3,
        {"chip_config_name": "megacore"},
        _CUBES,
        "cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB at 1200 GB/s; links 2400 "
        "Gb/s",
    ),
    "v5e": Chip(
        "TPU v5 lite",
        197e12,
        16 * GIB,
        15.75 * GIB,
        819e9,
        200e9,
        3.125e9,
        128 * MIB,
        2,
        {},
        _FLAT,
        "cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 819 GB/s; links 1600 "
        "Gb/s; between slices 6.4 Tb/s a pod of 256",
    ),
    "v5p": Chip(
        "TPU v5",
        459e12,
        95 * GIB,
        95.74 * GIB,
        2765e9,
        600e9,
        6.25e9,
        64 * MIB,
        3,
        {"chip_config_name": "megacore"},
        _CUBES,
        "cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB at 2765 GB/s; links 4800 "
        "Gb/s; between slices 50 Gb/s",
    ),
    "v6e": Chip(
        "TPU v6 lite",
        918e12,
        32 * GIB,
        31.25 * GIB,
        1640e9,
        448e9,
        12.5e9,
        128 * MIB,
        2,
        {},
        _FLAT,
        "cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB at 1640 GB/s; links 3584 "
        "Gb/s; between slices 25.6 Tb/s a pod of 256",
    ),
}
_NAME = re.compile(r"(\w+):(\d+(?:x\d+)+)")


class Target(NamedTuple):
    """Devices a program is compiled for.

    Attributes:
      name: as the user writes it.
      devices: real, fake or described.
      chip: figures; None where there are none (a CPU).
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None


def chip_of(device: Any) -> Chip | None:
    """Returns the figures of a device, or None where the table has none."""
    kind = getattr(device, "device_kind", "")
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def _known_names() -> list[str]:
    return [f"{name}:{size}" for name, chip in CHIPS.items() for size in chip.known]


def _refuse(topology: str, why: str) -> UserError:
    return UserError(
        f"unknown topology {topology!r}: {why}{nearest(topology, _known_names())}; "
        f"chips are {', '.join(CHIPS)}, as in v5e:4x4 or v4:4x4x4"
    )


def check_topology(topology: str) -> Chip:
    """Returns the chip of a topology's name, such as v5e:16x16.

    Raises:
      UserError: no such chip, or a shape with another number of axes.
    """
    match = _NAME.fullmatch(topology)
    if match is None:
        raise _refuse(topology, "it must be CHIP:SHAPE")
    if match[1] not in CHIPS:
        raise _refuse(topology, f"no chip {match[1]!r}")
    chip = CHIPS[match[1]]
    if match[2].count("x") + 1 != chip.axes:
        raise _refuse(topology, f"{match[1]} has {chip.axes} axes")
    return chip


def tpu(topology: str, num_slices: int = 1) -> Target:
    """Returns the devices of a TPU slice that need not exist; nothing can run on them.

    Args:
      topology: such as v5e:16x16 or v4:4x4x4.
      num_slices: equal slices, joined by a slow network.

    Raises:
      UserError: an unknown topology, or the TPU compiler is not installed.
    """
    chip = check_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the TPU compiler, which is not installed: pip install "
            "--require-hashes -r requirements-tpu.lock"
        )
    # The compiler must not look for a real TPU, nor for the machine that has one.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", topology),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = dict(chip.config)
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except RuntimeError as error:
        raise _refuse(topology, _first_line(error)) from error
    return Target(topology, found.devices, chip)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")


def cpu(num_devices: int) -> Target:
    """Returns fake CPU devices.

    Raises:
      UserError: JAX has started with fewer.
    """
    check_integer("cpu_devices", num_devices, 1)
    os.environ.setdefault("NPROC", "16")
    # Where JAX has started, there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_devices)
    devices = jax.devices("cpu")
    if len(devices) < num_devices:
        raise UserError(
            f"cpu_devices must be at most {len(devices)} here, the devices JAX has "
            f"started with, got {num_devices}"
        )
    return Target(f"cpu:{num_devices}", devices[:num_devices], None)
