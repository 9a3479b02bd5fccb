"""The owner's side of the control socket: answers other processes' requests about the disks it owns.

    accept      one thread for the sockets of all disks
    a caller    one thread: hello, then a request and its answer in turn, every line under a deadline

Callers are few, short-lived, and run as our own user or root; still, none is trusted. A line is bounded. A slow caller
is dropped. A stuck caller costs its own thread, and there are at most `MAX_CALLERS` of those. A backup stays for as
long as it reads, and takes none of these places while it holds snapshots: however many backups there are, other callers
are heard. Once all its snapshots are released, it counts like any caller, but has more time for its next request. A
line that is no JSON object costs the connection. orders.py has the operations, and refuses what they do not take.

The creator of a `ControlServer` holds the owner's lock of every disk in it, as a `Filter` does. So a socket that exists
already is a dead owner's, and is replaced. Stop the server before the disks are detached.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Final
from uuid import UUID

from lmdbitmap.errors import Busy, LmdbitmapError, StorageError, os_errors_at
from lmdbitmap.filter import Filter
from lmdbitmap.nbd import control_wire as wire
from lmdbitmap.nbd.control.detaching import Detaching
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.control.orders import Answer, Scene, answer
from lmdbitmap.nbd.control.watch import TICK_S, Watch
from lmdbitmap.nbd.control_client import receive_line, short_path
from lmdbitmap.nbd.listeners import accepted, heard
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.tracker.snapshot import Snapshot
from lmdbitmap.version import __version__
from lmdbitmap.work import forks
from lmdbitmap.work.crew import thread_refused

_log = logging.getLogger(__name__)

MAX_CALLERS: Final = 16
PATIENCE_S: Final = 10.0
"""Seconds that a caller may take to send or to read a line."""
GRACE_S: Final = 30.0
"""Seconds that `stop` waits for what is being done."""
LAST_WORD_S: Final = 0.5
"""Seconds that a caller may take to read its answer when the owner stops."""
_BACKLOG: Final = 16
_PEER: Final = struct.Struct("3i")
_REQUEST: Final = "request"
_WHILE_BOUND_S: Final = 1e7
_AFTER_BOUND: Final = 6
"""Factor of a caller's patience once its snapshots are released: it syncs what it read."""


