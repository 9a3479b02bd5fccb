"""Whoever scrapes has a while to ask and a while to listen, and costs no more than that."""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import logging.handlers
import os
import queue
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import Gauge
from prometheus_client.registry import CollectorRegistry

from lmdbitmap.cli import scraping
from lmdbitmap.cli.scraping import serving
from lmdbitmap.nbd import listeners
from tests.helpers.support import PATIENCE_SECONDS

PLACES = 4
SHORT_S = 1.0
BETWEEN_BYTES_S = 0.05


@contextlib.contextmanager
def served(patience_s: float) -> Iterator[str]:
    registry = CollectorRegistry()
    Gauge("tracked", "a figure", registry=registry).set(7)
    with serving(registry, "127.0.0.1", 0, patience_s=patience_s) as url:
        assert url is not None
        yield url


@pytest.fixture
def url() -> Iterator[str]:
    with served(PATIENCE_SECONDS) as url:
        yield url


@pytest.fixture
def hurried_url() -> Iterator[str]:
    with served(SHORT_S) as url:
        yield url


def scraper(url: str) -> socket.socket:
    place = urlsplit(url)
    assert place.hostname is not None
    return socket.create_connection((place.hostname, place.port or 0), PATIENCE_SECONDS)


def figures(url: str) -> str:
    """Nothing where the door is still closed: a place is free a moment after its scraper hears the end."""
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as answer,
    ):
        told: bytes = answer.read()
        return told.decode()
    return ""


def await_figures(url: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "tracked 7.0" not in figures(url):
        assert time.monotonic() < deadline


def trickle_until_hung_up_on(sock: socket.socket, said: bytes) -> None:
    """Send one byte after the other, none of them late."""
    sock.settimeout(BETWEEN_BYTES_S)
    for count in range(len(said)):
        try:
            sock.send(said[count : count + 1])
            assert sock.recv(100) == b""
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            pass
        return
    pytest.fail("the server listened to the end")


@pytest.mark.parametrize("said", [b"GET /metrics?" + b"x" * 1000, b"GET / HTTP/1.1\r\nX: " + b"x" * 1000])
def test_a_scraper_that_trickles_is_hung_up_on_and_gives_its_place_back(
    hurried_url: str, said: bytes
) -> None:
    begun_s = time.monotonic()
    with ExitStack() as stack:
        trickling = [stack.enter_context(scraper(hurried_url)) for _ in range(PLACES)]
        for sock in trickling:
            sock.sendall(said[:1])
        trickle_until_hung_up_on(trickling[0], said[1:])
        assert time.monotonic() - begun_s >= SHORT_S
        assert all(hears_the_end(sock) for sock in trickling[1:])
        await_figures(hurried_url)


def hears_the_end(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_request_in_several_pieces_is_answered(url: str) -> None:
    with scraper(url) as sock:
        for piece in (b"GET /met", b"rics HTTP/1.0\r\n", b"\r\n"):
            sock.sendall(piece)
        assert sock.recv(15) == b"HTTP/1.0 200 OK"


def test_a_scraper_for_which_there_is_no_thread_takes_no_place(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        for _ in range(PLACES):
            with scraper(url) as sock:
                assert hears_the_end(sock)
    assert caplog.text.count("a scrape failed: can't start new thread") == PLACES
    assert "tracked 7.0" in figures(url)


def test_without_a_descriptor_for_a_scraper_nobody_asks_for_one_all_the_time(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread that did would take the processor from the guests."""
    steps, pauses = list[str | float](), threading.Semaphore(0)

    def refused(listening: socket.socket) -> None:
        steps.append("asked")
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def pause(seconds: float) -> None:
        steps.append(seconds)
        pauses.release()

    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "accept", refused)
        patched.setattr(listeners, "time", SimpleNamespace(sleep=pause))
        with scraper(url):
            for _ in range(5):
                assert pauses.acquire(timeout=PATIENCE_SECONDS)
    assert "cannot take a scraper in, and will try again: [Errno 24] Too many open files" in caplog.text
    assert steps[:10] == ["asked", 0.1] * 5


@pytest.fixture
def logged() -> Iterator[queue.SimpleQueue[logging.LogRecord]]:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    scraping.log.addHandler(handler)
    yield records
    scraping.log.removeHandler(handler)


def test_port_that_is_in_use_is_waited_for(logged: queue.SimpleQueue[logging.LogRecord]) -> None:
    registry = CollectorRegistry()
    Gauge("tracked", "a figure", registry=registry).set(7)
    with socket.create_server(("127.0.0.1", 0)) as other:
        host, port = other.getsockname()
        for is_freed in (False, True):
            with serving(registry, host, port, again_s=0.01) as url:
                assert url is None
                assert f"{host}:{port} is in use" in logged.get(timeout=PATIENCE_SECONDS).getMessage()
                if is_freed:
                    other.close()
                    url = f"http://{host}:{port}/metrics"
                    assert f"at {url} from now on" in logged.get(timeout=PATIENCE_SECONDS).getMessage()
                    assert "tracked 7.0" in figures(url)
    assert logged.empty()
    socket.create_server((host, port)).close()


def test_name_that_cannot_be_looked_up_now_is_waited_for(
    logged: queue.SimpleQueue[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while the host starts: guests are served meanwhile."""
    usual, tries = socket.getaddrinfo, []

    def late(host: str, *what: Any, **how: Any) -> Any:
        tries.append(host)
        if len(tries) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return usual("127.0.0.1", *what, **how)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    with serving(CollectorRegistry(), "host.example", 0, again_s=0.01) as url:
        assert url is None
        assert (
            "no name server says where host.example:0 is" in logged.get(timeout=PATIENCE_SECONDS).getMessage()
        )
        assert "from now on" in logged.get(timeout=PATIENCE_SECONDS).getMessage()
    assert tries == ["host.example"] * 3


def test_the_end_waits_for_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is asked where to listen, once the port is free."""
    asked, over, answered = threading.Event(), threading.Event(), threading.Event()
    usual = socket.getaddrinfo

    def hanging(*what: Any, **how: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            over.wait(PATIENCE_SECONDS)
            answered.set()
        return usual(*what, **how)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    with socket.create_server(("127.0.0.1", 0)) as other:
        with serving(CollectorRegistry(), *other.getsockname(), again_s=0.01):
            assert asked.wait(PATIENCE_SECONDS)
        assert not answered.is_set()
        over.set()
        assert answered.wait(PATIENCE_SECONDS)
