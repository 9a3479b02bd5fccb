"""qcow2: what is accepted is read inside the file only, ends, and reads as the specification says."""

from __future__ import annotations

import struct

from lmdbitmap.errors import FormatError, InvalidArgument, Untrusted
from lmdbitmap.qcow2 import Kind, MappedRun, Qcow2Reader, chain_extents, chain_read_into
from lmdbitmap.qcow2.bitmaps import bits_of, geometry_of, stored_bitmaps
from tests.fuzz.inputs import Input
from tests.helpers.qcow2_model import MemoryFile, naive_chain_read, u64

MEND_HEADER, PAD, CHAIN, TWICE, PARENT, ZSTD = (1 << bit for bit in range(6))
OFFSET_MASK, COPIED, COMPRESSED, ZERO = 0x00FFFFFFFFFFFE00, 1 << 63, 1 << 62, 1
PADDED_BYTES = 1 << 16
SMALL_DISK = 1 << 16
"""Bytes of a disk that is small enough to be read whole and compared."""


def qcow2(data: bytes) -> None:
    offset, length, images = images_of(data)
    readers = []
    for image in images:
        try:
            readers.append(opened(image))
        except FormatError:
            return
    sound = [
        check_runs(reader, len(image), offset, length) for reader, image in zip(readers, images, strict=True)
    ]
    if all(sound) and max(reader.size for reader in readers) <= SMALL_DISK:
        for reader, image in zip(readers, images, strict=True):
            check_entries(reader, image)
        check_stacked(readers, images)
    for reader, image in zip(readers, images, strict=True):
        check_bitmaps(reader, image)


def images_of(data: bytes) -> tuple[int, int, list[bytes]]:
    """A range to look at, and the images of an input, newest first."""
    source = Input(data)
    mode = source.byte()
    offset, length = source.number(3), source.number(3)
    images = [source.take(source.number(2)), source.rest()] if mode & CHAIN else [source.rest()]
    if mode & TWICE:
        images.append(images[-1])
    last = len(images) - 1
    return offset, length, [mended(image, mode, number < last) for number, image in enumerate(images)]


def mended(image: bytes, mode: int, has_parent: bool) -> bytes:
    """The image with a right magic, no feature but its compression, and a name of its parent, if it is to have one."""
    changed = bytearray(image)
    if mode & MEND_HEADER and len(changed) >= 112:
        changed[:8] = b"QFI\xfb\0\0\0\3"
        changed[72:80] = bytes(7) + (b"\x08" if mode & ZSTD else b"\0")
        changed[104] = bool(mode & ZSTD)
        changed[32:36] = bytes(4)
    if mode & PARENT and len(changed) >= 512:
        name = b"../p" if has_parent else b""
        struct.pack_into(">QI", changed, 8, 500 if has_parent else 0, len(name))
        changed[500 : 500 + len(name)] = name
    return bytes(changed.ljust(PADDED_BYTES, b"\0") if mode & PAD else changed)


def opened(image: bytes) -> Qcow2Reader:
    """What is read to open an image is in proportion to it."""
    file = MemoryFile(image)
    reader = Qcow2Reader(file, name="image")
    assert sum(length for _, length in file.reads) <= 2 * file.size + 1024
    assert 0 <= reader.size < 2**63
    assert reader.backing_file is None or 0 < len(reader.backing_file.encode()) <= 1023
    assert "\0" not in (reader.backing_file or "") + (reader.backing_format or "")
    return reader


