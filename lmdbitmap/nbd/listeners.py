"""Places where clients can connect: unix sockets and TCP ports, and the URIs that name them.

A unix socket's file outlives a server that was killed. A server that wants the path connects to it first. If somebody
answers, the path is `Busy`; if nobody does, the file is stale and is replaced. The folder is locked (flock) from that
check to the new socket's first `listen`, so that only one of two servers that check at once wins. A server removes
its own socket while it still listens, so that nobody can take the path in between.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import selectors
import socket
import ssl
import stat
import time
import weakref
from collections.abc import Iterator
from typing import Any, Final, Protocol

from lmdbitmap.errors import AlreadyExists, Busy, InvalidArgument, os_errors_at
from lmdbitmap.nbd.uri import MAX_UNIX_PATH, Credentials, NbdAddress

_MAX_PORT: Final = 65535
_BACKLOG: Final = 64
_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_FOLDER_LOCK_S: Final = 2.0
_FOLDER_LOCK_PAUSE_S: Final = 0.01
_ACCEPT_PAUSE_S: Final = 0.1

_log = logging.getLogger(__name__)


_refusing: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""Sockets at which nobody can be accepted, as was logged."""


def accepted(listening: socket.socket, whom: str) -> socket.socket | None:
    """Accept a client. Return None if it left meanwhile, or if none can be accepted.

    That is logged once, until one is accepted again: who waits is tried ten times a second.
    """
    try:
        sock, _ = listening.accept()
    except (BlockingIOError, ConnectionError):  # the client left already
        return None
    except (OSError, MemoryError) as refused:
        if listening not in _refusing:
            _refusing.add(listening)
            _log.warning("cannot take a %s in, and will try again: %s", whom, refused)
        time.sleep(_ACCEPT_PAUSE_S)  # out of descriptors or memory: asking again at once would only spin
        return None
    _refusing.discard(listening)
    return sock


def heard(selector: selectors.BaseSelector, timeout_s: float | None = None) -> list[selectors.SelectorKey]:
    """Wait for clients. Nobody is heard for a moment where there is no memory to listen."""
    try:
        return [key for key, _ in selector.select(timeout_s)]
    except MemoryError:
        time.sleep(_ACCEPT_PAUSE_S)
        return []


class Listener(Protocol):
    @property
    def sock(self) -> socket.socket: ...
    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context with which every client has to begin TLS; None without TLS."""

    def uri(self, name: str) -> str:
        """The NBD URI of the disk served under `name`."""

    def close(self) -> None: ...


class UnixListener:
    """A socket file that only users admitted by `mode` can connect to."""

    tls: Final = None

    def __init__(self, path: str | os.PathLike[str], mode: int = 0o600) -> None:
        self.path = os.path.abspath(path)
        if len(os.fsencode(self.path)) > MAX_UNIX_PATH:
            raise InvalidArgument(
                f"socket path {self.path} is longer than {MAX_UNIX_PATH} bytes",
                next_step="choose a shorter one",
            )
        with os_errors_at(self.path), _folder_locked(os.path.dirname(self.path)):
            _clear_stale(self.path)
            self.sock = _bound_unix_socket(self.path, mode)
        self._inode = _inode(self.path)

    def uri(self, name: str) -> str:
        return NbdAddress(name, socket_path=self.path).uri

    def close(self) -> None:
        """Stop listening. A socket file that cannot be removed stays: the next server replaces it."""
        try:
            if _inode(self.path) == self._inode:
                os.unlink(self.path)
        except OSError as refused:
            _log.warning("the socket %s is left behind: %s", self.path, refused)
        self.sock.close()


class TcpListener:
    """A TCP port; port 0 lets the system choose one, which `uri` then names."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        family, address = _resolved(host, port)
        try:
            with os_errors_at(f"{host}:{port}"):
                self.sock = socket.create_server(address, family=family, backlog=_BACKLOG)
        except OSError as refused:
            if refused.errno == errno.EADDRINUSE:
                raise Busy(f"{host}:{port} is in use", next_step="choose another port") from refused
            raise
        self._host, self._port = _host_and_port(self.sock)

    def uri(self, name: str) -> str:
        return NbdAddress(name, host=self._host, port=self._port, tls=_spoken(self.tls)).uri

    def close(self) -> None:
        self.sock.close()


