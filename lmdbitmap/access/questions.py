"""Questions about a disk whose answers a process that serves it knows better than the store does."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lmdbitmap.access.owners import is_attached
from lmdbitmap.errors import FormatError, LmdbitmapError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.nbd import control_client
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import Changes, Standing, changes

log = logging.getLogger(__name__)

_PERSIST_S = 60.0
_INFO_S = 10.0
_AT_ONCE = 100


def ask_changes(store: Store, name: str, *, since: str | None = None, until: str | None = None) -> Changes:
    """Tell what changed, as `changes_of` does, after the process that owns the disk wrote down what only it knows.

    `changes_of` names whole armed extents where this names blocks. Where the owner lost track, the answer is untrusted;
    where it does not answer within a minute, it is the answer of `changes_of`. Raises `NotFound` and `Untrusted` as
    that does.
    """
    lost, persisted = None, False
    try:
        persisted = until is None and _persisted_by_owner(store, chain.disk_called(store, name))
    except Untrusted as error:
        lost = error.problem
    answer = changes(store, name, since=since, until=until, persisted=persisted)
    return answer if lost is None else replace(answer, standing=Standing(Trust.UNTRUSTED, lost))


def _persisted_by_owner(store: Store, disk: Disk) -> bool:
    """Return whether the disk has an owner that persisted its dirt; if not, the changes are right but less sharp.

    Raises `Untrusted` if the owner lost track, which the store may not know yet.
    """
    if not is_attached(store, disk):
        return False
    try:
        client = control_client.reach(store.control_path(disk.uuid))
        if client is None:
            return False
        with client:
            client.call("persist", disk=disk.name, timeout_s=_PERSIST_S)
    except Untrusted:
        raise
    except LmdbitmapError as error:
        log.warning("disk %s: its owner did not answer, so the store is asked: %s", disk.name, error)
        return False
    return True


_OF_SERVED = ("image_lost", "armed", "snapshots")
"""Facts that an owner reports beside `served`. Owners of older versions do not watch their image."""


def ask_owner(store: Store, disk: Disk) -> dict[str, Any] | None:
    """Return the serving process's `info` entry for this disk (docs/control.md).

    Facts that only served disks have are in `served`, with the pid and version of the process. Returns None if nobody
    serves the disk, or the owner does not answer.
    """
    return _told_by_owner(store, disk, alone=True).get(str(disk.uuid)) if is_attached(store, disk) else None


class Owners:
    """Asks about many disks, and each process that serves some of them only once: it tells of all of them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._told: dict[str, dict[str, Any]] = {}
        """Entries by the uuids of their disks."""

    def ask(self, disk: Disk) -> dict[str, Any] | None:
        """See `ask_owner`."""
        if not is_attached(self._store, disk):
            return None
        if str(disk.uuid) not in self._told:
            self._told |= _told_by_owner(self._store, disk)
        return self._told.get(str(disk.uuid))


def _told_by_owner(store: Store, disk: Disk, *, alone: bool = False) -> dict[str, dict[str, Any]]:
    """Return what the disk's owner tells of all its disks, or of the disk `alone`, by their uuids."""
    try:
        client = control_client.reach(store.control_path(disk.uuid))
        if client is None:
            return {}
        with client:
            told = _entries(client, [disk.name] if alone else client.disks)
            process = {"pid": client.pid, "version": client.version}
    except LmdbitmapError as error:
        log.warning("disk %s: its owner does not say how it is: %s", disk.name, error)
        return {}
    # without `served` the owner only embeds a tracker
    return {entry["uuid"]: _with_served(entry, process) for entry in told if "served" in entry}


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
