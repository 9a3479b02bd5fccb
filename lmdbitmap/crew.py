"""Threads that work beside the one that hands work to them, as many as processors can be spared for them.

A thread that is never idle costs nobody anything while another processor is. As many of them as there are processors
make everybody else wait for the end of a slice of time, however nice they are: two that did nothing but count made the
slowest of a hundred writes of a guest wait 3 to 12 ms on two processors, one of them no longer than none. So a job
that works beside a guest spares a processor. Where none is left for a thread, whoever waits for its work does it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def processors() -> int:
    """How many of them this process may use."""
    return len(os.sched_getaffinity(0))


def crew(most: int, *, spared: int = 0, busy: int = 1) -> Executor:
    """Up to `most` threads, beside `busy` others of the job, so that `spared` processors are left to others.

    Where nothing is to be spared there are `most`, whatever else they do.
    """
    count = min(most, processors() - busy - spared) if spared else most
    return ThreadPoolExecutor(count) if count > 0 else _Nobody()


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