class InheritedListener:
    """A socket that a service manager bound and keeps: it outlives us, and so do the clients that wait at it."""

    def __init__(self, fd: int, tls: ssl.SSLContext | None = None) -> None:
        self.sock = _listening_socket(fd)
        self.tls = tls if self.sock.family != socket.AF_UNIX else None
        os.set_inheritable(fd, False)
        if self.sock.family == socket.AF_UNIX:
            _warn_if_open_to_all(_socket_path(self.sock.getsockname()))

    def uri(self, name: str) -> str:
        if self.sock.family == socket.AF_UNIX:
            return NbdAddress(name, socket_path=_socket_path(self.sock.getsockname())).uri
        host, port = _host_and_port(self.sock)
        return NbdAddress(name, host=host, port=port, tls=_spoken(self.tls)).uri

    def close(self) -> None:
        self.sock.close()


def _spoken(tls: ssl.SSLContext | None) -> Credentials | None:
    """Credentials for our own URIs: empty, because only the client knows which certificate is its own."""
    return None if tls is None else Credentials()


def passed_host(fd: int) -> str | None:
    """Return the address of a passed TCP socket; None for a unix socket. Raises as `InheritedListener`."""
    sock = _listening_socket(fd)
    try:
        return None if sock.family == socket.AF_UNIX else _host_and_port(sock)[0]
    finally:
        sock.detach()


def _host_and_port(sock: socket.socket) -> tuple[str, int]:
    """Return the address of a TCP socket; a link-local one names its network interface behind a `%`."""
    host, port = socket.getnameinfo(sock.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    return host, int(port)


def _socket_path(address: str | bytes) -> str:
    """Return the path; of an abstract socket, which has none, its name as systemd writes it."""
    path = os.fsdecode(address)
    return f"@{path[1:]}" if path.startswith("\0") else path


def _warn_if_open_to_all(path: str) -> None:
    """Warn of a socket to which every user of this host may connect; an abstract one has no permissions."""
    with contextlib.suppress(OSError):  # it was removed: nobody can connect
        if path.startswith("@") or os.stat(path).st_mode & stat.S_IWOTH:
            _log.warning(
                "every user of this host can connect to %s; set SocketMode=0660 and SocketGroup= in its unit",
                path,
            )


def _listening_socket(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        if (
            sock.family in _FAMILIES
            and sock.type == socket.SOCK_STREAM
            and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            return sock
        sock.detach()
    except OSError:
        pass
    raise InvalidArgument(
        f"descriptor {fd} is no listening stream socket",
        next_step="have the service manager pass one (ListenStream=)",
    )


def _resolved(host: str, port: int) -> tuple[int, Any]:
    """Return (address family, address), the first one that the system resolves host and port to.

    A link-local address has the number of its network interface in it.
    """
    try:
        if not 0 <= port <= _MAX_PORT:
            raise OverflowError(f"ports end at {_MAX_PORT}")
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        if error.args[0] == socket.EAI_AGAIN:  # as while the host starts
            raise Busy(
                f"no name server says where {host}:{port} is ({error})",
                next_step="try again once one does, or name the address itself",
            ) from error
        raise InvalidArgument(
            f"{host}:{port} is no address ({error})", next_step="name one of this host's addresses"
        ) from error
    return family, address


def _bound_unix_socket(path: str, mode: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, mode)  # nobody can have connected yet: that takes `listen`
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _clear_stale(path: str) -> None:
    """Remove a dead server's socket. Raise `Busy` if a server answers there."""
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise AlreadyExists(f"{path} exists and is no socket", next_step="choose another path for the socket")
    if _somebody_listens(path):
        raise Busy(f"another server listens at {path}", next_step="stop it or choose another socket")
    with contextlib.suppress(FileNotFoundError):  # that server ended just now, and removed it
        os.unlink(path)


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # its backlog is full
            return True
        return True


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _folder_locked(folder: str) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _FOLDER_LOCK_S
        while not _try_flock(fd):
            if time.monotonic() > deadline:
                raise Busy(
                    f"{folder} is locked by another program", next_step="try again, or choose another folder"
                )
            time.sleep(_FOLDER_LOCK_PAUSE_S)
        yield
    finally:
        os.close(fd)


def _try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
