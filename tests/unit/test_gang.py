"""A gang does each piece of a plan once, whoever does it, and what fails ends all of it."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.work.crew import Spared, none_spared
from lmdbitmap.work.gang import MOST_WORKERS, Gang
from tests.helpers.spared import EACH, MORE_THAN_THERE_ARE
from tests.helpers.support import run

PATIENCE_S = 10.0


def gang(
    work: Callable[[int, str], None],
    spared: Spared = none_spared,
    interrupt: Callable[[], None] | None = None,
) -> Gang[str]:
    return Gang(lambda: work, spared=spared, interrupt=interrupt or (lambda: None))


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 1000])
def test_each_piece_is_done_once_and_told_its_number(count: int, spared: Spared) -> None:
    before, done = set(threading.enumerate()), []
    gang(lambda number, piece: done.append((number, piece)), spared).do(map(str, range(count)))
    assert sorted(done) == [(number, str(number)) for number in range(count)]
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
def test_in_turn_they_come_in_the_order_of_the_plan(spared: Spared) -> None:
    came: list[int] = []

    def work(number: int, piece: str) -> None:
        with made.in_turn(number):
            came.append(number)

    made = gang(work, spared)
    made.do(map(str, range(2000)))
    assert came == list(range(2000))


def test_two_pieces_are_done_at_once() -> None:
    """Nobody comes through the barrier alone."""
    barrier = threading.Barrier(2)
    gang(lambda number, piece: None if number > 1 else _meet(barrier)).do("abcdefgh")


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(PATIENCE_S)


def test_without_a_processor_for_others_the_caller_does_it_all() -> None:
    by = set()
    work = gang(lambda number, piece: by.add(threading.current_thread()), lambda: MORE_THAN_THERE_ARE)
    work.do("abcdefgh")
    assert by == {threading.current_thread()}


def test_each_thread_has_its_own() -> None:
    made: list[threading.Thread] = []
    barrier = threading.Barrier(2)

    def new_work() -> Callable[[int, str], None]:
        mine = threading.current_thread()
        made.append(mine)

        def work(number: int, piece: str) -> None:
            assert threading.current_thread() is mine
            if number < 2:
                barrier.wait(PATIENCE_S)

        return work

    Gang(new_work).do("abcdefgh")
    assert len(made) == len(set(made)) >= 2


def test_it_is_told_in_the_callers_thread_and_after_the_end() -> None:
    done: list[int] = []
    told: list[tuple[int, threading.Thread]] = []
    work = gang(lambda number, piece: done.append(number))
    work.do(map(str, range(50)), lambda: told.append((len(done), threading.current_thread())))
    assert told[-1] == (50, threading.current_thread())
    assert {thread for _, thread in told} == {threading.current_thread()}


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
@pytest.mark.parametrize("bad", [0, 1, 30])
def test_what_fails_ends_all_and_interrupts_what_hangs(bad: int, spared: Spared) -> None:
    before, interrupted = set(threading.enumerate()), threading.Event()

    def work(number: int, piece: str) -> None:
        if number == bad:
            raise KeyError(piece)
        if number == bad + 1:
            assert interrupted.wait(PATIENCE_S), "it hangs"

    with pytest.raises(KeyError, match=str(bad)):
        gang(work, spared, interrupted.set).do(map(str, range(100)))
    assert interrupted.is_set()
    assert set(threading.enumerate()) <= before


def test_whoever_waits_for_a_turn_that_will_not_come_ends_too() -> None:
    """Whichever of both is the caller's."""
    waits = threading.Event()

    def work(number: int, piece: str) -> None:
        if number == 0:
            assert waits.wait(PATIENCE_S)
            raise KeyError(piece)
        waits.set()
        with made.in_turn(number):
            raise AssertionError("it had its turn")

    made = gang(work)
    with pytest.raises(KeyError, match="a"):
        made.do("abcd")


def test_a_plan_that_fails_ends_it() -> None:
    def plan() -> Iterator[str]:
        yield from "abcdefgh"
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        gang(lambda number, piece: None).do(plan())


def test_what_the_listener_raises_ends_it() -> None:
    def cancel() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gang(lambda number, piece: None).do(map(str, range(100)), cancel)


