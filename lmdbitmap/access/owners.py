"""Which disks are there, which of them a process has, and how that process is reached.

Of several, one that is not there or that its process serves to nobody is set aside: it keeps none of the others away.
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
    """Those that the store knows."""
    found = []
    for name in names:
        with apart.of(name):
            found.append(chain.disk_called(store, name).name)
    return found


def attached_elsewhere(store: Store, names: Sequence[str], apart: Failures) -> list[str]:
    """Those that another process has attached, and of several also serves."""
    attached = [name for name in names if is_attached(store, name)]
    if len(names) > 1:
        for name in attached:
            with apart.of(name):
                owner_of(store, chain.disk_called(store, name)).close()
    return [name for name in attached if name not in apart]


class NotTogether(Busy):
    """Some of several disks are served and some are not: it is of no use to wait for anybody."""


def require_all_or_none(names: Sequence[str], attached: Sequence[str]) -> None:
    """Raise `NotTogether` where no one moment can be taken of all of them."""
    if 0 < len(attached) < len(names):
        raise NotTogether(
            f"of these disks only {', '.join(attached)} is served",
            next_step="serve all of them in one process, or none, or name them one by one",
        )


def is_attached(store: Store, disk: Disk | str) -> bool:
    """Whether a process has the disk, or the one of that name, now: to serve it, or for itself, as a backup does."""
    if isinstance(disk, str):
        disk = chain.disk_called(store, disk)
    return owner.is_owned(store.owner_path(disk.uuid))


def is_served(store: Store, name: str) -> bool:
    """Whether another process has the disk of that name, and is reached: what it changes for us, it does itself."""
    try:
        client = control_client.reach(store.control_path(chain.disk_called(store, name).uuid))
    except Busy:
        return True
    if client is None:
        return False
    client.close()
    return True


def owner_of(store: Store, disk: Disk) -> Client:
    """A connection to the process that has the disk; `Busy` where it takes none."""
    client = control_client.reach(store.control_path(disk.uuid))
    if client is None:
        pid = owner.owner_pid(store.owner_path(disk.uuid))
        raise Busy(
            f"disk {disk.name!r} is owned by a process that serves it to nobody, such as another backup"
            + ("" if pid is None else f" (process {pid})"),
            next_step="wait for that process, or stop it",
        )
    return client


def require_unowned(store: Store, disk: Disk) -> None:
    """For what no owner can do for us."""
    if is_attached(store, disk):
        raise Busy(
            f"disk {disk.name!r} is owned by another process",
            next_step="stop the process that serves it, or wait for it",
        )
