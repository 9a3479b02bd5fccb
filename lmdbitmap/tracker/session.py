"""Owning a disk: to begin a session, to adopt an image, to add, relocate or remove a disk.

An owner holds two locks, taken in this order and released when the block ends: the owner's lock on the disk (owner.py),
and QEMU's locks on the image (images/device.py). The image is judged under both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from uuid import UUID, uuid4

from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    InvalidArgument,
    NotFound,
    StorageError,
    Untrusted,
)
from lmdbitmap.images.identity import identity_to_keep, settled_identity
from lmdbitmap.images.image import is_far, is_same_image, lasting_name, open_image
from lmdbitmap.interfaces import ImageIdentity, TrackableDevice
from lmdbitmap.notes.copies import given_up
from lmdbitmap.notes.holds import remove_holds
from lmdbitmap.notes.sync_note import remove_notes
from lmdbitmap.storage import owner, owner_file, schema
from lmdbitmap.storage.owner import Owner
from lmdbitmap.storage.owner_name import OWNED_TWICE
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Reader, Store, Writer
from lmdbitmap.system import kernel
from lmdbitmap.system.file_names import UNFINISHED_FORM, UUID_FORM
from lmdbitmap.tracker import chain, continuity
from lmdbitmap.tracker.continuity import Moment, Verdict
from lmdbitmap.tracker.flushing import forget_unwritten, unflushed
from lmdbitmap.work import forks

OpenDevice = Callable[[str], TrackableDevice]
_OWNER_FILE = re.compile(rf"({UUID_FORM})(?:{UNFINISHED_FORM})?")
"""Matches the name of an owner's file, also an unfinished one."""


class OwnedDisk:
    """A disk whose locks are held until the block of `owning` ends, or for good after `keep`."""

    def __init__(self, disk: Disk, owner: Owner, device: TrackableDevice) -> None:
        self.disk = disk
        self.owner = owner
        self.device = device
        self.kept = False
        forks.is_not_for_children(self)

    def keep(self) -> None:
        """Leave `device` and `owner` to a new holder, which closes them."""
        self.kept = True

    def close(self) -> None:
        try:
            self.device.close()
        finally:  # a network file system may report an error
            self.owner.close()

    def forsake(self) -> None:
        """Close the image in a forked child, which would keep its locks; the owner's lock sees to itself."""
        if not self.kept and self.device.fd is not None:  # closing a connection would end the parent's too
            self.device.close()


@contextlib.contextmanager
def owning(store: Store, name: str, open_device: OpenDevice = open_image) -> Iterator[OwnedDisk]:
    """Hold the disk called `name`. Raises `NotFound` without such a disk or image, `Busy` if it is owned."""
    disk_uuid = chain.disk_called(store, name).uuid
    lock = _own(store, name, disk_uuid)
    try:
        with store.read() as reader:
            disk = existing(reader, disk_uuid)
        owned = OwnedDisk(disk, lock, _opened(store, disk, open_device))
    except BaseException:
        lock.close()
        raise
    try:
        yield owned
    finally:
        if not owned.kept:
            owned.close()


def _opened(store: Store, disk: Disk, open_device: OpenDevice) -> TrackableDevice:
    refuse_own_ground(store, disk.image)
    try:
        return open_device(disk.image)
    except NotFound as error:
        if is_far(disk.image):
            raise
        raise NotFound(
            f"the image of disk {disk.name!r}, {disk.image}, does not exist any more",
            next_step=f"say where it went (`lmdbitmap relocate {disk.name} IMAGE`), or put it back;"
            f" `lmdbitmap rm {disk.name}` if it is gone for good",
        ) from error


def look_at(store: Store, disk: Disk) -> ImageIdentity:
    """Return the present identity of a disk's image, owned or not. Raises as `owning` if it cannot be opened."""
    with contextlib.closing(_opened(store, disk, _open_to_look)) as device:
        return device.identity()


def _open_to_look(image: str) -> TrackableDevice:
    return open_image(image, read_only=True, share_writes=True)


