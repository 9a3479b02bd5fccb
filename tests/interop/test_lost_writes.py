"""A file system that loses what was written, and says so once: of a target, of a snapshot's old data."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.errors import StorageError
from lmdbitmap.restoring.restore import restore
from lmdbitmap.syncs.sync import sync
from lmdbitmap.tracker.scratch import Scratch
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.crash.full_disk import can_mount, fill, free, full_tmpfs
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import requires, run
from tests.helpers.tracked import NAME

pytestmark = [
    requires("mkfs.xfs"),
    pytest.mark.skipif(not can_mount() or not can_make_loop_devices(), reason="only root can mount"),
]

MIB = 1 << 20
SIZE = 2 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    with closing(BackedUpDisk(tmp_path, SIZE)) as disk:
        disk.write(os.urandom(SIZE), 0)
        disk.backup()
        yield disk


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "ram"
    folder.mkdir()
    with full_tmpfs(folder, 200 * MIB):
        yield folder


@pytest.fixture
def xfs(tmp_path: Path, ram: Path) -> Iterator[Path]:
    """On a thin device, which has room only as long as `ram` has."""
    place = tmp_path / "xfs"
    place.mkdir()
    with loop_node(ram, 320 * MIB) as node:
        run("mkfs.xfs", "-q", node)
        run("mount", node, place)
        try:
            yield place
        finally:
            run("umount", place)


def restored_in_place(disk: BackedUpDisk, target: Path) -> None:
    restore(disk.folder / "backups", NAME, target, in_place=True)


def synced(disk: BackedUpDisk, target: Path) -> None:
    sync(disk.store, NAME, target)


@pytest.mark.parametrize("job", [restored_in_place, synced])
def test_what_was_lost_is_written_again(
    disk: BackedUpDisk, ram: Path, xfs: Path, job: Callable[[BackedUpDisk, Path], None]
) -> None:
    target, device, old = xfs / "target.raw", ram / "backing.raw", os.urandom(SIZE)
    target.write_bytes(old)
    run("sync", "--file-system", target)
    place = device.read_bytes().index(old)
    run("fallocate", "--punch-hole", "--offset", str(place), "--length", str(SIZE), device)
    fill(ram)
    with pytest.raises(StorageError) as lost:
        job(disk, target)
    assert lost.value.errno in (errno.ENOSPC, errno.EIO)
    free(ram)
    job(disk, target)
    with device.open("rb") as file:
        file.seek(place)
        assert file.read(SIZE) == disk.content()


def test_a_snapshot_whose_old_data_was_lost_is_broken(disk: BackedUpDisk, ram: Path, xfs: Path) -> None:
    old = disk.content()
    with disk.attach() as attached, attached.snapshot("monday", Scratch(xfs)) as snapshot:
        attached.pwrite(os.urandom(SIZE // 2), 0)
        run("sync", "--file-system", xfs)
        assert snapshot.pread(SIZE, 0) == old
        fill(ram)
        attached.pwrite(os.urandom(SIZE // 2), SIZE // 2)
        subprocess.run(["sync", "--file-system", xfs], capture_output=True)
        free(ram)
        for _ in range(2):
            with pytest.raises(StorageError, match="old data was lost after it was kept"):
                snapshot.pread(SIZE, 0)
