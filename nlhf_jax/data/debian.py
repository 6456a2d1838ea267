# SPDX-License-Identifier: Apache-2.0
"""Package descriptions of Debian -> their synopses, fetched through the local apt.

apt reads its own sources and checks their signatures; nothing of the system changes,
because its lists go to a private folder. Packages of one source package stand in one
split. The descriptions fall under each package's own free licence: build the corpus,
don't redistribute it.
"""

import collections
import getpass
import hashlib
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping

from nlhf_jax.checks import UserError, expanded
from nlhf_jax.data import jsonl
from nlhf_jax.data.tensorflow_setup import cache_folder, progress_bar
from nlhf_jax.settings import DataSettings

TEXT_WORDS = (20, 300)
SYNOPSIS_WORDS = (3, 14)
TRAIN_PERCENT = 90
_APT_HELPER = "/usr/lib/apt/apt-helper"

_LANGUAGE_PACK = re.compile(
    r"-l10n\b|-i18n\b|-locales?\b|-lang(uage)?-|-help-[a-z]{2}\b|^(hunspell|aspell|"
    r"myspell|hyphen|mythes|ispell|wordlist|tesseract-ocr|task|manpages|"
    r"kde-l10n|language-pack|libreoffice-help|debian-reference)-[a-z]{2,3}(-|$)|"
    r"^(hunspell|aspell|myspell|mythes|task|tesseract-ocr)-"
)
_TOOLCHAIN = re.compile(
    r"-(linux-gnu|linux-musl|mingw|gnueabi|elf\b|cross\b)|"
    r"^(gcc|g\+\+|cpp|gfortran|gnat|gdc|gobjc|gobjc\+\+|gm2|gccgo|llvm|clang|lld|lldb|"
    r"libclang|libllvm|linux-(image|headers|modules))-[\d.]+"
)
_EMPTY_PACKAGE = re.compile(
    r"transitional|meta-?package|dummy package|debug(ging)? (symbols|info|package)|"
    r"this is an? (empty|dependency|virtual) package|depends on the (latest|default)",
    re.I,
)
_SECTIONS = ("metapackages", "introspection", "oldlibs", "debug")


