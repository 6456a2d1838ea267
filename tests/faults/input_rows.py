# SPDX-License-Identifier: Apache-2.0
"""Faults of what is read: bad data, bad configuration, hostile names, secrets."""

import contextlib
import functools
import io
import json
import os
import pathlib
import random
import shlex
import subprocess
import sys
import time

from launch import submit
from nlhf_jax import cli
from tests.faults import bad_input_test, fuzz
from tests.faults.rows import Row, Trial
from tests.jobs_test import RUN, TINY
from tests.launch_cloud_test import HISTORIES

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CANARY = "canary-5f1d0c7e9a"
SECRETS = (
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "WANDB_API_KEY",
    "MY_OWN",
    "GIN_SECRET",
)


# ------------------------------------------------------------------- 14: bad inputs


def data_case(name: str, folder: pathlib.Path) -> tuple[list[str], str]:
    """Returns the words of a job that reads a bad file, and what it has to say."""
    file = folder / "mine.jsonl"
    if name in bad_input_test.LINES:
        bad, expected = bad_input_test.LINES[name]
        first = bad_input_test.line(id="first")
        content = b"\n".join([first, bad, bad_input_test.GOOD])
    else:
        content, expected = bad_input_test.FILES[name]
    if content is not None:
        file.write_bytes(content)
    text = f"include 'configs/runs/preference.gin'\n{TINY}{RUN}"
    (folder / "run.gin").write_text(
        f"{text}GROUP_FIELD = 'prompt'\nTRAIN_FILE = '{file}'\n"
    )
    return ["preference", f"--gin_file={folder}/run.gin"], expected


LINES_OF_GIN = {
    "misspelt function": ("self_pley.tau = 0.1", "did you mean 'self_play'?"),
    "misspelt parameter": ("self_play.taw = 0.1", "did you mean 'tau'?"),
    "misspelt macro": ("self_play.tau = %TAUU", "did you mean 'TAU'?"),
    "macro nobody reads": ("TAUU = 0.1", "nothing reads the macro TAUU"),
    "binding nobody reads": ("nash_md_pg.tau = 0.1", "nothing in 'train' reads"),
    "wrong type": ("TRAIN_STEPS = 'many'", "must be an integer, got 'many'"),
    "out of range": ("TAU = -1.0", "tau must be in [0.0, inf), got -1.0"),
    "missing include": ("include 'configs/runs/trian.gin'", "does not exist (did you"),
    "an import": ("import os", "import os is refused"),
    "no value": ("TAU = (1", "is not a literal"),
}


def configuration_case(name: str, folder: pathlib.Path) -> tuple[list[str], str]:
    """Returns the words of a job with a bad line of gin, and what it has to say."""
    bad, expected = LINES_OF_GIN[name]
    (folder / "run.gin").write_text(
        f"include 'configs/algorithms/self_play.gin'\nREFERENCE_CHECKPOINT = 'r'\n"
        f"PREFERENCE_CHECKPOINT = 'p'\n{bad}\n"
    )
    return ["train", f"--gin_file={folder}/run.gin"], expected


CASES = [
    *(functools.partial(data_case, name) for name in bad_input_test.LINES),
    *(functools.partial(data_case, name) for name in bad_input_test.FILES),
    *(functools.partial(configuration_case, name) for name in LINES_OF_GIN),
]


def bad_input(seed: int, folder: pathlib.Path) -> Trial:
    """Runs one bad input through the command line, before anything is built."""
    words, expected = CASES[seed * 7 % len(CASES)](folder)
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*words, f"--model_dir={folder}/out"])
    figures = {"time to the sentence, s": time.monotonic() - began}
    said = err.getvalue()
    if code != cli.USAGE_EXIT or said.count("\n") != 1 or "Traceback" in said:
        return Trial(f"exit code {code}, said {said!r}", figures)
    if expected not in said or (folder / "out").exists():
        return Trial(f"{expected!r} is not in {said!r}, or a folder was made", figures)
    return Trial(figures=figures)


# ------------------------------------------------------------------------ 15: fuzzed


def fuzzed(seed: int, folder: pathlib.Path) -> Trial:
    """Gives one of the readers made-up inputs, the next one with the next seed."""
    del folder
    name = list(fuzz.TARGETS)[seed % len(fuzz.TARGETS)]
    number = 250
    fuzz.run(name, number, seed)
    return Trial(figures={"inputs": number})


# ------------------------------------------------------------- 17: the launcher's story


def history(seed: int, folder: pathlib.Path) -> Trial:
    """Plays one of the scripted histories of the fake cloud."""
    name = list(HISTORIES)[seed % len(HISTORIES)]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-p"]
    command += ["no:cacheprovider", f"--basetemp={folder}/t"]
    test = f"tests/launch_cloud_test.py::test_history[{name}]"
    done = subprocess.run([*command, test], cwd=ROOT, capture_output=True, text=True)
    is_played = done.returncode == 0 and "1 passed" in done.stdout
    return Trial("" if is_played else f"{name}: {done.stdout[-500:]}")


# ------------------------------------------------------------------ 18: hostile names


