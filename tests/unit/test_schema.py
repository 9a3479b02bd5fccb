"""Records and descriptions: what is written is read back, and bytes that lie are one error or all dirty."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any
from uuid import UUID

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.errors import FormatError, InvalidArgument
from lmdbitmap.interfaces import DeviceTrace, ImageIdentity
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk, Region, StoreHeader, decode, encode

KEY = schema.region_key(3, 9)
BITS = bytes(range(256)) * 2
HEADER = StoreHeader(schema.STORE_MAGIC, UUID(int=1))
DISK = Disk(
    uuid=UUID(int=1), name="sda", image="/sda.raw", size=1 << 30, granularity_bits=16, epoch=UUID(int=2),
    epoch_number=1, epoch_reason="began", durability=schema.WRITE_AHEAD, policy=schema.STRICT, created_ns=5,
    next_sequence=2, identity=ImageIdentity(1, 2, 3, -4), session=UUID(int=3), resizing_from=7,
)  # fmt: skip
CHECKPOINT = Checkpoint(UUID(int=1), 4, "monday", UUID(int=5), 6, UUID(int=7), 8)
BITMAP = Bitmap(1, UUID(int=2), 1 << 30, 16, "kept", "all", "loose", UUID(int=3), origin_time_ns=9)
DEVICE = ImageIdentity(1, 0, 3, 0, DeviceTrace("a boot", 2**63, 7, "vol-1"))
DESCRIPTIONS = [
    HEADER, DISK, dataclasses.replace(DISK, identity=None, session=None),
    dataclasses.replace(DISK, identity=DEVICE), CHECKPOINT, BITMAP,
]  # fmt: skip


# --- keys ---


def test_keys_are_ordered_as_their_numbers() -> None:
    numbers = [0, 1, 255, 256, 2**32, 2**63]
    pairs = [(bitmap_id, region) for bitmap_id in numbers for region in numbers]
    keys = [schema.region_key(*pair) for pair in pairs]
    assert keys == sorted(keys)
    assert [schema.parse_region_key(key) for key in keys] == pairs
    assert [schema.bitmap_key(n) for n in numbers] == sorted(schema.bitmap_key(n) for n in numbers)
    points = [schema.checkpoint_key(UUID(int=n), m) for n in (1, 2**100) for m in numbers]
    assert points == sorted(points)


@pytest.mark.parametrize("key", [b"", KEY[:-1], KEY + b"\0"])
def test_a_key_of_another_length_is_no_region_key(key: bytes) -> None:
    with pytest.raises(FormatError, match="a key of 16 bytes"):
        schema.parse_region_key(key)


# --- region records ---


@given(st.integers(0, 2**64 - 1), st.binary(min_size=512, max_size=512))
def test_region_comes_back(armed: int, block_bits: bytes) -> None:
    value = schema.encode_region(KEY, armed, block_bits)
    assert len(value) == schema.REGION_RECORD_BYTES == 524
    assert schema.decode_region(KEY, value) == Region(armed, block_bits)


def test_bytes_of_a_record_are_those_of_the_specification() -> None:
    value = schema.encode_region(KEY, 0x0102030405060708, BITS)
    assert value[:8] == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert value[8:520] == BITS


def test_every_damaged_bit_makes_a_record_all_dirty() -> None:
    value = schema.encode_region(KEY, 5, BITS)
    damaged = 0
    for bit in range(8 * len(value)):
        lie = bytearray(value)
        lie[bit // 8] ^= 1 << bit % 8
        assert schema.decode_region(KEY, bytes(lie)) == Region(0, b"\xff" * 512, damaged=True)
        damaged += 1
    assert damaged == 8 * 524


@pytest.mark.parametrize("length", [0, 1, 523, 525, 1048])
def test_record_of_another_length_is_all_dirty(length: int) -> None:
    value = (schema.encode_region(KEY, 0, bytes(512)) * 3)[:length]
    assert schema.decode_region(KEY, value).damaged


@pytest.mark.parametrize("key", [schema.region_key(3, 10), schema.region_key(2, 9)])
def test_record_cannot_stand_in_for_another(key: bytes) -> None:
    assert schema.decode_region(key, schema.encode_region(KEY, 0, bytes(512))).damaged


# --- descriptions ---


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda description: type(description).__name__)
def test_description_comes_back(description: Any) -> None:
    assert decode(type(description), encode(description), place="here") == description


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda description: type(description).__name__)
def test_missing_unknown_and_mistyped_fields_are_refused(description: Any) -> None:
    fields = msgpack.unpackb(encode(description)[:-4])
    lies: list[dict[Any, Any]] = [{**fields, "more": 1}, {**fields, "schema": 3}, {**fields, "schema": 0}]
    for name in fields:
        lies.append({other: value for other, value in fields.items() if other != name})
        wrong: list[Any] = [-1, 1.5, b"short", [1], {}, True, [1, 2, 3], 2**63]
        lies += [{**fields, name: value} for value in wrong]
    believed = 0
    for lie in lies:
        with contextlib.suppress(FormatError):
            decode(type(description), schema.seal(msgpack.packb(lie)), place="here")
            believed += 1
    assert believed <= len(fields)  # a number may be any number


@pytest.mark.parametrize(
    "identity",
    [
        [1, 0, 3, 0],
        [1, 0, 3, 0, None, None],
        [1, 0, 3, None, None],
        [1, 0, 3, 0, []],
        [1, 0, 3, 0, ["a boot", 2, 7]],
        [1, 0, 3, 0, ["a boot", 2, None, "vol-1"]],
        [1, 0, 3, 0, [5, 2, 7, "vol-1"]],
        [1, 0, 3, 0, 5],
    ],
)
def test_identity_of_another_shape_is_refused(identity: object) -> None:
    fields = {**msgpack.unpackb(encode(DISK)[:-4]), "identity": identity}
    with pytest.raises(FormatError):
        decode(Disk, schema.seal(msgpack.packb(fields)), place="there")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("durability", "soon"),
        ("policy", "lax"),
        ("durability", ""),
        ("granularity_bits", 8),
        ("granularity_bits", 64),
        ("granularity_bits", 2**40),
        ("size", 2**63),
    ],
)
def test_disk_of_unknown_ways_or_impossible_size_is_refused(field: str, value: object) -> None:
    fields = {**msgpack.unpackb(encode(DISK)[:-4]), field: value}
    with pytest.raises(FormatError) as refused:
        decode(Disk, schema.seal(msgpack.packb(fields)), place="there")
    assert "there" in str(refused.value)


def test_what_could_not_be_read_is_not_written() -> None:
    with pytest.raises(FormatError, match="disk description at new record"):
        encode(dataclasses.replace(DISK, policy="quick"))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc0", b"\x90", b"\x80", b"\xc1", b"\x81\x01\x02", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
     b"\x91" * 5000, b"\xd6\xff\0\0\0\0", encode(HEADER) + b"\0", encode(HEADER)[:-1]],
)  # fmt: skip
def test_bytes_that_are_no_description_are_one_error(data: bytes) -> None:
    for kind in (StoreHeader, Disk, Checkpoint, Bitmap):
        with pytest.raises(FormatError):
            decode(kind, data, place="here")


@given(st.data())
def test_damage_raises_nothing_but_format_error(data: st.DataObject) -> None:
    description: Any = data.draw(st.sampled_from(DESCRIPTIONS))
    lie = bytearray(encode(description))
    for _ in range(data.draw(st.integers(1, 3))):
        lie[data.draw(st.integers(0, len(lie) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        decode(type(description), bytes(lie), place="here")


def with_packed(name: str, packed: bytes) -> bytes:
    """The description of a bitmap with one value, in msgpack, replaced."""
    fields = msgpack.unpackb(encode(BITMAP)[:-4])
    assert name in fields
    items = [msgpack.packb(key) + (packed if key == name else msgpack.packb(fields[key])) for key in fields]
    return schema.seal(bytes([0x80 + len(fields)]) + b"".join(items))


@pytest.mark.parametrize("name", ["schema", "name", "id"])
def test_a_value_deeper_than_python_calls_is_refused_in_a_few_words(name: str) -> None:
    with pytest.raises(FormatError, match="a list of 1") as refused:
        decode(Bitmap, with_packed(name, b"\x91" * 1000 + b"\xc0"), place="here")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("name", "packed"), [("schema", b"\xc3"), ("schema", b"\xcc\1"), ("id", b"\xd3" + bytes(7) + b"\1")]
)
def test_a_description_is_written_in_one_way_only(name: str, packed: bytes) -> None:
    """So that whatever is accepted is what a writer of ours meant: `True` is no 1, no key stands twice."""
    with pytest.raises(FormatError, match="in their own order"):
        decode(Bitmap, with_packed(name, packed), place="here")


def test_fields_in_another_order_or_twice_are_refused() -> None:
    fields = msgpack.unpackb(encode(BITMAP)[:-4])
    turned = msgpack.packb(dict(reversed(fields.items())))
    twice = bytes([0x80 + len(fields) + 1]) + msgpack.packb("size") + b"\0" + encode(BITMAP)[1:-4]
    for lie in (turned, twice):
        assert msgpack.unpackb(lie) == fields
        with pytest.raises(FormatError, match="in their own order"):
            decode(Bitmap, schema.seal(lie), place="here")


# --- names ---


@pytest.mark.parametrize("name", ["a", "ä ö", "x" * 1023, "C:\\", "日本", "-", "."])
def test_possible_names_of_checkpoints(name: str) -> None:
    assert schema.check_name(name, what="checkpoint") == name


@pytest.mark.parametrize(
    "name", ["", "x" * 1024, "é" * 512, "a\n", "\x7f", "\0", "\u202e", "\ud800", None, b"a", 1]
)
def test_impossible_names(name: Any) -> None:
    with pytest.raises(InvalidArgument):
        schema.check_name(name, what="checkpoint")
    with pytest.raises(InvalidArgument):
        schema.check_disk_name(name)


@pytest.mark.parametrize("name", [".", "..", "-v", "a/b", "a\\b", "a,b", "a@b", "x" * 201])
def test_names_that_no_disk_can_have(name: str) -> None:
    with pytest.raises(InvalidArgument):
        schema.check_disk_name(name)


@pytest.mark.parametrize("description", [DISK])
def test_a_flipped_bit_of_a_description_is_refused(description: schema.Disk) -> None:
    record = encode(description)
    for position in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(FormatError):
            decode(schema.Disk, bytes(damaged), place="here")
    assert len(record) > 100
