"""The flat bitmap file: what is written, byte for byte, and everything that a reader refuses."""

from __future__ import annotations

import tracemalloc
import uuid
from collections.abc import Iterable

import msgpack
import pytest

from lmdbitmap import bits
from lmdbitmap import format as flat
from lmdbitmap.errors import FormatError, InvalidArgument, LmdbitmapError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.format import BitsTally, Flags, FlatHeader
from tests.helpers import naive_flat

SIZE, GRANULARITY_BITS = 1000 * 4096 - 7, 12
BLOCKS = {0, 1, 63, 64, 500, 999}
BITMAP, DISK, EPOCH, SINCE, UNTIL = (uuid.UUID(int=number) for number in range(1, 6))


def new_header(**changes: object) -> FlatHeader:
    fields: dict[str, object] = {
        "disk_size": SIZE,
        "granularity_bits": GRANULARITY_BITS,
        "bitmap_uuid": BITMAP,
        "disk_uuid": DISK,
        "epoch_uuid": EPOCH,
        "since_uuid": SINCE,
        "until_uuid": UNTIL,
        "since_time_ns": 1_700_000_000_000_000_000,
    }
    return FlatHeader(**{**fields, **changes})  # type: ignore[arg-type]


def bits_of(blocks: Iterable[int], header: FlatHeader) -> bytearray:
    buffer = bytearray(header.bits_size)
    view = bits.bitmap_view(buffer)
    for block in blocks:
        bits.set_range(view, block, block + 1)
    return buffer


def tally_of(data: bytes | bytearray, header: FlatHeader) -> BitsTally:
    tally = BitsTally(header.bit_count)
    tally.add(data)
    return tally


def file_of(blocks: Iterable[int], header: FlatHeader, metadata: flat.Metadata) -> bytes:
    """As a writer does it: the bits first, then the header that vouches for them."""
    data = bits_of(blocks, header)
    return flat.encode_header(header.sealed(tally_of(data, header)), metadata) + bytes(data)


def read(data: bytes, chunk_size: int = 1 << 20) -> tuple[FlatHeader, flat.Metadata, bytes]:
    """As a reader does it: prove the header, then the bits."""
    prefix = data[: flat.MAX_HEADER_SIZE]
    header, metadata = flat.decode_header(prefix, file_size=len(data), place="x.dbm")
    rest = data[header.header_size :]
    chunks = (rest[start : start + chunk_size] for start in range(0, len(rest), chunk_size))
    return header, metadata, b"".join(flat.trusted_bits(header, chunks, place="x.dbm"))


def valid_file() -> bytes:
    return file_of(BLOCKS, new_header(), {"disk": "sda"})


def forged(**fields: int) -> bytes:
    """A valid file with some fields overruled, and the header's checksum right again."""
    header, rest = bytearray(valid_file()[:4096]), valid_file()[4096:]
    for name, number in fields.items():
        naive_flat.put(header, name, number)
    return bytes(naive_flat.seal(header)) + rest


def with_metadata(packed: bytes) -> bytes:
    return naive_flat.write(BLOCKS, SIZE, GRANULARITY_BITS, packed)


# --- what is written ---


def test_a_file_is_byte_for_byte_what_the_table_says() -> None:
    expected = naive_flat.write(
        BLOCKS,
        SIZE,
        GRANULARITY_BITS,
        msgpack.packb({"checkpoint": "monday", "disk": "sda"}),
        flags=1 | 4,
        bitmap_uuid=int.from_bytes(BITMAP.bytes, "little"),
        disk_uuid=int.from_bytes(DISK.bytes, "little"),
        epoch_uuid=int.from_bytes(EPOCH.bytes, "little"),
        since_uuid=int.from_bytes(SINCE.bytes, "little"),
        until_uuid=int.from_bytes(UNTIL.bytes, "little"),
        since_time_ns=1_700_000_000_000_000_000,
    )
    header = new_header(flags=Flags.SUPERSET)
    assert file_of(BLOCKS, header, {"disk": "sda", "checkpoint": "monday"}) == expected


