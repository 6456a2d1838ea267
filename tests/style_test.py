# SPDX-License-Identifier: Apache-2.0
"""The style's figures: sizes of functions and files, docstrings, headers, tests."""

import ast
import dataclasses
import pathlib
import statistics

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LICENCE = "# SPDX-License-Identifier: Apache-2.0"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_MEDIAN_FUNCTION_LINES = 12
MIN_DOCSTRING_COVERAGE = 0.95
MIN_TESTS_TO_SOURCE = 1.0

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (*FUNCTIONS, ast.ClassDef)


def files_of(*folders: str) -> list[pathlib.Path]:
    return sorted(file for name in folders for file in (ROOT / name).rglob("*.py"))


def written(files: list[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the files that say anything; a package's marker may be empty."""
    return [file for file in files if file.stat().st_size]


SOURCE = written(files_of("nlhf_jax", "launch"))
BENCHMARKS = written(files_of("benchmarks"))
TESTS = written(files_of("tests"))


def parse(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def docstring_lines(tree: ast.AST) -> set[int]:
    """Returns the lines that docstrings take up."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (*DOCUMENTED, ast.Module)):
            continue
        if ast.get_docstring(node) is not None:
            text = node.body[0]
            lines |= set(range(text.lineno, text.end_lineno + 1))
    return lines


def code_lines(source: str) -> set[int]:
    """Returns the line numbers without blanks, comments and docstrings."""
    written = {
        number
        for number, line in enumerate(source.splitlines(), start=1)
        if line.strip() and not line.strip().startswith("#")
    }
    return written - docstring_lines(ast.parse(source))


@dataclasses.dataclass(frozen=True)
class Function:
    """A function, where it stands, and how many lines of code it has."""

    name: str
    place: str
    lines: int


def functions_of(source: str, file: str) -> list[Function]:
    """Returns every function; an inner one counts for itself and for its outer one."""
    code = code_lines(source)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            size = len(code & set(range(node.lineno, node.end_lineno + 1)))
            found.append(Function(node.name, f"{file}:{node.lineno}", size))
    return found


def all_functions(files: list[pathlib.Path]) -> list[Function]:
    return [
        function
        for file in files
        for function in functions_of(
            file.read_text(encoding="utf-8"), str(file.relative_to(ROOT))
        )
    ]


def public_definitions(tree: ast.AST) -> list[ast.AST]:
    """Returns public functions and classes of a module and of its public classes."""
    found = []
    for node in tree.body:
        if isinstance(node, DOCUMENTED) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public_definitions(node)
    return found


def test_code_lines_leave_out_blanks_comments_and_docstrings():
    module = '"""A module.\n\nMore.\n"""\n\n# why\nX = 1\n\n\n'
    source = module + 'def f():\n    """Doc."""\n    return X\n'
    assert code_lines(source) == {7, 10, 12}
    assert [f.lines for f in functions_of(source, "x.py")] == [2]


def test_public_definitions_are_those_without_an_underscore():
    source = "def f(): 0\ndef _g(): 0\nclass C:\n  def m(self): 0\n  def _n(self): 0\n"
    names = [node.name for node in public_definitions(ast.parse(source))]
    assert names == ["f", "C", "m"]


@pytest.mark.parametrize(
    "file",
    [*SOURCE, *BENCHMARKS, *TESTS, ROOT / "setup.py"],
    ids=lambda f: f.relative_to(ROOT).as_posix(),
)
def test_first_line_is_the_licence(file):
    assert file.read_text(encoding="utf-8").splitlines()[0] == LICENCE


def test_every_module_has_a_docstring():
    missing = [
        str(file.relative_to(ROOT))
        for file in (*SOURCE, *BENCHMARKS, *TESTS)
        if not ast.get_docstring(parse(file))
    ]
    assert not missing


def test_no_source_file_is_longer_than_the_limit():
    sizes = {
        str(f.relative_to(ROOT)): len(f.read_text().splitlines())
        for f in SOURCE + BENCHMARKS
    }
    assert not {name: n for name, n in sizes.items() if n > MAX_FILE_LINES}


def test_no_function_is_longer_than_the_limit():
    functions = all_functions(SOURCE + BENCHMARKS + TESTS)
    long = [f for f in functions if f.lines > MAX_FUNCTION_LINES]
    assert not long
    assert len(functions) > 300


def test_the_median_function_is_short():
    median = statistics.median(f.lines for f in all_functions(SOURCE))
    assert median <= MAX_MEDIAN_FUNCTION_LINES


def test_public_functions_and_classes_have_docstrings():
    definitions = [
        (f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node)
        for file in SOURCE
        for node in public_definitions(parse(file))
    ]
    bare = [name for name, node in definitions if not ast.get_docstring(node)]
    assert 1 - len(bare) / len(definitions) >= MIN_DOCSTRING_COVERAGE, bare


def test_tests_are_at_least_as_long_as_the_source():
    source, tests = (
        sum(len(code_lines(file.read_text(encoding="utf-8"))) for file in files)
        for files in (SOURCE, TESTS)
    )
    assert tests >= MIN_TESTS_TO_SOURCE * source, f"{tests} lines for {source}"
