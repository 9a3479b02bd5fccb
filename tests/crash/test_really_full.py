"""File systems that are really full: the store's, the image's, the repository's, and one that holds them all.

Each gets full under a disk that is being tracked, is seen to refuse, and gets room again. Then everything must go on
by itself, and the next backup must tell the truth.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap import export
from lmdbitmap.errors import StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file.inspection import inspect_file
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.restoring.restore import restore
from lmdbitmap.storage import owner_file, schema
from lmdbitmap.store import Store
from tests.crash.full_disk import can_mount, fill, free, full_tmpfs
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import run
from tests.helpers.tracked import NAME, blocks_of, trust_of

GRANULARITY_BITS = 9
BLOCK = 1 << GRANULARITY_BITS
REGIONS = 200
SIZE = REGIONS * REGION_BLOCKS * BLOCK
"""A sparse image whose records do not all fit the pages that a small store has already."""
SMALL, ROOMY = 1 << 20, 4 << 20

pytestmark = pytest.mark.skipif(not can_mount(), reason="only root can mount a file system of its own")


@contextlib.contextmanager
def disk_with(folder: Path, small: str, policy: str = schema.GUEST_FIRST) -> Iterator[BackedUpDisk]:
    """A disk with a full backup, whose `store`, `image` or `backups` are on a small file system, or `all` of it."""
    place = folder if small == "all" else folder / small
    place.mkdir(exist_ok=True)
    with full_tmpfs(place, ROOMY if small == "all" else SMALL):
        disk = BackedUpDisk(folder, SIZE, GRANULARITY_BITS, policy=policy)
        with contextlib.closing(disk):
            disk.write(b"first", 0)
            disk.backup()
            yield disk.clean()  # type: ignore[misc]


def write_until_track_is_lost(disk: Filter) -> int:
    """A guest goes on writing where it never wrote before; answers how often it did before the store was full."""
    for region in range(REGIONS):
        disk.pwrite(b"guest", (region * REGION_BLOCKS + 70) * BLOCK)
        if disk.standing().trust is Trust.UNTRUSTED:
            return region
    raise AssertionError("the store was never full")


@pytest.mark.parametrize("small", ["store", "all"])
@pytest.mark.parametrize("end", ["goes on", "dies"])
def test_guest_goes_on_while_the_store_is_full_and_the_next_backup_is_full_and_says_why(
    tmp_path: Path, small: str, end: str
) -> None:
    with disk_with(tmp_path, small) as disk:
        place = tmp_path if small == "all" else tmp_path / "store"
        attached = disk.attach()
        attached.pwrite(b"room for the image", 0)
        blocks = range(0, REGIONS * REGION_BLOCKS * BLOCK, REGION_BLOCKS * BLOCK)
        if small == "all":
            allocate(disk.image, [offset + 70 * BLOCK for offset in blocks])
        fill(place)
        assert write_until_track_is_lost(attached) < REGIONS
        assert (
            attached.lane().write_many([(99 * BLOCK, memoryview(b"and on"))] if small == "store" else [])
            == {}
        )
        said = owner_file.distrust(disk.store.owner_path(disk.disk().uuid))
        assert said is not None
        assert "No space left on device" in said.reason
        assert said.since_ns > 0
        if end == "dies":
            attached.abandon()
            assert trust_of(disk.changes("start")) is Trust.UNTRUSTED
            free(place)
        else:
            with pytest.raises(StorageError, match="free some space"):
                attached.checkpoint("monday")
            free(place)
            attached.background_pass()
            with pytest.raises(Untrusted, match="No space left"):
                attached.changes(since="start")
            attached.detach()
        entry = disk.backup()
        assert (entry.type_actual, entry.reason and entry.reason.code) == (BackupType.RESCAN, "new-epoch")
        assert entry.reason is not None
        assert "No space left" in entry.reason.words
        assert is_restored(disk)


def allocate(image: Path, offsets: list[int]) -> None:
    """Only the store is to run out of space: the image has its pages already."""
    before = image.stat()
    with image.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(bytes(1))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


def is_restored(disk: BackedUpDisk) -> bool:
    """Without bringing 400 MB of holes into memory."""
    out = disk.folder.parent / f"{disk.folder.name}-restored.raw"
    restore(disk.folder / "backups", NAME, out)
    try:
        with out.open("rb") as restored, disk.image.open("rb") as image:
            return all(
                os.pread(restored.fileno(), length, offset) == os.pread(image.fileno(), length, offset)
                for file in (restored, image)
                for offset, length in data_of(file.fileno())
            )
    finally:
        out.unlink()


def data_of(fd: int) -> Iterator[tuple[int, int]]:
    offset = 0
    with contextlib.suppress(OSError):
        while True:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            offset = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, offset - start


OPEN_WITH_VIEWS = """
import contextlib, sys
from lmdbitmap.errors import StorageError
from lmdbitmap.store import Store
try:
    with Store.open(sys.argv[1]) as store, contextlib.ExitStack() as views:
        for _ in range(int(sys.argv[2])):
            views.enter_context(store.read())
        print("opened")