def check_bitmaps(reader: Qcow2Reader, image: bytes) -> None:
    """What is accepted of them lies on the disk, in order; bitmaps that are too large to look at are left out."""
    file = MemoryFile(image)
    try:
        for bitmap in stored_bitmaps(reader, file):
            geometry = geometry_of(reader, bitmap)
            if geometry.block_count > 8 * SMALL_DISK:
                continue
            position = 0
            for offset, dirty in bits_of(reader, file, bitmap):
                assert position <= offset < offset + len(dirty) <= -(-geometry.block_count // 8)
                position = offset + len(dirty)
            assert 8 * position <= geometry.block_count or not dirty[-1] >> (geometry.block_count % 8 or 8)
    except (FormatError, Untrusted):
        return


def check_runs(reader: Qcow2Reader, file_size: int, offset: int, length: int) -> bool:
    """Runs without a gap, inside the file, not more of them than it has entries; and a part is a part of them.

    Whether all of the image is sound.
    """
    whole = runs_of(reader, file_size, 0, reader.size)
    offset %= reader.size + 1
    length %= reader.size + 1 - offset
    part = runs_of(reader, file_size, offset, length)
    if whole is not None:
        assert part == clipped(whole, offset, offset + length)
    return whole is not None


def runs_of(reader: Qcow2Reader, file_size: int, offset: int, length: int) -> list[MappedRun] | None:
    """None where the image is found out to lie."""
    found: list[MappedRun] = []
    position = offset
    try:
        for run in reader.extents(offset, length):
            assert (run.offset, run.layer) == (position, 0)
            assert run.length > 0
            assert run.kind is not Kind.DATA or 512 <= run.host_offset <= file_size - run.length
            assert not found or not run.continues(found[-1])
            if run.kind is Kind.COMPRESSED:
                check_compressed(reader, file_size, run)
            found.append(run)
            position = run.end
            assert len(found) <= file_size // 8 + 2, f"{len(found)} runs in a file of {file_size} bytes"
    except FormatError:
        return None
    assert position == offset + length
    return found


def check_compressed(reader: Qcow2Reader, file_size: int, run: MappedRun) -> None:
    """Inside the file, of two clusters at most, for one cluster; and what is read of a part is a part of the whole."""
    assert reader.cluster_size <= run.host_offset < run.host_offset + run.host_length <= file_size
    assert run.host_length <= 2 * reader.cluster_size
    assert run.offset // reader.cluster_size == (run.end - 1) // reader.cluster_size
    whole, part = bytearray(run.length), bytearray(run.length // 2)
    reader.fill(memoryview(whole), run)
    reader.fill(memoryview(part), run)
    assert part == whole[: len(part)]


def clipped(runs: list[MappedRun], start: int, end: int) -> list[MappedRun]:
    """The runs, cut down to [start, end)."""
    inside = []
    for run in runs:
        first, stop = max(run.offset, start), min(run.end, end)
        if first < stop:
            host_offset = run.host_offset + (first - run.offset if run.kind is Kind.DATA else 0)
            inside.append(run._replace(offset=first, length=stop - first, host_offset=host_offset))
    return inside


def check_entries(reader: Qcow2Reader, image: bytes) -> None:
    """No entry that maps the disk has a flag that we do not know."""
    l1, entries = u64(image, 40), reader.cluster_size // 8
    for cluster in range(-(-reader.size // reader.cluster_size)):
        pointer = u64(image, l1 + 8 * (cluster // entries))
        table = pointer & OFFSET_MASK
        assert not pointer & ~(OFFSET_MASK | COPIED)
        entry = u64(image, table + 8 * (cluster % entries)) if table else 0
        assert not entry & COPIED if entry & COMPRESSED else not entry & ~(OFFSET_MASK | COPIED | ZERO)


def check_stacked(readers: list[Qcow2Reader], images: list[bytes]) -> None:
    """A chain reads as the naive model of it says, if it is one."""
    size = readers[0].size
    buffer = bytearray(b"?" * size)
    try:
        chain_read_into(readers, memoryview(buffer), 0)
    except InvalidArgument:
        assert [reader.backing_file is None for reader in readers] != [False] * (len(readers) - 1) + [True]
        return
    assert buffer == naive_chain_read(images)
    assert sum(run.length for run in chain_extents(readers, 0, size)) == size
