"""After a crash a bitmap names whole extents. A backup stores of them what differs from the backup before."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import EXTENT_BLOCKS
from lmdbitmap.images.device import FileDevice
from lmdbitmap.nbd.control import orders
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.repository import proof
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.tracker.scratch import Scratch
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.serving import serving
from tests.helpers.support import no_ascii
from tests.helpers.tracked import NAME
from tests.unit.test_backup import told
from tests.unit.test_backup_image import damage_data, flip
from tests.unit.test_digest_algorithms import forget_blake3
from tests.unit.test_verify import digests_of, path_of, vouch_as_a_whole

pytestmark = pytest.mark.in_memory

BLOCK = 4096
EXTENT = EXTENT_BLOCKS * BLOCK
SIZE = 13 * EXTENT + 3 * BLOCK + 5


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    """Backed up."""
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(no_ascii(SIZE), 0)
    made.backup(digest="blake3")
    yield made
    made.close()


def write_and_die(disk: BackedUpDisk, *offsets: int) -> None:
    """Its owner dies after it wrote a byte at each offset: the extents around them count as dirty."""
    attached = disk.attach()
    for offset in offsets:
        attached.pwrite(b"x", offset)
    attached.abandon()


def require(disk: BackedUpDisk, entry: BackupEntry, blocks: int) -> None:
    assert (told(entry), entry.trust) == ((entry.type_requested.value, None), Trust.SUPERSET)
    assert entry.bytes_changed == blocks * BLOCK
    assert disk.restored() == disk.content()


def test_what_only_counts_as_changed_is_not_stored(disk: BackedUpDisk) -> None:
    write_and_die(disk, 70, EXTENT + 9 * BLOCK, 3 * EXTENT - 1)
    require(disk, disk.backup(), 3)
    assert disk.backup().bytes_changed == 0


def test_the_last_extent_is_compared_though_it_is_cut(disk: BackedUpDisk) -> None:
    write_and_die(disk, 13 * EXTENT + BLOCK)
    require(disk, disk.backup(), 1)


def test_what_was_written_in_part_of_an_extent_is_stored_unread(disk: BackedUpDisk) -> None:
    """Its bit is no guess. So little is read of the backup before."""
    disk.write(disk.content()[7 * BLOCK : 9 * BLOCK], 7 * BLOCK)
    write_and_die(disk, 2 * EXTENT)
    require(disk, disk.backup(), 2 + 1)


def test_a_differential_backup_is_compared_with_the_full_one(disk: BackedUpDisk) -> None:
    disk.write(b"between", 2 * EXTENT)
    disk.backup()
    write_and_die(disk, 2 * EXTENT + BLOCK)
    require(disk, disk.backup(DIFFERENTIAL), 2)


def test_what_reads_as_zeroes_in_both_is_not_read(tmp_path: Path) -> None:
    disk = BackedUpDisk(tmp_path, SIZE)
    disk.backup()
    write_and_die(disk, EXTENT)
    [result] = backup(disk.store, [NAME], tmp_path / "backups")
    require(disk, result.entry, 1)
    assert result.bytes_read <= 3 * BLOCK
    disk.close()


def test_zeroes_in_place_of_data_are_stored(disk: BackedUpDisk) -> None:
    attached = disk.attach()
    attached.write_zeroes(EXTENT + 8 * BLOCK, 4 * BLOCK)
    attached.abandon()
    entry = disk.backup()
    require(disk, entry, 4)
    assert entry.bytes_zero == 4 * BLOCK


@pytest.mark.parametrize("sizes", [[SIZE - 2 * BLOCK - 3], [SIZE + EXTENT], [EXTENT, SIZE]])
def test_a_size_that_changed_since_then_hides_nothing(disk: BackedUpDisk, sizes: list[int]) -> None:
    attached = disk.attach()
    for size in sizes:
        attached.resize(size)
    attached.pwrite(b"x", 7)
    attached.abandon()
    entry = disk.backup()
    assert (told(entry), entry.trust) == (("incremental", None), Trust.SUPERSET)
    assert disk.restored() == disk.content()


def test_what_a_guest_writes_meanwhile_is_stored_as_it_was(disk: BackedUpDisk) -> None:
    """What was compared is read once more, so it is kept until then."""
    offsets = [number * BLOCK for number in range(4, 2 * EXTENT_BLOCKS, 7)]
    write_and_die(disk, *offsets)
    before = disk.content()
    reported: list[int] = []
    with disk.attach() as attached:

        def write_into_what_was_compared(done: int, total: int) -> None:
            reported.append(done)
            for offset in offsets:
                attached.pwrite(b"later", offset + 100)

        [result] = backup(
            disk.store, [NAME], disk.folder / "backups", attached={NAME: attached},
            scratch=Scratch(str(disk.folder)), progress=write_into_what_was_compared,
        )  # fmt: skip
    assert reported[-1] == 2 * EXTENT
    assert result.entry.bytes_changed == len(offsets) * BLOCK
    assert disk.restored() == before
    assert disk.backup().bytes_changed == len(offsets) * BLOCK
    assert disk.restored() == disk.content()


ROOMS = pytest.mark.parametrize(("room", "blocks"), [(2 * EXTENT - 1, 2 * EXTENT_BLOCKS), (2 * EXTENT, 2)])
"""Room for old data, and what is stored where two extents count as dirty: what was read of them is kept to the end."""


@ROOMS
def test_nothing_is_compared_if_a_guest_could_overwrite_more_meanwhile_than_is_kept(
    disk: BackedUpDisk, room: int, blocks: int
) -> None:
    """An increment failed for that, and so did each one after it."""
    write_and_die(disk, 0, 3 * EXTENT)
    with disk.attach() as attached:
        [result] = backup(
            disk.store, [NAME], disk.folder / "backups", attached={NAME: attached},
            scratch=Scratch(str(disk.folder), room),
        )  # fmt: skip
    require(disk, result.entry, blocks)
    write_and_die(disk, 6 * EXTENT, 7 * EXTENT, 8 * EXTENT)
    require(disk, disk.backup(), 3)  # no guest can


@ROOMS
def test_a_process_that_serves_the_disk_is_asked_how_much_it_can_keep(
    disk: BackedUpDisk, room: int, blocks: int
) -> None:
    write_and_die(disk, 0, 3 * EXTENT)
    with serving(disk, disk.folder, keeping(room)):
        require(disk, disk.backup(), blocks)


def test_one_that_cannot_tell_keeps_what_is_usual(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = {name: order for name, order in orders._OPERATIONS.items() if name != "room"}
    monkeypatch.setattr(orders, "_OPERATIONS", older)
    write_and_die(disk, 0, 3 * EXTENT)
    with serving(disk, disk.folder, keeping(0)):
        require(disk, disk.backup(), 2)


def keeping(room: int) -> type[HeldSnapshots]:
    """A holder of snapshots with that much room for old data."""

    class Keeping(HeldSnapshots):
        def __init__(self, filters: Mapping[str, Filter], server: Server | None, scratch: Scratch) -> None:
            super().__init__(filters, server, scratch._replace(limit_bytes=room))

    return Keeping


# --- what cannot be compared is stored ---


def require_all(disk: BackedUpDisk) -> None:
    """All that counts as dirty is stored."""
    entry = disk.backup()
    assert (told(entry), entry.trust, entry.bytes_changed) == (("incremental", None), Trust.SUPERSET, EXTENT)


@pytest.mark.parametrize("place", [6 * EXTENT + 5 * BLOCK, 7 * EXTENT - 1])
def test_a_backup_that_rotted_is_not_compared_with(
    disk: BackedUpDisk, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    write_and_die(disk, 6 * EXTENT)
    damage_data(path_of(disk, 0), place)
    require_all(disk)
    assert f"disk {NAME}: all that counts as changed is stored: {path_of(disk, 0)}: bytes " in caplog.text


def test_a_backup_that_rotted_elsewhere_is_compared_with(disk: BackedUpDisk) -> None:
    write_and_die(disk, 6 * EXTENT)
    damage_data(path_of(disk, 0), 9 * EXTENT)
    assert disk.backup().bytes_changed == BLOCK


def test_a_backup_that_can_be_proven_only_as_a_whole_is_not_compared_with(
    disk: BackedUpDisk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a large image would be read for a small increment, and a snapshot held meanwhile."""
    write_and_die(disk, 6 * EXTENT)
    flip(digests_of(disk, 0), 0)
    read: list[str] = []
    monkeypatch.setattr(proof, "found_digest", lambda *image: read.append("all"))
    require_all(disk)
    assert not read
    assert (
        f"disk {NAME}: all that counts as changed is stored: {path_of(disk, 0)}: its digests " in caplog.text
    )


