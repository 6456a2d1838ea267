# SPDX-License-Identifier: Apache-2.0
"""The docstring corpus on small made-up source trees."""

import ast
import dataclasses
import hashlib
import pathlib
import textwrap

import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.data import docstring_text, docstrings

BODY = (
    "The pressure is measured at every valve of the pipe, and the mean of the last "
    "ten values is returned to whoever asked for it."
)
SUMMARY = "Measures the pressure of a pipe"


# ------------------------------------------------------------- one docstring in parts


@pytest.mark.parametrize(
    ("docstring", "summary", "body"),
    [
        ("One line only.", "One line only", ""),
        ("First one.  Then more text.", "First one", "Then more text."),
        ("Uses e.g. a file. It is read.", "Uses e.g. a file", "It is read."),
        ("Opens v1.2 files\n\nAs they are.", "Opens v1.2 files", "As they are."),
        ("Split over\n  two lines.\n\nText.", "Split over two lines", "Text."),
        ("Sums.\n\nAdds all.\n\nArgs:\n  x: a number.", "Sums", "Adds all."),
        ("Sums.\n\nAdds all.\nReturns:\n  The sum.", "Sums", "Adds all."),
        ("Sums.\n\nParameters\n----------\nx : int\n", "Sums", ""),
        ("Sums.\n\nAdds all.\n\n:param x: a number\n", "Sums", "Adds all."),
        ("Sums.\n\nAdds all.\n\n>>> sum([1])\n1", "Sums", "Adds all."),
        ("Sums.\n\nx: the number.\n\nAdds all.", "Sums", ""),
        ("Sums.\n\n* one\n* two\n\nAdds all.", "Sums", "Adds all."),
        ("Sums.\n\n    code(1)\n\nAdds all.", "Sums", "Adds all."),
        ("Sums.\n\nAdds all. For instance::\n\n    x", "Sums", "Adds all."),
        ("Sums.\n\nAdds all. Cut in the\n\n.. code::\n\n  x", "Sums", "Adds all."),
        ("Sums.\n\nEnds with an\n\n  indented part", "Sums", ""),
    ],
)
def test_docstring_is_split_into_summary_and_prose(docstring, summary, body):
    assert docstring_text.split_docstring(docstring) == (summary, body)


def test_paragraphs_that_make_the_body_too_long_are_left_out():
    paragraph = "word " * 70 + "end."
    docstring = f"Sums.\n\n{paragraph}\n\n{paragraph}"
    assert docstring_text.split_docstring(docstring)[1] == paragraph


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("Calls :func:`open` twice", "Calls open twice"),
        ("Calls :py:meth:`~a.b` twice", "Calls a.b twice"),
        ("See `the page <there>`_ for it", "See the page for it"),
        ("Uses ``None`` or `x`  here", "Uses None or x here"),
        ("**Bold** words", "Bold words"),
    ],
)
def test_markup_is_removed(marked, plain):
    assert docstring_text.plain(marked) == plain


@pytest.mark.parametrize(
    ("summary", "body", "reason"),
    [
        (SUMMARY, BODY, ""),
        (SUMMARY, "", "no body"),
        ("Measures pressure", BODY, "summary length"),
        ("word " * 17, BODY, "summary length"),
        (SUMMARY, "The pressure is measured once.", "body length"),
        (SUMMARY, "word " * 121, "body length"),
        ("Alias for the other function", BODY, "boilerplate"),
        ("See base class for its meaning", BODY, "boilerplate"),
        ("Deprecated way of measuring pipes", BODY, "boilerplate"),
        (SUMMARY, f"This function is deprecated. {BODY}", "boilerplate"),
        (SUMMARY, f"{BODY} >>> pressure(3)", "code"),
        ("Reads what https://example.org says", BODY, "code"),
        (SUMMARY, "a=1 b=2 c=3 d=4 e=5 f=6 g=7 h=8 i=9 j=10 k=11 l=12", "not prose"),
        (SUMMARY, BODY.replace("pipe", "tuyau fêlé"), "not ASCII"),
        (SUMMARY, f"It measures the pressure of a pipe. {BODY}", "summary in body"),
    ],
)
def test_each_filter_drops_its_example(summary, body, reason):
    assert docstring_text.reason_to_drop(summary, body) == reason


# ------------------------------------------------------------------- definitions


