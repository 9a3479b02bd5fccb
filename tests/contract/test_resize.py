"""A size that cannot be leaves the disk as it was, and usable."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lmdbitmap import chain, session
from lmdbitmap.errors import InvalidArgument
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import Geometry
from lmdbitmap.store import Store
from tests.support import make_raw_image

SIZE = 1 << 20


@pytest.mark.parametrize("size", [-1, 1 << 63, 1 << 62])
def test_a_size_that_cannot_be_tracked_is_refused(tmp_path: Path, size: int) -> None:
    with Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", str(make_raw_image(tmp_path / "sda.raw", SIZE)), granularity_bits=16)
        with Filter.attach(store, "sda", background=False) as disk:
            with pytest.raises(InvalidArgument):
                disk.resize(size)
            assert disk.size == disk.device.size == SIZE


def test_a_size_that_the_image_refuses_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", str(make_raw_image(tmp_path / "sda.raw", SIZE)), granularity_bits=16)
        with Filter.attach(store, "sda", background=False) as disk:
            disk.checkpoint("one")
            disk.pwrite(b"x", 0)

            def refuse(_: int) -> None:
                raise OSError(errno.EFBIG, "no room")

            with monkeypatch.context() as refusing:
                refusing.setattr(disk.device, "resize", refuse)
                with pytest.raises(OSError, match="no room"):
                    disk.resize(100 * SIZE)
            disk.pwrite(b"y", SIZE - 1)
            assert list(disk.changes().runs()) == [(0, 1), (15, 16)]
            assert disk.disk.resizing_from is None


def test_a_disk_with_too_many_blocks_is_refused() -> None:
    chain.check_trackable(Geometry(1 << 46, 9))
    with pytest.raises(InvalidArgument, match="larger granularity"):
        chain.check_trackable(Geometry((1 << 46) + 1, 9))
