"""The images of one backup, open for reading: the disk as it was at that backup, as a read-only block device.

The manifest alone says which images make up the backup, their lengths and their parents. The names in the images are
compared with it, and never followed. Tables are checked as they are read. With `verify` every byte of an image,
including its tables, is proven by the digest of its chunk before it is used (proof.py). An image without such digests
is listed in `unproven`; the caller has to prove it.

A chain may have more images than files can be open: at most half of what the system allows is used. Memory holds, for
each image, the entries of its first table that differ (at most 12 bytes for 512 MiB that it maps with clusters of 64
KiB, for 2 MiB with clusters of 4 KiB); for each reading thread, one second table of each image that has some (a
cluster); and with `verify` 34 bytes for each MiB of the images.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, NotFound, os_errors_at
from lmdbitmap.geometry import ceil_div, check_range
from lmdbitmap.images.device import DATA, HOLE
from lmdbitmap.images.file_pool import FilePool, PooledFile, half_of_what_may_be_open
from lmdbitmap.images.read_only import ReadOnlyDevice
from lmdbitmap.interfaces import Allocation, joined
from lmdbitmap.qcow2 import MappedRun, Qcow2Reader, ReadableFile, chain_extents
from lmdbitmap.qcow2.compression import require
from lmdbitmap.qcow2.layout import SECTOR
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry, chain_to, id_at
from lmdbitmap.repository.proof import ChunkProof, Whole, chunk_proof
from lmdbitmap.repository.repository import known_backups
from lmdbitmap.work.buffers import in_bytes, read_whole

_FROM_A_COPY = "get the file from a copy of the repository"


class Image(NamedTuple):
    """One file of the chain."""

    folder: BackupFolder
    entry: BackupEntry
    file: PooledFile
    reader: Qcow2Reader
    proof: ChunkProof | None = None
    """Proves it before it is read."""

    @property
    def whole(self) -> Whole:
        """The image as it is proven as a whole."""
        return Whole(self.folder, self.entry, self.file)


class BackupChain(ReadOnlyDevice):
    """A disk as it was at one backup: a `BlockDevice` that refuses changes. Make one with `opened`.

    Safe for many threads. A reader keeps the table that it read last, so each thread has readers of its own; the files
    and the first tables are shared.
    """

    def __init__(self, images: Sequence[Image], pool: FilePool) -> None:
        self._pool = pool
        self.images = images
        """Newest first, as a chain is read."""
        self.entry = images[0].entry
        self._threads = threading.local()
        self._closed = False

    @property
    def size(self) -> int:
        """The disk's own size, which may end inside the images' last sector."""
        return self.entry.disk_size

    def extents(self, offset: int, length: int) -> Iterator[MappedRun]:
        """Yield where each byte of the range is: stored in the file of `images[run.layer]`, or zero."""
        self._check(offset, length)
        return chain_extents(self._readers, offset, length) if length else iter(())

    @property
    def unproven(self) -> Sequence[Whole]:
        """The images that are read without proof."""
        return [image.whole for image in self.images if image.proof is None]

    @property
    def _readers(self) -> Sequence[Qcow2Reader]:
        """The calling thread's readers."""
        try:
            return self._threads.readers  # type: ignore[no-any-return]
        except AttributeError:
            self._threads.readers = [copy.copy(image.reader) for image in self.images]
            return self._threads.readers  # type: ignore[no-any-return]

    def _check(self, offset: int, length: int) -> None:
        check_range(offset, length, self.size)
        if self._closed:
            raise OSError(errno.EBADF, "the backup is closed")

    def pread(self, length: int, offset: int) -> bytes:
        self._check(offset, length)
        return read_whole(self.pread_into, length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        buffer = in_bytes(buffer)
        for run in self.extents(offset, len(buffer)):
            self.fill(buffer[run.offset - offset : run.end - offset], run)

    def fill(self, buffer: memoryview, run: MappedRun) -> None:
        """Fill `buffer` with the bytes of a run that `extents` yielded."""
        self._readers[run.layer].fill(buffer, run)

    def prove(self, run: MappedRun) -> None:
        """Return once the bytes of a run are proven, if their image can prove them; else raise `FormatError`."""
        proof = self.images[run.layer].proof
        if proof is not None and run.is_stored:
            proof.require(run.host_offset, run.host_length or run.length)

    def claim(self, run: MappedRun) -> bool:
        """Return whether the run has something to prove that no thread has claimed yet."""
        proof = self.images[run.layer].proof
        return (
            proof is not None
            and run.is_stored
            and proof.claim(run.host_offset, run.host_length or run.length)
        )

    def announce(self, run: MappedRun) -> None:
        """Ask the kernel to start reading the bytes of a run. Promises nothing."""
        if run.is_stored:
            with self.images[run.layer].file.reading() as device:
                device.will_need(run.host_offset, run.host_length or run.length)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        return joined(
            Allocation(run.length, *(DATA if run.is_stored else HOLE)) for run in self.extents(offset, length)
        )

    def _refuse(self, offset: int, length: int) -> None:
        self._check(offset, length)
        raise OSError(errno.EPERM, "a backup is read-only", self.images[0].file.path)

    def resize(self, size: int) -> None:
        raise InvalidArgument("a backup has the size that it has", next_step="resize what it is restored to")

    def flush(self) -> None:
        """Do nothing: nothing was written."""
        self._check(0, 0)

    def close(self) -> None:
        self._closed = True
        self._pool.close()


def entries_at(folder: BackupFolder, at: str | None = None) -> Sequence[BackupEntry]:
    """Return the chain of the backup that `at` names, or of the newest, the full one first; `NotFound` without it.

    `at` is an id, or a time, which means the newest backup not later (see `id_at`).
    """
    manifest = known_backups(folder)
    return chain_to(manifest, id_at(manifest, at))


@contextlib.contextmanager
def open_backup(
    repository_path: str | os.PathLike[str], name: str, at: str | None = None, *, verify: bool = True
) -> Iterator[BackupChain]:
    """Open the disk called `name` as it was at the backup that `at` names, as for a restore, or at the newest one.

    What is read is proven first, except images in `unproven`; `verify=False` leaves that out. A read raises
    `FormatError` for data that is not what was backed up, and `OSError` after the block.

    Raises `NotFound` without such a disk or backup, or the package that its digests need, and `FormatError` for a
    damaged manifest or image.
    """
    folder = BackupFolder(repository_path, name)
    with opened(folder, entries_at(folder, at), verify=verify) as chain:
        yield chain


@contextlib.contextmanager
def opened(
    folder: BackupFolder, entries: Sequence[BackupEntry], *, verify: bool = False
) -> Iterator[BackupChain]:
    """Open the chain of `entries`, the full one first. An image written to in the block is `Busy` (file_pool.py).

    Raises `NotFound` or `FormatError` if an image is not what the manifest says, `Busy` if the manifest has changed by
    now, and `NotFound` if a library is missing that decompresses an image, or with `verify` proves one.
    """
    with FilePool(half_of_what_may_be_open()) as pool:
        try:
            images = _opened_images(pool, folder, entries, verify)
        except (FormatError, NotFound):
            if not are_still(folder, entries):
                raise Busy(
                    f"{folder.path} was changed at this very moment, as by `prune`", next_step="try again"
                ) from None
            # by the names that a prune gave them just now
            images = _opened_images(pool, folder, entries, verify)
        yield BackupChain(images[::-1], pool)


def _opened_images(
    pool: FilePool, folder: BackupFolder, entries: Sequence[BackupEntry], verify: bool
) -> list[Image]:
    folder.check_images(entries)
    parents = [None, *(entry.file for entry in entries)]
    return [
        _opened_image(pool, folder, entry, parent, verify)
        for entry, parent in zip(entries, parents, strict=False)
    ]


def _opened_image(
    pool: FilePool, folder: BackupFolder, entry: BackupEntry, parent: str | None, verify: bool
) -> Image:
    file = PooledFile(pool, folder.image_path(entry.file))
    proof = chunk_proof(folder, entry, file) if verify else None
    reader = image_reader(NamedFile(file, proof), entry, parent, partial(folder.step_without, entry))
    require(reader.compression_type)
    return Image(folder, entry, file, reader, proof)


def are_still(folder: BackupFolder, entries: Sequence[BackupEntry]) -> bool:
    """Return whether the manifest still says of these backups what it said when they were read from it.

    If not, a prune removed or rewrote some of them, and what is wrong with their images may be right by now: a prune
    decides by the manifest before it touches any file. A manifest that is unreadable by now excuses nothing.
    """
    try:
        found = folder.manifest()
    except FormatError:
        return True
    known = {(entry.id, entry.digest) for entry in found.backups} if found else set()
    return {(entry.id, entry.digest) for entry in entries} <= known


class ImageSource(ReadableFile, Protocol):
    """An image's file, with the path for error messages."""

    path: str


class NamedFile:
    """A file whose errors name it: a chain has many. What is read is proven first, if there is a `proof`."""

    def __init__(self, file: PooledFile, proof: ChunkProof | None = None) -> None:
        self._file = file
        self._proof = proof
        self.path = file.path
        self.size = file.size

    def pread(self, length: int, offset: int) -> bytes:
        with os_errors_at(self.path):
            if self._proof is not None:
                self._proof.require(offset, length)
            return self._file.pread(length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        with os_errors_at(self.path):
            if self._proof is None:
                self._file.pread_into(buffer, offset)
            else:
                self._proof.fill(buffer, offset)


def image_reader(
    device: ImageSource,
    entry: BackupEntry,
    parent: str | None,
    next_step: Callable[[], str] = lambda: _FROM_A_COPY,
) -> Qcow2Reader:
    """Return the image's reader. Raise `FormatError` with this next step unless its header agrees with the manifest."""
    reader = Qcow2Reader(device, name=device.path)
    size = ceil_div(entry.disk_size, SECTOR) * SECTOR
    for what, expected, found in (
        ("image size", size, reader.size),
        ("backing file name", parent, reader.backing_file),
    ):
        if found != expected:
            raise FormatError(
                f"{device.path}: {what}", expected=str(expected), found=ascii(found), next_step=next_step()
            )
    return reader
