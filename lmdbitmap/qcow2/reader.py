"""Reads an image whose every byte may lie.

The header is checked when the image is opened, an L1 or L2 entry when the range it maps is asked for, a compressed
cluster when it is read. Anything unknown, unaligned or outside the file raises `FormatError`. Only two levels of tables
are followed, so nothing can loop. Nothing is allocated for a length that the file itself does not have, and compressed
data may expand to one cluster and no further. An L2 table that maps anything stands only once in the L1, so that a disk
has no more runs than the file has entries, whatever size it claims.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from lmdbitmap.errors import FormatError
from lmdbitmap.geometry import MAX_SIZE, ceil_div, check_range
from lmdbitmap.qcow2.compression import decompressed
from lmdbitmap.qcow2.first_table import FirstTable
from lmdbitmap.qcow2.layout import (
    COMPRESSED,
    COMPRESSION_FEATURE,
    COPIED,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_END,
    EXTENSION_STRUCT,
    HEADER_STRUCT,
    L1_RESERVED,
    L2_RESERVED,
    MAGIC,
    MAX_BACKING_NAME_BYTES,
    MAX_CLUSTER_BITS,
    MAX_L1_ENTRIES,
    MIN_CLUSTER_BITS,
    MIN_HEADER_BYTES,
    OFFSET_MASK,
    SECTOR,
    VERSION,
    ZERO,
    CompressionType,
    Header,
    compressed_place,
    decode_entries,
    is_text,
    l1_entries,
)

_FEATURES = {
    0: "dirty: refcounts may be wrong",
    1: "corrupt",
    2: "external data file",
    4: "extended L2 entries",
}
"""Incompatible features by bit. Each is refused, and so is any without a name here except the compression type's."""
_DAMAGED_FEATURES = 0b11
_REPAIR = "look at it with qemu-img check and use another backup"
_CONVERT = "make a plain copy with qemu-img convert -O qcow2 (and --bitmaps if it has any) and use that"


class ReadableFile(Protocol):
    """A file's bytes. Reads are whole or raise OSError; none goes past `size`."""

    @property
    def size(self) -> int: ...
    def pread(self, length: int, offset: int) -> bytes: ...
    def pread_into(self, buffer: memoryview, offset: int) -> None: ...


class Kind(enum.Enum):
    DATA = "data"
    COMPRESSED = "compressed"
    """Data too, but compressed in the file: only `fill` returns it. Each run is in one cluster."""
    ZERO = "zero"
    UNALLOCATED = "unallocated"
    """From the backing file; zeroes if there is none or it is too short."""


class MappedRun(NamedTuple):
    """Bytes [offset, offset + length) of the disk; for data, also where they begin in the file of `layer`.

    For compressed data, where the compressed bytes of their whole cluster begin, and how many of them there are at
    most.
    """

    offset: int
    length: int
    kind: Kind
    host_offset: int = 0
    layer: int = 0
    host_length: int = 0

    @property
    def is_stored(self) -> bool:
        """Whether the bytes are in a file, compressed or not."""
        return self.kind is Kind.DATA or self.kind is Kind.COMPRESSED

    @property
    def end(self) -> int:
        return self.offset + self.length

    def part(self, start: int, end: int) -> MappedRun:
        """Return bytes [start, end) of the run. A compressed run keeps the place of its whole cluster."""
        moved = start - self.offset if self.kind is Kind.DATA else 0
        return self._replace(offset=start, length=end - start, host_offset=self.host_offset + moved)

    def continues(self, other: MappedRun) -> bool:
        """Return whether this run begins where `other` ends: on the disk and, for data, in the file too.

        A compressed run never does, as it has its own place in the file, and is decompressed by itself.
        """
        host_offset = other.host_offset + other.length if self.kind is Kind.DATA else 0
        alike = (self.kind, self.layer) == (other.kind, other.layer)
        return alike and self.offset == other.end and self.host_offset == host_offset


