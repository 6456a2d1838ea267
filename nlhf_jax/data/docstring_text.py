# SPDX-License-Identifier: Apache-2.0
"""From a docstring to (summary, body), and the filters a pair must pass."""

import inspect
import re

SUMMARY_WORDS = (3, 16)
BODY_WORDS = (12, 120)


_SECTION = re.compile(
    r"(args?|arguments?|parameters?|params|attributes?|returns?|yields?|raises?|"
    r"examples?|usage|notes?|see also|references?|warnings?|todo|methods|keyword "
    r"arguments?|keyword args|kwargs|inputs?|outputs?|call arguments|input shape|"
    r"output shape|for example|e\.g\.|source|since|copyright|license)"
    r"(\s*\(.*\))?\s*:{0,2}\s*(\n|$)",
    re.I,
)
_FIELD = re.compile(r"(:\w+[^:\n]*:|@\w+|\.\. |>>>|```|\|\s|\+-|#)")
_PARAMETER = re.compile(r"[*`]*\w+[`]*\s*(\([^)\n]*\))?\s*:(\s|$)|[*`]*\w+[`]*\s+--?\s")
_BULLET = re.compile(r"([-*+\u2022]|\(?\d+[.)])\s")
_BOILERPLATE = re.compile(
    r"alias (for|of|to)\b|see (the )?(base|parent|super|`|help|documentation|doc|:)|"
    r"deprecated|\bdeprecat|inherited (from|docstring)|same as\b|auto-?generated|"
    r"copyright|licensed under|todo\b|fixme\b|internal use|wrapper (for|around)\b.*"
    r"\bsee\b|overrid(e|den)s? (the )?(base|parent)|\bobsolete\b|do not use\b|"
    r"lax-backend implementation|implements? (the )?abstract",
    re.I,
)
_BODY_BOILERPLATE = re.compile(
    r"this (function|method|class|op|symbol|module|argument|api) (is|has been|was) "
    r"deprecated|\bdeprecated\b|see base class|auto-?generated|licensed under|"
    r"permission is hereby|all rights reserved|automatically generated",
    re.I,
)
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)`'\"\]])[.!?](?=\s+[A-Z`'\"(:\[]|\s*$)")
_MARKUP = re.compile(r":[\w:]*`([^`]*)`_?_?|``([^`]*)``|`([^`]*)`_?_?")


def split_docstring(docstring: str) -> tuple[str, str]:
    """Returns (summary, body): the first sentence, and the prose that follows it.

    The body ends at the first section (Args, Parameters, Returns, Raises, Examples,
    ...), field, directive or list of parameters; code and lists are left out.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    summary, rest = _first_sentence(_one_line(paragraphs[0]))
    prose = [rest] if rest else []
    if _first_section_line(paragraphs[0]) is not None:
        return summary, ""
    for paragraph in paragraphs[1:]:
        kept, ends = _prose(paragraph)
        if kept:
            prose.append(kept)
        if ends:
            break
    body = " ".join(prose)
    while len(prose) > 1 and len(body.split()) > BODY_WORDS[1]:
        prose.pop()
        body = " ".join(prose)
    return summary, _without_introduction(body)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _first_sentence(text: str) -> tuple[str, str]:
    end = _SENTENCE_END.search(text)
    if end is None:
        return text.rstrip(" .:"), ""
    return text[: end.start()], text[end.end() :].strip()


def _first_section_line(paragraph: str) -> int | None:
    lines = paragraph.split("\n")
    for number, line in enumerate(lines):
        stripped = line.strip()
        underlined = number + 1 < len(lines) and re.fullmatch(
            r"\s*([-=~^*])\1{2,}\s*", lines[number + 1]
        )
        if underlined or _SECTION.match(stripped + "\n") or _FIELD.match(stripped):
            return number
    return None


def _prose(paragraph: str) -> tuple[str, bool]:
    """Returns the paragraph's prose on one line, and whether the body ends with it."""
    section = _first_section_line(paragraph)
    lines = paragraph.split("\n")[:section]
    if not lines:
        return "", True
    if _PARAMETER.match(lines[0]) and not re.match(r"(note|warning)\b", lines[0], re.I):
        return "", True
    code = lines[0].startswith((" ", "\t")) or _BULLET.match(lines[0].strip())
    return ("" if code else _one_line("\n".join(lines))), section is not None


def _without_introduction(body: str) -> str:
    """Drops a last sentence that was cut or introduces what was left out ("E.g.:")."""
    body = body.replace("::", ":").strip()
    if body.endswith((".", "!", "?", ")", '"')):
        return body
    ends = [end.end() for end in _SENTENCE_END.finditer(body)]
    return body[: ends[-1]] if ends else ""


def plain(text: str) -> str:
    """Returns the text without reStructuredText roles, back-quotes and stars."""
    text = _MARKUP.sub(lambda found: "".join(filter(None, found.groups())), text)
    text = re.sub(r"~(?=\w)|(?<=\w)\s*<[^<>`]*>(?=\s|$)", "", text)
    return _one_line(text.replace("**", "").replace("`", ""))


def key(text: str) -> str:
    """Returns the words of the text in lower case, to compare texts by."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def reason_to_drop(summary: str, body: str) -> str:
    """Returns the name of the first filter a pair fails, or an empty string."""
    summary_words, body_words = len(summary.split()), len(body.split())
    mostly_prose = sum(word.isalpha() for word in re.findall(r"\S+", _words(body)))
    tests = {
        "no body": not body,
        "summary length": not SUMMARY_WORDS[0] <= summary_words <= SUMMARY_WORDS[1],
        "body length": not BODY_WORDS[0] <= body_words <= BODY_WORDS[1],
        "boilerplate": _BOILERPLATE.search(summary) or _BODY_BOILERPLATE.search(body),
        "code": ">>>" in summary + body or re.search(r"[{}<>=|\\]{2}|://", summary),
        "not prose": mostly_prose < 0.7 * body_words,
        "not ASCII": not (summary + body).isascii(),
        "summary in body": key(summary) in key(body),
    }
    return next((name for name, failed in tests.items() if failed), "")


def is_signature_summary(summary: str) -> bool:
    """Returns whether a summary line stands by itself, whatever the body is like."""
    words = len(summary.split())
    is_plain = summary.isascii() and not re.search(r">>>|[{}<>=|\\]{2}|://", summary)
    in_range = SUMMARY_WORDS[0] <= words <= SUMMARY_WORDS[1]
    return in_range and is_plain and not _BOILERPLATE.search(summary)


def _words(text: str) -> str:
    return re.sub(r"[.,;:!?()\"'/-]", "", text)
