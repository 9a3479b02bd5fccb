"""Snapshots of disks that another process serves: taken and released through its control socket, and read by others.

They are held until they are released or their server ends, even if the requesting process dies. The snapshots of
`backup.py` are bound to the backup instead, and cost nothing once it died.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from lmdbitmap.access import owners
from lmdbitmap.access.routes import OWNER_LIMIT_S, Quiesced
from lmdbitmap.access.through_owner import HeldThere, open_held
from lmdbitmap.errors import InvalidArgument, LmdbitmapError, NotFound
from lmdbitmap.interfaces import BlockDevice
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
    direct: bool | None = None
    """Whether the server offers the image itself to be read; None from an older server."""


def take_served_snapshot(
    store: Store,
    names: Sequence[str],
    checkpoint: str,
    *,
    since: str | None = None,
    quiesced: Quiesced = contextlib.nullcontext,
    freeze_limit_s: float = control_client.ANSWER_S,
) -> list[ServedSnapshot]:
    """Have the process that serves the disks called `names` hold all of them at one moment, or none.

    The checkpoint is durable on return, and stays. With `since`, a checkpoint, only what changed since then is kept,
    and only that may be read. It is taken inside of `quiesced()`, which may freeze a guest; who does that gives
    `freeze_limit_s`. After that the request is given up with `Busy`. The checkpoint may still be made; its snapshot is
    released at once, but not by a server of an older version.

    Raises `NotFound` for a disk that is not served, `Busy` if not all are served by one process, `AlreadyExists` if a
    disk has a checkpoint of that name, `StorageError` if old data cannot be kept.
    """
    require_limits(freeze_limit_s)
    require_names(names)
    refuse_ours(checkpoint)
    if not names:
        raise InvalidArgument("a snapshot is of one disk or of several", next_step="name the disks")
    disks = [chain.disk_called(store, name) for name in names]
    made: list[ServedSnapshot] = []
    try:
        with (
            _server_of(store, disks[0]) as client,
            quiesced(),
            client,  # hung up before the thaw, which may take long
        ):
            client.renew(freeze_limit_s)
            told = client.call(
                "snapshot", disks=list(names), name=checkpoint, since=[since or ""] * len(names), bound=False,
                once=False, timeout_s=freeze_limit_s,
            )  # fmt: skip
            made += [_as_told(checkpoint, held) for held in told["snapshots"]]
    except BaseException:  # as by a signal during the thaw: nobody would release them
        for held in made:
            with contextlib.suppress(LmdbitmapError):
                release_served_snapshot(store, held.disk, checkpoint, uuid=held.uuid)
        raise
    return made


def _as_told(checkpoint: str, held: Mapping[str, Any]) -> ServedSnapshot:
    return ServedSnapshot(
        str(held["disk"]),
        checkpoint,
        UUID(held["uuid"]),
        int(held["time_ns"]),
        str(held["export"]),
        held.get("direct"),
    )


@contextlib.contextmanager
def open_served_snapshot(
    store: Store, held: ServedSnapshot, *, owner_limit_s: float = OWNER_LIMIT_S
) -> Iterator[BlockDevice]:
    """Open a snapshot that another process holds as a read-only device, until the block ends.

    It is read from the image itself if the server offers that, else through the server. What was read is of the
    snapshot only if `release_served_snapshot` then returns for its `uuid`. Raises `NotFound` if the disk is not served
    any more or has no such checkpoint, `Busy` if the server sends nothing for `owner_limit_s`, `OwnerGone` if it ends.
    Reading raises `OSError` too, as of a snapshot that broke.
    """
    require_limits(owner_limit_s)
    disk = chain.disk_called(store, held.disk)
    with store.read() as reader:
        checkpoint = chain.find_checkpoint(reader, disk, held.checkpoint)
    if checkpoint.uuid != held.uuid:
        raise _not_held(held.disk, held.checkpoint)
    with _server_of(store, disk, next_step=_ENDED) as client:
        there = HeldThere(disk, checkpoint, held.export, held.direct)
        [device] = open_held(client, [there], owner_limit_s)
        with contextlib.closing(device):
            yield device


def release_served_snapshot(store: Store, name: str, checkpoint: str, *, uuid: UUID | None = None) -> int:
    """Release the snapshot of the disk called `name`. Return the bytes of old data that had been kept.

    The checkpoint stays. With `uuid`, its checkpoint's, no other snapshot of that name is taken for it. Raises
    `StorageError` if not all old data was kept: then what was read is unusable. Raises `NotFound` without such a
    snapshot, or if the disk is not served, and `Busy` if its owner does not answer.
    """
    disk = chain.disk_called(store, name)
    which: dict[str, Any] = {"disk": name, "checkpoint": checkpoint} | (
        {} if uuid is None else {"uuid": str(uuid)}
    )
    with _server_of(store, disk, next_step=_ENDED) as client:
        told = client.call("release", **which)
    if told["broken"] is not None:
        raise broken_error(disk, str(told["broken"]))
    return int(told["kept_bytes"])


def _not_held(name: str, checkpoint: str) -> NotFound:
    return NotFound(
        f"checkpoint {checkpoint!r} of disk {name!r} was made anew since its snapshot was taken",
        next_step="take another snapshot",
    )


_NOT_NEEDED = "serve it first; a backup of a disk that is not served needs no snapshot"
_ENDED = (
    "a snapshot ends with its server: discard what was read of it, and take another once the disk is served"
)


def _server_of(store: Store, disk: Disk, next_step: str = _NOT_NEEDED) -> control_client.Client:
    """Connect to the process that serves a disk. Raise `NotFound` if none has it, `Busy` if one only owns it."""
    if not owners.is_attached(store, disk):
        raise NotFound(f"disk {disk.name!r} is not served", next_step=next_step)
    return owners.owner_of(store, disk)
