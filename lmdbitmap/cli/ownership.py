"""Who acts on a disk: the process that serves it, through its control socket, or we, by owning it for a moment.

A verb says what is to be done; which way it goes is decided here, by asking who holds the owner's lock.
Between the question and the deed the answer may change; then the deed is refused as `Busy`, and nothing
has happened.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lmdbitmap.access.owners import is_attached, owner_of, require_all_or_none
from lmdbitmap.errors import Busy, LmdbitmapError, NotFound, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.nbd import control_client
from lmdbitmap.storage.schema import Bitmap, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain, session
from lmdbitmap.tracker.changes import Changes, Standing, changes

log = logging.getLogger(__name__)

_PERSIST_S = 60.0
_INFO_S = 10.0


def find_disk_or_bitmap(store: Store, name: str) -> Disk | Bitmap:
    """What goes by that name: disks and stand-alone bitmaps share their names."""
    with store.read() as reader:
        everything: list[Disk | Bitmap] = [*reader.disks(), *reader.bitmaps()]
    for found in everything:
        if found.name == name:
            return found
    raise NotFound(f"nothing is called {name!r}", next_step="`lmdbitmap ls` lists what there is")


def require_unowned(store: Store, disk: Disk) -> None:
    """For what no owner can do for us."""
    if is_attached(store, disk):
        raise Busy(
            f"disk {disk.name!r} is owned by another process",
            next_step="stop the process that serves it, or wait for it",
        )


# --- questions ---


def ask_changes(store: Store, name: str, *, since: str | None = None, until: str | None = None) -> Changes:
    """What changed. An open period's owner first writes down what only its memory knows."""
    lost, persisted = None, False
    try:
        persisted = until is None and _persisted_by_owner(store, chain.disk_called(store, name))
    except Untrusted as error:
        lost = error.problem
    answer = changes(store, name, since=since, until=until, persisted=persisted)
    return answer if lost is None else replace(answer, standing=Standing(Trust.UNTRUSTED, lost))


def _persisted_by_owner(store: Store, disk: Disk) -> bool:
    """Whether somebody owns the disk and did so; if it did not, the answer is right, but not as sharp.

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
        log.warning("the owner of disk %s did not say what it knows: %s", disk.name, error)
        return False
    return True


_OF_SERVED = ("image_lost", "armed", "snapshots")
"""Owners of older versions do not look after their image."""


def ask_owner(store: Store, disk: Disk) -> dict[str, Any] | None:
    """What the process that serves the disk says of it (docs/control.md); None where nobody does, or says it.

    What is only known of disks that are served is in `served`, the process itself among it.
    """
    if not is_attached(store, disk):
        return None
    try:
        client = control_client.reach(store.control_path(disk.uuid))
        if client is None:
            return None
        with client:
            told = client.call("info", timeout_s=_INFO_S)["disks"]
            process = {"pid": client.pid, "version": client.version}
    except LmdbitmapError as error:
        log.warning("disk %s: its owner does not say how it is: %s", disk.name, error)
        return None
    entry: dict[str, Any] | None = next((one for one in told if one["name"] == disk.name), None)
    if entry is None or "served" not in entry:  # it only embeds a tracker
        return None
    of_disk = {"image_lost": None, **{name: entry[name] for name in _OF_SERVED if name in entry}}
    entry["served"] = {**process, **of_disk, **entry["served"]}
    return entry


# --- deeds ---


def checkpoint(store: Store, names: Sequence[str], checkpoint_name: str, limit_s: float) -> None:
    """One durable point in time on all of the disks, or on none. Who serves them may take `limit_s`."""
    disks = [chain.disk_called(store, name) for name in names]
    served = [disk.name for disk in disks if is_attached(store, disk)]
    require_all_or_none(names, served)
    if served:
        with owner_of(store, disks[0]) as client:
            client.call("checkpoint", disks=list(names), name=checkpoint_name, timeout_s=limit_s)
    else:
        with attached_for_a_moment(store, names) as filters:
            take_checkpoint(filters, checkpoint_name)


def forget(store: Store, name: str, checkpoint_name: str) -> None:
    disk = chain.disk_called(store, name)
    if is_attached(store, disk):
        with owner_of(store, disk) as client:
            client.call("forget", disk=name, checkpoint=checkpoint_name)
    else:
        with attached_for_a_moment(store, [name]) as [attached]:
            attached.forget(checkpoint_name)


def mark(store: Store, name: str, offset: int, length: int) -> None:
    """Every block that the range touches is dirty, durably."""
    disk = chain.disk_called(store, name)
    disk.geometry.check_range(offset, length)
    if is_attached(store, disk):
        with owner_of(store, disk) as client:
            client.call("mark", disk=name, offset=offset, length=length)
    else:
        with attached_for_a_moment(store, [name]) as [attached]:
            attached.mark(offset, length)


class Adopted(NamedTuple):
    """An image that is known now. `lost`: why nothing is known of the time before, all the same."""

    is_served: bool
    lost: str | None


def adopt(store: Store, name: str) -> Adopted:
    """Take an image as it is. One that is served was looked at when that began: `Untrusted` if that ended an epoch."""
    disk = chain.disk_called(store, name)
    told = ask_owner(store, disk)
    if told is None:
        require_unowned(store, disk)
        return Adopted(False, _lost_before(store, session.adopt(store, name)))
    lost = told["reason"] if told["trust"] == Trust.UNTRUSTED.value else _lost_before(store, disk)
    if lost is not None:
        raise Untrusted(
            f"disk {name!r} cannot be adopted any more, as it is served: {lost}",
            next_step="make a backup, which reads the whole disk; next time adopt it before it is served",
        )
    return Adopted(True, None)


def _lost_before(store: Store, disk: Disk) -> str | None:
    with store.read() as reader:
        return chain.begun_anew(reader, disk)


def let_go(store: Store, disk: Disk) -> None:
    """Have the process that serves the disk detach it. Raises `Busy` where somebody uses it, or it is not served."""
    with owner_of(store, disk) as client:
        client.call("detach", disk=disk.name)


@contextlib.contextmanager
def attached_for_a_moment(store: Store, names: Sequence[str]) -> Iterator[list[Filter]]:
    """Own all of the disks, or none, until the block ends. Nobody writes to them, so nothing is armed."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Filter.attach(store, name, background=False)) for name in names]
