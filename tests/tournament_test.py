# SPDX-License-Identifier: Apache-2.0
"""Win rates on judges with known answers, and the coverage of their intervals."""

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.evaluation import tournament


def _longer(firsts, seconds):
    """P = 1 for the longer text, 1/2 for equal lengths."""
    lengths = [np.array([len(text) for text in texts]) for texts in (firsts, seconds)]
    return 0.5 + 0.5 * np.sign(lengths[0] - lengths[1])


TEXTS = {
    "short": [["a", "a", "aaa", "a"]],
    "middle": [["aa", "aa", "aa", "a"]],
    "long": [["aaa", "aaa", "aaaa", "aaa"]],
}


def test_every_pair_on_every_prompt():
    rates = tournament.win_rates(TEXTS, _longer)
    assert rates.names == ("short", "middle", "long") and rates.num_prompts == 4
    np.testing.assert_array_equal(rates.per_prompt_NNB[0, 1], [0, 0, 1, 0.5])
    expected = [[0.5, 1.5 / 4, 0], [2.5 / 4, 0.5, 0], [1, 1, 0.5]]
    np.testing.assert_array_equal(rates.mean_NN, expected)


def test_mirror_images_sum_to_one_exactly():
    rng = np.random.default_rng(0)

    def judge(first, second):
        # Means of such values and of their complements rarely sum to one by themselves.
        return rng.uniform(size=37)

    rates = tournament.win_rates({name: [[name]] for name in "abcdefgh"}, judge)
    ones = np.ones((8, 8))
    np.testing.assert_array_equal(rates.mean_NN + rates.mean_NN.T, ones)
    np.testing.assert_array_equal(rates.low_NN + rates.high_NN.T, ones)
    np.testing.assert_array_equal(
        rates.per_prompt_NNB + rates.per_prompt_NNB.swapaxes(0, 1),
        np.ones((8, 8, 37)),
    )
    np.testing.assert_array_equal(np.diag(rates.mean_NN), 0.5)
    assert (rates.low_NN <= rates.mean_NN).all()
    assert (rates.mean_NN <= rates.high_NN).all()


def test_each_unordered_pair_is_judged_once():
    asked = []

    def judge(first, second):
        asked.append((first[0], second[0]))
        return np.full(1, 0.5)

    tournament.win_rates({name: [[name]] for name in "abc"}, judge)
    assert asked == [("a", "b"), ("a", "c"), ("b", "c")]


def test_every_draw_meets_every_draw():
    samples = {"one": [["a"], ["aaa"]], "two": [["aa"], ["aa"], ["aaaa"]]}
    rates = tournament.win_rates(samples, _longer)
    # "a" loses three times; "aaa" wins twice and loses once.
    assert rates.interval("one", "two").mean == pytest.approx(2 / 6, abs=1e-15)


def test_swapping_the_policies_mirrors_everything():
    forward = tournament.win_rates(TEXTS, _longer)
    backward = tournament.win_rates(dict(reversed(TEXTS.items())), _longer)
    for name in TEXTS:
        for other in TEXTS:
            np.testing.assert_allclose(
                forward.interval(name, other),
                backward.interval(name, other),
                atol=1e-12,
            )


def test_intervals_are_seeded():
    rng = np.random.default_rng(0)
    values_EB = rng.uniform(size=(3, 50))

    def interval(seed):
        return tournament.bootstrap_interval(
            values_EB,
            num_resamples=100,
            confidence=0.9,
            rng=np.random.default_rng(seed),
        )

    np.testing.assert_array_equal(interval(0), interval(0))
    assert (np.asarray(interval(0)) != np.asarray(interval(1))).any()


def test_the_same_prompts_are_drawn_for_all_pairs():
    values_B = np.random.default_rng(0).uniform(size=40)
    low_E, high_E = tournament.bootstrap_interval(
        np.stack([values_B, 1 - values_B, values_B / 2]),
        num_resamples=99,
        confidence=0.9,
        rng=np.random.default_rng(1),
    )
    np.testing.assert_allclose(low_E[1], 1 - high_E[0], atol=1e-12)
    np.testing.assert_allclose(high_E[2], high_E[0] / 2, atol=1e-12)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(2)
    num_trials, num_prompts, truth = 400, 200, 0.55
    values_EB = rng.binomial(1, truth, size=(num_trials, num_prompts)).astype(float)
    low_E, high_E = tournament.bootstrap_interval(
        values_EB, num_resamples=500, confidence=0.9, rng=rng
    )
    covered = np.mean((low_E <= truth) & (truth <= high_E))
    # Standard error sqrt(.9 * .1 / 400) = 0.015.
    assert abs(covered - 0.9) < 4 * 0.015
    # The normal interval of a mean of 0/1 values has this half width.
    half_width = 1.645 * np.sqrt(truth * (1 - truth) / num_prompts)
    assert np.mean(high_E - low_E) == pytest.approx(2 * half_width, rel=0.05)


