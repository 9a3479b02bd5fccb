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

from lmdbitmap.nbd.listeners import TcpListener, accepted

log = logging.getLogger(__name__)

_MOST_SCRAPERS: Final = 4
_PATIENCE_S: Final = 5.0


@contextlib.contextmanager
def serving(
    registry: CollectorRegistry, host: str, port: int, *, patience_s: float = _PATIENCE_S
) -> Iterator[str]:
    """Answer GET with the registry's metrics until the block ends; yield the URL. Raises `Busy` if the port is used."""
    listener = TcpListener(host, port)
    server = _Server(listener, _handler(registry, patience_s))
    thread = threading.Thread(target=server.serve_forever, name="lmdbitmap metrics", daemon=True)
    thread.start()
    try:
        yield f"http://{urlsplit(listener.uri('')).netloc}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