def read_records(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields the stanzas of a Debian control file as {field: value}.

    Package: hello                      {"Package": "hello",
    Description-en: greets         ->    "Description-en": "greets\\n Says hello."}
     Says hello.
    """
    record: dict[str, str] = {}
    field = ""
    for line in [*lines, ""]:
        line = line.rstrip("\n")
        if not line.strip():
            if record:
                yield record
            record, field = {}, ""
        elif line[0] in " \t":
            if field:
                record[field] += "\n" + line
        else:
            field, _, value = line.partition(":")
            record[field] = value.strip()


def read_description(record: Mapping[str, str]) -> tuple[str, list[str]]:
    """Returns (synopsis, paragraphs); a paragraph's lines are joined.

    Lines that begin with two blanks are shown verbatim by Debian (lists, code); they
    are joined too, without the blanks.
    """
    synopsis, *lines = record.get("Description-en", "").split("\n")
    text = "\n".join("" if line.strip() == "." else line for line in lines)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return " ".join(synopsis.split()), [part for part in paragraphs if part]


def reason_to_drop(package: str, section: str, synopsis: str, text: str) -> str:
    """Returns the name of the first filter a description fails, or an empty string."""
    words, synopsis_words = len(text.split()), len(synopsis.split())
    tests = {
        "text too short": words < TEXT_WORDS[0],
        "librust": package.startswith("librust-"),
        "language pack": _LANGUAGE_PACK.search(package),
        "empty package": _EMPTY_PACKAGE.search(f"{synopsis} {text}"),
        "toolchain copy": _TOOLCHAIN.search(package),
        "debug": re.search(r"-dbg(sym)?$", package),
        "section": section.rpartition("/")[2] in _SECTIONS,
        "synopsis length": not SYNOPSIS_WORDS[0] <= synopsis_words <= SYNOPSIS_WORDS[1],
        "text too long": words > TEXT_WORDS[1],
    }
    return next((name for name, failed in tests.items() if failed), "")


def make_pairs(
    descriptions: Iterable[Mapping[str, str]], packages: Iterable[Mapping[str, str]]
) -> tuple[list[jsonl.Row], dict[str, int]]:
    """Returns the pairs that pass every filter, by package name, and the counts.

    One pair is kept of those with the same text, first paragraph or synopsis.

    Args:
      descriptions: records with Package, Description-md5 and Description-en.
      packages: records with Package, Source and Section.
    """
    known = {record["Package"]: record for record in packages if "Package" in record}
    counts: collections.Counter[str] = collections.Counter()
    rows, seen = [], set()
    for record in sorted(descriptions, key=lambda r: r.get("Package", "")):
        package = record.get("Package", "")
        facts = known.get(package, {})
        synopsis, paragraphs = read_description(record)
        text = " ".join(paragraphs)
        reason = reason_to_drop(package, facts.get("Section", ""), synopsis, text)
        keys = {("synopsis", synopsis.lower()), ("text", "".join(paragraphs[:1]))}
        if not reason and keys & seen:
            reason = "seen before"
        counts["records"] += 1
        counts[f"dropped: {reason}" if reason else "pairs"] += 1
        if not reason:
            seen |= keys
            source = facts.get("Source", package).split(" ")[0] or package
            rows.append({"prompt": text, "target": synopsis, "source": source})
    return rows, dict(counts)


def split_of(source: str) -> str:
    """Returns the split of a source package: sha256 of its name modulo 100."""
    place = int(hashlib.sha256(source.encode()).hexdigest(), 16) % 100
    return "train" if place < TRAIN_PERCENT else "evaluation"


# -------------------------------------------------------------------------- fetching


def fetch_pairs() -> tuple[list[jsonl.Row], dict[str, int]]:
    """Fetches the descriptions (16 MB) with apt-get into a folder that is deleted.

    Raises:
      UserError: there is no apt, or it fetched no descriptions.
    """
    if not _has_apt():
        raise UserError(
            "task 'debian' reads package descriptions through apt-get, which this "
            "system has not: use 'docstrings' or 'jsonl'"
        )
    with tempfile.TemporaryDirectory() as folder:
        lists = _update(pathlib.Path(folder))
        descriptions = _read_lists(lists, "*Translation-en*")
        if not descriptions:
            raise UserError("task 'debian': apt-get fetched no package descriptions")
        return make_pairs(descriptions, _read_lists(lists, "*_Packages*"))


def is_available(settings: DataSettings) -> bool:
    """Returns whether there is apt, or a corpus that was fetched before."""
    return _has_apt() or _corpus_path(settings).exists()


def _has_apt() -> bool:
    return bool(shutil.which("apt-get")) and pathlib.Path(_APT_HELPER).exists()


def _corpus_path(settings: DataSettings) -> pathlib.Path:
    folder = settings.data_dir or cache_folder(settings.cache_dir) / "debian"
    return expanded("data_dir", folder) / "debian.jsonl.gz"


def _update(folder: pathlib.Path) -> pathlib.Path:
    lists, archives = folder / "lists", folder / "cache" / "archives"
    for made in (lists / "partial", archives / "partial"):
        made.mkdir(parents=True)
    options = {
        "Acquire::Languages": "en",
        "Dir::State::lists": lists,
        "Dir::Cache": archives.parent,
        "APT::Sandbox::User": getpass.getuser(),
    }
    command = ["apt-get", *(f"-o{key}={value}" for key, value in options.items())]
    done = subprocess.run(
        [*command, "update"], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(
            f"task 'debian': apt-get update failed (use 'docstrings' where there is no "
            f"network): {lines[-1]}"
        )
    return lists


def _read_lists(lists: pathlib.Path, pattern: str) -> list[dict[str, str]]:
    records = []
    for path in sorted(lists.glob(pattern)):
        done = subprocess.run(
            [_APT_HELPER, "cat-file", str(path)], capture_output=True, check=True
        )
        records += read_records(done.stdout.decode("utf-8", "replace").split("\n"))
    return records


def splits(settings: DataSettings) -> dict[str, list[jsonl.Row]]:
    """Returns the pairs by split; they are fetched once and then read from a file.

    The file is `debian.jsonl.gz` in `data_dir`, or in the cache's folder `debian`.

    Raises:
      UserError: there is no apt, or it failed.
    """
    path = _corpus_path(settings)
    if not path.exists():
        for _ in progress_bar("Fetching package descriptions")([0]):
            jsonl.write_rows(str(path), fetch_pairs()[0])
    rows = jsonl.read_rows(str(path), jsonl.PROMPT_FIELDS, "source")
    named = [(split_of(row["source"]), row) for row in rows]
    return {
        split: [row for name, row in named if name == split]
        for split in ("train", "evaluation")
    }


def main() -> None:
    """Fetches the corpus and prints the counts, one `name: number` a line."""
    rows, counts = fetch_pairs()
    for name, number in sorted(counts.items()):
        print(f"{name}: {number}")
    for split, number in collections.Counter(
        split_of(row["source"]) for row in rows
    ).items():
        print(f"{split}: {number} pairs")


if __name__ == "__main__":
    main()
