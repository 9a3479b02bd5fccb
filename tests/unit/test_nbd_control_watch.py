"""The watch over served disks: what it counts, and that its rates are of the last seconds only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.control.watch import Watch
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.work.latencies import Latencies
from tests.helpers.nbd_raw import DISC, FLUSH, READ, WRITE, RawClient, request

SIZE = 1 << 20
REQUESTS = 20
ROUNDED_S = 0.0006
"""Seconds are told in thousandths, and the test takes only a few of them."""


def use(path: Path) -> None:
    """Twenty requests, all of them counted on return."""
    with RawClient.connect(str(path)) as client:
        client.go("sda")
        for _ in range(REQUESTS - 1):
            assert client.do(WRITE, 0, 512, data=bytes(512)).error == 0
        assert client.do(FLUSH).error == 0
        client.send(request(DISC))
        assert client.is_closed_by_server()


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_facts_are_what_was_done(socket_path: Path) -> None:
    server, commits = Server({"sda": PlainDisk(MemoryDevice(SIZE))}), Latencies()
    watch = Watch(server, {"sda": commits})
    server.listen_unix(str(socket_path))
    server.start()
    try:
        use(socket_path)
        commits.count(3_000_000)
        with RawClient.connect(str(socket_path)) as client:
            client.go("sda")
            client.do(READ, 0, 1)
            facts: dict[str, Any] = watch.facts("sda") or {}
            assert json.loads(json.dumps(facts)) == facts
            assert watch.facts("another") is None
    finally:
        assert server.stop()
    assert facts["connections"] == {"now": 1, "ever": 2}
    assert facts["requests"]["writes"] == REQUESTS - 1
    assert facts["requests"]["flushes"] == facts["requests"]["reads"] == 1
    assert facts["latencies"]["commit"]["max_ns"] == 3_000_000
    assert facts["latencies"]["flush"]["count"] == 1
    assert facts["latencies"]["batch"]["count"] > 0
    rates = facts["rates"]
    rate, seconds = rates["requests"]["writes"], rates["seconds"]
    assert rate * (seconds - ROUNDED_S) <= REQUESTS - 1 <= rate * (seconds + ROUNDED_S)
    assert rates["commits"] > 0
    assert rates["received"] > rates["sent"] > 0


def test_rates_are_of_the_last_ten_ticks(socket_path: Path) -> None:
    server, commits = Server({"sda": PlainDisk(MemoryDevice(SIZE))}), Latencies()
    watch = Watch(server, {"sda": commits})
    server.listen_unix(str(socket_path))
    server.start()
    try:
        use(socket_path)
    finally:
        assert server.stop()

    def writes_a_second() -> float:
        facts: dict[str, Any] = watch.facts("sda") or {}
        rate: float = facts["rates"]["requests"]["writes"]
        return rate

    for _ in range(9):
        watch.tick()
        assert writes_a_second() > 0
    watch.tick()
    assert writes_a_second() == 0
