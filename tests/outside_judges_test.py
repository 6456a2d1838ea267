# SPDX-License-Identifier: Apache-2.0
"""A judge on the host: what it is asked, when, and that the order changes no number."""

import dataclasses
import functools
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import outside_step, partitioning, speed, train_step
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import UserError
from nlhf_jax.data.batches import SupervisedData
from nlhf_jax.jobs import outside_steps, rehearsal
from nlhf_jax.jobs.outside_steps import Halves, OutsideStep, Reader
from nlhf_jax.metric_table import METRICS, OF_THE_PROCESS
from nlhf_jax.preferences.outside import OutsideJudge
from nlhf_jax.settings import LoopSettings, MeshSettings
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    PromptBatch,
    Responses,
    Samples,
    SupervisedBatch,
)
from tests import supervised_toys as toys

pytestmark = pytest.mark.usefixtures("compiled_quickly")
BATCH, LENGTH = 8, 4
ALGORITHM = ALGORITHMS["nash_md_pg"](tau=0.1, beta=0.25)


def longer(prompts, firsts, seconds):
    """Prefers what has more characters; a tie is one half."""
    del prompts
    leads = [len(a) - len(b) for a, b in zip(firsts, seconds, strict=True)]
    return [0.5 + 0.5 * np.sign(lead) for lead in leads]


# -------------------------------------------------------------- what the user writes


def test_it_gives_what_the_function_says():
    judge = OutsideJudge(longer)
    found = judge.preferences(["x"] * 3, ["aa", "a", "b"], ["a", "aa", "c"])
    assert found.dtype == np.float32
    assert found.tolist() == [1.0, 0.0, 0.5]


def test_in_both_orders_who_favours_a_place_favours_nobody():
    def first_wins(prompts, firsts, seconds):
        return [0.9 if a != "z" else 0.2 for a in firsts]

    judge = OutsideJudge(first_wins, both_orders=True)
    found = judge.preferences(["x"] * 2, ["a", "z"], ["b", "b"])
    np.testing.assert_allclose(found, [0.5, 0.15], rtol=1e-6)
    back = judge.preferences(["x"] * 2, ["b", "b"], ["a", "z"])
    np.testing.assert_allclose(found + back, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ([0.5, 1.5], "got 1.5 for pair 2"),
        ([-0.1, 0.5], "got -0.1 for pair 1"),
        ([0.5, np.nan], "got nan for pair 2"),
        ([0.5], r"got shape \[1\]"),
        (0.5, r"got shape \[\]"),
        ([[0.5], [0.5]], r"got shape \[2, 1\]"),
        (["yes", "no"], r"got \['yes', 'no'\]"),
        (None, "got shape|got None|got nan"),
    ],
)
def test_what_is_no_preference_is_one_sentence(given, got):
    judge = OutsideJudge(lambda prompts, firsts, seconds: given)
    with pytest.raises(UserError, match=got) as caught:
        judge.preferences(["x", "y"], ["a", "b"], ["c", "d"])
    assert "must give 2 numbers in [0, 1], one for each pair" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_check_themselves():
    with pytest.raises(UserError, match=r"num_parts of OutsideJudge .*got 0"):
        OutsideJudge(longer, num_parts=0)
    judge = object.__new__(OutsideJudge)  # past the tests' own check of types
    object.__setattr__(judge, "function", "longer")
    with pytest.raises(UserError, match=r"must be a function of .*got 'longer'"):
        judge.__post_init__()


def test_a_batch_that_cannot_be_cut_is_refused():
    settings = LoopSettings(train_steps=1, batch_size=BATCH)
    sentence = "num_parts of OutsideJudge must divide batch_size 8, got 3"
    with pytest.raises(UserError, match=sentence):
        outside_steps.check(OutsideJudge(longer, 3), settings, MeshSettings())
    for judge in (None, OutsideJudge(longer, 8)):
        outside_steps.check(judge, settings, MeshSettings())


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(outside_steps.distributed, "num_processes", lambda: 2)
    settings = LoopSettings(train_steps=1, batch_size=BATCH)
    with pytest.raises(UserError, match="asked by one process, got 2 processes"):
        outside_steps.check(OutsideJudge(longer), settings, MeshSettings())


# ---------------------------------------------------------------- from tokens to texts


class Letters:
    """A vocabulary: id 1 ends, id k is the k-th letter."""

    eos_id = 1

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


