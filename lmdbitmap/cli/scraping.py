"""The HTTP server that Prometheus scrapes.

It runs in the process that a guest's disk depends on, so clients can cost it a few threads for a few seconds and no
more. A client has `_PATIENCE_S` to send its whole request, whether it is silent or sends byte after byte, and as long
again to receive each part of the answer.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

from prometheus_client import MetricsHandler
from prometheus_client.registry import CollectorRegistry

from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from lmdbitmap.nbd.listeners import TcpListener, accepted

log = logging.getLogger(__name__)

_MOST_SCRAPERS: Final = 4
_PATIENCE_S: Final = 5.0
_AGAIN_S: Final = 10.0


@contextlib.contextmanager
def serving(
    registry: CollectorRegistry,
    host: str,
    port: int,
    *,
    patience_s: float = _PATIENCE_S,
    again_s: float = _AGAIN_S,
) -> Iterator[str | None]:
    """Answer GET with the registry's metrics until the block ends; yield the URL.

    Yield None if nobody can listen there now, as where the port is in use: no guest is to wait for that. It is logged,
    and tried again every `again_s`. Raises `InvalidArgument` for what is no address.
    """
    door = _Door(host, port, _handler(registry, patience_s))
    try:
        url = door.open()
    except InvalidArgument:
        raise
    except (LmdbitmapError, OSError) as refusal:
        log.warning("nobody can scrape the metrics yet, which is tried again: %s", refusal)
        url = None
    thread = threading.Thread(target=door.answer, args=[again_s], name="lmdbitmap metrics", daemon=True)
    thread.start()
    try:
        yield url
    finally:
        door.shut()  # the thread may hang yet: no guest's disk waits for its name server
        door.close()


class _Door:
    """Where scrapers come in, once it could be opened and until it is shut."""

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self._host, self._port, self._handler = host, port, handler
        self._server: _Server | None = None
        self._over = threading.Event()
        self._turn = threading.Lock()

    def open(self) -> str:
        """Return the URL. Raise `Busy` if the port is used, and as `TcpListener` does."""
        listener = TcpListener(self._host, self._port)
        with self._turn:
            if self._over.is_set():
                listener.close()
            else:
                self._server = _Server(listener, self._handler)
        return f"http://{urlsplit(listener.uri('')).netloc}/metrics"

    def answer(self, again_s: float) -> None:
        while self._server is None:
            if self._over.wait(again_s):
                return
            with contextlib.suppress(LmdbitmapError, OSError):
                log.warning("the metrics can be scraped at %s from now on", self.open())
        self._server.serve_forever()

    def shut(self) -> None:
        with self._turn:
            self._over.set()
        if self._server is not None:
            self._server.shutdown()

    def close(self) -> None:
        if self._server is not None:
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    """Serves at a socket that is bound already; a client above `_MOST_SCRAPERS` is disconnected."""

    daemon_threads = True

    def __init__(self, listener: TcpListener, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener.sock
        self._room = threading.BoundedSemaphore(_MOST_SCRAPERS)

    def get_request(self) -> tuple[Any, tuple[str, int]]:
        sock = accepted(self.socket, "scraper")
        if sock is None:
            raise ConnectionAbortedError  # the base class then waits for the next
        return sock, ("", 0)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started for it
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("a scrape failed: %s", sys.exc_info()[1])


def _handler(registry: CollectorRegistry, patience_s: float) -> type[BaseHTTPRequestHandler]:
    class Handler(MetricsHandler):
        timeout = patience_s

        def setup(self) -> None:
            super().setup()
            self.rfile = io.BufferedReader(_Hurried(self.connection, patience_s))

        def do_GET(self) -> None:  # noqa: N802  # as HTTP spells it
            self.connection.settimeout(patience_s)
            super().do_GET()

    Handler.registry = registry
    return Handler


class _Hurried(io.RawIOBase):
    """Reads from a socket for at most `patience_s` in all. A socket's own timeout begins anew with every byte."""

    def __init__(self, sock: Any, patience_s: float) -> None:
        self._sock = sock
        self._deadline_s = time.monotonic() + patience_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the request took too long")
        self._sock.settimeout(left_s)
        count: int = self._sock.recv_into(buffer)
        return count
