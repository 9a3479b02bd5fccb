"""Chores: done again and again by as few threads as will do, and none waits for another one that hangs."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Iterator

import pytest

from lmdbitmap.work.chores import Chore, Chores
from tests.helpers.support import PATIENCE_SECONDS, run


class Counted:
    """A chore that tells how often it was done, and by which threads; it hangs while it is held."""

    def __init__(self) -> None:
        self.chore = Chore("counted", self._work)
        self.threads: list[int] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self._done = threading.Semaphore(0)
        self._alone = threading.Lock()

    def _work(self) -> None:
        assert self._alone.acquire(blocking=False)
        self.threads.append(threading.get_ident())
        self._done.release()
        self.goes_on.wait()
        self._alone.release()

    def await_times(self, count: int) -> None:
        for _ in range(count):
            assert self._done.acquire(timeout=PATIENCE_SECONDS)


@pytest.fixture
def chores() -> Iterator[Chores]:
    """Whose threads are all gone in the end."""
    before = set(threading.enumerate())
    chores = Chores(0.005)
    yield chores
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def begun(chores: Chores, counted: list[Counted]) -> list[Counted]:
    for one in counted:
        chores.add(one.chore)
    return counted


def end_all(chores: Chores, counted: list[Counted]) -> None:
    for one in counted:
        one.goes_on.set()
        chores.end(one.chore)


def test_what_is_quick_is_done_again_and_again_by_a_few_threads(chores: Chores) -> None:
    chores.interval_s = 0.1
    all_of_them = begun(chores, [Counted() for _ in range(100)])
    for one in all_of_them:
        one.await_times(5)
    end_all(chores, all_of_them)
    assert len({thread for one in all_of_them for thread in one.threads}) <= 20


def some_hang(chores: Chores, lines_after_s: float = 0.005) -> tuple[list[Counted], list[Counted]]:
    """Those that hang by then, and the others."""
    all_of_them = [Counted() for _ in range(120)]
    for one in all_of_them[::2]:
        one.goes_on.clear()
    begun(chores, all_of_them)
    chores.interval_s = lines_after_s
    for one in all_of_them[::2]:
        one.await_times(1)
    return all_of_them[::2], all_of_them[1::2]


def test_whatever_hangs_at_once_keeps_nobody_else_waiting(chores: Chores) -> None:
    hanging, others = some_hang(chores)
    for one in others:
        one.await_times(5)
    assert [len(one.threads) for one in hanging] == [1] * 60
    for one in hanging:
        one.goes_on.set()
        one.await_times(2)
    end_all(chores, hanging + others)


def test_where_nobody_gets_on_others_come_at_once(chores: Chores) -> None:
    """And not only the next time: here is none."""
    chores.interval_s = 0.2
    (first,) = begun(chores, [Counted()])
    first.await_times(1)  # so the clock knows when the next line is due
    hanging, others = some_hang(chores, lines_after_s=3600.0)
    for one in others:
        one.await_times(1)
    end_all(chores, [first, *hanging, *others])


def test_where_all_get_on_too_slowly_there_are_more_of_them(
    chores: Chores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmdbitmap.work.chores._PATIENCE_S", 3600.0)  # so nobody is ever known to stand still
    hanging, others = some_hang(chores)
    for one in others:
        one.await_times(5)
    end_all(chores, hanging + others)


def test_whoever_is_not_needed_any_more_leaves(chores: Chores) -> None:
    hanging, others = some_hang(chores)
    assert workers() >= 60  # each hanging one keeps one, and at that moment there may be no other
    for one in hanging:
        one.goes_on.set()
    while workers() > 5:
        others[0].await_times(1)
    end_all(chores, hanging + others)


def workers() -> int:
    return sum(thread.name == "lmdbitmap chores" for thread in threading.enumerate())


def test_what_is_ended_is_not_under_way_and_is_never_done_again(chores: Chores) -> None:
    ended, other = Counted(), Counted()
    ended.goes_on.clear()
    begun(chores, [ended, other])
    ended.await_times(1)
    ending = threading.Thread(target=chores.end, args=(ended.chore,))
    ending.start()
    other.await_times(3)
    assert ending.is_alive()
    ended.goes_on.set()
    ending.join(PATIENCE_SECONDS)
    assert not ending.is_alive()
    count = len(ended.threads)
    other.await_times(3)
    assert len(ended.threads) == count
    chores.end(ended.chore)
    end_all(chores, [other])


def test_it_begins_anew_after_all_were_ended(chores: Chores) -> None:
    for _ in range(3):
        one = Counted()
        begun(chores, [one])
        one.await_times(2)
        end_all(chores, [one])


def test_a_chore_may_end_itself(chores: Chores) -> None:
    """As one does that drops the last reference to its disk."""
    ended, other = threading.Semaphore(0), Counted()

    def end_it() -> None:
        chores.end(chore)
        ended.release()

    chore = Chore("it", end_it)
    chores.add(chore)
    assert ended.acquire(timeout=PATIENCE_SECONDS)
    begun(chores, [other])
    other.await_times(3)
    assert not ended.acquire(blocking=False), "it was done once"
    end_all(chores, [other])


def test_whoever_has_the_lock_may_end_a_chore(chores: Chores) -> None:
    """A signal's handler or the garbage collector may detach a disk in the middle of anything."""
    one, other = begun(chores, [Counted(), Counted()])
    with chores._lock:
        chores.end(one.chore)
    other.await_times(3)
    assert one.chore not in chores._chores
    end_all(chores, [other])


