"""On a file system whose files can share blocks, a restore takes no room: of XFS, as it is."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.errors import FormatError
from lmdbitmap.restoring.restore import restore
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.crash.full_disk import can_mount
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import requires, run
from tests.helpers.tracked import NAME

pytestmark = [
    requires("mkfs.xfs"),
    pytest.mark.skipif(not can_mount() or not can_make_loop_devices(), reason="only root can mount"),
]

MIB = 1 << 20
SIZE = 64 * MIB + 700
DATA = 48 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    """With a full backup and an increment, all of it on a small XFS."""
    place = tmp_path / "xfs"
    place.mkdir()
    with loop_node(tmp_path, 320 * MIB) as node:
        run("mkfs.xfs", "-q", "-m", "reflink=1", node)
        run("mount", node, place)
        try:
            with closing(BackedUpDisk(place, SIZE)) as disk:
                disk.write(random.Random(1).randbytes(DATA), 8 * MIB)
                disk.backup()
                disk.write(random.Random(2).randbytes(3 * MIB), 20 * MIB + 4096)
                disk.backup()
                yield disk
        finally:
            run("umount", place)


def used_bytes(place: Path) -> int:
    os.sync()
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.parametrize("verify", [True, False])
def test_a_restore_takes_no_room(disk: BackedUpDisk, verify: bool) -> None:
    before, out = used_bytes(disk.folder), disk.folder / "out.raw"
    result = restore(disk.folder / "backups", NAME, out, verify=verify)
    assert used_bytes(disk.folder) - before < DATA // 20
    assert result.bytes_written >= DATA
    assert out.read_bytes() == disk.content()
    disk.write(b"x" * MIB, 9 * MIB)
    assert out.read_bytes() != disk.content(), "what is shared is a copy nevertheless"


def test_what_is_damaged_is_not_shared(disk: BackedUpDisk) -> None:
    path = Path(disk.backup_folder().path_of(disk.manifest().backups[0].file))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"damage")
    with pytest.raises(FormatError, match=path.name):
        restore(disk.folder / "backups", NAME, disk.folder / "out.raw")
    assert not (disk.folder / "out.raw").exists()
