"""Threads that each do a piece of work all the way, the caller among them, and as many as processors can be spared for.

    the caller plans ─▶ the next pieces ─▶ whoever is free: does one, all of it

A piece goes from hand to hand nowhere: to wake another thread costs as much as to copy some 100 KiB, and what one
thread has in its processor's cache another has to fetch. Where one piece must wait for those before it, it takes its
turn (`in_turn`). What fails in one of them ends all, and is raised to the caller.

The others work while there is a processor for them (crew.py), which is asked anew for each piece of the caller's.
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
"""More do not copy faster than memory can, and each has a buffer."""
_MOST_PLANNED: Final = 16
"""Pieces: as who plans may announce what they read, and disks want to know that early."""

Work: TypeAlias = Callable[[int, T], None]
"""Does a piece, whose number in the plan it is told. It may use what is its thread's alone."""


def _nothing() -> None:
    """Nothing hangs that could be interrupted, or nobody wants to know."""


class Gang(Generic[T]):
    """For one call of `do`. `new_work` is called once in each thread. After a failure `interrupt` is called, in any."""

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
        """Two where there is one processor: who waits for a disk needs none."""
        self._spared = spared
        self._interrupt = interrupt
        self._news = threading.Condition()
        """Of all that follows."""
        self._planned: deque[tuple[int, T]] = deque()
        self._count = 0
        """Pieces that were planned."""
        self._done = 0
        self._is_all_planned = False
        self._is_through = False
        """The caller did its part, and nothing failed."""
        self._ends = False
        self._wanted = 0
        self._turn = 0
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def do(self, plan: Iterable[T], told: Callable[[], None] = _nothing) -> None:
        """Do all of the plan, which this thread makes. All is done when it returns, and no thread of it is left.

        `told` is called in this thread, now and then and in the end; what it raises ends the work.
        """
        try:
            self._do_all(iter(plan), told)
        except BaseException as failure:
            self._fail(failure)
        finally:
            self._dismiss()
        if self._failure is not None:
            raise self._failure
        self._require_all()
        told()

    @contextlib.contextmanager
    def in_turn(self, number: int) -> Iterator[None]:
        """Wait until all pieces before this one had their turn. Each takes one, or none does."""
        with self._news:
            while self._turn != number:
                if self._failure is not None:
                    raise self._failure
                self._news.wait()
        yield
        with self._news:
            self._turn += 1
            self._news.notify_all()

    # -- the caller ----------------------------------------------------------------------------------------

    def _do_all(self, plan: Iterator[T], told: Callable[[], None]) -> None:
        work = self._new_work()
        while self._plan(plan) and self._failure is None:
            self._do_next(work)
            told()
        self._is_through = self._failure is None

    def _plan(self, plan: Iterator[T]) -> bool:
        """Have enough for everybody to do, and say how many may; whether there was anything left.

        Others may be faster than the plan: it comes in portions, so that whoever listens is told meanwhile.
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
            with self._news:
                self._planned.append((self._count, piece))
                self._count += 1
                self._news.notify_all()
        self._call_more()
        return True

    def _want(self, helpers: int) -> None:
        if helpers != self._wanted:
            with self._news:
                self._wanted = helpers
                self._news.notify_all()

    def _call_more(self) -> None:
        while len(self._threads) < min(self._wanted, len(self._planned) - 1):
            # A daemon, as who forgot to dismiss it can end nevertheless.
            thread = threading.Thread(target=self._help, args=[len(self._threads)], daemon=True)
            self._threads.append(thread)  # before it starts: who interrupts that is to wait for it
            try:
                thread.start()
            except RuntimeError:  # the system gives us no more
                self._threads.pop()
                break

    def _dismiss(self) -> None:
        """Return when what was begun is over, whoever interrupts that: what it uses may go then."""
        interruption: BaseException | None = None
        while True:
            try:
                if not self._is_through and self._failure is None:  # the next one came before it was noted
                    self._fail(interruption or KeyboardInterrupt())
                with self._news:
                    self._ends = True
                    self._news.notify_all()
                for thread in self._threads:
                    joined(thread)
                break
            except BaseException as raised:
                interruption = raised
        if interruption is not None:
            raise interruption

    def _require_all(self) -> None:
        """What is left out would be taken for done, and missed when it is too late: so reasoning is not all we have."""
        if not self._is_all_planned or self._done != self._count:
            raise LmdbitmapError(
                f"{self._done} of {self._count} pieces or more were done: this is a mistake of lmdbitmap",
                next_step="report it, and try again",
            )

    # -- whoever works -------------------------------------------------------------------------------------

    def _help(self, number: int) -> None:
        try:
            work = self._new_work()
            while self._is_needed(number):
                self._do_next(work)
        except BaseException as failure:  # raised to the caller
            self._fail(failure)

    def _is_needed(self, number: int) -> bool:
        """Wait until there is something to do, and a processor for the helper of that number."""
        with self._news:
            while not self._ends and self._failure is None:
                if self._planned and number < self._wanted:
                    return True
                self._news.wait()
        return False

    def _do_next(self, work: Work[T]) -> None:
        """The piece that was planned first, unless others took all."""
        with self._news:
            if not self._planned or self._failure is not None:
                return
            number, piece = self._planned.popleft()
        work(number, piece)
        with self._news:
            self._done += 1

    def _fail(self, failure: BaseException) -> None:
        with self._news:
            self._failure = self._failure or failure
            self._news.notify_all()
        self._interrupt()
