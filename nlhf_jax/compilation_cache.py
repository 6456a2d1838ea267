# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept between runs: where, how many, and how often one was found.

JAX keeps them under a key of the program, the compiler, its flags and the machine's
features; what one process writes, all later ones read. Here is what it leaves open: a
bound, folders that cannot be written, entries that were cut off, and the counts.
"""

import contextlib
import glob
import os
import pathlib
import sys
import tempfile
import time
import warnings
from typing import NamedTuple

from nlhf_jax.checks import check_choice

SWITCH = "NLHF_COMPILATION_CACHE"
OWN_FOLDER = "JAX_COMPILATION_CACHE_DIR"  # who sets JAX's own variable means it
LARGEST_BYTES = 4 * 2**30
# Below this a program is made again sooner than its entry is worth a file.
LEAST_SECONDS = 0.2
# Who has not written for so long is not writing any more.
WRITING_SECONDS = 300.0
_NEVER = float("inf")
_UNREADABLE = "Error reading persistent compilation cache entry for "
_EVENTS = {
    "/jax/compilation_cache/compile_requests_use_cache": "programs",
    "/jax/compilation_cache/cache_hits": "hits",
}
_totals = {"programs": 0, "hits": 0, "saved_seconds": 0.0}
_is_counting = False


class Counts(NamedTuple):
    """Programs that were asked of the cache.

    Attributes:
      programs: how many; 0 where there is no cache.
      hits: those that were there; the others were compiled.
      saved_seconds: what compiling these took once, less what reading them took.
    """

    programs: int = 0
    hits: int = 0
    saved_seconds: float = 0.0

    @property
    def misses(self) -> int:
        """Those that had to be compiled."""
        return self.programs - self.hits

    def since(self, before: "Counts") -> "Counts":
        """Returns what came after `before`."""
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


def counts() -> Counts:
    """Returns the counts of this process since `enable`."""
    return Counts(**_totals)


def folder() -> pathlib.Path:
    """Returns where programs are kept: $NLHF_CACHE/xla, else ~/.cache/nlhf_jax/xla."""
    chosen = os.environ.get("NLHF_CACHE") or "~/.cache/nlhf_jax"
    return pathlib.Path(chosen).expanduser() / "xla"


def enable() -> None:
    """Keeps compiled programs between runs, so that a second start is quick.

    A folder that cannot be written is read, if it is there; without one every start
    compiles. The variable NLHF_COMPILATION_CACHE=off does without in any case.

    Raises:
      UserError: the variable says neither on nor off.
    """
    import jax  # the command line says its help without

    if check_choice(SWITCH, os.environ.get(SWITCH) or "on", ("on", "off")) == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    _count()
    if os.environ.get(OWN_FOLDER):
        return
    place = folder()
    error = _unwritable(place)
    if not error:
        prune(place, LARGEST_BYTES)
    is_there = place.is_dir()
    if error and not is_there:
        print(f"nlhf: compiled programs are not kept: {error}", file=sys.stderr)
    jax.config.update("jax_compilation_cache_dir", str(place) if is_there else None)
    least = _NEVER if error else LEAST_SECONDS
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    _repair(place)


def _unwritable(place: pathlib.Path) -> str:
    """Makes the folder; returns why nothing can be written in it, "" where it can."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"{place} cannot be written: {error.strerror or error}"


def prune(place: pathlib.Path, most_bytes: int) -> None:
    """Deletes the entries that were longest not in use, once there are too many.

    What is deleted while another process wants it is compiled there. A quarter more
    than necessary goes, so that not every start has to.

    Args:
      place: the folder of entries.
      most_bytes: what may stay without anything being deleted.
    """
    found = []
    for path in place.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process deletes too
            facts = path.stat()
            used = max(facts.st_mtime, facts.st_atime)
            found.append((used, facts.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= most_bytes:
        return
    for _, size, path in sorted(found):
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
        if total <= 0.75 * most_bytes:
            return


def _count() -> None:
    """Listens, from now on and once, to what JAX tells of its cache."""
    import jax

    global _is_counting
    if _is_counting:
        return
    _is_counting = True

    def event(name: str, **unused_facts: object) -> None:
        if name in _EVENTS:
            _totals[_EVENTS[name]] += 1

    def duration(name: str, seconds: float, **unused_facts: object) -> None:
        if name == "/jax/compilation_cache/compile_time_saved_sec":
            _totals["saved_seconds"] += seconds

    jax.monitoring.register_event_listener(event)
    jax.monitoring.register_event_duration_secs_listener(duration)


def _is_cut_off(entry: bytes) -> bool:
    """Whether JAX cannot unpack an entry; False where it does not say how it would."""
    try:
        from jax._src.compilation_cache import decompress_executable
    except ImportError:
        return False
    try:
        decompress_executable(entry)
    except Exception:  # each way of packing has errors of its own
        return True
    return False


def _repair(place: pathlib.Path) -> None:
    """Deletes an entry that cannot be read, so that the program is written anew.

    A process that was killed while it wrote leaves half of one, and JAX writes no entry
    that is there: each start would warn and compile. JAX's warning has the name alone,
    which whole entries share, and what another process is writing looks as cut off.
    """
    show = warnings.showwarning
    if getattr(show, "repairs", None) == place:
        return

    def show_others(message, *where, **how) -> None:
        name, is_one, _ = str(message).removeprefix(_UNREADABLE).partition(": ")
        if not is_one or not str(message).startswith(_UNREADABLE):
            show(message, *where, **how)
            return
        name = name.strip("'")
        for path in place.glob(f"{glob.escape(name)}-*-cache"):
            with contextlib.suppress(OSError):  # another process deletes too
                is_old = time.time() - path.stat().st_mtime > WRITING_SECONDS
                if is_old and _is_cut_off(path.read_bytes()):
                    path.unlink()
        print(
            f"nlhf: a kept program, {name}, cannot be read and is compiled again",
            file=sys.stderr,
        )

    show_others.repairs = place
    warnings.showwarning = show_others
