"""TCP connections that tell when the host at their other end has vanished."""

from __future__ import annotations

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
    """What is sent leaves at once; a host that vanished is noticed within some 20 s while nothing is on its way to it.

    What is on its way is sent again for as long as the kernel likes, a quarter of an hour. `TCP_USER_TIMEOUT` ends that
    sooner, and with it a connection whose other end is well and has not read for so long: that is for whoever can dial
    anew, not for a server, whose client may be a pipe that stands.
    """
    for option in _OPTIONS:
        sock.setsockopt(*option)
