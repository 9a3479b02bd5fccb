"""Any stream that can be written reads back the same, in any pieces; any other bytes are a `FormatError` only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.errors import FormatError
from lmdbitmap.streams.rbd_diff import BANNERS, Data, Decoder, Encoder, End, Head
from tests.fuzz.inputs import pieces_of
from tests.helpers import naive_rbd_diff
from tests.helpers.naive_rbd_diff import Stream

names = st.none() | st.text(min_size=1, max_size=40).filter(str.isprintable)
contents = st.binary(max_size=200) | st.integers(0, 1 << 34)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """With ranges ascending and apart, as we write them."""
    ranges: list[tuple[int, bytes | int]] = []
    position = 0
    for gap, content in draw(st.lists(st.tuples(st.integers(0, 1 << 40), contents), max_size=6)):
        ranges.append((position + gap, content))
        position += gap + naive_rbd_diff.length_of(content)
    size = position + draw(st.integers(0, 1 << 50))
    return Stream(draw(st.sampled_from([1, 2])), size, draw(names), draw(names), ranges)


def encoded(stream: Stream) -> bytes:
    encoder = Encoder(Head(*stream[:4]))
    parts = [encoder.head()]
    for offset, content in stream.ranges:
        if isinstance(content, bytes):
            parts += map(bytes, encoder.data(offset, content))
        else:
            parts += encoder.zeroes(offset, content)
    return b"".join([*parts, encoder.end()])


def decoded(data: bytes, choice: int) -> Stream:
    """Through our decoder, in pieces as the choice cuts them; ranges that follow on each other are joined."""
    decoder = Decoder()
    heads, ranges, ends = [], [], 0
    for piece in pieces_of(data, choice):
        for event in decoder.feed(piece):
            if isinstance(event, Head):
                heads.append(event)
            elif isinstance(event, End):
                ends += 1
            else:
                ranges.append((event.offset, bytes(event.data) if isinstance(event, Data) else event.length))
    decoder.finish()
    assert (len(heads), ends) == (1, 1)
    return joined(Stream(*heads[0], ranges))


def joined(stream: Stream) -> Stream:
    """Alike whatever records and pieces the ranges came in: nothing empty, neighbours of one kind as one."""
    ranges: list[tuple[int, bytes | int]] = []
    for offset, content in stream.ranges:
        if ranges and ranges[-1][0] + naive_rbd_diff.length_of(ranges[-1][1]) == offset:
            start, last = ranges[-1]
            if isinstance(last, bytes) and isinstance(content, bytes):
                ranges[-1], content = (start, last + content), b""
            elif isinstance(last, int) and isinstance(content, int):
                ranges[-1], content = (start, last + content), 0
        if content:
            ranges.append((offset, content))
    return stream._replace(ranges=ranges)


@given(streams(), st.integers(0, 255))
def test_a_stream_reads_back_the_same_in_any_pieces_by_us_and_by_the_plain_reader(
    stream: Stream, choice: int
) -> None:
    data = encoded(stream)
    assert decoded(data, choice) == joined(stream)
    assert joined(naive_rbd_diff.read(data)) == joined(stream)
    assert decoded(naive_rbd_diff.written(stream), choice) == joined(stream)


@given(streams())
def test_no_record_that_we_write_is_empty_or_longer_than_ceph_takes(stream: Stream) -> None:
    for _, content in naive_rbd_diff.read(encoded(stream)).ranges:
        assert 0 < naive_rbd_diff.length_of(content) <= 1 << 30


@given(streams(), st.data(), st.integers(0, 255))
def test_changed_bytes_are_what_the_plain_reader_says_or_a_format_error(
    stream: Stream, data: st.DataObject, choice: int
) -> None:
    changed = bytearray(encoded(stream))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    agrees_with_the_plain_reader(bytes(changed), choice)


@given(st.binary(max_size=200), st.sampled_from([*BANNERS.values(), b""]), st.integers(0, 255))
def test_any_bytes_are_what_the_plain_reader_says_or_a_format_error(
    body: bytes, banner: bytes, choice: int
) -> None:
    agrees_with_the_plain_reader(banner + body, choice)


def agrees_with_the_plain_reader(data: bytes, choice: int) -> None:
    try:
        expected = joined(naive_rbd_diff.read(data))
    except (ValueError, KeyError):
        with pytest.raises(FormatError):
            decoded(data, choice)
    else:
        assert decoded(data, choice) == expected
