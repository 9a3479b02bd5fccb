"""The targets that a restore writes to, and what is refused before anything is touched.

| target | is opened | what it held before |
|---|---|---|
| a new file | as `*.partial`, renamed at the end | nothing: all of it reads as zeroes |
| a block device, an export of an NBD server | for writing | does not matter, or is compared |
| a file, in place | for writing | is compared |
| the image of a disk that is tracked, in place | by attaching the disk | is compared, and what changes becomes dirty |

A tracked image is written only through its tracker: else the backup after the restore would not know of it, or would
read the whole disk. A target has the disk's size, or that rounded up to a sector, or is `larger`, if the caller allows
that. Everything behind the disk's end is zeroed: a target reads as the disk would if it were made larger. Old bytes
there could be taken for the end of the new disk, as the second partition table, a RAID's or a pool's label is, or be
read by a guest that is not meant to.

What a target holds already, as from an interrupted run, is found right and not written again. A server may have that in
its memory alone, and lose it while we go on: our client repeats only its own writes to a server that comes back
(conversation.py). So an export is flushed before any of that is believed (`settle`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from lmdbitmap.errors import AlreadyExists, InvalidArgument, NotFound, StorageError, os_errors_at
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import ceil_div
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.image import is_far, is_same_image
from lmdbitmap.interfaces import Allocation, BlockDevice, FarAway
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.notes.copies import given_up
from lmdbitmap.qcow2.layout import SECTOR
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.repository import refuse_beside_backups
from lmdbitmap.storage import creating
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.system import atomic_files, kernel
from lmdbitmap.tracker.flushing import forgetting_unwritten
from lmdbitmap.tracker.lane import FilterLane, WritesTogether

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """An open target. For one thread, or for many if it has an `fd`. Its own errors name `place`."""

    place: str
    device: BlockDevice
    is_fresh: bool = False
    """Whether all of it still reads as zeroes."""
    fd: int | None = None
    """Descriptor that others may write to as well; None if each write has to be reported."""
    lane: FilterLane | None = None
    disk: str | None = None
    """The name of the disk that is tracked here."""

    @property
    def size(self) -> int:
        return self.device.size

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file, or a disk whose image is one."""
        device = self.device.device if isinstance(self.device, Filter) else self.device
        return isinstance(device, FileDevice) and not device.is_block_device

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        with self._refusals():
            self.device.pread_into(buffer, offset)

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> None:
        """Write all (offset, data) pairs, or raise."""
        with self._refusals():
            if self.lane is not None:
                for code in self.lane.write_many(writes).values():
                    raise OSError(code, os.strerror(code))
            elif isinstance(self.device, WritesTogether):
                for failure in self.device.pwrite_many(writes).values():
                    raise failure
            else:
                for offset, data in writes:
                    self.device.pwrite(data, offset)

    def write_zeroes(self, offset: int, length: int) -> None:
        with self._refusals():
            (self.lane or self.device).write_zeroes(offset, length)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        with self._refusals():
            yield from self.device.allocation(offset, length)

    def flush(self) -> None:
        """Make what was written durable. After a failure the kernel calls it clean, though it is in memory alone.

        It is dropped there, because the next restore in place would find it, and leave it so. The tracker of a tracked
        disk does the same by itself.
        """
        with self._refusals():
            if self.lane is not None:
                self.lane.flush()
            else:
                with forgetting_unwritten(self.device):
                    self.device.flush()

    def settle(self) -> None:
        """Make durable what an export holds already, before any of it is believed (see above). Else do nothing."""
        if is_far(self.place):
            self.flush()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            with os_errors_at(self.place):
                yield
        except StorageError as failure:
            if isinstance(failure.__cause__, FarAway):
                raise StorageError(
                    self.place,
                    failure.__cause__,
                    next_step="see why its server does not answer, and do it again",
                ) from failure
            raise


