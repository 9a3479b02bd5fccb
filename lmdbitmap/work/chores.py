"""Chores: periodic work for each of many disks, done by as few threads as possible.

Threads that wake up at the same time contend for the interpreter's lock. Two threads for each of 300 idle disks took
more than a quarter of a processor, most of it in that contention. So one thread does all chores, one after another.
But any chore may hang, for instance in a file system that does not answer, and must not delay the others for long.

    the clock    touches no disk: queues all chores when they are due, and watches the queue until it is empty
    workers      take the first chore in the queue and do it; mostly there is one worker

Invariants:
- A chore is queued, under way or neither, and only once. So a chore that hangs keeps one worker and no more.
- If the queue is not empty and all workers have been at their chores for `_PATIENCE_S`, their number doubles a tick
  later. So chores that hang, even hundreds at once, delay the others for less than a second. The number also doubles if
  the queue is not empty after half the interval: every chore may have become slow. If processors are short, it doubles
  later or not at all, because more threads would make that worse. Work with a deadline must therefore not be a chore.
- Every worker that was needed is woken for the next round. A worker that finds nothing to do exits, unless it is the
  last.
- Chores that were slow the last time go to the end of the queue, so that they do not delay the others each time.
- The lock is reentrant: a signal handler or the garbage collector may detach a disk in the middle of anything.
"""

from __future__ import annotations

import contextlib
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
"""How many times a chore may give up the interpreter's lock and wait for it."""
_FADES: Final = 0.9
"""Decay per tick of the clock's measured lateness."""


class Chore:
    """Periodic `work`, called from any thread, one call at a time. An exception from it is a bug, and is logged."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.name: Final = name
        self.work: Final = work
        self.is_due = False
        """Whether the chore is queued or under way."""
        self.took_s = 0.0
        """Duration of the last call."""


class _Work(NamedTuple):
    """The start time and the thread of a chore that is under way."""

    since_s: float
    thread: int


class Chores:
    """Does each chore every `interval_s`. Keeps threads only while it has chores. Safe for many threads."""

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
        """Whether the system refused the last thread that was asked for."""

    def forsake(self) -> None:
        """Start empty in a forked child: it has neither the threads nor the disks."""
        self._begin()

    def add(self, chore: Chore) -> None:
        """Do `chore` from now on. Raises `RuntimeError` if no thread can be started."""
        forks.is_not_for_children(self)
        with self._lock:
            if not self._has_clock:
                threading.Thread(target=self._keep_time, name="lmdbitmap clock", daemon=True).start()
                self._has_clock = True
            self._chores.add(chore)

    def end(self, chore: Chore) -> None:
        """Stop doing `chore`. Returns once it is not under way; an interruption of that wait is raised afterwards.

        A chore that was never added is ignored. A chore that ends itself is not waited for.
        """
        interruption: BaseException | None = None
        while True:
            try:
                self._end(chore)
                break
            except Exception:  # a bug, which would be raised again
                raise
            except BaseException as raised:  # wait on: its disk must not be closed while the chore runs
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
        while True:
            try:
                with self._lock:
                    self._tick_on()
                return
            except MemoryError:  # nobody else would keep time for those who are here
                time.sleep(self.interval_s)
            except BaseException:  # a bug: the next `add` starts another clock
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
        self._has_clock = False  # under the lock: the next `add` starts another clock

    def _is_slow(self, now_s: float, late_s: float) -> bool:
        """Return whether every worker is stuck, or all of them are too slow.

        The clock touches no disk, so it is late only if processors are short. Workers are late then too, a few times
        in each chore, and more of them would make it worse.
        """
        patience_s = _PATIENCE_S + _WAITS * late_s
        stand_still = all(now_s - work.since_s > patience_s for work in list(self._under_way.values()))
        return stand_still or (late_s < _TICK_S and now_s - self._called_s > self.interval_s / 2)

    def _form_line(self) -> None:
        for chore in sorted(self._chores, key=lambda chore: chore.took_s):
            if chore in self._chores and not chore.is_due:
                self._line.append(chore)
                chore.is_due = True
        self._call(max(self._idle_count, 0 if self._under_way else 1))

    def _call(self, count: int) -> None:
        """Wake or start `count` more workers, idle ones first."""
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
                with contextlib.suppress(Exception):  # want of memory may be all that is wrong
                    _log.exception("%s failed, and will be tried again: this is a mistake", chore.name)
            done = chore

    def _next(self, done: Chore | None) -> Chore | None:
        """Note that `done` is done and return the next chore, or None if this worker is no longer needed."""
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
        """Wait to be woken; return whether this worker is needed then. The last worker always is."""
        self._idle_count += 1
        self._idle.wait()
        self._idle_count -= 1
        return bool(self._line) or not (self._idle_count or self._under_way)
