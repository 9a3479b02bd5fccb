"""What a service manager wants to hear: sd_notify(3), in the few lines that it is."""

from __future__ import annotations

import contextlib
import socket


class Supervisor:
    """Tells whoever listens at `address`, the value of NOTIFY_SOCKET, how we are; what it misses is its own loss."""

    def __init__(self, address: str) -> None:
        self._address = address

    def tell(self, state: str) -> None:
        """Send a state such as READY=1; nothing where nobody wants to know, or can."""
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.setblocking(False)
            speaker.sendto(state.encode(), address)
