"""How a process lets go of one of the disks that it serves, and goes on with the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping

from lmdbitmap.errors import Busy
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.server.server import Server

_log = logging.getLogger(__name__)


class Parting:
    """Lets go of disks in `filters`, which `server` serves: from then on they are in neither.

    `unlisten` has nobody find us any more who looks for the owner of that disk.
    """

    def __init__(
        self, filters: MutableMapping[str, Filter], server: Server, unlisten: Callable[[Filter], None]
    ) -> None:
        self._filters = filters
        self._server = server
        self._unlisten = unlisten

    def let_go(self, name: str, attached: Filter) -> None:
        """Detach a disk that nobody uses, cleanly: whoever wants it can have it when this returns.

        Raises `Busy` while a client is connected, or a snapshot held. What a detach raises is raised once the disk is
        let go of all the same, as by a crash. With its last disk the server ends.
        """
        if attached.snapshots:
            held = ", ".join(snapshot.checkpoint.name for snapshot in attached.snapshots)
            raise Busy(
                f"disk {name!r} is held as at {held}",
                next_step="wait for who reads it, or `lmdbitmap release` it",
            )
        self._server.retire(name)
        self._filters.pop(name, None)  # not there any more, where two ask at once
        self._unlisten(attached)
        try:
            attached.detach()
        finally:
            _log.warning("disk %s: it is served no more, as somebody asked for that", name)
            self._end_with_the_last()

    def _end_with_the_last(self) -> None:
        if not self._filters:
            _log.warning("no disk is left to serve")
            self._server.request_stop()
