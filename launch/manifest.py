# SPDX-License-Identifier: Apache-2.0
"""The JobSet of a job on GKE: one Job for each slice, one pod for each host.

The whole set restarts or none of it: pods never restart alone. JSON, which kubectl
reads as it reads YAML.
"""

import dataclasses

CONTAINER, ROLE = "nlhf", "slice"
# 42: please restart; 127 to 255: ended by a signal. Any other code would come again.
RESTART_CODES = (42, *range(127, 256))
KEPT_SECONDS = 43200


@dataclasses.dataclass(frozen=True)
class Pods:
    """What the manifest is made from.

    Attributes:
      name: of the JobSet.
      namespace: where it lives.
      queue: Kueue's local queue; empty for none.
      image: container with the code and its environment.
      command: of the container; becomes its first process, so it gets SIGTERM.
      accelerator, topology: the node pool's labels.
      slices, hosts, chips: slices, hosts of each, chips of each host.
      max_restarts: of the whole set, after failures and preemptions together.
      grace_seconds: from SIGTERM to SIGKILL.
    """

    name: str
    namespace: str
    queue: str
    image: str
    command: tuple[str, ...]
    accelerator: str
    topology: str
    slices: int
    hosts: int
    chips: int
    max_restarts: int
    grace_seconds: int


def jobset(pods: Pods) -> dict:
    """Returns the manifest."""
    metadata = {
        "name": pods.name,
        "namespace": pods.namespace,
        "labels": {"made-by": "nlhf-submit"},
        "annotations": {
            # One slice on one node pool: its chips are wired to each other.
            "alpha.jobset.sigs.k8s.io/exclusive-topology": (
                "cloud.google.com/gke-nodepool"
            )
        },
    }
    if pods.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = pods.queue
    role = {
        "name": ROLE,
        "replicas": pods.slices,
        "template": {"spec": job_spec(pods)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "failurePolicy": {
                "maxRestarts": pods.max_restarts,
                # Old pods are gone before new ones start: never two trainers.
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [role],
        },
    }


def job_spec(pods: Pods) -> dict:
    """Returns the Job of one slice."""
    return {
        "parallelism": pods.hosts,
        "completions": pods.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                # A preempted pod has an exit code too; it must not count as a mistake.
                {
                    "action": "Count",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": CONTAINER,
                        "operator": "NotIn",
                        "values": list(RESTART_CODES),
                    },
                },
            ]
        },
        "template": {"spec": pod_spec(pods)},
    }


def pod_spec(pods: Pods) -> dict:
    """Returns the pod of one host."""
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": pods.grace_seconds,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": pods.accelerator,
            "cloud.google.com/gke-tpu-topology": pods.topology,
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": pods.image,
                "command": list(pods.command),
                "ports": [{"containerPort": 8471}, {"containerPort": 8476}],
                "resources": {"limits": {"google.com/tpu": pods.chips}},
            }
        ],
    }
