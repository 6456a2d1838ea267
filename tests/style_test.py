# SPDX-License-Identifier: Apache-2.0
"""The figures the code is held to: lengths, docstrings, licence lines, test : source.

A code line is one that holds a token other than a comment or a docstring.
"""

import ast
import dataclasses
import functools
import io
import pathlib
import statistics
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("nlhf_jax", "launch", "benchmarks")
LICENCE = "# SPDX-License-Identifier: Apache-2.0"
LONGEST_FUNCTION, MEDIAN_FUNCTION, LONGEST_FILE = 80, 12, 400
LEAST_DOCUMENTED, LEAST_TESTED = 0.95, 1.0

BLANK = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is measured of one file.

    Attributes:
      code_lines: lines that hold code.
      functions: (name, code lines) of every function and method, nested ones too.
      public: whether each public function, method and class has a docstring.
    """

    code_lines: int
    functions: tuple[tuple[str, int], ...]
    public: tuple[tuple[str, bool], ...]


def code_lines(source: str) -> set[int]:
    """Returns the numbers of the lines with code, from 1."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BLANK:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        is_documented = isinstance(node, Definition | ast.Module)
        if is_documented and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines.difference_update(range(first.lineno, first.end_lineno + 1))
    return lines


def measure(source: str) -> Figures:
    """Returns the figures of one file's text."""
    lines = code_lines(source)
    functions, public = [], []

    def visit(node: ast.AST, hidden: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, Definition):
                visit(child, hidden)
                continue
            private = hidden or child.name.startswith("_")
            if not private:
                public.append((child.name, ast.get_docstring(child) is not None))
            if isinstance(child, ast.ClassDef):
                visit(child, private)
                continue
            own = lines.intersection(range(child.lineno, child.end_lineno + 1))
            functions.append((child.name, len(own)))
            visit(child, True)  # a closure is nobody's interface

    visit(ast.parse(source), False)
    return Figures(len(lines), tuple(functions), tuple(public))


@functools.cache
def files(*folders: str) -> tuple[pathlib.Path, ...]:
    """Returns the Python files of folders of the repository."""
    found = (path for name in folders for path in (ROOT / name).rglob("*.py"))
    return tuple(sorted(found))


@functools.cache
def figures(*folders: str) -> dict[str, Figures]:
    """Returns path -> figures for the Python files of folders."""
    return {
        path.relative_to(ROOT).as_posix(): measure(path.read_text(encoding="utf-8"))
        for path in files(*folders)
    }


def test_no_function_is_too_long():
    too_long = [
        f"{path}: {name} has {length} lines"
        for path, found in figures(*SOURCE_FOLDERS, "tests").items()
        for name, length in found.functions
        if length > LONGEST_FUNCTION
    ]
    assert too_long == []


def test_functions_are_short_in_the_middle():
    lengths = [
        length
        for found in figures(*SOURCE_FOLDERS).values()
        for _, length in found.functions
    ]
    assert statistics.median(lengths) <= MEDIAN_FUNCTION


def test_no_file_is_too_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in files(*SOURCE_FOLDERS)
    }
    assert {p: n for p, n in lengths.items() if n > LONGEST_FILE} == {}


def test_public_definitions_have_docstrings():
    public = [
        (f"{path}: {name}", documented)
        for path, found in figures(*SOURCE_FOLDERS).items()
        for name, documented in found.public
    ]
    missing = [name for name, documented in public if not documented]
    assert len(missing) <= (1 - LEAST_DOCUMENTED) * len(public), missing


@pytest.mark.parametrize("folder", [*SOURCE_FOLDERS, "tests"])
def test_licence_line_and_module_docstring(folder):
    for path in files(folder):
        text = path.read_text(encoding="utf-8")
        if not text:
            continue
        assert text.splitlines()[0] == LICENCE, path
        assert ast.get_docstring(ast.parse(text)), path


def test_tests_are_as_long_as_the_source():
    tested = sum(found.code_lines for found in figures("tests").values())
    source = sum(found.code_lines for found in figures("nlhf_jax", "launch").values())
    assert tested >= LEAST_TESTED * source, f"{tested} test lines, {source} of source"


EXAMPLE = '''# comment
"""Module docstring,
of two lines."""

import os  # code


class Shown:
    """Documented."""

    def bare(self, text=("a",
                         "b")):
        # why
        return text

    def _hidden(self):
        def inner():
            return 1

        return inner


class _Private:
    def method(self):
        """One line only."""
'''


def test_measure_by_hand():
    found = measure(EXAMPLE)
    # import; class; def over two lines, return; def, def, return, return; class, def
    assert found.code_lines == 10 + 1
    assert found.functions == (("bare", 3), ("_hidden", 4), ("inner", 2), ("method", 1))
    assert found.public == (("Shown", True), ("bare", False))


def test_strings_that_are_no_docstrings_are_code():
    source = 'x = """a\nb\nc"""\n\n\ndef f():\n    return """d\n    e"""\n'
    assert code_lines(source) == {1, 2, 3, 6, 7, 8}
