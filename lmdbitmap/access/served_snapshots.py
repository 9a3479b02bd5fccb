"""Snapshots of disks that another process serves: taken and released through its control socket, read over its NBD.

They are held until they are released or their server ends, even if the requesting process dies. The snapshots of
`backup.py` are bound to the backup instead, and cost nothing once it died.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from lmdbitmap.access import owners
from lmdbitmap.errors import InvalidArgument, NotFound
from lmdbitmap.nbd import control_client
from lmdbitmap.notes.checkpoint_names import refuse_ours
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.snapshot import broken_error
from lmdbitmap.work.names import require_names
from lmdbitmap.work.patience import require_limits


class ServedSnapshot(NamedTuple):
    """A disk that its server holds as it was at a checkpoint."""

    disk: str
    checkpoint: str
    uuid: UUID
    """The checkpoint's uuid."""
    time_ns: int
    """Time of the checkpoint, Unix nanoseconds."""
    export: str
    """Name under which the server exports it, read-only, beside the disk."""


def take_served_snapshot(
    store: Store,
    names: Sequence[str],
    checkpoint: str,
    *,
    since: str | None = None,
    freeze_limit_s: float = control_client.ANSWER_S,
) -> list[ServedSnapshot]:
    """Have the process that serves the disks called `names` hold all of them at one moment, or none.

    The checkpoint is durable on return, and stays. With `since`, a checkpoint, only what changed since then is kept,
    and only that may be read. A caller that froze a guest gives `freeze_limit_s`. After that the request is given up
    with `Busy`, and the snapshot may still be made: release it. Raises `NotFound` for a disk that is not served, `Busy`
    if not all are served by one process, `AlreadyExists` if a disk has a checkpoint of that name, `StorageError` if old
    data cannot be kept.
    """
    require_limits(freeze_limit_s)
    require_names(names)
    refuse_ours(checkpoint)
    if not names:
        raise InvalidArgument("a snapshot is of one disk or of several", next_step="name the disks")
    disks = [chain.disk_called(store, name) for name in names]
    with _server_of(store, disks[0]) as client:
        told = client.call(
            "snapshot", disks=list(names), name=checkpoint, since=[since or ""] * len(names), bound=False, once=False,
            timeout_s=freeze_limit_s,
        )  # fmt: skip
    return [
        ServedSnapshot(
            str(held["disk"]), checkpoint, UUID(held["uuid"]), int(held["time_ns"]), str(held["export"])
        )
        for held in told["snapshots"]
    ]


def release_served_snapshot(store: Store, name: str, checkpoint: str) -> int:
    """Release the snapshot of the disk called `name`. Return the bytes of old data that had been kept.

    The checkpoint stays. Raises `StorageError` if not all old data was kept: then what was read is unusable. Raises
    `NotFound` without such a snapshot.
    """
    disk = chain.disk_called(store, name)
    with _server_of(store, disk) as client:
        told = client.call("release", disk=name, checkpoint=checkpoint)
    if told["broken"] is not None:
        raise broken_error(disk, str(told["broken"]))
    return int(told["kept_bytes"])


def _server_of(store: Store, disk: Disk) -> control_client.Client:
    """Connect to the process that serves a disk. Raise `NotFound` if none has it, `Busy` if one only owns it."""
    if not owners.is_attached(store, disk):
        raise NotFound(
            f"disk {disk.name!r} is not served",
            next_step="serve it first; a backup of a disk that is not served needs no snapshot",
        )
    return owners.owner_of(store, disk)
