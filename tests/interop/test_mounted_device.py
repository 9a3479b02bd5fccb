"""A block device that the kernel itself writes is refused: its writes would pass us by. Nor is one below our feet."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdbitmap.errors import Busy, InvalidArgument
from lmdbitmap.images.device import FileDevice
from lmdbitmap.restoring.restore import restore
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import requires, run
from tests.helpers.tracked import NAME


@requires("mkfs.ext4")
@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
@pytest.mark.parametrize("read_only", [False, True])
def test_a_mounted_device_is_opened_for_reading_only(tmp_path: Path, read_only: bool) -> None:
    mount_point = tmp_path / "mounted"
    mount_point.mkdir()
    with loop_node(tmp_path, 8 << 20) as node:
        run("mkfs.ext4", "-q", str(node))
        run("mount", str(node), str(mount_point))
        try:
            if read_only:
                FileDevice.open(node, read_only=True, share_writes=True).close()
            else:
                with pytest.raises(Busy):
                    FileDevice.open(node)
        finally:
            run("umount", str(mount_point))
    assert not list(mount_point.iterdir())


@requires("mkfs.ext4")
@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
def test_nothing_is_restored_onto_what_holds_the_repository(tmp_path: Path) -> None:
    """Neither onto the device that is mounted there, nor into the file behind it."""
    backups = tmp_path / "backups"
    backups.mkdir()
    disk = BackedUpDisk(tmp_path, 8 << 20)
    with loop_node(tmp_path, 8 << 20) as node:
        run("mkfs.ext4", "-q", str(node))
        run("mount", str(node), str(backups))
        try:
            disk.backup()
            for place in (node, tmp_path / "backing.raw"):
                with pytest.raises(InvalidArgument, match="lies on a file system inside"):
                    restore(backups, NAME, place, in_place=True)
        finally:
            run("umount", str(backups))
    disk.close()
