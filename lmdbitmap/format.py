"""The flat bitmap file, version 1: the portable form of a bitmap. `docs/format.md` is the specification.

    0         256                header_size         header_size + bits_size
    | fields  | metadata, zeroes | bits              |  end of file
    |<---- header_checksum ----->|<- bits_checksum ->|

Values in, values out: nothing here opens a file, and a bitmap of any size streams through in constant memory.

A file is trusted only in this order: `decode_header` proves the header; `trusted_bits` refuses a file whose CLEAN flag
is not set, and proves the bits while it passes them on. A writer begins with a header that is not CLEAN, as every new
`FlatHeader` is. It gets the CLEAN header from `sealed` only for the tally of all the bits. So neither a half-written
file nor a half-read one passes for a bitmap.
"""

from __future__ import annotations

import enum
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple, TypeAlias, TypeVar, get_type_hints

from lmdbitmap import bits
from lmdbitmap.errors import FormatError, InvalidArgument, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.flat_file import plain_map
from lmdbitmap.flat_file.checksum import crc32_with_zeroes
from lmdbitmap.geometry import MAX_GRANULARITY_BITS, MAX_SIZE, MIN_GRANULARITY_BITS, Geometry, ceil_div
from lmdbitmap.interfaces import Buffer

MAGIC = bytes.fromhex("89 4C 44 42 4D 0D 0A 1A")
MAJOR_VERSION = 1
MINOR_VERSION = 0
FIXED_SIZE = 256
"""Bytes of the fixed fields; the metadata follows them."""
HEADER_ALIGNMENT = 4096
MAX_HEADER_SIZE = 1 << 20
"""This many bytes from the start of a file are enough for `decode_header`, whatever the file says."""
WORD_BITS = 64
"""The bits are padded with zeroes to a multiple of this."""

Metadata: TypeAlias = Mapping[str, object]
"""Names and remarks for people: strings, integers, booleans, None, and lists and dicts of them."""


class Zeroes(NamedTuple):
    """`length` bytes of clean bits, such as a hole in a file, without the bytes themselves."""

    length: int


Chunk: TypeAlias = Buffer | Zeroes
"""A piece of a stream of a bitmap's bits."""
C = TypeVar("C", bound=Chunk)

NO_UUID = uuid.UUID(int=0)
_EXPORT_AGAIN = "do not use this file; export the bitmap again or make a full backup"
_READ_NEWER = "read it with a newer version of lmdbitmap"


class Flags(enum.IntFlag):
    CLEAN = 1
    """The bits are complete and safe to use."""
    RECORDING = 2
    """The period was still open when the bits were taken."""
    SUPERSET = 4
    """The bits may name clean blocks as dirty, never the other way round."""


NO_FLAGS = Flags(0)
KNOWN_FLAGS = Flags.CLEAN | Flags.RECORDING | Flags.SUPERSET


U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
Uuid = Annotated[bytes, "16s"]


class _Fields(NamedTuple):
    """The fixed fields in file order, each with its struct code."""

    magic: Annotated[bytes, "8s"]
    major_version: U16
    minor_version: U16
    header_size: U32
    incompatible_features: U64
    compatible_features: U64
    flags: U64
    disk_size: U64
    granularity_bits: U32
    reserved: U32
    bit_count: U64
    bits_size: U64
    dirty_count: U64
    bitmap_uuid: Uuid
    disk_uuid: Uuid
    epoch_uuid: Uuid
    since_uuid: Uuid
    until_uuid: Uuid
    since_time_ns: U64
    metadata_length: U32
    bits_checksum: U32
    reserved_space: Annotated[bytes, "76s"]
    header_checksum: U32


_CODES = [hint.__metadata__[0] for hint in get_type_hints(_Fields, include_extras=True).values()]
_LAYOUT = struct.Struct("<" + "".join(_CODES))
OFFSETS = {name: struct.calcsize("<" + "".join(_CODES[:index])) for index, name in enumerate(_Fields._fields)}
"""Where each fixed field begins, in bytes from the start of the file."""
assert _LAYOUT.size == FIXED_SIZE


