"""Where a disk differs from its backup: beside a comparison cluster by cluster."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.backups.rescan import differing, sifted
from lmdbitmap.bits import joined_runs
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.memory_device import MemoryDevice

CLUSTER_BITS = 12
CLUSTER = 1 << CLUSTER_BITS

pieces = st.lists(
    st.tuples(
        st.integers(0, 60 * CLUSTER), st.sampled_from([1, 100, CLUSTER, 9 * CLUSTER]), st.integers(0, 2)
    ),
    max_size=8,
)


def device(size: int, writes: list[tuple[int, int, int]]) -> MemoryDevice:
    made = MemoryDevice(size)
    for offset, length, value in writes:
        length = min(length, size - offset)
        if length > 0:
            made.pwrite(bytes([value]) * length, offset)
    return made


def naive(new: bytes, old: bytes) -> list[int]:
    old = old[: len(new)] + bytes(max(len(new) - len(old), 0))
    return [
        number
        for number, at in enumerate(range(0, len(new), CLUSTER))
        if new[at : at + CLUSTER] != old[at : at + CLUSTER]
    ]


@given(
    size=st.integers(0, 60 * CLUSTER),
    old_size=st.integers(0, 60 * CLUSTER),
    both=pieces,
    new=pieces,
    old=pieces,
)
def test_it_finds_the_clusters_that_differ_and_no_others(
    size: int, old_size: int, both: list[tuple[int, int, int]], new: list[tuple[int, int, int]],
    old: list[tuple[int, int, int]],
) -> None:  # fmt: skip
    current, past = device(size, both + new), device(old_size, both + old)
    told: list[int] = []
    runs = list(differing(current, past, Geometry(size, CLUSTER_BITS), told.append))
    found = [cluster for start, stop in runs for cluster in range(start, stop)]
    assert found == naive(current.pread(size, 0), past.pread(old_size, 0))
    assert all(stop < start for (_, stop), (start, _) in pairwise(runs))
    assert sum(told) == size


@pytest.mark.parametrize("size", [3 << 20, (3 << 20) + 5])
def test_it_compares_whole_chunks_too(size: int) -> None:
    data = random.Random(1).randbytes(size)
    current, past = MemoryDevice(size), MemoryDevice(size)
    current.pwrite(data, 0)
    past.pwrite(data, 0)
    current.pwrite(b"?", size - 1)
    current.pwrite(b"?", 1 << 20)
    last = (size - 1) // CLUSTER
    assert list(differing(current, past, Geometry(size, CLUSTER_BITS))) == [(256, 257), (last, last + 1)]


def test_what_both_know_to_be_zero_is_not_read() -> None:
    size = 64 * CLUSTER
    current, past = device(size, [(20 * CLUSTER, 1, 1)]), device(size, [(20 * CLUSTER, 1, 1)])
    read: list[tuple[int, int]] = []
    pread_into = current.pread_into

    def watched(buffer: memoryview, offset: int) -> None:
        read.append((offset, len(buffer)))
        pread_into(buffer, offset)

    current.pread_into = watched  # type: ignore[method-assign]
    assert list(differing(current, past, Geometry(size, CLUSTER_BITS))) == []
    assert read == [(20 * CLUSTER, CLUSTER)]


@given(
    size=st.integers(1, 60 * CLUSTER),
    old_size=st.integers(0, 60 * CLUSTER),
    both=pieces,
    new=pieces,
    old=pieces,
    dirty=st.sets(st.integers(0, 59)) | st.just(set(range(60))),
    extent=st.sampled_from([1, 2, 8, 16]),
)
def test_of_whole_extents_that_are_dirty_what_differs_is_left(
    size: int, old_size: int, both: list[tuple[int, int, int]], new: list[tuple[int, int, int]],
    old: list[tuple[int, int, int]], dirty: set[int], extent: int,
) -> None:  # fmt: skip
    clusters = Geometry(size, CLUSTER_BITS)
    current, past = device(size, both + new), device(old_size, both + old)
    dirty = {cluster for cluster in dirty if cluster < clusters.block_count}
    told: list[int] = []
    runs = joined_runs((cluster, cluster + 1) for cluster in sorted(dirty))
    found = list(sifted(runs, current, past, clusters, extent * CLUSTER, told.append))
    differ = set(naive(current.pread(size, 0), past.pread(old_size, 0)))
    whole = {
        cluster
        for cluster in dirty
        if dirty
        >= {*range(cluster // extent * extent, cluster // extent * extent + extent)}
        & {*range(clusters.block_count)}
    }
    left = {cluster for start, stop in found for cluster in range(start, stop)}
    assert left == dirty - (whole - differ)
    assert all(stop < start for (_, stop), (start, _) in pairwise(found))
    assert sum(told) == sum(clusters.bytes_of(cluster, cluster + 1)[1] for cluster in dirty)
