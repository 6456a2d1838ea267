# SPDX-License-Identifier: Apache-2.0
"""Sides in processes of their own, ratios of a round, goals, and the table."""

import dataclasses
import io
import json
import math
import os

import pytest

from benchmarks import compare, figures, protocol, rows, sides, sizes, table
from benchmarks.figures import Figure, Measured, Row
from nlhf_jax import huge_pages

TINY = sizes.SIZES["tiny"]
pytestmark = pytest.mark.timeout(120)


def side(variant, name=""):
    return sides.Side(name or variant, "tests.benchmark_toys", variant)


@pytest.fixture
def start(tmp_path):
    begun = []

    def run(variant, limit_s=60.0):
        one = side(variant)
        log = tmp_path / f"{variant}.log"
        begun.append(sides.Running(one, one.command("tiny", None), log, {}))
        begun[-1].start(limit_s)
        return begun[-1]

    yield run
    for one in begun:
        one.stop()


def test_noise_is_no_answer(start):
    one = start("noisy")
    assert one.state == "ready" and len(one.told["warm_s"]) == 2
    assert "numpy" in one.told["versions"] and "no-such-package" not in one.told
    for _ in range(2):
        unit = one.unit()
        assert unit["seconds"] > 0 and unit["parts"] == {"half": 0.125}
    one.end()
    assert one.state == "ended" and one.told["facts"] == {"steps": TINY.num_layers}
    assert 5 < one.told["peak_mib"] < 200  # a bare Python, not the one that started it


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("absent", "no_such_package is not installed"),
        ("unwilling", "it is on no index"),
    ],
)
def test_what_is_not_there_is_absent(start, variant, why):
    one = start(variant)
    assert (one.state, one.why) == ("absent", why)
    assert one.unit() is None


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("forgetful", "exit code 1: ModuleNotFoundError: No module named 'no_such_dep"),
        ("killed", "exit code 9: silent"),
        ("babbles", "said 'hello' where 'ready' was due"),
    ],
)
def test_what_ends_is_named_with_its_last_line(start, variant, why):
    one = start(variant)
    assert one.state == "crashed" and one.why.startswith(why)


def test_what_hangs_is_ended(start):
    one = start("hangs", 0.5)
    assert (one.state, one.why) == ("crashed", "no answer within 0.5 s")


def test_one_that_dies_leaves_the_others_in_their_rounds(start):
    running = [start("noisy"), start("dies"), start("slow")]
    found = sides.in_turns(running, 4, 0.0)
    names = [sorted(units) for units in found]
    assert names == [["dies", "noisy", "slow"]] * 2 + [["noisy", "slow"]] * 2
    # The first side of a round is another each time.
    assert [next(iter(one)) for one in found] == ["noisy", "dies", "slow", "noisy"]
    assert running[1].state == "crashed"
    assert running[1].why.endswith("RuntimeError: out of paper")
    assert all(units["slow"]["seconds"] >= 0.1 for units in found)


def test_an_environment_has_its_own_python_where_there_is_one(tmp_path):
    one = sides.Side("a", "m", "v", "trl")
    assert one.command("tiny", tmp_path)[1:] == ["-m", "m", "v", "--size=tiny"]
    mine = one.command("tiny", tmp_path)[0]
    theirs = tmp_path / "trl" / "bin" / "python"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    assert mine != str(theirs) and one.command("tiny", tmp_path)[0] == str(theirs)


def test_a_side_stops_when_nobody_asks_any_more():
    answers = io.StringIO()
    work = protocol.Work(lambda: {"a": 1.0})
    protocol.serve(lambda: work, [], io.StringIO("unit\nwhat\nunit\n"), answers)
    kinds = [line.split()[1] for line in answers.getvalue().splitlines()]
    assert kinds == ["ready", "unit", "unit"]


def measured(rounds, told=None, size=TINY):
    told = told or {}
    names = {name for units in rounds for name in units}
    states = {name: {"state": "ended", "why": ""} for name in names}
    return Measured(size, {"group": rounds}, states | told)


def units(**seconds):
    return {name: {"seconds": value, "parts": {}} for name, value in seconds.items()}


