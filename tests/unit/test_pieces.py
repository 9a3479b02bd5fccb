"""The pieces of a run are the run: no gap, no byte twice, zeroes where and only where a whole block of them is."""

from __future__ import annotations

import random

import pytest

from lmdbitmap.device import MemoryDevice
from lmdbitmap.geometry import Geometry
from lmdbitmap.pieces import CHUNK_BYTES, Pieces

BLOCK_BITS = 13
BLOCK = 1 << BLOCK_BITS


def device_with(randomness: random.Random, block_count: int, tail: int) -> MemoryDevice:
    """Blocks of zeroes, of data, and of zeroes but for one byte."""
    device = MemoryDevice(block_count * BLOCK + tail)
    for offset in range(0, device.size, BLOCK):
        length = min(BLOCK, device.size - offset)
        kind = randomness.randrange(3)
        if kind == 1:
            device.pwrite(randomness.randbytes(length), offset)
        elif kind == 2:
            device.pwrite(b"x", offset + randomness.randrange(length))
    return device


@pytest.mark.parametrize("tail", [0, 1, 4095, 4097])
@pytest.mark.parametrize("block_count", [1, 40, 2 * CHUNK_BYTES // BLOCK + 3])
def test_the_pieces_are_the_run(block_count: int, tail: int) -> None:
    randomness = random.Random(block_count + tail)
    device = device_with(randomness, block_count, tail)
    blocks = Geometry(device.size, BLOCK_BITS)
    start = randomness.randrange(block_count)
    position, end = start * BLOCK, device.size
    kinds = set()
    for offset, length, data in Pieces(device, blocks).of((start, blocks.block_count)):
        assert offset == position
        assert 0 < length <= CHUNK_BYTES or data is None
        whole = device.pread(length, offset)
        assert bytes(data if data is not None else bytes(length)) == whole
        for block in range(0, length, BLOCK):
            assert any(whole[block : block + BLOCK]) is (data is not None)
        kinds.add(data is None)
        position += length
    assert position == end
    assert len(kinds) == 2 or block_count == 1
