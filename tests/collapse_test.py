# SPDX-License-Identifier: Apache-2.0
"""Shares of equal responses and of ties, against plain Python; and the alarms."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import alarms, collapse, metric_table, metrics
from nlhf_jax.alarms import AlarmSettings
from nlhf_jax.checks import UserError
from nlhf_jax.types import Feedback, Responses, Samples

LENGTH = 3


def _samples(*rows):
    """One speaker's responses, each given as a text of digits; 0 is a token too."""
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    mask = np.zeros((len(rows), LENGTH), bool)
    for row, text in enumerate(rows):
        tokens[row, : len(text)] = [int(digit) for digit in text]
        mask[row, : len(text)] = True
    responses = Responses(jnp.asarray(tokens), jnp.asarray(mask))
    return Samples(responses, {}, jnp.zeros((len(rows), LENGTH)))


def _shares(*speakers, preferences=()):
    feedback = Feedback(tuple(map(jnp.asarray, preferences)), ())
    found = collapse.shares([_samples(*rows) for rows in speakers], feedback)
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(
    "rows, expected",
    [
        (("12", "12", "12"), 0.0),
        (("12", "21", "1"), 1.0),
        (("1", "10", "100"), 1.0),  # a token 0 is not padding
        (("12", "3", "12"), 0.5),
        (("1", "1", "2", "2", "1"), 0.25),
    ],
)
def test_distinct_responses_of_a_batch(rows, expected):
    assert _shares(rows) == {"response/distinct_share": pytest.approx(expected)}


def test_all_responses_of_a_length_have_fingerprints_of_their_own():
    rows = [f"{number:03d}" for number in range(1000)]
    assert _shares(rows)["response/distinct_share"] == 1.0
    assert _shares([*rows, "500"])["response/distinct_share"] == pytest.approx(
        999 / 1000
    )


def test_what_stands_behind_the_end_of_a_response_is_inert():
    sample = _samples("12", "12")
    tokens_BT = sample.responses.tokens_BT.at[1, 2].set(7)
    responses = sample.responses._replace(tokens_BT=tokens_BT)
    found = collapse.shares([sample._replace(responses=responses)], Feedback((), ()))
    assert float(found["response/distinct_share"]) == 0.0


def test_identical_responses_of_a_prompt():
    found = _shares(("1", "2", "3", "4"), ("1", "2", "4", "3"))
    assert found["response/identical_share"] == 0.5
    # Of three speakers all must agree.
    found = _shares(("1", "2"), ("1", "2"), ("1", "3"))
    assert found["response/identical_share"] == 0.5


def test_ties_of_the_judge():
    found = _shares(("1", "2"), preferences=([0.5, 0.504], [0.494, 0.9]))
    assert found["preference/undecided_share"] == 0.5
    found = _shares(("1", "2"), preferences=([np.nan, 0.5],))
    assert found["preference/undecided_share"] == 0.5


def test_one_row_says_nothing_of_a_batch():
    assert _shares(("1",)) == {}


# ------------------------------------------------------------------------- alarms

GOOD = {
    "policy/entropy": 6.0,
    "policy/kl": 2.0,
    "response/length": 10.0,
    "response/distinct_share": 0.9,
    "response/identical_share": 0.1,
    "preference/undecided_share": 0.2,
}
BAD = {
    "alarm/entropy": {"policy/entropy": 0.1},
    "alarm/kl": {"policy/kl": 21.0},
    "alarm/same_response": {"response/distinct_share": 0.0},
    "alarm/undecided_judge": {"preference/undecided_share": 1.0},
}


def _read(found, lines):
    """Returns what each line gives for the alarm that is on, and all sentences."""
    values, said = [], []
    for line in lines:
        on, sentences = found.read(line)
        values.append([name for name, value in on.items() if value])
        said += sentences
    return values, said


@pytest.mark.parametrize("kind", BAD)
def test_an_alarm_starts_once_and_again_after_it_has_recovered(kind):
    bad = GOOD | BAD[kind]
    lines = [GOOD, bad, bad, bad, bad, GOOD, bad, bad, bad]
    values, said = _read(alarms.Alarms(AlarmSettings()), lines)
    assert values == [[], [], [], [kind], [kind], [], [], [], [kind]]
    assert len(said) == 2
    (figure,) = BAD[kind]
    assert said[0].startswith("warning: ") and figure in said[0]