@contextlib.contextmanager
def opened_target(
    out: str,
    folder: BackupFolder,
    chain: BackupChain,
    *,
    in_place: bool,
    larger: bool = False,
    store: Store | None,
) -> Iterator[Target]:
    """Open what `out` names for the disk of `chain`. Flushed data is durable after the block.

    `out` is a path or an NBD URI; an existing target may be `larger` than the disk. `store` is asked whether it is the
    image of a tracked disk. Raises `AlreadyExists`, `NotFound` or `InvalidArgument` for a target that does not fit,
    `Busy` for one in use.
    """
    _refuse_sources(out, folder, chain)
    with _opening(out, chain.size, in_place, store) as target:
        if not fits(target.size, chain.size, larger=larger):
            raise _other_size(target, chain.size)
        target.settle()
        with given_up(store, out, target.device):
            yield target


def _opening(out: str, size: int, in_place: bool, store: Store | None) -> AbstractContextManager[Target]:
    tracked = None if store is None else _disk_at(store, out)
    if store is not None and tracked is not None:
        if in_place:
            return _tracked(store, tracked, out)
        if is_far(out) or os.path.exists(out):
            raise _is_tracked(out, tracked)
    if store is not None:
        refuse_layers(store, out)
    if is_far(out):
        return _far(out)
    creating.refuse_inside(out)
    if is_block_device(out):
        return _device(out)
    return _existing_file(out) if in_place else new_file(out, size, _is_not_empty(out))


# --- what is refused ---


def _refuse_sources(out: str, folder: BackupFolder, chain: BackupChain) -> None:
    """Raise `InvalidArgument` for a target that would destroy the backup, or be taken for one."""
    if is_far(out):
        return
    inside = os.path.join(os.path.realpath(folder.repository_path), "")
    if os.path.realpath(out).startswith(inside):
        raise InvalidArgument(
            f"{out} is inside of the repository {folder.repository_path}",
            next_step="name a place outside of it",
        )
    refuse_beside_backups(out)
    for image in chain.images:
        if is_same_image(image.file.path, out):
            raise InvalidArgument(
                f"{out} is the backup {image.file.path} itself", next_step="name another file"
            )
    if kernel.is_so(kernel.is_kept_in, folder.path, out):
        raise InvalidArgument(
            f"the repository {folder.repository_path} lies on a file system inside {out}",
            next_step="restore to another place, or from a copy of the repository that lies elsewhere",
        )


def _disk_at(store: Store, out: str) -> Disk | None:
    with store.read() as reader:
        disks = list(reader.disks())  # compared out of the view: a name server may hang
    return next((disk for disk in disks if is_same_image(disk.image, out)), None)


def refuse_tracked(store: Store, out: str) -> None:
    """Raise `AlreadyExists` if `out` is the image of a disk in `store`, for writers that bypass its tracker.

    Raises as `refuse_layers`, too.
    """
    tracked = _disk_at(store, out)
    if tracked is not None and (is_far(out) or os.path.exists(out)):
        step = f"write it elsewhere, or give the disk up before (`lmdbitmap rm {tracked.name}`)"
        raise _is_tracked(out, tracked, step)
    refuse_layers(store, out)


def refuse_layers(store: Store, out: str) -> None:
    """Raise `InvalidArgument` if a write to `out` would change a disk's image around its tracker.

    That is so if one is made of the other, as a loop device of a file.
    """
    with store.read() as reader:
        disk = next((disk for disk in reader.disks() if is_made_of(out, disk.image)), None)
    if disk is not None:
        raise InvalidArgument(
            f"a write to {out} would change disk {disk.name!r}, {disk.image}, and its tracker would not know",
            next_step="name another target",
        )


def is_made_of(one: str, other: str) -> bool:
    """Return whether one of two images is made of the other, so that a write to one is a write to the other."""
    return kernel.is_so(kernel.rests_on, one, other) or kernel.is_so(kernel.rests_on, other, one)


def _is_tracked(
    out: str,
    disk: Disk,
    next_step: str = "say --in-place, which goes through the tracker, or name a new file",
) -> AlreadyExists:
    return AlreadyExists(
        f"{out} is the image of disk {disk.name!r}, and its tracker would not know what was written to it",
        next_step=next_step,
    )


def fits(target_size: int, size: int, *, larger: bool) -> bool:
    """Return whether a disk of `size` may be written to that target; what is behind the disk has to be zeroed."""
    return target_size in (size, ceil_div(size, SECTOR) * SECTOR) or (larger and target_size > size)


