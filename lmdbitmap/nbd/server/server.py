"""The NBD server: accepts clients, has each one served (rounds.py), and ends all of them in good order.

A client can cost the others nothing but its share of the processor and of the places at its own export (places.py). It
has its own socket, lane and buffers, and no thread that others need waits for it. Whatever it sends, or fails to send
or to read, ends at worst its own connection.

Stopping: no more clients are accepted. Every connection finishes the requests it has taken in, answers them and closes.
A long TRIM or WRITE_ZEROES stops between two pieces, and the connection closes without an answer to it, so that a guest
asks again where it connects next. A connection that has not managed this after `grace_s`, because its client does not
read, is cut off. One that has not ended after as long again hangs in its disk: `stop` then returns False, and the disks
must not be closed under it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Final

from lmdbitmap.interfaces import ServedDisk
from lmdbitmap.nbd import keepalive
from lmdbitmap.nbd.listeners import InheritedListener, Listener, TcpListener, UnixListener, accepted, heard
from lmdbitmap.nbd.server.complaints import Volume
from lmdbitmap.nbd.server.contexts import ContextsOf, Later, for_strangers
from lmdbitmap.nbd.server.dirty_contexts import tracked_contexts
from lmdbitmap.nbd.server.places import Counters, Places
from lmdbitmap.nbd.server.quiet import Quiet
from lmdbitmap.nbd.server.rounds import Rounds
from lmdbitmap.nbd.server.traffic import Traffic
from lmdbitmap.nbd.server.visit import Offer, Visit
from lmdbitmap.work import forks
from lmdbitmap.work.crew import thread_refused
from lmdbitmap.work.on_demand import OnDemand

_log = logging.getLogger(__name__)

_SLACK_S: Final = 1.0
_SEND_BUFFER_BYTES: Final = 2 << 20
"""Send buffer of a unix socket: the default holds three 64 KiB READs. TCP sizes its own. The kernel may allow less."""
_MOST_WAKING: Final = 64 << 10


class Server:
    """Serves `disks` under their names: listen, then `serve_forever` here or `start` a thread that does.

    `contexts_of` says what clients may ask of a disk: of all its allocation, of a `Filter` or a `Snapshot` also its
    changes since each checkpoint.
    """

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        *,
        max_connections: int = 64,
        max_newcomers: int = 64,
        handshake_timeout_s: float = 10.0,
        grace_s: float = 10.0,
        contexts_of: ContextsOf = tracked_contexts,
    ) -> None:
        self._places = Places(disks, max_connections, max_newcomers)
        self._contexts_of = contexts_of
        self._handshake_timeout_s = handshake_timeout_s
        self._grace_s = grace_s
        self._listeners: list[Listener] = []
        self._rounds = Rounds()
        self._volume = Volume()
        self.quiet = Quiet(self._places.requests_of_residents)
        """Covers the clients of the disks given to the constructor."""
        self._woken_fd, self._wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for fd in (self._woken_fd, self._wake_fd):
            weakref.finalize(self, os.close, fd)  # no sooner: a late signal may still write to it
        self._serving_thread: threading.Thread | None = None
        self._wound_up = threading.Event()
        forks.is_not_for_children(self)

    # -- for its owner -------------------------------------------------------------------------------------

    def listen_unix(self, path: str | os.PathLike[str], mode: int = 0o600) -> UnixListener:
        """Listen at a socket file. Raise `Busy` if a server listens there; the file of a dead server is replaced."""
        listener = UnixListener(path, mode)
        self._listeners.append(listener)
        return listener

    def listen_tcp(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> TcpListener:
        """Listen at a TCP port; 0 means any free one. With `tls`, clients must begin TLS (nbd/tls.py).

        Raises `Busy` if the port is taken.
        """
        listener = TcpListener(host, port, tls)
        self._listeners.append(listener)
        return listener

    def listen_inherited(self, fd: int, tls: ssl.SSLContext | None = None) -> InheritedListener:
        """Listen at a socket that another process bound. With `tls`, TCP clients must begin TLS."""
        listener = InheritedListener(fd, tls)
        self._listeners.append(listener)
        return listener

    @property
    def uris(self) -> list[str]:
        """One URI per listener for every disk given to the constructor."""
        return [listener.uri(name) for listener in self._listeners for name in self._places.residents]

    def uris_of(self, name: str) -> list[str]:
        """One URI per listener."""
        return [listener.uri(name) for listener in self._listeners]

    def add(self, name: str, disk: ServedDisk, *, private: bool = False) -> None:
        """Serve one more disk, beside those given to the constructor; a `private` one only to clients handed over.

        Raises `AlreadyExists` if the name is taken.
        """
        self._places.add(name, disk, private=private)

    def remove(self, name: str, disk: ServedDisk) -> None:
        """Stop serving a disk and cut off its clients. The disk itself raises for reads that are still under way.

        Does nothing if the name belongs to another disk by now.
        """
        self._places.remove(name, disk)

    def retire(self, name: str) -> None:
        """Stop serving a disk given to the constructor. Raise `Busy` while a client is connected to it."""
        self._places.retire(name)

    def take_in(self, sock: socket.socket) -> bool:
        """Serve a client that is connected already and need not begin TLS. Return whether there was room for it.

        Such a client is offered every disk and context. Others are offered only what is for strangers.
        """
        return self._welcome(sock, None)

    @property
    def counters(self) -> Counters:
        return self._places.counters()

    def traffic(self, name: str) -> tuple[int, Traffic]:
        """Number of clients connected to a disk given to the constructor now, and the traffic of all it ever had."""
        return self._places.traffic(name)

    def traffic_of_all(self) -> dict[str, tuple[int, Traffic]]:
        """`traffic` of every disk given to the constructor, looking at each client only once."""
        return self._places.traffic_of_all()

    def start(self) -> None:
        """Serve in a thread. Raise `StorageError` if none can be started."""
        self._serving_thread = threading.Thread(target=self._serve, name="nbd-accept", daemon=True)
        try:
            self._serving_thread.start()
        except RuntimeError as refused:
            self._serving_thread = None  # there is nobody for `stop` to wait for
            raise thread_refused("the NBD server cannot be started", refused) from refused

    def serve_forever(self) -> None:
        """Serve in this thread until asked to stop, then wind up; afterwards `stop` tells how it went.

        In the main thread any signal wakes it, so that its handler runs at once.
        """
        self._serving_thread = threading.current_thread()
        try:
            with _woken_by_signals(self._wake_fd):
                self._serve()
        finally:
            self._serving_thread = None  # if it was interrupted, `stop` winds up

    def request_stop(self) -> None:
        """Ask the serving thread to wind up. Takes no lock and does not wait, so signal handlers may call it."""
        self._places.closed = True
        with contextlib.suppress(BlockingIOError):  # the pipe is full: the thread will wake up
            os.write(self._wake_fd, b"\0")

    def stop(self) -> bool:
        """Stop serving and wait for the end, for a bounded time. Return True if nobody uses the disks any more.

        A signal handler in the thread of `serve_forever` may call it too: there it only asks, and returns False.
        """
        self.request_stop()
        if self._serving_thread is None:
            if not self._wound_up.is_set():
                self._wind_up()
        elif self._serving_thread is not threading.current_thread():
            self._wound_up.wait(2 * self._grace_s + _SLACK_S)
        if not self._wound_up.is_set():
            return False
        return not _still_there(self._places.visits(), _SLACK_S)

    def forsake(self) -> None:
        """Close the sockets in a forked child: no client would hear the end of its connection while the child lives.

        The locks are made anew: their holders' threads do not exist here.
        """
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.sock.close()  # its file is the parent's
        self._places.forsake()
        self._wound_up = threading.Event()
        self._wound_up.set()

    # -- taking clients in ---------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._woken_fd, selectors.EVENT_READ)
                for listener in () if self._places.closed else self._listeners:  # closed by a `stop` before
                    listener.sock.setblocking(False)
                    selector.register(listener.sock, selectors.EVENT_READ, listener)
                while not self._places.closed:
                    for key in heard(selector):
                        if key.data is None:
                            os.read(self._woken_fd, _MOST_WAKING)
                        else:
                            self._accept(key.data)
        finally:
            self._wind_up()

    def _accept(self, listener: Listener) -> None:
        sock = accepted(listener.sock, "client")
        if sock is not None:
            try:
                self._welcome(sock, listener)
            except MemoryError:  # costs those nothing who are here
                sock.close()
                _log.warning("a client was turned away: there is no memory for it")

    def _welcome(self, sock: socket.socket, door: Listener | None) -> bool:
        """Start the handshake of a client that came through `door`, or was handed over (None)."""
        visit = Visit(
            sock,
            self._served if door is None else self._served_to_strangers,
            handshake_timeout_s=self._handshake_timeout_s,
            enter=self._places.enter,
            ended=self._places.forget,
            rounds=self._rounds,
            volume=self._volume,
            door=door,
            tls=None if door is None else door.tls,
        )
        if not self._places.admit(visit):
            visit.has_no_room("the server ends" if self._places.closed else "too many come at once")
            sock.close()
            return False
        try:
            self._places.make_room(door)
            _tune(sock)
            return visit.start()
        except MemoryError:  # else it would keep its place, and `stop` would wait for it in vain
            visit.hang_up()
            raise

    def _served(self) -> Mapping[str, Offer]:
        """The disks, and what can be asked about each at this moment."""
        return self._described(self._places.disks(private=True), self._contexts_of)

    def _served_to_strangers(self) -> Mapping[str, Offer]:
        disks = self._places.disks(private=False)
        return self._described(disks, lambda name, disk: for_strangers(self._contexts_of(name, disk)))

    def _described(self, disks: Mapping[str, ServedDisk], contexts_of: ContextsOf) -> Mapping[str, Offer]:
        def served(name: str) -> Offer:
            contexts = Later(partial(contexts_of, name, disks[name]))
            return Offer(disks[name], contexts, beside=name not in self._places.residents)

        return OnDemand(disks, served)

    # -- letting them go -----------------------------------------------------------------------------------

    def _wind_up(self) -> None:
        for listener in self._listeners:
            listener.close()
        visits = self._places.visits()
        for visit in visits:
            visit.ask_to_leave()
        stuck = _still_there(visits, self._grace_s)
        for visit in stuck:
            visit.cut_off()
        hung = _still_there(stuck, self._grace_s)
        if hung:
            _log.error("%d connections do not end: their disk does not answer", len(hung))
        self._wound_up.set()


@contextlib.contextmanager
def _woken_by_signals(fd: int) -> Iterator[None]:
    """Have every signal write a byte to `fd`, to wake the main thread.

    Python runs handlers only when the main thread goes on. A signal that comes right before that thread sleeps, or to
    another thread, does not end its sleep; the byte does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


def _still_there(visits: Iterable[Visit], patience_s: float) -> list[Visit]:
    """The visits that have not ended within `patience_s`, for all of them together."""
    deadline = time.monotonic() + patience_s
    return [visit for visit in visits if not visit.join(deadline - time.monotonic())]


def _tune(sock: socket.socket) -> None:
    """Send replies at once (TCP), and notice in the end that a peer's host vanished."""
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    else:
        keepalive.tune(sock)
