# SPDX-License-Identifier: Apache-2.0
"""Games by name, populations, and tables of wins from files."""

import itertools
import json

import numpy as np
import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.games import catalogue, cycles, matrices, published
from nlhf_jax.games.win_tables import load_table

EXACT = 1e-12
GOOD = ",Ann,Bob,Cy\nAnn,0.5,0.7,0.2\nBob,0.3,0.5,0.6\nCy,0.8,0.4,0.5\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="table.csv"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


# ------------------------------------------------------------------- named games


@pytest.mark.parametrize("name", catalogue.NAMED)
def test_every_named_game_has_a_name_for_each_action(name):
    table = catalogue.find_game(name)
    assert len(table.names) == len(set(table.names)) == len(table.preference_NN)
    assert matrices.check_preference_matrix(table.preference_NN) is not None


def test_dice_are_compared_by_all_rolls():
    faces = matrices.INTRANSITIVE_FACES
    game = matrices.dice(faces)
    for i, j in itertools.product(range(3), repeat=2):
        rolls = list(itertools.product(faces[i], faces[j]))
        wins = sum((a > b) + 0.5 * (a == b) for a, b in rolls)
        assert game[i, j] == pytest.approx(wins / len(rolls), abs=EXACT)
    # Each beats the next with 5/9 (Munos et al., 2024, Appendix C.1).
    assert game[0, 1] == game[1, 2] == game[2, 0] == pytest.approx(5 / 9, abs=EXACT)


@pytest.mark.parametrize("epsilon", [-0.1, 0.0, 0.1, 1 / 3])
def test_three_types_of_people_are_the_sum_of_their_preferences(epsilon):
    first, others = 1 / 3 - epsilon, 1 / 3 + epsilon / 2
    game = matrices.three_types(epsilon)
    # The formulas of Munos et al., 2024, section 3.2.
    assert game[1, 0] == pytest.approx(2 / 3 - epsilon / 2, abs=EXACT)
    assert game[2, 0] == pytest.approx(1 / 3 - epsilon / 4, abs=EXACT)
    assert game[2, 1] == pytest.approx(2 / 3 + epsilon / 4, abs=EXACT)
    # The same people as a population of scores: who is even on a pair ties it.
    strict = {(1, 0): first, (0, 2): others, (2, 1): others}
    for (winner, loser), mass in strict.items():
        assert game[winner, loser] == pytest.approx(0.5 + mass / 2, abs=EXACT)


def test_consistent_raters_make_a_cyclic_population():
    game = catalogue.find_game("three_raters").preference_NN
    assert game[0, 1] == game[1, 2] == game[2, 0] == pytest.approx(2 / 3, abs=EXACT)


def test_groups_count_by_their_weight_and_ties_half():
    game = matrices.annotators([[1, 0, 0], [0, 0, 2]], [3.0, 1.0])
    # Group 1: action 0 over both others, which tie; group 2: action 2 over both.
    expected = [[0.5, 0.875, 0.75], [0.125, 0.5, 0.375], [0.25, 0.625, 0.5]]
    np.testing.assert_allclose(game, expected, rtol=0, atol=EXACT)
    with pytest.raises(UserError, match="positive sum"):
        matrices.annotators([[1, 0]], [-1.0])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_random_games_are_as_cyclic_as_asked(share):
    for seed in range(20):
        game = matrices.random_game(np.random.default_rng(seed), 6, share)
        matrices.check_preference_matrix(game)
        found = cycles.cyclic_energy_share(game[None])
        assert found == pytest.approx(share, abs=EXACT)


def test_a_cyclic_share_needs_three_actions_and_is_a_share():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"\[0.0, 1.0\], got 1.5"):
        matrices.random_game(rng, 4, 1.5)
    with pytest.raises(UserError, match="at least 3 actions"):
        matrices.random_game(rng, 2, 0.5)


