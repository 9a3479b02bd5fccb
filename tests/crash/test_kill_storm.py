"""A small storm (kill_storm.py), and proof that the storm and its load would notice what they look for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.filter import Filter
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from tests.crash.kill_storm import MAX_ARMED, Storm, storm
from tests.crash.stamped_load import SECTOR, Load, Request, stamps_of
from tests.helpers import nbd_raw
from tests.helpers.support import Child, requires, spawn
from tests.helpers.tracked import NAME, quick_folder

SECTORS = 4000


@pytest.mark.alone
@requires("fio")
def test_server_that_is_killed_again_and_again_loses_nothing() -> None:
    raging = storm(kills=6, seed=3)
    assert raging.kills >= 6
    assert raging.requests > 50
    assert raging.fio_blocks > 0
    assert raging.clean_ends > 0
    assert len(raging.backups) >= 3
    assert len(raging.over_report) >= 6


# --- the storm can fail ---


class LateStorm(Storm):
    """Its servers make dirt durable a moment after the data was written, and not before."""

    LATE = """
import threading
from lmdbitmap.cli import main
from lmdbitmap.tracker.tracking import Tracking
mark = Tracking.mark

def mark_late(disk, runs):
    if not disk.is_astray:  # no write of a guest comes in the middle of a checkpoint
        mark(disk, runs)

Tracking.mark = lambda disk, runs: threading.Timer(0.05, mark_late, (disk, runs)).start()
main.main()
"""

    def starting(self) -> contextlib.AbstractContextManager[Child]:
        words = self.command("serve", NAME, "--socket", self.socket_path, "--max-armed", MAX_ARMED)[3:]
        return spawn(sys.executable, "-c", self.LATE, *words)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.mark.alone
def test_storm_notices_dirt_that_is_durable_too_late(folder: Path) -> None:
    late = LateStorm(folder, 1)
    complaints = (complaint_of(late) for _ in range(5))
    found = next(filter(None, complaints), "nothing")
    assert "reported clean" in found or "lost between" in found


def complaint_of(late: LateStorm) -> str:
    try:
        late.die_under_load()
    except AssertionError as complaint:
        return str(complaint)
    return ""


@pytest.fixture
def raging(folder: Path) -> Storm:
    raging = Storm(folder, 5)
    while not raging.points[-1].changed:
        raging.die_under_load()
    return raging


def test_storm_notices_a_record_that_is_gone(raging: Storm) -> None:
    raging.check_points()
    with closing(Store.open(raging.store_path)) as store, store.read() as reader:
        newest = chain.current_checkpoint(reader, chain.find_disk(reader, NAME))
    with closing(Store.open(raging.store_path)) as store:
        store.update(lambda writer: writer.delete_regions(newest.bitmap_id, 0))
    with pytest.raises(AssertionError, match="reported clean"):
        raging.check_points()


def test_storm_notices_an_extent_that_is_dirty_for_nothing(raging: Storm) -> None:
    with closing(Store.open(raging.store_path)) as store, Filter.attach(store, NAME) as disk:
        disk.mark(0, disk.size // 2)
    with pytest.raises(AssertionError, match="dirty for nothing"):
        raging.check_points()


def test_storm_notices_an_epoch_that_began(raging: Storm) -> None:
    with closing(Store.open(raging.store_path)) as store, Filter.attach(store, NAME) as disk:
        disk.start_epoch("a test")
    with pytest.raises(AssertionError, match="a new epoch"):
        raging.check_points()


def test_storm_notices_a_checkpoint_that_is_gone(raging: Storm) -> None:
    with closing(Store.open(raging.store_path)) as store, Filter.attach(store, NAME) as disk:
        disk.checkpoint("another")
        disk.forget(raging.points[-1].name)
    with pytest.raises(AssertionError, match="is gone"):
        raging.drop_forgotten([])


# --- the load can fail ---


@pytest.fixture
def load(folder: Path) -> Load:
    """Two requests were answered, one after the other, and a third was not; sectors 100, 100 to 101 and 101."""
    load = Load(str(folder / "nobody.sock"), NAME, SECTORS, seed=1, first_stamp=1)
    for stamp, sector, sector_count, oldest_rival in ((1, 100, 1, 1), (2, 100, 2, 2), (3, 101, 1, 3)):
        load.sent[stamp] = Request(stamp, nbd_raw.WRITE, sector, sector_count, oldest_rival)
    load.answered.update({1, 2})
    return load


def image(stamps: dict[int, int]) -> list[int]:
    content = b"".join(
        stamps.get(sector, 0).to_bytes(8, "little") * (SECTOR // 8) for sector in range(SECTORS)
    )
    return stamps_of(content)


def test_load_believes_an_image_that_is_as_it_may_be(load: Load) -> None:
    load.check_content(image({}), image({100: 2, 101: 2}))
    load.check_content(image({}), image({100: 2, 101: 3}))


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ({100: 1, 101: 2}, "sector 100: an answered write is gone"),
        ({100: 2}, "sector 101: an answered write is gone"),
        ({100: 3, 101: 2}, "sector 100 holds what was written to"),
        ({100: 9, 101: 2}, "sector 100 holds 9, which nobody wrote"),
        ({100: 2, 101: 2, 102: 2}, "a sector changed that nobody wrote to"),
    ],
)
def test_load_notices(load: Load, found: dict[int, int], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        load.check_content(image({}), image(found))


def test_sector_that_is_torn_is_nobodys() -> None:
    content = bytearray(b"\1".ljust(8, b"\0") * (SECTOR // 8))
    content[-8] = 2
    assert stamps_of(bytes(content)) == [-2]
