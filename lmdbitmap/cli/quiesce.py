"""The hook of a backup: a command that brings a guest in order for the moment of the checkpoint, and lets it go on.

COMMAND freeze NAME…     before it; one that fails or takes too long ends the backup
COMMAND thaw NAME…       after it, whatever happened, also to a freeze that failed
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import subprocess
from collections.abc import Iterator, Sequence

from lmdbitmap.errors import InvalidArgument, LmdbitmapError

log = logging.getLogger(__name__)

_MOST_WORDS = 400
"""Of what a hook says, shown where it fails."""


@contextlib.contextmanager
def quiesced(command: str, names: Sequence[str], limit_s: float) -> Iterator[None]:
    """The hook's guest is frozen in the block. Each of its two runs may take `limit_s`."""
    words = _words(command)
    try:
        _run([*words, "freeze", *names], limit_s)
        yield
    finally:
        try:
            _run([*words, "thaw", *names], limit_s)
        except LmdbitmapError as error:
            log.error("%s", error)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as refused:
        raise InvalidArgument(
            f"hook {command!r} is no command ({refused})", next_step="mend its quotes"
        ) from refused
    if not words:
        raise InvalidArgument("the hook is empty", next_step="name a command")
    return words


def _run(words: Sequence[str], limit_s: float) -> None:
    shown = shlex.join(words)
    try:
        done = subprocess.run(  # noqa: S603 - the command that its user gave, without a shell
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        raise _failed(f"hook `{shown}` took more than {limit_s:g} s") from late
    except OSError as refusal:
        raise _failed(f"hook `{shown}` cannot be run ({refusal.strerror})") from refusal
    if done.returncode != 0:
        said = " ".join(done.stdout.split())[:_MOST_WORDS]
        raise _failed(f"hook `{shown}` ended with {done.returncode}" + (f": {said}" if said else ""))


def _failed(problem: str) -> LmdbitmapError:
    return LmdbitmapError(problem, next_step="see what it says when it is run by hand")
