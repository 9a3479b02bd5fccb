"""TCP options that notice when the host at the other end has vanished."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


def tune(sock: socket.socket) -> None:
    """Send data at once, and notice a vanished host within some 20 s while no data is on its way to it.

    Data that is on its way is sent again for as long as the kernel likes, a quarter of an hour. `TCP_USER_TIMEOUT` ends
    that sooner. But it also ends a connection whose other end is alive and has not read for that long. So it is for
    clients, which can dial again, and not for a server, whose client may be a pipe that stands still.
    """
    for option in _OPTIONS:
        with contextlib.suppress(OSError):  # older kernels know some of them for TCP alone, not for MPTCP
            sock.setsockopt(*option)
