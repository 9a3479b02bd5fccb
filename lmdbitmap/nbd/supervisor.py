"""Status messages for a service manager: sd_notify(3), in the few lines that it takes."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

_PATIENCE_S: Final = 5.0


class Supervisor:
    """Reports our state at `address`, the value of NOTIFY_SOCKET; a message that cannot be delivered is dropped.

    A manager that has much to do, as at boot, is waited for: without READY=1 it would end us after some minutes.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def tell(self, state: str) -> None:
        """Send a state such as READY=1; do nothing if nobody listens."""
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.settimeout(_PATIENCE_S)
            speaker.connect(address)
            speaker.send(state.encode())
