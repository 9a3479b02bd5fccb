"""A backup's chain onto what holds something already: what is written, what is left alone, beside a naive look."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap import backup_chain
from lmdbitmap.backup_chain import BackupChain
from lmdbitmap.copier import Report
from lmdbitmap.device import PAGE_BYTES, MemoryDevice
from lmdbitmap.putting_back import Comparing, Overwriting, differences
from lmdbitmap.target import Target
from tests.backed_up import BackedUpDisk

MIB = 1 << 20
SIZE = 3 * MIB + 700


class Watched(MemoryDevice):
    """Notes every change, and every read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(len(content))
        super().pwrite(content, 0)
        self.written: set[int] = set()
        self.zeroed: set[int] = set()
        self.bytes_read = 0

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        super().pwrite(data, offset)
        self.written |= pages(offset, len(data))

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        self.zeroed |= pages(offset, length)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        super().pread_into(buffer, offset)
        self.bytes_read += len(buffer)

    def content(self) -> bytes:
        return self.pread(self.size, 0)


def pages(offset: int, length: int) -> set[int]:
    return set(range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(random.Random(1).randbytes(MIB + 5000), MIB // 2)
    made.backup()
    made.write(random.Random(2).randbytes(300_000), MIB)
    made.zero(MIB // 2, 100_000)
    made.write(b"end", SIZE - 3)
    made.backup()
    yield made
    made.close()


@pytest.fixture
def chain(disk: BackedUpDisk) -> Iterator[BackupChain]:
    with backup_chain.opened(disk.backup_folder(), disk.manifest().backups) as opened:
        yield opened


def compared(chain: BackupChain, device: Watched) -> Comparing:
    way = Comparing(chain, Target("memory", device), Report(None, chain.size))
    for run in chain.extents(0, chain.size):
        way.put(run, None)
    return way


def differing_pages(one: bytes, other: bytes) -> set[int]:
    return {
        offset // PAGE_BYTES
        for offset in range(0, len(one), PAGE_BYTES)
        if one[offset : offset + PAGE_BYTES] != other[offset : offset + PAGE_BYTES]
    }


def test_exactly_the_pages_that_differ_are_changed(disk: BackedUpDisk, chain: BackupChain) -> None:
    before = bytearray(disk.content())
    randomness = random.Random(3)
    for _ in range(40):
        before[randomness.randrange(SIZE)] ^= 0x55
    device = Watched(bytes(before))
    way = compared(chain, device)
    assert device.content() == disk.content()
    assert device.written | device.zeroed == differing_pages(bytes(before), disk.content())
    assert not device.written & device.zeroed
    assert way.bytes_written + way.bytes_zeroed <= 40 * PAGE_BYTES
    assert way.bytes_read == device.bytes_read > MIB


def test_what_is_right_already_is_not_touched(disk: BackedUpDisk, chain: BackupChain) -> None:
    device = Watched(disk.content())
    way = compared(chain, device)
    assert (device.written, device.zeroed) == (set(), set())
    assert (way.bytes_written, way.bytes_zeroed) == (0, 0)


def test_zeroes_that_the_target_knows_of_are_not_read(chain: BackupChain) -> None:
    """It is all zeroes, and only where the backup has data is it looked at."""
    device = Watched(bytes(SIZE))
    way = compared(chain, device)
    data = sum(run.length for run in chain.extents(0, SIZE) if run.kind is run.kind.DATA)
    assert way.bytes_read == data < SIZE
    assert device.zeroed == set()


def test_zeroes_are_zeroed_and_not_written_out(disk: BackedUpDisk, chain: BackupChain) -> None:
    device = Watched(b"\xff" * SIZE)
    way = compared(chain, device)
    assert device.content() == disk.content()
    assert way.bytes_written + way.bytes_zeroed == SIZE
    assert len(device.zeroed) > 100


@pytest.mark.parametrize("fresh", [True, False])
def test_overwriting_zeroes_only_what_may_hold_something(
    disk: BackedUpDisk, chain: BackupChain, fresh: bool
) -> None:
    device = Watched(bytes(SIZE) if fresh else b"\xff" * SIZE)
    way = Overwriting(chain, Target("memory", device, is_fresh=fresh), Report(None, SIZE))
    for run in chain.extents(0, SIZE):
        way.put(run, None)
    assert device.content() == disk.content()
    assert device.bytes_read == way.bytes_read == 0
    assert (way.bytes_zeroed == 0) is fresh


def test_overwriting_leaves_zeroes_that_the_target_knows_of(disk: BackedUpDisk, chain: BackupChain) -> None:
    device = Watched(bytes(SIZE))
    way = Overwriting(chain, Target("memory", device), Report(None, SIZE))
    for run in chain.extents(0, SIZE):
        way.put(run, None)
    assert (device.content(), way.bytes_zeroed) == (disk.content(), 0)


def test_progress_comes_to_the_end_either_way(chain: BackupChain) -> None:
    for way in (Comparing, Overwriting):
        told: list[int] = []
        report = Report(lambda done, total: told.append(done), SIZE)  # noqa: B023
        putting = way(chain, Target("memory", Watched(b"x" * SIZE)), report)
        for run in chain.extents(0, SIZE):
            putting.put(run, None)
        assert told[-1] == SIZE


# --- comparing two buffers ---

lengths = st.one_of(st.integers(0, 5 * PAGE_BYTES), st.integers(0, 300_000))


@given(length=lengths, places=st.lists(st.integers(0, 299_999), max_size=12))
def test_differences_are_those_that_a_look_at_each_page_finds(length: int, places: list[int]) -> None:
    one, other = bytearray(300_000), bytearray(300_000)
    for place in places:
        other[place] = 1
    found = list(differences(one, other, length))
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(found))
    covered = {page for start, stop in found for page in pages(start, stop - start)}
    assert covered == differing_pages(bytes(one[:length]), bytes(other[:length]))
    assert all(
        start % PAGE_BYTES == 0 and (stop % PAGE_BYTES == 0 or stop == length) for start, stop in found
    )


def test_runs_go_on_over_the_edge_of_a_coarse_piece() -> None:
    one, other = bytearray(200_000), bytearray(b"x" * 200_000)
    assert list(differences(one, other, 200_000)) == [(0, 200_000)]
