# SPDX-License-Identifier: Apache-2.0
"""What the project is made of: a CycloneDX bill of materials, and a list of licences.

    .venv/bin/python launch/bill_of_materials.py FOLDER

writes `bill_of_materials.json` (CycloneDX 1.6) and `licences.md` into the folder. The
packages are those of `requirements.lock` for this machine, with the files' hashes that
the lock allows; licences and dependencies are what the installed packages say of
themselves. The same environment always gives the same two files.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import re
import sys
import uuid
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = "nlhf_jax"
UNKNOWN = "not stated"
LONGEST_LICENCE = 80  # characters; some packages put the whole text there


@dataclasses.dataclass(frozen=True)
class Pin:
    """One line of the lock: a package, its version and the hashes of its files."""

    name: str
    version: str
    hashes: tuple[str, ...]


def normal(name: str) -> str:
    """Returns a package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(text: str) -> list[Pin]:
    """Returns the pins of a lock that are meant for this machine, in order."""
    from packaging.markers import Marker

    pins = []
    for block in re.split(r"\n(?=\S)", text.replace("\\\n", "")):
        head = re.match(r"([\w.-]+)==(\S+)\s*(?:;\s*([^\n]*?))?\s*(?=--hash|$)", block)
        if head is None or (head[3] and not Marker(head[3]).evaluate()):
            continue
        hashes = tuple(re.findall(r"--hash=(sha256:[0-9a-f]{64})", block))
        pins.append(Pin(normal(head[1]), head[2], hashes))
    return pins


def licence_of(about: Mapping[str, str]) -> str:
    """Returns the licence in a package's metadata: expression, field or classifiers."""
    field = (about.get("License") or "").strip()
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in about.get_all("Classifier") or []
        if text.startswith("License :: ")
    ]
    is_short = field and "\n" not in field and len(field) <= LONGEST_LICENCE
    told = about.get("License-Expression") or (field if is_short else "")
    return told or ", ".join(classifiers) or UNKNOWN


def needs_of(distribution: importlib.metadata.Distribution) -> set[str]:
    """Returns the packages that a package needs here, extras left out."""
    from packaging.requirements import Requirement

    wanted = map(Requirement, distribution.requires or [])
    here = [
        one for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})
    ]
    return {normal(one.name) for one in here}


def component(pin: Pin, licence: str, expression: bool) -> dict:
    """Returns a CycloneDX component."""
    said = {"expression": licence} if expression else {"license": {"name": licence}}
    found = {
        "type": "library",
        "bom-ref": reference(pin),
        "name": pin.name,
        "version": pin.version,
        "purl": reference(pin),
        "properties": [
            {"name": f"{PROJECT}:allowed-file", "value": text} for text in pin.hashes
        ],
    }
    return found if licence == UNKNOWN else found | {"licenses": [said]}


def reference(pin: Pin) -> str:
    """Returns the package URL."""
    return f"pkg:pypi/{pin.name}@{pin.version}"


def bill(pins: Sequence[Pin], project: Pin) -> dict:
    """Returns the bill of materials as CycloneDX 1.6 describes it.

    Raises:
      LookupError: a package of the lock is not installed, or in another version.
    """
    references = {pin.name: reference(pin) for pin in (project, *pins)}
    components, edges = [], []
    for pin in (project, *pins):
        found = installed(pin)
        needs = sorted(references.keys() & needs_of(found) - {pin.name})
        edges.append(
            {"ref": reference(pin), "dependsOn": [references[name] for name in needs]}
        )
        about = found.metadata
        is_expression = bool(about.get("License-Expression"))
        components.append(component(pin, licence_of(about), is_expression))
    whole = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": components[0] | {"type": "application"}},
        "components": components[1:],
        "dependencies": edges,
    }
    # Named after its content, so that two bills of one environment are one.
    text = json.dumps(whole, sort_keys=True)
    return {"serialNumber": uuid.uuid5(uuid.NAMESPACE_OID, text).urn} | whole


def installed(pin: Pin) -> importlib.metadata.Distribution:
    """Returns the installed package of a pin.

    Raises:
      LookupError: there is none, or it has another version.
    """
    try:
        found = importlib.metadata.distribution(pin.name)
    except importlib.metadata.PackageNotFoundError:
        raise LookupError(
            f"{pin.name} {pin.version} of requirements.lock is not installed: run "
            "`python3 launch/here.py tests --co` once and use .venv/bin/python"
        ) from None
    if found.version != pin.version:
        raise LookupError(
            f"{pin.name} is installed as {found.version}, requirements.lock has "
            f"{pin.version}"
        )
    return found


def licences(found: Mapping) -> str:
    """Returns the list of licences as Markdown, by licence."""
    by_licence: dict[str, list[str]] = {}
    for one in found["components"]:
        said = one.get("licenses", [{"license": {"name": UNKNOWN}}])[0]
        name = said.get("expression") or said["license"]["name"]
        by_licence.setdefault(name, []).append(f"{one['name']} {one['version']}")
    lines = [f"# Licences of what {PROJECT} runs on", ""]
    for name in sorted(by_licence, key=str.lower):
        lines.append(f"* **{name}**: {', '.join(sorted(by_licence[name]))}")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes both files; returns 2 where the environment is not that of the lock."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=pathlib.Path, help="where both files are written"
    )
    parser.add_argument("--lock", type=pathlib.Path, default=ROOT / "requirements.lock")
    options = parser.parse_args(argv)
    try:
        project = Pin(normal(PROJECT), importlib.metadata.version(PROJECT), ())
        found = bill(read_lock(options.lock.read_text(encoding="utf-8")), project)
        options.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=2) + "\n"
        (options.folder / "bill_of_materials.json").write_text(text)
        (options.folder / "licences.md").write_text(licences(found), encoding="utf-8")
    except (LookupError, OSError, ImportError) as error:
        print(f"bill_of_materials: {error}", file=sys.stderr)
        return 2
    unknown = [one["name"] for one in found["components"] if "licenses" not in one]
    print(
        f"{len(found['components'])} packages in {options.folder}; no licence in the "
        f"metadata of: {', '.join(unknown) or 'none'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
