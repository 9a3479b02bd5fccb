"""Dialling: from a place to a connection that its server has agreed on, within one deadline."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from lmdbitmap.nbd import keepalive
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.handshake import FarExport, Step, negotiation
from lmdbitmap.nbd.client.link import Link, Wire, some
from lmdbitmap.nbd.uri import NbdAddress

if TYPE_CHECKING:
    from lmdbitmap.nbd.client.tls import Encryption

DIAL_S: Final = 10.0
"""Seconds for a server that is there to connect and agree."""
_USER_TIMEOUT_MS: Final = 20_000
"""Milliseconds within which a vanished host is noticed, whatever is on its way to it."""
_FULL_PAUSE_S: Final = 0.02


def dial(place: NbdAddress, timeout_s: float = DIAL_S) -> Link:
    """Connect and agree on the export. Raise what `negotiation` and TLS raise, `OSError` if nobody answers."""
    encryption = _encryption(place)
    addresses = _addresses(place)  # before the clock runs: a slow name server takes no time from the server
    deadline = time.monotonic() + timeout_s
    sock = _connected(addresses, deadline)
    return agreed(sock, place.export, deadline - time.monotonic(), encryption)


def _encryption(place: NbdAddress) -> Encryption | None:
    """Import TLS only when needed: `ssl` is a heavy import, which most places do without."""
    if place.tls is None:
        return None
    from lmdbitmap.nbd.client.tls import Encryption

    return Encryption.of(place, place.tls)


def warn_about(place: NbdAddress) -> None:
    """Log weaknesses of the place's credentials. Call it once, before the first dial."""
    if place.tls is not None:
        from lmdbitmap.nbd.client import tls

        tls.warn_about(place, place.tls)


def agreed(
    sock: socket.socket,
    export_name: str,
    timeout_s: float = DIAL_S,
    encryption: Encryption | None = None,
    *,
    silence_s: float | None = None,
    context: str = nbd.NBD_META_BASE_ALLOCATION,
) -> Link:
    """Agree on an export over an open socket, and on the `context` for BLOCK_STATUS if the server has it.

    Afterwards the link owns the socket, or the socket is closed. The link raises `TimeoutError` when it waits for
    `silence_s` without a byte; None waits for ever.
    """
    haggling = _Haggling(sock, time.monotonic() + timeout_s, encryption)
    try:
        export = haggling.come_to_terms(export_name, context)
        haggling.wire.settimeout(silence_s)
        return Link(haggling.wire, export)
    except BaseException:
        haggling.wire.close()
        raise


def _connected(addresses: deque[tuple[int, Any]], deadline: float) -> socket.socket:
    """Connect to the first of the addresses that answers. Those still to be tried share the time that is left."""
    while True:
        family, address = addresses.popleft()
        left_s = (deadline - time.monotonic()) / (len(addresses) + 1)
        try:
            return _connected_to(family, address, max(left_s, 0.001))
        except OSError:
            if not addresses:
                raise


def _addresses(place: NbdAddress) -> deque[tuple[int, Any]]:
    """Return (family, address) of all addresses that the place has: one or more."""
    if place.socket_path:
        return deque([(socket.AF_UNIX, place.socket_path)])
    found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    return deque((family, address) for family, _, _, _, address in found)


def _connected_to(family: int, address: Any, timeout_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        _connect(sock, address, timeout_s)
        if family != socket.AF_UNIX:
            keepalive.tune(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, address: Any, timeout_s: float) -> None:
    """Connect. Wait while the server's queue is full, as that of one that serves one client: a unix socket does not."""
    deadline = time.monotonic() + timeout_s
    sock.settimeout(timeout_s)
    while True:
        try:
            sock.connect(address)
            return
        except BlockingIOError as full:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "the NBD server takes in no client") from full
            time.sleep(_FULL_PAUSE_S)


def is_one_place(one: NbdAddress, other: NbdAddress) -> bool:
    """Return whether two addresses, without TLS, are of one export.

    Two names of a host are one if they share an address, as far as they can be looked up now; two of a socket if they
    lead to one file.
    """
    if one == other:
        return True
    if one.export != other.export or one.port != other.port:
        return False
    if one.socket_path and other.socket_path:
        with contextlib.suppress(OSError):
            return os.path.samefile(one.socket_path, other.socket_path)
    return not _known_addresses(one).isdisjoint(_known_addresses(other))


def _known_addresses(place: NbdAddress) -> set[Any]:
    try:
        return {address for _, address in _addresses(place)}
    except OSError:
        return set()


class _Haggling:
    """Does what `negotiation` wants, until the deadline. `wire` is the socket; once TLS began, its TLS wrapper."""

    def __init__(self, sock: socket.socket, deadline: float, encryption: Encryption | None) -> None:
        self.wire: Wire = sock
        self._sock = sock
        self._deadline = deadline
        self._encryption = encryption
        self._refusals: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """Wraps the steps that may fail because the server does not trust us."""

    def come_to_terms(self, name: str, context: str) -> FarExport:
        steps = negotiation(name, tls=self._encryption is not None, context=context)
        step: Step = next(steps)
        try:
            while True:
                step = steps.send(self._done(step))
        except StopIteration as agreed:
            export: FarExport = agreed.value
            return export

    def _done(self, step: Step) -> bytes:
        """Do one step; return the bytes received, if any."""
        self.wire.settimeout(max(self._deadline - time.monotonic(), 0.001))
        if not isinstance(step, (bytes, int)):
            self._begin_tls()
            return b""
        with self._refusals():
            if isinstance(step, bytes):
                self.wire.sendall(step)
                return b""
            data = self._exactly(step)
        self._refusals = contextlib.nullcontext
        return data

    def _begin_tls(self) -> None:
        assert self._encryption is not None
        self.wire = self._encryption.begin(self._sock)
        self.wire.settimeout(max(self._deadline - time.monotonic(), 0.001))
        self._refusals = self._encryption.refusals

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            if time.monotonic() > self._deadline:
                raise TimeoutError(errno.ETIMEDOUT, "the NBD server takes too long")
            view = view[some(self.wire, view) :]
        return bytes(data)
