"""Helper threads for a job, limited so that a busy guest keeps a processor.

A thread that is never idle delays nobody while another processor is idle. As many such threads as processors make
everybody else wait for the end of a time slice, whatever their nice value. On two processors, two threads that only
counted delayed the slowest of a hundred guest writes by 3 to 12 ms; one such thread added nothing. So a job that works
beside a guest spares a processor. If no processor is left for a thread, the caller that waits for the result does the
work itself.

The number of processors to spare is asked for each piece of work: an idle guest needs none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, NamedTuple, ParamSpec, TypeAlias, TypeVar

from lmdbitmap.errors import StorageError

P = ParamSpec("P")
T = TypeVar("T")

Spared: TypeAlias = Callable[[], int]
"""Returns how many processors to leave to others now. Called often, from any thread."""


def none_spared() -> int:
    """Return 0: no processor is left to others."""
    return 0


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def crew_size(most: int, *, spared: int, busy: int) -> int:
    """Return how many threads, beside a job's `busy` other ones, leave `spared` processors to others.

    If nothing is to be spared, return `most`, whatever the other threads do.
    """
    return max(min(most, processors() - busy - spared), 0) if spared else most


def thread_refused(place: str, refused: RuntimeError) -> StorageError:
    """Return the error for a thread that the system does not give, or Python, once the main thread has ended."""
    step = "have fewer threads, or allow more (ulimit -u), and try again"
    if "interpreter shutdown" in str(refused):
        step = "let the main thread wait for such work (Thread.join), and try again"
    return StorageError(place, OSError(errno.EAGAIN, str(refused)), next_step=step)


class Threads(ThreadPoolExecutor):
    """A pool of threads. `submit` raises `StorageError` if the system refuses to start one."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as refused:
            raise thread_refused("this process", refused) from refused


class Crew(Executor):
    """A pool of up to `most` threads, beside the job's `busy` other ones, that leaves `spared` processors to others."""

    def __init__(self, most: int, *, spared: Spared = none_spared, busy: int = 1) -> None:
        self._most = most
        self._spared = spared
        self._busy = busy
        self._crews: dict[int, Executor] = {}
        """Pools by size: mostly one, and another for when a guest is quiet."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        size = crew_size(self._most, spared=self._spared(), busy=self._busy)
        if size not in self._crews:
            self._crews[size] = Threads(size) if size else _Nobody()
        return self._crews[size].submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for crew in self._crews.values():
            crew.shutdown(wait, cancel_futures=cancel_futures)


class _Nobody(Executor):
    """An executor without threads: the first caller of `result` does the work."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return _Undone(partial(fn, *args, **kwargs))


class _Undone(Future[T]):
    """A future whose work is done in `result`. For one thread."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__()
        self._work = work

    def result(self, timeout: float | None = None) -> T:
        if not self.done():
            try:
                self.set_result(self._work())
            except BaseException as error:  # raised below, and by every later call
                self.set_exception(error)
        return super().result(timeout)


class _Failed(NamedTuple):
    error: BaseException


class Follower(Generic[T]):
    """A helper thread that does the work it is handed in order. For one caller, which takes the answers in order.

    While no processor can be spared for the helper, `answer` does the work itself. After work that failed, or `close`,
    nothing more is done and each `answer` raises that failure. It is like `ThreadPoolExecutor(1)` without its overhead
    per piece of work, which is about the time the kernel needs to copy 100 KiB.

    Invariant: all work in `_own` was handed later than all work given to the thread. So the order is kept, and no two
    pieces of work are done at once.
    """

    def __init__(self, *, spared: Spared = none_spared) -> None:
        self._spared = spared
        self._thread: threading.Thread | None = None
        self._refused = False
        """Whether the system refused to start the thread."""
        self._handed: queue.SimpleQueue[Callable[[], T] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[T | _Failed] = queue.SimpleQueue()
        self._told = 0
        """Pieces of work given to the thread whose answers were not taken yet."""
        self._own: deque[Callable[[], T]] = deque()
        """Work that `answer` does itself, unless it is given to the thread before."""
        self._failure: BaseException | None = None

    @property
    def is_beside(self) -> bool:
        """Whether the thread would do work that is handed now."""
        return not self._refused and crew_size(1, spared=self._spared(), busy=1) > 0

    def hand(self, work: Callable[[], T]) -> None:
        self._own.append(work)
        if self.is_beside and self._has_thread():
            self._told += len(self._own)
            while self._own:
                self._handed.put(self._own.popleft())

    def answer(self) -> T:
        """Return the result of the oldest work whose answer was not taken yet, or raise its failure."""
        if self._failure is None:
            done = self._next_done()
            if not isinstance(done, _Failed):
                return done
            self._failure = done.error
        raise self._failure

    def close(self) -> None:
        """Drop work that was not begun and wait for the thread; the caller may then free what the work uses.

        An interruption of that wait is raised afterwards.
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
            # A daemon, so that a process that forgot `close` can still exit. `close` waits for it. It is noted before
            # it starts: an interruption of its start must not leave it waiting for work for ever.
            self._thread = threading.Thread(target=self._work_on, daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread, self._refused = None, True
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
    except BaseException as failure:  # raised by `answer`
        return _Failed(failure)


def joined(thread: threading.Thread) -> None:
    """Join `thread` even if interrupted, then raise the interruption. Returns at once when called from `thread`."""
    interruption: BaseException | None = None
    while thread.is_alive() and thread is not threading.current_thread():
        try:
            thread.join()
        except BaseException as raised:  # wait on: the thread must not outlive `close`
            interruption = raised
    if interruption is not None:
        raise interruption
