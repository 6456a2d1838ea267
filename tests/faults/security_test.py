# SPDX-License-Identifier: Apache-2.0
"""What a file of somebody else's could do: run, escape, leak. None of it may."""

import ast
import html.parser
import pathlib
import sys

import numpy as np
import pytest

from nlhf_jax import cli, gin_bindings, gin_lint
from nlhf_jax.checks import UserError, check_folder_name
from nlhf_jax.evaluation import report
from nlhf_jax.evaluation.tournament import win_rates
from tests.faults.bad_input_test import one_sentence

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SHIPPED = "nlhf_jax/pretrained/docstrings_t5"

# ------------------------------------------------------------- calls nobody may make

UNPICKLING = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch"}
RUNNING = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
PROCESSES = {"run", "Popen", "call", "check_call", "check_output"}


def dotted(node: ast.AST) -> str:
    """Returns `a.b.c` of an expression, "" for another one."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults_of(call: ast.Call) -> list[str]:
    """Returns what is wrong with one call."""
    name, found = dotted(call.func), []
    given = {word.arg: word.value for word in call.keywords}
    first = call.args[0] if call.args else None
    if name in RUNNING | SHELLS or name.endswith("yaml.load"):
        found.append(f"{name} runs text")
    shell = given.get("shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and not shell.value):
        found.append("shell=True")
    is_process = name.startswith("subprocess.") and name.split(".")[-1] in PROCESSES
    if is_process and isinstance(first, ast.Constant | ast.JoinedStr | ast.BinOp):
        found.append(f"{name} is given text, not a list of words")
    if name.endswith(("np.load", "numpy.load")):
        pickles = given.get("allow_pickle")
        if not isinstance(pickles, ast.Constant) or pickles.value is not False:
            found.append("np.load without allow_pickle=False")
    if name.split(".")[-1] in ("extractall", "extract"):
        how = given.get("filter")
        if not isinstance(how, ast.Constant) or how.value != "data":
            found.append(f"{name} without filter='data'")
    return found


def faults(source: str) -> list[str]:
    """Returns the calls and imports of a source that nobody may make."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [n for n in names if n.split(".")[0] in UNPICKLING]
        if isinstance(node, ast.Call):
            found += faults_of(node)
    return found


def sources() -> list[pathlib.Path]:
    folders = ("nlhf_jax", "launch", "benchmarks")
    return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


# `--check` has transformers load safetensors; torch only counts there, and in what is
# compared with it.
COUNTS_WITH_TORCH = ("nlhf_jax/conversion/agreement.py", "benchmarks/")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_run_or_given_to_a_shell(path):
    found = faults(path.read_text(encoding="utf-8"))
    if str(path.relative_to(ROOT)).startswith(COUNTS_WITH_TORCH):
        assert "torch.load" not in path.read_text(encoding="utf-8")
        found = [fault for fault in found if fault != "torch"]
    assert found == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", "pickle"),
        ("from torch import load", "torch"),
        ("eval(x)", "eval runs text"),
        ("os.system(f'rm {x}')", "os.system runs text"),
        ("subprocess.run(x, shell=True)", "shell=True"),
        ("subprocess.run(x, shell=y)", "shell=True"),
        ("subprocess.run('ls ' + x)", "is given text"),
        ("subprocess.Popen(f'ls {x}')", "is given text"),
        ("np.load(x)", "np.load without"),
        ("np.load(x, allow_pickle=True)", "np.load without"),
        ("tar.extractall(x)", "without filter='data'"),
        ("tar.extractall(x, filter='tar')", "without filter='data'"),
        ("yaml.load(x)", "runs text"),
    ],
)
def test_each_of_them_would_be_seen(source, expected):
    (found,) = faults(source)
    assert expected in found


def test_a_file_with_a_pickle_in_it_is_refused(tmp_path):
    file = tmp_path / "answers.npz"
    np.savez(file, tokens_BT=np.array([print], dtype=object))
    with (
        np.load(file, allow_pickle=False) as answers,
        pytest.raises(ValueError, match="allow_pickle"),
    ):
        answers["tokens_BT"]


