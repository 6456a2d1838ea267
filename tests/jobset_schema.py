# SPDX-License-Identifier: Apache-2.0
"""A JSON schema of the parts of JobSet v1alpha2 that we write, and a small validator.

Written by hand after the fields of the JobSet, Job and Pod interfaces. Stricter than
the cluster: what we don't write is not allowed, so that a misspelt field is seen.
"""

import re
from typing import Any

LABEL = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
DNS_LABEL = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
TYPES = {"object": dict, "array": list, "string": str, "integer": int}


def record(required: dict, optional: dict | None = None) -> dict:
    """Returns the schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


def listed(items: dict, least: int = 1, most: int = 1000) -> dict:
    """Returns the schema of a list."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def text(pattern: str = r".+") -> dict:
    """Returns the schema of a string that matches all of a pattern."""
    return {"type": "string", "pattern": pattern}


def number(least: int, most: int = 2**31 - 1) -> dict:
    """Returns the schema of an integer in a range."""
    return {"type": "integer", "minimum": least, "maximum": most}


def one_of(*values: Any) -> dict:
    """Returns the schema of a choice."""
    return {"enum": list(values)}


CONTAINER = record(
    {
        "name": text(DNS_LABEL),
        "image": text(r"\S+"),
        "command": listed({"type": "string"}),
        "ports": listed(record({"containerPort": number(1, 65535)})),
        "resources": record({"limits": record({"google.com/tpu": number(1, 8)})}),
    }
)
POD = record(
    {
        "restartPolicy": one_of("Never"),
        "terminationGracePeriodSeconds": number(0),
        "nodeSelector": record(
            {
                "cloud.google.com/gke-tpu-accelerator": text(LABEL),
                "cloud.google.com/gke-tpu-topology": text(r"\d+x\d+(x\d+)?"),
            }
        ),
        "containers": listed(CONTAINER, most=1),
    }
)
ON_PODS = record(
    {
        "action": one_of("Count"),
        "onPodConditions": listed(
            record({"type": one_of("DisruptionTarget"), "status": one_of("True")})
        ),
    }
)
ON_EXIT_CODES = record(
    {
        "action": one_of("FailJob"),
        "onExitCodes": record(
            {
                "containerName": text(DNS_LABEL),
                "operator": one_of("NotIn"),
                "values": listed(number(1, 255), most=255) | {"increasing": True},
            }
        ),
    }
)
JOB = record(
    {
        "parallelism": number(1),
        "completions": number(1),
        "completionMode": one_of("Indexed"),
        # A pod that is replaced alone would abort the others.
        "backoffLimit": one_of(0),
        "podFailurePolicy": record(
            {"rules": listed({"anyOf": [ON_PODS, ON_EXIT_CODES]}, most=20)}
        ),
        "template": record({"spec": POD}),
    }
)
RULE = record(
    {
        "name": text(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
        "action": one_of(
            "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"
        ),
        "onJobFailureReasons": listed(
            one_of(
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            )
        ),
    }
)
JOBSET = record(
    {
        "apiVersion": one_of("jobset.x-k8s.io/v1alpha2"),
        "kind": one_of("JobSet"),
        "metadata": record(
            {
                "name": text(DNS_LABEL),
                "namespace": text(DNS_LABEL),
                "labels": record(
                    {"made-by": text(LABEL)},
                    {"kueue.x-k8s.io/queue-name": text(LABEL)},
                ),
                "annotations": record(
                    {
                        "alpha.jobset.sigs.k8s.io/exclusive-topology": one_of(
                            "cloud.google.com/gke-nodepool"
                        )
                    }
                ),
            }
        ),
        "spec": record(
            {
                "ttlSecondsAfterFinished": number(0),
                "failurePolicy": record(
                    {
                        "maxRestarts": number(0),
                        "restartStrategy": one_of("Recreate", "BlockingRecreate"),
                        "rules": listed(RULE),
                    }
                ),
                "replicatedJobs": listed(
                    record(
                        {
                            "name": text(DNS_LABEL),
                            "replicas": number(1),
                            "template": record({"spec": JOB}),
                        }
                    )
                ),
            }
        ),
    }
)


def complaints(value: Any, schema: dict, path: str = "") -> list[str]:
    """Returns what is wrong with a value, one line each; empty if nothing is."""
    found = []
    if "anyOf" in schema:
        tried = [complaints(value, one, path) for one in schema["anyOf"]]
        return [] if [] in tried else min(tried, key=len)
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: {value!r} is none of {schema['enum']}"]
    kind = TYPES.get(schema.get("type"), object)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return [f"{path}: {value!r} is no {schema['type']}"]
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        found.append(f"{path}: {value!r} does not match {schema['pattern']}")
    if kind is int and not schema["minimum"] <= value <= schema["maximum"]:
        found.append(f"{path}: {value} is out of range")
    if kind is dict:
        found += _of_object(value, schema, path)
    if kind is list:
        found += _of_list(value, schema, path)
    return found


def _of_object(value: dict, schema: dict, path: str) -> list[str]:
    found = [f"{path}: {k} is missing" for k in schema["required"] if k not in value]
    for key, each in value.items():
        if key not in schema["properties"]:
            found.append(f"{path}: {key} is not known")
        else:
            found += complaints(each, schema["properties"][key], f"{path}/{key}")
    return found


def _of_list(value: list, schema: dict, path: str) -> list[str]:
    found = []
    if not schema["minItems"] <= len(value) <= schema["maxItems"]:
        found.append(f"{path}: {len(value)} items")
    if schema.get("increasing") and value != sorted(set(value)):
        found.append(f"{path}: not increasing")
    for index, each in enumerate(value):
        found += complaints(each, schema["items"], f"{path}/{index}")
    return found
