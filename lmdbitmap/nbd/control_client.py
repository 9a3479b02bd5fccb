"""The caller's side of a control socket: connects to the process that owns a disk, and sends one request at a time.

    with control_client.reach(store.control_path(disk.uuid)) as owner:
        owner.call("mark", disk="sda", offset=0, length=65536)

Errors that the owner raises are raised here, in its own words. See docs/control.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from lmdbitmap.errors import Busy, FormatError, OwnerGone, error_from_os, os_errors_at
from lmdbitmap.nbd import control_wire as wire
from lmdbitmap.nbd.control_answers import require_answer
from lmdbitmap.work import forks

CONNECT_S: Final = 10.0
"""Seconds until the owner has greeted us."""
ANSWER_S: Final = 600.0
"""Seconds until it has answered: the operation may have to wait for its disk."""
_FRESH_S: Final = 5.0
"""Seconds of silence for which no owner hangs up: half of its patience."""
_RECEIVE: Final = 64 << 10


class Silent(Busy):
    """The owner did not answer in time: it hangs, or has much to do."""


def call(path: str, operation: str, *, timeout_s: float = ANSWER_S, **arguments: object) -> dict[str, Any]:
    """Send one request to the owner that listens at `path`. Raise `Busy` if nobody listens, and any error it raises."""
    client = reach(path)
    if client is None:
        raise Busy(
            f"no process answers at control socket {path}",
            next_step="look at the process that owns the disk, or try again once it is ready",
        )
    with client:
        return client.call(operation, timeout_s=timeout_s, **arguments)


def reach(path: str, timeout_s: float | None = None) -> Client | None:
    """Connect to the owner that listens at `path`; return None if nobody does.

    Raise `Busy` if it is full, `Silent` if it has not greeted us after `timeout_s`, which is `CONNECT_S` by default.
    """
    with os_errors_at(path):
        sock = _connected(path)
    if sock is None:
        return None
    try:
        return Client(sock, path, CONNECT_S if timeout_s is None else timeout_s)
    except BaseException:
        sock.close()
        raise


def _connected(path: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_S)
        with short_path(path) as address:
            sock.connect(address)
    except OSError as refusal:
        sock.close()
        if isinstance(refusal, (FileNotFoundError, ConnectionRefusedError)):
            return None
        if isinstance(refusal, BlockingIOError):  # its queue is full
            raise Busy(f"too many callers wait at control socket {path}", next_step="try again") from refusal
        raise
    return sock


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """A name for `path` that fits the 107 bytes of a socket's address, however long the path is."""
    folder, name = os.path.split(path)
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


