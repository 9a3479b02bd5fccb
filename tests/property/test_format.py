"""Flat files of every shape: they round-trip, two implementations agree, a lie raises only our errors."""

from __future__ import annotations

import uuid
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmdbitmap import bits
from lmdbitmap import format as flat
from lmdbitmap.errors import FormatError, Untrusted
from lmdbitmap.format import BitsTally, Flags, FlatHeader
from lmdbitmap.geometry import Geometry
from tests.helpers import naive_flat

MAX_BLOCKS = 300

uuids = st.uuids(allow_nil=True)
names = st.text(max_size=20)
values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
metadatas = st.dictionaries(names, values, max_size=4)


@st.composite
def disks(draw: st.DrawFn) -> tuple[Geometry, set[int]]:
    """A small disk that may end inside a block, and some of its blocks."""
    granularity_bits = draw(st.integers(9, 31))
    size = draw(st.integers(0, MAX_BLOCKS << granularity_bits))
    geometry = Geometry(size, granularity_bits)
    pattern = draw(st.integers(0, 2**geometry.block_count - 1))
    return geometry, {block for block in range(geometry.block_count) if pattern >> block & 1}


@st.composite
def headers(draw: st.DrawFn, geometry: Geometry) -> FlatHeader:
    until_uuid = draw(st.none() | st.uuids())
    recording = Flags.RECORDING if until_uuid is None and draw(st.booleans()) else Flags(0)
    return FlatHeader(
        disk_size=geometry.size,
        granularity_bits=geometry.granularity_bits,
        bitmap_uuid=draw(uuids),
        disk_uuid=draw(uuids),
        epoch_uuid=draw(uuids),
        since_uuid=draw(uuids),
        until_uuid=until_uuid,
        since_time_ns=draw(st.integers(0, 2**64 - 1)),
        flags=recording | draw(st.sampled_from([Flags(0), Flags.SUPERSET])),
    )


def write(blocks: set[int], header: FlatHeader, metadata: flat.Metadata, chunk_size: int) -> bytes:
    data = bytearray(header.bits_size)
    view = bits.bitmap_view(data)
    for block in blocks:
        view[block] = 1
    tally = BitsTally(header.bit_count)
    for start in range(0, len(data), chunk_size):
        tally.add(bytes(data[start : start + chunk_size]))
    return flat.encode_header(header.sealed(tally), metadata) + bytes(data)


def read(data: bytes, chunk_size: int = 64) -> tuple[FlatHeader, flat.Metadata, set[int]]:
    prefix = data[: flat.MAX_HEADER_SIZE]
    header, metadata = flat.decode_header(prefix, file_size=len(data), place="x.dbm")
    rest = data[header.header_size :]
    chunks = (rest[start : start + chunk_size] for start in range(0, len(rest), chunk_size))
    kept = b"".join(flat.trusted_bits(header, chunks, place="x.dbm"))
    return header, metadata, {block for start, stop in bits.runs(kept) for block in range(start, stop)}


VALID = naive_flat.write({0, 5, 99}, 100 * 512 - 1, 9, b"\x82\xa1a\x01\xa1b\x93\x01\xc0\x81\xa0\xc3")


@given(data=st.data(), metadata=metadatas, write_chunk=st.integers(1, 64), read_chunk=st.integers(1, 64))
def test_every_bitmap_round_trips_in_chunks_of_any_length(
    data: st.DataObject, metadata: dict[str, object], write_chunk: int, read_chunk: int
) -> None:
    geometry, blocks = data.draw(disks())
    header = data.draw(headers(geometry))
    written = write(blocks, header, metadata, write_chunk)
    reread, remetadata, reblocks = read(written, read_chunk)
    assert (reblocks, remetadata, reread.unsealed()) == (blocks, metadata, header)
    assert (reread.dirty_count, reread.bit_count) == (len(blocks), geometry.block_count)
    assert write(blocks, header, dict(reversed(metadata.items())), 7) == written


