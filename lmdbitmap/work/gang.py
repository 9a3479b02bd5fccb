"""Threads, the caller's included, that each do whole pieces of work; as many as processors can be spared for.

    the caller plans ─▶ the next pieces ─▶ a free thread does one, all of it

A piece is never handed from one thread to another: waking a thread costs as much as copying about 100 KiB, and the
other thread would have to fetch the data from the first one's processor cache. A piece that must wait for those before
it takes its turn (`in_turn`). A failure in one thread ends all of them and is raised to the caller.

The helper threads work while a processor can be spared for them (crew.py). That is asked anew for each piece that the
caller does.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Generic, TypeAlias, TypeVar

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.work.crew import Spared, crew_size, joined, none_spared, processors

T = TypeVar("T")

MOST_WORKERS: Final = 4
"""More threads copy no faster, because memory is the limit, and each has a buffer."""
_MOST_PLANNED: Final = 16
"""In pieces. The plan runs ahead because it may announce reads to the disks, which want to know early."""

Work: TypeAlias = Callable[[int, T], None]
"""Does one piece; called with its number in the plan and the piece. It may use state of its own thread."""


def _nothing() -> None:
    """Do nothing: the default for `interrupt` and `told`."""


class Gang(Generic[T]):
    """For one call of `do`. Calls `new_work` once in each thread, and `interrupt` in any thread after a failure."""

    def __init__(
        self,
        new_work: Callable[[], Work[T]],
        *,
        spared: Spared = none_spared,
        interrupt: Callable[[], None] = _nothing,
        most: int = MOST_WORKERS,
    ) -> None:
        self._new_work = new_work
        self._most = min(max(processors(), 2), most)
        """Two threads even on one processor: a thread that waits for a disk needs none."""
        self._spared = spared
        self._interrupt = interrupt
        self._lock = threading.RLock()
        """Guards everything below. A `with` of the condition itself could be interrupted before it lets go."""
        self._news = threading.Condition(self._lock)
        self._planned: deque[tuple[int, T]] = deque()
        self._count = 0
        """How many pieces were planned."""
        self._done = 0
        self._is_all_planned = False
        self._ends = False
        self._wanted = 0
        self._turn = 0
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def do(self, plan: Iterable[T], told: Callable[[], None] = _nothing) -> None:
        """Do all pieces of `plan`, which is iterated in this thread. Returns when all are done and all threads ended.

        `told` is called in this thread, now and then and at the end; an exception from it ends the work.
        """
        failure: BaseException | None = None
        interruption: BaseException | None = None
        try:
            self._do_all(iter(plan), told)
        except BaseException as raised:
            failure = raised
        while True:  # an interruption may come anywhere, also just when a call begins
            try:
                self._dismiss(interruption if failure is None else failure)
                break
            except BaseException as raised:
                interruption = raised
        if interruption is not None:
            raise interruption
        if self._failure is not None:
            raise self._failure
        self._require_all()
        told()

    @contextlib.contextmanager
    def in_turn(self, number: int) -> Iterator[None]:
        """Wait until all pieces before this one had their turn. Either every piece takes its turn or none does."""
        with self._lock:
            while self._turn != number:
                if self._failure is not None:
                    raise self._failure
                self._wait()
        yield
        with self._lock:
            self._turn += 1
            self._news.notify_all()

    # -- the caller ----------------------------------------------------------------------------------------

    def _do_all(self, plan: Iterator[T], told: Callable[[], None]) -> None:
        work = self._new_work()
        while self._plan(plan) and self._failure is None:
            self._do_next(work)
            told()

    def _plan(self, plan: Iterator[T]) -> bool:
        """Plan enough pieces for all threads and set how many may work; return whether the caller has more to do.

        The helpers may be faster than the plan. So it is made in portions, and `told` is called in between.
        """
        self._want(crew_size(self._most - 1, spared=self._spared(), busy=1))
        for _ in range(2 * self._wanted + 2):
            if len(self._planned) >= _MOST_PLANNED or self._failure is not None:
                break
            try:
                piece = next(plan)
            except StopIteration:
                self._is_all_planned = True
                self._call_more()
                return bool(self._planned)  # or the others have it all
            with self._lock:
                self._planned.append((self._count, piece))
                self._count += 1
                self._news.notify_all()
        self._call_more()
        return True

    def _want(self, helpers: int) -> None:
        if helpers != self._wanted:
            with self._lock:
                self._wanted = helpers
                self._news.notify_all()

    def _call_more(self) -> None:
        while len(self._threads) < min(self._wanted, len(self._planned) - 1):
            # A daemon, so that a process that forgot to dismiss it can still exit.
            thread = threading.Thread(target=self._help, args=[len(self._threads)], daemon=True)
            self._threads.append(thread)  # before it starts, so that an interrupted start is waited for too
            try:
                thread.start()
            except RuntimeError:  # the system refuses more threads
                self._threads.pop()
                break

    def _dismiss(self, failure: BaseException | None) -> None:
        """Wait for all threads; the caller may then free what the work uses. Interrupted, it is to be called again."""
        if failure is not None:
            self._fail(failure)
        with self._lock:
            self._ends = True
            self._news.notify_all()
        for thread in self._threads:
            joined(thread)

    def _require_all(self) -> None:
        """Raise `LmdbitmapError` unless every piece was done: a piece left out would go unnoticed until too late."""
        if not self._is_all_planned or self._done != self._count:
            raise LmdbitmapError(
                f"{self._done} of {self._count} pieces or more were done: this is a mistake of lmdbitmap",
                next_step="report it, and try again",
            )

    # -- every working thread ------------------------------------------------------------------------------

    def _help(self, number: int) -> None:
        try:
            work = self._new_work()
            while self._is_needed(number):
                self._do_next(work)
        except BaseException as failure:  # raised to the caller
            self._fail(failure)

    def _is_needed(self, number: int) -> bool:
        """Wait for a piece and for a processor for helper `number`; return False when the work is over."""
        with self._lock:
            while not self._ends and self._failure is None:
                if self._planned and number < self._wanted:
                    return True
                self._wait()
        return False

    def _wait(self) -> None:
        """Wait for news with the lock, and come back with it: an interruption may come just when it was given up."""
        try:
            self._news.wait()
        except BaseException:
            try:
                self._news.notify_all()
            except RuntimeError:  # not ours
                self._lock.acquire()
            raise

    def _do_next(self, work: Work[T]) -> None:
        """Do the next planned piece, if the other threads left any."""
        with self._lock:
            if not self._planned or self._failure is not None:
                return
            number, piece = self._planned.popleft()
        work(number, piece)
        with self._lock:
            self._done += 1

    def _fail(self, failure: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or failure
            self._news.notify_all()
        with contextlib.suppress(Exception):  # a device that cannot even do this: the failure says more
            self._interrupt()
