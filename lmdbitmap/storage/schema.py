"""What the store's records mean: keys, region records, and the descriptions of disks, checkpoints and bitmaps.

Integers in keys are big-endian, so LMDB's order is theirs. A description is one msgpack map with a key `schema`,
followed by its CRC-32. A newer schema is refused, and so is an unknown key in a known schema. A region record is

    offset  size
    0       8     armed mask, little-endian: bit e guards blocks 64*e .. 64*e+63 of the region
    8       512   exact bits, least significant first
    520     4     CRC-32 of the record's key and the 520 bytes before, little-endian

A block is dirty if its exact bit is set or its extent is armed. An absent record means all clean. A record that fails
its check is all dirty, and marked as damaged. See docs/store.md.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar
from uuid import UUID
from zlib import crc32

import msgpack

from lmdbitmap.errors import FormatError, InvalidArgument
from lmdbitmap.geometry import REGION_BYTES, Geometry
from lmdbitmap.interfaces import DeviceTrace, ImageIdentity
from lmdbitmap.work.names import require_text

SCHEMA_VERSION = 1
"""The schema of every description but a disk's, which has its own."""
STORE_MAGIC = "lmdbitmap store"

MAX_NAME_BYTES = 1023
"""Longest name of a checkpoint or a bitmap, as in QEMU."""
MAX_DISK_NAME_BYTES = 200
"""Longest name of a disk, which also names a folder of a repository and an NBD export."""

WRITE_AHEAD = "write-ahead"
DEFERRED = "deferred"
DURABILITIES = (WRITE_AHEAD, DEFERRED)
GUEST_FIRST = "guest-first"
STRICT = "strict"
POLICIES = (GUEST_FIRST, STRICT)

_REGION = struct.Struct(f"<Q{REGION_BYTES}sI")
REGION_RECORD_BYTES = _REGION.size
_CHECKSUM_BYTES = 4
_MAX_ITEMS = 64
"""Most items in a map or an array of a description: more than any has, so no length in it makes us take memory."""
_BITMAP_KEY = struct.Struct(">Q")
_REGION_KEY = struct.Struct(">QQ")
_CHECKPOINT_KEY = struct.Struct(">16sQ")

ALL_CLEAN_BITS = bytes(REGION_BYTES)
ALL_DIRTY_BITS = b"\xff" * REGION_BYTES


class Region(NamedTuple):
    """One region record: a block is dirty if its bit is set or its extent is armed."""

    armed: int
    bits: bytes
    damaged: bool = False


def region_key(bitmap_id: int, region: int) -> bytes:
    return _REGION_KEY.pack(bitmap_id, region)


def parse_region_key(key: bytes) -> tuple[int, int]:
    if len(key) != _REGION_KEY.size:
        raise _error("region record", f"key {key.hex()}", f"a key of {_REGION_KEY.size} bytes", len(key))
    bitmap_id, region = _REGION_KEY.unpack(key)
    return bitmap_id, region


def bitmap_key(bitmap_id: int) -> bytes:
    return _BITMAP_KEY.pack(bitmap_id)


def checkpoint_key(disk_uuid: UUID, sequence: int) -> bytes:
    return _CHECKPOINT_KEY.pack(disk_uuid.bytes, sequence)


def encode_region(key: bytes, armed: int, bits: bytes) -> bytes:
    body = armed.to_bytes(8, "little") + bits
    return body + crc32(body, crc32(key)).to_bytes(4, "little")


def decode_region(key: bytes, value: bytes) -> Region:
    """Return the record; an all-dirty one marked `damaged` if its bytes or its key are not what was written."""
    if len(value) != REGION_RECORD_BYTES:
        return Region(0, ALL_DIRTY_BITS, damaged=True)
    armed, bits, checksum = _REGION.unpack(value)
    if crc32(value[:-4], crc32(key)) != checksum:
        return Region(0, ALL_DIRTY_BITS, damaged=True)
    return Region(armed, bits)


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """The record that makes a folder a store."""

    what: ClassVar[str] = "store header"
    schema: ClassVar[int] = SCHEMA_VERSION
    magic: str
    uuid: UUID


