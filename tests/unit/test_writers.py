"""A backup's chain onto what holds something already: what is written, what is left alone, beside a naive look."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.images.device import PAGE_BYTES
from lmdbitmap.repository import backup_chain
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.restoring.writers import Comparing, Overwriting
from lmdbitmap.targets.target import Target
from lmdbitmap.work.progress import Report
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.watched import Watched, differing_pages

MIB = 1 << 20
SIZE = 3 * MIB + 700


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
    writer = Comparing(chain, Target("memory", device), Report(None, chain.size))
    writer.put_all(chain.extents(0, chain.size))
    return writer


def test_exactly_the_pages_that_differ_are_changed(disk: BackedUpDisk, chain: BackupChain) -> None:
    before = bytearray(disk.content())
    randomness = random.Random(3)
    for _ in range(40):
        before[randomness.randrange(SIZE)] ^= 0x55
    device = Watched(bytes(before))
    writer = compared(chain, device)
    assert device.content() == disk.content()
    assert device.written | device.zeroed == differing_pages(bytes(before), disk.content())
    assert not device.written & device.zeroed
    assert writer.bytes_written + writer.bytes_zeroed <= 40 * PAGE_BYTES
    assert writer.bytes_read == device.bytes_read > MIB


def test_what_is_right_already_is_not_touched(disk: BackedUpDisk, chain: BackupChain) -> None:
    device = Watched(disk.content())
    writer = compared(chain, device)
    assert (device.written, device.zeroed) == (set(), set())
    assert (writer.bytes_written, writer.bytes_zeroed) == (0, 0)


def test_zeroes_that_the_target_knows_of_are_not_read(chain: BackupChain) -> None:
    """It is all zeroes, and only where the backup has data is it looked at."""
    device = Watched(bytes(SIZE))
    writer = compared(chain, device)
    data = sum(run.length for run in chain.extents(0, SIZE) if run.kind is run.kind.DATA)
    assert writer.bytes_read == data < SIZE
    assert device.zeroed == set()


def test_zeroes_are_zeroed_and_not_written_out(disk: BackedUpDisk, chain: BackupChain) -> None:
    device = Watched(b"\xff" * SIZE)
    writer = compared(chain, device)
    assert device.content() == disk.content()
    assert writer.bytes_written + writer.bytes_zeroed == SIZE
    assert len(device.zeroed) > 100


@pytest.mark.parametrize("fresh", [True, False])
def test_overwriting_zeroes_only_what_may_hold_something(
    disk: BackedUpDisk, chain: BackupChain, fresh: bool
) -> None:
    device = Watched(bytes(SIZE) if fresh else b"\xff" * SIZE)
    writer = Overwriting(chain, Target("memory", device, is_fresh=fresh), Report(None, SIZE))
    writer.put_all(chain.extents(0, SIZE))
    assert device.content() == disk.content()
    assert device.bytes_read == writer.bytes_read == 0
    assert (writer.bytes_zeroed == 0) is fresh


def test_overwriting_leaves_zeroes_that_the_target_knows_of(disk: BackedUpDisk, chain: BackupChain) -> None:
    device = Watched(bytes(SIZE))
    writer = Overwriting(chain, Target("memory", device), Report(None, SIZE))
    writer.put_all(chain.extents(0, SIZE))
    assert (device.content(), writer.bytes_zeroed) == (disk.content(), 0)


def test_progress_comes_to_the_end_either_way(chain: BackupChain) -> None:
    for writer in (Comparing, Overwriting):
        told: list[int] = []
        report = Report(lambda done, total: told.append(done), SIZE)  # noqa: B023
        putting = writer(chain, Target("memory", Watched(b"x" * SIZE)), report)
        putting.put_all(chain.extents(0, SIZE))
        assert told[-1] == SIZE
