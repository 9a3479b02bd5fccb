"""One encrypted connection, and two threads that use it."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from lmdbitmap.nbd.client.tls import TlsWire
from lmdbitmap.nbd.tls import client_context, server_context
from tests.helpers.certificates import Certificates
from tests.helpers.far_tls import papers
from tests.helpers.support import PATIENCE_SECONDS, requires

__all__ = ["papers"]

MIB = 1 << 20

pytestmark = requires("openssl")


@pytest.fixture
def wired(papers: Certificates) -> Iterator[tuple[TlsWire, ssl.SSLSocket]]:
    """A connection of ours, and its other end."""
    here, there = socket.socketpair()
    server, client = server_context(str(papers.folder)), client_context(str(papers.folder))
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server.wrap_socket, there, server_side=True)
        wire = TlsWire(client.wrap_socket(here, server_hostname="localhost"))
        with closing(wire), accepted.result(PATIENCE_SECONDS) as end:
            yield wire, end


def test_openssl_is_never_entered_by_two_threads_at_once(wired: tuple[TlsWire, ssl.SSLSocket]) -> None:
    """While one of its calls runs, the other thread is given every chance to begin one."""
    wire, end = wired
    inside, overlaps = [0], [0]
    ready = wire._when_ready

    def watched(act: Callable[[memoryview], int]) -> Callable[[memoryview], int]:
        def call(view: memoryview) -> int:
            inside[0] += 1
            try:
                for _ in range(20):
                    os.sched_yield()
                    overlaps[0] += inside[0] > 1
                return act(view)
            finally:
                inside[0] -= 1

        return call

    def receive() -> int:
        count, buffer = 0, memoryview(bytearray(4096))
        while count < 300_000:
            count += ready(watched(wire._sock.recv_into), buffer)
        return count

    def send() -> int:
        left = memoryview(bytes(300_000))
        while left:
            left = left[ready(watched(wire._sock.send), left[:4096]) :]
        return 300_000

    def echo() -> int:
        count = 0
        while count < 300_000:
            data = end.recv(4096)
            end.sendall(data)
            count += len(data)
        return count

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work) for work in (receive, send, echo)]
        assert [one.result(PATIENCE_SECONDS) for one in working] == [300_000] * 3
    assert overlaps == [0]


def test_whoever_receives_when_the_connection_is_ended_is_given_no_bytes_of_the_encryption(
    wired: tuple[TlsWire, ssl.SSLSocket],
) -> None:
    wire, end = wired
    end.sendall(b"an answer")
    wire.shutdown(socket.SHUT_WR)
    buffer = bytearray(100)
    assert bytes(buffer[: wire.recv_into(memoryview(buffer))]) == b"an answer"
    end.close()
    assert wire.recv_into(memoryview(buffer)) == 0


def test_what_openssl_holds_already_is_not_waited_for(wired: tuple[TlsWire, ssl.SSLSocket]) -> None:
    wire, end = wired
    wire.settimeout(PATIENCE_SECONDS)
    end.sendall(b"one record")
    buffer = memoryview(bytearray(1))
    assert b"".join(bytes(buffer[: wire.recv_into(buffer)]) for _ in range(10)) == b"one record"


def test_time_is_up_for_who_receives_and_for_who_sends(wired: tuple[TlsWire, ssl.SSLSocket]) -> None:
    wire, _ = wired
    wire.settimeout(0.01)
    with pytest.raises(TimeoutError):
        wire.recv_into(memoryview(bytearray(1)))
    with pytest.raises(TimeoutError):
        wire.sendall(bytes(64 * MIB))
