"""A block device that the kernel itself writes is refused: its writes would pass us by."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdbitmap.device import FileDevice
from lmdbitmap.errors import Busy
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.support import requires, run


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