class ControlServer:
    """Listens at the control socket of every disk in `filters`, from `start` to `stop`.

    What a `server` does for a disk is reported with it. Such a disk may be detached, and is then removed from
    `filters`. The end of a `with` block does not say
    whether all callers have ended: call `stop` before disks are detached.
    """

    def __init__(
        self,
        filters: MutableMapping[str, Filter],
        *,
        held: HeldSnapshots | None = None,
        server: Server | None = None,
        max_callers: int = MAX_CALLERS,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.filters = filters
        self.watch = None if server is None else Watch.of(server, filters)
        self.held = held
        self.detaching = None if server is None else Detaching(filters, server, self._unlisten)
        self.patience_s = patience_s
        self.stopping = False
        self._max_callers = max_callers
        self._listeners: dict[UUID, _Listener] = {}
        """By the uuids of their disks."""
        self._callers: set[_Caller] = set()
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._accept_all, name="lmdbitmap control", daemon=True)
        forks.is_not_for_children(self)

    def start(self) -> None:
        """Listen, and answer in the background. Raise `StorageError` if no socket can be made, or no thread started."""
        try:
            for attached in self.filters.values():
                uuid = attached.disk.uuid
                self._listeners[uuid] = _Listener(attached.store.control_path(uuid))
        except BaseException:
            self._close()
            raise
        try:
            self._thread.start()
        except RuntimeError as refused:
            self._close()
            raise thread_refused("nobody can listen at the control sockets", refused) from refused

    def stop(self) -> bool:
        """Accept no more callers, and finish what is being done. True if all have ended: disks may be detached then."""
        if self._wake_fd < 0:
            return True
        self.stopping = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._close()
        with self._lock:
            callers = list(self._callers)
        for caller in callers:
            caller.hang_up()
        for caller in _still_here(callers, LAST_WORD_S):
            caller.cut_off_unless_busy()
        return not _still_here(callers, GRACE_S)

    def forsake(self) -> None:
        """Close the sockets in a forked child, as `Server.forsake` does; nothing is left to stop there."""
        for listener in self._listeners.values():
            listener.sock.close()  # its file is the parent's
        for caller in list(self._callers):
            caller.forsake()
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
        self._wake_fd = -1

    def __enter__(self) -> ControlServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def hello(self) -> Answer:
        return {
            "protocol": wire.PROTOCOL, "version": __version__, "pid": os.getpid(), "disks": list(self.filters),
        }  # fmt: skip

    def forget_caller(self, caller: _Caller) -> None:
        with self._lock:
            self._callers.discard(caller)

    def _unlisten(self, attached: Filter) -> None:
        self._listeners[attached.disk.uuid].hide()

    def _close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        fd, self._wake_fd = self._wake_fd, -1
        os.close(fd)

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_fd, selectors.EVENT_READ)
            for listener in self._listeners.values():
                selector.register(listener.sock, selectors.EVENT_READ, listener.sock)
            next_tick_s = time.monotonic() + TICK_S
            while not self.stopping:
                wait_s = None if self.watch is None else max(next_tick_s - time.monotonic(), 0)
                for key in heard(selector, wait_s):
                    if key.data is not None:
                        self._accept(key.data)
                if self.watch is not None and time.monotonic() >= next_tick_s:
                    with contextlib.suppress(MemoryError):  # the next tick tells more
                        self.watch.tick()
                    next_tick_s = time.monotonic() + TICK_S

    def _accept(self, listening: socket.socket) -> None:
        sock = accepted(listening, "caller")
        if sock is not None:
            try:
                self._welcome(_Caller(self, sock))
            except MemoryError:  # the next one is heard again
                sock.close()
                _log.warning("a caller was turned away: there is no memory for it")

    def _welcome(self, caller: _Caller) -> None:
        with self._lock:
            is_welcome = sum(not other.holds for other in self._callers) < self._max_callers
            if is_welcome:
                self._callers.add(caller)
        if not is_welcome or not self._begin(caller):
            caller.turn_away()

    def _begin(self, caller: _Caller) -> bool:
        """Start its thread; return False if there was none. Others may be accepted once a caller has ended."""
        try:
            caller.start()
        except (RuntimeError, MemoryError) as refused:
            self.forget_caller(caller)  # first: there may be no memory for the log either
            _log.warning("cannot serve a caller: %s", refused)
            return False
        return True


class _Listener:
    """The control socket at `path`, for our user alone."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with os_errors_at(path):
                self._listen()
        except BaseException:
            self.sock.close()
            raise

    def _listen(self) -> None:
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # a dead owner's: we hold the lock of its disk
        with short_path(self._path) as address:
            self.sock.bind(address)
        os.chmod(self._path, 0o600)  # nobody can have connected yet: that takes `listen`
        self._status = os.lstat(self._path)
        self.sock.listen(_BACKLOG)
        self.sock.setblocking(False)

    def close(self) -> None:
        self.hide()
        self.sock.close()

    def hide(self) -> None:
        """Remove the socket file, unless it is another owner's by now."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self._path), self._status):
                os.unlink(self._path)


# -- who asks ------------------------------------------------------------------------------------------


