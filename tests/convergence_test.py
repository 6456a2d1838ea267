# SPDX-License-Identifier: Apache-2.0
"""Training by sampling ends where theory says, and the table that shows it."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from nlhf_jax import cli
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.checks import UserError
from nlhf_jax.evaluation import convergence, laboratory
from nlhf_jax.games import matrices, solutions
from nlhf_jax.types import POLICY, REFERENCE, Speaker
from tests.algorithms_test import (
    TABLE,
    bradley_terry,
    cycle,
    indifferent,
    nash_at_tau,
)
from tests.battery import all_but

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = laboratory.ConvergenceSettings()
RUNS = list(laboratory.algorithms(SETTINGS, {}))
KINDS = ("cyclic", "bradley_terry", "random")
FEW = laboratory.ConvergenceSettings(
    train_steps=4, batch_size=4, num_seeds=2, num_records=2
)
FEW_FLAGS = ["--train_steps=50", "--batch_size=4", "--num_seeds=2"]


@functools.cache
def the_laboratory():
    return laboratory.make_laboratory(SETTINGS)


def plain_mixture(first_N, second_N, weight):
    """p^(1-w) q^w, normalised; the library's own checks its arguments in every call."""
    mixed_N = first_N ** (1 - weight) * second_N**weight
    return mixed_N / mixed_N.sum(axis=-1, keepdims=True)


def token_mixture(policy, reference, beta):
    """The mixture of two tokens of three, one at a time, in plain numpy."""

    def factors(whole):
        joint = whole.reshape(3, 3)
        first = joint.sum(axis=1)
        return first, joint / first[:, None]

    (first, second), (first_mu, second_mu) = factors(policy), factors(reference)
    first = plain_mixture(first, first_mu, beta)
    return (first[:, None] * plain_mixture(second, second_mu, beta)).ravel()


def response_to_own_mixture(game, reference, tau, beta):
    """The policy that best-responds to its own token-level mixture: a slow iteration,
    each step a small part of the way to the best response."""
    policy = reference
    for _ in range(3000):
        wins = game @ token_mixture(policy, reference, beta)
        answer = reference * np.exp((wins - wins.max()) / tau)
        answer /= answer.sum()
        policy = plain_mixture(policy, answer, 0.05)
    np.testing.assert_allclose(policy, answer, rtol=0, atol=1e-12)
    return policy


def known_policy(name, kind):
    """The documented fixed point for responses of two tokens; None where none is."""
    base = name.removesuffix(laboratory.ANNEALED)
    row = next(row for row in TABLE if row.name == base)
    game, lab = the_laboratory().games[kind], the_laboratory()
    given = game.preference_NN, game.reward_N, lab.reference_N, SETTINGS.tau
    if row.game is bradley_terry:
        # The scores of the game; what scalar judges say of it is a quarter of that.
        scores = 4 * game.reward_N
        known = row.fixed_point(given[0], scores, lab.reference_N, SETTINGS.tau)
        return known if kind == "bradley_terry" and base != "xpo" else None
    if row.game is cycle or row.fixed_point is indifferent:
        return None
    if name != base:
        return nash_at_tau(*given)
    if "beta" in row.settings:
        # For one token only there is a closed form.
        return response_to_own_mixture(given[0], given[2], given[3], SETTINGS.beta)
    return row.fixed_point(*given)


@functools.cache
def outcomes(name):
    """Returns kind -> outcome of the algorithm at the settings of the command."""
    algorithm = laboratory.algorithms(SETTINGS, {})[name]
    found = convergence.measure_algorithm(the_laboratory(), name, algorithm, seed=0)
    return {outcome.game: outcome for outcome in found}


# Their average iterates approach an equilibrium; in a cycle their last ones leave it.
RESTLESS = ("sppo", "onpo")
# They pursue the equilibrium of the unregularised game, round by round.
IN_ROUNDS = ("mpo", "comal")
# Where one response beats all others by far their logits grow for ever more slowly.
LOGISTIC = ("online_dpo", "xpo")
# That of the main job; CI runs all others too.
SHORT = ("nash_md_pg",)
SETTLED = [n for n in RUNS if n not in (*RESTLESS, *IN_ROUNDS, *LOGISTIC)]


@pytest.mark.parametrize("name", all_but(SHORT, SETTLED))
def test_sampled_training_ends_at_the_documented_fixed_point(name):
    assert tuple(outcomes(name)) == KINDS
    for kind, outcome in outcomes(name).items():
        known = known_policy(name, kind)
        if known is None:
            known = outcome.fixed_point_N
        np.testing.assert_allclose(outcome.fixed_point_N, known, rtol=0, atol=1e-12)
        # Each probability, in the mean over eight runs, within four standard errors of
        # that mean; the rest is for what is left of the start after the last step.
        runs = outcome.policies_SN
        error = runs.std(axis=0, ddof=1) / math.sqrt(len(runs))
        off = np.abs(runs.mean(axis=0) - known)
        assert (off < 4 * error + 5e-4).all(), (kind, off, error)


