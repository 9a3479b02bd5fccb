"""Chores: what has to be done again and again for each of many disks, by as few threads as will do.

Threads that wake up side by side fight for the interpreter's lock: of what two of them for each of 300 idle disks took,
more than a quarter of a processor, most was that fight. So one does the chores of all, one after another. But any of
them may hang, as in a file system that does not answer, and the others must not wait for that for long.

    the clock    touches no disk: puts all chores in line when it is time, and looks after the line while it is there
    workers      take what is first in line, and do it; mostly there is one of them

What holds all the time:
- A chore is in line, or under way, or neither, and once only: one that hangs keeps one worker, and no more.
- While something is in line and all workers have been at their chores for `_PATIENCE_S`, there are twice as many of
  them a tick later: whatever hangs, and be it hundreds at once, holds up the others for less than a second. They also
  double where the line is not done in half of the time there is: all of it may have become slow. Where processors are
  short they do not, or later: then more threads would be more trouble. So nothing may be a chore that must not be late.
- Workers that were needed are called again the next time, all of them; one that comes in vain leaves, unless it is the
  last one.
- What was slow the last time is last in line: it makes nobody wait each time.
- The lock may be taken anew by whoever has it: a disk may be detached by a signal's handler, or by the garbage
  collector, in the middle of anything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from lmdbitmap.work import forks

_log = logging.getLogger(__name__)

_PATIENCE_S: Final = 0.03
_TICK_S: Final = 0.02
_WAITS: Final = 10
"""So many times a chore may give up the interpreter's lock, and wait for it."""
_FADES: Final = 0.9
"""What is left of how late the clock was, a tick later."""


class Chore:
    """`work`, called again and again by any thread, by one at a time. What it raises is a mistake, and is logged."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.name: Final = name
        self.work: Final = work
        self.is_due = False
        """Whether it is in line or under way."""
        self.took_s = 0.0
        """The last time."""


class _Work(NamedTuple):
    """Since when a chore is under way, and in which thread."""

    since_s: float
    thread: int


class Chores:
    """Does what it was given every `interval_s`. Has threads while there is something to do; safe for many threads."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._clock = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._chores: set[Chore] = set()
        self._line: deque[Chore] = deque()
        self._under_way: dict[Chore, _Work] = {}
        self._idle_count = 0
        self._called_s = 0.0
        self._has_clock = False
        self._is_short = False
        """Whether the system gave us no thread when we wanted one last."""

    def forsake(self) -> None:
        """We are in a forked child, which has neither the threads nor the disks."""
        self._begin()

    def add(self, chore: Chore) -> None:
        """Have it done from now on. Raises `RuntimeError` for want of a thread."""
        forks.is_not_for_children(self)
        with self._lock:
            if not self._has_clock:
                threading.Thread(target=self._keep_time, name="lmdbitmap clock", daemon=True).start()
                self._has_clock = True
            self._chores.add(chore)

    def end(self, chore: Chore) -> None:
        """Have it done no more; returns when it is not under way any more, and then raises what interrupted that.

        Nothing happens to one that is not there. A chore that ends itself is not waited for.
        """
        interruption: BaseException | None = None
        while True:
            try:
                self._end(chore)
                break
            except Exception:  # a mistake, which would come again
                raise
            except BaseException as raised:  # its disk must not be closed under it
                interruption = raised
        if interruption is not None:
            raise interruption

    def _end(self, chore: Chore) -> None:
        with self._lock:
            self._chores.discard(chore)
            if chore in self._line:
                self._line.remove(chore)
            while (work := self._under_way.get(chore)) and work.thread != threading.get_ident():
                self._done.wait()
            chore.is_due = False
            if not self._chores:
                self._clock.notify()
                self._idle.notify_all()

    # -- the clock -----------------------------------------------------------------------------------------

    def _keep_time(self) -> None:
        try:
            with self._lock:
                self._tick_on()
        except BaseException:  # for want of memory: whoever adds a chore next begins another clock
            self._has_clock = False
            raise

    def _tick_on(self) -> None:
        now_s = time.monotonic()
        due_s, late_s = now_s + self.interval_s, 0.0
        while self._chores:
            look_s = min(due_s, now_s + _TICK_S) if self._line else due_s
            self._clock.wait(look_s - now_s)
            now_s = time.monotonic()
            late_s = max(now_s - look_s, late_s * _FADES)
            if self._line and self._is_slow(now_s, late_s):
                self._call(max(len(self._under_way), 1))
            if now_s >= due_s:
                due_s = max(due_s + self.interval_s, now_s)
                self._form_line()
        self._has_clock = False  # in the lock: whoever adds one now begins another clock

    def _is_slow(self, now_s: float, late_s: float) -> bool:
        """Whether no worker gets on, or all of them get on too slowly.

        As a clock touches no disk, what makes it late is that processors are short: workers are late then too, a few
        times in each chore, and more of them would make it worse.
        """
        patience_s = _PATIENCE_S + _WAITS * late_s
        stand_still = all(now_s - work.since_s > patience_s for work in list(self._under_way.values()))
        return stand_still or (late_s < _TICK_S and now_s - self._called_s > self.interval_s / 2)

    def _form_line(self) -> None:
        for chore in sorted(self._chores, key=lambda chore: chore.took_s):
            if chore in self._chores and not chore.is_due:
                chore.is_due = True
                self._line.append(chore)
        self._call(max(self._idle_count, 0 if self._under_way else 1))

    def _call(self, count: int) -> None:
        """So many more workers, of those that are idle first."""
        self._called_s = time.monotonic()
        self._idle.notify(count)
        for _ in range(count - self._idle_count):
            try:
                threading.Thread(target=self._serve, name="lmdbitmap chores", daemon=True).start()
            except RuntimeError as refused:  # the next tick tries again
                if not self._is_short:
                    _log.warning("what is done for disks in the background may be late: %s", refused)
                self._is_short = True
                return
            self._is_short = False

    # -- a worker ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        done: Chore | None = None
        while (chore := self._next(done)) is not None:
            try:
                chore.work()
            except Exception:
                _log.exception("%s failed, and will be tried again: this is a mistake", chore.name)
            done = chore

    def _next(self, done: Chore | None) -> Chore | None:
        """Whatever comes after that one; None for a worker that is not needed any more."""
        with self._lock:
            if done is not None:
                self._has_done(done)
            while not self._line:
                if not self._chores or not self._is_called():
                    return None
            chore = self._line.popleft()
            self._under_way[chore] = _Work(time.monotonic(), threading.get_ident())
            return chore

    def _has_done(self, chore: Chore) -> None:
        chore.took_s = time.monotonic() - self._under_way.pop(chore).since_s
        chore.is_due = False
        self._done.notify_all()

    def _is_called(self) -> bool:
        """Wait for a call; whether this worker is needed by then. The last one stays."""
        self._idle_count += 1
        self._idle.wait()
        self._idle_count -= 1
        return bool(self._line) or not (self._idle_count or self._under_way)