def _definitions(source: str) -> list[docstrings.Pair]:
    file = docstrings.SourceFile("pipes", "pipes.core", pathlib.Path("unused"))
    found = docstrings.read_definitions(file, textwrap.dedent(source))
    return [pair for pair, _ in found]


def test_names_and_parameters_of_nested_definitions():
    pairs = _definitions(
        '''
        """The module's own docstring is not a definition's."""
        if True:
            def early(a, /, b, *rest, c=1, **more): "Early one."
        class Pipe:
            """A pipe."""
            def __init__(self, length): "Makes it."
            @classmethod
            async def open(cls, path): "Opens it."
        def late(): "Late one."
        '''
    )
    assert [(pair.name, pair.parameters) for pair in pairs] == [
        ("pipes.core.early", ("a", "b", "*rest", "c", "**more")),
        ("pipes.core.Pipe", ("length",)),
        ("pipes.core.Pipe.__init__", ("length",)),
        ("pipes.core.Pipe.open", ("path",)),
        ("pipes.core.late", ()),
    ]


def test_prompt_shows_name_eight_parameters_and_body():
    pair = docstrings.Pair("p", "p.f", tuple("abcdefghij"), "Body.", "Summary")
    assert pair.prompt == "p.f(a, b, c, d, e, f, g, h, ...): Body."


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("pipes/core.py", "pipes.core"),
        ("pipes/__init__.py", "pipes"),
        ("single.py", "single"),
        ("pipes/tests/core.py", None),
        ("pipes/test_core.py", None),
        ("pipes/core_test.py", None),
        ("pipes/conftest.py", None),
        ("pipes/_vendor/other.py", None),
        ("pipes/message_pb2.py", None),
        ("pipes/ops/gen_math_ops.py", None),
        ("nlhf_jax/checks.py", None),
        ("../outside/core.py", None),
        ("pipes/not-a-module.py", None),
        ("pipes/latest.py", "pipes.latest"),
    ],
)
def test_which_files_are_read(tmp_path, path, module):
    source = docstrings.source_file(tmp_path, pathlib.Path(path))
    assert (source and source.module) == module
    if source:
        assert source.package == module.split(".")[0]


# ------------------------------------------------------------------------- corpus


def _write_package(root, package, functions) -> docstrings.SourceFile:
    path = root / package / "__init__.py"
    path.parent.mkdir(parents=True)
    parts = [
        f'def f{number}(x):\n    """{summary}.\n\n    {body}\n    """\n'
        for number, (summary, body) in enumerate(functions)
    ]
    path.write_text("\n".join(parts))
    ast.parse(path.read_text())
    return docstrings.source_file(root, path.relative_to(root))


def _unique(package, number):
    return (
        f"Measures pipe {number} of the {package}",
        f"The {package} has {number} valves. {BODY}",
    )


def _packages(root, sizes):
    return [
        _write_package(root, name, [_unique(name, i) for i in range(size)])
        for name, size in sizes.items()
    ]


def test_corpus_keeps_order_and_counts_what_it_drops(tmp_path):
    files = _packages(tmp_path, {"alpha": 2, "beta": 1})
    files += [
        _write_package(
            tmp_path,
            "gamma",
            [
                (_unique("alpha", 0)[0].upper(), _unique("gamma", 0)[1]),
                (_unique("gamma", 1)[0], _unique("beta", 0)[1]),
                ("Too short", BODY),
            ],
        ),
        docstrings.SourceFile("lost", "lost", tmp_path / "lost.py"),
    ]
    for name, content in {
        "latin": b"x = '\xe9'\n",
        "broken": b"def (\n",
        "made": b"# Automatically generated by a tool\ndef f(): 'Doc.'\n",
    }.items():
        (tmp_path / f"{name}.py").write_bytes(content)
        files.append(docstrings.source_file(tmp_path, pathlib.Path(f"{name}.py")))
    corpus = docstrings.read_corpus(files)
    names = [pair.name for pair in corpus.pairs]
    assert names == ["alpha.f0", "alpha.f1", "beta.f0"]
    assert corpus.counts == {
        "files": 7,
        "files unreadable": 2,
        "files not parsed": 1,
        "files generated": 1,
        "pairs": 3,
        "dropped: seen before": 2,
        "dropped: summary length": 1,
        "signatures": 0,
    }
    assert docstrings.read_corpus(files) == corpus


def _place(package):
    return hashlib.sha256(package.encode()).hexdigest()


