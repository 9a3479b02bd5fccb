"""The hook of a point in time: a command that makes a guest consistent for that moment and then lets it go on.

COMMAND freeze NAME…     before it; if it fails or takes too long, the backup ends
COMMAND thaw NAME…       after it, whatever happened, even if the freeze failed; if the thaw fails, the backup goes on,
                         because it is good, and the command ends with exit code 1 and reports the guest

Nobody can work in a guest that stays frozen. So a signal that ends the backup has the guest thawed first, and further
signals wait for that. Everything that a freeze started is ended before the thaw if it failed, took too long or was cut
short; otherwise it might freeze a guest that was already thawed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import IO, Any, NamedTuple, TypeAlias

import click

from lmdbitmap.cli.options import Function, Seconds
from lmdbitmap.cli.signals import Ended
from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from lmdbitmap.nbd.control_client import ANSWER_S

log = logging.getLogger(__name__)

_MOST_WORDS = 400
"""How many characters of a failed hook's output are shown."""
_MOST_BYTES = 1 << 16
"""How much of it is kept: a hook may say anything."""
_LOOK_S = 0.05
"""Between two looks whether a hook that says nothing has ended."""
_DYING_S = 2.0
"""Until a killed hook is waited for no longer, as one that waits for a disk that does not answer."""
_MS_PER_S = 1000
_ENDING_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGXCPU,
)  # fmt: skip
"""All that end a process unless it says otherwise, and that people, shells and schedulers send."""


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
            refused = _failure_of([*words, "freeze", *names], limit_s, signals.heeded())
            if refused is None:
                with signals.heeded():
                    yield
        finally:
            if not isinstance(refused, _NotRun):
                failure = _failure_of([*words, "thaw", *names], limit_s, nullcontext())
            if thaw is not None:
                thaw.failure = failure
            if failure is not None and (refused is None or signals.came):
                log.error("%s", failure)
        if refused is not None:
            raise refused if failure is None else _neither(refused, failure)


_Heeding: TypeAlias = AbstractContextManager[None]
"""What the wait for a hook is done in: whether signals end it."""


def _failure_of(words: Sequence[str], limit_s: float, heeding: _Heeding) -> LmdbitmapError | None:
    try:
        _run(words, limit_s, heeding)
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
    """The first signal ends what is `heeded` by an exception; all others are raised after the block, as Ctrl-Z is.

    Ignored signals stay ignored, as under nohup. Only the main thread can do this; in another thread nothing changes.
    """

    def __init__(self) -> None:
        self._waiting = True
        self._came: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (*_ENDING_SIGNALS, signal.SIGTSTP):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before  # `_take` may be called as soon as it is known
                    signal.signal(number, self._take)
        return self

    @property
    def came(self) -> bool:
        """Whether a signal will be raised after the block that replaces any error. Ctrl-Z replaces none."""
        return self._came not in (None, signal.SIGTSTP)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Let a signal end the block, also one that came before."""
        try:
            self._waiting = False
            if self._came is not None:
                number, self._came = self._came, None
                self._take(number, None)
            yield
        finally:
            self._waiting = True

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTSTP:
            self._came = self._came or number
            return
        if self._waiting:
            self._came = number
            return
        self._waiting, self._came = True, None  # a Ctrl-Z from before would only stop what is to end
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


def _run(words: Sequence[str], limit_s: float, heeding: _Heeding) -> None:
    shown = shlex.join(words)
    try:
        code, said = _outcome(words, limit_s, heeding)
    except subprocess.TimeoutExpired as late:
        raise LmdbitmapError(
            f"hook `{shown}` took more than {limit_s:g} s",
            next_step="see where it hangs when it is run by hand, or allow it more (--hook-limit)",
        ) from late
    if code != 0:
        words_said = " ".join(said.split())[:_MOST_WORDS]
        raise _failed(f"hook `{shown}` ended with {code}" + (f": {words_said}" if words_said else ""))


def _outcome(words: Sequence[str], limit_s: float, heeding: _Heeding) -> tuple[int, str]:
    """Run the hook; return its exit code and the beginning of its output."""
    until_s = time.monotonic() + limit_s
    with _process_of(words) as (process, output), heeding:
        said = _beginning_of(output, process, until_s)
        return process.wait(max(until_s - time.monotonic(), 0)), said.decode(errors="replace")


@contextlib.contextmanager
def _process_of(words: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Yield the running hook and its output. Unless it has succeeded in the block, everything that it started is ended.

    It has a session of its own, so that Ctrl-C reaches us alone, and all of it can be killed.
    """
    try:
        process = subprocess.Popen(  # noqa: S603 - the command that its user gave, without a shell
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as refusal:
        raise _NotRun(
            f"hook `{shlex.join(words)}` cannot be run ({refusal.strerror})",
            next_step="name a command that exists and is executable",
        ) from refusal
    assert process.stdout is not None
    with process.stdout as output:
        try:
            yield process, output
        finally:
            if process.returncode != 0:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the hook and all in its session. One that became another user's, as by sudo, goes on."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_DYING_S)
    except ProcessLookupError:
        pass
    except (PermissionError, subprocess.TimeoutExpired) as refusal:
        log.error("the hook, process %d, cannot be ended: %s", process.pid, refusal)


def _beginning_of(output: IO[bytes], process: subprocess.Popen[bytes], until_s: float) -> bytes:
    """Take in all of a hook's output; return the beginning. Raises `TimeoutExpired`.

    It ends when it is closed. What the hook started in the background may keep it open, and talk: then it ends with the
    hook.
    """
    said = b""
    waiting = select.poll()
    waiting.register(output, select.POLLIN)
    while (left_s := until_s - time.monotonic()) > 0:
        has_ended = process.poll() is not None  # asked first: then all that it said is there to be read
        if waiting.poll(0 if has_ended else min(left_s, _LOOK_S) * _MS_PER_S):
            piece = os.read(output.fileno(), _MOST_BYTES)
            has_ended = has_ended or not piece
            said = (said + piece)[:_MOST_BYTES]
        if has_ended:
            return said
    raise subprocess.TimeoutExpired(process.args, left_s)


def _failed(problem: str) -> LmdbitmapError:
    return LmdbitmapError(problem, next_step="see what it says when it is run by hand")