def test_beating_means_the_whole_interval():
    rates = tournament.win_rates(TEXTS, _longer)
    assert tournament.beats(rates, "long", "short")
    assert not tournament.beats(rates, "short", "long")
    assert rates.interval("middle", "short").mean > 0.5
    assert not tournament.beats(rates, "middle", "short")
    assert not tournament.beats(rates, "long", "long")


def test_mean_win_rate_leaves_the_policy_itself_out():
    rates = tournament.win_rates(TEXTS, _longer)
    expected = {"short": 1.5 / 4 / 2, "middle": 2.5 / 4 / 2, "long": 1.0}
    assert tournament.mean_win_rates(rates) == pytest.approx(expected, abs=1e-15)


def _rates(mean_NN):
    """A tournament with these mean win rates and nothing else of interest."""
    mean_NN = np.asarray(mean_NN, float)
    names = tuple("abcdefgh"[: len(mean_NN)])
    return tournament.WinRates(
        names, mean_NN, mean_NN, mean_NN, mean_NN[:, :, None], 0.95
    )


def _equilibrium(mean_NN, **settings):
    return np.array(list(tournament.nash_average(_rates(mean_NN), **settings).values()))


def test_nash_average_of_three_types_of_people():
    # Munos et al. (2024), Section 3.2: the weights for |e| <= 1/3.
    e = 0.1
    p21, p31, p32 = 2 / 3 - e / 2, 1 / 3 - e / 4, 2 / 3 + e / 4
    game = [[0.5, 1 - p21, 1 - p31], [p21, 0.5, 1 - p32], [p31, p32, 0.5]]
    expected = [1 / 3 + e / 2, 1 / 3 + e / 2, 1 / 3 - e]
    # The entropy's pull is of the order of tau.
    np.testing.assert_allclose(_equilibrium(game, tau=1e-5), expected, atol=1e-4)
    np.testing.assert_allclose(_equilibrium(game), expected, atol=1e-2)


def test_nash_average_puts_all_weight_on_who_beats_everyone():
    weights_N = _equilibrium([[0.5, 0.45, 0.4], [0.55, 0.5, 0.3], [0.6, 0.7, 0.5]])
    np.testing.assert_allclose(weights_N, [0, 0, 1], atol=1e-12)


def test_policies_that_tie_share_their_weight():
    weights_N = _equilibrium([[0.5, 0.5, 0.7], [0.5, 0.5, 0.7], [0.3, 0.3, 0.5]])
    np.testing.assert_allclose(weights_N, [0.5, 0.5, 0], atol=1e-12)


def test_nash_average_is_the_fixed_point_and_cannot_be_exploited():
    rng = np.random.default_rng(4)
    for size in (2, 3, 5, 8):
        for deterministic in (False, True):
            upper_NN = np.triu(rng.uniform(size=(size, size)), 1)
            upper_NN = upper_NN.round() if deterministic else upper_NN
            lower_NN = np.tril(1 - upper_NN.T, -1)
            game_NN = upper_NN + lower_NN + 0.5 * np.eye(size)
            weights_N = _equilibrium(game_NN)
            payoff_N = game_NN @ weights_N / 1e-3
            target_N = np.exp(payoff_N - payoff_N.max())
            np.testing.assert_allclose(weights_N, target_N / target_N.sum(), atol=1e-9)
            assert (game_NN @ weights_N).max() <= 0.5 + 1e-3 * np.log(size)


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="at least two"):
        tournament.win_rates({"a": [["x"]]}, _longer)
    with pytest.raises(UserError, match="'b' has no samples"):
        tournament.win_rates({"a": [["x"]], "b": []}, _longer)
    with pytest.raises(UserError, match="confidence"):
        tournament.win_rates(TEXTS, _longer, confidence=1.0)
    with pytest.raises(UserError, match="did you mean 'long'"):
        tournament.win_rates(TEXTS, _longer).interval("short", "lon")
    with pytest.raises(UserError, match="tau"):
        tournament.nash_average(_rates(np.full((2, 2), 0.5)), tau=0.0)
    with pytest.raises(AssertionError, match=r"\[0, 1\]"):
        tournament.win_rates(TEXTS, lambda first, second: np.full(4, np.nan))