class _Caller(threading.Thread):
    """One connection, from hello to hang-up."""

    def __init__(self, server: ControlServer, sock: socket.socket) -> None:
        super().__init__(name="lmdbitmap caller", daemon=True)
        self._server = server
        self._sock = sock
        self._sending = False
        self._bound: list[Snapshot] = []
        self._untold: list[Snapshot] = []

    @property
    def holds(self) -> bool:
        """Whether held snapshots are bound to it, as to a backup. Their own number limits such callers."""
        held = self._server.held
        return held is not None and any(held.is_held(snapshot) for snapshot in self._bound)

    def run(self) -> None:
        try:
            with self._sock:
                self._converse()
        except OSError as error:
            _log.info("a caller at the control socket is gone: %s", error)
        finally:
            try:
                self._release_bound()
            finally:
                self._server.forget_caller(self)

    def _release_bound(self) -> None:
        for snapshot in (*self._bound, *self._untold):
            assert self._server.held is not None
            try:
                self._server.held.release(snapshot)
            except (LmdbitmapError, OSError, MemoryError) as error:  # the others are to be released too
                _log.warning(
                    "disk %s: %s could not be released: %s", snapshot.disk.name, snapshot.name, error
                )

    def forsake(self) -> None:
        """Close the socket in a forked child; the caller stays the parent's."""
        self._sock.close()

    def turn_away(self) -> None:
        """Refuse it: there are too many. Does not wait, as the line fits into any socket's buffer."""
        with self._sock, contextlib.suppress(OSError):
            self._sock.setblocking(False)
            self._send(_error(Busy("too many callers at the control socket", next_step="try again")))

    def hang_up(self) -> None:
        """Let it see the end of the connection after the answer that is on its way."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def cut_off_unless_busy(self) -> None:
        """Wait no longer for it to read an answer. An operation it asked for goes on."""
        if self._sending:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _converse(self) -> None:
        lines = wire.LineBuffer(_REQUEST)
        try:
            self._sock.settimeout(self._server.patience_s)
            _require_welcome(self._sock)
            self._send(self._server.hello())
            while not self._server.stopping and (line := self._receive(lines)) is not None:
                self._respond(wire.decode(line, _REQUEST))
        except LmdbitmapError as error:
            self._send(_error(error))

    def _receive(self, lines: wire.LineBuffer) -> bytes | None:
        """Receive a line. A caller with a bound snapshot may be silent for as long as it reads that."""
        patience_s = self._server.patience_s
        if self._bound:
            patience_s = _WHILE_BOUND_S if self.holds else patience_s * _AFTER_BOUND
        return receive_line(self._sock, lines, time.monotonic() + patience_s)

    def _respond(self, request: wire.Message) -> None:
        passed: list[int] = []
        try:
            self._send(self._answer(request, passed), passed)
            self._untold.clear()
        finally:
            for fd in passed:
                os.close(fd)

    def _answer(self, request: wire.Message, passed: list[int]) -> Answer:
        server = self._server
        scene = Scene(
            server.filters, server.watch, server.held, self._bound, server.detaching, self._untold, passed
        )
        try:
            return {"answer": answer(scene, request)}
        except LmdbitmapError as error:
            return _error(error)
        except Exception as bug:
            _log.exception("the control socket could not answer a request")
            problem = f"the owner failed with {type(bug).__name__}: {bug}"
            return _error(LmdbitmapError(problem[:1000], next_step="see its log, and report this as a fault"))

    def _send(self, message: wire.Message, passed: Sequence[int] = ()) -> None:
        patience_s = self._server.patience_s
        self._sock.settimeout(min(LAST_WORD_S, patience_s) if self._server.stopping else patience_s)
        self._sending = True
        data = wire.encode(message)
        sent = socket.send_fds(self._sock, [data], passed) if passed else 0
        self._sock.sendall(data[sent:])
        self._sending = False


def _still_here(callers: Iterable[_Caller], patience_s: float) -> list[_Caller]:
    """The callers that have not ended within `patience_s`, for all of them together."""
    deadline = time.monotonic() + patience_s
    for caller in callers:
        caller.join(max(deadline - time.monotonic(), 0))
    return [caller for caller in callers if caller.is_alive()]


def _error(error: LmdbitmapError) -> Answer:
    return {"error": wire.error_fields(error)}


def _require_welcome(sock: socket.socket) -> None:
    """Check the caller's user. The folder keeps strangers out; this also works if somebody opened up the folder."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    require_user(_PEER.unpack(credentials)[1])


def require_user(uid: int) -> None:
    """Raise `StorageError` unless this user may command us: only root and the user that we run as may."""
    if uid not in (0, os.geteuid()):
        refusal = PermissionError(errno.EPERM, f"it belongs to a process of user {os.geteuid()}")
        raise StorageError("control socket", refusal, next_step="run the command as that user, or as root")
