"""Threads for work that goes on beside, or nobody, where no processor is left for one; and one that keeps the order."""

from __future__ import annotations

import contextlib
import errno
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial

import pytest

from lmdbitmap.errors import StorageError
from lmdbitmap.work.crew import Crew, Follower, Spared, Threads, joined, none_spared, processors
from tests.helpers.spared import EACH, MORE_THAN_THERE_ARE, NowAndThen, all_spared
from tests.helpers.support import run


def thread_of_the_work(workers: Crew) -> int:
    return workers.submit(threading.get_ident).result()


def test_work_is_done_beside_where_nothing_is_spared() -> None:
    with Crew(1, busy=MORE_THAN_THERE_ARE) as workers:
        assert thread_of_the_work(workers) != threading.get_ident()


@pytest.mark.parametrize("busy", range(1, 4))
def test_a_thread_is_made_if_one_processor_more_than_is_busy_and_spared_is_there(busy: int) -> None:
    left = processors() - busy - 1
    with Crew(1, spared=lambda: 1, busy=busy) as workers:
        assert (thread_of_the_work(workers) == threading.get_ident()) is (left < 1)


def test_a_crew_is_asked_for_as_many_threads_as_can_be_spared_each_time() -> None:
    spared = [0]
    with Crew(1, spared=lambda: spared[0]) as workers:
        for spared[0], beside in ((0, True), (MORE_THAN_THERE_ARE, False), (0, True)):
            assert (thread_of_the_work(workers) != threading.get_ident()) is beside


def test_without_threads_work_is_done_once_by_whoever_wants_its_result() -> None:
    done: list[int] = []

    def work(number: int, *, times: int) -> int:
        done.append(number)
        return number * times

    with Crew(8, spared=all_spared) as workers:
        undone: list[Future[int]] = [workers.submit(work, number, times=10) for number in range(3)]
        assert done == []
        assert [undone[number].result() for number in (2, 0, 2)] == [20, 0, 20]
    assert done == [2, 0]


AFTER_THE_MAIN_THREAD = """
import threading
from lmdbitmap.errors import StorageError
from lmdbitmap.work.crew import Threads

def work():
    threading.main_thread().join()
    with Threads(1) as threads:
        try:
            threads.submit(print)
        except StorageError as refused:
            print(refused)

threading.Thread(target=work).start()
"""


def test_after_the_end_of_the_main_thread_it_is_said_that_it_should_have_waited() -> None:
    """Python makes no pool a thread then; a higher limit would not help."""
    said = run(sys.executable, "-c", AFTER_THE_MAIN_THREAD).stdout
    assert "interpreter shutdown; let the main thread wait" in said


