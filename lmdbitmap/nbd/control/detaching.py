"""How a process lets go of one of the disks that it serves, and goes on with the others."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence

from lmdbitmap.errors import Busy
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.server.server import Server

_log = logging.getLogger(__name__)


class Detaching:
    """Lets go of disks in `filters`, which `server` serves: from then on they are in neither.

    `unlisten` has nobody find us any more who looks for the owner of that disk. Safe for many threads.
    """

    def __init__(
        self, filters: MutableMapping[str, Filter], server: Server, unlisten: Callable[[Filter], None]
    ) -> None:
        self._filters = filters
        self._server = server
        self._unlisten = unlisten
        self._lock = threading.Lock()
        self._used: Counter[str] = Counter()
        """How many orders are about a disk at this moment."""
        self._detaching = 0

    @contextlib.contextmanager
    def staying(self, names: Sequence[str]) -> Iterator[None]:
        """These disks, where they are there still, are not let go of in the block."""
        with self._lock:
            self._used.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._used.subtract(names)

    def let_go(self, name: str, attached: Filter) -> None:
        """Detach a disk that nobody uses, cleanly: whoever wants it can have it when this returns.

        Raises `Busy` while a client is connected, or a snapshot held. What a detach raises is raised once the disk is
        let go of all the same, as by a crash. With its last disk the server ends.
        """
        with self._lock:
            self._require_unheld(name, attached)
            self._server.retire(name)
            self._filters.pop(name, None)  # not there any more, where two ask at once
            self._detaching += 1
        try:
            self._unlisten(attached)
            attached.detach()
        finally:
            _log.warning("disk %s: it is served no more, as somebody asked for that", name)
            self._end_with_the_last()

    def _require_unheld(self, name: str, attached: Filter) -> None:
        held = ", ".join(snapshot.checkpoint.name for snapshot in attached.snapshots)
        if held:
            raise Busy(
                f"disk {name!r} is held as at {held}",
                next_step="wait for who reads it, or `lmdbitmap release` it",
            )
        if self._used[name]:
            raise Busy(f"disk {name!r} is used at this moment", next_step="try again")

    def _end_with_the_last(self) -> None:
        with self._lock:
            self._detaching -= 1
            is_last = not self._filters and not self._detaching
        if is_last:
            _log.warning("no disk is left to serve")
            self._server.request_stop()