def responses(*texts):
    tokens = np.zeros((len(texts), LENGTH), np.int32)
    mask = np.zeros((len(texts), LENGTH), bool)
    for row, text in enumerate(texts):
        ids = [ord(c) - ord("a") for c in text][:LENGTH]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return Responses(tokens, mask)


def test_all_comparisons_of_a_part_are_one_call():
    calls = []

    def function(*texts):
        calls.append(texts)
        return longer(*texts)

    reader = Reader(OutsideJudge(function), Letters(), ["zero", "one", "two"])
    said = (responses("ccb", "dd"), responses("cb", "dddd"), responses("c", "d"))
    found = reader.answers(np.array([2, 0]), said, ((0, 1), (2, 0)))
    # The end token, b, is no text.
    assert calls == [
        (
            ["two", "zero", "two", "zero"],
            ["cc", "dd", "c", "d"],
            ["c", "dddd", "cc", "dd"],
        )
    ]
    assert [one.tolist() for one in found] == [[1.0, 0.0], [0.0, 0.0]]


def test_held_out_prompts_are_the_first_of_the_data():
    calls = []

    def function(prompts, firsts, seconds):
        calls.append(prompts)
        return longer(prompts, firsts, seconds)

    reader = Reader(OutsideJudge(function), Letters(), ["zero", "one", "two"])
    assert reader.compares
    prompts = PromptBatch(np.ones((2, 1), np.int32), np.ones((2, 1), bool))
    found = reader.preferences(prompts, responses("cc", "c"), responses("c", "cc"))
    assert found.tolist() == [1.0, 0.0]
    assert calls == [["zero", "one"]]


# ------------------------------------------------------------------------- the step