# Mean win rates over the thirteen others, three decimals, computed independently of
# this code from the paper's printed tables.
MEANS = {
    "munos_palm": {"MD1": 0.664, "RLHF": 0.591, "SP": 0.585, "BR": 0.281, "SFT": 0.024},
    "munos_own": {"MD1": 0.700, "RLHF": 0.453, "SP": 0.667, "BR": 0.201, "SFT": 0.028},
}


@pytest.mark.parametrize("name", MEANS)
def test_the_papers_tables_are_the_right_way_round(name):
    table = catalogue.find_game(name)
    assert table.names == published.POLICIES
    mean_N = (table.preference_NN.sum(axis=1) - 0.5) / 13
    for policy, mean in MEANS[name].items():
        found = mean_N[table.names.index(policy)]
        assert found == pytest.approx(mean, abs=5.1e-4), policy


# ------------------------------------------------------------------- files


def test_a_csv_table_is_read_by_row_over_column(write):
    table = load_table(write(GOOD))
    assert table.names == ("Ann", "Bob", "Cy")
    np.testing.assert_allclose(table.preference_NN, matrices.skew(), atol=EXACT)


def test_json_holds_the_same(write):
    rows = [[0.5, 0.7, None], [0.3, 0.5, 0.6], [0.8, 0.4, 0.5]]
    text = json.dumps({"names": ["Ann", "Bob", "Cy"], "preference": rows})
    table = load_table(write(text, "table.json"))
    np.testing.assert_allclose(table.preference_NN, matrices.skew(), atol=EXACT)


WINS = ",Ann,Bob\nAnn,0,7\nBob,3,0\n"


@pytest.mark.parametrize(
    "text, cells, totals",
    [
        (WINS, "wins", ""),
        (",Ann,Bob\nAnn,,7/10\nBob,3/10,\n", "preference", ""),
        (",Ann,Bob\nAnn,,7/10\nBob,NA,\n", "preference", ""),
        (WINS, "preference", ",Ann,Bob\nAnn,0,10\nBob,10,0\n"),
        (",Ann,Bob\nAnn,0,8.5\nBob,5.5,0\n", "wins", ""),
    ],
)
def test_counts_are_shares_of_the_games_played(write, text, cells, totals):
    totals = totals and write(totals, "totals.csv")
    table = load_table(write(text), cells=cells, totals=totals)
    expected = 8.5 / 14 if "8.5" in text else 0.7
    assert table.preference_NN[0, 1] == pytest.approx(expected, abs=EXACT)
    assert table.preference_NN[1, 0] == pytest.approx(1 - expected, abs=EXACT)


def test_rounded_halves_are_made_antisymmetric(write):
    table = load_table(write(",a,b\na,0.5,0.333333\nb,0.666666,0.5\n"))
    assert table.preference_NN[0, 1] == pytest.approx(0.3333335, abs=EXACT)
    assert table.preference_NN.sum() == 2.0


def test_pairs_that_never_met_are_filled_only_when_asked(write):
    path = write(",a,b,c\na,,0.75,\nb,,,0.75\nc,,,\n")
    with pytest.raises(UserError, match=r"no result for a against c: .*half"):
        load_table(path)
    assert load_table(path, fill="half").preference_NN[0, 2] == 0.5
    # Odds of 3 twice in a row are odds of 9 under Bradley-Terry.
    filled = load_table(path, fill="bradley_terry").preference_NN
    assert filled[0, 2] == pytest.approx(0.9, abs=1e-5)
    assert filled[0, 1] == 0.75