def unless_larger(step: str, target_size: int, size: int) -> str:
    """Return the next step for a target that does not fit; for a larger one it mentions --larger."""
    if target_size < size:
        return step
    return f"{step}, or say --larger, which zeroes the {target_size - size} bytes behind the disk"


def _other_size(target: Target, size: int) -> InvalidArgument:
    if target.disk is not None:
        how = f" (truncate --size={size})" if target.is_file else ""
        step = f"give the image {size} bytes{how}, and then run `lmdbitmap adopt {target.disk}`"
    elif target.is_file:
        step = f"make it that long first (truncate --size={size}), or name a new file"
    else:
        step = "name one of that size, or a new file"
    step = unless_larger(step, target.size, size)
    return InvalidArgument(f"{target.place} has {target.size} bytes, and the disk had {size}", next_step=step)


def is_block_device(path: str) -> bool:
    with os_errors_at(path):
        return os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)


def _require_free(path: str, if_taken: AlreadyExists) -> None:
    if os.path.isdir(path):
        raise InvalidArgument(f"{path} is a folder", next_step="name a new file in it")
    if holds_something(path):
        raise if_taken


def holds_something(path: str) -> bool:
    return os.path.exists(path) and os.path.getsize(path) > 0


def _is_not_empty(path: str) -> AlreadyExists:
    return AlreadyExists(
        f"{path} exists, and is not empty",
        next_step="name a new file, remove that one, or say --in-place to write what differs into it",
    )


# --- what is opened ---


@contextlib.contextmanager
def _tracked(store: Store, disk: Disk, out: str) -> Iterator[Target]:
    """Attach the disk. It is detached at the end, also after a failure: what was written until then is dirty."""
    with Filter.attach(store, disk.name) as attached:
        if attached.disk.epoch != disk.epoch:
            log.warning(
                "disk %s: its next backup reads the whole disk: %s", disk.name, attached.disk.epoch_reason
            )
        yield Target(out, attached, lane=attached.lane(), disk=disk.name)


@contextlib.contextmanager
def _far(uri: str) -> Iterator[Target]:
    with NbdDevice.open(uri) as device:
        yield Target(uri, device)


@contextlib.contextmanager
def _device(path: str) -> Iterator[Target]:
    with FileDevice.open(path) as device:
        yield Target(path, device, fd=device.fd)


@contextlib.contextmanager
def _existing_file(path: str) -> Iterator[Target]:
    if not os.path.exists(path):
        raise NotFound(f"{path} does not exist", next_step="leave out --in-place to make it")
    with FileDevice.open(path) as device:
        yield Target(path, device)
        if not leads_to(path, device.fd):
            raise NotFound(f"{path} was removed or replaced while it was written", next_step="restore again")


@contextlib.contextmanager
def new_file(path: str, size: int, if_taken: AlreadyExists) -> Iterator[Target]:
    """Make a file of zeroes, which gets its name at the end. Raise `if_taken` if something is there."""
    _require_free(path, if_taken)
    with _taken_away_on_failure(path) as watched, atomic_files.replacing(path) as file:
        watched(file.fileno())
        with os_errors_at(path):
            os.ftruncate(file.fileno(), size)
        device = FileDevice(path, file.fileno(), read_only=False)
        yield Target(path, device, is_fresh=True, fd=device.fd)
        _require_free(path, if_taken)  # again: a restore may take hours


@contextlib.contextmanager
def _taken_away_on_failure(path: str) -> Iterator[Callable[[int], None]]:
    """On failure remove a file that got its name, but perhaps not durably: it must not hinder the next restore.

    Only the file whose descriptor is given to the yielded function is removed. It is held open, so that no other file
    can have its number.
    """
    with contextlib.ExitStack() as held:
        fds: list[int] = []

        def watch(fd: int) -> None:
            with os_errors_at(path):
                fds.append(os.dup(fd))
            held.callback(os.close, fds[-1])

        try:
            yield watch
        except BaseException:
            with contextlib.suppress(OSError):
                if fds and leads_to(path, fds[0]):
                    os.unlink(path)
            raise


def leads_to(path: str, fd: int | None) -> bool:
    """Return whether a path is the name of an open file."""
    try:
        return fd is not None and os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError as gone:
        if gone.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EBADF):
            raise
        return False
