"""The two ways through a chain of images: beside each other, and beside a painter who goes byte by byte."""

from __future__ import annotations

import random
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.qcow2 import Kind, MappedRun, Qcow2Reader, Qcow2Writer, chain, chain_extents
from lmdbitmap.qcow2.reader import joined
from tests.helpers.qcow2_model import MemoryFile

COMPRESSED_CLUSTER = 4


@given(st.data())
def test_what_is_seen_from_above_is_what_a_painter_would_leave(data: st.DataObject) -> None:
    """Layers are painted from the lowest up, a byte at a time."""
    size, layers = 60, data.draw(st.integers(0, 5))
    painted: list[tuple[int, ...] | None] = [None] * size
    stored: list[MappedRun] = []
    for layer in reversed(range(layers)):
        edges = sorted(data.draw(st.sets(st.integers(0, size), max_size=12)))
        for start, stop in zip(edges[::2], edges[1::2], strict=False):
            kind = data.draw(st.sampled_from([Kind.DATA, Kind.ZERO, Kind.COMPRESSED]))
            place = {Kind.DATA: 1000 * layer + start, Kind.ZERO: 0, Kind.COMPRESSED: start}[kind]
            stored.append(
                MappedRun(start, stop - start, kind, place, layer, start if kind is Kind.COMPRESSED else 0)
            )
            for byte in range(start, stop):
                painted[byte] = place_of(stored[-1], byte)
    with patch.object(chain, "_MOST_COVERING", data.draw(st.sampled_from([0, 1024]))):
        seen = list(chain.overlaid(iter(sorted(stored, key=lambda run: run.offset)), 0, size))
    found: list[tuple[int, ...] | None] = []
    for part in seen:
        assert (part.offset, part.length > 0) == (len(found), True)
        found += [place_of(part, byte) for byte in range(part.offset, part.end)]
    assert found == painted


def place_of(run: MappedRun, byte: int) -> tuple[int, ...] | None:
    """Where a byte of the disk is; of what is compressed, where all of its cluster is."""
    if run.kind is Kind.COMPRESSED:
        return run.layer, run.host_offset, run.host_length
    return (run.layer, run.host_offset + byte - run.offset) if run.kind is Kind.DATA else None


@given(st.integers(0, 1 << 32), st.integers(1, 6), st.data())
def test_walked_or_swept_the_extents_are_the_same(seed: int, layers: int, data: st.DataObject) -> None:
    randomness = random.Random(seed)
    readers = [image(randomness, is_full=layer == layers - 1) for layer in range(layers)]
    size = readers[0].size
    offset = data.draw(st.integers(0, size))
    end = data.draw(st.integers(offset, size))
    swept = list(chain.overlaid(chain.merged(chain.stored(readers, offset, end)), offset, end))
    walked = list(joined(chain._walked(readers, readers[0].extents(offset, end - offset))))
    assert swept == walked == list(chain_extents(readers, offset, end - offset))


def image(randomness: random.Random, *, is_full: bool) -> Qcow2Reader:
    """Of clusters of 512 bytes, each of which is data, zero or not there."""
    sink, size = MemoryFile(), 512 * randomness.randrange(130)
    writer = Qcow2Writer(sink, size=size, cluster_bits=9, backing_file=None if is_full else "parent")
    for offset in range(0, size, 512):
        choice = randomness.randrange(4)
        if choice == 0:
            writer.write(offset, randomness.randbytes(512))
        elif choice == 1:
            writer.write_zeroes(offset, 512)
    writer.finish()
    return Qcow2Reader(sink)


def test_a_deep_chain_is_swept_with_one_look_at_each_table() -> None:
    """Every image has every other cluster of its own stretch: a walk would ask all below about each gap."""
    count, readers, files = 200, [], []
    for layer in range(count):
        sink = MemoryFile()
        writer = Qcow2Writer(
            sink, size=count * 1024, cluster_bits=9, backing_file="parent" if layer < count - 1 else None
        )
        writer.write(layer * 1024, b"x" * 512)
        writer.finish()
        readers.append(Qcow2Reader(sink))
        files.append(sink)
    for file in files:
        file.reads.clear()
    runs = list(chain_extents(readers, 0, count * 1024))
    assert [run.layer for run in runs if run.is_stored] == list(range(count))
    assert max(len(file.reads) for file in files) == 1