class Qcow2Reader:
    """Reads one image in `source`, for one thread; every error names it `name`, and that of damage advises `repair`.

    Its backing file is left to the caller. The image may give any name for it: follow that only to where it is
    expected.
    """

    def __init__(self, source: ReadableFile, *, name: str = "qcow2 image", repair: str = _REPAIR) -> None:
        self.name = name
        self._repair = repair
        self._source = source
        self._file_size = source.size
        self.header = self._read_header()
        self.size = self.header.size
        self.cluster_size = 1 << self.header.cluster_bits
        self._table_entries = self.cluster_size // 8
        first_cluster = source.pread(min(self.cluster_size, self._file_size), 0)
        self.backing_file = self._decode_backing_file(first_cluster)
        self.backing_format = self._decode_backing_format(first_cluster)
        # More L1 entries, for a machine's memory and as anchors, are not read.
        needed = l1_entries(self.size, self.header.cluster_bits)
        self._first_table = FirstTable(source, self.header.l1_table_offset, needed)
        self._shared_tables = self._first_table.shared()
        self._cached_table = (0, _UNMAPPED, True)
        self._cached_cluster = (0, 0, b"")

    @property
    def compression_type(self) -> CompressionType:
        """The compression of its compressed clusters, if it has any."""
        return list(CompressionType)[_compression_number(self.header)]

    def extents(self, offset: int, length: int) -> Iterator[MappedRun]:
        """Yield what this file says of the range, without a gap, in runs as long as possible."""
        check_range(offset, length, self.size)
        return joined(self._runs(offset, offset + length)) if length else iter(())

    def fill(self, buffer: memoryview, run: MappedRun) -> None:
        """Fill `buffer` with the bytes that `run` begins with: from this file if they are there, else zeroes."""
        if run.kind is Kind.DATA:
            self._source.pread_into(buffer, run.host_offset)
        elif run.kind is Kind.COMPRESSED:
            start = run.offset % self.cluster_size
            buffer[:] = self._cluster_of(run, keep=len(buffer) < self.cluster_size)[start:][: len(buffer)]
        else:
            buffer[:] = bytes(len(buffer))

    def _cluster_of(self, run: MappedRun, *, keep: bool) -> memoryview:
        """Return the whole cluster of a compressed run; `keep` it if another part of it may be asked for next."""
        place = run.host_offset, run.host_length
        if self._cached_cluster[:2] == place:
            return memoryview(self._cached_cluster[2])
        packed = self._source.pread(run.host_length, run.host_offset)
        cluster = decompressed(self.compression_type, packed, self.cluster_size)
        if cluster is None:
            raise self._refusal(
                f"compressed cluster of byte {run.offset}",
                f"{self.cluster_size} bytes compressed with {self.compression_type.value}",
                f"something else in the file's bytes {run.host_offset}..{run.host_offset + run.host_length}",
            )
        if keep:
            self._cached_cluster = *place, cluster
        return memoryview(cluster)

    def _read_header(self) -> Header:
        if self._file_size < HEADER_STRUCT.size:
            raise self._refusal(
                "header", f"at least {HEADER_STRUCT.size} bytes", f"a file of {self._file_size}"
            )
        header = Header(*HEADER_STRUCT.unpack(self._source.pread(HEADER_STRUCT.size, 0)))
        self._check_dialect(header)
        for field, fits, expected in self._rules(header):
            if not fits:
                raise self._refusal(f"header {field}", expected, getattr(header, field))
        return header

    def _check_dialect(self, header: Header) -> None:
        """Refuse an image that is not qcow2, or needs a feature that is not supported here."""
        if header.magic != MAGIC:
            raise self._refusal("header magic", repr(MAGIC), header.magic, "give a finished qcow2 image")
        if header.version != VERSION:
            raise self._refusal("header version", str(VERSION), header.version, _CONVERT)
        features = header.incompatible_features & ~COMPRESSION_FEATURE
        present = [_FEATURES.get(bit, f"unknown bit {bit}") for bit in range(64) if features >> bit & 1]
        if present:
            next_step = None if features & _DAMAGED_FEATURES else _CONVERT
            raise self._refusal(
                "header incompatible_features", "none that is not read here", ", ".join(present), next_step
            )
        if header.crypt_method != 0:
            raise self._refusal("header crypt_method", "0 (not encrypted)", header.crypt_method, _CONVERT)

    def _rules(self, header: Header) -> Iterator[tuple[str, bool, str]]:
        """Yield (field, whether it fits, what is expected); each may rely on those before it."""
        yield "cluster_bits", MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS, "9 to 21"
        cluster_size = 1 << header.cluster_bits
        fits = header.header_length % 8 == 0 and MIN_HEADER_BYTES <= header.header_length <= cluster_size
        yield "header_length", fits, f"a multiple of 8, {MIN_HEADER_BYTES} to {cluster_size}"
        other_than_zlib = header.incompatible_features & COMPRESSION_FEATURE
        known = CompressionType.ZSTD if other_than_zlib else CompressionType.ZLIB
        fits = _compression_number(header) == known.number
        yield "compression_type", fits, f"{known.number} ({known.value}), as the features say"
        yield "refcount_order", header.refcount_order <= 6, "0 to 6"
        yield "size", header.size <= MAX_SIZE, "less than 2^63"
        needed = l1_entries(header.size, header.cluster_bits)
        yield "l1_size", needed <= header.l1_size <= MAX_L1_ENTRIES, f"{needed} to {MAX_L1_ENTRIES}"
        place = self._a_place(cluster_size)
        fits = self._is_place(header.l1_table_offset, 8 * header.l1_size, cluster_size)
        yield "l1_table_offset", fits, place
        refcount_table_bytes = header.refcount_table_clusters * cluster_size
        fits = self._is_place(header.refcount_table_offset, refcount_table_bytes, cluster_size)
        yield "refcount_table_offset", fits, place

    def _is_place(self, offset: int, length: int, cluster_size: int) -> bool:
        """Return whether a table can be there: on a cluster, behind the header's, inside the file."""
        return offset % cluster_size == 0 and cluster_size <= offset <= self._file_size - length

    def _a_place(self, cluster_size: int) -> str:
        return f"a multiple of {cluster_size}, all inside the file of {self._file_size} bytes"

    def _decode_backing_file(self, first_cluster: bytes) -> str | None:
        start, length = self.header.backing_file_offset, self.header.backing_file_size
        if start == 0:
            return None
        if not 0 < length <= MAX_BACKING_NAME_BYTES:
            raise self._refusal("header backing_file_size", f"1 to {MAX_BACKING_NAME_BYTES} bytes", length)
        if not self.header.header_length <= start <= len(first_cluster) - length:
            raise self._refusal("header backing_file_offset", "a place in the first cluster", start)
        return self._text("backing file name", first_cluster[start : start + length])

    def extension(self, wanted: int) -> bytes | None:
        """Return what the header extension of that type holds; None if there is none."""
        return self._extension(self._source.pread(min(self.cluster_size, self._file_size), 0), wanted)

    def _decode_backing_format(self, first_cluster: bytes) -> str | None:
        held = self._extension(first_cluster, EXTENSION_BACKING_FORMAT)
        return None if held is None else self._text("backing format", held)

    def _extension(self, first_cluster: bytes, wanted: int) -> bytes | None:
        position = self.header.header_length
        stop = self.header.backing_file_offset or len(first_cluster)
        while position + EXTENSION_STRUCT.size <= stop:
            kind, length = EXTENSION_STRUCT.unpack_from(first_cluster, position)
            position += EXTENSION_STRUCT.size
            if kind == EXTENSION_END:
                break
            if length > stop - position:
                raise self._refusal(f"header extension {kind:#x}", f"at most {stop - position} bytes", length)
            if kind == wanted:
                return first_cluster[position : position + length]
            position += ceil_div(length, 8) * 8
        return None

    def _text(self, place: str, data: bytes) -> str:
        if not is_text(data):
            raise self._refusal(place, "UTF-8 without a zero byte", repr(data[:80]))
        return data.decode()

    def _runs(self, offset: int, end: int) -> Iterator[MappedRun]:
        bits = self.header.cluster_bits
        for first, stop, entry in self._mapped(offset >> bits, ceil_div(end, self.cluster_size)):
            start = max(first << bits, offset)
            yield self._run(start, min(stop << bits, end), entry, start - (first << bits))

    def _run(self, start: int, end: int, entry: int, skipped: int) -> MappedRun:
        """Return the run that begins `skipped` bytes into the cluster of `entry`."""
        place = f"L2 entry of byte {start}"
        if entry & COMPRESSED:
            return self._compressed_run(MappedRun(start, end - start, Kind.COMPRESSED), place, entry)
        host_offset = entry & OFFSET_MASK
        copied_nothing = entry & COPIED and not host_offset
        if entry & L2_RESERVED or copied_nothing or host_offset % self.cluster_size:
            raise self._refusal(place, f"known flags and a multiple of {self.cluster_size}", f"{entry:#x}")
        if entry & ZERO or not host_offset:
            return MappedRun(start, end - start, Kind.ZERO if entry & ZERO else Kind.UNALLOCATED)
        if host_offset + skipped + end - start > self._file_size:
            raise self._refusal(place, f"data inside the file of {self._file_size} bytes", f"{entry:#x}")
        return MappedRun(start, end - start, Kind.DATA, host_offset + skipped)

    def _compressed_run(self, run: MappedRun, place: str, entry: int) -> MappedRun:
        """Return the run with its place in the file, which may end within the last sector that the entry counts."""
        host_offset, host_length = compressed_place(entry, self.header.cluster_bits)
        stop = min(host_offset + host_length, ceil_div(self._file_size, SECTOR) * SECTOR)
        inside = self.cluster_size <= host_offset < self._file_size and stop == host_offset + host_length
        if entry & COPIED or not inside:
            expected = f"compressed data inside the file of {self._file_size} bytes, not COPIED"
            raise self._refusal(place, expected, f"{entry:#x}")
        return run._replace(host_offset=host_offset, host_length=min(stop, self._file_size) - host_offset)

    def _mapped(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first cluster, stop, L2 entry of the first) of stretches that lie in the file as on the disk."""
        per_table = self._table_entries
        pointers = self._first_table.runs(first // per_table, ceil_div(stop, per_table))
        for index, end_index, pointer in pointers:
            table, uniform = self._load_table(index, pointer)
            if uniform:
                yield max(index * per_table, first), min(end_index * per_table, stop), table[0]
            else:
                for base in range(index * per_table, end_index * per_table, per_table):
                    start, end = max(first - base, 0), min(stop - base, per_table)
                    yield from _stretches(table, start, end, base, self.cluster_size)

    def _load_table(self, index: int, pointer: int) -> tuple[array[int], bool]:
        """Return the L2 table that an L1 entry points to, and whether all of it is one entry without an offset."""
        offset = pointer & OFFSET_MASK
        inside = not offset or self._is_place(offset, self.cluster_size, self.cluster_size)
        if pointer & L1_RESERVED or not inside:
            raise self._refusal(f"L1 entry {index}", self._a_place(self.cluster_size), f"{pointer:#x}")
        if offset == 0:
            return _UNMAPPED, True
        if self._cached_table[0] != offset:
            raw = self._source.pread(self.cluster_size, offset)
            table = decode_entries(raw)
            uniform = not table[0] & OFFSET_MASK and raw == raw[:8] * self._table_entries
            if not uniform and offset in self._shared_tables:
                raise self._refusal(f"L1 entry {index}", "an L2 table of its own", f"{pointer:#x}, shared")
            self._cached_table = offset, table, uniform
        return self._cached_table[1:]

    def _refusal(self, place: str, expected: str, found: object, next_step: str | None = None) -> FormatError:
        step = next_step or self._repair
        return FormatError(f"{self.name}: {place}", expected=expected, found=found, next_step=step)


_UNMAPPED = array("Q", [0])
_BLOCK = 128
"""Entries compared at once."""


def _compression_number(header: Header) -> int:
    """Return the compression's number. A short header lacks the field, and something else may be in its place."""
    return header.compression_type if header.header_length > MIN_HEADER_BYTES else 0