@dataclass(frozen=True, slots=True)
class Disk:
    """A tracked image. `session` is set while an owner is attached: the clean flag, inverted.

    Schema 1 had no `trace` in the identity. Read as None, it makes a block device untrusted, and a file no less
    trusted than it was.
    """

    what: ClassVar[str] = "disk description"
    schema: ClassVar[int] = 2
    uuid: UUID
    name: str
    image: str
    size: int
    granularity_bits: int
    epoch: UUID
    epoch_number: int
    epoch_reason: str
    durability: str
    policy: str
    created_ns: int
    next_sequence: int
    identity: ImageIdentity | None = None
    session: UUID | None = None
    resizing_from: int | None = None
    """The other size of a resize that has begun; either is right until it ends."""

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size, self.granularity_bits)


def portrait(disk: Disk) -> Disk:
    """Return the part of a description worth keeping outside the store: what the disk is, without its state."""
    return dataclasses.replace(
        disk,
        epoch=UUID(int=0),
        epoch_reason="",
        next_sequence=1,
        identity=None,
        session=None,
        resizing_from=None,
    )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A named, durable point in time; its bitmap records what changed from it to the next one."""

    what: ClassVar[str] = "checkpoint description"
    schema: ClassVar[int] = SCHEMA_VERSION
    disk: UUID
    sequence: int
    name: str
    uuid: UUID
    time_ns: int
    epoch: UUID
    bitmap_id: int


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A set of region records. A reason in `all_dirty` makes every block dirty whatever they say."""

    what: ClassVar[str] = "bitmap description"
    schema: ClassVar[int] = SCHEMA_VERSION
    id: int
    uuid: UUID
    size: int
    granularity_bits: int
    name: str | None = None
    """The name of a stand-alone bitmap; None for a checkpoint's bitmap."""
    all_dirty: str | None = None
    superset: str | None = None
    """Why it may name clean blocks as dirty."""
    origin_disk: UUID | None = None
    origin_epoch: UUID | None = None
    origin_since: UUID | None = None
    origin_until: UUID | None = None
    origin_time_ns: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size, self.granularity_bits)


Description = StoreHeader | Disk | Checkpoint | Bitmap
D = TypeVar("D", bound=Description)


def encode(description: Description) -> bytes:
    """Return the record, and remember what it decodes to: a description that was changed is read again soon."""
    record = _encoded(description, description.schema)
    assert decode(type(description), record, place="new record") == description
    return record


def _encoded(description: Description, version: int) -> bytes:
    fields = {name: _plain(getattr(description, name)) for name in _types_of(type(description))}
    if version < description.schema and isinstance(description, Disk) and description.identity is not None:
        fields["identity"] = list(description.identity[:-1])
    return seal(msgpack.packb({"schema": version, **fields}))


def seal(packed: bytes) -> bytes:
    """Append the CRC-32, so that one flipped bit does not make another description."""
    return packed + crc32(packed).to_bytes(_CHECKSUM_BYTES, "little")


def is_whole(record: bytes) -> bool:
    """Return whether a description's bytes match their CRC-32, in any schema."""
    return seal(record[:-_CHECKSUM_BYTES]) == record


def decode(kind: type[D], data: bytes, *, place: str) -> D:
    """Return the description in `data`. Raise `FormatError` for anything that `encode` would not have written."""
    try:
        description: D = _remembered(kind, data)
    except _Odd as odd:
        raise _error(kind.what, place, odd.expected, odd.found) from odd
    return description


class _Odd(Exception):
    """Bytes that are not a description; `decode` adds the place."""

    def __init__(self, expected: str, found: object) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


def _decoded(kind: type[D], data: bytes) -> D:
    fields = _unpack_map(data)
    version = fields.pop("schema", None)
    if not isinstance(version, int) or not 1 <= version <= kind.schema:
        raise _Odd(f"schema {kind.schema} or older", _shown(version))
    if kind is Disk and version == 1 and isinstance(fields.get("identity"), list):
        fields["identity"].append(None)
    types = _types_of(kind)
    if fields.keys() != types.keys():
        odd = sorted(str(name) for name in set(fields) ^ set(types))
        raise _Odd("the keys of its schema", f"a difference in {ascii(odd)[:200]}")
    values: dict[str, Any] = {name: _typed(name, types[name], fields[name]) for name in types}
    try:
        description: D = kind(**values)
        if isinstance(description, Disk | Bitmap):
            _ = description.geometry
    except InvalidArgument as error:
        raise _Odd("a possible size and granularity", error.problem) from error
    if isinstance(description, Disk):
        _check_modes(description)
    if _encoded(description, int(version)) != data:
        raise _Odd("its fields in their own order, once and in short", "other bytes")
    return description