def test_what_was_written_reads_back() -> None:
    header = new_header(until_uuid=None, flags=Flags.RECORDING)
    metadata = {
        "checkpoint": "montag — früh",
        "disk": "sda",
        "labels": ["a", {"b": None, "c": -1}],
        "n": 2**64 - 1,
    }
    reread, remetadata, data = read(file_of(BLOCKS, header, metadata))
    assert reread == header.sealed(tally_of(data, header))
    assert reread.flags == Flags.CLEAN | Flags.RECORDING
    assert reread.until_uuid is None
    assert reread.dirty_count == len(BLOCKS)
    assert remetadata == metadata
    assert data == bits_of(BLOCKS, header)


def test_the_order_of_metadata_keys_does_not_show() -> None:
    one = flat.encode_header(new_header(), {"a": {"c": 1, "d": 2}, "b": 3})
    other = flat.encode_header(new_header(), {"b": 3, "a": {"d": 2, "c": 1}})
    assert one == other


@pytest.mark.parametrize(("name_length", "header_size"), [(3831, 4096), (3832, 8192), (1_048_309, 1 << 20)])
def test_the_header_grows_with_its_metadata(name_length: int, header_size: int) -> None:
    data = file_of(BLOCKS, new_header(), {"name": "x" * name_length})
    header, metadata, _ = read(data)
    assert header.header_size == header_size
    assert metadata == {"name": "x" * name_length}


@pytest.mark.parametrize(
    "metadata",
    [
        {"name": "x" * 1_048_310},
        {"number": 2**64},
        {"number": 1.5},
        {"bytes": b""},
        {"pair": (1, 2)},
        {"surrogate": "\udc80"},
        {"list": [0] * 1025},
        {1: "a"},
        {"deep": [[[[[[[[]]]]]]]]},
    ],
)
def test_metadata_that_a_file_cannot_hold_is_refused(metadata: flat.Metadata) -> None:
    with pytest.raises(InvalidArgument, match="metadata does not fit"):
        flat.encode_header(new_header(), metadata)


def test_a_disk_without_bytes_has_no_bits() -> None:
    header, _, data = read(file_of([], new_header(disk_size=0), {}))
    assert (header.bit_count, header.bits_size, data) == (0, 0, b"")


def test_the_largest_disk_has_a_header() -> None:
    header = new_header(disk_size=2**63 - 1, granularity_bits=9)
    reread, _ = flat.decode_header(flat.encode_header(header, {}), file_size=4096, place="x.dbm")
    assert (reread.bit_count, reread.bits_size) == (2**54, 2**51)


# --- trust ---


def test_a_new_header_is_not_clean_until_it_has_seen_the_bits() -> None:
    header = new_header()
    assert header.trust is Trust.UNTRUSTED
    assert header.sealed(tally_of(bits_of([], header), header)).trust is Trust.EXACT
    assert header.sealed(tally_of(bits_of([], header), header)).unsealed() == header


def test_superset_is_trusted_as_such() -> None:
    header, _, _ = read(file_of(BLOCKS, new_header(flags=Flags.SUPERSET), {}))
    assert header.trust is Trust.SUPERSET


@pytest.mark.parametrize("data", [bytes(128 - 8), b"\xff" * 128])
def test_no_header_vouches_for_too_few_bits_or_bits_past_the_end(data: bytes) -> None:
    header = new_header()
    with pytest.raises(AssertionError):
        header.sealed(tally_of(data, header))


def test_the_bits_of_a_file_that_was_not_closed_cleanly_are_out_of_reach() -> None:
    data = flat.encode_header(new_header(), {}) + bytes(128)
    header, _ = flat.decode_header(data, file_size=len(data), place="x.dbm")
    assert not header.clean
    with pytest.raises(Untrusted, match=r"x\.dbm was not closed cleanly.*full backup"):
        flat.trusted_bits(header, [bytes(128)], place="x.dbm")