def test_a_mistake_is_told_of_and_costs_no_other_chore(
    chores: Chores, caplog: pytest.LogCaptureFixture
) -> None:
    twice = threading.Semaphore(0)

    def fail() -> None:
        twice.release()
        raise ZeroDivisionError

    failing, other = Chore("its pass", fail), Counted()
    chores.add(failing)
    begun(chores, [other])
    for _ in range(2):
        assert twice.acquire(timeout=PATIENCE_SECONDS)
    other.await_times(2)
    chores.end(failing)
    end_all(chores, [other])
    assert "its pass failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_mistake_that_cannot_even_be_told_of_costs_no_other_chore(
    chores: Chores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the worker would end, and whoever ends the chore would wait for it for ever."""

    def fail(*_: object) -> None:
        failed.release()
        raise MemoryError

    failed, failing, other = threading.Semaphore(0), Chore("its pass", fail), Counted()
    monkeypatch.setattr("lmdbitmap.work.chores._log.exception", fail)
    chores.add(failing)
    begun(chores, [other])
    for _ in range(4):
        assert failed.acquire(timeout=PATIENCE_SECONDS)
    other.await_times(2)
    ending = threading.Thread(target=chores.end, args=[failing], daemon=True)
    ending.start()
    ending.join(PATIENCE_SECONDS)
    assert not ending.is_alive()
    end_all(chores, [other])


class ShortOfMemory(deque[Chore]):
    lacks = 3

    def append(self, chore: Chore) -> None:
        if self.lacks:
            self.lacks -= 1
            raise MemoryError
        super().append(chore)


def test_a_lack_of_memory_ends_neither_the_clock_nor_a_chore(chores: Chores) -> None:
    chores._line = line = ShortOfMemory()
    both = begun(chores, [Counted(), Counted()])
    for one in both:
        one.await_times(3)
    end_all(chores, both)
    assert line.lacks == 0


def test_without_a_thread_to_be_had_it_is_late_and_says_so_once(
    chores: Chores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, refused = threading.Thread.start, threading.Semaphore(0)

    def start_no_worker(thread: threading.Thread) -> None:
        if thread.name == "lmdbitmap chores":
            refused.release()
            raise RuntimeError("can't start new thread")
        start(thread)

    with caplog.at_level(logging.WARNING), monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", start_no_worker)
        (one,) = begun(chores, [Counted()])
        for _ in range(3):
            assert refused.acquire(timeout=PATIENCE_SECONDS)
    one.await_times(2)
    end_all(chores, [one])
    assert caplog.text.count("can't start new thread") == 1


FORK = """
import os, threading
from lmdbitmap.work.chores import Chore, Chores

def do_some(name):
    done = threading.Semaphore(0)
    chore = Chore(name, done.release)
    chores.add(chore)
    for _ in range(3):
        assert done.acquire(timeout=30)
    return chore

chores = Chores(0.005)
ours = do_some("ours")
child = os.fork()
if child == 0:
    assert not chores._chores
    theirs = do_some("theirs")
    assert chores._chores == {theirs}
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert chores._chores == {ours}
chores.end(ours)
print("fine")
"""


def test_a_forked_child_has_none_and_may_have_its_own() -> None:
    assert run(sys.executable, "-c", FORK).stdout == "fine\n"


def test_whoever_is_interrupted_while_it_ends_a_chore_waits_nevertheless(
    chores: Chores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the chore is about must not be closed under it."""
    one = Counted()
    one.goes_on.clear()
    begun(chores, [one])
    one.await_times(1)
    wait, interruptions = chores._done.wait, iter([KeyboardInterrupt, KeyboardInterrupt])

    def interrupted(timeout: float | None = None) -> bool:
        for interruption in interruptions:
            raise interruption
        one.goes_on.set()
        return wait(timeout)

    monkeypatch.setattr(chores._done, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chores.end(one.chore)
    assert one.goes_on.is_set()
    assert one.chore not in chores._under_way