_remembered: Callable[..., Any] = functools.lru_cache(maxsize=4096)(_decoded)
"""`_decoded` with its last results, a kilobyte each: a checkpoint reads its disk's whole chain while writers wait."""


def _types(kind: type[Description]) -> dict[str, tuple[str, bool]]:
    """Return the type of each field, and whether it may be None."""
    types = {field.name: str(field.type).partition(" | ") for field in dataclasses.fields(kind)}
    return {name: (word, other == "None") for name, (word, _, other) in types.items()}


_types_of: Callable[..., dict[str, tuple[str, bool]]] = functools.cache(_types)


def _check_modes(disk: Disk) -> None:
    """Refuse an unknown mode: what it promises about the bits is unknown."""
    if disk.durability not in DURABILITIES or disk.policy not in POLICIES:
        raise _Odd(f"one of {DURABILITIES}, one of {POLICIES}", (disk.durability, disk.policy))


def _unpack_map(data: bytes) -> dict[Any, Any]:
    if not is_whole(data):
        raise _Odd("a record that matches its CRC-32", f"{len(data)} bytes that do not")
    try:
        fields = msgpack.unpackb(
            data[:-_CHECKSUM_BYTES],
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_ext_len=0,
            strict_map_key=True,
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise _Odd("one msgpack map", f"{len(data)} bytes that are none") from error
    if not isinstance(fields, dict):
        raise _Odd("a msgpack map", type(fields).__name__)
    return fields


def _plain(value: object) -> object:
    if isinstance(value, UUID):
        return value.bytes
    if isinstance(value, ImageIdentity):
        return [*value[:-1], None if value.trace is None else list(value.trace)]
    return value


def _typed(name: str, wanted: tuple[str, bool], value: object) -> object:
    """Return `value` as the type that the field wants: the inverse of `_plain`, checked."""
    kind, is_optional = wanted
    if value is None and is_optional:
        return None
    if kind == "UUID" and isinstance(value, bytes) and len(value) == 16:
        return UUID(bytes=value)
    if kind == "ImageIdentity" and isinstance(value, list) and (identity := _identity(value)) is not None:
        return identity
    if (kind == "int" and type(value) is int and value >= 0) or (kind == "str" and type(value) is str):
        return value
    raise _Odd(f"{name} of type {kind}{' | None' if is_optional else ''}", _shown(value))


def _shown(value: object) -> str:
    """Return a value as an error can show it: short, and without walking into it."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return ascii(value)[:80]


def _identity(value: list[Any]) -> ImageIdentity | None:
    if [type(item) for item in value[:4]] != [int] * 4 or len(value) != 5:
        return None
    device, inode, size, mtime_ns, trace = value
    if isinstance(trace, list) and [type(item) for item in trace] == [str, int, int, str]:
        trace = DeviceTrace(*trace)
    elif trace is not None:
        return None
    return ImageIdentity(device, inode, size, mtime_ns, trace)


def _error(what: str, place: str, expected: str, found: object) -> FormatError:
    return FormatError(
        f"{what} at {place}",
        expected=expected,
        found=found,
        next_step="use the version that wrote this store, or make a new store and a full backup",
    )


def storable(reason: str) -> str:
    """Return a reason in a form that a record can hold: the path of a file in it may be no UTF-8."""
    return reason.encode(errors="backslashreplace").decode()


def check_disk_name(name: str) -> str:
    """Return `name` if it can name a disk in a list, a folder and an NBD export; else raise `InvalidArgument`."""
    check_name(name, what="disk", limit=MAX_DISK_NAME_BYTES)
    if name.startswith((".", "-")) or any(character in "/\\,@" for character in name):
        raise InvalidArgument(
            f"disk name {name!r} starts with . or -, or has one of / \\ , @ in it",
            next_step="choose a plain name such as sda",
        )
    return name


def check_name(name: object, *, what: str, limit: int = MAX_NAME_BYTES) -> str:
    """Return `name` if it is 1 to `limit` bytes of UTF-8 without control characters; else raise `InvalidArgument`."""
    name = require_text(name, what)
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{what} name {name!r} is not UTF-8", next_step="choose another name"
        ) from error
    if not 1 <= length <= limit:
        raise InvalidArgument(
            f"{what} name of {length} bytes is not within 1..{limit} bytes", next_step="choose another name"
        )
    if not name.isprintable():
        raise InvalidArgument(f"{what} name {name!r} has control characters", next_step="choose another name")
    return name
