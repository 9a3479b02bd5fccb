"""Threads that work beside the one that hands work to them, as many as processors can be spared for them.

A thread that is never idle costs nobody anything while another processor is. As many of them as there are processors
make everybody else wait for the end of a slice of time, however nice they are: two that did nothing but count made the
slowest of a hundred writes of a guest wait 3 to 12 ms on two processors, one of them no longer than none. So a job
that works beside a guest spares a processor. Where none is left for a thread, whoever waits for its work does it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def processors() -> int:
    """How many of them this process may use."""
    return len(os.sched_getaffinity(0))


def crew(most: int, *, spared: int = 0, busy: int = 1) -> Executor:
    """Up to `most` threads, beside `busy` others of the job, so that `spared` processors are left to others."""
    count = crew_size(most, spared=spared, busy=busy)
    return ThreadPoolExecutor(count) if count else _Nobody()


def crew_size(most: int, *, spared: int = 0, busy: int = 1) -> int:
    """How many threads such a crew has: where nothing is to be spared `most`, whatever else the others do."""
    return max(min(most, processors() - busy - spared), 0) if spared else most


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
    """One thread, if there is a processor for it, that does what it is handed in order. For one thread, which takes the
    answers in that order.

    Where there is none, whoever takes an answer does the work. After work that failed, or `close`, nothing more is
    done, and each answer is that failure. It is a `ThreadPoolExecutor` of one, less what that spends on each piece of
    work: in as long the kernel copies some 100 KiB.
    """

    def __init__(self, *, spared: int = 0, busy: int = 1) -> None:
        self.is_beside = crew_size(1, spared=spared, busy=busy) > 0
        self._thread: threading.Thread | None = None
        self._handed: queue.SimpleQueue[Callable[[], T] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[T | _Failed] = queue.SimpleQueue()
        self._failure: BaseException | None = None

    def hand(self, work: Callable[[], T]) -> None:
        self._handed.put(work)
        if self.is_beside and self._thread is None:
            # A daemon: whoever forgot to close it can end nevertheless. Who closes it waits for it.
            thread = threading.Thread(target=self._work_on, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system gives us no more threads
                self.is_beside = False
            else:
                self._thread = thread

    def answer(self) -> T:
        """What came of the oldest work that was not asked after."""
        if self._failure is None:
            if not self.is_beside:
                self._do_next()
            done = self._done.get()
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
                _joined(self._thread)

    def _end(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._handed.get_nowait()

    def _work_on(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        work = self._handed.get()
        if work is None:
            return False
        try:
            self._done.put(work())
        except BaseException as failure:  # raised to whoever asks
            self._done.put(_Failed(failure))
            return False
        return True


def _joined(thread: threading.Thread) -> None:
    interruption: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as raised:  # it must not go on behind whoever closed it
            interruption = raised
    if interruption is not None:
        raise interruption
