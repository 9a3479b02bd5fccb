"""Bitmaps in an image, where QEMU keeps its persistent dirty bitmaps: the specification's "Bitmaps extension".

    header extension | directory: an entry for each bitmap | its table: an entry for each cluster of bits | bits

A table's entry is where a cluster of bits is, or 0 if all of these are clean, or 1 if all are dirty. Bits are stored as
in a flat file (format.py): the lowest bit of a byte first.

A bitmap says what changed only if it is not IN_USE, as it is from when a program opens it to write until it is stored
anew, and if the header says that no program without knowledge of bitmaps has written to the image since.
"""

from __future__ import annotations

import enum
import struct
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from lmdbitmap import bits
from lmdbitmap.errors import FormatError, InvalidArgument, Untrusted
from lmdbitmap.geometry import MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS, Geometry, ceil_div
from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2.layout import (
    BITMAPS_CONSISTENT,
    DEFAULT_CLUSTER_BITS,
    EXTENSION_BITMAPS,
    OFFSET_MASK,
    at_least,
    decode_entries,
    encode_entries,
    is_text,
)
from lmdbitmap.qcow2.reader import Qcow2Reader, ReadableFile
from lmdbitmap.qcow2.writer import Qcow2Writer, WritableFile

MAX_BITS_BYTES: Final = 512 << 20
"""QEMU reads no bitmap with more."""
_MAX_BITMAPS: Final = 65535
_MAX_NAME_BYTES: Final = 1023
_DIRTY_TRACKING: Final = 1
_ALL_DIRTY: Final = 1
_TABLE_RESERVED: Final = 0xFF000000000001FE
_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
REPAIR: Final = "look at it with qemu-img check, or make a full backup"


class BitmapFlags(enum.IntFlag):
    IN_USE = 1
    """A program has it open to write to it, or died while it had."""
    AUTO = 2
    """It records what a guest writes."""


class StoredBitmap(NamedTuple):
    """A directory entry, as it stands there: `bits_of` says whether it can be believed."""

    name: str
    granularity_bits: int
    flags: int
    kind: int
    table_offset: int
    table_entries: int
    extra_bytes: int
    """Data of a later specification, which may give its bits another meaning."""

    @property
    def in_use(self) -> bool:
        return bool(self.flags & BitmapFlags.IN_USE)


def stored_bitmaps(image: Qcow2Reader, source: ReadableFile) -> list[StoredBitmap]:
    """Return the bitmaps of an image in `source`. Raises `FormatError`, and `Untrusted` if they are out of date."""
    extension = image.extension(EXTENSION_BITMAPS)
    if extension is None:
        return []
    if not image.header.autoclear_features & BITMAPS_CONSISTENT:
        raise Untrusted(
            f"{image.name}: a program that knows nothing of its bitmaps has written to it",
            next_step="make a full backup; qemu-img check -r leaks gives their room back",
        )
    place = "bitmaps extension"
    _require(image, len(extension) == _EXTENSION.size, place, f"{_EXTENSION.size} bytes", len(extension))
    count, reserved, size, offset = _EXTENSION.unpack(extension)
    _require(image, 0 < count <= _MAX_BITMAPS, f"{place}, nb_bitmaps", f"1 to {_MAX_BITMAPS}", count)
    _require(image, reserved == 0, f"{place}, reserved", "0", reserved)
    _require_place(image, source, f"{place}, bitmap_directory_offset", offset, size)
    stored = list(_entries(image, source, count, offset, offset + size))
    names = len({bitmap.name for bitmap in stored})
    _require(image, names == count, "bitmap directory, names", "each of another name", f"{names} of {count}")
    return stored


