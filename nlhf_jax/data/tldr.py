# SPDX-License-Identifier: Apache-2.0
"""Human comparisons of summaries of Reddit posts, from files the user has.

Source: Stiennon et al., 2020, "Learning to summarize from human feedback", arXiv
2009.01325: a folder of `batch*.json`, each a file of JSON lines

    {"info": {"subreddit", "title", "post", ...}, "summaries": [{"text"}, {"text"}],
     "choice": 0 or 1, "split": "train", "valid1" or "valid2", ...}

Lines about news articles (no `post`) are passed over.
"""

from typing import Any

from nlhf_jax.checks import UserError, expanded
from nlhf_jax.data import jsonl
from nlhf_jax.settings import DataSettings


def prompt_of(info: dict[str, Any]) -> str:
    """Returns the post with its subreddit and title, what a model reads."""
    parts = (
        f"SUBREDDIT: r/{info.get('subreddit') or ''}",
        f"TITLE: {info.get('title') or ''}",
        f"POST: {info['post']}",
    )
    return " ".join(" ".join(parts).split())


def _comparison(line: dict[str, Any], where: str) -> jsonl.Row:
    """Returns a line as a row of comparison with its split and post in `group`."""
    try:
        row = {
            "prompt": prompt_of(line["info"]),
            "response_a": line["summaries"][0]["text"].strip(),
            "response_b": line["summaries"][1]["text"].strip(),
            "preference": {0: 1.0, 1: 0.0}[line["choice"]],
            "split": "train" if line.get("split") == "train" else "evaluation",
        }
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: is no comparison with info.post, two summaries and choice 0 or "
            f"1 ({type(error).__name__}: {error})"
        ) from None
    return jsonl.check_row(row, jsonl.COMPARISON_FIELDS, where)


def read_comparisons(folder: str) -> dict[str, list[jsonl.Row]]:
    """Returns the comparisons of a folder by split.

    Posts that stand in the training split are left out of evaluation.

    Raises:
      UserError: no such folder, no batch*.json in it, or a line that is wrong.
    """
    if not folder:
        raise UserError("task 'tldr' reads a folder of batch*.json: set data_dir")
    files = sorted(expanded("data_dir", folder).glob("batch*.json"))
    if not files:
        raise UserError(f"data_dir {folder!r} must be a folder with batch*.json files")
    rows = []
    for file in files:
        for line, where in jsonl.parsed_lines(str(file)):
            info = line.get("info") if isinstance(line, dict) else None
            if not (
                isinstance(info, dict) and "article" in info and not info.get("post")
            ):
                rows.append(_comparison(line, where))
    if not rows:
        raise UserError(
            f"data_dir {folder!r} holds no comparison of summaries of posts"
        )
    trained = {row["prompt"] for row in rows if row["split"] == "train"}
    return {
        "train": [row for row in rows if row["split"] == "train"],
        "evaluation": [
            row
            for row in rows
            if row["split"] == "evaluation" and row["prompt"] not in trained
        ],
    }


def comparison_splits(settings: DataSettings) -> dict[str, list[jsonl.Row]]:
    """Returns the comparisons in `settings.data_dir` by split."""
    return read_comparisons(settings.data_dir)


def prompt_splits(settings: DataSettings) -> dict[str, list[jsonl.Row]]:
    """Returns each post once, with the summary preferred in its first comparison."""
    splits = {}
    for split, rows in read_comparisons(settings.data_dir).items():
        first = {}
        for row in rows:
            preferred = row["response_a" if row["preference"] == 1 else "response_b"]
            first.setdefault(row["prompt"], preferred)
        splits[split] = [{"prompt": p, "target": t} for p, t in first.items()]
    return splits
