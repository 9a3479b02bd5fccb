"""One client's visit: the handshake under a deadline, then the transmission phase, and how to end it from outside."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from lmdbitmap.errors import FormatError
from lmdbitmap.filter import Filter
from lmdbitmap.interfaces import ServedDisk
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.complaints import Complaints, Volume
from lmdbitmap.nbd.server.connection import Connection
from lmdbitmap.nbd.server.contexts import StatusSource
from lmdbitmap.nbd.server.handshake import Agreed, Export, Handshake
from lmdbitmap.nbd.server.rounds import Rounds
from lmdbitmap.nbd.server.traffic import KINDS, NO_TRAFFIC, Traffic
from lmdbitmap.tracker.snapshot import Snapshot
from lmdbitmap.work.on_demand import OnDemand

_log = logging.getLogger(__name__)

_RECEIVE: Final = 64 << 10
_PEER: Final = struct.Struct("3i")
_ENTERED: Final = NO_TRAFFIC._replace(connections=1)
_COMMON_FLAGS: Final = (
    nbd.NBD_FLAG_HAS_FLAGS
    | nbd.NBD_FLAG_SEND_FLUSH
    | nbd.NBD_FLAG_SEND_FUA
    | nbd.NBD_FLAG_CAN_MULTI_CONN
    | nbd.NBD_FLAG_SEND_CACHE
)
_WRITABLE_FLAGS: Final = (
    _COMMON_FLAGS | nbd.NBD_FLAG_SEND_TRIM | nbd.NBD_FLAG_SEND_WRITE_ZEROES | nbd.NBD_FLAG_SEND_FAST_ZERO
)


class Offer(NamedTuple):
    """A disk and what can be asked about its blocks, by the contexts' names."""

    disk: ServedDisk
    contexts: Mapping[str, StatusSource]
    beside: bool = False
    """See `Export.beside`."""


