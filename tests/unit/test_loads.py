"""Loads are the runs, in order, as much at once as a buffer holds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.bits import Run
from lmdbitmap.copying.loads import SMALL_BYTES, Load, Loads
from lmdbitmap.copying.readable import CHUNK_BYTES
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.interfaces import Allocation

BLOCK = 4096
MIB = 1 << 20


class Small(MemoryDevice):
    """Is read by three blocks."""

    chunk_bytes = 3 * BLOCK


@given(
    kinds=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    tail=st.integers(1, BLOCK),
    gaps=st.lists(st.integers(0, 60), max_size=8, unique=True),
)
def test_loads_are_the_runs(kinds: list[int], tail: int, gaps: list[int]) -> None:
    """Blocks of zeroes, which are holes, and others; some between are not asked for."""
    device = Small((len(kinds) - 1) * BLOCK + tail)
    for block, kind in enumerate(kinds):
        if kind:
            device.pwrite(bytes([kind]), block * BLOCK + (kind * 1000) % min(tail, BLOCK))
    blocks = Geometry(device.size, 12)
    wanted = [block for block in range(len(kinds)) if block not in gaps]
    loads = Loads(device, blocks)
    planned = list(loads.planned(runs_of(wanted)))
    places = [place for load in planned for place in load]
    assert [block for offset, length, _ in places for block in blocks_of(offset, length)] == wanted
    assert [(sum(length for _, length, zero in load if not zero)) <= 3 * BLOCK for load in planned] == [
        True
    ] * len(planned)
    for load in planned:
        check_read(device, loads, load)


def runs_of(blocks: list[int]) -> Iterator[Run]:
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield blocks[start], blocks[at - 1] + 1
            start = at


def blocks_of(offset: int, length: int) -> range:
    assert offset % BLOCK == 0
    return range(offset // BLOCK, -(-(offset + length) // BLOCK))


def check_read(device: MemoryDevice, loads: Loads, load: Load) -> None:
    """The stretches are the load, each what the device has there."""
    buffer = bytearray(b"?" * loads.buffer_bytes)
    position = iter([(offset, offset + length) for offset, length, _ in load])
    at = end = 0
    for offset, length, start in loads.read(load, buffer):
        if at == end:
            at, end = next(position)
        assert offset == at
        content = bytes(length) if start is None else bytes(buffer[start : start + length])
        assert content == device.pread(length, offset)
        assert start is None or any(content[:BLOCK])
        at += length
    assert at == end
    assert next(position, None) is None


def test_many_runs_go_into_one_load() -> None:
    device = MemoryDevice(64 * MIB)
    device.pwrite(b"x" * device.size, 0)
    runs = [(start, start + 16) for start in range(0, device.size // BLOCK, 32)]
    planned = list(Loads(device, Geometry(device.size, 12)).planned(runs))
    assert {sum(place.length for place in load) for load in planned} == {CHUNK_BYTES}
    assert len(planned) == 32


def test_a_load_of_zeroes_is_no_longer_than_others() -> None:
    device = MemoryDevice(4000 * BLOCK)
    runs = [(start, start + 1) for start in range(0, 4000, 2)]
    planned = list(Loads(device, Geometry(device.size, 12)).planned(runs))
    assert [len(load) for load in planned] == [256] * 7 + [208]
    assert all(place.zero for load in planned for place in load)


@pytest.mark.parametrize("travels", [False, True])
def test_of_small_runs_no_question_travels(travels: bool) -> None:
    class Asked(MemoryDevice):
        def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
            asked.append(length)
            return super().allocation(offset, length)

    class Far(Asked):
        def pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None: ...

    asked: list[int] = []
    device = (Far if travels else Asked)(8 * MIB)
    small, large = SMALL_BYTES // BLOCK, SMALL_BYTES // BLOCK + 1
    list(Loads(device, Geometry(device.size, 12)).planned([(0, 1), (2, 2 + small), (500, 500 + large)]))
    assert asked == ([large * BLOCK] if travels else [BLOCK, small * BLOCK, large * BLOCK])


def test_a_device_is_told_which_ranges_it_reads_in() -> None:
    """Holes between data are part of them, what nobody asked for is not."""

    class Covered(MemoryDevice):
        def pread_covered(
            self, parts: Sequence[tuple[memoryview, int]], ranges: Sequence[tuple[int, int]]
        ) -> None:
            told.append(([(offset, len(into)) for into, offset in parts], list(ranges)))

    told: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = []
    large, mib = SMALL_BYTES + BLOCK, MIB
    device = Covered(8 * mib)
    for offset in (0, mib, 3 * mib):
        device.pwrite(b"x" * large, offset)
    loads = Loads(device, Geometry(device.size, 12))
    runs = [(0, (mib + large) // BLOCK + 100), (2 * mib // BLOCK, 4 * mib // BLOCK), (1800, 1801)]
    [load] = loads.planned(runs)
    loads.read(load, bytearray(loads.buffer_bytes))
    small = 1800 * BLOCK
    assert told == [
        (
            [(0, large), (mib, large), (3 * mib, large), (small, BLOCK)],
            [(0, mib + large + 100 * BLOCK), (2 * mib, 2 * mib), (small, BLOCK)],
        )
    ]


def test_a_block_larger_than_a_chunk_is_read_at_once() -> None:
    device = MemoryDevice(5 * MIB)
    device.pwrite(random.Random(1).randbytes(device.size), 0)
    loads = Loads(device, Geometry(device.size, 21))
    assert loads.buffer_bytes == 2 * MIB
    assert [load[0].length for load in loads.planned([(0, 3)])] == [2 * MIB, 2 * MIB, MIB]