PIECES = ("$(touch x)", "`touch x`", ";touch x;", "&&touch x", "|touch x", ">x", "\n")
PIECES += ("'", '"', "\\", "../..", "/etc/passwd", "-rf", "--zone=q", "~", "*", " ")
PIECES += ("\u202e", "Ä", "a", "B9", "%s", "${HOME}", "#", "!", "=", "\t")
BACKENDS = (
    ["--backend=local", "--python=/bin/true"],
    ["--backend=tpu_vm", "--zone=z", "--accelerator_type=v4-8", "--version=v"],
    ["--backend=gce", "--zone=z", "--machine_type=a3-highgpu-8g"],
    ["--backend=gke", "--image=i", "--machine=tpu-v4-podslice", "--topology=2x2x1"],
)


def hostile_name(seed: int, folder: pathlib.Path) -> Trial:
    """Plans a job of a hostile name, with a hostile word, on every backend."""
    rng = random.Random(seed)
    name = "".join(rng.choices(PIECES, k=rng.randint(1, 5)))
    word = "--model_dir=" + "".join(rng.choices(PIECES, k=3)).replace("\n", "")
    plans = 0
    for flags in BACKENDS:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = submit.main([*flags, f"--name={name}", "--dry_run", "--", "train"])
            if code == 0:
                code = submit.main([*flags, "--dry_run", "--", "train", word])
        if code == 2 and err.getvalue().startswith("submit: "):
            continue  # refused
        if code != 0:
            return Trial(f"{flags[0]} ended with {code}: {err.getvalue()}")
        plans += 1
        if flags[0] != "--backend=gke" and not _is_one_word(word, out.getvalue()):
            return Trial(f"{flags[0]}: {word!r} is no word of {out.getvalue()!r}")
    left = [path.name for path in folder.iterdir() if path.name != "logs"]
    return Trial(f"left behind: {left}" if left else "", {"plans": plans})


def _is_one_word(word: str, plan: str, depth: int = 2) -> bool:
    """Whether a plan of commands has the word whole, also in a command inside one."""
    words = shlex.split(plan)
    if word in words:
        return True
    inner = [one.partition("=")[2] or one for one in words if " " in one]
    return depth > 0 and any(_is_one_word(word, one, depth - 1) for one in inner)


# ------------------------------------------------------------------------ 19: secrets


def occurrences(folder: pathlib.Path) -> list[str]:
    """Returns the files under a folder that hold the canary."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in found if CANARY.encode() in path.read_bytes()]


def secret(seed: int, folder: pathlib.Path) -> Trial:
    """Runs a job, and a wrong one, with a secret under five names."""
    del seed
    rows = [{"prompt": f"say {word}", "target": word} for word in ("one", "two", "six")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "sft.gin").write_text(
        f"include 'configs/runs/sft.gin'\n{TINY}{RUN}GROUP_FIELD = 'prompt'\n"
        f"TRAIN_FILE = '{folder}/rows.jsonl'\nTRAIN_STEPS = 3\n"
    )
    secrets = dict.fromkeys(SECRETS, CANARY) | {"NLHF_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "nlhf_jax", "sft"]
    command += [f"--gin_file={folder}/sft.gin", f"--model_dir={folder}/run"]
    for more, expected in (("--dry_run", 0), ("", 0), ("--gin.BATCH_SIZE=-1", 2)):
        done = subprocess.run(
            [*command, *([more] if more else [])],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | secrets,
            timeout=240,
        )
        if done.returncode != expected:
            return Trial(f"exit code {done.returncode}: {done.stderr[-500:]}")
        if CANARY in done.stdout + done.stderr:
            return Trial("it was printed")
    if not (folder / "run" / "metrics.jsonl").is_file():
        return Trial("the run wrote no metrics")
    written = sum(path.is_file() for path in folder.rglob("*"))
    found = occurrences(folder)
    (folder / "planted").write_text(CANARY)
    if len(occurrences(folder)) != len(found) + 1:
        return Trial("a planted secret is not found")
    return Trial(f"written to {found}" if found else "", {"files read": written})


ROWS = (
    Row(
        14,
        "one sentence",
        f"bad data and configuration, {len(CASES)} kinds",
        5,
        len(CASES),
        bad_input,
        "one line with its place, code 2, nothing written, < 5 s",
        {"time to the sentence, s": ("max", 5.0)},
    ),
    Row(
        15,
        "fuzzed readers",
        "250 made-up inputs to one of four readers",
        4,
        400,
        fuzzed,
        "a valid result or one sentence",
    ),
    Row(
        17,
        "the launcher's stories",
        f"{len(HISTORIES)} scripted histories of a fake cloud",
        1,
        len(HISTORIES),
        history,
        "the right calls, nothing left, never two trainers",
    ),
    Row(
        18,
        "hostile names",
        "a made-up name and word on every backend",
        5,
        200,
        hostile_name,
        "refused, made safe or quoted; nothing runs",
    ),
    Row(
        19,
        "secrets",
        "a canary under five names of the environment",
        1,
        1,
        secret,
        "no occurrence in any file or output",
    ),
)
