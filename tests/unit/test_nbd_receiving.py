"""Whether a thread polls before it sleeps: while that pays, and never while other threads are busy."""

from __future__ import annotations

import socket

import pytest

from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.server.connection import Connection
from lmdbitmap.nbd.server.inbox import BATCH_BYTES, Inbox
from lmdbitmap.nbd.server.receiving import Lookout


class Watched:
    """A lookout for what is there or not, and what it did."""

    def __init__(self) -> None:
        self.is_there = False
        self.looks = self.sleeps = 0
        self.lookout = Lookout(self._look, self._sleep)

    def _look(self) -> str | None:
        self.looks += 1
        return "found" if self.is_there else None

    def _sleep(self) -> str:
        self.sleeps += 1
        return "woken"

    def polls_now(self) -> bool:
        """Wait once, and tell whether it looked."""
        before = self.looks
        self.lookout.wait()
        return self.looks > before


def test_every_poll_in_vain_doubles_the_naps_until_the_next_and_a_find_starts_anew() -> None:
    watched = Watched()
    assert "".join("p" if watched.polls_now() else "-" for _ in range(14)) == "p-p--p----p---"
    assert watched.sleeps == 14
    while not watched.polls_now():
        pass
    watched.is_there = True
    while not watched.polls_now():
        pass
    assert watched.lookout.wait() == "found"
    watched.is_there = False
    assert "".join("p" if watched.polls_now() else "-" for _ in range(5)) == "p-p--"


def test_nobody_polls_while_others_are_busy_and_everybody_does_afterwards() -> None:
    watched = Watched()
    watched.is_there = True
    watched.lookout.polls = False
    assert [watched.lookout.wait() for _ in range(3)] == ["woken"] * 3
    assert watched.looks == 0
    watched.lookout.polls = True
    assert watched.lookout.wait() == "found"


@pytest.mark.parametrize(("needed", "moved"), [(9, False), (10, True)])
def test_unfinished_request_is_moved_if_its_end_has_no_room(needed: int, moved: bool) -> None:
    """A receive into no room at all would look like a client that is gone."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox = Inbox(ours)
        inbox.start, inbox.end = BATCH_BYTES - 9, BATCH_BYTES - 1
        inbox.make_room_for(needed)
        assert (inbox.start, inbox.end) == ((0, 8) if moved else (BATCH_BYTES - 9, BATCH_BYTES - 1))


def test_connection_polls_as_it_is_told() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours, PlainDisk(MemoryDevice(512)), structured=False, contexts={})
        theirs.shutdown(socket.SHUT_WR)
        for polls in (False, True):
            assert not connection.serve_some(polls=polls)
            assert connection._inbox.lookout.polls is polls
        connection.close()