def test_a_backup_that_another_program_writes_is_not_compared_with(
    disk: BackedUpDisk, caplog: pytest.LogCaptureFixture
) -> None:
    write_and_die(disk, 6 * EXTENT)
    with FileDevice.open(path_of(disk, 0)):
        require_all(disk)
    assert f"disk {NAME}: all that counts as changed is stored: {path_of(disk, 0)} is open in" in caplog.text


def test_a_backup_without_digests_of_chunks_is_not_compared_with(disk: BackedUpDisk) -> None:
    write_and_die(disk, 6 * EXTENT)
    vouch_as_a_whole(disk, 0)
    require_all(disk)


def test_without_the_package_for_its_digests_nothing_is_compared(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_and_die(disk, 6 * EXTENT)
    forget_blake3(monkeypatch)
    require_all(disk)


def test_without_the_package_for_its_clusters_nothing_is_compared(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.backup(FULL, compression="zstd")
    write_and_die(disk, 6 * EXTENT)
    with monkeypatch.context() as lacking:
        lacking.setitem(sys.modules, "backports", None)
        lacking.setitem(sys.modules, "compression", None)
        entry = disk.backup()
    assert (told(entry), entry.bytes_changed) == (("incremental", None), EXTENT)
    assert disk.restored() == disk.content()


# --- what is known is not compared ---


def test_after_an_orderly_end_nothing_is_compared(disk: BackedUpDisk) -> None:
    disk.write(disk.content()[:EXTENT], 0)
    entry = disk.backup()
    assert (told(entry), entry.trust, entry.bytes_changed) == (("incremental", None), Trust.EXACT, EXTENT)


def test_a_rescan_compares_all_of_it(disk: BackedUpDisk) -> None:
    write_and_die(disk, 0, 3 * EXTENT)
    entry = disk.backup(RESCAN)
    assert (entry.type_actual, entry.bytes_changed) == (RESCAN, 2 * BLOCK)
    assert disk.backup(INCREMENTAL).bytes_changed == 0