def bits_of(image: Qcow2Reader, source: ReadableFile, bitmap: StoredBitmap) -> Iterator[tuple[int, bytes]]:
    """Yield the bits that are not all clean: where they begin, in bytes of a flat file's bits, and they themselves.

    Bits past the disk's end are clean, whatever the image says of them. Raises `FormatError` for what no QEMU wrote,
    and `Untrusted` for a bitmap that is in use.
    """
    geometry = geometry_of(image, bitmap)
    if bitmap.in_use:
        raise Untrusted(
            f"{image.name}: bitmap {bitmap.name!r} was not stored when its program ended, or is in use",
            next_step="stop the guest first; if it is not running, make a full backup",
        )
    size = ceil_div(geometry.block_count, 8)
    table = _table(image, source, bitmap, ceil_div(size, image.cluster_size))
    for index, entry in enumerate(table):
        start = index * image.cluster_size
        dirty = _cluster(image, source, bitmap, entry, min(image.cluster_size, size - start))
        if dirty is not None:
            if start + len(dirty) == size:
                bits.truncate(dirty, geometry.block_count - 8 * start)
            yield start, bytes(dirty)


def geometry_of(image: Qcow2Reader, bitmap: StoredBitmap) -> Geometry:
    """Return the geometry of its bits, if it is a bitmap of a kind that is known here; else raise `FormatError`."""
    place = f"bitmap {bitmap.name!r}"
    _require(image, bitmap.kind == _DIRTY_TRACKING, f"{place}, type", "1 (dirty tracking)", bitmap.kind)
    known = int(BitmapFlags.IN_USE | BitmapFlags.AUTO)
    _require(
        image, not bitmap.flags & ~known, f"{place}, flags", "only in_use and auto", f"{bitmap.flags:#x}"
    )
    _require(image, not bitmap.extra_bytes, f"{place}, extra_data_size", "0", bitmap.extra_bytes)
    fits = MIN_GRANULARITY_BITS <= bitmap.granularity_bits <= MAX_GRANULARITY_BITS
    expected = f"{MIN_GRANULARITY_BITS} to {MAX_GRANULARITY_BITS}"
    _require(image, fits, f"{place}, granularity_bits", expected, bitmap.granularity_bits)
    geometry = Geometry(image.size, bitmap.granularity_bits)
    size = ceil_div(geometry.block_count, 8)
    _require(image, size <= MAX_BITS_BYTES, f"{place}, bits", f"at most {MAX_BITS_BYTES} bytes", size)
    return geometry


def _entries(
    image: Qcow2Reader, source: ReadableFile, count: int, position: int, end: int
) -> Iterator[StoredBitmap]:
    for number in range(count):
        place = f"bitmap directory, entry {number}"
        _require(image, position + _ENTRY.size <= end, place, f"{_ENTRY.size} bytes", end - position)
        entry = _ENTRY.unpack(source.pread(_ENTRY.size, position))
        table_offset, table_entries, flags, kind, granularity_bits, name_bytes, extra_bytes = entry
        name_at = position + _ENTRY.size + extra_bytes
        fits = 0 < name_bytes <= _MAX_NAME_BYTES and name_at + name_bytes <= end
        _require(image, fits, f"{place}, name_size", f"1 to {_MAX_NAME_BYTES}, in the directory", name_bytes)
        name = source.pread(name_bytes, name_at)
        _require(image, is_text(name), f"{place}, name", "UTF-8 without a zero byte", repr(name[:80]))
        yield StoredBitmap(
            name.decode(), granularity_bits, flags, kind, table_offset, table_entries, extra_bytes
        )
        position += ceil_div(_ENTRY.size + extra_bytes + name_bytes, 8) * 8
    _require(image, position == end, "bitmap directory", f"{count} entries", "another length than theirs")


def _table(image: Qcow2Reader, source: ReadableFile, bitmap: StoredBitmap, needed: int) -> array[int]:
    place = f"table of bitmap {bitmap.name!r}"
    found = bitmap.table_entries
    _require(image, found == max(needed, 1), place, f"{max(needed, 1)} entries", found)
    _require_place(image, source, place, bitmap.table_offset, 8 * found)
    return decode_entries(source.pread(8 * needed, bitmap.table_offset))


