"""A tracked disk that this process serves to whoever asks at its control socket, as `lmdbitmap serve` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lmdbitmap.filter import Filter
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.tracker.scratch import Scratch
from tests.helpers.tracked import NAME, TrackedDisk


class Serving(NamedTuple):
    disk: Filter
    server: Server


@contextmanager
def serving(
    tracked: TrackedDisk,
    scratch: Path,
    holding: type[HeldSnapshots] = HeldSnapshots,
    listening: Path | None = None,
    **limits: Any,
) -> Iterator[Serving]:
    """With its control socket; the NBD server is reached by what is handed over, and where it is `listening`."""
    with ExitStack() as stack:
        stack.enter_context(closing(tracked))
        disk = stack.enter_context(tracked.attach())
        server = Server({NAME: disk}, **limits)
        if listening is not None:
            server.listen_unix(str(listening))
        server.start()
        stack.callback(server.stop)
        held = holding({NAME: disk}, server, Scratch(str(scratch)))
        stack.enter_context(ControlServer({NAME: disk}, held=held))
        yield Serving(disk, server)
