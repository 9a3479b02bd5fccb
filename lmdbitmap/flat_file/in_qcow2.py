"""A bitmap in a qcow2 image, where QEMU keeps its own: read as a flat file is, and written in its place.

The image says nothing of checkpoints, epochs or whether a bitmap is a superset, as ours can be and QEMU's after a merge
of coarser blocks. So what is read is taken for one: subtracting it could hide changes. What is written holds no data:
QEMU's programs serve it (`qemu-nbd --read-only --bitmap`), or merge it into another one (`qemu-img bitmap --merge`).
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, NotFound, os_errors_at
from lmdbitmap.flat_file.flatfile import FlatFile, NewFlatFile
from lmdbitmap.format import NO_UUID, BitsTally, Flags, FlatHeader, Zeroes
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2.bitmaps import REPAIR, BitmapWriter, StoredBitmap, bits_of, geometry_of, stored_bitmaps
from lmdbitmap.qcow2.layout import MAGIC
from lmdbitmap.qcow2.reader import Qcow2Reader
from lmdbitmap.system import atomic_files, files

_BITMAPS_OF_QEMU = uuid.UUID("5b1c3a0e-8f52-4c39-9d6b-7f6f6e4d2a11")
"""The namespace of their uuids: in an image they have none."""
_NAMES_TOLD = 16
"""An image may have 65535 names of 1023 bytes."""

# -- in ----------------------------------------------------------------------------------------------------


def is_image(path: str | os.PathLike[str]) -> bool:
    return files.first_bytes(os.fspath(path), len(MAGIC), of_devices=True) == MAGIC


def header_of(path: str | os.PathLike[str], name: str | None) -> FlatHeader:
    """Return the header of a flat file that would hold the image's bitmap called `name`, before its bits are read.

    Without a name it is the only bitmap. Raises `NotFound`, `FormatError`, `Untrusted`, and `Busy` while a guest runs
    on the image.
    """
    with _opened(os.fspath(path), name) as (_, image, bitmap):
        return _header(image, bitmap)


def flat_copy(path: str | os.PathLike[str], name: str | None, folder: str, *, all_dirty: bool) -> FlatFile:
    """Return the bitmap as a flat file of `folder` that has no name. Raises as `header_of` does.

    With `all_dirty` nobody wants its bits: the file is not CLEAN.
    """
    place = os.fspath(path)
    with _opened(place, name) as (device, image, bitmap), os_errors_at(folder):
        fd = files.open_nameless(folder)
        try:
            with open(fd, "r+b", closefd=False) as file:
                new = NewFlatFile(file, _header(image, bitmap), {"bitmap": bitmap.name})
                if not all_dirty:
                    for offset, dirty in _read(device, image, bitmap):
                        new.put(offset, dirty)
                    new.seal()
            return FlatFile(place, fd)
        except BaseException:
            os.close(fd)
            raise


def _read(device: FileDevice, image: Qcow2Reader, bitmap: StoredBitmap) -> Iterator[tuple[int, bytes]]:
    """Yield its bits, as `bits_of` does. Raise `Busy` at the end if they may not be of one moment.

    QEMU takes no locks where it is told not to, or where the file system has none. A guest that ends there meanwhile
    has its bitmap stored elsewhere in the image, and its data may lie where the bits were.
    """
    with os_errors_at(device.path):
        before = device.identity()
        yield from bits_of(image, device, bitmap)
        if device.identity() != before or bitmap not in _stored_now(device, image.name):
            raise Busy(f"{image.name} was written while it was read", next_step="stop its guest first")


def _stored_now(device: FileDevice, place: str) -> list[StoredBitmap]:
    return stored_bitmaps(_image(device, place), device)


@contextlib.contextmanager
def _opened(place: str, name: str | None) -> Iterator[tuple[FileDevice, Qcow2Reader, StoredBitmap]]:
    """Open the image with QEMU's locks: nobody writes to it in the block."""
    with contextlib.closing(FileDevice.open(place, read_only=True)) as device, os_errors_at(place):
        image = _image(device, place)
        yield device, image, _chosen(place, stored_bitmaps(image, device), name)


def _image(device: FileDevice, place: str) -> Qcow2Reader:
    return Qcow2Reader(device, name=place, repair=REPAIR)


def _chosen(place: str, stored: Sequence[StoredBitmap], name: str | None) -> StoredBitmap:
    found = [bitmap for bitmap in stored if name in (None, bitmap.name)]
    more = f" and {len(stored) - _NAMES_TOLD} more" if len(stored) > _NAMES_TOLD else ""
    names = (", ".join(repr(bitmap.name) for bitmap in stored[:_NAMES_TOLD]) or "none") + more
    if not found:
        wanted = "bitmap" if name is None else f"bitmap {name!r}"
        raise NotFound(f"{place} has no {wanted}", next_step=f"name one that it has: {names}")
    if len(found) > 1:
        raise InvalidArgument(f"{place} has several bitmaps: {names}", next_step="name one of them")
    return found[0]


def _header(image: Qcow2Reader, bitmap: StoredBitmap) -> FlatHeader:
    geometry = geometry_of(image, bitmap)
    identity = f"{bitmap.name}/{geometry.size}/{geometry.granularity_bits}"
    return FlatHeader(
        disk_size=geometry.size,
        granularity_bits=geometry.granularity_bits,
        bitmap_uuid=uuid.uuid5(_BITMAPS_OF_QEMU, identity),
        disk_uuid=NO_UUID,
        epoch_uuid=NO_UUID,
        since_uuid=NO_UUID,
        until_uuid=None,
        since_time_ns=0,
        flags=Flags.SUPERSET,
    )


# -- out ---------------------------------------------------------------------------------------------------


class NewImage:
    """An image being written that holds one bitmap, as `NewFlatFile` is used."""

    def __init__(self, file: BinaryIO, place: str, header: FlatHeader, name: str) -> None:
        self.header = header.unsealed()
        self._tally = BitsTally(header.bit_count)
        self._writer = BitmapWriter(_Sink(file, place), header.geometry, name)

    def put(self, offset: int, dirty: Buffer) -> None:
        self._tally.add(Zeroes(offset - self._tally.size))
        self._tally.add(dirty)
        self._writer.put(offset, dirty)

    def note_superset(self) -> None:
        self.header = replace(self.header, flags=self.header.flags | Flags.SUPERSET)

    def seal(self) -> None:
        self._tally.add(Zeroes(self.header.bits_size - self._tally.size))
        self.header = self.header.sealed(self._tally)
        self._writer.finish()


class _Sink:
    """A file under a temporary name, whose errors name the place that it is for."""

    def __init__(self, file: BinaryIO, place: str) -> None:
        self._fd = file.fileno()
        self._place = place

    def pwrite(self, data: Buffer, offset: int) -> None:
        with os_errors_at(self._place):
            files.pwrite_whole(self._fd, data, offset)


@contextlib.contextmanager
def writing_image(path: str | os.PathLike[str], header: FlatHeader, name: str) -> Iterator[NewImage]:
    """Yield a new image for `path`, durable if the block does not raise; if it raises, nothing has changed.

    Raises `FormatError` if `path` has a file with anything in it: an image is a guest's data.
    """
    place = os.fspath(path)
    if files.first_bytes(place, 1):
        raise FormatError(
            place,
            expected="an empty file or none",
            found="a file with something in it",
            next_step="name a new file",
        )
    with atomic_files.replacing(place) as file:
        new = NewImage(file, place, header, name)
        yield new
        new.seal()