class Visit:
    """Serves one client, who came through `door`.

    The handshake runs in its own thread, which then joins `rounds`. `served()` is called when the client first asks
    which exports exist; `enter(visit, name)` says whether that export has room. `ended` is called before the visit
    hangs up.
    """

    def __init__(
        self,
        sock: socket.socket,
        served: Callable[[], Mapping[str, Offer]],
        *,
        handshake_timeout_s: float,
        enter: Callable[[Visit, str], bool],
        ended: Callable[[Visit], None],
        rounds: Rounds,
        volume: Volume | None = None,
        door: object = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._sock = sock
        self._tls = tls
        self._served = served
        self._handshake_timeout_s = handshake_timeout_s
        self._enter = enter
        self._ended = ended
        self._rounds = rounds
        self.door: Final = door
        self.export_name: str | None = None
        """The export it has a place at; None while it is a newcomer."""
        self.is_let_go = False
        """Whether it was cut off because it stayed a newcomer."""
        self.client = _who(sock)
        self._offered: Mapping[str, Offer] = {}
        self._connection: Connection | None = None
        self._alone = False
        self._volume = volume
        self._complaints = Complaints(self.client, volume=volume)
        self._leaving = False
        self._was_shut: int | None = None
        self._gone = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"nbd-{sock.fileno()}", daemon=True)

    @property
    def traffic(self) -> Traffic:
        """What it carried so far, without the handshake.

        It counts as a connection from when it has its place: a client learns of that a moment before it can send
        requests.
        """
        if self._connection is not None:
            return self._connection.traffic
        return NO_TRAFFIC if self.export_name is None else _ENTERED

    @property
    def requests(self) -> int:
        """Requests answered so far."""
        return 0 if self._connection is None else sum(self._connection.counts)

    def start(self) -> bool:
        """Start its thread. Return False if there was none to be had; the visit has then ended."""
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as refused:
            self.has_no_room(f"there is no thread for it ({refused})")
            self.hang_up()
            return False
        return True

    def has_no_room(self, why: str, disk: str | None = None) -> None:
        """Log why the client is turned away. Any thread may call this: it leaves the visit's own complaints alone."""
        Complaints(self.client, disk, self._volume).turned_away(why)

    def ask_to_leave(self) -> None:
        """Let it finish and answer the requests it has taken in, and take no more."""
        self._leaving = True
        if self._connection is not None:
            self._connection.stopping = True
        self._shut(socket.SHUT_RD)

    def cut_off(self) -> None:
        """Wake it even while it waits for a client that does not read."""
        self._shut(socket.SHUT_RDWR)

    def let_go(self) -> None:
        """Cut off a newcomer, to give its place to another."""
        self.is_let_go = True
        self.cut_off()

    def forsake(self) -> None:
        """Close the socket in a forked child; the connection goes on in the parent."""
        self._sock.close()

    def join(self, timeout_s: float) -> bool:
        """Wait for its end; return whether it has come."""
        return self._gone.wait(max(timeout_s, 0))

    def _shut(self, how: int) -> None:
        self._was_shut = how
        try:
            socket.socket.shutdown(self._sock, how)  # not TLS's own, which goes on in plain text after it
        except OSError:  # the socket is gone already, or is about to speak TLS
            pass

    def _run(self) -> None:
        try:
            connection = self._connect()
        except TimeoutError:
            self._end(nbd.malformed("handshake", f"its end within {self._handshake_timeout_s:g} s", "none"))
            return
        except Exception as failure:
            self._end(failure)
            return
        if connection is None:
            self._end(None)
        else:
            self._rounds.serve(connection, self._sock.fileno(), self._end, alone=self._alone)

    def _end(self, failure: Exception | None) -> None:
        """Log how it ended, and hang up. Called by the last thread that served it."""
        try:
            self._tell_of_end(failure)
        except MemoryError:  # else it would keep its place, and `stop` would wait for it in vain
            pass
        finally:
            self.hang_up()

    def _tell_of_end(self, failure: Exception | None) -> None:
        if isinstance(failure, (FormatError, ssl.SSLError)):
            self._complaints.dropped(failure)
        elif isinstance(failure, OSError):
            _log.info("%s was lost: %s", self._complaints.whom, failure, extra=self._names)
        elif failure is not None:
            words = "%s was dropped: this is a mistake of the server"
            _log.error(words, self._complaints.whom, exc_info=failure, extra=self._names)
        self._say_goodbye()

    def hang_up(self) -> None:
        """End it: no thread serves it any more, or ever did."""
        self._ended(self)
        if isinstance(self._sock, ssl.SSLSocket):
            _end_tls(self._sock)
        self._sock.close()
        self._gone.set()

    @property
    def _names(self) -> dict[str, str | None]:
        """Fields for logs that programs read."""
        return {"disk": self.export_name, "client": self.client}

    def _say_goodbye(self) -> None:
        if self._connection is not None:
            words, names = _traffic_words(self.traffic), self._names
            _log.info("disk %s: %s is gone: %s", self.export_name, self.client, words, extra=names)

    def _connect(self) -> Connection | None:
        """Run the handshake; return the connection, or None if the client wants none."""
        handshake = self._shake_hands()
        agreed = handshake.outcome
        if not isinstance(agreed, Agreed):
            return None
        served, self._offered = self._offered[agreed.export_name], {}  # do not keep the other disks
        _log.info("disk %s: %s is connected", self.export_name, self.client, extra=self._names)
        self._complaints = Complaints(self.client, self.export_name, self._volume)
        self._connection = Connection(
            self._sock,
            served.disk,
            structured=agreed.structured,
            extended=agreed.extended,
            contexts={context_id: served.contexts[name] for context_id, name in agreed.contexts},
            received=handshake.trailing,
            encrypted=self._tls is not None,
            complaints=self._complaints,
        )
        self._alone = self._tls is not None or served.disk.fd is None
        self._connection.stopping = self._leaving
        return self._connection

    def _shake_hands(self) -> Handshake:
        """Haggle until both agree, the client leaves, or its time is up (`TimeoutError`), whatever used it up."""
        deadline = time.monotonic() + self._handshake_timeout_s
        enter = functools.partial(self._enter, self)
        handshake = Handshake(self._look_up, tls_required=self._tls is not None, enter=enter)
        self._send_before(deadline, handshake.greeting)
        handshake.refuse = self._complaints.turned_down
        while handshake.outcome is None:
            self._sock.settimeout(_left(deadline))
            data = self._sock.recv(_RECEIVE)
            if not data:
                break
            for answer in handshake.receive(data):
                self._send_before(deadline, answer)
            if handshake.wants_tls:
                handshake.secured()
                self._encrypt(deadline)
        self._sock.settimeout(None)
        return handshake

    def _look_up(self) -> Mapping[str, Export]:
        offered = self._offered = self._served()
        return OnDemand(offered, lambda name: _export(name, offered[name]))

    def _encrypt(self, deadline: float) -> None:
        """Begin TLS on the socket, with a client whose certificate is verified."""
        assert self._tls is not None
        self._sock = self._tls.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        if self._was_shut is not None:
            self._shut(self._was_shut)
        self._sock.settimeout(_left(deadline))
        self._sock.do_handshake()

    def _send_before(self, deadline: float, data: bytes) -> None:
        self._sock.settimeout(_left(deadline))
        self._sock.sendall(data)


def _who(sock: socket.socket) -> str:
    """Describe a client by what the kernel knows of it."""
    try:
        if sock.family == socket.AF_UNIX:
            pid, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            return f"process {pid} of user {uid}"
        host, port = sock.getpeername()[:2]
    except OSError:  # the client is gone already
        return "a client"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _end_tls(sock: ssl.SSLSocket) -> None:
    """Say that this is the end: without that word the client cannot know whether somebody cut something off. Waits for
    nothing."""
    with contextlib.suppress(OSError, ValueError):  # it is gone, or TLS never came about
        sock.settimeout(0)
        sock.unwrap()


def _traffic_words(traffic: Traffic) -> str:
    requests = ", ".join(
        f"{count} {kind}" for kind, count in zip(KINDS, traffic.counts, strict=True) if count
    )
    return f"{requests or 'no requests'}; {traffic.bytes_received} bytes in, {traffic.bytes_sent} out"


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the handshake took too long")
    return left


def _export(name: str, served: Offer) -> Export:
    disk = served.disk
    flags = _COMMON_FLAGS | nbd.NBD_FLAG_READ_ONLY if disk.read_only else _WRITABLE_FLAGS
    described = f"{name}, {'read-only' if disk.read_only else 'writable'}, served by lmdbitmap"
    if isinstance(disk, (Filter, Snapshot)):
        described += nbd.of_disk(disk.disk.uuid)
    return Export(name, disk.size, flags, described, served.contexts, served.beside)
