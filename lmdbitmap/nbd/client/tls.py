"""An encrypted connection to a far server, for one thread that sends and another that receives.

Two threads must not use OpenSSL's state of a connection at once, and one of ours sleeps in `recv_into` while others
send. So:

1. The socket does not block. Every call into OpenSSL is short, and made under `_turn`.
2. A thread waits for the socket without `_turn`: the receiver never waits for the sender, nor the sender for the
   receiver. So a server that takes no requests until we have taken its replies works.
3. OpenSSL is asked before the socket is waited for: bytes that OpenSSL already holds do not show at the socket.
   Bytes leave the socket only through `recv_into` (there is no renegotiation, see nbd/tls.py), so no thread takes
   away the bytes that would wake another.
4. After sending broke off in the middle of a record, no other data can follow: whoever breaks it off hangs up.

The protocol's own encrypted words announce the end. If bytes end without TLS having said so, that is a lost connection
like any other. `shutdown` and `recv` are only for the end, and bypass TLS.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from lmdbitmap.errors import StorageError
from lmdbitmap.interfaces import Buffer
from lmdbitmap.nbd.tls import CLIENT_KEY, client_context, warn_of_open_key
from lmdbitmap.nbd.uri import Credentials, NbdAddress

_log = logging.getLogger(__name__)

_JOINED: Final = 64 << 10
"""Parts shorter than this are sent together: each call makes records of its own."""

Done = TypeVar("Done")


class TlsWire:
    """A `Wire` (link.py) over a socket that speaks TLS. One thread at a time may send, one may receive."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._timeout_s: float | None = None
        self._turn = threading.Lock()
        self._is_tcp = sock.family != socket.AF_UNIX
        sock.settimeout(0)

    def settimeout(self, value: float | None) -> None:
        """Set the timeout of calls that begin from now on."""
        self._timeout_s = value

    def sendmsg(self, buffers: Sequence[Buffer]) -> int:
        """Send all buffers, unlike a socket's `sendmsg`."""
        for part in _joined(buffers):
            self.sendall(part)
        return sum(map(len, buffers))

    def sendall(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[self._when_ready(self._sock.send, view) :]

    def recv_into(self, buffer: memoryview) -> int:
        return self._when_ready(self._sock.recv_into, buffer)

    def _when_ready(self, act: Callable[[memoryview], Done], view: memoryview) -> Done:
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while True:
            try:
                with self._turn:
                    return act(view)
            except ssl.SSLWantReadError:
                awaited = select.POLLIN
            except ssl.SSLWantWriteError:
                awaited = select.POLLOUT
            self._await(awaited, deadline)

    def _await(self, event: int, deadline: float | None) -> None:
        if self._is_tcp:  # qemu-nbd sends an answer in two pieces, the second when the first is acknowledged
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        poller = select.poll()
        poller.register(self._sock, event)
        left_ms = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
        if not poller.poll(left_ms):
            raise TimeoutError(errno.ETIMEDOUT, "the NBD server takes too long")

    # -- the end -------------------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """Shut down the connection below TLS. TLS's own shutdown would let plain bytes be taken for an answer."""
        socket.socket.shutdown(self._sock, how)

    def recv(self, bufsize: int) -> bytes:
        """Receive raw bytes, to be thrown away."""
        self._await(select.POLLIN, None if self._timeout_s is None else time.monotonic() + self._timeout_s)
        return socket.socket.recv(self._sock, bufsize)

    def close(self) -> None:
        self._sock.close()


def _joined(buffers: Sequence[Buffer]) -> Iterator[Buffer]:
    """Yield the same bytes, in order, in fewer parts."""
    small = bytearray()
    for part in buffers:
        if len(small) + len(part) > _JOINED:
            yield small
            small = bytearray()
        if len(part) > _JOINED:
            yield part
        else:
            small += part
    yield small


def warn_about(place: NbdAddress, tls: Credentials) -> None:
    """Log what makes this weaker than it looks. Not called at each connection: an absent server is dialled often."""
    if not tls.verifies:
        _log.warning("%s: the certificate of the server is not verified", place.uri)
    if tls.folder:
        warn_of_open_key(os.path.join(tls.folder, CLIENT_KEY))


class Encryption(NamedTuple):
    """How TLS is begun with the server at `place`."""

    place: NbdAddress
    context: ssl.SSLContext

    @classmethod
    def of(cls, place: NbdAddress, tls: Credentials) -> Encryption:
        """Read the certificates, which may have been renewed. Raises as `client_context` does."""
        return cls(place, client_context(tls.folder, verifies=tls.verifies))

    def begin(self, sock: socket.socket) -> TlsWire:
        """Shake hands within the socket's timeout. Raise `StorageError` if one side does not trust the other.

        Afterwards the wire owns the socket, or the socket is closed.
        """
        with self.refusals():
            return TlsWire(self.context.wrap_socket(sock, server_hostname=self.place.certified_name))

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Explain TLS errors, up to the first answer: only after the handshake does a server say it distrusts us."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            why = error.verify_message.rstrip(".")
            raise StorageError(
                self.place.uri,
                OSError(errno.EKEYREJECTED, f"the server's certificate is not believed ({why})"),
                next_step="with tls-certificates= name the folder with its authority's ca-cert.pem,"
                " with tls-hostname= the name that it certifies",
            ) from error
        except (ssl.SSLError, ConnectionError, ValueError) as error:
            raise StorageError(
                self.place.uri,
                OSError(errno.EPROTO, f"the server broke TLS off ({_words(error)})"),
                next_step="look at its log: it may ask for client-cert.pem and client-key.pem of its own authority,"
                " in the folder tls-certificates=",
            ) from error


def _words(error: Exception) -> str:
    """OpenSSL's name for what happened, without the line of its source."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str((error.strerror if isinstance(error, OSError) else None) or error)
