"""The hook of a point in time: a command that makes a guest consistent for that moment and then lets it go on.

COMMAND freeze NAME…     before it; if it fails or takes too long, the backup ends
COMMAND thaw NAME…       after it, whatever happened, even if the freeze failed; if the thaw fails, the backup goes on,
                         because it is good, and the command ends with exit code 1 and reports the guest

Nobody can work in a guest that stays frozen. So a signal that ends the backup has the guest thawed first, and further
signals wait for that. Everything that the freeze started is ended before the thaw; otherwise it might freeze a guest
that was already thawed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import click

from lmdbitmap.cli.options import Function, Seconds
from lmdbitmap.cli.signals import Ended
from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from lmdbitmap.nbd.control_client import ANSWER_S

log = logging.getLogger(__name__)

_MOST_WORDS = 400
"""How many characters of a failed hook's output are shown."""
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Thaw:
    """The outcome of thawing the guest that a hook froze."""

    def __init__(self) -> None:
        self.failure: LmdbitmapError | None = None

    @property
    def problem(self) -> str | None:
        """What failed, for JSON; None if the guest was thawed."""
        return None if self.failure is None else self.failure.problem

    def require(self) -> None:
        """Raise `LmdbitmapError` if the guest may still be frozen. Call it after everything else was reported."""
        if self.failure is not None:
            raise LmdbitmapError(
                f"what was asked for is done, but the guest may be frozen still: {self.failure.problem}",
                next_step="thaw it by hand",
            )


class Hook(NamedTuple):
    """The command to run around a point in time, if any, and how long the guest may stay frozen."""

    command: str | None
    limit_s: float
    freeze_limit_s: float

    @property
    def answer_limit_s(self) -> float:
        """How long taking the point in time may take; without a hook no guest waits for it."""
        return ANSWER_S if self.command is None else self.freeze_limit_s

    def freezing(self, names: Sequence[str], thaw: Thaw) -> AbstractContextManager[object]:
        return nullcontext() if self.command is None else quiesced(self.command, names, self.limit_s, thaw)


def hooked(names: str) -> Callable[[Function], Function]:
    """Add the options of a hook; the verb gets them as `hook`. `names` is its metavar for the disks."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def with_hook(
            *arguments: Any, hook: str | None, hook_limit: float, freeze_limit: float, **options: Any
        ) -> Any:
            return function(*arguments, hook=Hook(hook, hook_limit, freeze_limit), **options)

        return _hook_option(names)(_limit_option()(_freeze_limit_option()(with_hook)))

    return decorate


def _hook_option(names: str) -> Callable[[Function], Function]:
    return click.option(
        "--hook",
        metavar="COMMAND",
        help=f"Run `COMMAND freeze {names}` right before the point in time, and `COMMAND thaw {names}` right after it.",
    )


def _limit_option() -> Callable[[Function], Function]:
    return click.option(
        "--hook-limit",
        metavar="SECONDS",
        type=Seconds(),
        default=30.0,
        show_default=True,
        help="How long each run of the hook may take.",
    )


def _freeze_limit_option() -> Callable[[Function], Function]:
    return click.option(
        "--freeze-limit",
        metavar="SECONDS",
        type=Seconds(),
        default=60.0,
        show_default=True,
        help="How long the guest may stay frozen until the process that serves the disk has taken the point in time;"
        " then it is thawed, and nothing is made.",
    )


@contextlib.contextmanager
def quiesced(command: str, names: Sequence[str], limit_s: float, thaw: Thaw | None = None) -> Iterator[None]:
    """Keep the hook's guest frozen in the block. Each of the hook's two runs may take `limit_s`.

    A failed thaw is logged at once, because a backup may go on for hours, and kept in `thaw`. If the freeze failed too,
    one error reports both, in that order.
    """
    words = _words(command)
    with _Signals() as signals:
        refused = failure = None
        try:
            try:
                refused = _failure_of([*words, "freeze", *names], limit_s)
                if refused is None:
                    yield
            finally:
                signals.wait()
        finally:
            if not isinstance(refused, _NotRun):
                failure = _failure_of([*words, "thaw", *names], limit_s)
            if thaw is not None:
                thaw.failure = failure
            if failure is not None and (refused is None or signals.came):
                log.error("%s", failure)
        if refused is not None:
            raise refused if failure is None else _neither(refused, failure)


def _failure_of(words: Sequence[str], limit_s: float) -> LmdbitmapError | None:
    try:
        _run(words, limit_s)
    except LmdbitmapError as error:
        return error
    return None


def _neither(refused: LmdbitmapError, failure: LmdbitmapError) -> LmdbitmapError:
    return LmdbitmapError(
        f"{refused.problem}, and then {failure.problem}: the guest may be frozen still",
        next_step="thaw it by hand, and see what the hook says when it is run by hand",
    )


class _NotRun(LmdbitmapError):
    """The hook could not be started, so no guest was asked for anything."""


class _Signals:
    """The first signal ends the block by an exception; later ones, and all after `wait`, are raised after the block.

    Ignored signals stay ignored, as under nohup. Only the main thread can do this; in another thread nothing changes.
    """

    def __init__(self) -> None:
        self._waiting = False
        self._came: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING_SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._take)
        return self

    @property
    def came(self) -> bool:
        """Whether a signal will be raised after the block: it replaces any error."""
        return self._came is not None

    def wait(self) -> None:
        self._waiting = True

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._came = number
            return
        self._waiting = True
        before = self._before[number]
        if callable(before):
            before(number, frame)
        raise Ended(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._came is not None:
            signal.raise_signal(self._came)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as refused:
        raise InvalidArgument(
            f"hook {command!r} is no command ({refused})", next_step="mend its quotes"
        ) from refused
    if not words:
        raise InvalidArgument("--hook is empty", next_step="name a command")
    return words


def _run(words: Sequence[str], limit_s: float) -> None:
    shown = shlex.join(words)
    try:
        code, said = _outcome(words, limit_s)
    except subprocess.TimeoutExpired as late:
        raise LmdbitmapError(
            f"hook `{shown}` took more than {limit_s:g} s",
            next_step="see where it hangs when it is run by hand, or allow it more (--hook-limit)",
        ) from late
    except OSError as refusal:
        raise _NotRun(
            f"hook `{shown}` cannot be run ({refusal.strerror})",
            next_step="name a command that exists and is executable",
        ) from refusal
    if code != 0:
        words_said = " ".join(said.split())[:_MOST_WORDS]
        raise _failed(f"hook `{shown}` ended with {code}" + (f": {words_said}" if words_said else ""))


def _outcome(words: Sequence[str], limit_s: float) -> tuple[int, str]:
    """Run the hook; return its exit code and its output.

    It has a session of its own, so that Ctrl-C reaches us alone, and everything that it started can be killed with it.
    """
    with subprocess.Popen(  # noqa: S603 - the command that its user gave, without a shell
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, said


def _failed(problem: str) -> LmdbitmapError:
    return LmdbitmapError(problem, next_step="see what it says when it is run by hand")
