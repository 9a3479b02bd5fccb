"""Where serving verbs listen: passed sockets, TCP addresses, and socket files with their permissions."""

from __future__ import annotations

import grp
import ipaddress
import os
from collections.abc import MutableMapping

import click

from lmdbitmap.errors import InvalidArgument, os_errors_at
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.tls import server_context

_FIRST_PASSED_FD = 3
_MOST_SOCKETS = 64
_MOST_DIGITS = 20
_MOST_PORT = 65535
_MOST_GROUP_ID = (1 << 32) - 2
"""The last number stands for no change."""
_FOR_OTHERS = 0o007


class ListenAddresses:
    """All addresses to listen at. `passed` are descriptors; `tls` is the certificates' folder for clients over TCP.

    `insecure` allows other hosts to connect without TLS.
    """

    def __init__(
        self,
        socket: tuple[str, int, int | None] | None,
        address: tuple[str, int] | None,
        passed: range,
        tls: str | None,
        *,
        insecure: bool = False,
    ) -> None:
        self.insecure = insecure
        self._socket = socket
        self._address = address
        self._passed = passed
        self._certificates = None if tls is None else server_context(tls)

    def open_all(self, server: Server) -> None:
        if self._socket is not None:
            path, mode, group = self._socket
            _open_to(server.listen_unix(path).path, mode, group)
        if self._address is not None:
            server.listen_tcp(*self._address, self._certificates)
        for fd in self._passed:
            server.listen_inherited(fd, self._certificates)


def passed_sockets(environment: MutableMapping[str, str]) -> range:
    """Return the descriptors of sockets that a service manager passed to this process (sd_listen_fds(3))."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return range(0)
    if not _is_number(count, _MOST_SOCKETS):
        raise InvalidArgument(
            f"LISTEN_FDS={count[:20]!r} is not a number from 0 to {_MOST_SOCKETS}",
            next_step="mend the socket unit",
        )
    return range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count))


def host_and_port(text: str) -> tuple[str, int]:
    """Return the host and port of HOST:PORT; an IPv6 host stands in brackets."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not _is_number(port, _MOST_PORT):
        raise InvalidArgument(f"{text!r} is not HOST:PORT", next_step="write it as in 127.0.0.1:10809")
    return host, int(port)


def _is_number(text: str, most: int) -> bool:
    """Return whether it is a decimal number up to `most`. `int` raises for thousands of digits."""
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS and int(text) <= most


def is_loopback(host: str) -> bool:
    """Return whether only this host can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- socket files ---


def socket_mode(text: str) -> int:
    """Return the mode given in octal, as for chmod; for `type=`. Only the owner and a group can be given access."""
    try:
        mode = int(text, 8)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no octal mode; write it as in 0660") from None
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{text!r} has more than permission bits; write it as in 0660")
    if mode & _FOR_OTHERS:
        raise click.BadParameter(
            f"{text} would let every user of this host write the disks; use 0660 and --socket-group"
        )
    return mode


def group_id(text: str) -> int:
    """Return the id of a group given by name or number; for `type=`."""
    if _is_number(text, _MOST_GROUP_ID):
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {text!r}; name one of /etc/group") from None


def _open_to(path: str, mode: int, group: int | None) -> None:
    """Let others connect to our socket file, which only we could until now: set its group first, then its mode."""
    with os_errors_at(path):
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, mode)