@given(data=st.data())
def test_the_plainest_implementation_agrees_in_both_directions(data: st.DataObject) -> None:
    geometry, blocks = data.draw(disks())
    header = data.draw(headers(geometry))
    ours = write(blocks, header, {}, 64)
    theirs = naive_flat.write(
        blocks,
        geometry.size,
        geometry.granularity_bits,
        flags=int(header.flags | Flags.CLEAN),
        bitmap_uuid=little(header.bitmap_uuid),
        disk_uuid=little(header.disk_uuid),
        epoch_uuid=little(header.epoch_uuid),
        since_uuid=little(header.since_uuid),
        until_uuid=little(header.until_uuid),
        since_time_ns=header.since_time_ns,
    )
    assert theirs == ours
    assert naive_flat.dirty_blocks(ours) == blocks
    assert read(theirs)[2] == blocks


def little(number: uuid.UUID | None) -> int:
    """The number that puts a uuid's sixteen bytes, in their own order, into a little-endian field."""
    return 0 if number is None else int.from_bytes(number.bytes, "little")


@given(position=st.integers(0, 8 * len(VALID) - 1))
@example(position=8 * 32)
@example(position=8 * len(VALID) - 1)
def test_no_flipped_bit_goes_unnoticed(position: int) -> None:
    damaged = bytearray(VALID)
    damaged[position // 8] ^= 1 << position % 8
    assert outcome(bytes(damaged)) is not None


@given(length=st.integers(0, len(VALID) - 1), extra=st.binary(min_size=1, max_size=100))
def test_no_cut_and_no_extension_goes_unnoticed(length: int, extra: bytes) -> None:
    assert outcome(VALID[:length]) is FormatError
    assert outcome(VALID + extra) is FormatError


@given(st.binary(max_size=600))
def test_noise_is_no_bitmap(noise: bytes) -> None:
    assert outcome(noise) is FormatError
    assert outcome(flat.MAGIC + noise) is FormatError


mutations = st.one_of(
    st.tuples(st.sampled_from(sorted(naive_flat.TABLE)), st.integers(0, 2**608 - 1)),
    st.tuples(st.just("metadata"), st.binary(max_size=60)),
)


@settings(max_examples=300)
@given(changes=st.lists(mutations, min_size=1, max_size=3), tail=st.binary(max_size=40))
def test_a_file_that_lies_under_a_right_checksum_raises_only_our_errors(
    changes: list[tuple[str, Any]], tail: bytes
) -> None:
    """The checksum is no defence against malice: whatever stands under it is still only bytes."""
    header = bytearray(VALID[:4096])
    for name, value in changes:
        if name == "metadata":
            header[256 : 256 + len(value)] = value
            naive_flat.put(header, "metadata_length", len(value))
        else:
            naive_flat.put(header, name, value % 256 ** naive_flat.TABLE[name].size)
    lie = bytes(naive_flat.seal(header)) + tail + VALID[4096 + len(tail) :]
    if outcome(lie) is None:
        accepted, _, blocks = read(lie)
        assert accepted.clean
        assert blocks <= set(range(accepted.bit_count))
        assert len(lie) == accepted.header_size + accepted.bits_size


def test_only_what_describes_and_decides_nothing_can_hold_any_number() -> None:
    """So the lies above are seen by every check, not all by the first one."""
    accepted = set()
    for name, row in naive_flat.TABLE.items():
        header = bytearray(VALID[:4096])
        naive_flat.put(header, name, 256**row.size - 1)
        sealed = naive_flat.seal(header) if name != "header_checksum" else header
        if outcome(bytes(sealed) + VALID[4096:]) is None:
            accepted.add(name)
    uuid_fields = {name for name in naive_flat.TABLE if name.endswith("_uuid")}
    assert accepted == uuid_fields | {"minor_version", "compatible_features", "since_time_ns"}


def outcome(data: bytes) -> type[Exception] | None:
    """None if the file is accepted, else the class of our error; any other error fails the test."""
    try:
        read(data)
    except (FormatError, Untrusted) as error:
        return type(error)
    return None