def _cluster(
    image: Qcow2Reader, source: ReadableFile, bitmap: StoredBitmap, entry: int, size: int
) -> bytearray | None:
    """Return `size` bytes of bits; None if all of them are clean."""
    place = f"table of bitmap {bitmap.name!r}"
    offset, mark = entry & OFFSET_MASK, entry & _ALL_DIRTY
    fits = not entry & _TABLE_RESERVED and not (offset and mark)
    _require(image, fits, place, "an offset, 1 or 0", f"{entry:#x}")
    if not offset:
        return bytearray(b"\xff") * size if mark else None
    _require_place(image, source, place, offset, size)
    return bytearray(source.pread(size, offset))


def _require_place(image: Qcow2Reader, source: ReadableFile, place: str, offset: int, size: int) -> None:
    fits = offset and offset % image.cluster_size == 0 and offset + size <= source.size
    _require(image, bool(fits), place, f"{size} bytes from a cluster of the file on", f"{offset:#x}")


def _require(image: Qcow2Reader, truth: bool, place: str, expected: str, found: object) -> None:
    if not truth:
        raise FormatError(f"{image.name}: {place}", expected=expected, found=found, next_step=REPAIR)


class BitmapWriter:
    """Writes an image without data that has one bitmap, of a disk with that geometry, into an empty `sink`.

    `put` what is dirty in ascending order; everything else is clean. The bitmap does not record, as what it says is of
    the past.
    """

    def __init__(self, sink: WritableFile, geometry: Geometry, name: str) -> None:
        self._name = name.encode(errors="surrogatepass")
        self._size = ceil_div(geometry.block_count, 8)
        self._require_expressible(name)
        self._geometry = geometry
        cluster_bits = at_least(DEFAULT_CLUSTER_BITS, geometry.size)
        self._image = Qcow2Writer(sink, size=geometry.size, cluster_bits=cluster_bits)
        self._table = array("Q", bytes(8 * ceil_div(self._size, self._image.cluster_size)))
        self._index = 0
        self._cluster = bytearray(self._image.cluster_size)

    def _require_expressible(self, name: str) -> None:
        if not 0 < self._size <= MAX_BITS_BYTES or not 0 < len(self._name) <= _MAX_NAME_BYTES:
            raise InvalidArgument(
                f"{name!r} has a bitmap of {self._size} bytes; QEMU reads 1 to {MAX_BITS_BYTES}, and names of 1"
                f" to {_MAX_NAME_BYTES} bytes",
                next_step="export it as a flat file",
            )

    def put(self, offset: int, dirty: Buffer) -> None:
        """Take `dirty` for the bits from byte `offset` on; what is past the disk's last bit is zero."""
        rest = memoryview(dirty)[: max(self._size - offset, 0)]
        while rest:
            index, start = divmod(offset, self._image.cluster_size)
            self._turn_to(index)
            part = rest[: self._image.cluster_size - start]
            self._cluster[start : start + len(part)] = part
            offset, rest = offset + len(part), rest[len(part) :]

    def finish(self) -> None:
        """Write the rest of the image; the header comes last."""
        self._turn_to(-1)
        table_offset = self._image.append(encode_entries(self._table))
        kind = (_DIRTY_TRACKING, self._geometry.granularity_bits)
        entry = _ENTRY.pack(table_offset, len(self._table), 0, *kind, len(self._name), 0) + self._name
        directory = entry.ljust(ceil_div(len(entry), 8) * 8, b"\0")
        extension = _EXTENSION.pack(1, 0, len(directory), self._image.append(directory))
        self._image.add_extension(EXTENSION_BITMAPS, extension, autoclear_features=BITMAPS_CONSISTENT)
        self._image.finish()

    def _turn_to(self, index: int) -> None:
        if index == self._index:
            return
        if self._cluster.count(0xFF) == len(self._cluster):
            self._table[self._index] = _ALL_DIRTY
        elif any(self._cluster):
            self._table[self._index] = self._image.append(self._cluster)
        self._index = index
        self._cluster = bytearray(self._image.cluster_size)