@pytest.mark.parametrize("name", all_but(SHORT, SETTLED))
def test_the_final_gap_is_that_of_the_fixed_point(name):
    lab = the_laboratory()
    for kind, outcome in outcomes(name).items():
        game = lab.games[kind]
        theory = convergence.duality_gap(
            game.preference_NN, lab.reference_N, SETTINGS.tau, outcome.fixed_point_N
        )
        assert abs(outcome.theory - theory) < 1e-12, kind
        # Four standard errors of a run. Near its least value the gap is a square of
        # the errors, so that its mean lies about two of them above.
        assert abs(outcome.end - theory) < 4 * outcome.spread + 1e-6, kind
        assert outcome.start > 0.05
        np.testing.assert_allclose(outcome.gaps_SK[:, 0], outcome.start, atol=1e-5)
        assert outcome.gaps_SK.min() > -1e-6


@pytest.mark.battery
def test_online_dpo_nears_the_documented_end_of_rlhf():
    outcome = outcomes("online_dpo")["bradley_terry"]
    known = known_policy("online_dpo", "bradley_terry")
    np.testing.assert_allclose(outcome.fixed_point_N, known, rtol=0, atol=1e-12)
    # Two thousandths of the way are left after the last step.
    off, start = (
        np.abs(policy - known).sum()
        for policy in (outcome.policies_SN.mean(axis=0), the_laboratory().reference_N)
    )
    assert off < 0.01 * start


@pytest.mark.battery
def test_xpo_ends_where_its_gradient_vanishes():
    found = {k: o for k, o in outcomes("xpo").items() if not math.isnan(o.theory)}
    assert "cyclic" in found
    for outcome in found.values():
        assert abs(outcome.end - outcome.theory) < 4 * outcome.spread


@pytest.mark.battery
@pytest.mark.parametrize("name", IN_ROUNDS)
def test_a_moving_magnet_leads_towards_the_unregularised_equilibrium(name):
    tau, lab = SETTINGS.tau, the_laboratory()
    for kind, outcome in outcomes(name).items():
        game = lab.games[kind].preference_NN
        at_tau = solutions.regularised_nash(game, lab.reference_N, tau)
        tied = 2 * solutions.exploitability(game, at_tau)
        error = outcome.spread / math.sqrt(SETTINGS.num_seeds)
        assert outcome.end + 4 * error < 0.6 * outcome.start
        # In a cycle the rounds are slow; elsewhere it is closer by now than any policy
        # tied to the reference at this tau.
        assert kind == "cyclic" or outcome.end + 4 * error < tied


@pytest.mark.battery
@pytest.mark.parametrize("name", RESTLESS)
def test_the_average_of_unregularised_iterates_is_nearer_than_the_last(name):
    lab = the_laboratory()
    algorithm = laboratory.algorithms(SETTINGS, {})[name]
    policies_GSKN = convergence.train(lab, algorithm, jax.random.key(0))
    for kind, policies_SKN in zip(KINDS, policies_GSKN, strict=True):
        game = lab.games[kind].preference_NN
        gap = functools.partial(convergence.duality_gap, game, lab.reference_N, 0.0)
        if kind == "bradley_terry":
            # One response is best, and nothing goes in circles.
            assert outcomes(name)[kind].end < 2e-3
            continue
        lead_S = [gap(run[-1]) - gap(run.mean(axis=0)) for run in policies_SKN]
        # Three standard errors of the mean over runs.
        assert np.mean(lead_S) > 3 * np.std(lead_S, ddof=1) / math.sqrt(len(lead_S))


@pytest.mark.parametrize("name", ["self_play", "nash_md_pg" + laboratory.ANNEALED])
def test_self_play_and_an_annealed_mixture_find_the_equilibrium(name):
    for kind, outcome in outcomes(name).items():
        assert abs(outcome.theory) < 1e-12
        assert outcome.end < 2e-3, kind


@pytest.mark.parametrize(
    "name", all_but(["nash_md_pg"], ["nash_md_pg", "best_response", "reward_pg"])
)
def test_others_do_not_find_the_equilibrium_of_a_cycle(name):
    # Four standard errors of the difference of two means.
    cyclic = outcomes(name)["cyclic"]
    best = outcomes("self_play")["cyclic"]
    error = math.hypot(cyclic.spread, best.spread) / math.sqrt(SETTINGS.num_seeds)
    assert cyclic.end - best.end > 4 * error
    assert cyclic.theory > 4e-3