def test_a_ratio_is_of_one_round():
    found = measured([units(a=6.0, b=2.0), units(a=1.0, b=4.0), units(a=5.0)])
    figure = found.figure(Row("r", "a", "b", scale=2.0), "tiny")
    assert figure.values == (6.0, 0.5)  # the third has one side only


def test_a_part_is_of_the_same_round_as_the_other_side():
    rounds = [{"a": {"seconds": 9.0, "parts": {"x": 3.0}}, **units(b=1.5)}]
    assert measured(rounds).figure(Row("r", "a/x", "b"), "tiny").values == (2.0,)
    missing = measured(rounds).figure(Row("r", "a/y", "b"), "tiny")
    assert missing.values == () and missing.missing == "no round with both sides"
    assert missing.verdict() == "absent"


def test_the_worst_round_decides_and_few_rounds_decide_nothing():
    high, low = (
        Row("r", "a", "b", {"tiny": 2.0}),
        Row("r", "a", "b", {"tiny": 2.0}, False),
    )
    assert Figure(high, "tiny", (2.0, 9.0, 9.0, 9.0, 9.0)).verdict() == "met"
    assert Figure(high, "tiny", (1.9, 9.0, 9.0, 9.0, 9.0)).verdict() == "missed"
    assert Figure(low, "tiny", (2.0, 0.1, 0.1, 0.1, 0.1)).verdict() == "met"
    assert Figure(low, "tiny", (2.1, 0.1, 0.1, 0.1, 0.1)).verdict() == "missed"
    assert Figure(high, "tiny", (9.0,) * 4).verdict() == "too few rounds"
    assert Figure(high, "small", (9.0,) * 5).verdict() == ""


def test_a_count_needs_one_round():
    told = {
        "a": {"state": "ended", "why": "", "facts": {"n": 3}, "peak_mib": 50.0},
        "b": {"state": "ended", "why": "", "facts": {}, "peak_mib": 40.0},
    }
    found = measured([units(a=1.0)], told)
    count = found.figure(Row("r", "a:n", "", {"tiny": 3.0}, False), "tiny")
    assert count.values == (3.0,) and count.verdict() == "met"
    peak = found.figure(Row("r", "a:peak_mib", "b:peak_mib", {}, False), "tiny")
    assert peak.values == (1.25,)
    assert found.figure(Row("r", "b:n"), "tiny").verdict() == "absent"


def test_a_row_says_who_is_missing():
    told = {"a": {"state": "absent", "why": "a is not installed"}}
    found = measured([units(b=1.0)], told)
    assert found.figure(Row("r", "a", "b"), "tiny").missing == (
        "a absent: a is not installed"
    )
    assert found.figure(Row("r", "c", "b"), "tiny").missing == "c was not asked for"


def test_the_limit_is_what_a_step_needs_at_the_measured_peak():
    need = sizes.Needed.of(TINY)
    told = {
        "peaks.jax": {"state": "ended", "why": "", "facts": {"flops_per_s": 4e9}},
        "peaks.torch": {"state": "ended", "why": "", "facts": {"flops_per_s": 8e9}},
    }
    found = measured([units(b=2.0)], told)
    (value,) = found.figure(Row("r", figures.LIMIT, "b"), "tiny").values
    assert value == pytest.approx(need.step / 8e9 / 2.0)
    without = measured([units(b=2.0)]).figure(Row("r", figures.LIMIT, "b"), "tiny")
    assert without.values == ()


def test_what_a_small_step_needs():
    # Llama-like: 4 (4 x 256^2 + 3 x 256 x 768) in the body, 256 x 8192 in the head.
    size = sizes.SIZES["small"]
    body, head = 3_407_872, 2_097_152
    assert (size.body_products, size.head_products) == (body, head)
    need = sizes.Needed.of(size)
    assert need.decode == 2 * (body + head) * 48 * 64
    assert need.prefill == 2 * body * 32 * 64
    assert need.score == 2 * body * 32 * 128
    assert need.update == 8 * 16 * (128 * body + 64 * head)
    assert need.step == need.decode + need.prefill + need.score + need.update
    # Known beforehand: 33.8 + 13.9 + 27.9 + 73 GFLOP.
    assert need.step / 1e9 == pytest.approx(148.8, abs=0.2)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(sizes.Size)])