def test_a_piece_that_got_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of defence, should the reasoning about threads be wrong."""

    class Losing(Gang[str]):
        def _do_next(self, work: Callable[[int, str], None]) -> None:
            if len(self._planned) == 1:
                self._planned.clear()
            else:
                super()._do_next(work)

    with pytest.raises(
        LmdbitmapError, match=r"^\d of 3 pieces or more were done: this is a mistake of lmdbitmap"
    ):
        Losing(lambda: lambda number, piece: None, spared=lambda: MORE_THAN_THERE_ARE).do("abc")


def test_a_plan_that_is_slower_than_the_helpers_is_told_of_and_can_be_cancelled() -> None:
    """They take each piece as soon as it is planned."""
    planned: list[int] = []

    def plan() -> Iterator[str]:
        for number in range(1000):
            planned.append(number)
            yield str(number)
            _wait_until(lambda: len(done) == len(planned))

    def cancel() -> None:
        if len(done) >= 20:
            raise KeyboardInterrupt

    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        gang(lambda number, piece: done.append(number)).do(plan(), cancel)
    assert len(planned) < 50


def _wait_until(holds: Callable[[], bool]) -> None:
    """For a moment: where the caller is to do a piece itself, nobody else does."""
    stop = time.monotonic() + 0.002
    while not holds() and time.monotonic() < stop:
        pass


def test_a_failure_of_a_helper_ends_a_plan_that_goes_on() -> None:
    planned: list[int] = []
    failed = threading.Event()

    def plan() -> Iterator[str]:
        for number in range(1000):
            planned.append(number)
            yield str(number)
            if number > 2 * MOST_WORKERS:  # more than is planned before the first helper begins
                assert failed.wait(PATIENCE_S)

    def work(number: int, piece: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise KeyError(piece)

    with pytest.raises(KeyError):
        gang(work, interrupt=failed.set).do(plan())
    assert len(planned) < 20


def test_a_guest_that_wakes_up_gets_its_processor_though_nothing_new_is_planned() -> None:
    """A helper may be late with the piece that it has, but takes no other one."""
    awake, all_rest, barrier = threading.Event(), threading.Event(), threading.Barrier(2)
    resting: set[threading.Thread] = set()
    by: list[tuple[int, threading.Thread]] = []

    class Watched(Gang[str]):
        def _wait(self) -> None:
            if not self._wanted:
                resting.add(threading.current_thread())
            if resting.issuperset(self._threads):
                all_rest.set()
            super()._wait()

    def spared() -> int:
        return MORE_THAN_THERE_ARE if awake.is_set() else 0

    def work(number: int, piece: str) -> None:
        if number < 2:
            _meet(barrier)  # so a helper is at work
        if number == 10:
            awake.set()
        assert number < 10 or awake.wait(PATIENCE_S)
        by.append((number, threading.current_thread()))

    def plan() -> Iterator[str]:
        yield from map(str, range(40))
        assert all_rest.wait(PATIENCE_S)
        for number in range(40, 60):
            yield str(number)
            time.sleep(0.001)  # so that a helper has it, if one takes what it should leave

    Watched(lambda: work, spared=spared).do(plan())
    assert {thread for number, thread in by if number >= 40} == {threading.main_thread()}


def test_few_pieces_are_shared_too() -> None:
    barrier = threading.Barrier(2)
    gang(lambda number, piece: _meet(barrier)).do("ab")


@pytest.mark.parametrize("helpers", [1, 3])
def test_whoever_interrupts_the_end_waits_for_it_nevertheless(
    helpers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first interruption ends the work, the others come while that is waited for."""
    monkeypatch.setattr("lmdbitmap.work.gang.processors", lambda: helpers + 1)
    monkeypatch.setattr("lmdbitmap.work.crew.processors", lambda: helpers + 1)
    working, let = threading.Semaphore(0), threading.Event()
    ended: list[int] = []
    joins = itertools.count()
    real = threading.Thread.join

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        if next(joins) < 3:
            raise KeyboardInterrupt
        let.set()
        real(thread, timeout)

    def work(number: int, piece: str) -> None:
        if threading.current_thread() is threading.main_thread():
            for _ in range(helpers):
                assert working.acquire(timeout=PATIENCE_S)
            raise KeyboardInterrupt
        working.release()
        assert let.wait(PATIENCE_S)
        ended.append(number)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gang(work).do(map(str, range(100)))
    assert len(ended) == helpers