def refuse_own_ground(store: Store, image: str) -> None:
    """Raise `InvalidArgument` for an image on which the store itself lies."""
    if kernel.is_so(kernel.is_kept_in, store.path, image):
        raise InvalidArgument(
            f"the store {store.path} lies on a file system inside {image}: each commit would write to the image,"
            " and each write to the image needs a commit",
            next_step="keep the store on another disk (--store)",
        )


def begin(store: Store, owned: OwnedDisk) -> Disk:
    """Judge continuity, and commit the session, with a new epoch if need be.

    The caller beats only after this. A beat before the commit could, after a crash between the two, vouch for an image
    that was just found to be written by another program.
    """
    _flush_block_device(owned)
    return _resume(store, owned, settled_identity(owned.device), session=uuid4())


def reconcile(store: Store, owned: OwnedDisk) -> Disk:
    """Do `begin` without leaving a session open, for a caller that holds a disk only to read it.

    Nothing is written while it is owned, so a death costs nothing, even in deferred mode. The image is flushed first,
    as at a detach: what the identity vouches for must survive a power cut.
    """
    _flush(owned)
    disk = _resume(store, owned, identity_to_keep(owned.device), session=None)
    _leave_sign_of_life(owned, disk)
    return disk


def _keep_description(owned: OwnedDisk, disk: Disk) -> None:
    """Keep the description in the owner's file, from which a damaged store is made again."""
    owned.owner.keep_description(schema.encode(schema.portrait(disk)))


def _leave_sign_of_life(owned: OwnedDisk, disk: Disk) -> None:
    """Leave a sign of life as a session does: only that tells some facts of the image (see `continuity.judge`).

    It must say nothing of the next session, so it is of another one.
    """
    assert disk.identity is not None
    change = disk.identity.last_change
    owned.owner.beat(time.time_ns(), *change, awake_ns=owner.awake_ns(), session=uuid4(), durable=True)
    if owned.owner.was_owned_twice:
        raise Busy(f"disk {disk.name!r}: {OWNED_TWICE}", next_step="try again")


def _flush_block_device(owned: OwnedDisk) -> None:
    """Flush a block device: the kernel counts only writes that have reached it."""
    if owned.device.identity().is_block_device:
        _flush(owned)


def _flush(owned: OwnedDisk) -> None:
    try:
        owned.device.flush()
    except OSError as error:
        raise _cannot_vouch(owned, error) from error


def _cannot_vouch(owned: OwnedDisk, error: OSError) -> StorageError:
    """Lose track after a failed flush: the last writes may be lost, and a second flush would not tell (flushing.py)."""
    forget_unwritten(owned.device)
    failure = unflushed(owned.disk.name, error)
    owned.owner.declare_distrust(failure.problem, time.time_ns())
    return failure


def _resume(store: Store, owned: OwnedDisk, identity: ImageIdentity, *, session: UUID | None) -> Disk:
    distrust = owned.owner.distrust()
    verdict = Verdict(broken=distrust.reason) if distrust else _judge(store, owned)

    def commit(writer: Writer) -> Disk:
        disk = existing(writer, owned.disk.uuid)
        if verdict.broken is not None:
            disk = chain.start_epoch(writer, disk, verdict.broken, time.time_ns())
        elif verdict.superset is not None:
            chain.note_superset(writer, disk, verdict.superset)
        if disk.size != identity.size:  # after the new epoch, for which nothing has to be marked
            disk = chain.resize(writer, disk, identity.size)
        disk = dataclasses.replace(disk, session=session, identity=identity, resizing_from=None)
        writer.put_disk(disk)
        return disk

    disk = store.update(commit)
    _keep_description(owned, disk)
    if distrust is not None:
        owned.owner.restore_trust()
    return disk


def require_untouched(owned: OwnedDisk, disk: Disk) -> None:
    """Refuse an image that was written despite our locks since `reconcile`: its copy is of no point in time."""
    if owned.device.identity().is_block_device:
        owned.device.flush()  # the kernel counts what has reached it
    if owned.device.identity() != disk.identity:
        raise Busy(
            f"{disk.image} was written by another program while it was backed up",
            next_step="stop that program and try again",
        )


