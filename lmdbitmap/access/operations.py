"""Operations on a disk, whoever owns it: the process that serves it does them, or we own the disk for a moment.

Who holds the owner's lock decides. If that changes between the look and the operation, the operation is refused as
`Busy`, and nothing has happened. All of them are durable on return, and safe for any thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lmdbitmap.access.owners import is_attached, owner_of, require_all_or_none, require_unowned
from lmdbitmap.access.questions import ask_owner
from lmdbitmap.access.routes import FREEZE_LIMIT_S, Quiesced
from lmdbitmap.errors import Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.notes.checkpoint_names import refuse_ours
from lmdbitmap.storage.schema import Bitmap, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain, session, standalone
from lmdbitmap.work.names import require_names


def require_possible(store: Store, names: Sequence[str], checkpoint_name: str, since: str = "") -> None:
    """Raise what is wrong with these names, before a guest is frozen for them. Who makes the checkpoint looks again.

    The disks have to have a checkpoint `since`, if one is given.
    """
    refuse_ours(checkpoint_name)
    with store.read() as reader:
        for disk in [chain.find_disk(reader, name) for name in names]:
            chain.require_new_name(reader, disk, checkpoint_name)
            if since:
                chain.find_checkpoint(reader, disk, since)


def checkpoint(
    store: Store,
    names: Sequence[str],
    checkpoint_name: str,
    *,
    quiesced: Quiesced = contextlib.nullcontext,
    freeze_limit_s: float = FREEZE_LIMIT_S,
) -> None:
    """Make one point in time on all of the disks, or on none, inside of `quiesced()`.

    Either one process serves all of them, and may take `freeze_limit_s`, or nobody owns any of them. Raises
    `AlreadyExists` for a name that is taken, `InvalidArgument` for one such as backups give, `NotFound`, `Busy`, and
    `StorageError` where an image cannot be flushed.
    """
    require_names(names)
    refuse_ours(checkpoint_name)
    disks = [chain.disk_called(store, name) for name in names]
    served = [disk.name for disk in disks if is_attached(store, disk)]
    require_all_or_none(names, served)
    if served:
        with owner_of(store, disks[0]) as client, quiesced():
            client.renew(freeze_limit_s)
            client.call("checkpoint", disks=list(names), name=checkpoint_name, timeout_s=freeze_limit_s)
    else:
        with _owned(store, names) as filters, quiesced():
            take_checkpoint(filters, checkpoint_name)


def forget(store: Store, name: str, checkpoint_name: str) -> None:
    """Forget a checkpoint; what changed since it counts from the one before. Raises `NotFound` and `Busy`."""
    disk = chain.disk_called(store, name)
    perform(
        store, disk, "forget", lambda attached: attached.forget(checkpoint_name), checkpoint=checkpoint_name
    )


def mark(store: Store, name: str, offset: int, length: int) -> None:
    """Mark every block dirty that the range of bytes touches.

    Raises `NotFound` without such a disk, `InvalidArgument` for a range outside of it, and `Busy` if its owner takes no
    orders.
    """
    disk = chain.disk_called(store, name)
    disk.geometry.check_range(offset, length)
    perform(store, disk, "mark", lambda attached: attached.mark(offset, length), offset=offset, length=length)


def perform(store: Store, disk: Disk, order: str, here: Callable[[Filter], object], **arguments: Any) -> None:
    """Give the disk's owner the `order` (docs/control.md), or own the disk for a moment and do it `here`."""
    if is_attached(store, disk):
        with owner_of(store, disk) as client:
            client.call(order, disk=disk.name, **arguments)
    else:
        with _owned(store, [disk.name]) as [attached]:
            here(attached)


def remove(store: Store, name: str) -> None:
    """Remove a disk or a stand-alone bitmap from the store. A disk's checkpoints go, and its image stays.

    A process that serves the disk lets go of it first.

    Raises `NotFound` without such a disk, and `Busy` where a client uses it, somebody reads it, or its owner takes no
    orders.
    """
    found = standalone.disk_or_bitmap_called(store, name)
    if isinstance(found, Bitmap):
        store.update(lambda writer: standalone.remove(writer, name))
        return
    if is_attached(store, found):
        with owner_of(store, found) as client:
            client.call("detach", disk=found.name)
    session.remove(store, name)


class Adopted(NamedTuple):
    """The result of `adopt`. `lost` is why it came too late: the next backup still reads the whole disk.

    If the disk `is_served`, nothing had to be done.
    """

    is_served: bool
    lost: str | None


def adopt(store: Store, name: str) -> Adopted:
    """Take an image as it is: a person vouches that it is what was tracked. Durable on return.

    The image of a served disk was compared when its owner attached it: `Untrusted` if that ended an epoch. Raises
    `Untrusted` too if bits were lost, for which nobody can vouch; `NotFound`, and `Busy` as an attach does.
    """
    disk = chain.disk_called(store, name)
    answer = ask_owner(store, disk)
    if answer is None:
        require_unowned(store, disk)
        return Adopted(False, _lost_before(store, session.adopt(store, name)))
    lost = answer["reason"] if answer["trust"] == Trust.UNTRUSTED.value else _lost_before(store, disk)
    if lost is not None:
        raise Untrusted(
            f"disk {name!r} cannot be adopted any more, as it is served: {lost}",
            next_step="make a backup, which reads the whole disk; next time adopt it before it is served",
        )
    return Adopted(True, None)


def _lost_before(store: Store, disk: Disk) -> str | None:
    with store.read() as reader:
        return chain.begun_anew(reader, disk)


@contextlib.contextmanager
def _owned(store: Store, names: Sequence[str]) -> Iterator[list[Filter]]:
    """Own all of the disks, or none, until the block ends. Nobody writes to them, so nothing is armed."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Filter.attach(store, name, background=False)) for name in names]