def test_many_missing_pairs_are_counted(write):
    names = "abcde"
    rows = "".join(f"{name},,,,,\n" for name in names)
    with pytest.raises(UserError, match=r"a against b, a against c, .* and 7 more"):
        load_table(write("," + ",".join(names) + "\n" + rows))


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "row of names"),
        (",a,b\na,0.5,0.5\n", "must be square: 2 names in the first row, 1 rows"),
        (",a,b\na,0.5\nb,0.5,0.5\n", "row 'a' must have 2 cells, got 1"),
        (",a,\na,0.5,0.5\n,0.5,0.5\n", "no name for player 2"),
        (",a,b\na,0.5,0.5\nx,0.5,0.5\n", "got 'x' for 'b'"),
        (",a,a\na,0.5,0.5\na,0.5,0.5\n", "names 'a' twice"),
        (",a,b\na,0.5,nan\nb,0.5,0.5\n", "a against b must be a number, got 'nan'"),
        (",a,b\na,0.5,no\nb,0.5,0.5\n", "a against b must be a number, got 'no'"),
        (",a,b\na,0.5,3/0\nb,0.5,0.5\n", "must be a number, got '3/0'"),
        (",a,b\na,0.5,1.2\nb,-0.2,0.5\n", r"P\(a beats b\) must be in \[0, 1\]"),
        (",a,b\na,0.5,0.7\nb,0.4,0.5\n", r"P\(b beats a\) must sum to 1"),
    ],
)
def test_a_table_that_is_none_says_where(write, text, said):
    with pytest.raises(UserError, match=said):
        load_table(write(text))


@pytest.mark.parametrize(
    "text, said",
    [
        ("[1, 2]", "must be an object"),
        ('{"names": ["a"]}', "one of `preference` and `wins`"),
        ('{"names": ["a", "b"], "preference": [[0.5, 0.5]]}', "2 rows of as many"),
        ('{"names": ', "line 1: Expecting value"),
    ],
)
def test_json_that_is_no_table_says_why(write, text, said):
    with pytest.raises(UserError, match=said):
        load_table(write(text, "table.json"))


def test_files_and_totals_that_do_not_fit_are_named(write, tmp_path):
    with pytest.raises(UserError, match=r"no table '.*absent\.csv'"):
        load_table(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_table(tmp_path / "binary.csv")
    totals = write(",Ann,Zoe\nAnn,0,10\nZoe,10,0\n", "totals.csv")
    with pytest.raises(UserError, match=r"same order, got Ann, Zoe"):
        load_table(write(WINS), totals=totals)
    few = write(",Ann,Bob\nAnn,0,5\nBob,5,0\n", "few.csv")
    with pytest.raises(UserError, match=r"Ann against Bob .* got 7 of 5"):
        load_table(write(WINS), totals=few)


def test_an_unknown_game_gets_the_nearest_name():
    with pytest.raises(UserError, match="rock_paper_scissors"):
        catalogue.find_game("rock_paper_scisors")


def test_a_json_file_says_itself_that_it_holds_wins(write):
    text = json.dumps({"names": ["Ann", "Bob"], "wins": [[0, 7], [3, 0]]})
    table = load_table(write(text, "table.JSON"))
    assert table.preference_NN[0, 1] == pytest.approx(0.7, abs=EXACT)


@pytest.mark.parametrize("text", ["3", "true", "null", '"a"', "[" * 100_000])
def test_json_of_another_kind_is_a_users_mistake(write, text):
    with pytest.raises(UserError, match=r"must be an object|is no table"):
        load_table(write(text, "table.json"))


@pytest.mark.parametrize(
    "names, rows",
    [
        (3, [[0.5]]),
        (None, [[0.5]]),
        ("AB", [[0.5, 0.5], [0.5, 0.5]]),
        ([], []),
        (["a", "b"], 5),
        (["a", "b"], [1, 2]),
    ],
)
def test_json_with_wrong_parts_is_a_users_mistake(write, names, rows):
    text = json.dumps({"names": names, "preference": rows})
    with pytest.raises(UserError, match=r"list of texts|rows of as many"):
        load_table(write(text, "table.json"))


def test_no_games_at_all_is_a_pair_that_never_met(write):
    path = write(",a,b\na,,0/0\nb,0/0,\n")
    with pytest.raises(UserError, match="no result for a against b"):
        load_table(path)
    assert load_table(path, fill="half").preference_NN[0, 1] == 0.5


@pytest.mark.parametrize("flag", ["cells", "totals", "fill"])
def test_what_is_for_files_is_refused_with_a_named_game(flag):
    with pytest.raises(UserError, match=f"{flag} is for files"):
        catalogue.find_game("dice", **{flag: "wins"})
