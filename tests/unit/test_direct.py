"""A snapshot read from the image itself: whatever a guest does in between, what comes is old data or an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.copying.readable import read_methods_of
from lmdbitmap.errors import InvalidArgument, StorageError
from lmdbitmap.filter import Filter
from lmdbitmap.images.device import FileDevice
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.snapshot import Snapshot
from tests.helpers.directly import STEPS, directly
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

BLOCK = 4096
BLOCKS = 64
SIZE = BLOCKS * BLOCK - 100
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def tracked(folder: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(folder, SIZE).clean()) as tracked:
        tracked.image.write_bytes((OLD * BLOCKS)[:SIZE])
        yield tracked


@pytest.fixture
def disk(tracked: TrackedDisk) -> Iterator[Filter]:
    with tracked.attach() as disk:
        yield disk


@pytest.fixture
def snapshot(disk: Filter, folder: Path) -> Snapshot:
    return disk.snapshot("s", Scratch(str(folder), 8 * BLOCK))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("once", [False, True])
def test_a_write_before_any_step_is_not_seen(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot, step: str, once: bool
) -> None:
    """Of two blocks, the first is kept from the beginning, so that every step comes."""
    steps = []

    def write(next_step: str) -> None:
        steps.append(next_step)
        if next_step == step:
            disk.pwrite(NEW[:100], 2 * BLOCK + 7)

    if once:
        snapshot.read_once()
    disk.pwrite(NEW, BLOCK)
    with closing(directly(snapshot, tracked.image, write)) as device:
        assert device.pread(3 * BLOCK, 0) == OLD * 3
    assert steps == list(STEPS)


def test_what_was_not_kept_does_not_come_through_the_export(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot
) -> None:
    disk.pwrite(NEW, 0)
    steps: list[str] = []
    with closing(directly(snapshot, tracked.image, steps.append)) as device:
        assert device.pread(SIZE - BLOCK, BLOCK) == (OLD * BLOCKS)[BLOCK:SIZE]
    assert steps == ["read", "ask", "end"]


def test_many_ranges_are_read_with_one_question(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot
) -> None:
    disk.pwrite(NEW * 2, 9 * BLOCK)
    found = [bytearray(BLOCK), bytearray(3 * BLOCK), bytearray(10)]
    places = [0, 8 * BLOCK + 50, SIZE - 10]
    steps: list[str] = []
    with closing(directly(snapshot, tracked.image, steps.append)) as device:
        device.pread_many([(memoryview(one), at) for one, at in zip(found, places, strict=True)])
    assert [bytes(one) for one in found] == [OLD, OLD * 3, OLD[:10]]
    assert steps.count("ask") == 1


def test_what_lies_between_can_be_asked_about_too(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot
) -> None:
    """Whether it was kept or not, it is nothing to the parts; and reading it later is an error, never new data."""
    snapshot.read_once()
    first, last = bytearray(BLOCK), bytearray(BLOCK)
    disk.pwrite(NEW * 2, BLOCK)
    steps: list[str] = []
    with closing(directly(snapshot, tracked.image, steps.append)) as device:
        device.pread_covered([(memoryview(first), 0), (memoryview(last), 5 * BLOCK)], [(0, 6 * BLOCK)])
        assert first == last == bytearray(OLD)
        assert steps == ["read", "read", "ask", "read again"], "and then nothing needs to be"
        disk.pwrite(NEW * 7, 0)
        assert device.pread(BLOCK, 6 * BLOCK) == OLD
        with pytest.raises(InvalidArgument, match="not any more"):
            device.pread(BLOCK, 3 * BLOCK)


def test_what_will_be_read_is_announced_to_the_image(
    tracked: TrackedDisk, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(FileDevice, "will_need", lambda self, offset, length: told.append((offset, length)))
    with closing(directly(snapshot, tracked.image)) as device:
        announce = read_methods_of(device).will_need
        assert announce is not None
        announce(BLOCK, 2 * BLOCK)
    assert told == [(BLOCK, 2 * BLOCK)]


def test_what_was_read_and_answered_for_is_given_up(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot
) -> None:
    """Whole clusters only: of others nobody has the rest."""
    snapshot.read_once()
    with closing(directly(snapshot, tracked.image)) as device:
        assert device.pread(10 * BLOCK + 1, 0) == OLD * 10 + OLD[:1]
        disk.pwrite(NEW * 12, 0)
        assert snapshot.kept_bytes == 2 * BLOCK
        assert device.pread(2 * BLOCK, 10 * BLOCK) == OLD * 2
        with pytest.raises(InvalidArgument, match="not any more"):
            device.pread(BLOCK, 9 * BLOCK)


def test_nothing_is_given_up_where_it_may_be_read_again(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot
) -> None:
    with closing(directly(snapshot, tracked.image)) as device:
        for _ in range(2):
            assert device.pread(4 * BLOCK, 0) == OLD * 4
            disk.pwrite(NEW * 4, 0)


@pytest.mark.parametrize("step", STEPS[:3])
def test_snapshot_that_breaks_before_the_last_step_fails_the_read(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot, step: str
) -> None:
    """Once broken it keeps nothing, so that what is not kept may be new."""

    def overflow(next_step: str) -> None:
        if next_step == step:
            disk.pwrite(NEW * 10, 20 * BLOCK)

    disk.pwrite(NEW, BLOCK)
    with (
        closing(directly(snapshot, tracked.image, overflow)) as device,
        pytest.raises(StorageError, match="is full"),
    ):
        device.pread(30 * BLOCK, 0)


@pytest.mark.parametrize("step", STEPS[:3])
def test_snapshot_that_is_released_before_the_last_step_fails_the_read(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot, step: str
) -> None:
    def release(next_step: str) -> None:
        if next_step == step:
            snapshot.release()
            disk.pwrite(NEW * 10, 20 * BLOCK)

    disk.pwrite(NEW, BLOCK)
    with (
        closing(directly(snapshot, tracked.image, release)) as device,
        pytest.raises(StorageError, match="released"),
    ):
        device.pread(30 * BLOCK, 0)


def test_what_is_not_wanted_is_not_called_right(
    tracked: TrackedDisk, disk: Filter, snapshot: Snapshot
) -> None:
    snapshot.want_only([(7, 8)], disk.disk.geometry)
    with closing(directly(snapshot, tracked.image)) as device:
        assert device.pread(BLOCK, 7 * BLOCK) == OLD
        with pytest.raises(InvalidArgument, match="not kept"):
            device.pread(2 * BLOCK, 7 * BLOCK)


def test_detach_in_the_middle_fails_the_read(tracked: TrackedDisk, folder: Path) -> None:
    disk = tracked.attach()
    snapshot = disk.snapshot("s", Scratch(str(folder)))

    def detach(next_step: str) -> None:
        if next_step == "ask":
            disk.detach()

    with closing(directly(snapshot, tracked.image, detach)) as device, pytest.raises(StorageError):
        device.pread(BLOCK, 0)


def test_ranges_are_those_of_the_disk(tracked: TrackedDisk, snapshot: Snapshot) -> None:
    assert snapshot.disk.name == NAME
    with closing(directly(snapshot, tracked.image)) as device:
        assert device.size == SIZE
        assert device.pread(0, SIZE) == b""
        with pytest.raises(InvalidArgument):
            device.pread(2, SIZE - 1)
        with pytest.raises(OSError, match="read-only"):
            device.pwrite(b"x", 0)
        assert sum(part.length for part in device.allocation(0, SIZE)) == SIZE