@dataclass(frozen=True, slots=True)
class FlatHeader:
    """The fields of a header. A new header is not CLEAN: see `sealed`."""

    disk_size: int
    granularity_bits: int
    bitmap_uuid: uuid.UUID
    disk_uuid: uuid.UUID
    epoch_uuid: uuid.UUID
    since_uuid: uuid.UUID
    """The checkpoint that the changes count from."""
    until_uuid: uuid.UUID | None
    """The checkpoint that they count to, None while the period is open."""
    since_time_ns: int
    """When `since_uuid` was made, in Unix nanoseconds."""
    flags: Flags = NO_FLAGS
    dirty_count: int = 0
    bits_checksum: int = 0
    header_size: int = field(default=HEADER_ALIGNMENT, compare=False)
    """Where the bits begin; worked out anew from the metadata whenever a header is encoded."""

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.disk_size, self.granularity_bits)

    @property
    def bit_count(self) -> int:
        return self.geometry.block_count

    @property
    def bits_size(self) -> int:
        """Bytes of bits in the file."""
        return _bits_size(self.bit_count)

    @property
    def clean(self) -> bool:
        return Flags.CLEAN in self.flags

    @property
    def trust(self) -> Trust:
        if not self.clean:
            return Trust.UNTRUSTED
        return Trust.SUPERSET if Flags.SUPERSET in self.flags else Trust.EXACT

    def unsealed(self) -> FlatHeader:
        """Return the header to write and sync before the first bit changes."""
        return replace(self, flags=self.flags & ~Flags.CLEAN, dirty_count=0, bits_checksum=0)

    def sealed(self, tally: BitsTally) -> FlatHeader:
        """Return the CLEAN header to write once all bits are on disk; `tally` must have counted all of them."""
        assert tally.size == self.bits_size, f"{tally.size} bytes of bits, not {self.bits_size}"
        assert not tally.tail_dirty, "bits past the end of the disk are set"
        flags = self.flags | Flags.CLEAN
        return replace(self, flags=flags, dirty_count=tally.dirty_count, bits_checksum=tally.checksum)


def encode_header(header: FlatHeader, metadata: Metadata) -> bytes:
    """Return the whole header, to be written at offset 0; the bits begin at its end.

    The same header and metadata always give the same bytes. Raises `InvalidArgument` for metadata that the file cannot
    hold.
    """
    try:
        plain, packed = plain_map.pack(metadata)
    except ValueError as error:
        raise _bad_metadata(str(error)) from None
    header_size = HEADER_ALIGNMENT * ceil_div(FIXED_SIZE + len(packed), HEADER_ALIGNMENT)
    if header_size > MAX_HEADER_SIZE:
        raise _bad_metadata(f"{len(packed)} bytes are more than a header holds")
    fields = _fields_of(replace(header, header_size=header_size), len(packed))
    area = _checksummed((_LAYOUT.pack(*fields) + packed).ljust(header_size, b"\0"))
    reread = decode_header(area, file_size=header_size + header.bits_size, place="the header just encoded")
    assert reread == (header, plain), f"{reread} is not {(header, plain)}"
    return area


def decode_header(prefix: bytes, *, file_size: int, place: str) -> tuple[FlatHeader, Metadata]:
    """Prove and return the header of a file of `file_size` bytes that begins with `prefix`. Raises `FormatError`.

    `prefix` is the first `MAX_HEADER_SIZE` bytes, or the whole file if that is shorter. A file that is not CLEAN
    decodes too, and may end anywhere after its header: it names its disk, but its bits mean nothing.
    """
    fields = _decode_fixed(prefix, place)
    _check_versions(fields, place)
    area = _header_area(fields, prefix, place)
    _check_features(fields, place)
    _check_sizes(fields, place)
    _check_end(fields, file_size, place)
    return _header_of(fields), _unpack_metadata(fields, area, place)


def without_clean(area: bytes) -> bytes:
    """Return a proven header with its CLEAN flag cleared and its checksum updated.

    Only the first 256 bytes differ, and fields of a later minor version, unknown to us, are kept.
    """
    cleared = bytearray(area)
    cleared[OFFSETS["flags"]] &= ~Flags.CLEAN & 0xFF  # the flag lives in the lowest byte
    return _checksummed(bytes(cleared))


@dataclass(slots=True)
class BitsTally:
    """Counts what the header must say about the bits, in chunks of any length."""

    bit_count: int
    size: int = 0
    """Bytes seen so far."""
    dirty_count: int = 0
    checksum: int = 0
    tail_dirty: bool = False
    """Whether a bit at or past `bit_count` was set."""

    def add(self, chunk: Chunk) -> None:
        if isinstance(chunk, Zeroes):
            self.checksum = crc32_with_zeroes(self.checksum, chunk.length)
            self.size += chunk.length
            return
        stop = 8 * len(chunk)
        first_past_end = min(max(self.bit_count - 8 * self.size, 0), stop)
        self.tail_dirty |= bits.any_one(bits.bitmap_view(chunk), first_past_end, stop)
        self.dirty_count += bits.count_ones(chunk)
        self.checksum = zlib.crc32(chunk, self.checksum)
        self.size += len(chunk)