def present(store: Store) -> Moment:
    """Return this moment, for `continuity.judge`. Take it last: what it is compared with goes on meanwhile."""
    mark = store.mark  # first: both clocks are read at the same moment
    return Moment(owner.boot_id(), owner.boot_time_ns(), time.time_ns(), mark, owner.awake_ns())


def _judge(store: Store, owned: OwnedDisk) -> Verdict:
    beat, image = owned.owner.last_beat(), owned.device.identity()
    return continuity.judge(owned.disk, image, beat, present(store))


def adopt(store: Store, name: str, *, open_device: OpenDevice = open_image) -> Disk:
    """Take the image's identity as it is: a person vouches that nobody changed it around the tracker.

    Nor with it, in a store of which this one is an older copy. Another size counts as a resize. Once an attach, a
    backup or a sync has begun a new epoch, it comes too late and does not say so. Durable on return. Raises `NotFound`
    without such a disk or image, `Busy` while the disk is owned, and `Untrusted` if bits were lost: nobody can vouch
    for those.
    """
    with owning(store, name, open_device) as owned:
        _require_bits(store, owned)
        _flush_block_device(owned)
        identity = identity_to_keep(owned.device)
        disk = store.update(lambda writer: _adopt(writer, owned.disk, identity))
        _keep_description(owned, disk)
        _leave_sign_of_life(owned, disk)
    return disk


def _require_bits(store: Store, owned: OwnedDisk) -> None:
    lost = why_not_adopted(store, owned.disk)
    if lost is not None:
        raise Untrusted(f"disk {owned.disk.name!r} cannot be adopted: {lost}", next_step="make a full backup")


def why_not_adopted(store: Store, disk: Disk) -> str | None:
    """Return why bits are missing that no image can show, so that nobody can vouch for the disk; None if none are."""
    path = store.owner_path(disk.uuid)
    if disk.session is not None and disk.durability == schema.DEFERRED:
        return "it was not closed cleanly, and in deferred mode the bits were in memory only"
    if disk.identity is None and disk.epoch_number > 1:
        return disk.epoch_reason
    beat = owner_file.last_beat(path)
    if beat is not None and store.mark.transaction < beat.store.transaction:
        # whoever knows that no stranger wrote knows nothing of what it lacks
        return continuity.STORE_PUT_BACK
    distrust = owner_file.distrust(path)
    return None if distrust is None else distrust.reason


def _adopt(writer: Writer, disk: Disk, identity: ImageIdentity) -> Disk:
    if disk.session is not None:
        chain.note_superset(writer, disk, continuity.OWNER_DIED)
    if disk.size != identity.size:
        disk = chain.resize(writer, disk, identity.size)
    disk = dataclasses.replace(disk, session=None, identity=identity, resizing_from=None)
    writer.put_disk(disk)
    return disk


def add(
    store: Store,
    name: str,
    image: str | os.PathLike[str],
    *,
    granularity_bits: int,
    durability: str = schema.WRITE_AHEAD,
    policy: str = schema.GUEST_FIRST,
    open_device: OpenDevice = open_image,
) -> Disk:
    """Track the image from now on; it is opened and locked for a moment. Everything is dirty at first.

    Durable on return. Raises `AlreadyExists` for a name or image that is taken, `Busy` for an image that is being
    written, `NotFound` without an image, `InvalidArgument` for a name, granularity, mode or image that can never work,
    `StorageError` where the system refuses.
    """
    place = lasting_name(os.fspath(image))
    refuse_own_ground(store, place)
    _refuse_tracked(store, place)
    with contextlib.closing(open_device(place)) as device, given_up(store, place, device):
        identity = device.identity()
        files_made: list[str] = []

        def change(writer: Writer) -> Disk:
            store.require_its_place()  # else the owners' files are another store's
            _sweep_owners(store, writer)
            disk = chain.add_disk(
                writer, name, place, identity,
                granularity_bits=granularity_bits, durability=durability, policy=policy, time_ns=time.time_ns(),
            )  # fmt: skip
            files_made.append(store.owner_path(disk.uuid))
            kept = schema.encode(schema.portrait(disk))
            # before the commit: no disk is ever without its owner's file
            owner_file.create(files_made[-1], description=kept)
            return disk

        try:
            return store.update(change)
        except BaseException:
            _remove_all(files_made)
            raise


