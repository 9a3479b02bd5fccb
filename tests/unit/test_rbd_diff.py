"""Streams of both versions, byte for byte; and what is refused, with the byte at which it stands."""

from __future__ import annotations

import tracemalloc

import pytest

from lmdbitmap.errors import FormatError, InvalidArgument
from lmdbitmap.streams.rbd_diff import (
    MAX_NAME_BYTES,
    MAX_WRITE_BYTES,
    MAX_ZERO_BYTES,
    Data,
    Decoder,
    Encoder,
    End,
    Event,
    Head,
    Zeroes,
)

MIB = 1 << 20
MOST = (1 << 64) - 1


def u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def events_of(data: bytes) -> list[Event]:
    decoder = Decoder()
    events = [
        event._replace(data=bytes(event.data)) if isinstance(event, Data) else event
        for event in decoder.feed(data)
    ]
    decoder.finish()
    return events


V1_HEAD = b"rbd diff v1\n" + b"s" + u64(4096)
V2_HEAD = b"rbd diff v2\n" + b"s" + u64(8) + u64(4096)


# --- writing ---


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (
            1,
            b"rbd diff v1\nf\3\0\0\0mont\3\0\0\0tues\0\x10\0\0\0\0\0\0"
            b"w\0\2\0\0\0\0\0\0\4\0\0\0\0\0\0\0abcdz\0\4\0\0\0\0\0\0\0\x0c\0\0\0\0\0\0e",
        ),
        (
            2,
            b"rbd diff v2\nf\7\0\0\0\0\0\0\0\3\0\0\0mont\7\0\0\0\0\0\0\0\3\0\0\0tue"
            b"s\x08\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0w\x14\0\0\0\0\0\0\0\0\2\0\0\0\0\0\0\4\0\0\0\0\0\0\0abcd"
            b"z\x10\0\0\0\0\0\0\0\0\4\0\0\0\0\0\0\0\x0c\0\0\0\0\0\0e",
        ),
    ],
)
def test_a_stream_is_written_as_the_table_says(version: int, expected: bytes) -> None:
    encoder = Encoder(Head(version, 4096, "mon", "tue"))
    parts = [encoder.head(), *encoder.data(512, b"abcd"), *encoder.zeroes(1024, 3072), encoder.end()]
    assert b"".join(parts) == expected
    assert events_of(expected) == [
        Head(version, 4096, "mon", "tue"), Data(512, b"abcd"), Zeroes(1024, 3072), End(),
    ]  # fmt: skip


def test_long_ranges_are_split_into_records_that_ceph_can_hold() -> None:
    encoder = Encoder(Head(1, 1 << 40))
    data = bytes(2 * MAX_WRITE_BYTES) + b"x"
    stream = b"".join(
        [encoder.head(), *encoder.data(3, data), *encoder.zeroes(1 << 30, MAX_ZERO_BYTES + 5), b"e"]
    )
    starts = [event.offset for event in events_of(stream) if isinstance(event, Data | Zeroes)]
    assert starts == [
        3, 3 + MAX_WRITE_BYTES, 3 + 2 * MAX_WRITE_BYTES, 1 << 30, (1 << 30) + MAX_ZERO_BYTES,
    ]  # fmt: skip
    assert stream.count(b"w" + u64(3) + u64(MAX_WRITE_BYTES)) == 1


def test_nothing_is_no_record() -> None:
    encoder = Encoder(Head(1, 4096))
    assert list(encoder.data(5, b"")) == list(encoder.zeroes(5, 0)) == []


