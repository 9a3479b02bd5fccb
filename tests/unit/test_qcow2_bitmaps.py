"""Bitmaps in an image: written as the specification says, and read or refused by name; no disk, no QEMU."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.errors import FormatError, InvalidArgument, Untrusted
from lmdbitmap.geometry import Geometry
from lmdbitmap.qcow2 import Qcow2Reader, Qcow2Writer
from lmdbitmap.qcow2.bitmaps import (
    MAX_BITS_BYTES,
    BitmapWriter,
    StoredBitmap,
    bits_of,
    geometry_of,
    stored_bitmaps,
)
from tests.helpers.qcow2_model import MemoryFile, structure_problems, u64

CLUSTER = 1 << 16
NAME = "größer"
EXTENSION = 112 + 8
"""Where the extension's fields begin: the header is 112 bytes, and the extension's own head 8."""


def written(geometry: Geometry, *parts: tuple[int, bytes], name: str = NAME) -> MemoryFile:
    sink = MemoryFile()
    writer = BitmapWriter(sink, geometry, name)
    for offset, dirty in parts:
        writer.put(offset, dirty)
    writer.finish()
    return sink


def read(file: MemoryFile) -> tuple[StoredBitmap, bytes]:
    """The only bitmap, and its bits, padded with zeroes."""
    image = Qcow2Reader(file, name="image")
    [bitmap] = stored_bitmaps(image, file)
    size = -(-geometry_of(image, bitmap).block_count // 8)
    dirty = bytearray(size)
    for offset, part in bits_of(image, file, bitmap):
        dirty[offset : offset + len(part)] = part
    assert len(dirty) == size
    return bitmap, bytes(dirty)


def naive(file: MemoryFile) -> tuple[int, bytes, bytes]:
    """(granularity bits, name, bits) by the specification alone, of an image with one bitmap and no other extension."""
    raw = bytes(file.content)
    assert raw[88:96] == bytes(7) + b"\1", "the bitmaps are consistent"
    kind, length, count, reserved, size, offset = struct.unpack_from(">IIIIQQ", raw, 112)
    assert (kind, length, count, reserved) == (0x23852875, 24, 1, 0)
    table, entries, flags, tracks, granularity_bits, name_size, extra = struct.unpack_from(
        ">QIIBBHI", raw, offset
    )
    assert (flags, tracks, extra) == (0, 1, 0)
    assert size == -(-(24 + name_size) // 8) * 8
    clusters = []
    for index in range(entries):
        entry = u64(raw, table + 8 * index)
        clusters.append(raw[entry : entry + CLUSTER] if entry > 1 else bytes([0xFF * entry]) * CLUSTER)
    return granularity_bits, raw[offset + 24 : offset + 24 + name_size], b"".join(clusters)


# --- what is written ---


@st.composite
def bitmaps(draw: st.DrawFn) -> tuple[Geometry, list[tuple[int, bytes]]]:
    geometry = Geometry(draw(st.integers(1, 3 << 30)), draw(st.integers(9, 16)))
    size = -(-geometry.block_count // 8)
    parts, position = [], 0
    for gap, length, fill in draw(
        st.lists(
            st.tuples(st.integers(0, 2 * CLUSTER), st.integers(1, 3 * CLUSTER), st.integers(0, 255)),
            max_size=4,
        )
    ):
        start = position + gap
        position = min(start + length, size)
        if start >= size:
            break
        parts.append((start, bytearray([fill]) * (position - start)))
    if parts and position == size and geometry.block_count % 8:
        parts[-1][1][-1] &= (1 << geometry.block_count % 8) - 1
    return geometry, [(start, bytes(part)) for start, part in parts]


@given(bitmaps())
def test_what_is_written_is_what_the_specification_reads_and_we(
    made: tuple[Geometry, list[tuple[int, bytes]]],
) -> None:
    geometry, parts = made
    expected = bytearray(-(-geometry.block_count // 8))
    for offset, dirty in parts:
        expected[offset : offset + len(dirty)] = dirty
    file = written(geometry, *parts)
    granularity_bits, name, stored = naive(file)
    assert (granularity_bits, name.decode()) == (geometry.granularity_bits, NAME)
    assert stored.rstrip(b"\0") == bytes(expected).rstrip(b"\0")
    bitmap, dirty = read(file)
    assert (bitmap.name, bitmap.granularity_bits, dirty) == (NAME, geometry.granularity_bits, bytes(expected))
    assert Qcow2Reader(file).size == -(-geometry.size // 512) * 512


def test_an_entry_says_that_all_of_a_cluster_is_dirty_or_clean() -> None:
    geometry = Geometry(3 * 8 * CLUSTER * 512, 9)
    file = written(geometry, (0, b"\xff" * CLUSTER), (2 * CLUSTER, b"\1"))
    offset = u64(file.content, u64(file.content, EXTENSION + 16))
    assert [u64(file.content, offset + 8 * index) for index in range(2)] == [1, 0]
    assert read(file)[1] == b"\xff" * CLUSTER + bytes(CLUSTER) + b"\1".ljust(CLUSTER, b"\0")


def test_bits_past_the_end_are_left_out() -> None:
    """A disk that grew has them."""
    file = written(Geometry(8 * 512, 9), (0, b"\xff" * 4096), (8192, b"\xff"))
    assert read(file)[1] == b"\xff"
    assert naive(file)[2] == b"\xff".ljust(CLUSTER, b"\0")


def test_every_cluster_is_counted_once() -> None:
    """Those of the bitmap are the only ones that the rest of the image does not use."""
    file = written(Geometry(1 << 40, 16), (70_000, b"x" * 200_000))
    directory = directory_of(file)
    table = u64(file.content, directory)
    stored = [u64(file.content, table + 8 * index) for index in range(32)]
    clusters = sorted(offset // CLUSTER for offset in (directory, table, *stored) if offset)
    assert len(clusters) == 2 + 4
    problems = structure_problems(bytes(file.content))
    assert problems == [
        *(f"cluster {cluster}: 0 uses, refcount 1" for cluster in clusters),
        *(f"cluster {cluster} is outside the file or unused" for cluster in clusters),
    ]


def test_what_qemu_cannot_read_is_not_written() -> None:
    largest = 8 * MAX_BITS_BYTES * 512
    BitmapWriter(MemoryFile(), Geometry(largest, 9), NAME)
    for size in (0, largest + 1):
        with pytest.raises(InvalidArgument, match="QEMU reads 1 to 536870912"):
            BitmapWriter(MemoryFile(), Geometry(size, 9), NAME)
    BitmapWriter(MemoryFile(), Geometry(1 << 60, 31), NAME)
    with pytest.raises(InvalidArgument, match=f"does not fit a qcow2 image, which is of one of {1 << 60}"):
        BitmapWriter(MemoryFile(), Geometry((1 << 60) + 1, 31), NAME)
    for name in ("", "x" * 1024):
        with pytest.raises(InvalidArgument, match="names of 1 to 1023 bytes"):
            BitmapWriter(MemoryFile(), Geometry(512, 9), name)


# --- what is refused ---


def patched(offset: int, data: bytes) -> MemoryFile:
    file = written(Geometry(1 << 30, 16), (0, b"\1"))
    file.pwrite(data, offset)
    return file


def directory_of(file: MemoryFile) -> int:
    return u64(file.content, EXTENSION + 16)


DIRECTORY = directory_of(written(Geometry(1 << 30, 16), (0, b"\1")))
TABLE = u64(written(Geometry(1 << 30, 16), (0, b"\1")).content, DIRECTORY)


@pytest.mark.parametrize(
    ("offset", "data", "place"),
    [
        (EXTENSION - 4, struct.pack(">I", 23), "bitmaps extension: expected 24 bytes"),
        (EXTENSION, bytes(4), "nb_bitmaps"),
        (EXTENSION, struct.pack(">I", 65536), "nb_bitmaps"),
        (EXTENSION + 4, b"\0\0\0\1", "reserved"),
        (EXTENSION + 8, struct.pack(">Q", 1 << 62), "bitmap_directory_offset"),
        (EXTENSION + 16, bytes(8), "bitmap_directory_offset"),
        (EXTENSION + 16, struct.pack(">Q", 513), "bitmap_directory_offset"),
        (EXTENSION, struct.pack(">I", 2), "bitmap directory, entry 1"),
        (DIRECTORY + 18, bytes(2), "name_size"),
        (DIRECTORY + 18, b"\4\0", "name_size"),
        (DIRECTORY + 20, b"\xff\xff\xff\xff", "name_size"),
        (DIRECTORY + 24, b"\xff", "entry 0, name"),
        (DIRECTORY + 12, b"\0\0\0\4", "flags"),
        (DIRECTORY + 16, b"\2", "type"),
        (DIRECTORY + 17, b"\x08", "granularity_bits"),
        (DIRECTORY + 17, b"\x20", "granularity_bits"),
        (DIRECTORY + 8, b"\0\0\0\2", "table of bitmap"),
        (DIRECTORY, bytes(8), "table of bitmap"),
        (DIRECTORY, struct.pack(">Q", TABLE + 512), "table of bitmap"),
        (DIRECTORY, struct.pack(">Q", 1 << 50), "table of bitmap"),
        (TABLE, struct.pack(">Q", 2), "table of bitmap"),
        (TABLE, struct.pack(">Q", CLUSTER | 1), "table of bitmap"),
        (TABLE, struct.pack(">Q", 1 << 63), "table of bitmap"),
        (TABLE, struct.pack(">Q", CLUSTER + 512), "table of bitmap"),
        (TABLE, struct.pack(">Q", 1 << 50), "table of bitmap"),
    ],
)  # fmt: skip
def test_what_no_qemu_wrote_is_refused_by_its_place(offset: int, data: bytes, place: str) -> None:
    with pytest.raises(FormatError, match=place):
        read(patched(offset, data))


@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (95, b"\0", "a program that knows nothing of its bitmaps has written to it"),
        (DIRECTORY + 12, b"\0\0\0\1", "was not stored when its program ended, or is in use"),
        (DIRECTORY + 12, b"\0\0\0\3", "was not stored when its program ended, or is in use"),
    ],
)
def test_what_is_not_up_to_date_is_not_trusted(offset: int, data: bytes, why: str) -> None:
    with pytest.raises(Untrusted, match=why):
        read(patched(offset, data))


@pytest.mark.parametrize(
    ("count", "second", "refusal"),
    [
        (2, NAME, "names: expected each of another name, found 1 of 2"),
        (1, "weekly!!", "bitmap directory: expected 1 entries"),
    ],
)
def test_a_directory_holds_as_many_entries_as_it_says_each_of_another_name(
    count: int, second: str, refusal: str
) -> None:
    file = patched(EXTENSION, struct.pack(">IIQ", count, 0, 2 * 32))
    entry = bytes(file.content[DIRECTORY : DIRECTORY + 24])
    file.pwrite(entry + second.encode(), DIRECTORY + 32)
    with pytest.raises(FormatError, match=refusal):
        read(file)


def test_extra_data_that_is_not_known_here_is_refused() -> None:
    """The specification: a program that does not know it must not use the bitmap."""
    file = patched(EXTENSION + 8, struct.pack(">Q", 8 + 24 + 8))
    file.pwrite(struct.pack(">I", 8) + b"whatever" + NAME.encode(), DIRECTORY + 20)
    with pytest.raises(FormatError, match="extra_data_size: expected 0, found 8"):
        read(file)


def test_a_recording_bitmap_is_as_good_as_another() -> None:
    assert read(patched(DIRECTORY + 12, b"\0\0\0\2"))[1] == read(patched(DIRECTORY + 12, bytes(4)))[1]


@pytest.mark.parametrize("entry", [1, CLUSTER])
def test_bits_past_the_disks_end_are_clean_whatever_the_image_says(entry: int) -> None:
    file = patched(TABLE, struct.pack(">Q", entry))
    file.pwrite(b"\xff" * CLUSTER, CLUSTER)
    file.pwrite(struct.pack(">Q", 10 * 65536), 24)
    assert read(file)[1] == b"\xff\3"


def test_an_image_without_bitmaps_has_none() -> None:
    sink = MemoryFile()
    Qcow2Writer(sink, size=1 << 20).finish()
    assert stored_bitmaps(Qcow2Reader(sink), sink) == []


@pytest.mark.parametrize("place", [EXTENSION, DIRECTORY, TABLE])
def test_no_flipped_bit_makes_it_anything_but_refused_or_read(place: int) -> None:
    """Nothing is read outside of the file (`MemoryFile` sees to that), and nothing but our errors comes out."""
    sound, refused = bytes(patched(0, b"").content), set()
    for position in range(place - 8, place + 40):
        for bit in range(8):
            file = MemoryFile(sound)
            file.content[position] ^= 1 << bit
            try:
                bits_read(file)
            except (FormatError, Untrusted):
                refused.add(position)
    assert place in refused


def bits_read(file: MemoryFile) -> int:
    image = Qcow2Reader(file, name="image")
    return sum(
        len(part) for bitmap in stored_bitmaps(image, file) for _, part in bits_of(image, file, bitmap)
    )