def test_a_size_without_something_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        dataclasses.replace(TINY, **{field: 0})


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="width must be a multiple"):
        dataclasses.replace(TINY, num_heads=3)


def test_every_row_has_its_sides_in_one_group_and_names_are_used_once():
    group = {one.name: name for name, many in rows.GROUPS.items() for one in many}
    assert sum(map(len, rows.GROUPS.values())) == len(group)
    for row in rows.ROWS:
        assert len({group[name] for name in row.sides}) == 1, row.name
        assert set(row.goals) <= set(sizes.SIZES)
        terms = (row.above, row.below)
        assert row.above != row.below and row.above, terms
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names)


def test_goals_of_the_first_release_are_asked_at_their_size():
    goals = {row.name: (dict(row.goals), row.at_least) for row in rows.ROWS}
    shipped = {"small": 15, "tiny": 8, "long": 40}
    assert goals["Nash-MD step, TRL as shipped"] == (shipped, True)
    assert goals["decode, transformers as shipped"][0] == {"small": 3.5, "wide": 2.2}
    assert goals["fused / separate decode"] == (
        dict.fromkeys(("small", "wide", "long"), 0.95),
        False,
    )
    assert goals["compilations of the step"][1] is False
    assert goals["fraction of the machine's limit, step"] == ({"small": 0.6}, True)


def test_every_reason_is_of_a_row():
    assert set(table.read_reasons()) <= {row.name for row in rows.ROWS}


def test_reasons_are_read_line_by_line(tmp_path):
    path = tmp_path / "reasons.txt"
    path.write_text("# words\n\na / b = it is late = very\n")
    assert table.read_reasons(path) == {"a / b": "it is late = very"}
    path.write_text("# words\na: b\n")
    with pytest.raises(ValueError, match=r"reasons.txt:2 must be NAME = REASON"):
        table.read_reasons(path)


def record(name="r", values=(3.0, 1.0, 2.0, 2.0, 2.0), goal=2.0, at_least=True):
    row = Row(name, "a", "b", {} if goal is None else {"tiny": goal}, at_least)
    return Figure(row, "tiny", tuple(values)).record()


def test_a_line_shows_goal_verdict_and_reason():
    assert table.cells(record(), {"r": "because"}) == (
        *("r", "2", "1", "3", "5", ">= 2"),
        "missed: because",
    )
    assert table.cells(record(), {})[-1] == "missed: no reason is written down"
    assert table.cells(record(goal=3.0, at_least=False), {})[-2:] == ("<= 3", "met")
    assert table.cells(record(goal=None), {"r": "because"})[-2:] == ("-", "")
    absent = Figure(Row("r", "a", "b"), "tiny", missing="a absent: gone").record()
    assert table.cells(absent, {})[-1] == "absent: a absent: gone"
    assert table.cells(absent, {"r": "because"})[-1] == "absent: because"


def test_a_run_is_compared_with_an_earlier_one_by_ratios():
    then = [record(), record("s", at_least=False), record("gone")]
    now = [
        record(values=[1.0] * 5),
        record("s", values=[2.1] * 5, at_least=False),
        record("new"),
        Figure(Row("gone", "a"), "tiny", missing="?").record(),
    ]
    assert table.against(now, then) == [
        "r: 2 -> 1 (x 0.50)  WORSE",
        "s: 2 -> 2.1 (x 1.05)",
    ]
    worse = [record("s", values=[2.3] * 5, at_least=False)]
    assert table.against(worse, then)[0].endswith("WORSE")


RESULTS = {
    "when": "2026-11-22T08:00:00+00:00",
    "commit": "abc",
    "size": "tiny",
    "machine": {"num_cores": 2, "processor": "x86_64", "load_at_start": 0.25},
    "peaks": {"flops_per_s": 1.1e11, "read_bytes_per_s": 2.5e10},
    "rows": [record()],
}


def test_the_page_gets_the_table_between_its_marks():
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    new = table.with_table(page, [RESULTS])
    assert new.startswith("before\n") and new.endswith(f"{table.END}\nafter\n")
    assert "old" not in new and "| r | 2 | 1 | 3 | 5 | >= 2 | missed" in new
    assert "commit abc, size `tiny`, 2 x86_64 cores, load at start 0.2" in new
    assert "110 GFLOP/s and 25 GB/s" in new
    assert table.with_table(new, [RESULTS]) == new
    with pytest.raises(ValueError, match="must hold"):
        table.with_table("no marks", [RESULTS])


