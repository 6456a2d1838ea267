# SPDX-License-Identifier: Apache-2.0
"""The report: what its words claim, what it escapes, and how a browser shows it."""

import base64
import html.parser
import math
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
from matplotlib import image

from nlhf_jax.checks import UserError
from nlhf_jax.evaluation import cyclicity, plots, report, summaries, tournament, verdict
from nlhf_jax.evaluation.report import Example, PolicyFigures, ReportData

POLICIES = ("SFT", "RLHF", "Nash-MD-PG", "Self-play")
ATTACK = "<script>document.title='broken'</script><img src=x onerror=alert(1)>"


def rates(strengths, *, num_prompts=400, noise=0.3, seed=0):
    """Win rates 1/2 + (difference of strengths), with noise across prompts."""
    rng = np.random.default_rng(seed)

    def judge(first, second):
        mean = 0.5 + strengths[first] - strengths[second]
        return np.clip(mean + rng.uniform(-noise, noise, num_prompts), 0, 1)

    return tournament.win_rates({name: [name] for name in strengths}, judge)


CLEAR = rates({"SFT": 0.0, "RLHF": 0.1, "Nash-MD-PG": 0.2, "Self-play": 0.1})


def full_report():
    """Returns a report in which no part is missing."""
    answers = {name: f"answer of {name} & co" for name in POLICIES}
    texts = ["one two", "one two three"]
    statistics = summaries.describe(texts, texts, texts, [True, False])
    steps_K = np.arange(0, 100, 10)
    values_K = 1 / (1 + steps_K)
    return ReportData(
        title=f"A run {ATTACK}",
        population=CLEAR,
        learned=rates({"SFT": 0.0, "RLHF": 0.3, "Nash-MD-PG": 0.3, "Self-play": 0.3}),
        rlhf=("RLHF",),
        nash=("Nash-MD-PG", "Self-play"),
        figures={
            "SFT": PolicyFigures(0.0, 0.0, statistics),
            "RLHF": PolicyFigures(3.25, 0.12),
        },
        stages={
            "sft": {
                "loss/token_nll": (steps_K, values_K),
                "eval/loss_token_nll": (steps_K, values_K),
            },
            "RLHF": {"eval/kl": (steps_K, values_K)},
        },
        cyclicity=cyclicity.measure(
            np.array([[[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]])
        ),
        raters={"coverage": 2.0, "brevity": 1.0},
        examples=(
            Example("first document", "first target", answers),
            Example(ATTACK, ATTACK, answers | {"RLHF": ATTACK, "Self-play": ""}),
        ),
        config=f"BATCH_SIZE = 32  # {ATTACK}",
        versions={"jax": "0.0.1"},
    )


class _Page(html.parser.HTMLParser):
    """Collects tags with their attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "style":
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag == "style":
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


# The verdict.


def test_verdict_names_who_beats_the_baseline():
    text = verdict.verdict(CLEAR, baseline="SFT")
    shown = verdict.format_interval(CLEAR.interval("RLHF", "SFT"))
    assert f"RLHF ({shown})" in text and "beat SFT." in text
    assert "Nash-MD-PG beats every other policy." in text
    assert "on 400 prompts" in text and "95% intervals" in text


def test_verdict_does_not_call_a_lead_a_win():
    close = rates({"SFT": 0.0, "A": 0.01, "B": -0.2}, num_prompts=20)
    assert close.interval("A", "SFT").mean != 0.5
    text = verdict.verdict(close, baseline="SFT", rlhf=["A"], nash=["SFT"])
    assert text.count("No policy is shown to beat") == 2
    assert re.search(r"A \([^)]*\) against SFT is undecided\.", text)
    assert re.search(r"B \([^)]*\) loses to SFT\.", text)
    assert "Whether SFT or A is ahead is undecided" in text


@pytest.mark.parametrize(
    ("strengths", "words"),
    [
        ((0.1, 0.2), "N is ahead of R"),
        ((0.2, 0.1), "N is behind R"),
        ((0.1, 0.1), "Whether N or R is ahead is undecided"),
    ],
)
def test_verdict_compares_nash_with_rlhf(strengths, words):
    found = rates(dict(zip("RN", strengths, strict=True)) | {"SFT": 0.0}, seed=1)
    text = verdict.verdict(found, baseline="SFT", rlhf=["R"], nash=["N"])
    assert f"{words} ({verdict.format_interval(found.interval('N', 'R'))})." in text


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (0.2, r"0\.(19|20|21) higher on average .* does not share all of the gain"),
        (0.0, r"agrees with the population on the gains over SFT to 0\.0"),
        (-0.2, r"0\.(19|20|21) lower on average"),
    ],
)
def test_verdict_says_how_far_the_learned_judge_flatters(shift, words):
    population, learned = (
        rates({"SFT": 0.0, "A": lead}, noise=0.05, seed=seed)
        for seed, lead in enumerate((0.2, 0.2 + shift))
    )
    text = verdict.verdict(population, baseline="SFT", learned=learned)
    assert re.search(words, text)


def test_cyclicity_paragraph_has_the_numbers_and_its_limit():
    text = verdict.cyclicity_paragraph(full_report().cyclicity)
    assert "1 of 1 triples of candidates (100.0%)" in text
    assert "is off by 0.500" in text
    assert text.endswith("It is no statement about people.")
    pair = cyclicity.measure(np.array([[[0.5, 0.7], [0.3, 0.5]]]))
    assert "cannot be seen" in verdict.cyclicity_paragraph(pair)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.6111, 0.55, 0.678), "0.61 [0.55, 0.68]"),
        ((0.52, 0.5012, 0.54), "0.520 [0.501, 0.540]"),
        ((0.48, 0.46, 0.49996), "0.4800 [0.4600, 0.5000]"),
        ((0.75, 0.5, 1.0), "0.75 [0.50, 1.00]"),
    ],
)
def test_an_end_is_shown_apart_from_one_half(numbers, text):
    assert verdict.format_interval(tournament.Interval(*numbers)) == text


def test_names_are_joined_as_in_prose():
    joined = [verdict.join_names(list("abc")[:n]) for n in range(4)]
    assert joined == ["", "a", "a and b", "a, b and c"]


# The page.


def test_every_part_is_on_the_page():
    page = _Page(report.render(full_report()))
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == [
        *("verdict", "policies", "win-rates", "trade-off", "curves"),
        *("cyclicity", "examples", "configuration"),
    ]
    assert "3.25 ± 0.12" in page.text
    assert "coverage 2, brevity 1" in page.text
    assert "first target answer of SFT & co answer of RLHF & co" in page.text
    assert "Self-play" in page.text and "empty" in page.text
    # The scatter and two curve panels.
    assert sum(tag == "img" for tag, _ in page.tags) == 3


def test_a_tournament_alone_makes_a_page():
    page = _Page(report.render(ReportData("Only a tournament", CLEAR)))
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["verdict", "policies", "win-rates", "configuration"]
    assert "none was given" in page.text and "nan" not in page.text.lower()


def test_cells_hold_the_win_rates():
    page = _Page(report.render(ReportData("t", CLEAR)))
    matrix = page.text.split("Held-out population of raters", 1)[1]
    for name in POLICIES:
        for other in POLICIES:
            if name != other:
                mean, low, high = verdict.digits_of(CLEAR.interval(name, other))
                assert f"{mean} {low} to {high}" in matrix


def test_policies_are_listed_best_first_with_dashes_for_what_is_unknown():
    columns, rows = report.policy_table(full_report())
    assert rows[0]["name"] == "Nash-MD-PG" and rows[-1]["name"] == "SFT"
    cells = dict(zip(columns, rows[-1]["cells"], strict=True))
    assert cells["Over SFT"] == "-" and cells["KL (nats)"] == "0.00 ± 0.00"
    assert cells["Words"] == "2.5" and cells["Ended"] == "50%"
    assert cells["ROUGE-L"] == "1.000" and cells["Distinct"] == "2/2"
    assert rows[0]["cells"][-6:] == ["-"] * 6


def test_columns_that_nobody_has_are_left_out():
    columns, rows = report.policy_table(ReportData("t", CLEAR))
    assert columns == ["Mean win rate", "Over SFT", "Nash weight"]
    assert {len(row["cells"]) for row in rows} == {3}


def test_texts_of_models_and_users_are_escaped():
    page = report.render(full_report())
    assert "<script" not in page and "onerror=alert(1)>" not in page
    # Title, heading, prompt, target, answer and configuration.
    assert page.count("&lt;script&gt;") == 6
    found = _Page(page)
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert found.text.count(ATTACK) == 6


def test_the_page_loads_nothing():
    page = _Page(report.render(full_report()))
    for tag, attrs in page.tags:
        assert tag not in {"link", "script", "iframe", "object", "a"}
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:")
    policy = {
        a.get("http-equiv"): a.get("content") for t, a in page.tags if t == "meta"
    }
    assert policy["Content-Security-Policy"].startswith("default-src 'none'")


def test_the_same_data_make_the_same_page():
    assert report.render(full_report()) == report.render(full_report())


def test_a_policy_that_is_not_in_the_tournament_is_refused():
    for wrong in ({"baseline": "SFTT"}, {"nash": ("SFTT",)}, {"rlhf": ("SFTT",)}):
        with pytest.raises(UserError, match="did you mean 'SFT'"):
            ReportData("t", CLEAR, **wrong)


def _png_size(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", header[16:24])


def test_files_are_written(tmp_path):
    path = tmp_path / "new" / "report.html"
    report.write_report(path, full_report())
    assert path.read_text() == report.render(full_report())
    width, height = _png_size(path.with_name("win_rates.png"))
    assert width > 1000 and height > 300


# Figures.


def _svg(figure):
    prefix = "data:image/svg+xml;base64,"
    uri = plots.svg_data_uri(figure)
    assert uri.startswith(prefix)
    return base64.b64decode(uri.removeprefix(prefix)).decode()


def test_colours_are_white_at_one_half_and_mirror_in_strength():
    assert plots.win_rate_colour(0.5) == "#ffffff"
    blue, orange = plots.win_rate_colour(0.9), plots.win_rate_colour(0.1)
    assert int(blue[5:], 16) > int(blue[1:3], 16)
    assert int(orange[1:3], 16) > int(orange[5:], 16)
    darkness = [
        sum(int(plots.win_rate_colour(0.5 + d)[i : i + 2], 16) for i in (1, 3, 5))
        for d in (0, 0.05, 0.1, 0.3, 0.5)
    ]
    assert darkness == sorted(darkness, reverse=True)


def test_text_is_readable_on_every_cell():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    # WCAG 2.1 asks for a contrast of 4.5.
    for rate in np.linspace(0, 1, 101):
        background = plots.win_rate_colour(float(rate))
        contrast = (luminance(background) + 0.05) / (luminance(plots.INK) + 0.05)
        assert contrast > 4.5, rate


def test_only_measured_panels_are_drawn():
    steps_K, values_K = np.arange(3), np.ones(3)
    drawn = plots.curve_figures(
        {"a": {"eval/kl": (steps_K, values_K)}, "b": {"time/seconds_per_step": ()}}
    )
    assert list(drawn) == ["KL to the reference"]
    assert plots.curve_figures({}) == {}


def test_panels_name_real_metrics():
    from nlhf_jax.metrics import METRICS

    for panel in plots.PANELS:
        assert {panel.train, panel.held_out} - {""} <= set(METRICS)


def test_policy_names_are_not_formulas():
    odd = rates({"$\\frac$": 0.0, "a_$b$": 0.1})
    assert "<svg" in _svg(plots.tournament_figure({"judge $x": odd}))
    figure = plots.trade_off_figure({"j": odd}, "a_$b$", {"$\\frac$": (1.0, math.nan)})
    assert "<svg" in _svg(figure)


# In a browser.


def _browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = [shutil.which(name) for name in names if shutil.which(name)]
    if not found:
        pytest.skip(f"no headless browser: none of {', '.join(names)} is installed")
    return found[0]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write_report(path, full_report())
    return path


def _browse(path, *flags):
    """Returns what a headless browser prints after it has read the page."""
    command = [
        *(_browser(), "--headless", "--disable-gpu", "--no-sandbox"),
        *("--disable-dev-shm-usage", f"--user-data-dir={path.parent / 'profile'}"),
        *flags,
        path.as_uri(),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.battery
def test_a_browser_shows_the_rows_and_runs_nothing(page_path):
    dom = _browse(page_path, "--dump-dom")
    page = _Page(dom)
    for name in POLICIES:
        assert f"answer of {name} & co" in page.text
    # Policies; two matrices; two examples of two rows; versions; headings.
    rows = (1 + 4) + 2 * (1 + 4) + (1 + 2 * 2) + 1
    assert sum(tag == "tr" for tag, _ in page.tags) == rows
    title = re.search("<title>(.*?)</title>", dom, re.S).group(1)
    assert title.startswith("A run &lt;script&gt;")


@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_draws_the_page(page_path, width):
    shot = page_path.with_name(f"{width}.png")
    _browse(
        page_path,
        f"--window-size={width},2400",
        f"--screenshot={shot}",
        "--hide-scrollbars",
    )
    assert _png_size(shot) == (width, 2400)
    # A blank page of this size compresses to a few kilobytes.
    assert shot.stat().st_size > 50_000
    pixels = image.imread(shot)[:, :, :3]
    # Nothing is wider than the screen: the outermost columns are the page's ground.
    assert (pixels[:, -1] == pixels[0, 0]).all()
