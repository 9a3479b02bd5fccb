"""A size that cannot be leaves the disk as it was, and usable."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.errors import InvalidArgument, StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import Geometry
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain, session
from tests.helpers.support import make_raw_image

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Filter]:
    with Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", str(make_raw_image(tmp_path / "sda.raw", SIZE)), granularity_bits=16)
        with Filter.attach(store, "sda", background=False) as attached:
            yield attached


@pytest.mark.parametrize("size", [-1, 1 << 63, 1 << 62])
def test_a_size_that_cannot_be_tracked_is_refused(disk: Filter, size: int) -> None:
    with pytest.raises(InvalidArgument):
        disk.resize(size)
    assert disk.size == disk.device.size == SIZE


def test_a_size_that_the_image_refuses_changes_nothing(disk: Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.checkpoint("one")
    disk.pwrite(b"x", 0)

    def refuse(_: int) -> None:
        raise OSError(errno.EFBIG, "no room")

    with monkeypatch.context() as refusing:
        refusing.setattr(disk.device, "resize", refuse)
        with pytest.raises(OSError, match="no room; raise the limit"):
            disk.resize(100 * SIZE)
    disk.pwrite(b"y", SIZE - 1)
    assert list(disk.changes().runs()) == [(0, 1), (15, 16)]
    assert disk.disk.resizing_from is None


def test_a_shrunk_image_that_then_fails_has_its_new_size(
    disk: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.checkpoint("one")

    def fail() -> None:
        raise OSError(errno.EIO, "the disk fails")

    with monkeypatch.context() as failing:
        failing.setattr(disk.device, "flush", fail)
        with pytest.raises(StorageError, match="could not be flushed"):
            disk.resize(SIZE // 2)
    assert disk.size == disk.device.size == SIZE // 2
    with pytest.raises(StorageError, match="could not be flushed"):
        disk.detach()
    with Filter.attach(disk.store, "sda", background=False) as again:
        assert again.size == again.device.size == SIZE // 2
        again.resize(SIZE)
        with pytest.raises(Untrusted, match="could not be flushed"):
            again.changes(since="one")


def test_a_shrink_that_cannot_be_recorded_loses_track(disk: Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is short, and nobody may believe that nothing was cut off."""
    disk.checkpoint("one")
    store = disk.store
    real_update, real_resize = store.update, disk.device.resize

    def shrink_and_break_the_store(size: int) -> None:
        def refuse(_: object) -> None:
            raise StorageError("store", OSError(errno.ENOSPC, "full"), next_step="free some space")

        real_resize(size)
        monkeypatch.setattr(store, "update", refuse)

    monkeypatch.setattr(disk.device, "resize", shrink_and_break_the_store)
    with pytest.raises(StorageError):
        disk.resize(SIZE // 2)
    assert disk.changes(since="one").summary.standing.trust is Trust.UNTRUSTED
    monkeypatch.setattr(store, "update", real_update)
    disk.background_pass()
    assert disk.disk.epoch_number == 2
    assert disk.size == disk.device.size == SIZE // 2


def test_a_disk_cut_and_grown_again_is_dirty_there_in_closed_periods_too(disk: Filter) -> None:
    disk.checkpoint("one")
    disk.pwrite(b"x", SIZE - 1)
    disk.checkpoint("two")
    disk.resize(SIZE // 2)
    disk.resize(SIZE)
    assert list(disk.changes(since="one", until="two").runs()) == [(8, 16)]


def test_a_disk_with_too_many_blocks_is_refused() -> None:
    chain.check_trackable(Geometry(1 << 46, 9))
    with pytest.raises(InvalidArgument, match="larger granularity"):
        chain.check_trackable(Geometry((1 << 46) + 1, 9))
