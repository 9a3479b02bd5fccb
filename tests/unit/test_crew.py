"""Threads for work that goes on beside, or nobody, where no processor is left for one."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from lmdbitmap.crew import crew, processors

NOBODY = 1 << 20
"""Processors to be spared: more than there are."""


def thread_of_the_work(**spared: int) -> int:
    with crew(1, **spared) as workers:
        return workers.submit(threading.get_ident).result()


def test_work_is_done_beside_where_nothing_is_spared() -> None:
    assert thread_of_the_work(busy=NOBODY) != threading.get_ident()


@pytest.mark.parametrize("busy", range(1, 4))
def test_a_thread_is_made_if_one_processor_more_than_is_busy_and_spared_is_there(busy: int) -> None:
    left = processors() - busy - 1
    assert (thread_of_the_work(spared=1, busy=busy) == threading.get_ident()) is (left < 1)


def test_without_threads_work_is_done_once_by_whoever_wants_its_result() -> None:
    done: list[int] = []

    def work(number: int, *, times: int) -> int:
        done.append(number)
        return number * times

    with crew(8, spared=NOBODY) as workers:
        undone: list[Future[int]] = [workers.submit(work, number, times=10) for number in range(3)]
        assert done == []
        assert [undone[number].result() for number in (2, 0, 2)] == [20, 0, 20]
    assert done == [2, 0]


def test_without_threads_what_the_work_raises_is_raised_each_time() -> None:
    def work() -> None:
        raise OSError("no")

    with crew(1, spared=NOBODY) as workers:
        undone = workers.submit(work)
    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            undone.result()