@pytest.mark.parametrize("made", [lambda: Crew(2), lambda: Threads(2)])
def test_a_system_that_refuses_a_thread_is_told_of_in_words(
    made: Callable[[], Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with (
        made() as workers,
        pytest.raises(StorageError, match="can't start new thread; have fewer") as refused,
    ):
        workers.submit(threading.get_ident)
    assert refused.value.errno == errno.EAGAIN


def test_without_threads_what_the_work_raises_is_raised_each_time() -> None:
    def work() -> None:
        raise OSError("no")

    with Crew(1, spared=all_spared) as workers:
        undone = workers.submit(work)
    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            undone.result()


# --- one that keeps the order ---


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
def test_a_follower_answers_in_the_order_in_which_it_was_handed_work(spared: Spared) -> None:
    follower: Follower[int] = Follower(spared=spared)
    with contextlib.closing(follower):
        for number in range(50):
            follower.hand(lambda number=number: number)  # type: ignore[misc]
        assert [follower.answer() for _ in range(50)] == list(range(50))


def test_a_follower_works_beside_if_there_is_a_processor_for_it() -> None:
    for spared, beside in ((none_spared, True), (all_spared, False)):
        follower: Follower[int] = Follower(spared=spared)
        with contextlib.closing(follower):
            follower.hand(threading.get_ident)
            assert follower.is_beside is beside
            assert (follower.answer() != threading.get_ident()) is beside


@pytest.mark.parametrize("seed", range(20))
def test_a_follower_keeps_the_order_while_its_processor_comes_and_goes(seed: int) -> None:
    """And does one thing at a time, whoever does it."""
    lot, at_work, follower = random.Random(seed), threading.Lock(), Follower[int](spared=NowAndThen(seed))
    handed = answered = 0
    done: list[int] = []

    def work(number: int) -> int:
        assert at_work.acquire(blocking=False), "two at once"
        done.append(number)
        at_work.release()
        return number

    with contextlib.closing(follower):
        while answered < 200:
            if handed == answered or lot.random() < 0.5:
                follower.hand(partial(work, handed))
                handed += 1
            else:
                assert follower.answer() == answered
                answered += 1
        while answered < handed:
            assert follower.answer() == answered
            answered += 1
    assert done == list(range(handed))


def test_what_waits_for_whoever_asks_is_the_threads_once_there_is_a_processor() -> None:
    spared = [MORE_THAN_THERE_ARE]
    follower: Follower[int] = Follower(spared=lambda: spared[0])
    with contextlib.closing(follower):
        follower.hand(threading.get_ident)
        spared[0] = 0
        follower.hand(threading.get_ident)
        assert threading.get_ident() not in {follower.answer(), follower.answer()}


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
def test_after_a_failure_a_follower_does_nothing_more_and_says_so_each_time(spared: Spared) -> None:
    done: list[int] = []
    follower: Follower[None] = Follower(spared=spared)
    with contextlib.closing(follower):
        follower.hand(lambda: done.append(1))
        follower.hand(lambda: [][0])
        follower.hand(lambda: done.append(3))
        follower.answer()
        for _ in range(3):
            with pytest.raises(IndexError):
                follower.answer()
    assert done == [1]


def test_a_follower_that_is_closed_ends_what_it_does_and_leaves_the_rest() -> None:
    begun, told_to_end, done = threading.Event(), threading.Event(), []
    before = set(threading.enumerate())

    class Handed(queue.SimpleQueue[Callable[[], None] | None]):
        def put(
            self, item: Callable[[], None] | None, block: bool = True, timeout: float | None = None
        ) -> None:
            super().put(item)
            if item is None:
                told_to_end.set()

    def slow() -> None:
        begun.set()
        assert told_to_end.wait(10)
        done.append("slow")

    follower: Follower[None] = Follower()
    follower._handed = Handed()
    follower.hand(slow)
    follower.hand(lambda: done.append("never"))
    assert begun.wait(10)
    follower.close()
    assert done == ["slow"]
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
def test_a_follower_that_was_closed_says_so(spared: Spared) -> None:
    follower: Follower[int] = Follower(spared=spared)
    follower.hand(lambda: 1)
    follower.close()
    follower.close()
    follower.hand(lambda: 2)
    with pytest.raises(RuntimeError, match="was closed"):
        follower.answer()


def test_a_follower_whose_thread_cannot_start_has_whoever_asks_do_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    follower: Follower[int] = Follower()
    with contextlib.closing(follower):
        for _ in range(2):
            follower.hand(threading.get_ident)
            assert follower.answer() == threading.get_ident()


def test_a_follower_whose_start_was_interrupted_ends_when_it_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, start, begun = set(threading.enumerate()), threading.Thread.start, list[threading.Thread]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        begun.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    follower: Follower[None] = Follower()
    with contextlib.closing(follower), pytest.raises(KeyboardInterrupt):
        follower.hand(lambda: None)
    assert len(begun) == 1
    assert set(threading.enumerate()) <= before


def test_closing_a_follower_waits_for_its_work_whatever_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the work uses, as a descriptor, is given back after that."""
    begun, go_on, done = threading.Event(), threading.Event(), []
    join = threading.Thread.join

    def work() -> None:
        begun.set()
        done.append(go_on.wait(10))

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        if not go_on.is_set():
            go_on.set()
            raise KeyboardInterrupt
        join(thread, timeout)

    follower: Follower[None] = Follower()
    follower.hand(work)
    assert begun.wait(10)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        follower.close()
    assert done == [True]


def test_a_program_ends_though_it_forgot_to_close_a_follower() -> None:
    program = "from lmdbitmap.work.crew import Follower; f = Follower(); f.hand(print); f.answer()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, capture_output=True)


def test_nobody_waits_for_his_own_end() -> None:
    joined(threading.current_thread())
    assert threading.current_thread().is_alive()