def test_the_page_holds_its_marks():
    page = table.PAGE.read_text()
    assert page.count(table.BEGIN) == page.count(table.END) == 1


@pytest.fixture
def toys(monkeypatch):
    group = (side("noisy", "ours.a"), side("slow", "ours.b"), side("absent", "peer.c"))
    ratio = Row("b / a", "ours.b", "ours.a", {"tiny": 1.0})
    lacking = Row("c / a", "peer.c", "ours.a", {"tiny": 1.0})
    monkeypatch.setattr(compare, "GROUPS", {"toys": group})
    monkeypatch.setattr(compare, "ROWS", (ratio, lacking))
    monkeypatch.setattr(compare, "keep_to", lambda num_threads: None)


def test_a_run_prints_its_table_and_writes_its_results(toys, tmp_path, capsys):
    path = tmp_path / "results" / "one.json"
    words = ["--size=tiny", "--rounds=5", f"--output={path}", "--groups", "toys"]
    assert compare.main(words) == 0
    out, results = capsys.readouterr().out, json.loads(path.read_text())
    ratio, lacking = results["rows"]
    assert ratio["verdict"] == "met" and len(ratio["values"]) == 5
    assert "peer.c: absent no_such_package is not installed" in out
    assert lacking["verdict"] == "absent" and lacking["missing"] in out
    assert {"when", "commit", "machine", "peaks", "sides", "rounds"} <= {*results}
    assert results["sides"]["ours.b"]["peak_mib"] > 0
    assert not math.isnan(results["machine"]["load_at_start"])
    compare.main([*words, "--rounds=1", "--only", "ours.*", f"--baseline={path}"])
    again = capsys.readouterr().out
    assert "b / a: " in again and " -> " in again
    # What was not asked for has no line.
    assert "peer.c" not in again and "c / a" not in again


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds=0"], "--rounds must be at least 1, got 0"),
        (["--threads=0"], "--threads must be at least 1, got 0"),
        (
            ["--peers=/no/such"],
            "--peers must be a folder of environments, got /no/such",
        ),
        (["--baseline=/no/file"], "there are no results in /no/file"),
        (["--page", "/no/file"], "there are no results in /no/file"),
        (["--size=vast"], "invalid choice: 'vast'"),
    ],
)
def test_words_that_make_no_sense_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_patterns_choose_sides():
    found = compare.chosen(["step", "decode"], ["ours.*", "trl.*"], ["*.shipped"])
    assert [one.name for one in found["decode"]] == ["ours.decode"]
    names = [one.name for one in found["step"]]
    assert "trl.cached" in names and "trl.shipped" not in names
    assert compare.chosen(["kinds"], ["trl.*"], []) == {}


def test_results_are_named_by_date_commit_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    path = compare.write(RESULTS, None)
    assert path == tmp_path / "2026-11-22-abc-tiny.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(RESULTS))


def test_sides_keep_to_their_cores(monkeypatch):
    kept = []
    monkeypatch.setattr(compare.os, "sched_getaffinity", lambda pid: {3, 1, 2})
    monkeypatch.setattr(
        compare.os, "sched_setaffinity", lambda pid, cores: kept.append(cores)
    )
    compare.keep_to(2)
    assert kept == [[1, 2]]
    monkeypatch.delattr(compare.os, "sched_getaffinity")
    monkeypatch.delattr(compare.os, "sched_setaffinity")
    compare.keep_to(2)
    assert len(compare.cores()) == os.cpu_count()


def test_every_side_gets_the_pages_of_the_command_line(monkeypatch):
    after = {"HOME": "/", huge_pages.TUNABLES: "glibc.malloc.hugetlb=1"}
    monkeypatch.setattr(huge_pages, "here", lambda: after)
    found = compare.variables("cpu", 2)
    assert found[huge_pages.TUNABLES] == "glibc.malloc.hugetlb=1"
    assert "HOME" not in found
    monkeypatch.setattr(huge_pages, "here", lambda: None)
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    assert huge_pages.TUNABLES not in compare.variables("cpu", 2)
