"""The target of a sync: a file, a block device or an NBD export that becomes, and stays, a copy of a disk.

A missing file is made, and one that is the disk's copy follows the disk's size. A target without an earlier sync must
have that size: a wrong name should not cost a file. The size of a device or an export may be the disk's rounded up to a
sector. A `larger` target, if allowed, keeps its size. Everything behind the disk's end is zeroed, also if the disk has
shrunk since (target.py says why).

Refused, before anything is touched: a tracked image, a place inside a store or among backups, anything that the store
or the disk's image lies in, and the copy of another disk. The locks refuse what others have open (image_locks.py).

Above all the disk itself is refused, by whatever name: data read a moment ago would be written over what the guest has
written since. It is recognised by its file or device; by the kernel's word if a loop device, a partition or a volume is
made of it, or it of one; and if it is served, by its uuid, which our server sends with the export. Other programs'
routes to it are not recognised: an NBD client of the kernel (/dev/nbd0), another program's server that has the image
open.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from uuid import UUID

from lmdbitmap.errors import AlreadyExists, InvalidArgument, NotFound, os_errors_at
from lmdbitmap.geometry import ceil_div
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.identity import identity_to_keep
from lmdbitmap.images.image import is_far, is_same_image, open_image
from lmdbitmap.interfaces import ImageIdentity, TrackableDevice
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.notes import sync_note
from lmdbitmap.notes.sync_note import Sizes
from lmdbitmap.qcow2.layout import SECTOR
from lmdbitmap.repository.repository import refuse_beside_backups
from lmdbitmap.storage import creating
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.system import files, kernel
from lmdbitmap.system.marks import has_mark, put_new_mark
from lmdbitmap.targets.differences import Mender
from lmdbitmap.targets.target import Target, fits, is_made_of, leads_to, refuse_layers, unless_larger
from lmdbitmap.tracker.flushing import forgetting_unwritten


def refuse_target(store: Store, disk: Disk, place: str) -> None:
    """Raise the reason why `place` cannot be a copy of `disk`, as far as names tell."""
    with store.read() as reader:
        disks = list(reader.disks())
    tracked = next((other for other in disks if is_same_image(other.image, place)), None)
    if tracked is not None:
        own = "itself" if tracked.uuid == disk.uuid else "and is not to be written around its tracker"
        raise InvalidArgument(
            f"{place} is the image of disk {tracked.name!r}, {own}", next_step="name another target"
        )
    if not is_far(place) and not is_far(disk.image):
        _refuse_layers(disk, place)
    refuse_layers(store, place)
    _refuse_copies(store, {other.uuid: other.name for other in disks if other.uuid != disk.uuid}, place)
    if is_far(place):
        return
    creating.refuse_inside(place)
    refuse_beside_backups(place)
    for ground in (store.path, *(() if is_far(disk.image) else (disk.image,))):
        if kernel.is_so(kernel.is_kept_in, ground, place):
            raise InvalidArgument(
                f"{ground} lies on a file system inside {place}", next_step="name another target"
            )


def _refuse_layers(disk: Disk, place: str) -> None:
    """Raise `InvalidArgument` if one is made of the other, or lies on a file system in it."""
    ground = place if os.path.lexists(place) else os.path.dirname(place)
    if is_made_of(place, disk.image) or kernel.is_so(kernel.is_kept_in, ground, disk.image):
        raise InvalidArgument(
            f"a write to {place} would change disk {disk.name!r} itself, {disk.image}",
            next_step="name another target",
        )


def _refuse_copies(store: Store, others: dict[UUID, str], place: str) -> None:
    for path, note in sync_note.notes(store.path):
        name = others.get(UUID(sync_note.disk_of(os.path.basename(path))))
        if name is not None and note.is_of_a_copy and is_same_image(note.target, place):
            raise AlreadyExists(
                f"{place} is the synced copy of disk {name!r}",
                next_step=f"name another target, or remove {path} if that copy is to be given up",
            )


class SyncTarget:
    """An open target. `device` is None while its file has not been made."""

    def __init__(self, place: str, *, larger: bool = False) -> None:
        self.place = place
        self._may_be_larger = larger
        self.device: TrackableDevice | None = None
        if is_far(place) or os.path.lexists(place):
            self.device = open_image(place)
        elif not os.path.isdir(os.path.dirname(place)):
            raise NotFound(
                f"there is no folder {os.path.dirname(place)}", next_step="make it, or name another target"
            )

    def refuse_itself(self, disk: Disk) -> None:
        """Raise `InvalidArgument` if the export is the disk itself, as far as its server says."""
        if isinstance(self.device, NbdDevice) and self.device.export.is_of(disk.uuid):
            raise InvalidArgument(
                f"{self.place} is disk {disk.name!r} itself, as it is served", next_step="name another target"
            )

    @property
    def is_far(self) -> bool:
        return is_far(self.place)

    @property
    def is_file(self) -> bool:
        return isinstance(self.device, FileDevice) and not self.device.is_block_device

    @property
    def is_blank(self) -> bool:
        """Whether there is no file yet, or an empty one."""
        return self.device is None or (self.is_file and self.device.size == 0)

    def put_new_mark(self) -> str | None:
        """Mark the file as written by this sync, durable on return. None for other targets, and if it takes no mark."""
        fd = self._file_descriptor
        mark = None if fd is None else put_new_mark(fd)
        if fd is not None and self.device is not None:
            with os_errors_at(self.place), forgetting_unwritten(self.device):
                os.fsync(fd)  # fdatasync, as in a flush, leaves a mark in memory on ext4
        return mark

    def bears(self, mark: str) -> bool:
        """Return whether the file bears this mark: then no other sync has begun to write it since."""
        fd = self._file_descriptor
        return fd is not None and has_mark(fd, mark)

    @property
    def _file_descriptor(self) -> int | None:
        return self.device.fd if self.is_file and self.device is not None else None

    def identity(self) -> ImageIdentity | None:
        """Return the target's identity now; None for an export, which shows none, and for a file to be made."""
        if not isinstance(self.device, FileDevice):
            return None
        if self.device.is_block_device:
            self.flush()  # the kernel counts what has reached it
        with os_errors_at(self.place):
            return self.device.identity()

    def require_fit(self, size: int, *, is_copy: bool) -> None:
        """Raise `InvalidArgument` if the target neither has the disk's size nor can get it."""
        if self.is_blank or (self.is_file and is_copy):
            return
        assert self.device is not None
        found = self.device.size
        if self._has_its_size(size) or (not self.is_file and fits(found, size, larger=False)):
            return
        step = "name a new file, or one of that size" if self.is_file else "give it that size"
        raise InvalidArgument(
            f"{self.place} has {found} bytes, and the disk has {size}",
            next_step=unless_larger(step, found, size),
        )

    def _has_its_size(self, size: int) -> bool:
        """Return whether a disk of `size` fits without cutting or lengthening the target."""
        assert self.device is not None
        return self.device.size == size or (self._may_be_larger and self.device.size > size)

    @property
    def size(self) -> int:
        return 0 if self.device is None else self.device.size

    def bytes_behind(self, size: int, noted: Sizes | None) -> int:
        """Return how many bytes behind a disk of `size` may not be zero.

        Everything behind the disk was zero when `noted`, so then only the bytes that the disk had at that time count.
        """
        if self.device is None or self.device.size <= size or (self.is_file and not self._has_its_size(size)):
            return 0
        end = self.device.size
        if noted is not None and noted.target == end:
            end = min(end, max(noted.disk, ceil_div(size, SECTOR) * SECTOR))
        return end - size

    def needs_fitting(self, size: int, bytes_behind: int) -> bool:
        """Return whether `fit` has to write."""
        if self.device is None or (self.is_file and not self._has_its_size(size)):
            return True
        with os_errors_at(self.place):
            return bytes_behind > SECTOR or (bytes_behind > 0 and any(self.device.pread(bytes_behind, size)))

    def fit(self, size: int, bytes_behind: int, advance: Callable[[int], None]) -> None:
        """Make a missing file, of that size. Cut off what lies beyond it, or zero it where it is not zero."""
        device = self.device if self.device is not None else self._made()
        if self.is_file and not self._has_its_size(size):
            with os_errors_at(self.place):
                device.resize(size)
        elif bytes_behind:
            Mender(self.writable(is_fresh=False), advance).mend_zeroes(size, bytes_behind)

    def _made(self) -> TrackableDevice:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        with os_errors_at(self.place):
            os.close(os.open(self.place, flags, files.PRIVATE_MODE))
        files.fsync_folder(os.path.dirname(self.place))
        self.device = open_image(self.place)
        return self.device

    def writable(self, *, is_fresh: bool) -> Target:
        assert self.device is not None
        return Target(self.place, self.device, is_fresh=is_fresh)

    def flush(self) -> None:
        """Make what was written durable. What was not is dropped from memory, where a comparison would find it."""
        assert self.device is not None
        with os_errors_at(self.place), forgetting_unwritten(self.device):
            self.device.flush()

    def identity_to_keep(self) -> ImageIdentity | None:
        """Return the identity, now that the target is durable. Raise `NotFound` if its file lost its name meanwhile."""
        if not isinstance(self.device, FileDevice):
            return None
        if self.is_file and not leads_to(self.place, self.device.fd):
            raise NotFound(
                f"{self.place} was removed or replaced while it was written", next_step="sync again"
            )
        with os_errors_at(self.place):
            return identity_to_keep(self.device)

    def close(self) -> None:
        if self.device is not None:
            self.device.close()