@pytest.mark.parametrize("file_size", [4096, 4097, 4096 + 128, 1 << 40])
def test_a_writer_that_died_leaves_untrusted_bits_whatever_their_length(file_size: int) -> None:
    header, _ = flat.decode_header(flat.encode_header(new_header(), {}), file_size=file_size, place="x.dbm")
    assert header.trust is Trust.UNTRUSTED
    assert header.geometry.size == SIZE


def test_clearing_clean_in_place_changes_one_flag_and_the_checksum() -> None:
    area = forged(compatible_features=6, minor_version=3)[:4096]
    cleared = flat.without_clean(area)
    header, metadata = flat.decode_header(cleared, file_size=0, place="x.dbm")
    assert not header.clean
    assert metadata == {"disk": "sda"}
    changed = {at for at in range(4096) if cleared[at] != area[at]}
    assert 32 in changed
    assert changed <= {32, 252, 253, 254, 255}
    assert flat.without_clean(cleared) == cleared


# --- what is read ---


def test_a_later_minor_version_and_unknown_compatible_features_are_no_obstacle() -> None:
    header, _, data = read(forged(minor_version=9, compatible_features=2**64 - 1))
    assert header.clean
    assert data == bits_of(BLOCKS, header)


def test_a_roomier_header_than_needed_is_read() -> None:
    area = bytearray(valid_file()[:4096] + bytes(8192))
    naive_flat.put(area, "header_size", 12288)
    header, _, data = read(bytes(naive_flat.seal(area)) + valid_file()[4096:])
    assert header.header_size == 12288
    assert data == bits_of(BLOCKS, header)


@pytest.mark.parametrize(
    ("field", "number"),
    [
        ("magic", 0),
        ("major_version", 0),
        ("major_version", 2),
        ("header_size", 0),
        ("header_size", 4095),
        ("header_size", 6144),
        ("header_size", 2**20 + 4096),
        ("header_size", 2**32 - 4096),
        ("incompatible_features", 1),
        ("incompatible_features", 1 << 63),
        ("flags", 1 | 8),
        ("flags", 1 | 1 << 63),
        ("disk_size", 2**63),
        ("granularity_bits", 8),
        ("granularity_bits", 32),
        ("granularity_bits", 2**32 - 1),
        ("reserved", 1),
        ("bit_count", 999),
        ("bit_count", 1001),
        ("bits_size", 120),
        ("bits_size", 136),
        ("dirty_count", 1001),
        ("until_uuid", 1),
        ("metadata_length", 4096 - 256 + 1),
        ("metadata_length", 2**32 - 1),
        ("reserved_space", 1 << 600),
    ],
)
def test_a_field_that_cannot_be_true_is_refused_by_name_and_place(field: str, number: int) -> None:
    fields = {"until_uuid": number, "flags": 3} if field == "until_uuid" else {field: number}
    with pytest.raises(FormatError) as refusal:
        read(forged(**fields))
    assert refusal.value.place == f"x.dbm, {field} at byte {naive_flat.TABLE[field].offset}"


@pytest.mark.parametrize("fields", [{"major_version": 2}, {"incompatible_features": 4}])
def test_what_is_too_new_says_so(fields: dict[str, int]) -> None:
    with pytest.raises(FormatError, match="newer version of lmdbitmap"):
        read(forged(**fields))


def test_a_header_checksum_that_does_not_match_is_refused_before_any_number_is_believed() -> None:
    area = bytearray(valid_file())
    naive_flat.put(area, "disk_size", 2**63)
    with pytest.raises(FormatError, match="header_checksum at byte 252"):
        read(bytes(area))


@pytest.mark.parametrize("length", [0, 1, 255, 256, 4095, 4096, 4096 + 127])
def test_a_file_cut_short_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        read(valid_file()[:length])


