"""Threads that work beside the one that hands work to them, as many as processors can be spared for them.

A thread that is never idle costs nobody anything while another processor is. As many of them as there are processors
make everybody else wait for the end of a slice of time, however nice they are: two that did nothing but count made the
slowest of a hundred writes of a guest wait 3 to 12 ms on two processors, one of them no longer than none. So a job
that works beside a guest spares a processor. Where none is left for a thread, whoever waits for its work does it.

How many are to be spared is asked anew for each piece of work: a guest that asks for nothing needs none.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, NamedTuple, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Spared: TypeAlias = Callable[[], int]
"""How many processors are to be left to others now. Called from any thread, often."""


def none_spared() -> int:
    """Nobody else needs one."""
    return 0


def processors() -> int:
    """How many of them this process may use."""
    return len(os.sched_getaffinity(0))


def crew_size(most: int, *, spared: int, busy: int) -> int:
    """How many threads, beside `busy` others of a job, leave `spared` processors to others.

    Where nothing is to be spared they are `most`, whatever else the others do.
    """
    return max(min(most, processors() - busy - spared), 0) if spared else most


class Crew(Executor):
    """Up to `most` threads, beside `busy` others of the job, so that `spared` processors are left to others."""

    def __init__(self, most: int, *, spared: Spared = none_spared, busy: int = 1) -> None:
        self._most = most
        self._spared = spared
        self._busy = busy
        self._crews: dict[int, Executor] = {}
        """By their sizes; mostly there is one, and one more for when a guest is quiet."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        size = crew_size(self._most, spared=self._spared(), busy=self._busy)
        if size not in self._crews:
            self._crews[size] = ThreadPoolExecutor(size) if size else _Nobody()
        return self._crews[size].submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for crew in self._crews.values():
            crew.shutdown(wait, cancel_futures=cancel_futures)


class _Nobody(Executor):
    """Whoever asks for a result first does the work."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return _Undone(partial(fn, *args, **kwargs))


class _Undone(Future[T]):
    """For one thread."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__()
        self._work = work

    def result(self, timeout: float | None = None) -> T:
        if not self.done():
            try:
                self.set_result(self._work())
            except BaseException as error:  # raised below, and to whoever asks again
                self.set_exception(error)
        return super().result(timeout)


class _Failed(NamedTuple):
    error: BaseException


class Follower(Generic[T]):
    """One thread, while there is a processor for it, that does what it is handed in order. For one thread, which takes
    the answers in that order.

    While there is none, whoever takes an answer does the work. After work that failed, or `close`, nothing more is
    done, and each answer is that failure. It is a `ThreadPoolExecutor` of one, less what that spends on each piece of
    work: in as long the kernel copies some 100 KiB.

    Invariant: what `_own` has was handed later than all that the thread was told. So the order is kept, and no two
    pieces of work are done at once.
    """

    def __init__(self, *, spared: Spared = none_spared) -> None:
        self._spared = spared
        self._thread: threading.Thread | None = None
        self._refused = False
        """The system gives us no thread."""
        self._handed: queue.SimpleQueue[Callable[[], T] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[T | _Failed] = queue.SimpleQueue()
        self._told = 0
        """Pieces of work that the thread was told, and nobody has asked after."""
        self._own: deque[Callable[[], T]] = deque()
        """What whoever asks does, unless the thread is told until then."""
        self._failure: BaseException | None = None

    @property
    def is_beside(self) -> bool:
        """Whether what is handed now would be done by the thread."""
        return not self._refused and crew_size(1, spared=self._spared(), busy=1) > 0

    def hand(self, work: Callable[[], T]) -> None:
        self._own.append(work)
        if self.is_beside and self._has_thread():
            self._told += len(self._own)
            while self._own:
                self._handed.put(self._own.popleft())

    def answer(self) -> T:
        """What came of the oldest work that was not asked after."""
        if self._failure is None:
            done = self._next_done()
            if not isinstance(done, _Failed):
                return done
            self._failure = done.error
        raise self._failure

    def close(self) -> None:
        """Return, or raise what interrupts it, when nothing is done any more: what the work uses may go then.

        What was not begun will not be.
        """
        if self._failure is None:
            self._failure = RuntimeError("this follower was closed")
        if self._thread is not None:
            try:
                self._end()
            finally:
                self._handed.put(None)
                joined(self._thread)

    def _next_done(self) -> T | _Failed:
        if not self._told:
            return _come_of(self._own.popleft())
        self._told -= 1
        return self._done.get()

    def _end(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._handed.get_nowait()

    def _has_thread(self) -> bool:
        if self._thread is None:
            # A daemon: whoever forgot to close it can end nevertheless. Who closes it waits for it.
            thread = threading.Thread(target=self._work_on, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self._refused = True
            else:
                self._thread = thread
        return not self._refused

    def _work_on(self) -> None:
        while (work := self._handed.get()) is not None:
            done = _come_of(work)
            self._done.put(done)
            if isinstance(done, _Failed):
                break


def _come_of(work: Callable[[], T]) -> T | _Failed:
    try:
        return work()
    except BaseException as failure:  # raised to whoever asks
        return _Failed(failure)


def joined(thread: threading.Thread) -> None:
    """Wait for its end, and then raise what interrupted that. Nobody waits for himself."""
    interruption: BaseException | None = None
    while thread.is_alive() and thread is not threading.current_thread():
        try:
            thread.join()
        except BaseException as raised:  # it must not go on behind whoever closed it
            interruption = raised
    if interruption is not None:
        raise interruption
