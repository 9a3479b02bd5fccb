"""What of a device is read, what is stored, and what is told meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lmdbitmap.bits import regrain_outward
from lmdbitmap.copying.copier import Copied, ImageFile, copy_clusters
from lmdbitmap.copying.readable import CHUNK_BYTES
from lmdbitmap.errors import StorageError
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.qcow2 import Kind, Qcow2Reader
from lmdbitmap.qcow2.compression import chosen
from lmdbitmap.qcow2.layout import cluster_bits_for
from lmdbitmap.work.progress import Report
from tests.helpers.qcow2_model import MemoryFile, naive_chain_read

CLUSTER = 8192
PAGE = 4096
"""Of `MemoryDevice`: a page of zeroes is a hole."""


class WatchedDevice(MemoryDevice):
    """Remembers what was read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(len(content))
        self._bytes[:] = content
        self.reads: list[tuple[int, int]] = []

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.reads.append((offset, len(buffer)))
        super().pread_into(buffer, offset)


class Image(MemoryFile):
    place = "image"


class NoDigests:
    """Nobody wants any."""

    def feed(self, offset: int, data: memoryview) -> Callable[[], None]:
        return lambda: None

    def wrote(self, offset: int, length: int) -> None:
        pass


def copied(
    device: MemoryDevice,
    runs: list[tuple[int, int]],
    *,
    backing_file: str | None = None,
    cluster_bits: int = 13,
    compression: str | None = None,
) -> tuple[Copied, MemoryFile]:
    file = Image()
    clusters = Geometry(device.size, cluster_bits)
    report = Report(None, 0)
    packing = None if compression is None else chosen(compression)
    counts = copy_clusters(
        device,
        file,
        NoDigests(),
        clusters,
        runs,
        backing_file=backing_file,
        report=report,
        compression=packing,
    )
    return counts, file


def kinds(file: MemoryFile) -> list[tuple[int, int, Kind]]:
    reader = Qcow2Reader(file)
    return [run[:3] for run in reader.extents(0, reader.size)]


def test_data_is_stored_and_the_rest_is_left_to_the_backing_file() -> None:
    device = WatchedDevice(b"x" * 4 * CLUSTER)
    counts, file = copied(device, [(1, 3)], backing_file="base.qcow2")
    assert counts == Copied(2 * CLUSTER, 0, len(file.content))
    assert device.reads == [(CLUSTER, 2 * CLUSTER)]
    assert kinds(file) == [
        (0, CLUSTER, Kind.UNALLOCATED),
        (CLUSTER, 2 * CLUSTER, Kind.DATA),
        (3 * CLUSTER, CLUSTER, Kind.UNALLOCATED),
    ]


def test_holes_become_zero_clusters_without_being_read() -> None:
    device = WatchedDevice(b"x" * CLUSTER + bytes(2 * CLUSTER) + b"x" * CLUSTER)
    counts, file = copied(device, [(0, 4)], backing_file="base.qcow2")
    assert counts[:2] == (4 * CLUSTER, 2 * CLUSTER)
    assert device.reads == [(0, CLUSTER), (3 * CLUSTER, CLUSTER)]
    assert kinds(file)[1] == (CLUSTER, 2 * CLUSTER, Kind.ZERO)


def test_a_cluster_that_a_hole_covers_in_part_is_read_whole() -> None:
    content = b"x" * PAGE + bytes(2 * CLUSTER) + b"x" * PAGE
    device = WatchedDevice(content)
    counts, _ = copied(device, [(0, 3)], backing_file="base.qcow2")
    assert counts[:2] == (3 * CLUSTER, CLUSTER)
    assert device.reads == [(0, CLUSTER), (2 * CLUSTER, CLUSTER)]


def test_zeroes_that_no_hole_announces_are_found_cluster_by_cluster() -> None:
    class Solid(WatchedDevice):
        def allocation(self, offset, length):  # type: ignore[no-untyped-def]
            return iter([])

    device = Solid(
        b"x" + bytes(CLUSTER - 1) + bytes(CLUSTER) + bytes(CLUSTER - 1) + b"x" + bytes(2 * CLUSTER)
    )
    counts, file = copied(device, [(0, 5)], backing_file="base.qcow2")
    assert counts[:2] == (5 * CLUSTER, 3 * CLUSTER)
    assert [kind for _, _, kind in kinds(file)] == [Kind.DATA, Kind.ZERO, Kind.DATA, Kind.ZERO]
    assert device.reads == [(0, 5 * CLUSTER)]


def test_zeroes_of_a_full_image_take_no_space() -> None:
    counts, file = copied(WatchedDevice(bytes(64 * CLUSTER)), [(0, 64)])
    assert counts[:2] == (64 * CLUSTER, 64 * CLUSTER)
    assert kinds(file) == [(0, 64 * CLUSTER, Kind.UNALLOCATED)]
    assert len(file.content) == 4 * CLUSTER  # header, L1, refcount block and table


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_zeroes_are_found_before_anything_is_compressed(compression: str) -> None:
    content = b"x" * CLUSTER + bytes(2 * CLUSTER) + os.urandom(CLUSTER) + b"x" * 100
    counts, file = copied(
        WatchedDevice(content), [(0, 5)], backing_file="base.qcow2", compression=compression
    )
    assert counts == Copied(4 * CLUSTER + 100, 2 * CLUSTER, file.size)
    assert [kind for _, _, kind in kinds(file)] == [Kind.COMPRESSED, Kind.ZERO, Kind.DATA, Kind.COMPRESSED]
    below = [bytes(copied(WatchedDevice(bytes(len(content))), [(0, 5)])[1].content)]
    assert naive_chain_read([bytes(file.content), *below])[: len(content)] == content


