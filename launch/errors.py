# SPDX-License-Identifier: Apache-2.0
"""Exit codes, their meaning to a launcher, and the one kind of error it prints."""

import difflib
from collections.abc import Iterable

DONE, LEFT_BEHIND, USAGE, AGAIN = 0, 1, 2, 42
BAD_DATA, BAD_CHECKPOINT, INTERNAL, UNWRITABLE = 65, 66, 70, 74
INTERRUPTED, KILLED, SAVED = 130, 137, 143
CONNECTION_LOST = 255
NAMED = USAGE, BAD_DATA, BAD_CHECKPOINT, UNWRITABLE


class SubmitError(Exception):
    """One sentence for the user, and the exit code that goes with it."""

    def __init__(self, sentence: str, code: int = USAGE):
        super().__init__(sentence)
        self.code = code


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shell_code(code: int) -> int:
    """Returns a job's exit code as the contract has it.

    A process that signal n ended (-n to Python) is 128 + n. An exception nobody
    caught (1) is 70. 255 is 70 too: ssh means a lost connection by it, and gcloud
    would start the command again.
    """
    if code < 0:
        return 128 - code
    return INTERNAL if code in (1, CONNECTION_LOST) else code


def is_final(code: int) -> bool:
    """Whether a job that ended so would only end so again; 42 and 127-254 would not."""
    return code != AGAIN and not 127 <= code <= 254


def decisive(codes: Iterable[int]) -> int:
    """Returns the one exit code that says most about why a gang of processes ended.

    A named mistake (2, 65, 66) or a full disk (74) explains the others' deaths; then a
    signal or 42; then 70, which a process also gives whose peer has died. 0 only if all
    ended with 0.
    """
    failed = [code for code in codes if code != DONE]
    named = [code for code in failed if code in NAMED]
    passing = [code for code in failed if not is_final(code) and code != SAVED]
    saved = [code for code in failed if code == SAVED]
    return [*named, *passing, *saved, *failed, DONE][0]
