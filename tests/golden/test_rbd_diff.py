"""Streams frozen when they were first written: read for ever, and written the same, see README.md."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lmdbitmap.streams.rbd_diff import Data, Decoder, Encoder, End, Event, Head, Zeroes

FOLDER = Path(__file__).parent / "rbd-diff"
SIZE = 1_000_003
FULL: list[Event] = [Data(0, b"boot" * 128), Zeroes(512, 65024), Data(983_040, b"\xa5" * 16963)]
INCREMENT: list[Event] = [Zeroes(4096, 8192), Data(131072, b"changed." * 512)]
STREAMS: dict[str, tuple[Head, list[Event]]] = {
    "v1-full": (Head(1, SIZE, None, "monday"), FULL),
    "v2-full": (Head(2, SIZE, None, "monday"), FULL),
    "v1-increment": (Head(1, SIZE, "monday", "Dienstag ß"), INCREMENT),
    "v2-increment": (Head(2, SIZE, "monday", "Dienstag ß"), INCREMENT),
}
DIGESTS = {
    "v1-full": "ad59f69b2c77d61ed00af01e0889e695783acc984316c7356563889c85570f4c",
    "v2-full": "f3ee40fcf0a2f54a615621bc58274d632b0c37ac304f990c9b86385541f6f72f",
    "v1-increment": "5a2f2949d92c4d42bf6f07cbdede6a8f655ca050c5a14e683ec36397b2245091",
    "v2-increment": "3e761bf20b755e2c0315a95942345163f2ace707a9f6c3fa7f68e70062b6d7fc",
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_frozen_stream_reads_and_is_written_as_ever(name: str) -> None:
    frozen = (FOLDER / f"{name}.diff").read_bytes()
    assert hashlib.sha256(frozen).hexdigest() == DIGESTS[name]
    head, ranges = STREAMS[name]
    decoder = Decoder()
    assert list(decoder.feed(frozen)) == [head, *ranges, End()]
    decoder.finish()
    encoder = Encoder(head)
    parts = [encoder.head()]
    for event in ranges:
        if isinstance(event, Data):
            parts += map(bytes, encoder.data(*event))
        elif isinstance(event, Zeroes):
            parts += encoder.zeroes(*event)
    assert b"".join([*parts, encoder.end()]) == frozen


def test_every_frozen_stream_is_read() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(STREAMS) == set(DIGESTS)