def _remove_all(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _sweep_owners(store: Store, writer: Writer) -> None:
    """Remove what a death during an add or a removal left. No other process adds while we are the writer."""
    folder = os.path.dirname(store.owner_path(uuid4()))
    known = {str(disk.uuid) for disk in writer.disks()}
    named = {name: _OWNER_FILE.fullmatch(name) for name in os.listdir(folder)}
    _remove_all(
        os.path.join(folder, name)
        for name, match in named.items()
        if match is not None and match[1] not in known
    )


def _refuse_tracked(store: Store, image: str, *, unless: UUID | None = None) -> None:
    """Raise `AlreadyExists` if the image is a disk's, other than `unless`."""
    with store.read() as reader:
        disks = list(reader.disks())
    for other in disks:  # out of the view: hosts may have to be looked up, and a name server may hang
        if other.uuid != unless and is_same_image(other.image, image):
            raise AlreadyExists(
                f"{image} is tracked already, as {other.name!r}",
                next_step=f"use disk {other.name!r}, or name another image",
            )


def relocate(store: Store, name: str, image: str | os.PathLike[str]) -> Disk:
    """Set where the image of a disk is now. Durable on return.

    Raises `Busy` while the disk is owned, `NotFound` without such a disk or image, `AlreadyExists` if another disk has
    that image.

    The next attach or question judges by its identity whether it is the same image, as always: a file that was moved
    within its file system is. A copy is not, unless a person vouches for it (`adopt`).
    """
    place = lasting_name(os.fspath(image))
    disk = chain.disk_called(store, name)
    with contextlib.closing(_own(store, name, disk.uuid)) as lock:
        _refuse_tracked(store, place, unless=disk.uuid)
        refuse_own_ground(store, place)

        def change(writer: Writer) -> Disk:
            moved = dataclasses.replace(existing(writer, disk.uuid), image=place)
            writer.put_disk(moved)
            return moved

        with contextlib.closing(_open_to_look(place)) as device, given_up(store, place, device):
            moved = store.update(change)
        lock.keep_description(schema.encode(schema.portrait(moved)))
    return moved


def remove(store: Store, name: str) -> None:
    """Stop tracking. The image is neither touched nor needed. Raises `Busy` while the disk is owned."""
    disk = chain.disk_called(store, name)
    with contextlib.closing(_own(store, name, disk.uuid)):
        store.update(lambda writer: chain.remove_disk(writer, disk))
        _remove_all([store.owner_path(disk.uuid)])
        remove_notes(store.path, disk.uuid)
        remove_holds(store.path, disk.uuid)


def _own(store: Store, name: str, disk_uuid: UUID) -> Owner:
    try:
        lock = Owner(store.owner_path(disk_uuid), lambda: store.mark, store.is_in_place)
    except Busy as error:
        raise Busy(
            f"disk {name!r} is attached by another process, or by another part of this one",
            next_step="wait until it is detached, or stop the process that serves it",
        ) from error
    try:
        store.require_its_place()  # else the file that is locked is another store's
    except BaseException:
        lock.close()
        raise
    return lock


def existing(reader: Reader, disk_uuid: UUID) -> Disk:
    """Return the disk of that uuid. Raise `NotFound` if it was removed."""
    disk = reader.disk(disk_uuid)
    if disk is None:
        raise NotFound(
            f"disk {disk_uuid} was removed meanwhile", next_step="`lmdbitmap ls` lists those there are"
        )
    return disk