def test_a_thread_whose_start_was_interrupted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real, ended = threading.Thread.start, []
    started, interrupted = threading.Event(), threading.Event()

    def start(thread: threading.Thread) -> None:
        real(thread)
        assert started.wait(PATIENCE_S)
        raise KeyboardInterrupt

    def work(number: int, piece: str) -> None:
        started.set()
        assert interrupted.wait(PATIENCE_S)
        ended.append(number)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        gang(work, interrupt=interrupted.set).do(map(str, range(100)))
    assert ended


def test_an_interruption_of_the_noting_of_a_failure_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else whoever waits for a turn would wait for ever, and the caller for him."""
    waits, real, calls = threading.Event(), Gang._fail, itertools.count()

    def fail(self: Gang[str], failure: BaseException) -> None:
        if next(calls) == 0:
            raise KeyboardInterrupt
        real(self, failure)

    def work(number: int, piece: str) -> None:
        if threading.current_thread() is threading.main_thread():
            assert waits.wait(PATIENCE_S)
            raise KeyError(piece)
        waits.set()
        with made.in_turn(1000):
            raise AssertionError("it had its turn")

    monkeypatch.setattr(Gang, "_fail", fail)
    made = gang(work)
    with pytest.raises(KeyboardInterrupt):
        made.do("abcd")


def test_an_interruption_before_the_end_is_waited_for_leaves_nobody_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever is left would write on, to a file that is closed by then."""
    real, calls, ended = Gang._dismiss, itertools.count(), list[int]()
    works, let = threading.Event(), threading.Event()

    def dismiss(self: Gang[str], failure: BaseException | None) -> None:
        if next(calls) == 0:
            let.set()
            raise KeyboardInterrupt
        real(self, failure)

    def work(number: int, piece: str) -> None:
        if threading.current_thread() is threading.main_thread():
            assert works.wait(PATIENCE_S)
            return
        works.set()
        assert let.wait(PATIENCE_S)
        time.sleep(0.05)
        ended.append(number)

    monkeypatch.setattr(Gang, "_dismiss", dismiss)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        gang(work).do("ab")
    assert len(ended) == 1
    assert set(threading.enumerate()) <= before


def test_an_interruption_of_a_wait_that_just_gave_up_the_lock_is_raised_as_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(number: int, piece: str) -> None:
        with made.in_turn(1000):
            raise AssertionError("it had its turn")

    def wait() -> None:
        made._lock.release()
        raise KeyboardInterrupt

    made = gang(work, lambda: MORE_THAN_THERE_ARE)
    monkeypatch.setattr(made._news, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        made.do("ab")


def test_a_device_that_cannot_be_interrupted_hides_no_failure_and_ends_the_work_all_the_same() -> None:
    calls = itertools.count()

    def interrupt() -> None:
        assert next(calls) > 100, "it is asked again and again"  # an error each time

    def work(number: int, piece: str) -> None:
        raise ValueError(piece)

    with pytest.raises(ValueError, match="a"):
        gang(work, interrupt=interrupt).do("a")
    assert next(calls) < 10


INTERRUPTED_AGAIN_AND_AGAIN = """
import random, signal
from lmdbitmap.work import crew, gang

gang.processors = crew.processors = lambda: 3
signal.signal(signal.SIGALRM, signal.default_int_handler)

def work(number, piece):
    for _ in range(300):
        pass
    with made.in_turn(number):
        pass

for _ in range(150):
    made = gang.Gang(lambda: work)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.02))
            made.do(map(str, range(3000)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:  # which may come just before the timer is stopped, too
        pass
    assert not any(thread.is_alive() for thread in made._threads)
"""


def test_whatever_a_signal_interrupts_all_threads_end() -> None:
    """One that comes as a lock is given back must not leave it held: nobody would ever get it."""
    run(sys.executable, "-c", INTERRUPTED_AGAIN_AND_AGAIN, timeout=120)
