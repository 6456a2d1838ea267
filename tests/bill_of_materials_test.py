# SPDX-License-Identifier: Apache-2.0
"""The bill of materials has what CycloneDX 1.6 asks, and is that of the lock."""

import email.message
import json
import pathlib
import re
import sys

import pytest

from launch import bill_of_materials as bom

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = """\
absl-py==2.5.1 \\
    --hash=sha256:{a} \\
    --hash=sha256:{b}
colorama==0.4.6 ; sys_platform == 'win32' \\
    --hash=sha256:{a}
Jinja2==3.1.6 ; python_version >= '3.11' \\
    --hash=sha256:{b}
"""
A, B = "a" * 64, "b" * 64


def about(**fields) -> email.message.Message:
    """Returns a package's metadata; lists become repeated fields."""
    message = email.message.Message()
    for name, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            message[name.replace("_", "-")] = one
    return message


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns the folder that the command wrote."""
    folder = tmp_path_factory.mktemp("bom")
    assert bom.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def found(written):
    return json.loads((written / "bill_of_materials.json").read_text())


def test_a_lock_is_read_with_its_markers_and_hashes():
    pins = bom.read_lock(LOCK.format(a=A, b=B))
    expected = [bom.Pin("absl-py", "2.5.1", (f"sha256:{A}", f"sha256:{B}"))]
    if sys.platform == "win32":
        expected.append(bom.Pin("colorama", "0.4.6", (f"sha256:{A}",)))
    expected.append(bom.Pin("jinja2", "3.1.6", (f"sha256:{B}",)))
    assert pins == expected


def test_what_the_specification_requires_is_there(found):
    assert found["bomFormat"] == "CycloneDX"
    assert found["specVersion"] == "1.6"
    assert type(found["version"]) is int and found["version"] >= 1
    hexadecimal = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    assert re.fullmatch(f"urn:uuid:{hexadecimal}", found["serialNumber"])
    allowed = {"bomFormat", "specVersion", "serialNumber", "version", "metadata"}
    assert found.keys() == allowed | {"components", "dependencies"}
    for one in (found["metadata"]["component"], *found["components"]):
        assert one["type"] in ("application", "library")
        assert one["name"] and one["version"]
        assert one["purl"] == f"pkg:pypi/{one['name']}@{one['version']}"
        for licence in one.get("licenses", []):
            # A licence with an expression is the only one of its component.
            assert licence.keys() in ({"expression"}, {"license"})
            assert licence.get("expression") or licence["license"]["name"]
            assert len(one["licenses"]) == 1
        for fact in one["properties"]:
            assert re.fullmatch("sha256:[0-9a-f]{64}", fact["value"])


def test_references_are_unique_and_all_that_is_needed_is_listed(found):
    whole = [found["metadata"]["component"], *found["components"]]
    references = [one["bom-ref"] for one in whole]
    assert len(set(references)) == len(references)
    needs = {one["ref"]: one["dependsOn"] for one in found["dependencies"]}
    assert needs.keys() == set(references)
    assert set().union(*needs.values()) <= set(references)
    (jax,) = [name for name in references if name.startswith("pkg:pypi/jax@")]
    assert jax in needs[references[0]]


def test_it_is_the_lock_for_this_machine(found):
    pins = bom.read_lock((ROOT / "requirements.lock").read_text())
    assert len(pins) > 80
    assert [(one["name"], one["version"]) for one in found["components"]] == [
        (pin.name, pin.version) for pin in pins
    ]
    assert all(pin.hashes for pin in pins)


def test_the_same_environment_gives_the_same_files(written, tmp_path):
    assert bom.main([str(tmp_path)]) == 0
    for name in ("bill_of_materials.json", "licences.md"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_every_package_is_in_the_list_of_licences_once(found, written):
    text = (written / "licences.md").read_text()
    lists = re.findall(r"^\* \*\*.*?\*\*: (.*)$", text, flags=re.MULTILINE)
    entries = [entry for one in lists for entry in one.split(", ")]
    named = [f"{one['name']} {one['version']}" for one in found["components"]]
    assert sorted(entries) == sorted(named)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License_Expression": "MIT", "License": "other"}, "MIT"),
        ({"License": "Apache-2.0"}, "Apache-2.0"),
        (
            {
                "License": "The whole\ntext",
                "Classifier": [
                    "Topic :: X",
                    "License :: OSI Approved :: MIT License",
                    "License :: OSI Approved :: BSD License",
                ],
            },
            "MIT License, BSD License",
        ),
        ({"License": "x" * 81}, bom.UNKNOWN),
        ({}, bom.UNKNOWN),
    ],
)
def test_the_licence_is_what_the_package_says(fields, expected):
    assert bom.licence_of(about(**fields)) == expected


def test_a_package_without_a_licence_gets_none():
    pin = bom.Pin("x", "1", ())
    assert "licenses" not in bom.component(pin, bom.UNKNOWN, False)
    assert bom.component(pin, "MIT", True)["licenses"] == [{"expression": "MIT"}]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("no-such-package==1.0", "no-such-package 1.0 of requirements.lock is not"),
        ("absl-py==0.0.1", "requirements.lock has 0.0.1"),
    ],
)
def test_another_environment_than_the_locks_is_said(tmp_path, capsys, line, expected):
    (tmp_path / "lock").write_text(f"{line} \\\n    --hash=sha256:{A}\n")
    words = [str(tmp_path / "out"), f"--lock={tmp_path}/lock"]
    assert bom.main(words) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