# --------------------------------------------------------------------------- imports


def gin_file(tmp_path, *lines: str) -> str:
    text = "include 'configs/runs/sft.gin'\n" + "\n".join(lines) + "\n"
    (tmp_path / "run.gin").write_text(text)
    return f"--gin_file={tmp_path}/run.gin"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module on the path; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_for_the_test.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    )
    yield "mine_for_the_test"
    sys.modules.pop("mine_for_the_test", None)


def test_an_import_is_refused_and_does_not_run(tmp_path, capsys, module):
    words = (gin_file(tmp_path, f"import {module}"), "--model_dir=x", "--dry_run")
    sentence = one_sentence(capsys, "sft", *words)
    assert sentence == (
        f"{tmp_path}/run.gin:2: import {module} is refused, since a module that is "
        "imported runs: a configuration may import nlhf_jax, seqio, and with "
        f"--allow_import={module} also this"
    )
    assert not (tmp_path / "ran").exists()


def test_an_import_that_is_allowed_runs(tmp_path, capsys, module):
    words = (gin_file(tmp_path, f"import {module}"), "--model_dir=x")
    assert cli.main(["sft", *words, f"--allow_import=a,{module}", "--dry_run"]) == 0
    assert (tmp_path / "ran").exists()
    assert capsys.readouterr().err == ""


def test_an_import_that_fails_is_one_sentence(tmp_path, capsys, module):
    (tmp_path / "mine_for_the_test.py").write_text("raise KeyError('a\\nb')\n")
    words = (gin_file(tmp_path, f"import {module}"), "--model_dir=x", "--dry_run")
    sentence = one_sentence(capsys, "sft", *words, f"--allow_import={module}")
    assert f"run.gin:2: import {module} failed: KeyError: " in sentence


def test_what_an_allowed_module_registers_can_be_bound(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "shapes_for_the_test.py").write_text(
        "import gin\nfrom nlhf_jax.t5_settings import T5Settings\n\n"
        "@gin.configurable\ndef small_shape(width: int = 8) -> T5Settings:\n"
        "    return T5Settings(384, width, 2, 4, 16, 1, 1)\n"
    )
    lines = ("import shapes_for_the_test", "MODEL = @small_shape()")
    allowed = {"allow_import": ["shapes_for_the_test"]}
    # The shape that the file brought is not used any more: what it binds is idle.
    text = (ROOT / "configs/runs/sft.gin").read_text()
    text = text.replace("include 'configs/models/t5_docstrings.gin'\n", "")
    file = tmp_path / "run.gin"
    for width, expected in (
        ("small_shape.width = 16", 16),
        ("small_shape.widht = 1", 0),
    ):
        file.write_text("\n".join([text, *lines, width, ""]))
        if expected:
            gin_bindings.load("sft", [str(file)], {"MODEL_DIR": "x"}, **allowed)
            found = gin_bindings.rehearse("sft")[0][1]["model"]
            assert found.emb_dim == expected
            continue
        with pytest.raises(UserError, match="small_shape has no parameter 'widht'"):
            gin_bindings.load("sft", [str(file)], {"MODEL_DIR": "x"}, **allowed)


@pytest.mark.parametrize("name", ["nlhf_jaxx", "os", "seqio_x", "nlhf", "subprocess"])
def test_only_whole_names_are_on_the_list(name):
    statement = gin_bindings.gin_files.Statement("import", name, "a.gin:1")
    with pytest.raises(UserError, match="is refused"):
        gin_lint.check_import(statement, ["torch"])
    gin_lint.check_import(statement, [name])


@pytest.mark.parametrize(
    "flag",
    [
        "--gin.train.algorithm=[@self_play()]\nimport os",
        "--gin.TAU=0.1\nimport os",
        "--gin.TAU\nimport os\nBETA=0.1",
        "--gin.import=os",
        "--gin.TAU=0.1\x85import os",
    ],
)
def test_a_flag_is_one_statement(flag, capsys):
    words = ("--gin_file=configs/algorithms/self_play.gin", flag, "--model_dir=x")
    words += ("--reference_checkpoint=r", "--dry_run")
    sentence = one_sentence(capsys, "train", *words)
    assert "must be on one line" in sentence or "is no name of a macro" in sentence


