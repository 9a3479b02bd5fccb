"""Streams of `rbd export-diff`: what the plain reader says, or one refusal; the same in pieces of any size."""

from __future__ import annotations

from lmdbitmap.errors import FormatError
from lmdbitmap.streams.rbd_diff import Data, Decoder, End, Head, Zeroes
from tests.fuzz.inputs import WHOLE, Input, check_words, pieces_of
from tests.helpers import naive_rbd_diff

MOST_RECORDS = 40
TAGS = (b"f", b"t", b"s", b"w", b"z", b"e", b"p", b"")
NUMBERS = (0, 1, 4, 8, 16, 4096, 1 << 20, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
PLAIN_RANGES = list[tuple[int, bytes | int]]


def rbd_diff(data: bytes) -> None:
    source = Input(data)
    is_built, cut = source.byte() % 2, source.byte()
    stream = built(source) if is_built else source.rest()
    whole, other = outcome(stream, WHOLE), outcome(stream, cut)
    assert whole == other, f"{other} cut by {cut} is not {whole}"
    try:
        plain = naive_rbd_diff.read(stream)
    except (ValueError, KeyError):
        assert isinstance(whole, str), f"{whole} of what is no stream"
        return
    assert not isinstance(whole, str), f"{whole}, but it is {plain}"
    head, ranges = whole
    assert (head, ranges) == (Head(*plain[:4]), bytes_of(plain.ranges))


def built(source: Input) -> bytes:
    """Records one after the other, most of them with the lengths that they need."""
    version = 1 + source.byte() % 2
    parts = [f"rbd diff v{version}\n".encode()]
    for _ in range(MOST_RECORDS):
        if not source.left:
            break
        tag = source.pick(TAGS)
        body = body_of(tag, source)
        length = naive_rbd_diff.u64(number(source) if source.byte() % 16 == 0 else len(body))
        parts.append(tag + (length if version == 2 and tag != b"e" else b"") + body)
    return b"".join(parts)


def body_of(tag: bytes, source: Input) -> bytes:
    if tag in (b"f", b"t"):
        name = source.take(source.byte() % 20)
        length = source.number(4) if source.byte() % 16 == 0 else len(name)
        return naive_rbd_diff.u32(length) + name
    if tag == b"s":
        return naive_rbd_diff.u64(number(source))
    if tag in (b"w", b"z"):
        content = source.take(source.byte()) if tag == b"w" else b""
        length = len(content) if tag == b"w" and source.byte() % 16 else number(source)
        return naive_rbd_diff.u64(number(source)) + naive_rbd_diff.u64(length) + content
    return b"" if tag == b"e" else source.take(source.byte())


def number(source: Input) -> int:
    kind = source.byte() % (len(NUMBERS) + 2)
    return NUMBERS[kind] if kind < len(NUMBERS) else source.number(2 if kind == len(NUMBERS) else 8)


def outcome(stream: bytes, cut: int) -> tuple[Head, PLAIN_RANGES] | str:
    """What a stream says, or the refusal."""
    decoder = Decoder("diff")
    heads: list[Head] = []
    ranges: PLAIN_RANGES = []
    try:
        for piece in pieces_of(stream, cut):
            for event in decoder.feed(piece):
                if isinstance(event, Head):
                    heads.append(event)
                elif isinstance(event, Data):
                    ranges.append((event.offset, bytes(event.data)))
                elif isinstance(event, Zeroes):
                    ranges.append((event.offset, event.length))
                else:
                    assert isinstance(event, End)
        decoder.finish()
    except FormatError as refusal:
        check_words(refusal, place="diff, byte ")
        assert decoder.offset <= len(stream)
        return str(refusal)
    [head] = heads
    assert decoder.offset == len(stream)
    assert all(offset + naive_rbd_diff.length_of(content) <= head.size for offset, content in ranges)
    return head, bytes_of(ranges)


def bytes_of(ranges: PLAIN_RANGES) -> PLAIN_RANGES:
    """Alike whatever pieces the data came in: byte by byte."""
    found: PLAIN_RANGES = []
    for offset, content in ranges:
        if isinstance(content, bytes):
            found += [(offset + at, content[at : at + 1]) for at in range(len(content))]
        else:
            found.append((offset, content))
    return found
