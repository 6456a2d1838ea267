# SPDX-License-Identifier: Apache-2.0
"""The seam: a backend is a module with FLAGS and `submit(options, job) -> code`."""

import importlib
from types import ModuleType

from launch.errors import SubmitError, nearest

BACKENDS = {
    "local": "processes on this machine",
    "tpu_vm": "TPU VMs of the Cloud TPU API, one slice or several",
    "gce": "a managed instance group of Compute Engine",
    "gke": "a JobSet on a Kubernetes cluster, queued by Kueue",
}


def load(name: str) -> ModuleType:
    """Returns a backend's module.

    Raises:
      SubmitError: there is none of this name.
    """
    if name not in BACKENDS:
        raise SubmitError(
            f"--backend must be one of {', '.join(BACKENDS)}; got {name!r}"
            f"{nearest(name, BACKENDS)}"
        )
    return importlib.import_module(f"launch.{name}")