def test_a_file_that_goes_on_after_the_bits_is_refused() -> None:
    with pytest.raises(FormatError, match="expected a file of 4224 bytes, found 4225"):
        read(valid_file() + b"\0")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"bits_checksum": 1}, "checksum 0x00000001"),
        ({"dirty_count": 5}, "5 set bits, found 6"),
        ({"disk_size": SIZE - 4096, "bit_count": 999, "dirty_count": 6}, "zeroes past bit 999, found ones"),
    ],
)
def test_bits_that_do_not_match_their_header_are_refused(fields: dict[str, int], complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        read(forged(**fields))


def test_more_or_fewer_bits_than_the_header_says_are_refused() -> None:
    header, _, data = read(valid_file())
    with pytest.raises(FormatError, match="expected 128 bytes, found more"):
        list(flat.trusted_bits(header, [data, b"\0"], place="x.dbm"))
    with pytest.raises(FormatError, match="expected 128 bytes, found 127"):
        list(flat.trusted_bits(header, [data[:-1]], place="x.dbm"))


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 127, 4096])
def test_bits_are_proven_in_pieces_of_any_length(chunk_size: int) -> None:
    assert read(valid_file(), chunk_size) == read(valid_file())
    with pytest.raises(FormatError, match="zeroes past bit 999"):
        read(forged(disk_size=SIZE - 4096, bit_count=999), chunk_size)


@pytest.mark.parametrize(
    "packed",
    [
        b"",  # nothing
        b"\xc0",  # nil
        b"\x90",  # an array
        b"\x80\x80",  # two maps
        b"\x81\xa1a",  # a map that ends too soon
        b"\xc1",  # no msgpack
        b"\x81\x01\x01",  # a number for a key
        b"\x81\xc4\x00\x01",  # bytes for a key
        b"\x82\xa1b\x01\xa1a\x01",  # keys not sorted
        b"\x82\xa1a\x01\xa1a\x01",  # a key twice
        b"\x81\xa1a\x82\xa1b\x01\xa1a\x01",  # the same further down
        b"\x81\xa1\xff\x01",  # no UTF-8
        b"\x81\xa1a\xca\0\0\0\0",  # a float
        b"\x81\xa1a\xc4\x00",  # bytes
        b"\x81\xa1a\xc7\x00\x05",  # an extension type
        b"\x81\xa1a\xd6\xff\0\0\0\0",  # a timestamp
        b"\x81\xa1a\xdd\xff\xff\xff\xff",  # an array of 2^32-1
        b"\x81\xa1a\xdb\xff\xff\xff\xff",  # a string of 4 GiB
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32-1
        b"\x81\xa1a" + b"\x91" * 8 + b"\xc0",  # one level too deep
        b"\x81\xa1a" + b"\x91" * 3000 + b"\xc0",
        b"\x81\xa1a" + b"\xdc\x04\x01" + b"\xc0" * 1025,  # too many items
    ],
)
def test_metadata_that_is_not_one_plain_sorted_map_is_refused(packed: bytes) -> None:
    with pytest.raises(
        FormatError, match="metadata at byte 256: expected one msgpack map with sorted string keys"
    ):
        read(with_metadata(packed))


def test_metadata_at_its_limits_is_read() -> None:
    deepest = {"a": [[[[[[[None]]]]]]], "b": list(range(1024)), "ü": True}
    assert read(with_metadata(msgpack.packb(deepest)))[1] == deepest


def test_hidden_bytes_after_the_metadata_are_refused() -> None:
    area = bytearray(valid_file())
    area[4095] = 1
    with pytest.raises(FormatError, match="byte 266: expected zeroes after the metadata"):
        read(bytes(naive_flat.seal(area[:4096])) + bytes(area[4096:]))


def test_hostile_lengths_do_not_size_an_allocation() -> None:
    nested = naive_flat.write(set(), 0, 9, b"\x81\xa1a" + b"\xdc\x04\x00" * 340_000)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            read(nested)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_every_message_names_the_file_and_ends_with_the_next_step() -> None:
    with pytest.raises(LmdbitmapError) as refusal:
        read(b"not a bitmap")
    assert str(refusal.value) == (
        "x.dbm: expected at least 256 bytes, found 12; "
        "do not use this file; export the bitmap again or make a full backup"
    )