def prompts_of(step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(2, toys.VOCAB, size=(BATCH, toys.SOURCE)).astype(np.int32)
    rows = rng.permutation(BATCH).astype(np.int32)
    prompts = PromptBatch(tokens, np.ones_like(tokens, bool))
    return outside_step.JudgedPrompts(prompts, rows)


MODEL, OPTIMIZER, PARTS = toys.toy_language_model(), optax.sgd(0.5), 4
TEXTS = [f"prompt {row}" for row in range(BATCH)]


def first_state():
    """Returns a state, frozen sets that are the same policy, and where they lie."""
    params = MODEL.init(jax.random.key(0))
    frozen = {REFERENCE: jax.tree.map(jnp.copy, params)}
    state = train_step.init_state(params, ALGORITHM, OPTIMIZER)
    axes = MODEL.logical_axes
    mesh = partitioning.make_mesh(MeshSettings())
    lie = partitioning.step_shardings(
        mesh, state, params, axes, frozen, {REFERENCE: axes}
    )
    placed = jax.device_put(state, lie.state), jax.device_put(frozen, lie.frozen)
    return *placed, mesh, lie


def halves(judge):
    draw = functools.partial(
        outside_step.draw,
        MODEL,
        ALGORITHM,
        num_parts=judge.num_parts,
        max_length=LENGTH,
    )
    learn = functools.partial(outside_step.learn, MODEL, ALGORITHM, OPTIMIZER)
    return Halves(draw, learn, ALGORITHM.comparisons, Reader(judge, Letters(), TEXTS))


@functools.cache
def shared_step():
    """Returns a step of PARTS parts, which is compiled once for many judges."""
    _, _, mesh, lie = first_state()
    return OutsideStep(halves(OutsideJudge(longer, PARTS)), mesh, lie)


def made(function=longer, **settings):
    """Returns the shared step asking this judge, its first state, and frozen sets."""
    step, (state, frozen, _, _) = shared_step(), first_state()
    reader = Reader(OutsideJudge(function, PARTS, **settings), Letters(), TEXTS)
    step._halves = dataclasses.replace(step._halves, reader=reader)
    return step, state, frozen


def trained(step, state, frozen, num_steps=3):
    history = []
    for number in range(num_steps):
        state, metrics = step(state, frozen, prompts_of(number), jax.random.key(7))
        history.append({k: np.asarray(v) for k, v in metrics.items()})
    return state, history


@pytest.fixture(scope="module")
def both_ways():
    """Returns what overlapping gave, and what taking turns gave."""
    return [trained(*made(overlaps=one)) for one in (True, False)]


def test_overlapping_changes_no_bit(both_ways):
    (state, history), (other, other_history) = both_ways
    jax.tree.map(np.testing.assert_array_equal, state, other)
    for ours, theirs in zip(history, other_history, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - OF_THE_PROCESS:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert int(state.step) == 3


def test_it_says_how_long_the_judge_took(both_ways):
    for _, history in both_ways:
        for metrics in history:
            assert 0 <= metrics[outside_steps.WAITED] <= metrics[outside_steps.JUDGING]
    assert {outside_steps.JUDGING, outside_steps.WAITED} <= OF_THE_PROCESS & set(
        METRICS
    )
    # Whoever takes turns waits for all of it.
    _, (_, history) = both_ways
    for metrics in history:
        assert metrics[outside_steps.WAITED] == metrics[outside_steps.JUDGING]


@pytest.mark.parametrize(
    ("overlaps", "expected"),
    [
        (True, "draw 0, draw 1, read, draw 2, read, draw 3, read, read, learn"),
        (False, "draw 0, read, draw 1, read, draw 2, read, draw 3, read, learn"),
    ],
)
def test_one_part_is_drawn_while_another_is_read(monkeypatch, overlaps, expected):
    """By the order of calls: a draw that is dispatched runs while the host goes on."""
    events = []

    def read(prompts, firsts, seconds):
        events.append("read")
        return longer(prompts, firsts, seconds)

    def draw(state, frozen, prompts, key, part):
        events.append(f"draw {int(part)}")
        said = responses(*["cc"] * (BATCH // PARTS))
        one = Samples(said, {}, np.zeros((BATCH // PARTS, LENGTH)))
        return (one, one), np.int32(1)

    def learn(state, *rest):
        events.append("learn")
        return state, {}

    step, state, frozen = made(read, overlaps=overlaps)
    monkeypatch.setattr(step, "_draw", draw)
    monkeypatch.setattr(step, "_learn", learn)
    step(state, frozen, prompts_of(0), jax.random.key(0))
    assert ", ".join(events) == expected


def test_each_response_is_judged_with_its_own_prompt():
    asked = []

    def function(prompts, firsts, seconds):
        asked.extend(prompts)
        return longer(prompts, firsts, seconds)

    step, state, frozen = made(function)
    batch = prompts_of(3)
    step(state, frozen, batch, jax.random.key(0))
    rows = [row for part in range(PARTS) for row in batch.rows_B[part::PARTS]]
    assert asked == [f"prompt {row}" for row in rows]


def test_the_judge_decides_what_is_learned():
    """At the reference nothing but the judge moves the policy, both ways alike."""
    start = np.asarray(first_state()[0].param_sets[POLICY]["out"])
    moved = {}
    for wins in (1.0, 0.0):
        judge = functools.partial(lambda wins, texts, *_: [wins] * len(texts), wins)
        state, (metrics,) = trained(*made(judge), 1)
        assert metrics["preference/mean"] == wins
        moved[wins] = np.asarray(state.param_sets[POLICY]["out"]) - start
    assert np.abs(moved[1.0]).max() > 1e-4
    np.testing.assert_allclose(moved[1.0], -moved[0.0], rtol=0, atol=1e-6)


def test_each_half_is_compiled_once_and_ahead():
    state, frozen, mesh, lie = first_state()
    step = OutsideStep(halves(OutsideJudge(longer)), mesh, lie)
    compiled = step.compile_ahead(state, frozen, prompts_of(0), jax.random.key(7))
    assert compiled.seconds > 0 and len(compiled.others) == 1
    cost = speed.step_cost(compiled)
    alone = speed.flops_of(compiled.executable)
    drawn = speed.flops_of(compiled.others[0][0])
    assert cost.flops.once == alone.once + 2 * drawn.once
    assert cost.flops.per_iteration == alone.per_iteration + 2 * drawn.per_iteration
    trained(step, state, frozen)
    assert step.num_compilations == 1


def test_a_batch_is_as_wide_as_its_bucket():
    lengths = np.array([1, 2, 5, 8, 3, 2])
    mask = np.arange(8) < lengths[:, None]
    tokens = np.where(mask, np.arange(6)[:, None] + 3, 0).astype(np.int32)
    prompts = PromptBatch(tokens, mask)
    answers = Responses(np.ones((6, 2), np.int32), np.ones((6, 2), bool))
    texts = [str(length) for length in lengths]
    data = SupervisedData(
        SupervisedBatch(prompts, answers), texts, texts, 0, 0, length_buckets=(2, 4)
    )
    rows, widths = np.arange(2), set()
    for step in range(12):
        found = outside_steps.batch(data, 0, 2, step, rows)
        width = found.prompts.tokens_BS.shape[1]
        longest = lengths[found.rows_B].max()
        assert width == next(one for one in (2, 4, 8) if longest <= one)
        np.testing.assert_array_equal(
            found.prompts.tokens_BS, tokens[found.rows_B, :width]
        )
        widths.add(width)
    assert len(widths) > 1


def test_rows_of_other_data_are_one_sentence():
    reader = Reader(OutsideJudge(longer), None, ["a", "b"])
    with pytest.raises(UserError, match="names row 7 of the data, which have 2 rows"):
        reader.answers(np.array([0, 7]), (), ())


def test_parts_that_do_not_divide_are_named_without_devices(monkeypatch):
    monkeypatch.setattr(partitioning, "make_mesh", None)
    loop = LoopSettings(train_steps=4, batch_size=8)
    judge = OutsideJudge(longer, num_parts=3)
    with pytest.raises(UserError, match="num_parts of OutsideJudge must divide"):
        rehearsal.check("any", {"loop": loop, "outside_judge": judge})
    outside_steps.check_parts(None, loop)
    with pytest.raises(UserError, match=r"num_parts of OutsideJudge=2\), got 8"):
        rehearsal.check_batch(
            loop, MeshSettings(data=8), OutsideJudge(longer, num_parts=2)
        )


def test_who_watches_devices_cannot_hold_the_process():
    held = threading.Event()
    seen = []

    class Slow:
        def block_until_ready(self):
            seen.append(threading.current_thread())
            held.wait(60)

    found = outside_steps._time_of(Slow())
    assert not found.done()
    held.set()
    assert found.result(timeout=60) > 0
    (thread,) = seen
    assert thread.daemon


def test_an_exception_of_the_function_passes_through():
    def broken(prompts, firsts, seconds):
        raise ConnectionError("the service is gone")

    step, state, frozen = made(broken)
    with pytest.raises(ConnectionError, match="the service is gone"):
        trained(step, state, frozen, 1)


def test_the_function_is_called_by_the_threads_of_the_step_alone():
    seen = set()

    def function(prompts, firsts, seconds):
        seen.add(threading.current_thread())
        return longer(prompts, firsts, seconds)

    trained(*made(function), 1)
    assert seen == {threading.main_thread()}


# ----------------------------------------------------------------- hidden and waited


def at(*times):
    found = [Future() for _ in times]
    for one, time in zip(found, times, strict=True):
        one.set_result(time)
    return found


@pytest.mark.parametrize(
    ("ahead", "judged_at", "done_at", "took", "waited"),
    [
        # Part 1 is decoded until 14 while part 0 is read from 10 to 13: all hidden.
        (1, [(10.0, 13.0), (14.0, 16.0)], (9.0, 14.0), 5.0, 2.0),
        # Until 11: two of the three seconds are waited for.
        (1, [(10.0, 13.0), (13.0, 15.0)], (9.0, 11.0), 5.0, 4.0),
        # It was done before the judge began.
        (1, [(10.0, 13.0), (13.0, 15.0)], (9.0, 9.5), 5.0, 5.0),
        # Nothing runs meanwhile.
        (0, [(10.0, 13.0), (14.0, 16.0)], (9.0, 14.0), 5.0, 5.0),
        (1, [(10.0, 13.0)], (9.0,), 3.0, 3.0),
    ],
)
def test_hidden_and_waited_by_hand(ahead, judged_at, done_at, took, waited):
    found = outside_steps.judging(judged_at, at(*done_at), ahead)
    assert found == {outside_steps.JUDGING: took, outside_steps.WAITED: waited}


def test_the_summary_says_what_the_judge_cost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    clock = speed.Clock()
    now[0] = 20.0
    clock.step_done({outside_steps.JUDGING: 10.0, outside_steps.WAITED: 2.0})
    assert clock.summary() == (
        "1 steps in 0:20, 0.05 steps/s, judge 50% of the time and waited for 10%"
    )


def test_a_batch_says_whose_prompts_it_has():
    tokens = np.arange(6, dtype=np.int32)[:, None]
    mask = np.ones_like(tokens, bool)
    examples = SupervisedBatch(PromptBatch(tokens, mask), Responses(tokens, mask))
    data = SupervisedData(examples, ["x"] * 6, ["y"] * 6, 0, 0)
    whole = outside_steps.batch(data, 3, 4, 1, np.arange(4))
    part = outside_steps.batch(data, 3, 4, 1, np.arange(2, 4))
    np.testing.assert_array_equal(whole.prompts.tokens_BS[:, 0], whole.rows_B)
    np.testing.assert_array_equal(part.rows_B, whole.rows_B[2:])
    assert jnp.asarray(whole.rows_B).dtype == jnp.int32