def against_an_average(*, tau: float, beta: float):
    """Self-play against a running average of the parameters, a set of its own."""

    def follow(sets, step, metrics):
        del step, metrics
        mixed = jax.tree.map(
            lambda old, new: beta * old + (1 - beta) * new,
            sets["average"],
            sets[POLICY],
        )
        return {**sets, "average": mixed}

    return dataclasses.replace(
        ALGORITHMS["self_play"](tau=tau),
        speakers=(Speaker({POLICY: 1.0}), Speaker({"average": 1.0})),
        derived_sets=("average",),
        update_sets=follow,
    )


def test_sets_that_follow_the_policy_are_the_policy_at_the_fixed_point():
    lab = laboratory.make_laboratory(FEW)
    algorithm = against_an_average(tau=0.1, beta=0.5)
    found = convergence.measure_algorithm(lab, "average", algorithm, seed=0)
    for outcome in found:
        game = lab.games[outcome.game]
        nash = solutions.regularised_nash(game.preference_NN, lab.reference_N, 0.1)
        np.testing.assert_allclose(outcome.fixed_point_N, nash, rtol=0, atol=1e-12)
        # It trains, too.
        assert np.isfinite(outcome.gaps_SK).all()
        assert (outcome.gaps_SK[:, -1] != outcome.gaps_SK[:, 0]).all()


@pytest.mark.parametrize("size", [3, 4, 9])
def test_games_are_what_their_names_say(size):
    found = laboratory.games(size)
    assert tuple(found) == KINDS
    for game in found.values():
        matrices.check_preference_matrix(game.preference_NN)
        assert (game.preference_NN > 0).all()
    cyclic = found["cyclic"]
    # No response is better than another on the whole, and each beats what follows it.
    np.testing.assert_allclose(cyclic.preference_NN.mean(axis=1), 0.5, atol=1e-12)
    np.testing.assert_allclose(cyclic.reward_N, 0.0, atol=1e-12)
    beats = (cyclic.preference_NN > 0.5).sum(axis=1)
    np.testing.assert_array_equal(beats, (size - 1) // 2)
    transitive = found["bradley_terry"]
    again = matrices.bradley_terry(4 * transitive.reward_N)
    np.testing.assert_allclose(again, transitive.preference_NN, rtol=0, atol=1e-12)


def test_the_duality_gap_is_what_both_players_can_gain():
    rng = np.random.default_rng(0)
    game, reference, tau = matrices.random_game(rng, 4), rng.dirichlet(np.ones(4)), 0.1
    policy = rng.dirichlet(np.ones(4))

    def value(first, second):
        ratio = [tau * solutions.kl(one, reference) for one in (first, second)]
        return first @ game @ second - ratio[0] + ratio[1]

    answer = solutions.best_response(game, reference, tau, policy)
    known = value(answer, policy) - value(policy, answer)
    found = convergence.duality_gap(game, reference, tau, policy)
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-12)
    others = rng.dirichlet(np.ones(4), size=200)
    assert max(value(one, policy) - value(policy, one) for one in others) <= known


def newcomer(*, tau: float, power: float):
    del power
    return ALGORITHMS["self_play"](tau=tau)


def two_only(monkeypatch, **more):
    """Leaves self-play and `more` in the registry."""
    for name in set(ALGORITHMS) - {"self_play"}:
        monkeypatch.delitem(ALGORITHMS, name)
    for name, factory in more.items():
        monkeypatch.setitem(ALGORITHMS, name, factory)


def test_every_registered_algorithm_is_run():
    assert {name.removesuffix(laboratory.ANNEALED) for name in RUNS} == set(ALGORITHMS)
    assert "nash_md_pg" + laboratory.ANNEALED in RUNS
    assert "self_play" + laboratory.ANNEALED not in RUNS


def test_a_new_algorithm_needs_no_change_of_the_command(monkeypatch):
    two_only(monkeypatch, newcomer=newcomer)
    with pytest.raises(UserError, match=r"newcomer needs a value of power: --extra="):
        laboratory.algorithms(FEW, {})
    # Where it ends in theory is the other tests' business.
    monkeypatch.setattr(
        convergence.exact,
        "fixed_points",
        lambda *_, **__: [(np.full(9, 1 / 9), 0.0)] * 3,
    )
    found = convergence.measure(FEW, {"newcomer": {"power": 0.9}})
    assert [o.algorithm for o in found] == ["self_play"] * 3 + ["newcomer"] * 3
    # The same loss on the same samples.
    np.testing.assert_array_equal(found[0].gaps_SK, found[3].gaps_SK)
    with pytest.raises(UserError, match="did you mean 'newcomer'"):
        laboratory.algorithms(FEW, {"newcomers": {}})


