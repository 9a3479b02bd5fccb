"""A backup killed at any step costs its own work only: the next is incremental and right, and no trace is left."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lmdbitmap.errors import StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.restore import restore
from lmdbitmap.schema import DEFERRED, WRITE_AHEAD
from tests.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, BackedUpDisk
from tests.crash.full_disk import CRAMPED_BYTES, can_mount, file_size_limit, full_tmpfs
from tests.support import PATIENCE_SECONDS, run
from tests.tracked import NAME, quick_folder

SIZE = 200_003
BLOCK = 4096

STEPS = [
    "folder made", "synced", "folder made", "synced",
    "committed", "judged",
    "synced", "renamed", "synced", "noted",
    "committed",
    "data written", "image written", "synced", "renamed", "synced",
    "synced", "renamed", "synced", "manifest replaced",
    "committed", "removed",
]  # fmt: skip
"""What a first backup does. Law 3: the archive is synced before `manifest replaced`, and forgetting follows it."""
MADE = STEPS.index("renamed", STEPS.index("manifest replaced") - 3)
"""From this step on, the manifest has the backup."""


@contextlib.contextmanager
def disk_before(first: bool, durability: str = WRITE_AHEAD) -> Iterator[BackedUpDisk]:
    """A disk that was written; unless its next backup is the first, with a full and an incremental one before."""
    with quick_folder() as folder:
        disk = BackedUpDisk(folder, SIZE, durability=durability)
        disk.write(os.urandom(SIZE), 0)
        if not first:
            disk.backup()
            disk.write(os.urandom(3 * BLOCK), 10 * BLOCK)
            disk.backup()
        disk.write(os.urandom(2 * BLOCK), 20 * BLOCK)
        yield disk
        disk.close()


def check_no_trace(disk: BackedUpDisk) -> None:
    """The folder holds what the manifest names, the chain what the manifest needs, and all of it restores."""
    entries = disk.manifest().backups
    assert disk.files() == sorted(entry.file for entry in entries)
    full = next(entry for entry in reversed(entries) if entry.type_actual is FULL)
    assert set(disk.backup_checkpoints()) == {full.checkpoint.name, entries[-1].checkpoint.name}
    assert disk.restored() == disk.content()


def test_a_backup_takes_its_steps_in_the_order_of_the_laws() -> None:
    with disk_before(first=True) as disk:
        assert disk.backup_and_die(0) == STEPS


@pytest.mark.parametrize("durability", [WRITE_AHEAD, DEFERRED])
def test_a_backup_killed_after_any_step_is_followed_by_a_right_increment(durability: str) -> None:
    made = []
    for step in range(1, len(STEPS) - 3):
        with disk_before(first=False, durability=durability) as disk:
            steps = disk.backup_and_die(step)
            assert steps == STEPS[4 : 4 + step]
            made.append(len(disk.manifest().backups) == 3)
            frozen = disk.content()
            disk.write(b"later", 30 * BLOCK)
            entry = disk.backup()
            assert (entry.type_actual, entry.trust) == (INCREMENTAL, Trust.EXACT)
            assert entry.bytes_changed == (BLOCK if made[-1] else 3 * BLOCK)
            check_no_trace(disk)
            if made[-1]:
                assert disk.restored("3") == frozen
    assert made == [False] * (MADE - 4) + [True] * (len(STEPS) - MADE)


def test_a_first_backup_killed_after_any_step_is_followed_by_a_right_one() -> None:
    made = []
    for step in range(1, len(STEPS) + 1):
        with disk_before(first=True) as disk:
            assert disk.backup_and_die(step) == STEPS[:step]
            made.append("manifest.json" in os.listdir(disk.folder / "backups" / NAME) if step > 2 else False)
            disk.write(b"later", 30 * BLOCK)
            assert disk.backup().type_actual is (INCREMENTAL if made[-1] else FULL)
            check_no_trace(disk)
    assert made == [False] * MADE + [True] * (len(STEPS) - MADE)


def test_one_backup_killed_after_another_is_followed_by_their_union() -> None:
    with disk_before(first=False) as disk:
        for number, step in enumerate((7, 9, 11, 7, 3), start=1):
            disk.backup_and_die(step, DIFFERENTIAL if number == 2 else INCREMENTAL)
            disk.write(b"later", (30 + number) * BLOCK)
        entry = disk.backup()
        assert (entry.type_actual, entry.sequence, entry.bytes_changed) == (INCREMENTAL, 3, 7 * BLOCK)
        check_no_trace(disk)


def test_a_backup_killed_in_one_repository_costs_another_nothing() -> None:
    with disk_before(first=False) as disk:
        disk.backup(to="other")
        disk.write(b"later", 30 * BLOCK)
        disk.backup_and_die(STEPS.index("image written") - 3)
        entry = disk.backup(to="other")
        assert (entry.type_actual, entry.bytes_changed) == (INCREMENTAL, BLOCK)
        assert disk.backup().bytes_changed == 3 * BLOCK
        assert disk.restored() == disk.restored(to="other") == disk.content()
        assert len(disk.backup_checkpoints()) == 4


def test_a_killed_backups_checkpoint_that_alone_records_is_let_go_when_it_can_be() -> None:
    with disk_before(first=True) as disk:
        disk.backup_and_die(STEPS.index("data written") + 1)
        with disk.attach() as attached:
            attached.forget("epoch-1")
        disk.backup_and_die(STEPS.index("noted") - 3)
        disk.backup()
        check_no_trace(disk)
        assert disk.checkpoints() == disk.backup_checkpoints()


# --- full disks ---


@pytest.mark.parametrize("cramp", [file_size_limit, *([full_tmpfs] if can_mount() else [])])
def test_a_repository_on_a_full_disk_gets_nothing_half_made(
    tmp_path: Path, cramp: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    disk = BackedUpDisk(tmp_path, 2 * CRAMPED_BYTES)
    disk.write(os.urandom(disk.size), 0)
    (tmp_path / "backups").mkdir()
    with cramp(tmp_path / "backups"):
        with pytest.raises(StorageError) as refused:
            disk.backup()
        assert refused.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert refused.value.place.endswith("/backups/sda/000001-full.qcow2")
        assert (disk.files(), disk.checkpoints()) == ([], ["epoch-1"])
        disk.zero(0, disk.size)
        assert disk.backup().bytes_zero == disk.size
        assert disk.files() == ["000001-full.qcow2"]
    disk.close()


@pytest.mark.skipif(not can_mount(), reason="a full file system cannot be had here: run as root")
def test_a_restore_to_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cramped").mkdir()
    disk = BackedUpDisk(tmp_path, 2 * CRAMPED_BYTES)
    disk.write(os.urandom(disk.size), 0)
    disk.backup()
    with full_tmpfs(tmp_path / "cramped") as cramped:
        with pytest.raises(StorageError, match="No space left on device; free some space"):
            restore(tmp_path / "backups", NAME, cramped / "out.raw")
        assert list(cramped.iterdir()) == []
    disk.close()


@pytest.mark.skipif(not can_mount(), reason="a read-only file system cannot be had here: run as root")
def test_a_read_only_repository_is_restored_from_and_not_backed_up_to(tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()
    with full_tmpfs(tmp_path / "backups") as folder:
        disk = BackedUpDisk(tmp_path, SIZE)
        disk.write(b"x" * BLOCK, 0)
        disk.backup()
        run("mount", "-o", "remount,ro", folder)
        assert disk.restored() == disk.content()
        checkpoints = disk.checkpoints()
        with pytest.raises(StorageError, match="Read-only file system; the file system is read-only"):
            disk.backup()
        assert disk.checkpoints() == checkpoints
        disk.close()


# --- a restore that dies ---

RESTORE_AND_DIE = """
import os, signal, sys
from lmdbitmap.restore import restore

def die(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

restore(sys.argv[1], sys.argv[2], sys.argv[3], progress=die)
"""


def test_a_killed_restore_leaves_no_name_and_the_next_removes_the_rest() -> None:
    with disk_before(first=False) as disk:
        disk.backup()
        out = disk.folder / "out.raw"
        command = [
            sys.executable,
            "-c",
            RESTORE_AND_DIE,
            os.fspath(disk.folder / "backups"),
            NAME,
            os.fspath(out),
        ]
        assert subprocess.run(command, timeout=PATIENCE_SECONDS).returncode == -9
        assert not out.exists()
        assert len(list(disk.folder.glob("out.raw.*.partial"))) == 1
        restore(disk.folder / "backups", NAME, out)
        assert out.read_bytes() == disk.content()
        assert [path.name for path in disk.folder.glob("out.raw*")] == ["out.raw"]
