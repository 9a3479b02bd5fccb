"""What can happen to a block device while nobody tracks it, tried on real loop devices: what the kernel counts and
numbers tells it. One test for each row on block devices of docs/store.md, "What happened to the image".
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import AlreadyExists, Busy
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.storage import owner
from lmdbitmap.storage.owner import Owner
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.system import kernel
from lmdbitmap.tracker import chain, session
from lmdbitmap.tracker.changes import Changes, changes
from tests.contract.implementations import can_make_loop_devices, loop_devices_to_oneself, loop_node
from tests.helpers.support import make_raw_image, requires, run
from tests.helpers.tracked import NAME, blocks_of, quick_folder, trust_of

pytestmark = pytest.mark.skipif(
    not can_make_loop_devices(), reason="a loop device cannot be had here: run as root"
)

BLOCK = 4096
SIZE = 4 << 20
SECOND_NS = 1_000_000_000


@dataclass
class TrackedDevice:
    """A tracked block device, called by a link as people call volumes. Block 1 is dirty since `start`."""

    folder: Path
    store: Store
    node: Path
    link: Path

    def disk(self) -> Disk:
        with self.store.read() as reader:
            return chain.find_disk(reader, NAME)

    def attach(self) -> Filter:
        return Filter.attach(self.store, NAME, background=False)

    def changes(self) -> Changes:
        return changes(self.store, NAME)

    def reason(self) -> str:
        """Why the answer cannot be believed."""
        standing = self.changes().standing
        assert standing.trust is Trust.UNTRUSTED
        return str(standing.reason)

    def write(self, offset: int = 9 * BLOCK) -> None:
        """As a stranger, through the page cache, and done with it."""
        with self.node.open("r+b", buffering=0) as stranger:
            os.pwrite(stranger.fileno(), b"theirs", offset)


@contextmanager
def tracked(folder: Path, node: Path) -> Iterator[TrackedDevice]:
    (link := folder / "volume").symlink_to(node)
    with Store.create(str(folder / "store")) as store:
        session.add(store, NAME, str(link), granularity_bits=12)
        device = TrackedDevice(folder, store, node, link)
        with device.attach() as attached:
            attached.checkpoint("start")
            attached.pwrite(b"ours", BLOCK)
        yield device


@pytest.fixture
def device() -> Iterator[TrackedDevice]:
    with quick_folder() as folder, loop_node(folder, SIZE) as node, tracked(folder, node) as device:
        yield device


# --- after a clean detach ---


def test_device_that_nobody_wrote_is_trusted_however_often_it_was_read(device: TrackedDevice) -> None:
    device.node.read_bytes()
    for _ in range(2):
        assert trust_of(device.changes()) is Trust.EXACT
        assert blocks_of(device.changes()) == {1}
        device.attach().detach()
    assert device.disk().epoch_number == 1


def test_written_device_costs_a_full_backup_that_says_how_much_was_written(device: TrackedDevice) -> None:
    device.write()
    said = "4096 bytes of the block device were written while it was not tracked"
    assert device.reason() == said
    [made] = backup(device.store, [NAME], device.folder / "backups")
    assert made.entry.type_actual is BackupType.FULL
    assert device.disk().epoch_reason == said
    assert trust_of(device.changes()) is Trust.EXACT
    device.attach().detach()
    assert device.disk().epoch_number == 2


def test_write_that_is_still_in_memory_is_noticed_by_the_next_owner(device: TrackedDevice) -> None:
    with device.node.open("r+b", buffering=0) as stranger:
        os.pwrite(stranger.fileno(), b"theirs", 9 * BLOCK)
        with device.attach() as attached:
            assert "written while it was not tracked" in attached.disk.epoch_reason


@requires("blkdiscard")
def test_discard_and_zeroing_are_writes(device: TrackedDevice) -> None:
    for option in ((), ("--zeroout",)):
        run("blkdiscard", "--force", *option, "--length", str(BLOCK), device.node)
        assert "bytes of the block device were written while it was not tracked" in device.reason()
        session.adopt(device.store, NAME)
        assert trust_of(device.changes()) is Trust.EXACT


def test_write_during_a_backup_is_noticed(device: TrackedDevice) -> None:
    """Its copy is of no point in time."""

    def write(done: int, total: int) -> None:
        device.write()
        run("sync", device.node)

    with pytest.raises(Busy, match="written by another program while it was backed up"):
        backup(device.store, [NAME], device.folder / "backups", progress=write)


def test_device_that_was_taken_away_and_made_anew_is_another(device: TrackedDevice) -> None:
    """The same number and the same file: nobody knows what happened to that file meanwhile."""
    with loop_devices_to_oneself():
        run("losetup", "--detach", device.node)
        run("losetup", device.node, device.folder / "backing.raw")
    assert "taken away and made anew" in device.reason()
    device.attach().detach()
    assert trust_of(device.changes()) is not Trust.UNTRUSTED


def test_device_with_another_file_behind_it_is_another(device: TrackedDevice) -> None:
    with loop_devices_to_oneself():
        run("losetup", "--detach", device.node)
        run("losetup", device.node, make_raw_image(device.folder / "other.raw", SIZE))
    assert device.reason().endswith("/backing.raw' was tracked under its number")


def test_link_that_leads_to_another_device_is_noticed(device: TrackedDevice, tmp_path: Path) -> None:
    (folder := tmp_path / "second").mkdir()
    with loop_node(folder, SIZE) as other:
        device.link.unlink()
        device.link.symlink_to(other)
        assert "another block device than the one that was tracked" in device.reason()
        device.link.unlink()
        device.link.symlink_to(device.node)
        assert trust_of(device.changes()) is Trust.EXACT


@pytest.mark.parametrize("size", [2 * SIZE, SIZE // 2])
def test_device_of_another_size_is_noticed(device: TrackedDevice, size: int) -> None:
    os.truncate(device.folder / "backing.raw", size)
    run("losetup", "--set-capacity", device.node)
    assert f"size went from {SIZE} to {size} bytes" in device.reason()
    with device.attach() as attached:
        assert (attached.size, attached.disk.epoch_number) == (size, 2)


def test_device_is_called_by_its_link_and_known_by_any_name(device: TrackedDevice) -> None:
    assert device.disk().image == str(device.link)
    for name in (device.node, device.link):
        with pytest.raises(AlreadyExists, match="tracked already, as 'sda'"):
            session.add(device.store, "again", str(name), granularity_bits=12)


# --- after a death ---


def died(device: TrackedDevice, *, known: bool, beat_age_s: int) -> None:
    """Whose last write reached the device, and is `known` to its last sign of life or came after that."""
    attached = device.attach()
    attached.pwrite(b"last words", 5 * BLOCK)
    attached.flush()
    _, sectors = attached.device.identity().last_change
    attached.abandon()
    store_now = session.present(device.store).store
    with closing(Owner(device.store.owner_path(device.disk().uuid), lambda: store_now)) as dead:
        seen, time_ns = sectors if known else sectors - 8, time.time_ns() - beat_age_s * SECOND_NS
        dead.beat(time_ns, 0, seen, session=device.disk().session)


@pytest.mark.parametrize(("known", "beat_age_s"), [(False, 0), (False, 50), (True, 0), (True, 100_000)])
def test_death_costs_little_if_its_owner_is_back_soon_or_all_had_reached_the_device(
    device: TrackedDevice, known: bool, beat_age_s: int
) -> None:
    died(device, known=known, beat_age_s=beat_age_s)
    assert trust_of(device.changes()) is Trust.SUPERSET
    assert {1, 5} <= blocks_of(device.changes())
    with device.attach() as attached:
        assert attached.disk.epoch_number == 1


@pytest.mark.parametrize("known", [False, True])
def test_write_long_after_a_death_is_not_taken_for_the_owners(device: TrackedDevice, known: bool) -> None:
    died(device, known=known, beat_age_s=3600)
    device.write()
    assert "bytes of the block device were written since its owner's last sign of life" in device.reason()
    assert "and it is not known by which program" in device.reason()
    with device.attach() as attached:
        assert attached.disk.epoch_number == 2


# --- another boot ---


def reboot(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = str(uuid4())
    for module in (kernel, owner):
        monkeypatch.setattr(module, "boot_id", lambda: boot)


def test_device_that_was_written_in_this_boot_before_its_owner_came_is_noticed(
    device: TrackedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop device counts on from what was there before: so all that was written above is in this boot."""
    reboot(monkeypatch)
    assert "written since this machine was started, while it was not tracked" in device.reason()


