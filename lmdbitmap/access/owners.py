"""Finds which disks exist, which of them a process has, and how that process is reached.

When several disks are named, one that is missing, whose file cannot be read, or whose process serves it to nobody is
set aside, and the rest go on.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmdbitmap.errors import Busy
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.control_client import Client
from lmdbitmap.storage import owner
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.work.failures import Failures


def tracked(store: Store, names: Sequence[str], apart: Failures) -> list[str]:
    """Return the names that the store knows."""
    found = []
    for name in names:
        with apart.of(name):
            found.append(chain.disk_called(store, name).name)
    return found


def attached_elsewhere(store: Store, names: Sequence[str], apart: Failures) -> list[str]:
    """Return the disks that another process has attached. If several are named, only those it also serves."""
    attached = []
    for name in names:
        with apart.of(name):
            if is_attached(store, name):
                if len(names) > 1:
                    owner_of(store, chain.disk_called(store, name)).close()
                attached.append(name)
    return attached


class NotTogether(Busy):
    """Some of several disks are served and some are not: waiting does not help."""


def require_all_or_none(names: Sequence[str], attached: Sequence[str]) -> None:
    """Raise `NotTogether` if no one point in time can be taken of all of them."""
    if 0 < len(attached) < len(names):
        is_or_are = "is" if len(attached) == 1 else "are"
        raise NotTogether(
            f"of these disks only {', '.join(attached)} {is_or_are} served",
            next_step="serve all of them in one process, or none, or run the command for each disk alone",
        )


def is_attached(store: Store, disk: Disk | str) -> bool:
    """Return whether a process has the disk now, to serve it or for itself, as a backup does."""
    if isinstance(disk, str):
        disk = chain.disk_called(store, disk)
    return owner.is_owned(store.owner_path(disk.uuid))


def is_served(store: Store, name: str) -> bool:
    """Return whether another process has the disk of that name and can be reached: it makes our changes itself."""
    try:
        client = control_client.reach(store.control_path(chain.disk_called(store, name).uuid))
    except Busy:
        return True
    if client is None:
        return False
    client.close()
    return True


def owner_of(store: Store, disk: Disk) -> Client:
    """Connect to the process that has the disk. Raise `Busy` if it takes no connection."""
    client = control_client.reach(store.control_path(disk.uuid))
    if client is None:
        pid = owner.owner_pid(store.owner_path(disk.uuid))
        raise Busy(
            f"disk {disk.name!r} is owned by a process that does not serve it, such as another backup"
            + ("" if pid is None else f" (process {pid})"),
            next_step="wait for that process, or stop it",
        )
    return client


def require_unowned(store: Store, disk: Disk) -> None:
    """Raise `Busy` if the disk has an owner: for actions that no owner can do for us."""
    if is_attached(store, disk):
        raise Busy(
            f"disk {disk.name!r} is owned by another process",
            next_step="wait for that process, or stop it",
        )