@pytest.mark.parametrize("tail", [1, 511, 512, 4095, CLUSTER - 1])
def test_the_last_cluster_may_be_short(tail: int) -> None:
    for last in (b"x" * tail, bytes(tail)):
        device = WatchedDevice(b"x" * CLUSTER + last)
        counts, file = copied(device, [(0, 2)])
        assert counts[:2] == (CLUSTER + tail, 0 if last[0] else tail)
        assert naive_chain_read([bytes(file.content)])[: device.size] == b"x" * CLUSTER + last


def test_a_disk_of_no_bytes_and_an_image_of_no_changes_are_images() -> None:
    assert copied(WatchedDevice(b""), [(0, 0)])[0][:2] == (0, 0)
    counts, file = copied(WatchedDevice(b"x" * CLUSTER), [], backing_file="base.qcow2")
    assert counts[:2] == (0, 0)
    assert kinds(file) == [(0, CLUSTER, Kind.UNALLOCATED)]


def test_long_runs_are_read_in_chunks_of_whole_clusters() -> None:
    size = 2 * CHUNK_BYTES + CLUSTER + 100
    device = WatchedDevice(b"x" * size)
    _, file = copied(device, [(0, Geometry(size, 13).block_count)])
    assert device.reads == [
        (0, CHUNK_BYTES), (CHUNK_BYTES, CHUNK_BYTES), (2 * CHUNK_BYTES, CLUSTER + 100),
    ]  # fmt: skip
    assert naive_chain_read([bytes(file.content)])[:size] == b"x" * size


def test_a_cluster_larger_than_a_chunk_is_read_at_once() -> None:
    device = WatchedDevice(b"x" * (3 << 20))
    copied(device, [(0, 2)], cluster_bits=21)
    assert device.reads == [(0, 2 << 20), (2 << 20, 1 << 20)]


def test_a_refusal_of_the_device_is_the_devices() -> None:
    device = WatchedDevice(b"x" * CLUSTER)
    device.fail_next["pread_into"] = errno.EIO
    with pytest.raises(OSError) as refused:
        copied(device, [(0, 1)])
    assert refused.value.errno == errno.EIO
    assert not isinstance(refused.value, StorageError)


def test_a_refusal_of_the_file_names_the_image(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        with pytest.raises(StorageError, match=r"^image\.qcow2: Illegal seek"):
            ImageFile(write_end, "image.qcow2").pwrite(b"x", 0)
    finally:
        os.close(write_end)


# --- clusters ---


@pytest.mark.parametrize(
    ("granularity_bits", "size", "cluster_bits"),
    [
        (9, 1 << 30, 12),
        (12, 1 << 30, 12),
        (14, 1 << 40, 14),
        (16, 1 << 40, 16),
        (31, 1 << 40, 16),
        (12, 1 << 42, 12),
        (12, (1 << 42) + 1, 13),
        (16, 1 << 50, 16),
        (16, 1 << 60, 21),
    ],
)
def test_a_cluster_is_a_block_within_bounds_that_the_disk_fits(
    granularity_bits: int, size: int, cluster_bits: int
) -> None:
    assert cluster_bits_for(Geometry(size, granularity_bits)) == cluster_bits


@pytest.mark.parametrize(
    ("blocks", "clusters"),
    [
        ([], []),
        ([(0, 1)], [(0, 1)]),
        ([(1, 2)], [(0, 1)]),
        ([(0, 8)], [(0, 1)]),
        ([(7, 9)], [(0, 2)]),
        ([(0, 1), (7, 8), (9, 10)], [(0, 2)]),
        ([(0, 1), (16, 17)], [(0, 1), (2, 3)]),
        ([(24, 25)], [(3, 4)]),
    ],
)
def test_small_blocks_are_widened_to_clusters_and_joined(
    blocks: list[tuple[int, int]], clusters: list[tuple[int, int]]
) -> None:
    assert list(regrain_outward(blocks, Geometry(24 * 512 + 1, 9), 12)) == clusters


def test_large_blocks_are_whole_runs_of_clusters() -> None:
    size = (1 << 20) + 5
    assert list(regrain_outward([(0, 1), (1, 2)], Geometry(size, 20), 16)) == [(0, 17)]


# --- progress ---


def told(steps: list[int], total: int) -> list[tuple[int, int]]:
    said: list[tuple[int, int]] = []
    report = Report(lambda done, of: said.append((done, of)), total)
    for step in steps:
        report.advance(step)
    return said


def test_progress_is_told_every_few_megabytes_and_at_the_end() -> None:
    said = told([65536] * 200, 200 * 65536)
    assert [done for done, _ in said] == [4 << 20, 8 << 20, 12 << 20, 200 * 65536]
    assert {total for _, total in said} == {200 * 65536}


def test_progress_never_goes_past_the_total() -> None:
    assert told([60, 60], 100) == [(100, 100)]
    assert told([100, 60], 100) == [(100, 100)]


def test_what_a_listener_raises_ends_the_copy() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Report(stop, 10).advance(10)