def figures(cell):
    """Returns (end, standard error, theory) of a cell of the table."""
    found = re.fullmatch(r"([\d.]+) ± ([\d.]+) \(([\d.]+|\?)\)", cell)
    return tuple(float(text.replace("?", "nan")) for text in found.groups())


@pytest.mark.battery
def test_the_readme_shows_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    printed = text[text.index("| algorithm | cyclic") :].partition("\n\n")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines()]
    assert head == ["algorithm", *KINDS]
    starts = {}
    for name in ("self_play", "sppo"):
        (label, *cells), *rows = rows
        starts[label] = [float(cell) for cell in cells]
        known = [outcomes(name)[kind].start for kind in KINDS]
        np.testing.assert_allclose(starts[label], known, rtol=0, atol=6e-6)
    assert list(starts) == ["the reference", "the reference, no regularisation"]
    assert [row[0] for row in rows] == RUNS
    for name, *cells in rows:
        for kind, cell in zip(KINDS, cells, strict=True):
            outcome, (end, _, theory) = outcomes(name)[kind], figures(cell)
            # Five decimals are printed; other machines add in another order.
            np.testing.assert_allclose(theory, outcome.theory, rtol=0, atol=6e-6)
            assert abs(end - outcome.end) < 2 * outcome.spread + 6e-6


def test_beta_falls_to_zero_half_way():
    algorithm = laboratory.algorithms(SETTINGS, {})["nash_md_pg" + laboratory.ANNEALED]
    opponent = algorithm.speakers[1].weights
    for step, beta in ((0, 0.25), (375, 0.125), (750, 0.0), (1500, 0.0)):
        assert float(opponent[REFERENCE](step)) == beta
        assert float(opponent[POLICY](step)) == 1 - beta


def test_the_command_prints_a_line_for_each_algorithm(monkeypatch, capsys):
    two_only(monkeypatch)
    assert cli.main(["convergence", *FEW_FLAGS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| algorithm | cyclic | bradley_terry | random |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| the reference",
        "| self_play",
    ]
    assert "| 0.05679 |" in lines[2]
    assert lines[3].count("(0)") == 3


def test_the_command_prints_everything_as_json(monkeypatch, capsys):
    two_only(monkeypatch)
    assert cli.main(["convergence", *FEW_FLAGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["game"] for row in found] == list(KINDS)
    for row in found:
        assert row["algorithm"] == "self_play" and row["num_seeds"] == 2
        assert np.shape(row["gaps"]) == (2, 51)
        assert row["steps"] == list(range(51))
        assert row["end"] == pytest.approx(np.mean([run[-1] for run in row["gaps"]]))
        assert abs(sum(row["fixed_point"]) - 1) < 1e-12
        assert abs(row["theory"]) < 1e-12


@pytest.mark.parametrize(
    "flag, complaint",
    [
        ("--tau=0.0", "tau must be in (0.0, inf), got 0.0"),
        ("--beta=1.5", "beta must be in [0.0, 1.0], got 1.5"),
        ("--num_seeds=1", "num_seeds must be an integer of at least 2, got 1"),
        ("--num_records=49", "num_records must divide train_steps 1500, got 49"),
        ("--vocab_size=99", "vocab_size ** length must be at most 64, got 99 ** 2"),
        ("--seed=2147483648", "seed must be in [0, 2147483647]"),
        ("--seed=99999999999999999999", "seed must be an integer below 2**63"),
        (
            "--extra={'self_play': {'nosuch': 1.0}}",
            "parameter of self_play must be one",
        ),
        ("--extra={'self_plya': {}}", "did you mean 'self_play'"),
    ],
)
def test_mistakes_are_one_sentence(flag, complaint, capsys):
    assert cli.main(["convergence", flag]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_a_point_that_was_not_found_is_no_figure():
    outcome = outcomes("self_play")["cyclic"]
    lost = [dataclasses.replace(outcome, theory=math.nan)]
    assert convergence.table(lost).endswith("(?) |")
    assert json.loads(json.dumps(convergence.records(lost)))[0]["theory"] is None


def test_the_same_seed_gives_the_same_runs():
    lab = laboratory.make_laboratory(FEW)
    algorithm = ALGORITHMS["self_play"](tau=0.1)
    first, again, other = (
        convergence.train(lab, algorithm, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other)[:, :, 1:].max() > 1e-3
    # Games, seeds, records and the start, responses; every run on its own samples.
    assert first.shape == (3, 2, 3, 9)
    assert np.abs(first[:, 0, -1] - first[:, 1, -1]).max() > 1e-3
