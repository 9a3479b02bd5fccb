"""Which disks are there and which are attached; what is wrong with one is no matter of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.access import owners
from lmdbitmap.errors import Busy, NotFound
from lmdbitmap.filter import Filter
from lmdbitmap.tracker import session
from lmdbitmap.work.failures import Failures
from tests.helpers.serving import serving
from tests.helpers.support import make_raw_image
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def disk(folder: Path) -> TrackedDisk:
    tracked = TrackedDisk(folder, 4096)
    for name in ("sdb", "sdc"):
        session.add(tracked.store, name, str(make_raw_image(folder / name, 4096)), granularity_bits=12)
    return tracked


def test_an_unknown_disk_is_set_aside(disk: TrackedDisk) -> None:
    apart = Failures()
    assert owners.tracked(disk.store, [NAME, "sdx", "sdb"], apart) == [NAME, "sdb"]
    assert isinstance(apart.errors["sdx"], NotFound)
    with pytest.raises(NotFound):
        owners.tracked(disk.store, ["sdx"], Failures(at_once=True))
    disk.close()


def test_who_has_a_disk_for_itself_is_no_server_of_it(disk: TrackedDisk, folder: Path) -> None:
    apart, names = Failures(), [NAME, "sdb", "sdc"]
    with serving(disk, folder), Filter.attach(disk.store, "sdb", background=False):
        assert owners.attached_elsewhere(disk.store, names, apart) == [NAME]
        assert isinstance(apart.errors["sdb"], Busy)
        assert "owned by a process that does not serve it" in str(apart.errors["sdb"])
        assert list(apart.errors) == ["sdb"]
        assert [owners.is_attached(disk.store, name) for name in names] == [True, True, False]