def trusted_bits(header: FlatHeader, chunks: Iterable[C], *, place: str) -> Iterator[C]:
    """Pass on `chunks`, the file's bytes from `header_size` to its end, while proving them.

    Raises `Untrusted` before the first chunk if the file is not CLEAN, and `FormatError` after the last one if the
    bits do not match the header: keep none of them until then.
    """
    if not header.clean:
        raise Untrusted(
            f"{place} was not closed cleanly, so its bits say nothing about what changed",
            next_step="take the whole disk as dirty and make a full backup",
        )
    return _proven_bits(header, chunks, place)


def _proven_bits(header: FlatHeader, chunks: Iterable[C], place: str) -> Iterator[C]:
    tally = BitsTally(header.bit_count)
    where = f"{place}, bits from byte {header.header_size}"
    for chunk in chunks:
        tally.add(chunk)
        _require(tally.size <= header.bits_size, where, f"{header.bits_size} bytes", "more")
        yield chunk
    _require(tally.size == header.bits_size, where, f"{header.bits_size} bytes", tally.size)
    checksum, dirty_count = header.bits_checksum, header.dirty_count
    _require(tally.checksum == checksum, where, f"checksum {checksum:#010x}", f"{tally.checksum:#010x}")
    _require(not tally.tail_dirty, where, f"zeroes past bit {header.bit_count}", "ones")
    _require(tally.dirty_count == dirty_count, where, f"{dirty_count} set bits", tally.dirty_count)


def _bits_size(bit_count: int) -> int:
    return WORD_BITS // 8 * ceil_div(bit_count, WORD_BITS)


def _fields_of(header: FlatHeader, metadata_length: int) -> _Fields:
    return _Fields(
        magic=MAGIC,
        major_version=MAJOR_VERSION,
        minor_version=MINOR_VERSION,
        header_size=header.header_size,
        incompatible_features=0,
        compatible_features=0,
        flags=header.flags,
        disk_size=header.disk_size,
        granularity_bits=header.granularity_bits,
        reserved=0,
        bit_count=header.bit_count,
        bits_size=header.bits_size,
        dirty_count=header.dirty_count,
        bitmap_uuid=header.bitmap_uuid.bytes,
        disk_uuid=header.disk_uuid.bytes,
        epoch_uuid=header.epoch_uuid.bytes,
        since_uuid=header.since_uuid.bytes,
        until_uuid=(header.until_uuid or NO_UUID).bytes,
        since_time_ns=header.since_time_ns,
        metadata_length=metadata_length,
        bits_checksum=header.bits_checksum,
        reserved_space=b"",
        header_checksum=0,
    )


def _header_of(fields: _Fields) -> FlatHeader:
    until = uuid.UUID(bytes=fields.until_uuid)
    return FlatHeader(
        disk_size=fields.disk_size,
        granularity_bits=fields.granularity_bits,
        bitmap_uuid=uuid.UUID(bytes=fields.bitmap_uuid),
        disk_uuid=uuid.UUID(bytes=fields.disk_uuid),
        epoch_uuid=uuid.UUID(bytes=fields.epoch_uuid),
        since_uuid=uuid.UUID(bytes=fields.since_uuid),
        until_uuid=None if until == NO_UUID else until,
        since_time_ns=fields.since_time_ns,
        flags=Flags(fields.flags),
        dirty_count=fields.dirty_count,
        bits_checksum=fields.bits_checksum,
        header_size=fields.header_size,
    )


def _header_checksum(area: bytes) -> int:
    """Return the CRC-32 of the whole header with its own field as zero."""
    start = OFFSETS["header_checksum"]
    return zlib.crc32(area[start + 4 :], zlib.crc32(area[:start] + bytes(4)))


def _checksummed(area: bytes) -> bytes:
    start = OFFSETS["header_checksum"]
    return area[:start] + struct.pack("<I", _header_checksum(area)) + area[start + 4 :]


def _decode_fixed(prefix: bytes, place: str) -> _Fields:
    _require(len(prefix) >= FIXED_SIZE, place, f"at least {FIXED_SIZE} bytes", len(prefix))
    fields = _Fields(*_LAYOUT.unpack_from(prefix))
    _require_field(fields, "magic", fields.magic == MAGIC, MAGIC.hex(" "), place)
    return fields


