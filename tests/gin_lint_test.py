# SPDX-License-Identifier: Apache-2.0
"""Gin files are read with their places, and every mistake is found and placed."""

import collections.abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from nlhf_jax import gin_bindings, gin_files, gin_lint, gin_types
from nlhf_jax.checks import UserError


@dataclasses.dataclass(frozen=True)
class Oven:
    """A settings class of the tests."""

    degrees: float
    shelf: int = 1
    fan: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Another one."""

    name: str = "bread"


def sourdough(days: int = 2) -> Recipe:
    """A function that returns settings, as algorithms do."""
    return Recipe(f"sourdough of {days} days")


def bake(
    *,
    folder: str,
    oven: Oven,
    recipe: Recipe = Recipe(),
    spare: Oven | None = None,
    weights: Mapping[str, float] | None = None,
    times: Sequence[int] = (),
    helpers: Mapping[str, Callable[..., None]] | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    """The job."""


def clean(*, folder: str, times: int = 1) -> None:
    """A job that another job calls with what is missing."""


REGISTRY = {f.__name__: f for f in (Oven, Recipe, sourdough, bake, clean)}
GOOD = """
FOLDER = 'out'  # a comment
HEAT = 220
bake.folder = %FOLDER
bake.oven = @Oven()
Oven.degrees = %HEAT
"""


def check(text: str, tmp_path, **overrides: str) -> None:
    file = tmp_path / "run.gin"
    file.write_text(text)
    statements = gin_files.read(str(file), [], "the command line")
    for key, value in overrides.items():
        text = gin_files.quoted(value)
        statements.append(gin_files.Statement(key, text, f"--gin.{key}"))
    gin_lint.check("bake", statements, REGISTRY)


def mistake(text: str, tmp_path, **overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check(text, tmp_path, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_configuration_passes(tmp_path):
    check(GOOD, tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        "Oven.fan = True",
        "Oven.shelf = 2",
        "Oven.degrees = 220.5",
        "bake.spare = None",
        "bake.spare = @Oven()",
        "bake.spare = @small/Oven()\nsmall/Oven.degrees = 90",
        "bake.recipe = @sourdough()\nsourdough.days = 3",
        "bake.recipe = @Recipe()\nRecipe.name = 'it\\'s # no comment'",
        "bake.weights = {'rye': 0.5, 'wheat': 1}",
        "bake.times = (1, 2)\nX = 3\nbake.times = (%X, 2)",
        "bake.after = @clean\nclean.times = 2",
        "bake.helpers = {\n    'one': @clean,  # why\n    'two': @late/clean,\n}",
        "bake.helpers = {'two': @late/clean}\nlate/clean.times = 3",
        "A = %B\nB = 3\nOven.shelf = %A",
        "bake.weights = \\\n  {'rye': 1}",
    ],
)
def test_every_kind_of_right_value_passes(tmp_path, more):
    check(GOOD + more + "\n", tmp_path)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("Oven.degree = 3", ":8: Oven has no parameter 'degree' (did you mean 'deg"),
        ("Oven.degree = 3", "it has degrees, shelf, fan"),
        ("Ovem.shelf = 3", ":8: nothing configurable is named 'Ovem' (did you mean 'O"),
        (
            "bake.recipe = @sourdoug()",
            ":8: nothing configurable is named 'sourdoug' (d",
        ),
        ("R = @sourdoug()\nbake.recipe = %R", ":8: nothing configurable is named"),
        ("Oven.shelf = %HEET", ":8: Oven.shelf reads the macro %HEET, which is not de"),
        ("Oven.shelf = %HEET", "(did you mean 'HEAT'?)"),
        ("HEAAT = 3", ":8: nothing reads the macro HEAAT (did you mean 'HEAT'?)"),
        ("Recipe.name = 'x'", ":8: nothing in 'bake' reads Recipe.name"),
        ("samll/Oven.shelf = 3\nbake.spare = @small/Oven()", "scope 'samll' (did you"),
        ("A = %B\nB = %A\nOven.shelf = %A", ":8: the macro A is defined by itself"),
        ("A = (%A,)\nbake.times = %A", ":8: the macro A is defined by itself"),
        ("Oven.shelf = 'two'", ":8: Oven.shelf must be an integer, got 'two'"),
        ("Oven.shelf = 2.0", ":8: Oven.shelf must be an integer, got 2.0"),
        ("Oven.shelf = True", ":8: Oven.shelf must be an integer, got True"),
        ("Oven.degrees = '220'", ":8: Oven.degrees must be a number, got '220'"),
        ("Oven.fan = 1", ":8: Oven.fan must be True or False, got 1"),
        ("HEAT = 'hot'", ":8: Oven.degrees must be a number, got 'hot'"),
        ("FOLDER = 3", ":8: bake.folder must be a string in quotes, got 3"),
        ("FOLDER = out/x", ":8: the value of FOLDER is not a literal: out/x (text ne"),
        ("bake.folder = ", ":8: the value of bake.folder is not a literal: nothing"),
        ("bake.oven = 'hot'", ":8: bake.oven must be of type Oven (@NAME()), got 'h"),
        ("bake.oven = @Oven", ":8: bake.oven must be of type Oven (@NAME()), got @O"),
        ("bake.oven = @Recipe()", ":8: bake.oven must be of type Oven"),
        ("bake.spare = @sourdough()", ":8: bake.spare must be"),
        ("bake.after = @clean()", ":8: bake.after must be"),
        ("bake.weights = {'rye': 'much'}", ":8: bake.weights must be"),
        ("bake.weights = (1, 2)", ":8: bake.weights must be"),
        ("bake.times = 3", ":8: bake.times must be"),
        ("bake.times = ('1',)", ":8: bake.times must be"),
        ("bake.times = (1,\nA = 2", ":8: the value of bake.times is not a literal"),
        ("just words", ":8: expected NAME = VALUE, FUNCTION.PARAMETER = VALUE, inc"),
        ("from os import path", ":8: expected NAME = VALUE"),
        (
            "HEAT = (1\nHEAT = 200",
            ":8: the value of HEAT is not a literal: (1 HEAT = 2",
        ),
        ("HEAT = 'a\nHEAT = 200", ":8: the value of HEAT is not a literal: 'a (text"),
        ("HEAT = 1e999", ":8: Oven.degrees must be a number, got 1e999"),
        (
            "Oven.shelf = 9223372036854775808",
            ":8: Oven.shelf must be an integer below 2**63, got 9",
        ),
        ("bake.times = [@Oven()] @", ":8: nothing configurable is named ''"),
        (
            "bake.times = [1] [@Oven()] x",
            ":8: the value of bake.times is not a literal",
        ),
        ("bake.times = {1: @Oven()}", ":8: bake.times must be of type"),
        ("X = 'a'\nbake.times = (1, %X)", ":9: bake.times must be of type"),
        (
            "bake.oven = [@Oven()]",
            ":8: bake.oven must be of type Oven (@NAME()), got [",
        ),
        ("HEAT = \x00", ":8: the value of HEAT must be on one line, without control"),
        ("Oven.shelf = " + "1" * 500, f"got {'1' * 120}..."),
        ("DAYS = 3", "of sourdough, none of which is used here"),
        ("A = %B, %B\n" * 1 + "B = 2\nbake.times = (%A, 'x')", "bake.times must be of"),
        ("include '.'", ":8) is a folder"),
        ("include 'missing.gin'", ":8) does not exist"),
        ("include 'run.gin'", "run.gin"),
    ],
)
def test_every_mistake_has_its_place_and_the_nearest_name(tmp_path, more, expected):
    text = mistake(GOOD + "\n" + more + "\n", tmp_path)
    assert expected in text
    assert str(tmp_path) in text or "'run.gin'" in text


def test_every_required_value_that_is_unset_is_named_at_once(tmp_path):
    text = mistake("A = %gin.REQUIRED\nbake.times = (%A, 1)\n", tmp_path)
    for name in ("A", "bake.folder", "bake.oven"):
        assert f"--gin.{name}=..." in text
    assert "--gin.A=... (" in text
    assert "run.gin:1)" in text
    assert "degrees" not in text


def test_what_is_called_needs_its_parameters_too(tmp_path):
    text = mistake("bake.folder = 'x'\nbake.oven = @Oven()\n", tmp_path)
    assert text == "bake: required and not set: --gin.Oven.degrees=..."


def test_a_function_that_is_passed_on_gets_the_rest_from_its_caller(tmp_path):
    check(GOOD + "bake.after = @clean\n", tmp_path)


def test_a_required_macro_that_an_override_made_idle_is_no_mistake(tmp_path):
    text = GOOD.replace("'out'", "%gin.REQUIRED")
    assert "--gin.FOLDER=..." in mistake(text, tmp_path)
    check(text, tmp_path, FOLDER="out")
    check(text, tmp_path, **{"bake.folder": "out"})


def test_mistakes_of_the_command_line_name_its_flag(tmp_path):
    text = mistake(GOOD, tmp_path, HEAT="hot")
    assert text == "--gin.HEAT: Oven.degrees must be a number, got 'hot'"
    text = mistake(GOOD, tmp_path, **{"Oven.shelf": "1.5"})
    assert text.startswith("--gin.Oven.shelf: ")


def test_macros_that_double_and_double_are_refused_at_once(tmp_path):
    """Thirty macros, each twice the one before, write a value of 2^30 parts."""
    lines = [f"A{n} = (%A{n + 1}, %A{n + 1})" for n in range(30)]
    more = "\n".join([*lines, "A30 = 1", "bake.times = %A0", ""])
    assert "is not a literal" in mistake(GOOD + more, tmp_path)


def statement(value: str, key: str = "FOLDER") -> gin_files.Statement:
    return gin_files.Statement(key, value, f"--gin.{key}")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("FOLDER", "a b", "'a b'"),
        ("FOLDER", "runs/a=1,b", "'runs/a=1,b'"),
        ("FOLDER", "", "''"),
        ("bake.folder", "a b", "'a b'"),
        ("FOLDER", "'a b'", "'a b'"),
        ("FOLDER", "7", "7"),
        ("FOLDER", "None", "None"),
        ("FOLDER", "%HEAT", "%HEAT"),
        ("FOLDER", "it's", "it's"),
        ("HEAT", "a b", "a b"),
        ("Oven.degrees", "a b", "a b"),
        ("NOBODYS", "a b", "a b"),
    ],
)
def test_text_gets_its_quotes_where_only_text_is_read(tmp_path, key, value, expected):
    statements = read(tmp_path, GOOD)
    found = gin_lint.as_text(statement(value, key), statements, REGISTRY)
    assert found.value == expected


def test_a_name_that_one_file_sets_twice_is_told_and_an_overridden_one_is_not(tmp_path):
    (tmp_path / "b.gin").write_text("A = 1\nB = 1\n")
    text = f"include '{tmp_path}/b.gin'\nA = 2\nC = 1\nA = 3\n"
    (sentence,) = gin_lint.repeated(read(tmp_path, text))
    assert sentence == f"{tmp_path}/a.gin:4: A is set in line 2 too; this one counts"


def test_the_places_of_a_sentence_are_those_of_the_value_it_shows(tmp_path):
    statements = read(tmp_path, GOOD + "small/Oven.degrees = -3\nbake.times = ()\n")
    sentence = "degrees must be in [0, 300], got -3"
    assert gin_lint.places_in(sentence, statements) == f" ({tmp_path}/a.gin:7)"
    sentence = "degrees must be something else"
    assert gin_lint.places_in(sentence, statements) == (
        f" ({tmp_path}/a.gin:3, {tmp_path}/a.gin:7)"
    )
    assert gin_lint.places_in("no parameter is named", statements) == ""


@pytest.mark.parametrize(
    "key", ["", "a b", "A\nB", "import", "A.", "A..b", "1A", "class"]
)
def test_what_is_no_name_is_refused(key):
    with pytest.raises(UserError, match="is no name of a macro or binding"):
        gin_lint.check("bake", [statement("1", key)], REGISTRY)


def test_later_statements_win(tmp_path):
    check(GOOD + "HEAT = 'hot'\nHEAT = 200\n", tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("runs/x", "'runs/x'"),
        ("~/my-runs_2", "'~/my-runs_2'"),
        ("'runs/x'", "'runs/x'"),
        ("3", "3"),
        ("1e-3", "1e-3"),
        ("True", "True"),
        ("None", "None"),
        ("(1, 2)", "(1, 2)"),
        ("@Oven()", "@Oven()"),
        ("%HEAT", "%HEAT"),
        ("two words", "two words"),
    ],
)
def test_bare_words_become_strings_and_all_else_stays(value, expected):
    assert gin_files.quoted(value) == expected


def read(tmp_path, text: str) -> list[gin_files.Statement]:
    file = tmp_path / "a.gin"
    file.write_text(text)
    return gin_files.read(str(file), [], "the test")


def test_statements_keep_their_lines_over_comments_and_brackets(tmp_path):
    text = "# first\nA = (1,  # one\n     2)\n\nB.c = '# none'  # comment\nD = 1\n"
    found = [(s.key, s.value, s.place[-2:]) for s in read(tmp_path, text)]
    assert found == [("A", "(1, 2)", ":2"), ("B.c", "'# none'", ":5"), ("D", "1", ":6")]


def test_includes_stand_where_they_are_written(tmp_path):
    (tmp_path / "inner.gin").write_text("B = 2\n")
    (tmp_path / "outer.gin").write_text("A = 1\ninclude 'inner.gin'\nA = 3\n")
    found = gin_files.read("outer.gin", [tmp_path], "the test")
    assert [s.key for s in found] == ["A", "B", "A"]
    assert found[1].place == f"{tmp_path / 'inner.gin'}:1"


def test_a_circle_of_includes_is_a_mistake(tmp_path):
    (tmp_path / "a.gin").write_text("include 'b.gin'\n")
    (tmp_path / "b.gin").write_text("\ninclude 'a.gin'\n")
    with pytest.raises(UserError, match=r"b\.gin:2: 'a\.gin' includes itself"):
        gin_files.read("a.gin", [tmp_path], "the test")


def test_the_same_file_may_be_included_twice(tmp_path):
    (tmp_path / "b.gin").write_text("B = 1\n")
    (tmp_path / "a.gin").write_text("include 'b.gin'\ninclude 'b.gin'\n")
    assert len(gin_files.read("a.gin", [tmp_path], "the test")) == 2


def test_a_file_that_is_no_text_is_a_mistake(tmp_path):
    (tmp_path / "a.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        gin_files.read("a.gin", [tmp_path], "the test")


def test_a_missing_file_names_the_nearest_of_the_project():
    with pytest.raises(UserError, match=r"did you mean 'configs/runs/train\.gin'"):
        gin_files.read("configs/runs/trian.gin", [], "the command line")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (None, int | None, True),
        ("x", int | None, False),
        ([1], tuple[int, ...], True),
        (("a",), Sequence[str], True),
        ("ab", Sequence[str], False),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "1"}, collections.abc.Mapping[str, int], False),
        (3, Oven, False),
        (3, None, True),
        ("x", Any, True),
    ],
)
def test_matches(value, hint, expected):
    assert gin_types.matches(value, hint) == expected


def test_split_key():
    assert gin_lint.split_key("Oven.shelf") == ("", "Oven", "shelf")
    assert gin_lint.split_key("a/b/Oven.shelf") == ("a/b", "Oven", "shelf")


def test_everything_that_can_be_bound_says_the_type_of_each_parameter():
    gin_bindings.register()
    for name, configurable in gin_bindings._known.items():
        for parameter, described in gin_lint._parameters(configurable).items():
            assert described.annotation is not described.empty, f"{name}.{parameter}"


def test_gin_receives_what_the_lint_has_seen():
    import gin

    overrides = {"MODEL_DIR": "there", "sft.seed": "3"}
    gin_bindings.load("sft", ["configs/runs/sft.gin"], overrides)
    assert gin.query_parameter("sft.seed") == 3
    assert gin.query_parameter("MODEL_DIR/gin.macro.value") == "there"


def test_an_earlier_configuration_leaves_nothing_behind():
    import gin

    files, where = ["configs/runs/sft.gin"], {"MODEL_DIR": "there"}
    gin_bindings.load("sft", files, where | {"sft.num_eval_examples": "3"})
    gin_bindings.load("sft", files, where)
    with pytest.raises(ValueError, match="num_eval_examples"):
        gin.query_parameter("sft.num_eval_examples")
