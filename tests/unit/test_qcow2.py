"""The writer's bytes by the specification, the reader's refusals by name, and chains; no disk, no QEMU."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from lmdbitmap.errors import FormatError, InvalidArgument
from lmdbitmap.qcow2 import (
    CompressionType,
    Header,
    Kind,
    MappedRun,
    Qcow2Reader,
    Qcow2Writer,
    chain_extents,
    chain_read_into,
)
from lmdbitmap.qcow2.layout import compressed_entry, compressed_place
from tests.helpers.qcow2_model import (
    MemoryFile,
    compressed_image,
    compressed_range,
    deflated,
    naive_chain_read,
    structure_problems,
    u32,
    u64,
    zstd_packed,
)

CLUSTER = 512
TABLE = 64
"""Entries of an L2 table with the smallest clusters: one maps 32 KiB."""
TABLE_BYTES = TABLE * CLUSTER
TIB = 1 << 40


def image(
    size: int,
    *ranges: tuple[int, bytes | int],
    cluster_bits: int = 9,
    backing_file: str | None = None,
) -> MemoryFile:
    """A finished image; a range is (offset, data) or (offset, length of zeroes)."""
    sink = MemoryFile()
    writer = Qcow2Writer(sink, size=size, cluster_bits=cluster_bits, backing_file=backing_file)
    for offset, content in ranges:
        if isinstance(content, int):
            writer.write_zeroes(offset, content)
        else:
            writer.write(offset, content)
    assert writer.finish() == sink.size
    return sink


def runs(file: MemoryFile) -> list[MappedRun]:
    reader = Qcow2Reader(file)
    return list(reader.extents(0, reader.size))


def contents(*files: MemoryFile) -> bytes:
    """What a chain, newest first, reads as."""
    readers = [Qcow2Reader(file) for file in files]
    buffer = bytearray(readers[0].size)
    chain_read_into(readers, memoryview(buffer), 0)
    return bytes(buffer)


# --- the writer ---


def test_header_is_version_3_with_16_bit_refcounts_and_no_features() -> None:
    header = Qcow2Reader(image(TABLE_BYTES, (0, b"x" * CLUSTER))).header
    assert header[:2] == (b"QFI\xfb", 3)
    assert (header.cluster_bits, header.size, header.l1_size) == (9, TABLE_BYTES, 1)
    assert (header.refcount_order, header.header_length, header.compression_type) == (4, 112, 0)
    assert header[11:16] == (0, 0, 0, 0, 0)


def test_data_is_one_write_and_one_run_however_many_l2_tables_it_crosses() -> None:
    data = bytes(range(256)) * (5 * TABLE_BYTES // 256)
    file = image(8 * TABLE_BYTES, (TABLE_BYTES - CLUSTER, data))
    assert file.writes.count((CLUSTER, len(data))) == 1
    assert runs(file)[1] == MappedRun(TABLE_BYTES - CLUSTER, len(data), Kind.DATA, CLUSTER)


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 130, 255, 256, 257, 508])
@pytest.mark.parametrize("kind", [Kind.UNALLOCATED, Kind.ZERO])
def test_runs_end_where_they_do_however_long_they_are(kind: Kind, count: int) -> None:
    """Entries that may be alike are looked at in blocks of 128; a table has 512 of them here."""
    cluster, length = 4096, count * 4096
    ranges: list[tuple[int, bytes | int]] = [(0, b"x" * cluster), (cluster + length, b"y" * cluster)]
    if kind is Kind.ZERO:
        ranges.insert(1, (cluster, length))
    file = image(512 * cluster, *ranges, cluster_bits=12, backing_file="below")
    after = 2 * cluster + length
    assert [(run.offset, run.length, run.kind) for run in runs(file)] == [
        (0, cluster, Kind.DATA),
        (cluster, length, kind),
        (cluster + length, cluster, Kind.DATA),
        (after, 512 * cluster - after, Kind.UNALLOCATED),
    ]


def test_header_is_written_last_and_without_it_the_file_is_refused() -> None:
    file = image(TABLE_BYTES, (0, b"x" * CLUSTER))
    assert file.writes[-1] == (0, CLUSTER)
    assert all(offset >= CLUSTER for offset, _ in file.writes[:-1])
    file.content[:CLUSTER] = bytes(CLUSTER)
    with pytest.raises(FormatError, match="magic"):
        Qcow2Reader(file)


@pytest.mark.parametrize(
    ("size", "image_size"), [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024), (1_000_001, 1_000_448)]
)
def test_image_size_is_rounded_up_to_sectors_and_the_tail_is_zero(size: int, image_size: int) -> None:
    data = b"\xff" * size
    file = image(size, (0, data))
    assert u64(file.content, 24) == image_size
    assert contents(file) == data.ljust(image_size, b"\0")
    assert structure_problems(bytes(file.content)) == []


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_short_last_cluster_is_filled_up_with_zeroes(cluster_bits: int) -> None:
    size = (1 << cluster_bits) + 100
    file = image(size, (0, b"\xff" * size), cluster_bits=cluster_bits)
    host_offset = runs(file)[0].host_offset
    stored = file.content[host_offset : host_offset + (2 << cluster_bits)]
    assert stored == (b"\xff" * size).ljust(2 << cluster_bits, b"\0")


def test_zeroes_in_a_full_image_cost_nothing() -> None:
    empty = image(TABLE_BYTES)
    assert image(TABLE_BYTES, (0, TABLE_BYTES)).content == empty.content
    assert [run.kind for run in runs(empty)] == [Kind.UNALLOCATED]


def test_zeroes_over_a_backing_file_hide_it_and_a_gap_does_not() -> None:
    full = image(4 * CLUSTER, (0, b"\xaa" * 4 * CLUSTER))
    top = image(4 * CLUSTER, (CLUSTER, 2 * CLUSTER), backing_file="full")
    assert [run.kind for run in runs(top)] == [Kind.UNALLOCATED, Kind.ZERO, Kind.UNALLOCATED]
    assert contents(top, full) == b"\xaa" * CLUSTER + bytes(2 * CLUSTER) + b"\xaa" * CLUSTER


def test_full_tables_of_zeroes_share_one_that_two_entries_past_the_disk_hold_too() -> None:
    file = image(5 * TABLE_BYTES + CLUSTER, (CLUSTER, 5 * TABLE_BYTES - CLUSTER), backing_file="full")
    l1 = u64(file.content, 40)
    first, *shared, tail, anchor, same_anchor = (u64(file.content, l1 + 8 * index) for index in range(8))
    assert u32(file.content, 36) == 8
    assert (first >> 63, tail) == (1, 0)
    assert shared == [anchor] * 4
    assert (anchor, anchor >> 63) == (same_anchor, 0)
    assert structure_problems(bytes(file.content)) == []


def test_zeroes_given_in_small_pieces_are_shared_too() -> None:
    whole = image(4 * TABLE_BYTES, (0, 4 * TABLE_BYTES), backing_file="full")
    pieces = [(offset, CLUSTER) for offset in range(0, 4 * TABLE_BYTES, CLUSTER)]
    assert image(4 * TABLE_BYTES, *pieces, backing_file="full").content == whole.content


def test_one_full_table_of_zeroes_has_no_anchor() -> None:
    file = image(3 * TABLE_BYTES, (TABLE_BYTES, TABLE_BYTES), backing_file="full")
    assert u32(file.content, 36) == 3
    assert u64(file.content, u64(file.content, 40) + 8) >> 63 == 1
    assert structure_problems(bytes(file.content)) == []


def test_more_sharers_than_a_refcount_can_count_take_a_second_table() -> None:
    stretches = 0xFFFF + 100
    file = image(stretches * TABLE_BYTES, (0, stretches * TABLE_BYTES), backing_file="full")
    assert u32(file.content, 36) == stretches + 4
    assert structure_problems(bytes(file.content)) == []
    assert runs(file) == [MappedRun(0, stretches * TABLE_BYTES, Kind.ZERO)]


def test_64_tib_of_zeroes_are_small_to_write_and_one_run_to_read() -> None:
    file = image(64 * TIB, (0, 64 * TIB), cluster_bits=16, backing_file="full")
    assert file.size < 2 << 20
    assert runs(file) == [MappedRun(0, 64 * TIB, Kind.ZERO)]


def test_few_changes_on_64_tib_cost_one_l2_table_each() -> None:
    changes = [(TIB * index, b"x" * 65536) for index in range(64)]
    file = image(64 * TIB, *changes, cluster_bits=16, backing_file="full")
    assert file.size < (1 << 20) + 64 * 2 * 65536 + 4 * 65536
    assert [run.offset for run in runs(file) if run.kind is Kind.DATA] == [offset for offset, _ in changes]


def test_empty_ranges_are_no_ops() -> None:
    touched = image(3 * CLUSTER + 5, (0, b""), (CLUSTER, 0), (3 * CLUSTER, b""), backing_file="full")
    assert touched.content == image(3 * CLUSTER + 5, backing_file="full").content


@pytest.mark.parametrize(
    ("offset", "length"),
    [(1, CLUSTER), (0, 100), (0, CLUSTER - 1), (-CLUSTER, CLUSTER), (CLUSTER, -CLUSTER), (0, 5 * CLUSTER)],
)
def test_a_range_that_is_no_whole_clusters_of_the_disk_is_refused(offset: int, length: int) -> None:
    writer = Qcow2Writer(MemoryFile(), size=4 * CLUSTER, cluster_bits=9, backing_file="full")
    with pytest.raises(InvalidArgument, match="whole clusters of 512 bytes"):
        writer.write_zeroes(offset, length)
    writer.write_zeroes(0, 4 * CLUSTER)


def test_ranges_must_ascend_and_nothing_follows_the_finish() -> None:
    writer = Qcow2Writer(MemoryFile(), size=4 * CLUSTER, cluster_bits=9)
    writer.write(CLUSTER, bytes(CLUSTER))
    with pytest.raises(InvalidArgument, match="ascending"):
        writer.write(CLUSTER, bytes(CLUSTER))
    writer.finish()
    with pytest.raises(InvalidArgument, match="then finish"):
        writer.write(2 * CLUSTER, bytes(CLUSTER))
    with pytest.raises(InvalidArgument, match="then finish"):
        writer.finish()


@pytest.mark.parametrize(
    ("size", "cluster_bits", "said"),
    [(0, 8, "cluster_bits 8"), (0, 22, "cluster_bits 22"), (-1, 16, "-1 bytes"), (2**63, 21, "does not fit")]
    + [((1 << (2 * bits + 18)) + 1, bits, "choose larger clusters") for bits in (9, 16)]
    + [((1 << 60) + 1, bits, f"of one of {1 << 60} at most") for bits in (16, 21, 22)],
)
def test_dimensions_that_qemu_would_not_open_are_refused(size: int, cluster_bits: int, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Qcow2Writer(MemoryFile(), size=size, cluster_bits=cluster_bits)


@pytest.mark.parametrize("name", ["a", "full-0001.qcow2", "../b/ü:1.qcow2", "n" * 360])
def test_backing_name_and_format_come_back(name: str) -> None:
    reader = Qcow2Reader(image(CLUSTER, backing_file=name))
    assert (reader.backing_file, reader.backing_format) == (name, "qcow2")


def test_longest_backing_name_needs_larger_clusters() -> None:
    assert Qcow2Reader(image(0, backing_file="n" * 1023, cluster_bits=12)).backing_file == "n" * 1023
    with pytest.raises(InvalidArgument, match="1 to 1023 bytes"):
        image(0, backing_file="n" * 1024, cluster_bits=12)
    with pytest.raises(InvalidArgument, match="1 to 376 bytes"):
        image(0, backing_file="n" * 377)


@pytest.mark.parametrize("name", ["", "a\0b", "nbd:unix:/s", "json:{}", "lone \udc80 surrogate"])
def test_backing_name_that_qemu_would_read_otherwise_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be the name of a backing file"):
        image(0, backing_file=name)


def test_an_image_without_backing_file_names_none() -> None:
    reader = Qcow2Reader(image(CLUSTER))
    assert (reader.backing_file, reader.backing_format) == (None, None)


# --- the reader ---

FIELDS = {
    "magic": (0, 4), "version": (4, 4), "backing_file_offset": (8, 8), "backing_file_size": (16, 4),
    "cluster_bits": (20, 4), "size": (24, 8), "crypt_method": (32, 4), "l1_size": (36, 4),
    "l1_table_offset": (40, 8), "refcount_table_offset": (48, 8), "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4), "snapshots_offset": (64, 8), "incompatible_features": (72, 8),
    "compatible_features": (80, 8), "autoclear_features": (88, 8), "refcount_order": (96, 4),
    "header_length": (100, 4), "compression_type": (104, 1),
}  # fmt: skip
"""(offset, size) by the specification."""


def patched(file: MemoryFile, **fields: int) -> MemoryFile:
    copy = MemoryFile(bytes(file.content))
    for field, value in fields.items():
        offset, size = FIELDS[field]
        copy.content[offset : offset + size] = value.to_bytes(size, "big")
    return copy


def small_image() -> MemoryFile:
    return image(2 * TABLE_BYTES, (0, b"x" * 2 * CLUSTER), (TABLE_BYTES, CLUSTER), backing_file="full")


@pytest.mark.parametrize(
    ("fields", "place", "found"),
    [
        ({"magic": 0}, "magic", "x00"),
        ({"version": 2}, "version", "2"),
        ({"version": 4}, "version", "4"),
        ({"incompatible_features": 1}, "incompatible_features", "dirty"),
        ({"incompatible_features": 2}, "incompatible_features", "corrupt"),
        ({"incompatible_features": 4}, "incompatible_features", "external data file"),
        ({"incompatible_features": 8}, "compression_type", "0"),
        ({"incompatible_features": 8, "compression_type": 2}, "compression_type", "2"),
        ({"incompatible_features": 8, "compression_type": 1, "header_length": 104}, "compression_type", ""),
        ({"compression_type": 1}, "compression_type", "1"),
        ({"incompatible_features": 16}, "incompatible_features", "extended L2"),
        ({"incompatible_features": 1 << 63 | 32}, "incompatible_features", "unknown bit 5, unknown bit 63"),
        ({"crypt_method": 1}, "crypt_method", "1"),
        ({"crypt_method": 2}, "crypt_method", "2"),
        ({"cluster_bits": 8}, "cluster_bits", "8"),
        ({"cluster_bits": 22}, "cluster_bits", "22"),
        ({"cluster_bits": 0xFFFFFFFF}, "cluster_bits", "4294967295"),
        ({"header_length": 96}, "header_length", "96"),
        ({"header_length": 105}, "header_length", "105"),
        ({"header_length": 520}, "header_length", "520"),
        ({"refcount_order": 7}, "refcount_order", "7"),
        ({"size": 1 << 63}, "size", "9223372036854775808"),
        ({"size": 3 * TABLE_BYTES}, "l1_size", "2"),
        ({"l1_size": (4 << 20) + 1}, "l1_size", "4194305"),
        ({"l1_size": 4096}, "l1_table_offset", ""),
        ({"l1_table_offset": 0}, "l1_table_offset", "0"),
        ({"l1_table_offset": 513}, "l1_table_offset", "513"),
        ({"l1_table_offset": 1 << 62}, "l1_table_offset", "4611686018427387904"),
        ({"refcount_table_offset": 0}, "refcount_table_offset", "0"),
        ({"refcount_table_offset": 700}, "refcount_table_offset", "700"),
        ({"refcount_table_clusters": 0xFFFFFFFF}, "refcount_table_offset", ""),
        ({"backing_file_size": 0}, "backing_file_size", "0"),
        ({"backing_file_size": 1024}, "backing_file_size", "1024"),
        ({"backing_file_size": 400}, "backing_file_offset", "136"),
        ({"backing_file_offset": 8}, "backing_file_offset", "8"),
        ({"backing_file_offset": 1 << 63}, "backing_file_offset", "9223372036854775808"),
    ],
)
def test_a_lying_header_field_is_refused_by_name(fields: dict[str, int], place: str, found: str) -> None:
    with pytest.raises(FormatError) as refused:
        Qcow2Reader(patched(small_image(), **fields), name="b.qcow2")
    assert refused.value.place == f"b.qcow2: header {place}"
    assert found in str(refused.value.found)


def test_a_header_without_the_field_has_compression_type_zlib() -> None:
    """What stands in its place is an extension."""
    file = patched(image(CLUSTER), header_length=104, compression_type=1)
    assert Qcow2Reader(file).compression_type is CompressionType.ZLIB


def test_fields_that_may_be_ignored_are_ignored() -> None:
    noisy = patched(
        small_image(),
        compatible_features=2**64 - 1,
        autoclear_features=2**64 - 1,
        nb_snapshots=7,
        snapshots_offset=3,
    )
    assert runs(noisy) == runs(small_image())


@pytest.mark.parametrize("length", [0, 3, 111])
def test_a_file_shorter_than_a_header_is_refused(length: int) -> None:
    with pytest.raises(FormatError, match=f"a file of {length}"):
        Qcow2Reader(MemoryFile(bytes(small_image().content[:length])))


def test_a_header_of_104_bytes_is_read() -> None:
    file = patched(image(CLUSTER), header_length=104)
    assert runs(file) == [MappedRun(0, CLUSTER, Kind.UNALLOCATED)]


@pytest.mark.parametrize(
    ("place", "at", "raw"),
    [
        ("header extension 0xe2792aca", 116, struct.pack(">I", 1 << 31)),
        ("header extension 0x7", 112, struct.pack(">II", 7, 300)),
        ("backing format", 120, b"\xff"),
        ("backing file name", 136, b"\xff"),
        ("backing file name", 136, b"\0"),
    ],
)
def test_lying_header_extensions_and_names_are_refused(place: str, at: int, raw: bytes) -> None:
    file = small_image()
    file.content[at : at + len(raw)] = raw
    with pytest.raises(FormatError) as refused:
        Qcow2Reader(file)
    assert refused.value.place == f"qcow2 image: {place}"


def test_an_unknown_header_extension_is_passed_over() -> None:
    file = small_image()
    file.content[112:136] = struct.pack(">II3s5xII", 99, 3, b"abc", 0xE2792ACA, 0)
    assert Qcow2Reader(file).backing_format == ""


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (1 << 20, "inside the file of"),
        (513 << 9 | 1 << 8, "inside the file of"),
        (1 << 56 | 1024, "inside the file of"),
        (1 << 62 | 1024, "inside the file of"),
        ((1 << 63) - 512 & (1 << 56) - 1, "inside the file of"),
    ],
)
def test_a_lying_l1_entry_is_refused_when_its_range_is_asked_for(entry: int, expected: str) -> None:
    file = small_image()
    struct.pack_into(">Q", file.content, u64(file.content, 40) + 8, entry)
    reader = Qcow2Reader(file)
    assert len(list(reader.extents(0, TABLE_BYTES))) == 2
    with pytest.raises(FormatError, match=expected) as refused:
        list(reader.extents(TABLE_BYTES, 1))
    assert refused.value.place == "qcow2 image: L1 entry 1"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (1 << 20, "data inside the file"),
        (1 << 63, "known flags"),
        (1 << 63 | 1, "known flags"),
        (1024 | 1 << 1, "known flags"),
        (1024 | 1 << 8, "known flags"),
        (1024 | 1 << 56, "known flags"),
        (1024 | 1 << 61, "known flags"),
        (3 << 62 | 1024, "not COPIED"),
        (1 << 62, "compressed data inside the file"),
        (1 << 62 | 511, "compressed data inside the file"),
        (1 << 62 | 1 << 20, "compressed data inside the file"),
        (1 << 62 | 1 << 61 | 3584, "compressed data inside the file"),
        (1 << 62 | 1 << 56 | 1024, "compressed data inside the file"),
    ],
)
def test_a_lying_l2_entry_is_refused_when_its_range_is_asked_for(entry: int, expected: str) -> None:
    file = small_image()
    table = u64(file.content, u64(file.content, 40)) & ~(1 << 63)
    struct.pack_into(">Q", file.content, table + 8 * 3, entry)
    reader = Qcow2Reader(file)
    assert len(list(reader.extents(0, 3 * CLUSTER))) == 2
    with pytest.raises(FormatError, match=expected) as refused:
        list(reader.extents(0, TABLE_BYTES))
    assert refused.value.place == f"qcow2 image: L2 entry of byte {3 * CLUSTER}"


def test_an_offset_between_clusters_is_refused() -> None:
    file = image(4096, (0, b"x" * 4096), cluster_bits=12)
    table = u64(file.content, u64(file.content, 40)) & ~(1 << 63)
    struct.pack_into(">Q", file.content, table, 1 << 63 | 4096 + 512)
    with pytest.raises(FormatError, match="a multiple of 4096"):
        runs(file)


def test_a_zero_cluster_with_space_reserved_for_it_is_zero() -> None:
    file = small_image()
    table = u64(file.content, u64(file.content, 40)) & ~(1 << 63)
    struct.pack_into(">QQ", file.content, table, 1 << 63 | CLUSTER | 1, 1 << 63 | 2 * CLUSTER | 1)
    assert runs(file)[0] == MappedRun(0, 2 * CLUSTER, Kind.ZERO)


def test_data_that_a_truncated_file_lacks_is_refused() -> None:
    file = image(CLUSTER, (0, b"x" * CLUSTER))
    l1 = u64(file.content, 40)
    struct.pack_into(">Q", file.content, u64(file.content, l1) & ~(1 << 63), 1 << 63 | file.size - CLUSTER)
    assert len(runs(file)) == 1
    struct.pack_into(">Q", file.content, u64(file.content, l1) & ~(1 << 63), 1 << 63 | file.size)
    with pytest.raises(FormatError, match="data inside the file"):
        runs(file)


def test_extents_are_clipped_to_the_bytes_asked_for() -> None:
    reader = Qcow2Reader(image(8 * CLUSTER, (2 * CLUSTER, b"x" * 4 * CLUSTER), backing_file="full"))
    assert list(reader.extents(3 * CLUSTER + 5, 100)) == [
        MappedRun(3 * CLUSTER + 5, 100, Kind.DATA, 2 * CLUSTER + 5)
    ]
    assert [run[:3] for run in reader.extents(2 * CLUSTER - 1, 2)] == [
        (2 * CLUSTER - 1, 1, Kind.UNALLOCATED),
        (2 * CLUSTER, 1, Kind.DATA),
    ]


@pytest.mark.parametrize("offset", [0, 5, 4 * CLUSTER])
def test_an_empty_range_has_no_extents(offset: int) -> None:
    assert list(Qcow2Reader(image(4 * CLUSTER, (0, b"x" * CLUSTER))).extents(offset, 0)) == []


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 4 * CLUSTER + 1), (4 * CLUSTER, 1), (5, -1)])
def test_a_range_off_the_image_is_refused_before_anything_is_read(offset: int, length: int) -> None:
    reader = Qcow2Reader(image(4 * CLUSTER))
    with pytest.raises(InvalidArgument, match="not on a disk of 2048 bytes"):
        reader.extents(offset, length)


def test_runs_join_over_l2_tables_only_where_the_file_is_contiguous_too() -> None:
    at_once = image(3 * TABLE_BYTES, (0, b"x" * 3 * TABLE_BYTES))
    assert [run.length for run in runs(at_once)] == [3 * TABLE_BYTES]
    split = [(0, b"x" * TABLE_BYTES), (TABLE_BYTES, b"y" * CLUSTER), (TABLE_BYTES + CLUSTER, b"z" * CLUSTER)]
    before_the_table, after_it, _ = runs(image(2 * TABLE_BYTES, *split))
    assert (before_the_table.end, after_it.end) == (TABLE_BYTES + CLUSTER, TABLE_BYTES + 2 * CLUSTER)
    assert after_it.host_offset - before_the_table.host_offset == TABLE_BYTES + 2 * CLUSTER


def test_clusters_that_share_their_data_are_no_contiguous_run() -> None:
    file = image(TABLE_BYTES, (0, b"x" * TABLE_BYTES))
    table = u64(file.content, u64(file.content, 40)) & ~(1 << 63)
    struct.pack_into(f">{TABLE}Q", file.content, table, *[CLUSTER] * TABLE)
    assert [run.host_offset for run in runs(file)] == [CLUSTER] * TABLE


def test_neighbouring_reads_load_their_l2_table_once() -> None:
    file = image(TABLE_BYTES, (0, b"x" * TABLE_BYTES))
    reader = Qcow2Reader(file)
    file.reads.clear()
    assert [run.length for offset in range(TABLE) for run in reader.extents(offset, 1)] == [1] * TABLE
    assert len(file.reads) == 1


def test_a_shared_table_is_read_once() -> None:
    file = image(1000 * TABLE_BYTES, (0, 1000 * TABLE_BYTES), backing_file="full")
    reader = Qcow2Reader(file)
    file.reads.clear()
    assert len(list(reader.extents(0, reader.size))) == 1
    assert len(file.reads) == 1


@pytest.mark.parametrize("order", [[0, 0], [0, 1, 0, 1], [1, 0, 1]])
def test_a_table_of_several_runs_that_stands_twice_is_refused(order: list[int]) -> None:
    """Else a small file could claim a disk of more runs than anybody can count."""
    file = image(2 * TABLE_BYTES, *((table * TABLE_BYTES, b"x" * CLUSTER) for table in range(2)))
    l1 = u64(file.content, 40)
    offsets = [u64(file.content, l1 + 8 * table) for table in order]
    file.content.extend(struct.pack(f">{len(order)}Q", *offsets).ljust(CLUSTER, b"\0"))
    struct.pack_into(">QIIQQ", file.content, 24, len(order) * TABLE_BYTES, 0, len(order), file.size - CLUSTER,
                     u64(file.content, 48))  # fmt: skip
    with pytest.raises(FormatError, match="an L2 table of its own"):
        runs(file)


def test_an_image_is_read_from_anywhere_and_gaps_in_a_full_one_are_zeroes() -> None:
    file = image(4 * CLUSTER, (0, b"x" * CLUSTER), (CLUSTER, CLUSTER))
    buffer = bytearray(b"?" * (3 * CLUSTER - 10))
    chain_read_into([Qcow2Reader(file)], memoryview(buffer), 10)
    assert buffer == b"x" * (CLUSTER - 10) + bytes(2 * CLUSTER)


# --- compressed clusters ---

PAGE = 4096
CLUSTERS = [b"one" + bytes(PAGE - 3), os.urandom(3000) + bytes(PAGE - 3000), b"x" * PAGE, os.urandom(PAGE)]
"""The last one grows."""
packings = pytest.mark.parametrize(
    ("pack", "is_zstd"), [(deflated, False), (zstd_packed, True)], ids=["zlib", "zstd"]
)
Pack: TypeAlias = Callable[[bytes], bytes]


@packings
def test_compressed_clusters_are_runs_of_their_own_and_read_back(pack: Pack, is_zstd: bool) -> None:
    packed = [pack(cluster) for cluster in CLUSTERS]
    file = MemoryFile(compressed_image(packed, is_zstd=is_zstd))
    assert structure_problems(bytes(file.content)) == []
    found = runs(file)
    assert [run[:3] for run in found] == [(PAGE * n, PAGE, Kind.COMPRESSED) for n in range(len(CLUSTERS))]
    for run, data in zip(found, packed, strict=True):
        assert file.content[run.host_offset :].startswith(data)
        assert (run.host_offset + run.host_length) % 512 == 0
    assert contents(file) == naive_chain_read([bytes(file.content)]) == b"".join(CLUSTERS)


@packings
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (5, 100), (PAGE - 1, 2), (PAGE + 7, 2 * PAGE), (100, 4 * PAGE - 101)]
)
def test_a_part_of_a_compressed_cluster_is_read(pack: Pack, is_zstd: bool, offset: int, length: int) -> None:
    reader = Qcow2Reader(
        MemoryFile(compressed_image([pack(cluster) for cluster in CLUSTERS], is_zstd=is_zstd))
    )
    buffer = bytearray(b"?" * length)
    chain_read_into([reader], memoryview(buffer), offset)
    assert buffer == b"".join(CLUSTERS)[offset : offset + length]


def test_parts_of_one_compressed_cluster_are_read_from_the_file_once() -> None:
    file = MemoryFile(compressed_image([deflated(cluster) for cluster in CLUSTERS]))
    reader = Qcow2Reader(file)
    list(reader.extents(0, 1))
    file.reads.clear()
    read = bytearray(PAGE)
    for offset in range(0, PAGE, 512):
        chain_read_into([reader], memoryview(read)[offset : offset + 512], offset)
    assert (bytes(read), len(file.reads)) == (CLUSTERS[0], 1)
    chain_read_into([reader], memoryview(read)[:5], PAGE)
    assert read[:5] == CLUSTERS[1][:5]


def test_a_compressed_cluster_that_was_read_whole_is_not_kept() -> None:
    """Else each image of a long chain would hold one while a disk is restored."""
    file = MemoryFile(compressed_image([deflated(cluster) for cluster in CLUSTERS]))
    reader = Qcow2Reader(file)
    [run] = reader.extents(0, PAGE)
    file.reads.clear()
    for _ in range(3):
        reader.fill(memoryview(bytearray(PAGE)), run)
    assert len(file.reads) == 3


def test_compressed_clusters_under_an_image_with_smaller_clusters_are_read_in_parts() -> None:
    full = MemoryFile(compressed_image([deflated(cluster) for cluster in CLUSTERS]))
    top = image(4 * PAGE, (CLUSTER, b"t" * CLUSTER), (PAGE, PAGE), backing_file="full")
    expected = bytearray(b"".join(CLUSTERS))
    expected[CLUSTER : 2 * CLUSTER] = b"t" * CLUSTER
    expected[PAGE : 2 * PAGE] = bytes(PAGE)
    assert contents(top, full) == expected == naive_chain_read([bytes(top.content), bytes(full.content)])


def test_a_file_may_end_with_its_last_compressed_byte() -> None:
    """QEMU leaves such files; the entry counts whole sectors."""
    packed = deflated(CLUSTERS[0])
    file = MemoryFile(compressed_image([packed]))
    del file.content[5 * PAGE + 7 + len(packed) :]
    assert runs(file)[0].host_length == len(packed)
    assert contents(file) == CLUSTERS[0]


def test_equal_compressed_entries_in_a_row_are_runs_of_a_cluster_each() -> None:
    file = MemoryFile(compressed_image([deflated(cluster) for cluster in CLUSTERS]))
    struct.pack_into(">4Q", file.content, 2 * PAGE, *[u64(file.content, 2 * PAGE)] * 4)
    assert [run.length for run in runs(file)] == [PAGE] * 4
    assert contents(file) == CLUSTERS[0] * 4


def test_compressed_clusters_a_cluster_apart_in_the_file_are_no_run_of_plain_data() -> None:
    file = MemoryFile(compressed_image([deflated(cluster).ljust(PAGE, b"?") for cluster in CLUSTERS[:3]]))
    assert [run.host_offset for run in runs(file)] == [5 * PAGE + 7, 6 * PAGE + 7, 7 * PAGE + 7]
    assert contents(file) == b"".join(CLUSTERS[:3])


@packings
@pytest.mark.parametrize(
    "bad",
    [
        lambda pack: pack(bytes(PAGE - 1)),
        lambda pack: pack(b""),
        lambda pack: b"\xff" * 100,
        lambda pack: bytes(100),
        lambda pack: pack(os.urandom(PAGE))[:-600],
    ],
    ids=["a byte short", "nothing", "ones", "zeroes", "cut off"],
)
def test_what_does_not_decompress_to_a_cluster_is_refused_where_it_is(
    pack: Pack, is_zstd: bool, bad: Callable[[Pack], bytes]
) -> None:
    file = MemoryFile(compressed_image([pack(CLUSTERS[0]), bad(pack)], is_zstd=is_zstd))
    reader = Qcow2Reader(file, name="b.qcow2")
    buffer = memoryview(bytearray(PAGE))
    chain_read_into([reader], buffer, 0)
    with pytest.raises(
        FormatError, match=f"4096 bytes compressed with {'zstd' if is_zstd else 'zlib'}"
    ) as refused:
        chain_read_into([reader], buffer[:1], PAGE + 9)
    assert refused.value.place == f"b.qcow2: compressed cluster of byte {PAGE + 9}"


@packings
def test_a_bomb_makes_no_more_than_a_cluster(pack: Pack, is_zstd: bool) -> None:
    bomb = pack(bytes(4 << 20))[: 2 * PAGE - 512]
    reader = Qcow2Reader(MemoryFile(compressed_image([bomb], is_zstd=is_zstd)))
    buffer = memoryview(bytearray(PAGE))
    tracemalloc.start()
    try:
        if is_zstd:
            with pytest.raises(FormatError, match="compressed with zstd"):
                chain_read_into([reader], buffer, 0)
        else:  # QEMU does not look at what follows the cluster either
            chain_read_into([reader], buffer, 0)
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


def test_a_zstd_frame_that_wants_much_memory_is_refused() -> None:
    """Its header claims a window of 16 MiB; one of 8 MiB is fine."""
    block = (PAGE << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x"
    frames = [bytes.fromhex("28b52ffd00") + bytes([exponent - 10 << 3]) + block for exponent in (23, 24)]
    reader = Qcow2Reader(MemoryFile(compressed_image(frames, is_zstd=True)))
    buffer = bytearray(PAGE)
    chain_read_into([reader], memoryview(buffer), 0)
    assert buffer == b"x" * PAGE
    with pytest.raises(FormatError, match="compressed with zstd"):
        chain_read_into([reader], memoryview(buffer), PAGE)


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
@pytest.mark.parametrize(
    ("offset", "length"), [(5, 1), (511, 1), (511, 2), (1 << 40, 512), ((1 << 40) + 511, 513)]
)
def test_a_compressed_entry_says_where_to_the_sector(cluster_bits: int, offset: int, length: int) -> None:
    entry = compressed_entry(offset, length, cluster_bits)
    start, most = compressed_place(entry, cluster_bits)
    assert (start, start + most) == compressed_range(entry, cluster_bits)
    assert (start, start + most) == (offset, -(-(offset + length) // 512) * 512)


# --- chains ---


def test_a_chain_names_the_layer_and_the_place_of_every_run() -> None:
    full = image(4 * CLUSTER, (0, b"f" * 3 * CLUSTER))
    middle = image(4 * CLUSTER, (CLUSTER, b"m" * CLUSTER), backing_file="full")
    top = image(4 * CLUSTER, (0, CLUSTER), backing_file="middle")
    readers = [Qcow2Reader(file) for file in (top, middle, full)]
    assert list(chain_extents(readers, 0, 4 * CLUSTER)) == [
        MappedRun(0, CLUSTER, Kind.ZERO),
        MappedRun(CLUSTER, CLUSTER, Kind.DATA, CLUSTER, layer=1),
        MappedRun(2 * CLUSTER, CLUSTER, Kind.DATA, 3 * CLUSTER, layer=2),
        MappedRun(3 * CLUSTER, CLUSTER, Kind.ZERO),
    ]


def test_past_the_end_of_a_shorter_backing_image_there_are_zeroes() -> None:
    full = image(8 * CLUSTER, (0, b"f" * 8 * CLUSTER))
    shrunk = image(2 * CLUSTER + 512, backing_file="full")
    grown = image(8 * CLUSTER, backing_file="shrunk")
    assert contents(grown, shrunk, full) == (b"f" * 3 * CLUSTER).ljust(8 * CLUSTER, b"\0")
    readers = [Qcow2Reader(file) for file in (grown, shrunk, full)]
    assert [run[:3] for run in chain_extents(readers, 5 * CLUSTER, 100)] == [(5 * CLUSTER, 100, Kind.ZERO)]


def test_an_empty_increment_is_a_restore_point() -> None:
    full = image(4 * CLUSTER, (CLUSTER, b"f" * CLUSTER))
    assert contents(image(4 * CLUSTER, backing_file="full"), full) == contents(full)


def test_a_chain_may_be_longer_than_calls_can_nest() -> None:
    full = image(CLUSTER, (0, b"f" * CLUSTER))
    increment = image(CLUSTER, backing_file="parent")
    assert contents(*[increment] * 3000, full) == b"f" * CLUSTER


def test_a_chain_that_does_not_end_in_its_only_full_image_is_refused() -> None:
    full, increment = Qcow2Reader(image(CLUSTER)), Qcow2Reader(image(CLUSTER, backing_file="full"))
    chains: list[list[Qcow2Reader]] = [[], [increment], [full, increment], [full, full, increment]]
    for readers in chains:
        with pytest.raises(InvalidArgument, match=f"{len(readers)} images are not a chain"):
            chain_extents(readers, 0, 0)
    assert list(chain_extents([increment, full], 0, 0)) == []


# --- the naive model measures what it should ---


def test_the_model_reads_an_image_cluster_by_cluster() -> None:
    full = image(3 * CLUSTER, (0, b"f" * 3 * CLUSTER))
    top = image(4 * CLUSTER, (0, b"t" * CLUSTER), (CLUSTER, CLUSTER), backing_file="full")
    read = naive_chain_read([bytes(top.content), bytes(full.content)])
    assert read == b"t" * CLUSTER + bytes(CLUSTER) + b"f" * CLUSTER + bytes(CLUSTER)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda content: struct.pack_into(">H", content, u64(content, u64(content, 48)) + 2, 2),
            "refcount 2",
        ),
        (
            lambda content: struct.pack_into(">H", content, u64(content, u64(content, 48)) + 2, 0),
            "refcount 0",
        ),
        (lambda content: content.extend(bytes(CLUSTER)), "unused"),
        (lambda content: content.extend(b"x"), "no whole clusters"),
        (lambda content: struct.pack_into(">B", content, u64(content, 40), 0), "COPIED is False"),
    ],
)
def test_the_model_sees_damaged_structures(damage: Any, said: str) -> None:
    content = image(TABLE_BYTES, (0, b"x" * CLUSTER)).content
    assert structure_problems(bytes(content)) == []
    damage(content)
    assert any(said in problem for problem in structure_problems(bytes(content)))


def test_the_fake_file_keeps_to_its_bounds() -> None:
    file = MemoryFile(b"abc")
    file.pwrite(b"xy", 4)
    assert file.content == b"abc\0xy"
    with pytest.raises(AssertionError):
        file.pread(2, 5)
    assert Header._fields == tuple(FIELDS)
