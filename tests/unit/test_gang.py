"""A gang does each piece of a plan once, whoever does it, and what fails ends all of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from lmdbitmap.crew import Spared, none_spared
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.gang import Gang
from tests.spared import EACH, MORE_THAN_THERE_ARE

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