class Client:
    """A connection to an owner, whose hello names its disks. For one thread at a time.

    A call that was interrupted, as by Ctrl-C, may still be answered, and a later call must not take that answer for its
    own. So no calls are possible after it.
    """

    def __init__(self, sock: socket.socket, path: str, timeout_s: float = CONNECT_S) -> None:
        self._path = path
        self._place = f"control socket {path}"
        self._sock = sock
        forks.is_not_for_children(self)
        self._begin(sock, timeout_s)

    def _begin(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._lines = wire.LineBuffer(self._place)
        self._owes_answer = True  # a greeting
        self._was_greeted = False
        hello = self._receive(timeout_s)
        self._check_protocol(wire.field(hello, "protocol", int, self._place))
        self.version = wire.field(hello, "version", str, self._place)
        self.pid = wire.field(hello, "pid", int, self._place)
        self.disks: list[Any] = wire.field(hello, "disks", list, self._place)
        self._was_greeted = True

    def renew(self, timeout_s: float = CONNECT_S) -> None:
        """Connect again if we were silent for so long that the owner may have hung up, as while a guest was frozen.

        Only for a caller for whom nothing is held: another process may have the disks by now.
        """
        self.require_in_step()
        if time.monotonic() - self._heard_s < _FRESH_S:
            return
        self._sock.close()
        with os_errors_at(self._path):
            sock = _connected(self._path)
        if sock is None:
            raise self._lost(ConnectionResetError())
        self._begin(sock, min(timeout_s, CONNECT_S))

    def call(self, operation: str, *, timeout_s: float = ANSWER_S, **arguments: object) -> dict[str, Any]:
        """Return the owner's answer, or raise its error. Without an answer the operation may have been done or not.

        What callers read of the answer is of its documented kind (control_answers.py).
        """
        self._ask(operation, arguments)
        answer = wire.field(self._receive(timeout_s), "answer", dict, self._place)
        require_answer(operation, arguments, answer, self._place)
        return answer

    def connection(self) -> socket.socket:
        """Return a new connection to the owner's NBD server, which has the other end already."""
        return socket.socket(fileno=self._passed("connect", {}, "one socket", stat.S_ISSOCK))

    def image(self, **held: str) -> int:
        """Return a descriptor of the image of a disk that is held for us. See direct.py for how far to trust it.

        `held` are the arguments that name the snapshot.
        """
        return self._passed("image", held, "one image", lambda mode: stat.S_ISREG(mode) or stat.S_ISBLK(mode))

    def _passed(
        self, operation: str, arguments: Mapping[str, object], what: str, is_it: Callable[[int], bool]
    ) -> int:
        """Return the descriptor that comes with the answer; raise unless it is exactly one, of the kind asked for."""
        self._ask(operation, arguments)
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, _RECEIVE, 1)
        except OSError as refusal:
            raise self._lost(refusal) from refusal
        self._lines.add(data)
        try:
            wire.field(self._receive(CONNECT_S), "answer", dict, self._place)
            if flags & socket.MSG_CTRUNC and not fds:  # this process may have no more: the kernel dropped it
                raise error_from_os(self._place, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            self._require_one(fds, what, is_it)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        os.set_inheritable(fds[0], False)
        return fds[0]

    def _require_one(self, fds: Sequence[int], what: str, is_it: Callable[[int], bool]) -> None:
        if len(fds) != 1 or not is_it(os.fstat(fds[0]).st_mode):
            raise FormatError(
                self._place,
                expected=f"{what} with its answer",
                found=f"{len(fds)} descriptors" if len(fds) != 1 else "a descriptor of something else",
                next_step="use the version of lmdbitmap that owns the disk",
            )

    def require_in_step(self) -> None:
        """Raise `Busy` unless every call was answered, so that the store shows their effects."""
        if self._owes_answer:
            raise Busy(
                f"{self._place}: the owner has not answered an earlier request, which may be under way still",
                next_step="see with `lmdbitmap info` what was done, and try again",
            )

    def _ask(self, operation: str, arguments: Mapping[str, object]) -> None:
        self.require_in_step()
        line = wire.encode({"operation": operation, "arguments": arguments})
        self._owes_answer = True
        try:
            self._sock.settimeout(CONNECT_S)
            self._sock.sendall(line)
        except OSError as refusal:
            raise self._lost(refusal) from refusal

    def close(self) -> None:
        self._sock.close()

    def forsake(self) -> None:
        """Close the socket in a forked child: the owner would hear of its end only with that of the child."""
        self._sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, timeout_s: float) -> dict[str, object]:
        try:
            line = receive_line(self._sock, self._lines, time.monotonic() + timeout_s)
        except OSError as refusal:
            raise self._lost(refusal, timeout_s) from refusal
        if line is None:
            raise self._lost(ConnectionResetError())
        message = wire.decode(line, self._place)
        self._owes_answer = False
        self._heard_s = time.monotonic()
        if "error" in message:
            raise wire.error_from(wire.field(message, "error", dict, self._place), self._place)
        return message

    def _lost(self, refusal: OSError, timeout_s: float = CONNECT_S) -> Silent | Busy | OwnerGone:
        """The error for a lost connection. A broken one owes no answer: an owner that is gone does no more for us."""
        if isinstance(refusal, TimeoutError):
            return Silent(
                f"{self._place}: the owner did not answer within {timeout_s:g} s",
                next_step="see with `lmdbitmap info` what was done",
            )
        self._owes_answer = False
        if not self._was_greeted:
            return Busy(f"{self._place}: the owner is going away", next_step="try again when it is back")
        return OwnerGone(
            f"{self._place}: the owner went away before it answered",
            next_step="see with `lmdbitmap info` what was done, and try again",
        )

    def _check_protocol(self, protocol: int) -> None:
        if protocol != wire.PROTOCOL:
            raise FormatError(
                self._place,
                expected=f"protocol {wire.PROTOCOL}",
                found=protocol,
                next_step="use the version of lmdbitmap that owns the disk",
            )


def receive_line(sock: socket.socket, lines: wire.LineBuffer, deadline: float) -> bytes | None:
    """Return the next line, or None at the end. Raise `TimeoutError` if it is not whole by then (monotonic clock)."""
    while (line := lines.take()) is None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        data = sock.recv(_RECEIVE)
        if not data:
            return None
        lines.add(data)
    return line
