# SPDX-License-Identifier: Apache-2.0
"""Who starts again with huge pages, who does not; it stays the same process."""

import os
import subprocess
import sys

import pytest

from nlhf_jax import __main__ as program
from nlhf_jax import huge_pages

ASKED = "always [madvise] never"
ONE = "glibc.malloc.hugetlb=1"


@pytest.fixture(autouse=True)
def _first_start(monkeypatch):
    for name in ("GLIBC_TUNABLES", "NLHF_HUGE_PAGES", huge_pages.MARK):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "before, after",
    [
        ({}, ONE),
        ({"GLIBC_TUNABLES": ""}, ONE),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, f"glibc.pthread.rseq=0:{ONE}"),
        ({"NLHF_HUGE_PAGES": "1"}, ONE),
    ],
)
def test_the_tunable_is_added_to_what_is_there(before, after):
    before = before | {"HOME": "/root"}
    found = huge_pages.environment(before, "glibc 2.36", ASKED)
    assert found == before | {"GLIBC_TUNABLES": after, huge_pages.MARK: "1"}


@pytest.mark.parametrize(
    "before, library, enabled",
    [
        ({"NLHF_HUGE_PAGES": "0"}, "glibc 2.36", ASKED),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc 2.36", ASKED),
        ({"GLIBC_TUNABLES": ONE}, "glibc 2.36", ASKED),
        ({huge_pages.MARK: "1"}, "glibc 2.36", ASKED),
        ({huge_pages.MARK: "1", "GLIBC_TUNABLES": ""}, "glibc 2.36", ASKED),
        ({}, "glibc 2.34", ASKED),
        ({}, "glibc 2.9", ASKED),
        ({}, "glibc two", ASKED),
        ({}, "musl 1.2", ASKED),
        ({}, "", ASKED),
        ({}, "glibc 2.36", "always madvise [never]"),
        ({}, "glibc 2.36", "[always] madvise never"),
        ({}, "glibc 2.36", ""),
    ],
)
def test_nothing_is_changed_where_it_would_not_help(before, library, enabled):
    assert huge_pages.environment(before, library, enabled) is None


@pytest.mark.parametrize("version", ["2.35", "2.36", "2.100", "3.0"])
def test_newer_libraries_know_it(version):
    assert huge_pages.environment({}, f"glibc {version}", ASKED) is not None


class Started(Exception):
    """Stands for the end of the old program."""


def test_the_same_command_is_started_with_the_new_environment(monkeypatch, tmp_path):
    def exec_(path, words, environment):
        raise Started(path, words, environment["GLIBC_TUNABLES"])

    enabled = tmp_path / "enabled"
    enabled.write_text(ASKED)
    monkeypatch.setattr(huge_pages, "ENABLED", enabled)
    monkeypatch.setattr(os, "execve", exec_)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "nlhf_jax", "train"])
    with pytest.raises(Started) as started:
        huge_pages.start_again()
    assert started.value.args == (sys.executable, sys.orig_argv, ONE)


def _raises(error):
    def fail(*given):
        raise error

    return fail


@pytest.mark.parametrize("name", ["confstr", "execve"])
@pytest.mark.parametrize("error", [OSError(), ValueError(), AttributeError()])
def test_a_system_that_does_not_play_along_changes_nothing(
    name, error, monkeypatch, tmp_path
):
    (tmp_path / "enabled").write_text(ASKED)
    monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "enabled")
    monkeypatch.setattr(os, name, _raises(error))
    assert huge_pages.start_again() is None


def test_a_kernel_without_the_file_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "none")
    monkeypatch.setattr(os, "execve", _raises(AssertionError))
    assert huge_pages.start_again() is None


@pytest.mark.parametrize("words, times", [(["train"], 1), (["--help"], 0), ([], 0)])
def test_only_what_works_is_started_again(words, times, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "argv", ["nlhf", *words])
    monkeypatch.setattr(huge_pages, "start_again", lambda: calls.append(1))
    monkeypatch.setattr("nlhf_jax.cli.main", lambda: 7)
    assert program.start() == 7
    assert len(calls) == times


@pytest.mark.parametrize("is_emptied", [False, True])
def test_a_process_keeps_its_number_words_and_exit_code(is_emptied, tmp_path):
    """A real second start, on a kernel that is said to give huge pages if asked.

    Where something takes the tunable away, as a wrapper may, there is no third.
    """
    (tmp_path / "enabled").write_text(ASKED)
    source = (
        "import os, pathlib, sys\n"
        "from nlhf_jax import huge_pages\n"
        f"huge_pages.ENABLED = pathlib.Path({str(tmp_path / 'enabled')!r})\n"
        "tunables = os.environ.get('GLIBC_TUNABLES')\n"
        "starts = int(os.environ.get('STARTS', '0')) + 1\n"
        "os.environ['STARTS'] = str(starts)\n"
        "if starts > 2: sys.exit('a third start')\n"
        f"if {is_emptied}: os.environ['GLIBC_TUNABLES'] = ''\n"
        "print(os.getpid(), sys.argv[1:], tunables, flush=True)\n"
        "huge_pages.start_again()\n"
        "sys.exit(3)\n"
    )
    path = tmp_path / "job.py"
    path.write_text(source)
    clean = dict(os.environ)
    clean["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, str(path), "a b", "--c=d"],
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 3, run.stderr
    library = os.confstr("CS_GNU_LIBC_VERSION")
    if huge_pages.environment({}, library, ASKED) is None:  # an old library
        assert len(lines) == 1
        return
    first, second = lines
    assert first.endswith("['a b', '--c=d'] None")
    assert second == first.removesuffix("None") + ONE
