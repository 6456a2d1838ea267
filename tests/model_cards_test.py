# SPDX-License-Identifier: Apache-2.0
"""The card of an exported model: what it says, and what it must not."""

import json

import numpy as np
import pytest

from nlhf_jax.conversion.tensors import Weights, of_array
from nlhf_jax.jobs.model_cards import measured, model_card, without_places
from tests.conversion_toys import SHAPES, exported, model_folder

WEIGHTS = Weights(SHAPES["llama"], {"a/b": of_array(np.zeros((2, 3), np.float32))})
CONFIG = """# Macros:
MODEL_DIR = '/home/anna/runs/nash'
PREFERENCE_CHECKPOINT = '/mnt/disk 2/judges/pairwise_7'
RATER_URL = 'https://anna:hunter2@example.org/v1/chat'
API_KEY = 'sk-123456'
train.tau = 0.1
train.preference_checkpoint = %PREFERENCE_CHECKPOINT
data.files = ('~/texts/a.jsonl', 'gs://bucket/texts/b.jsonl', 'relative/c.jsonl')
text = '```'
"""
LINES = [
    {"step": 1, "train/loss": 3.0, "eval/kl": 9.0},
    {"step": 2, "train/loss": 2.0, "eval/kl": 0.5, "eval/win_rate_reference": 0.61},
    {"step": 3, "train/loss": 1.25},
]


@pytest.fixture
def run(tmp_path):
    """The folder of a run."""
    (tmp_path / "config.gin").write_text(CONFIG)
    text = "\n".join(map(json.dumps, LINES))
    (tmp_path / "metrics.jsonl").write_text(text + "\n{damaged\n[]\n")
    return tmp_path


def test_a_card_says_what_made_the_model_and_how_it_did(run):
    card = model_card("nash", run, WEIGHTS)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\n# nash\n" in card
    assert "A decoder-only model" in card and "in float32." in card
    assert "judged it in training: `pairwise_7`." in card
    # The last numbers, and evaluations since which there was none.
    assert "train/loss: 1.25\n" in card
    assert "eval/kl: 0.5\n" in card and "eval/win_rate_reference: 0.61\n" in card
    assert "train.tau = 0.1" in card


def test_a_card_of_an_older_step_has_its_numbers(run):
    card = model_card("nash", run, WEIGHTS, step=1)
    assert "train/loss: 3" in card and "eval/kl: 9" in card
    assert "1.25" not in card and "0.61" not in card


def test_a_card_names_no_folder_of_the_machine_and_no_password(run):
    card = model_card("nash", run, WEIGHTS)
    for hidden in ("/home", "anna", "hunter2", "sk-123456", "/mnt", "gs://", "~/"):
        assert hidden not in card, hidden
    assert "MODEL_DIR = 'nash'" in card
    assert "('a.jsonl', 'b.jsonl', 'relative/c.jsonl')" in card


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a = '/x/y/z'", "a = 'z'"),
        ("a = '~/y/z/'", "a = 'z'"),
        ("a = 'https://u:p@host/v1'", "a = 'v1'"),
        ("a = 'db://u:p@host'", "a = 'host'"),
        ("scope/name.value = 3 / 4", "scope/name.value = 3 / 4"),
        ("a.eta = 1e-3  # tau / 2", "a.eta = 1e-3  # tau / 2"),
        ("b.api_key = \\\n    'x'\nc = 1", "b.api_key = '(not shown)'\nc = 1"),
        ("My.Password='x'", "My.Password= '(not shown)'"),
        ("max_tokens = 5", "max_tokens = 5"),
        ("ACCESS_TOKEN = 'x'", "ACCESS_TOKEN = '(not shown)'"),
        ("HF_TOKEN = 'hf_x'", "HF_TOKEN = '(not shown)'"),
        ("a.private_key = 'x'", "a.private_key = '(not shown)'"),
        ("b.aws_access_key_id='x'", "b.aws_access_key_id= '(not shown)'"),
        ("hf_tokenizer = 'x'", "hf_tokenizer = 'x'"),
    ],
)
def test_places_are_shortened_and_secrets_left_out(text, shown):
    assert without_places(text) == shown


def test_no_text_of_a_run_becomes_markup(run):
    card = model_card("<b>*x*</b>\n# y", run, WEIGHTS)
    assert r"# \<b\>\*x\*\</b\> \# y" in card
    # The block's fence is longer than any in it.
    assert "````python\n" in card and card.rstrip().endswith("````")


def test_a_folder_without_a_run_has_a_short_card(tmp_path):
    card = model_card("x", tmp_path, WEIGHTS)
    assert "## Metrics" not in card and "## Configuration" not in card
    assert "judged" not in card


def test_lines_that_are_no_numbers_are_left_out():
    lines = ["", "null", '{"step": "x"}', '{"no_step": 1}', '{"step": 4, "a": 2}']
    assert measured("\n".join(lines), 9) == {"a": 2.0, "step": 4.0}
    assert measured("") == {}


def test_an_export_has_its_card(tmp_path):
    source = model_folder(tmp_path / "ours", "t5_1_1")
    (source / "config.gin").write_text("train.tau = 0.25\n")
    assert exported(source, tmp_path / "theirs") == 0
    card = (tmp_path / "theirs/README.md").read_text()
    assert "T5 encoder-decoder" in card and "train.tau = 0.25" in card
    assert str(tmp_path) not in card
