"""Questions about a disk whose answers a process that serves it knows better than the store does."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lmdbitmap.access.owners import is_attached
from lmdbitmap.errors import FormatError, LmdbitmapError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.control_client import Silent
from lmdbitmap.storage import owner
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import Changes, Standing, changes

log = logging.getLogger(__name__)

_PERSIST_S = 60.0
_INFO_S = 10.0
_LEAST_S = 1.0
_AT_ONCE = 100


def ask_changes(store: Store, name: str, *, since: str | None = None, until: str | None = None) -> Changes:
    """Tell what changed, as `changes_of` does, after the process that owns the disk wrote down what only it knows.

    `changes_of` names whole armed extents where this names blocks. Where the owner lost track, the answer is untrusted;
    where it does not answer within a minute, it is the answer of `changes_of`. Raises `NotFound` and `Untrusted` as
    that does.
    """
    return Owners(store).changes(name, since=since, until=until)


_OF_SERVED = ("image_lost", "armed", "snapshots")
"""Facts that an owner reports beside `served`. Owners of older versions do not watch their image."""


def ask_owner(store: Store, disk: Disk) -> dict[str, Any] | None:
    """Return the serving process's `info` entry for this disk (docs/control.md).

    Facts that only served disks have are in `served`, with the pid and version of the process. Returns None if nobody
    serves the disk, or the owner does not answer.
    """
    return Owners(store).ask(disk, alone=True)


class Owners:
    """Asks about many disks the processes that serve them.

    One that does not answer is not asked again. Those that do not even greet us cost `_INFO_S` together, and then a
    second each.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._told: dict[str, dict[str, Any] | None] = {}
        """Entries by the uuids of their disks; None for one that is attached by its owner and not served."""
        self._silent: set[str] = set()
        """The processes that did not answer."""
        self._patience_s = _INFO_S

    def ask(self, disk: Disk, *, alone: bool = False) -> dict[str, Any] | None:
        """See `ask_owner`. A process is asked once, and tells of all its disks, unless the disk is asked of `alone`."""
        if not is_attached(self.store, disk):
            return None
        if str(disk.uuid) not in self._told:
            self._told |= self._told_by_owner(disk, alone)
        return self._told.get(str(disk.uuid))

    def _told_by_owner(self, disk: Disk, alone: bool) -> dict[str, dict[str, Any] | None]:
        try:
            with self._owner(disk) as client:
                told = [] if client is None else _entries(client, [disk.name] if alone else client.disks)
                process = {} if client is None else {"pid": client.pid, "version": client.version}
        except LmdbitmapError as error:
            log.warning("disk %s: its owner does not say how it is: %s", disk.name, error)
            return {}
        # without `served` the owner only embeds a tracker
        return {entry["uuid"]: _with_served(entry, process) if "served" in entry else None for entry in told}

    def changes(self, name: str, *, since: str | None = None, until: str | None = None) -> Changes:
        """See `ask_changes`."""
        lost, persisted = None, False
        try:
            persisted = until is None and self._persisted(chain.disk_called(self.store, name))
        except Untrusted as error:
            lost = error.problem
        answer = changes(self.store, name, since=since, until=until, persisted=persisted)
        return answer if lost is None else replace(answer, standing=Standing(Trust.UNTRUSTED, lost))

    def _persisted(self, disk: Disk) -> bool:
        """Return whether the disk has an owner that persisted its dirt; if not, the changes are right but less sharp.

        Raises `Untrusted` if the owner lost track, which the store may not know yet.
        """
        if not is_attached(self.store, disk):
            return False
        try:
            with self._owner(disk) as client:
                if client is not None:
                    client.call("persist", disk=disk.name, timeout_s=_PERSIST_S)
                return client is not None
        except Untrusted:
            raise
        except LmdbitmapError as error:
            log.warning("disk %s: its owner did not answer, so the store is asked: %s", disk.name, error)
            return False

    @contextlib.contextmanager
    def _owner(self, disk: Disk) -> Iterator[control_client.Client | None]:
        """Yield a connection to the disk's owner, or None if nobody listens; an owner that is `Silent` is noted."""
        path = self.store.owner_path(disk.uuid)
        pid = owner.owner_pid(path) if self._silent else None
        if pid in self._silent:
            raise Silent(f"process {pid} does not answer", next_step="look at that process")
        began_s = time.monotonic()
        try:
            client = control_client.reach(self.store.control_path(disk.uuid), self._patience_s)
            with client or contextlib.nullcontext():
                yield client
        except Silent:
            self._silent |= {owner.owner_pid(path) or ""}
            self._patience_s = max(round(self._patience_s - (time.monotonic() - began_s), 1), _LEAST_S)
            raise


def _entries(client: control_client.Client, names: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the owner's entries of those disks, of few disks all. An answer about very many would not fit a line."""
    if len(client.disks) > _AT_ONCE:
        with contextlib.suppress(FormatError):  # an older owner, which tells of all at once
            return [entry for some in _parts(names) for entry in _call_info(client, disks=some)]
    return _call_info(client)


def _parts(names: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE))


def _call_info(client: control_client.Client, **which: Sequence[Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = client.call("info", timeout_s=_INFO_S, **which)["disks"]
    return entries


def _with_served(entry: dict[str, Any], process: dict[str, Any]) -> dict[str, Any]:
    of_disk = {"image_lost": None, **{name: entry[name] for name in _OF_SERVED if name in entry}}
    return {**entry, "served": {**process, **of_disk, **entry["served"]}}
