"""The first table of an image: it says what its entries say, and takes memory for what differs only."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import groupby

import pytest

from lmdbitmap.qcow2.first_table import FirstTable
from lmdbitmap.qcow2.layout import COPIED, OFFSET_MASK
from tests.helpers.qcow2_model import MemoryFile

PLACE = 512


def table(entries: list[int]) -> FirstTable:
    file = MemoryFile()
    file.pwrite(b"".join(entry.to_bytes(8, "big") for entry in [*[7] * 64, *entries, 7]), 0)
    return FirstTable(file, PLACE, len(entries))


def naive_runs(entries: list[int], first: int, stop: int) -> list[tuple[int, int, int]]:
    found, start = [], first
    for entry, alike in groupby(entries[first:stop]):
        end = start + len(list(alike))
        found.append((start, end, entry))
        start = end
    return found


def distinct(randomness: random.Random) -> int:
    return COPIED | randomness.randrange(1, 1 << 40) << 9


KINDS: dict[str, Callable[[random.Random], int]] = {
    "nothing": lambda randomness: 0,
    "next to nothing": lambda randomness: 0 if randomness.random() < 0.99 else distinct(randomness),
    "runs": lambda randomness: randomness.choice([0, 0, 512, 1024, COPIED | 512]),
    "everything": distinct,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 3000])
def test_runs_are_those_of_the_entries(kind: str, count: int) -> None:
    randomness = random.Random(f"{kind} {count}")
    entries = [KINDS[kind](randomness) for _ in range(count)]
    first_table = table(entries)
    ranges = [sorted(randomness.choices(range(count + 1), k=2)) for _ in range(50)]
    for first, stop in [(0, count), *ranges]:
        assert list(first_table.runs(first, stop)) == naive_runs(entries, first, stop)
    times = Counter(entry & OFFSET_MASK for entry in entries)
    assert first_table.shared() == {offset for offset, often in times.items() if often > 1}


def test_a_table_without_an_entry_has_no_runs() -> None:
    assert list(table([]).runs(0, 0)) == []
    assert table([]).shared() == set()


class Sparse:
    """A file of 32 MiB, of which every 1 MiB has one entry."""

    def pread(self, length: int, offset: int) -> bytes:
        return bytes([*bytes(6), 2, 0]) + bytes(length - 8)


def test_what_maps_next_to_nothing_takes_next_to_nothing() -> None:
    tracemalloc.start()
    try:
        kept = FirstTable(Sparse(), 0, 1 << 22)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(entry != 0 for _, _, entry in kept.runs(0, 1 << 22)) == 32
    assert now < 10_000
    assert peak < 4 << 20