# ----------------------------------------------------------------------------- names


ESCAPES = [
    "../x",
    "/etc/x",
    "a/b",
    "..",
    ".",
    "",
    " ",
    ".hidden",
    "a\\b",
    "a\0b",
    "a\nb",
]


@pytest.mark.parametrize("name", [*ESCAPES, "x" * 101])
def test_a_name_cannot_leave_its_folder(name):
    with pytest.raises(UserError, match="must be a plain name for a folder"):
        check_folder_name("a name", name)


@pytest.mark.parametrize("name", ["RLHF", "best response", "EMA1*", "Nash-MD (β=0.25)"])
def test_a_plain_name_is_one(name):
    assert check_folder_name("a name", name) == name


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../b"])
def test_a_policy_of_a_pipeline_cannot_be_written_elsewhere(name, capsys, tmp_path):
    text = (ROOT / "configs/runs/quickstart.gin").read_text(encoding="utf-8")
    (tmp_path / "run.gin").write_text(text.replace("'best response'", repr(name)))
    words = (f"--gin_file={tmp_path}/run.gin", f"--model_dir={tmp_path}/run")
    for more in ((), ("--dry_run",)):
        sentence = one_sentence(capsys, "quickstart", *words, *more)
        assert "a name in policies must be a plain name for a folder" in sentence
        assert f"{tmp_path}/run.gin:" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "said",
    [
        {"policies": {"../x": None}},
        {"averages": {"../x": ("A", "average")}},
        {"averages": {"EMA1*": ("A", "../../x")}},
        {"sweeps": {"a/b": {"0.5": "A"}}},
        {"sweeps": {"beta": {"../0.5": "A"}}},
    ],
)
def test_no_name_of_a_reproduction_leaves_its_folder(said):
    with pytest.raises(UserError, match="must be a plain name for a folder"):
        gin_bindings.rehearsal.check("reproduce", said)


def test_what_is_printed_cannot_steer_a_terminal(capsys, tmp_path):
    assert cli.on_one_line("a\x1b[2Jb\n\n c\u202e") == "a\\x1b[2Jb c\\u202e"
    folder = f"{tmp_path}/a\x1b[2Jb"
    pathlib.Path(folder).touch()
    sentence = one_sentence(capsys, "sample", f"--checkpoint={folder}", "--prompt=x")
    assert "\x1b" not in sentence
    assert len(cli.on_one_line("x" * 10_000)) < 100


# --------------------------------------------------------------------------- the page

ATTACKS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "'><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% endfor %}{% endif %}{# x #}",
    "</td></tr></table></main></body></html>",
    "<!-- ",
    "</style><style>*{display:none}",
    "]]>&lt;b&gt;&amp;",
    "javascript:alert(1)",
    "\u202egnp.exe\0",
)


class Tags(html.parser.HTMLParser):
    """Counts elements and keeps the text and every attribute."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text.append(data)


def page(text: str) -> Tags:
    """Returns the report of a run in which all that a model or user says is `text`."""
    names = ("base", text)
    rates = win_rates(
        {name: [name] for name in names}, lambda first, second: np.full(8, 0.75)
    )
    data = report.ReportData(
        title=text,
        population=rates,
        baseline="base",
        nash=(text,),
        figures={text: report.PolicyFigures(1.0, 0.1)},
        raters={text: 1.0},
        examples=(report.Example(text, text, {"base": text, text: text}),),
        config=text,
        versions={text: text},
    )
    return Tags(report.render(data))


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_no_text_becomes_part_of_the_page(attack):
    plain, attacked = page("plain"), page(attack)
    assert attacked.tags == plain.tags
    assert attacked.attributes == plain.attributes
    assert "script" not in attacked.tags
    # It is shown as it is, and was not evaluated.
    assert "".join(attacked.text).count(attack) >= 6