# --- partitions ---


@requires("addpart")
def test_partition_is_hit_through_the_whole_disk_and_not_by_its_neighbour(tmp_path: Path) -> None:
    with loop_node(tmp_path, SIZE) as disk:
        partitions = [Path(f"{disk}p{number}") for number in (1, 2)]
        for number, start in ((1, 2048), (2, 4096)):
            run("addpart", disk, str(number), str(start), "2048")
        try:
            with tracked(tmp_path, partitions[0]) as device:
                _written_around(device, disk, partitions[1])
        finally:
            for number in (1, 2):
                run("delpart", disk, str(number))


def _written_around(device: TrackedDevice, disk: Path, neighbour: Path) -> None:
    with neighbour.open("r+b", buffering=0) as other:
        os.pwrite(other.fileno(), b"a neighbour's own", 0)
    assert trust_of(device.changes()) is Trust.EXACT
    with disk.open("r+b", buffering=0) as whole:
        os.pwrite(whole.fileno(), b"theirs", 1 << 20)
    assert "4096 bytes of the block device were written" in device.reason()


# --- two stores ---


def test_two_stores_notice_each_others_writes_and_cannot_have_the_device_at_once(
    device: TrackedDevice,
) -> None:
    with Store.create(str(device.folder / "second")) as second:
        session.add(second, NAME, str(device.node), granularity_bits=12)
        with Filter.attach(second, NAME, background=False) as other:
            with pytest.raises(Busy, match="in use by another program"):
                device.attach()
            other.pwrite(b"second", BLOCK)
        assert "written while it was not tracked" in device.reason()
        device.attach().detach()
        with device.attach() as attached:
            attached.pwrite(b"first", 0)
            with pytest.raises(Busy):
                Filter.attach(second, NAME, background=False)
        assert trust_of(changes(second, NAME)) is Trust.UNTRUSTED
