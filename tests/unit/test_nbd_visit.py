"""A visit by itself: what it asks of its server and when, and how it ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.server import visit as visiting
from lmdbitmap.nbd.server.complaints import Volume
from lmdbitmap.nbd.server.rounds import Rounds
from lmdbitmap.nbd.server.visit import Offer, Visit
from tests.helpers.nbd_raw import GO, READ, RawClient, option, string
from tests.helpers.support import PATIENCE_SECONDS

LIST = 3


class House:
    """Serves one disk, and remembers how often it was asked what it has, and which visits have ended."""

    def __init__(self) -> None:
        self.asked = 0
        self.ended = threading.Event()
        self.volume = Volume()

    def served(self) -> Mapping[str, Offer]:
        self.asked += 1
        return {"disk": Offer(PlainDisk(MemoryDevice(1 << 20)), {})}

    def enter(self, visit: Visit, name: str) -> bool:
        visit.export_name = name
        return True

    def visit(self) -> tuple[Visit, RawClient]:
        ours, theirs = socket.socketpair()
        visit = Visit(
            ours,
            self.served,
            handshake_timeout_s=PATIENCE_SECONDS,
            enter=self.enter,
            ended=lambda _: self.ended.set(),
            rounds=Rounds(),
            volume=self.volume,
        )
        return visit, RawClient(theirs)


def test_nothing_is_looked_up_for_who_does_not_ask() -> None:
    house = House()
    visit, client = house.visit()
    visit.start()
    with client:
        client.greet()
        client.send(option(99))
        client.receive(20)
    assert house.ended.wait(PATIENCE_SECONDS)
    assert house.asked == 0


def test_a_client_keeps_nothing_but_the_disk_that_it_chose() -> None:
    """It may stay for weeks, and the others are given up meanwhile."""
    house = House()
    visit, client = house.visit()
    visit.start()
    with client:
        client.go("disk")
        assert client.do(READ, 0, 1).error == 0
        assert visit._offered == {}


def test_time_that_an_answer_took_counts_for_the_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowHouse(House):
        def served(self) -> Mapping[str, Offer]:
            clock.now_s += PATIENCE_SECONDS + 1
            return super().served()

    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(visiting, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    house = SlowHouse()
    visit, client = house.visit()
    visit.start()
    with client:
        client.greet()
        client.send(option(LIST) + option(GO, string("disk") + b"\0\0"))
        assert client.is_closed_by_server()
    assert house.ended.wait(PATIENCE_SECONDS)
    assert (house.asked, visit.export_name) == (1, None)


def test_a_visit_without_a_thread_has_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits for all to end waits for nothing else. A client that tries again for ever fills no log."""

    def no_more_threads(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more_threads)
    house = House()
    visit, client = house.visit()
    with client:
        assert not visit.start()
        assert client.is_closed_by_server()
    assert house.ended.is_set()
    assert visit.join(0)
    for _ in range(30):
        visit, client = house.visit()
        with client:
            assert not visit.start()
    us = f"process {os.getpid()} of user {os.getuid()}"
    told = f"{us} was turned away: there is no thread for it (can't start new thread)"
    assert caplog.messages == [told] * 10