@pytest.mark.parametrize(
    "head",
    [
        Head(3, 4096),
        Head(1, -1),
        Head(1, 1 << 63),
        Head(1, 4096, ""),
        Head(1, 4096, None, "two\nlines"),
        Head(2, 4096, None, "ß" * (MAX_NAME_BYTES // 2) + "x"),
    ],
)
def test_what_no_stream_can_say_is_refused(head: Head) -> None:
    with pytest.raises(InvalidArgument):
        Encoder(head)


# --- reading ---


def test_metadata_comes_in_any_order() -> None:
    stream = b"rbd diff v1\n" + b"s" + u64(5) + b"t" + u32(1) + b"b" + b"f" + u32(1) + b"a" + b"e"
    assert events_of(stream) == [Head(1, 5, "a", "b"), End()]


def test_ranges_come_in_any_order_and_may_be_empty_or_overlap() -> None:
    stream = (
        V1_HEAD + b"z" + u64(4096) + u64(0) + b"w" + u64(7) + u64(2) + b"ab" + b"w" + u64(6) + u64(2) + b"cd"
    )
    assert events_of(stream + b"e")[1:] == [Zeroes(4096, 0), Data(7, b"ab"), Data(6, b"cd"), End()]


def test_unknown_records_of_version_2_are_skipped_wherever_they_are() -> None:
    unknown = b"p" + u64(1) + b"\1", b"\0" + u64(0), b"Z" + u64(9) + b"whatevers"
    stream = b"rbd diff v2\n" + unknown[0] + V2_HEAD[12:] + unknown[1] + b"z" + u64(16) + u64(0) + u64(9)
    assert events_of(stream + unknown[2] + b"e") == [Head(2, 4096), Zeroes(0, 9), End()]


@pytest.mark.parametrize(
    ("stream", "where", "expected"),
    [
        (b"rbd diff v3\n", 0, "'rbd diff v1' or 'rbd diff v2'"),
        (b"QFI\xfb" + bytes(8), 0, "'rbd diff v1' or 'rbd diff v2'"),
        (b"rbd diff v1\np\1", 12, "the tag f, t, s, w, z or e"),
        (b"rbd diff v1\ne", 12, "the size 's' before"),
        (b"rbd diff v1\nz" + bytes(16), 13, "the size 's' before"),
        (b"rbd diff v1\ns" + u64(1 << 63), 13, "a size below 2^63"),
        (b"rbd diff v1\nf" + u32(0), 13, "a name of 1 to 4096 bytes"),
        (b"rbd diff v1\nt" + u32(4097), 13, "a name of 1 to 4096 bytes"),
        (b"rbd diff v1\nt" + u32(2) + b"\xff\xff", 17, "a name in printable UTF-8"),
        (b"rbd diff v1\nt" + u32(2) + b"\x1b[", 17, "a name in printable UTF-8"),
        (b"rbd diff v1\n" + 2 * (b"f" + u32(1) + b"a"), 18, "each kind of metadata once"),
        (V1_HEAD + V1_HEAD[12:], 21, "each kind of metadata once"),
        (V1_HEAD + b"z" + bytes(16) + b"t", 38, "no metadata after the first range"),
        (V1_HEAD + b"w" + u64(4096) + u64(1), 22, "a range on a disk of 4096 bytes"),
        (V1_HEAD + b"z" + u64(MOST) + u64(1), 22, "a range on a disk of 4096 bytes"),
        (V1_HEAD + b"w" + u64(0) + u64(MOST), 22, "a range on a disk of 4096 bytes"),
        (V1_HEAD + b"ee", 22, "nothing after the end"),
        (b"rbd diff v2\ns" + u64(9), 13, "8 bytes in the record 's'"),
        (b"rbd diff v2\nf" + u64(4) + u32(1), 21, "5 bytes in the record 'f'"),
        (V2_HEAD + b"z" + u64(17) + bytes(16), 38, "16 bytes in the record 'z'"),
        (V2_HEAD + b"w" + u64(16) + u64(0) + u64(3), 38, "19 bytes in the record 'w'"),
        (V2_HEAD + b"w" + u64(MOST) + u64(0) + u64(3), 38, "19 bytes in the record 'w'"),
    ],
)
def test_what_is_no_stream_is_refused_at_its_byte(stream: bytes, where: int, expected: str) -> None:
    with pytest.raises(FormatError) as refused:
        events_of(stream)
    assert refused.value.place == f"stream, byte {where}"
    assert refused.value.expected.startswith(expected)


def test_a_stream_cut_anywhere_is_refused_where_it_ends() -> None:
    whole = V1_HEAD + b"w" + u64(7) + u64(2) + b"ab" + b"z" + u64(0) + u64(7) + b"e"
    for length in range(len(whole)):
        with pytest.raises(FormatError, match="no more bytes") as refused:
            events_of(whole[:length])
        assert refused.value.place == f"stream, byte {length}"
    assert len(events_of(whole)) == 4


def test_data_of_any_length_is_passed_on_as_it_comes() -> None:
    decoder = Decoder()
    head = b"rbd diff v1\n" + b"s" + u64(1 << 50) + b"w" + u64(5) + u64(1 << 49)
    assert list(decoder.feed(head)) == [Head(1, 1 << 50)]
    piece = bytes(MIB)
    tracemalloc.start()
    for index in range(64):
        assert list(decoder.feed(piece)) == [Data(5 + index * MIB, memoryview(piece))]
    assert tracemalloc.get_traced_memory()[1] < MIB // 4
    tracemalloc.stop()
    assert decoder.offset == len(head) + 64 * MIB


def test_a_record_to_skip_takes_no_memory_however_long_it_says_it_is() -> None:
    decoder = Decoder()
    assert list(decoder.feed(V2_HEAD + b"?" + u64(MOST) + b"?" * 4096)) == []
    with pytest.raises(FormatError, match="no more bytes"):
        decoder.finish()