def test_alarms_are_in_the_table_of_metrics():
    found, _ = alarms.Alarms(AlarmSettings()).read(GOOD)
    assert found == dict.fromkeys(BAD, 0.0)
    metric_table.check_names(found)


def test_a_continued_run_is_in_the_same_alarm_and_says_nothing_twice():
    lines = [GOOD | BAD["alarm/kl"]] * 5
    whole, _ = _read(alarms.Alarms(AlarmSettings()), lines)
    for cut in range(6):
        rest, said = _read(alarms.Alarms(AlarmSettings(), lines[:cut]), lines[cut:])
        assert rest == whole[cut:]
        assert len(said) == (1 if cut < 3 else 0)


def test_what_is_not_finite_or_not_there_passes_no_bound():
    found, _ = alarms.Alarms(AlarmSettings(patience=1)).read({"eval/kl": 99.0})
    assert found == {}
    once = AlarmSettings(patience=1)
    live, _ = alarms.Alarms(once).read(GOOD | {"policy/kl": np.nan})
    kept, _ = alarms.Alarms(once).read(GOOD | {"policy/kl": None})
    assert live == kept and live["alarm/kl"] == 0.0


@pytest.mark.parametrize(
    "kind, off",
    [
        ("alarm/entropy", {"min_entropy_per_token": 0.0}),
        ("alarm/kl", {"max_kl_per_token": 0.0}),
        (
            "alarm/same_response",
            {"min_distinct_share": 0.0, "max_identical_share": 1.0},
        ),
        ("alarm/undecided_judge", {"max_undecided_share": 1.0}),
    ],
)
def test_each_alarm_can_be_turned_off(kind, off):
    found, said = alarms.Alarms(AlarmSettings(patience=1, **off)).read(GOOD | BAD[kind])
    assert kind not in found and not said


def test_entropy_and_kl_are_per_token():
    once = AlarmSettings(patience=1)
    line = GOOD | {"policy/kl": 21.0, "response/length": 11.0}
    assert alarms.Alarms(once).read(line)[0]["alarm/kl"] == 0.0
    _, (said,) = alarms.Alarms(once).read(line | {"response/length": 10.0})
    assert said == (
        "warning: the policy's KL to the reference has exploded: policy/kl 2.1 a token "
        "is above max_kl_per_token 2"
    )


def test_both_kinds_of_equal_responses_are_one_alarm():
    bad = GOOD | {"response/distinct_share": 0.0, "response/identical_share": 1.0}
    found, (said,) = alarms.Alarms(AlarmSettings(patience=1)).read(bad)
    assert found["alarm/same_response"] == 1.0
    assert "min_distinct_share" in said and "max_identical_share" in said


@pytest.mark.parametrize(
    "given",
    [
        {"min_entropy_per_token": -0.1},
        {"max_kl_per_token": float("inf")},
        {"min_distinct_share": 1.1},
        {"max_identical_share": -0.1},
        {"max_undecided_share": 2.0},
        {"patience": 0},
    ],
)
def test_settings_check_themselves(given):
    with pytest.raises(UserError, match=next(iter(given))):
        AlarmSettings(**given)


def test_the_writer_adds_alarms_to_lines_and_says_them(tmp_path):
    said, bad = [], GOOD | BAD["alarm/entropy"]
    writer = metrics.MetricWriter(tmp_path, tensorboard=False)
    watched = alarms.WatchedWriter(writer, AlarmSettings(patience=2), [], said.append)
    for step in (5, 10, 15):
        watched.write(step, bad)
    watched.write(15, {"eval/kl": 1.0})
    watched.sync()
    watched.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line).get("alarm/entropy") for line in lines]
    assert values == [0.0, 1.0, 1.0, None]
    assert len(said) == 1 and said[0].endswith("(step 10)")


def test_without_settings_there_are_no_alarms(tmp_path):
    writer = metrics.MetricWriter(tmp_path, tensorboard=False)
    watched = alarms.WatchedWriter(writer, None, [], pytest.fail)
    watched.write(1, GOOD | BAD["alarm/kl"])
    watched.close()
    assert "alarm" not in (tmp_path / "metrics.jsonl").read_text()