except StorageError as error:
    print(error.next_step)
"""


@pytest.mark.parametrize(
    ("views", "has_lock_file", "said"),
    [(1, True, "opened"), (200, True, "opened"), (1, False, "free some space")],
)
def test_store_on_a_full_disk_ends_nobody(tmp_path: Path, views: int, has_lock_file: bool, said: str) -> None:
    """LMDB maps its lock file, and a page of it that gets no block is SIGBUS."""
    with full_tmpfs(tmp_path, SMALL):
        path = tmp_path / "store"
        Store.create(path).close()
        if not has_lock_file:
            (path / "lmdb" / "lock.mdb").unlink()
        fill(tmp_path)
        assert said in run(sys.executable, "-c", OPEN_WITH_VIEWS, path, str(views)).stdout
        free(tmp_path)
        assert run(sys.executable, "-c", OPEN_WITH_VIEWS, path, str(views)).stdout == "opened\n"


def test_strict_disk_refuses_writes_while_the_store_is_full_and_its_bits_stay_right(tmp_path: Path) -> None:
    with disk_with(tmp_path, "store", schema.STRICT) as disk:
        attached = disk.attach()
        fill(tmp_path / "store")
        written: set[int] = set()
        refused: set[int] = set()
        for region in range(REGIONS):
            block = region * REGION_BLOCKS + 70
            failed = attached.lane().write_many([(block * BLOCK, memoryview(b"guest"))])
            assert failed in ({}, {0: errno.ENOSPC})
            (refused if failed else written).add(block)
        assert written
        assert refused
        assert {attached.pread(5, block * BLOCK) for block in refused} == {bytes(5)}
        assert {attached.pread(5, block * BLOCK) for block in written} == {b"guest"}
        free(tmp_path / "store")
        later = min(refused)
        attached.pwrite(b"later", later * BLOCK)
        answer = attached.changes(since="start")
        assert trust_of(answer) is Trust.EXACT
        assert blocks_of(answer) == written | {later}
        attached.detach()
        entry = disk.backup()
        assert (entry.type_actual, entry.reason) == (BackupType.INCREMENTAL, None)
        assert is_restored(disk)


def test_thin_image_that_cannot_grow_refuses_the_write_and_takes_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "thin"
    folder.mkdir()
    with (
        full_tmpfs(folder, SMALL),
        contextlib.closing(BackedUpDisk(tmp_path, SIZE, GRANULARITY_BITS)) as disk,
    ):
        thin = folder / "thin.raw"
        disk.image.rename(tmp_path / "thick.raw")
        thin.touch()
        os.truncate(thin, SIZE)
        disk.image.symlink_to(thin)
        with disk.attach() as attached:
            attached.checkpoint("moved")
            fill(folder)
            lane = attached.lane()
            batch = [(70 * BLOCK, memoryview(b"x" * 4096)), (9 << 20, memoryview(b"y" * 4096))]
            assert lane.write_many(batch) == {0: errno.ENOSPC, 1: errno.ENOSPC}
            with pytest.raises(OSError, match="No space left on device"):
                lane.write_zeroes(5 << 20, 4096, may_unmap=False)
            assert attached.standing().trust is Trust.EXACT
            free(folder)
            assert lane.write_many(batch) == {}
            assert blocks_of(attached.changes(since="moved")) >= {70, (9 << 20) // BLOCK}
        disk.backup()
        assert is_restored(disk)


def test_backup_that_does_not_fit_leaves_nothing_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with disk_with(tmp_path, "backups") as disk:
        disk.write(b"x" * (600 << 10), 1 << 20)
        before = (disk.files(), disk.manifest())
        fill(tmp_path / "backups")
        for _ in range(2):
            with pytest.raises(StorageError, match="free some space") as refused:
                disk.backup()
            assert refused.value.errno == errno.ENOSPC
            assert str(tmp_path / "backups") in str(refused.value)
            assert (disk.files(), disk.manifest()) == before
        free(tmp_path / "backups")
        entry = disk.backup()
        assert (entry.type_actual, entry.reason) == (BackupType.INCREMENTAL, None)
        assert is_restored(disk)


def test_export_and_restore_that_do_not_fit_leave_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    with disk_with(tmp_path, "store") as disk, full_tmpfs(folder, SMALL):
        out, old = folder / "restored.raw", folder / "sda.dbm"
        export.export_changes(disk.changes("start"), old)
        before = old.read_bytes()
        disk.write(b"x" * (600 << 10), 1 << 20)
        disk.backup()
        fill(folder)
        with pytest.raises(StorageError, match="free some space"):
            export.export_changes(disk.changes("start"), old)
        with pytest.raises(StorageError, match="free some space"):
            restore(tmp_path / "backups", NAME, out)
        assert sorted(os.listdir(folder)) == ["filler", "sda.dbm"]
        assert old.read_bytes() == before
        free(folder)
        export.export_changes(disk.changes("start"), old)
        restore(tmp_path / "backups", NAME, out)
        assert inspect_file(old).dirty_bytes >= 600 << 10