def _check_versions(fields: _Fields, place: str) -> None:
    """Require our major version. Any minor version will do: its additions are ignorable or incompatible features."""
    known = fields.major_version == MAJOR_VERSION
    _require_field(fields, "major_version", known, str(MAJOR_VERSION), place, _READ_NEWER)


def _header_area(fields: _Fields, prefix: bytes, place: str) -> bytes:
    """Return the header after proving its checksum; from here on the fields are as they were written."""
    size = fields.header_size
    sound = HEADER_ALIGNMENT <= size <= MAX_HEADER_SIZE and size % HEADER_ALIGNMENT == 0
    _require_field(fields, "header_size", sound, "a multiple of 4096 from 4096 to 1 MiB", place)
    _require(len(prefix) >= size, place, f"a header of {size} bytes", f"only {len(prefix)}")
    area = prefix[:size]
    checksum = _header_checksum(area)
    _require_field(fields, "header_checksum", fields.header_checksum == checksum, str(checksum), place)
    return area


def _check_features(fields: _Fields, place: str) -> None:
    features = fields.incompatible_features
    _require_field(fields, "incompatible_features", features == 0, "no unknown bit", place, _READ_NEWER)
    unknown = fields.flags & ~int(KNOWN_FLAGS)
    _require_field(fields, "flags", unknown == 0, "only CLEAN, RECORDING and SUPERSET", place)
    _require_field(fields, "reserved", fields.reserved == 0, "0", place)
    _require_field(fields, "reserved_space", not any(fields.reserved_space), "zeroes", place)
    consistent = not fields.flags & Flags.RECORDING or not any(fields.until_uuid)
    _require_field(fields, "until_uuid", consistent, "zeroes while RECORDING is set", place)


def _check_sizes(fields: _Fields, place: str) -> None:
    exponent, size = fields.granularity_bits, fields.disk_size
    allowed = MIN_GRANULARITY_BITS <= exponent <= MAX_GRANULARITY_BITS
    _require_field(fields, "granularity_bits", allowed, "9 to 31", place)
    _require_field(fields, "disk_size", size <= MAX_SIZE, "at most 2^63-1", place)
    bit_count = Geometry(size, exponent).block_count
    bits_size = _bits_size(bit_count)
    _require_field(fields, "bit_count", fields.bit_count == bit_count, str(bit_count), place)
    _require_field(fields, "bits_size", fields.bits_size == bits_size, str(bits_size), place)
    _require_field(fields, "dirty_count", fields.dirty_count <= bit_count, f"at most {bit_count}", place)


def _check_end(fields: _Fields, file_size: int, place: str) -> None:
    """Require the exact size of a CLEAN file. One that is not CLEAN, left by a dead writer, may have any size."""
    if fields.flags & Flags.CLEAN:
        size = fields.header_size + fields.bits_size
        _require(file_size == size, place, f"a file of {size} bytes", file_size)


def _unpack_metadata(fields: _Fields, area: bytes, place: str) -> Metadata:
    length, room = fields.metadata_length, fields.header_size - FIXED_SIZE
    _require_field(fields, "metadata_length", length <= room, f"at most {room}", place)
    end = FIXED_SIZE + length
    _require(not any(area[end:]), f"{place}, byte {end}", "zeroes after the metadata", "other bytes")
    try:
        return plain_map.unpack(area[FIXED_SIZE:end])
    except ValueError as error:
        raise FormatError(
            f"{place}, metadata at byte {FIXED_SIZE}",
            expected="one msgpack map with sorted string keys",
            found=f"other bytes ({error})",
            next_step=_EXPORT_AGAIN,
        ) from None


def _bad_metadata(problem: str) -> InvalidArgument:
    return InvalidArgument(
        f"the metadata does not fit a flat bitmap file: {problem}",
        next_step=f"use strings, integers, booleans and short lists, {MAX_HEADER_SIZE >> 10} KiB in all",
    )


def _require(truth: bool, place: str, expected: str, found: object, next_step: str = _EXPORT_AGAIN) -> None:
    if not truth:
        raise FormatError(place, expected=expected, found=found, next_step=next_step)


def _require_field(
    fields: _Fields, name: str, truth: bool, expected: str, place: str, next_step: str = _EXPORT_AGAIN
) -> None:
    """Call `_require` for one field; the message gives its name and position."""
    found = getattr(fields, name)
    shown = found.hex(" ") if isinstance(found, bytes) else found
    _require(truth, f"{place}, {name} at byte {OFFSETS[name]}", expected, shown, next_step)
