"""Detaches single disks from a process that goes on serving the others."""

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
    """Detaches disks in `filters` that `server` serves, and removes them from both.

    `unlisten` removes the disk's control socket, so that nobody finds us as its owner. Safe for many threads.
    """

    def __init__(
        self, filters: MutableMapping[str, Filter], server: Server, unlisten: Callable[[Filter], None]
    ) -> None:
        self._filters = filters
        self._server = server
        self._unlisten = unlisten
        self._lock = threading.Lock()
        self._used: Counter[str] = Counter()
        """Number of orders in progress per disk."""
        self._detaching = 0

    @contextlib.contextmanager
    def staying(self, names: Sequence[str]) -> Iterator[None]:
        """Keep these disks from being detached in this context, if they are still there."""
        with self._lock:
            self._used.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._used -= Counter(names)  # keeps none that is not used: callers may send any names

    def let_go(self, name: str, attached: Filter) -> None:
        """Detach a disk that nobody uses, cleanly. When this returns, others can have the disk.

        Raises `Busy` while a client is connected, or a snapshot held. If the detach raises, the disk is let go all the
        same, as by a crash, and the error is raised after that. When the last disk goes, the server ends.
        """
        with self._lock:
            self._require_unheld(name, attached)
            self._server.retire(name)
            self._filters.pop(name, None)  # it is gone already if two callers ask at once
            self._detaching += 1
        try:
            self._unlisten(attached)
            attached.detach()
        finally:
            _log.warning(
                "disk %s: it is no longer served, because a caller at the control socket asked for that", name
            )
            self._end_with_the_last()

    def _require_unheld(self, name: str, attached: Filter) -> None:
        held = ", ".join(snapshot.checkpoint.name for snapshot in attached.snapshots)
        if held:
            raise Busy(
                f"disk {name!r} is held as at {held}",
                next_step=f"wait until it is released, or run `lmdbitmap release {name} CHECKPOINT`",
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