def test_no_package_and_no_text_stands_in_both_splits(tmp_path):
    sizes = {f"package{number}": 1 + number % 3 for number in range(60)}
    # The name whose turn to be held out would come first, were it not for its size.
    large = min((f"large{number}" for number in range(2000)), key=_place)
    assert large == min([large, *sizes], key=_place)
    sizes[large] = 40
    corpus = docstrings.read_corpus(_packages(tmp_path, sizes))
    splits = docstrings.split_pairs(corpus.pairs)
    num_own = len(splits["train"]) + len(splits["evaluation"])
    assert num_own == len(corpus.pairs) == sum(sizes.values())
    for field in ("package", "body", "summary"):
        train, evaluation = (
            {getattr(pair, field) for pair in splits[split]}
            for split in ("train", "evaluation")
        )
        assert not train & evaluation
    # 8 % of 160 pairs is 12.8; the last package taken has at most 3 pairs.
    assert 13 <= len(splits["evaluation"]) <= 15
    assert large in {pair.package for pair in splits["train"]}


def test_held_out_packages_depend_on_names_not_on_order(tmp_path):
    sizes = {f"package{number}": 1 for number in range(60)}
    pairs = docstrings.read_corpus(_packages(tmp_path, sizes)).pairs
    held_out = docstrings.evaluation_packages(pairs)
    assert held_out == docstrings.evaluation_packages(pairs[::-1])
    assert len(held_out) == 5  # the first number of at least 8 % of 60


def test_definitions_without_a_body_are_kept_apart_and_out_of_evaluation(tmp_path):
    sizes = {f"package{number}": 1 for number in range(60)}
    files = _packages(tmp_path, sizes)
    held_out = docstrings.evaluation_packages(docstrings.read_corpus(files).pairs)
    used = _unique("package3", 0)[0]  # stands in a pair already
    for package in ("package0", *sorted(held_out)[:1], "package3"):
        more = tmp_path / package / "more.py"
        summary = used if package == "package3" else f"Opens all valves of {package}"
        more.write_text(f"def g(a, b):\n    '{summary}.'\n")
        files.append(docstrings.source_file(tmp_path, more.relative_to(tmp_path)))
    corpus = docstrings.read_corpus(files)
    assert len(corpus.pairs) == 60
    assert [pair.package for pair in corpus.signatures] == [
        "package0",
        sorted(held_out)[0],
    ]
    splits = docstrings.split_pairs(corpus.pairs, corpus.signatures)
    assert [pair.prompt for pair in splits["signatures"]] == ["package0.more.g(a, b):"]


def test_quotes_want_words_of_the_body_under_their_label():
    body = " ".join(f"w{number}" for number in range(1, 23))
    pair = docstrings.Pair("p", "p.f", ("a",), body, "Opens it")
    first, later = docstrings.quotes(pair)
    assert first.prompt == f"Quote: p.f(a): {body}"
    assert first.summary == " ".join(f"w{number}" for number in range(1, 17))
    assert later.prompt == f"Quote on: p.f(a): {body}"
    assert later.summary == " ".join(f"w{number}" for number in range(7, 23))
    shorter = dataclasses.replace(pair, body=body.rsplit(" ", 1)[0])
    assert docstrings.quotes(shorter) == [dataclasses.replace(first, body=shorter.body)]
    assert docstrings.quotes(dataclasses.replace(pair, body="w1 w2")) == []


# -------------------------------------------------------------- what is installed


def test_lock_file_limits_the_distributions(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# made by hand\nNumPy==1.0 \\\n    --hash=sha256:00\nnot.there==2\n"
    )
    assert docstrings.read_lock_file(str(lock)) == {"numpy", "not-there"}
    assert list(docstrings.installed_distributions(str(lock))) == ["numpy"]
    assert docstrings.digest(str(lock)) != docstrings.digest()


def test_digest_changes_with_a_version(monkeypatch):
    versions = {"numpy": "2.0"}
    monkeypatch.setattr(docstrings, "installed_distributions", lambda _: versions)
    before = docstrings.digest()
    assert docstrings.digest() == before
    versions["numpy"] = "2.1"
    assert docstrings.digest() != before


@pytest.mark.parametrize("content", [None, b"", b"numpy>=1\n", b"\xff\xfe"])
def test_wrong_lock_file_is_a_user_error(tmp_path, content):
    lock = tmp_path / "requirements.lock"
    if content is not None:
        lock.write_bytes(content)
    with pytest.raises(UserError, match=r"requirements\.lock"):
        docstrings.read_lock_file(str(lock))