def _stretches(
    entries: array[int], start: int, count: int, base: int, cluster_size: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (first cluster, stop, first entry) of stretches whose offsets rise by a cluster, or are all absent.

    They are of the entries [start, count) of the table whose first cluster is `base`. A compressed cluster is a stretch
    of its own, wherever the next one begins.
    """
    while start < count:
        entry = entries[start]
        step = cluster_size if entry & OFFSET_MASK else 0
        stop = start + 1 if step or entry & COMPRESSED else _end_of_alike(entries, start, count)
        follower = entry + step
        while stop < count and entries[stop] == follower and not entry & COMPRESSED:
            stop += 1
            follower += step
        yield base + start, base + stop, entry
        start = stop


def _end_of_alike(entries: array[int], start: int, count: int) -> int:
    """Return where the entries equal to the first of [start, count) end, or a little before.

    Most of an increment's tables is absent, and is passed over in blocks.
    """
    stop = start + 1
    if start + _BLOCK >= count or entries[start + _BLOCK] != entries[start]:
        return stop
    alike = entries[start:stop] * _BLOCK
    while stop + _BLOCK <= count and entries[stop : stop + _BLOCK] == alike:
        stop += _BLOCK
    return stop


def joined(runs: Iterable[MappedRun]) -> Iterator[MappedRun]:
    last: MappedRun | None = None
    for run in runs:
        if last is not None and run.continues(last):
            last = last._replace(length=last.length + run.length)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
