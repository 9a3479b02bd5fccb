"""The store's records: what is not what was written is all dirty, or one error; what is accepted was written by us."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from uuid import UUID

import msgpack

from lmdbitmap.errors import FormatError, InvalidArgument
from lmdbitmap.geometry import REGION_BYTES
from lmdbitmap.interfaces import DeviceTrace, ImageIdentity
from lmdbitmap.storage import schema
from lmdbitmap.storage.owner_file import Distrust, create, distrust, last_beat
from lmdbitmap.storage.schema import ALL_DIRTY_BITS, Bitmap, Checkpoint, Description, Disk, StoreHeader
from tests.fuzz.inputs import Input, check_words, damaged, fill_scratch_file, scratch_folder

PLACE = "store"
KINDS: tuple[type[Description], ...] = (StoreHeader, Disk, Checkpoint, Bitmap)
ALL_DIRTY = int.from_bytes(ALL_DIRTY_BITS, "little")
TRUST_OFFSET = 4096
TEXTS = ("", "sda", schema.WRITE_AHEAD, schema.DEFERRED, schema.GUEST_FIRST, schema.STRICT)
NUMBERS = (0, 1, 9, 16, 31, 32, 512, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def store_records(data: bytes) -> None:
    source = Input(data)
    source.pick(
        (
            raw_region,
            damaged_region,
            raw_description,
            built_description,
            damaged_description,
            keys,
            owner_file,
        )
    )(source)


# --- regions ---


def raw_region(source: Input) -> None:
    """A value that is accepted is, byte for byte, the one that is written for what it says."""
    key, value = source.take(16).ljust(16, b"\0"), source.rest()
    region = schema.decode_region(key, value)
    if region.damaged:
        assert dirty_of(region) == ALL_DIRTY
    else:
        assert schema.encode_region(key, region.armed, region.bits) == value


def damaged_region(source: Input) -> None:
    """A record that a byte was changed of, or that stands at another key, has no clean block."""
    key = schema.region_key(source.number(8), source.number(8))
    armed, bits = source.number(8), source.take(source.byte() * 2).ljust(REGION_BYTES, b"\0")
    written = schema.encode_region(key, armed, bits)
    assert schema.decode_region(key, written) == (armed, bits, False)
    moved = source.byte() % 2
    other_key, found = (damaged(key, source), written) if moved else (key, damaged(written, source))
    if (other_key, found) != (key, written) and (not moved or len(other_key) == len(key)):
        region = schema.decode_region(other_key, found)
        assert region.damaged
        assert dirty_of(region) == ALL_DIRTY


def dirty_of(region: schema.Region) -> int:
    """Exact bits and armed extents, worked out block by block."""
    extents = sum((2**64 - 1) << 64 * extent for extent in range(64) if region.armed >> extent & 1)
    return int.from_bytes(region.bits, "little") | extents


def keys(source: Input) -> None:
    key = source.take(17)
    try:
        bitmap_id, region = schema.parse_region_key(key)
    except FormatError:
        assert len(key) != 16
    else:
        assert schema.region_key(bitmap_id, region) == key
    name = source.rest().decode(errors="surrogateescape")
    with contextlib.suppress(InvalidArgument):
        assert os.path.basename(schema.check_disk_name(name)) == name
        assert name not in (".", "..", "")


# --- descriptions ---


def raw_description(source: Input) -> None:
    """Any bytes, with a right CRC-32 behind them or with what the input has there."""
    kind, is_sealed = source.pick(KINDS), source.byte() % 2
    data = source.rest()
    check_description(kind, schema.seal(data) if is_sealed else data)


def built_description(source: Input) -> None:
    """A written description with some fields put in, taken out or replaced, sealed again."""
    kind = source.pick(KINDS)
    fields = msgpack.unpackb(schema.encode(description(kind, source))[:-4])
    names = [*fields, "more"]
    while source.left:
        name = source.pick(names)
        fields[name] = value_of(source)
        if fields[name] == "":
            del fields[name]
    check_description(kind, schema.seal(msgpack.packb(fields)))


def value_of(source: Input, depth: int = 0) -> object:
    kind = source.byte() % 12
    if kind < 4 and depth < 3:
        values = [value_of(source, depth + 1) for _ in range(source.byte() % 5)]
        return values if kind < 2 else {str(index): value for index, value in enumerate(values)}
    simple = (None, True, 1.0, source.pick(TEXTS), source.pick(NUMBERS), source.number(8))
    more = (-source.byte(), source.take(16), source.take(8), source.take(8).decode(errors="replace"))
    return (*simple, *more)[kind % 10]


def check_description(kind: type[Description], record: bytes) -> None:
    try:
        found = schema.decode(kind, record, place=PLACE)
    except FormatError as refusal:
        check_words(refusal)
        return
    assert type(found) is kind
    again = schema.encode(found)
    assert schema.decode(kind, again, place=PLACE) == found
    assert again == record or msgpack.unpackb(record[:-4])["schema"] < kind.schema
    if isinstance(found, Disk | Bitmap):
        assert found.geometry.block_count >= 0


def damaged_description(source: Input) -> None:
    """No changed byte makes another description of one: it could have fewer dirty blocks."""
    kind = source.pick(KINDS)
    written = schema.encode(description(kind, source))
    found = damaged(written, source)
    if found == written:
        return
    try:
        schema.decode(kind, found, place=PLACE)
    except FormatError:
        return
    raise AssertionError(f"{found!r} passes for {written!r}")


def description(kind: type[Description], source: Input) -> Description:
    """A sound one, with numbers and a text of the input."""
    size, number, bits = source.number(4), source.number(7), 9 + source.byte() % 23
    a, b, text = UUID(int=source.number(8)), UUID(int=source.number(2)), f"n{source.byte()}"
    if kind is StoreHeader:
        return StoreHeader(schema.STORE_MAGIC, a)
    if kind is Checkpoint:
        return Checkpoint(a, number, text, b, number, a, number)
    if kind is Bitmap:
        kept = Bitmap(number, a, size, bits, text, superset=text, origin_disk=b)
        return kept if number % 2 else dataclasses.replace(kept, all_dirty=text, name=None)
    disk = Disk(
        uuid=a, name=text, image=f"/{text}", size=size, granularity_bits=bits, epoch=b, epoch_number=number,
        epoch_reason="began", durability=schema.DURABILITIES[number % 2], policy=schema.POLICIES[size % 2],
        created_ns=number, next_sequence=number,
    )  # fmt: skip
    if number % 4 < 2:
        return disk
    trace = DeviceTrace(text, number, size, text) if number % 8 < 6 else None
    return dataclasses.replace(disk, identity=ImageIdentity(1, 2, size, -number, trace), session=a)


# --- the owner's file ---


def owner_file(source: Input) -> None:
    """A trust record that was changed never says that a distrusted disk can be trusted, nor a trusted one still."""
    reason = source.take(source.byte()).decode(errors="replace")
    distrusted = source.byte() % 2
    file = bytearray(written_owner_file(Distrust(source.number(7), reason) if distrusted else None))
    whole = bytes(file[TRUST_OFFSET : TRUST_OFFSET + 512])
    changed = damaged(whole, source)
    file[TRUST_OFFSET:] = changed
    path = fill_scratch_file(bytes(file))
    if changed[:512] == whole:
        assert (distrust(path) is not None) == bool(distrusted)
    else:
        assert distrust(path) is not None
    file[:512] = damaged(bytes(file[:512]), source)[:512].ljust(512, b"\0")
    last_beat(fill_scratch_file(bytes(file)))


def written_owner_file(why: Distrust | None) -> bytes:
    path = os.path.join(scratch_folder(), "owner")
    create(path, why)
    with open(path, "rb") as file:
        return file.read()
