"""What can happen to an image, or to its store, while nobody tracks it: noticed, said in plain words, and mended by
the next backup. One test for each row of docs/store.md, "What happened to the image".

Here are files and the store itself; test_continuity_devices.py has block devices.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import pytest

from lmdbitmap.cli.main import run as run_cli
from lmdbitmap.errors import Busy, InvalidArgument, LmdbitmapError, NotFound, StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.images.image import open_image
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.storage import schema
from lmdbitmap.storage.owner import Owner
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import make_raw_image, requires, run
from tests.helpers.tracked import LATER_NS, NAME, blocks_of, quick_folder, trust_of

BLOCK = 4096
BLOCKS = 64
SIZE = BLOCKS * BLOCK
SECOND_NS = 1_000_000_000
needs_loop_devices = pytest.mark.skipif(
    not can_make_loop_devices(), reason="a loop device cannot be had here: run as root"
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def disk(folder: Path) -> Iterator[BackedUpDisk]:
    """Backed up, written and detached, so that block 1 alone is dirty."""
    with closing(prepared(folder, schema.WRITE_AHEAD)) as disk:
        yield disk


def prepared(folder: Path, durability: str) -> BackedUpDisk:
    disk = BackedUpDisk(folder, SIZE, durability=durability)
    disk.backup()
    shutil.copy2(disk.image, folder / "copy.raw")
    disk.write(b"ours", BLOCK)
    return disk


def told(disk: BackedUpDisk, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = run_cli(["--store", disk.store.path, *words])
    return code, capsys.readouterr().out


def expect_a_full_backup(
    disk: BackedUpDisk, capsys: pytest.CaptureFixture[str], reason: str, *, adoptable: bool = True
) -> None:
    """`info`, `check` and the next backup say why, the full backup holds the image, and all is well after it."""
    assert "untrusted" in told(disk, capsys, "info", NAME)[1]
    assert reason in told(disk, capsys, "info", NAME)[1]
    code, said = told(disk, capsys, "check")
    assert (code, reason in said, "make a full backup" in said) == (3, True, True)
    assert ("or `lmdbitmap adopt sda`" in said) is adoptable
    entry = disk.backup()
    assert entry.type_actual is BackupType.RESCAN
    assert reason in str(entry.reason)
    assert disk.restored() == disk.content()
    assert told(disk, capsys, "check")[0] == 0
    assert disk.backup().type_actual is BackupType.INCREMENTAL


# --- the image changed while nobody tracked it ---


def written(disk: BackedUpDisk) -> None:
    disk.write_behind_our_back(b"theirs", 9 * BLOCK)


def written_under_a_clock_that_was_set_back(disk: BackedUpDisk) -> None:
    disk.write_behind_our_back(b"theirs", 9 * BLOCK, shift_ns=-LATER_NS)


def replaced(disk: BackedUpDisk) -> None:
    os.rename(make_raw_image(disk.folder / "new.raw", SIZE, [(0, b"theirs")]), disk.image)


def copied_back_as_another_file(disk: BackedUpDisk) -> None:
    """As `cp -a` does: the same times, another inode."""
    os.rename(disk.image, disk.folder / "old.raw")
    run("cp", "-a", disk.folder / "copy.raw", disk.image)


def copied_back_in_place(disk: BackedUpDisk) -> None:
    """As `rsync --inplace --times` does: the same inode, and the times of the copy."""
    run("cp", "--preserve=timestamps", disk.folder / "copy.raw", disk.image)


def grown(disk: BackedUpDisk) -> None:
    os.truncate(disk.image, 2 * SIZE)


def shrunk(disk: BackedUpDisk) -> None:
    os.truncate(disk.image, SIZE // 2)


Deed: TypeAlias = Callable[[BackedUpDisk], None]
DEEDS: list[tuple[Deed, str]] = [
    (written, "the image was written while it was not tracked"),
    (written_under_a_clock_that_was_set_back, "its time of change went back"),
    (replaced, "the image is another file than the one that was tracked"),
    (copied_back_as_another_file, "the image is another file than the one that was tracked"),
    (copied_back_in_place, "its time of change went back"),
    (grown, f"the image's size went from {SIZE} to {2 * SIZE} bytes while it was not tracked"),
    (shrunk, f"the image's size went from {SIZE} to {SIZE // 2} bytes while it was not tracked"),
]


@pytest.mark.parametrize("durability", schema.DURABILITIES)
@pytest.mark.parametrize(("deed", "reason"), DEEDS, ids=lambda value: getattr(value, "__name__", ""))
def test_image_changed_while_detached_costs_a_rescan_that_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str], deed: Deed, reason: str, durability: str
) -> None:
    with closing(prepared(folder, durability)) as disk:
        deed(disk)
        expect_a_full_backup(disk, capsys, reason)


@pytest.mark.parametrize("deed", [written, replaced, copied_back_in_place, grown])
def test_person_who_knows_better_can_adopt_a_changed_image(
    disk: BackedUpDisk, capsys: pytest.CaptureFixture[str], deed: Deed
) -> None:
    deed(disk)
    assert told(disk, capsys, "adopt", NAME)[0] == 0
    assert trust_of(disk.changes()) is Trust.EXACT
    assert disk.backup().type_actual is BackupType.INCREMENTAL


def chowned(disk: BackedUpDisk) -> None:
    """As libvirt does before and after each run of a guest."""
    disk.image.chmod(0o600)
    os.chown(disk.image, os.getuid(), os.getgid())


def renamed_and_back(disk: BackedUpDisk) -> None:
    os.rename(disk.image, disk.folder / "elsewhere.raw")
    os.rename(disk.folder / "elsewhere.raw", disk.image)


def moved_and_linked(disk: BackedUpDisk) -> None:
    os.rename(disk.image, disk.folder / "elsewhere.raw")
    disk.image.symlink_to(disk.folder / "elsewhere.raw")


@pytest.mark.parametrize("deed", [chowned, renamed_and_back, moved_and_linked])
def test_what_leaves_the_data_alone_costs_nothing(disk: BackedUpDisk, deed: Deed) -> None:
    deed(disk)
    assert trust_of(disk.changes()) is Trust.EXACT
    assert blocks_of(disk.changes()) == {1}
    assert disk.backup().type_actual is BackupType.INCREMENTAL


def test_mtime_set_back_to_the_nanosecond_deceives_us(disk: BackedUpDisk) -> None:
    """A limit, documented. Only a new time of inode change would tell, and a chown leaves the same."""
    status = disk.image.stat()
    written(disk)
    os.utime(disk.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert trust_of(disk.changes()) is Trust.EXACT
    os.utime(disk.image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert trust_of(disk.changes()) is Trust.UNTRUSTED


# --- the owner died ---


def died(disk: BackedUpDisk) -> None:
    attached = disk.attach()
    attached.pwrite(b"ours", 3 * BLOCK)
    attached.beat()
    attached.abandon()


@pytest.mark.usefixtures("exact_grace")
def test_write_right_after_a_death_passes_for_the_owners_and_a_later_one_does_not(
    disk: BackedUpDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    died(disk)
    death_ns = disk.image.stat().st_mtime_ns
    disk.write_behind_our_back(b"theirs", 9 * BLOCK)
    os.utime(disk.image, ns=(death_ns, death_ns + SECOND_NS))
    assert trust_of(disk.changes()) is Trust.SUPERSET  # a limit, documented: within two seconds
    disk.write_behind_our_back(b"theirs", 10 * BLOCK)
    expect_a_full_backup(
        disk,
        capsys,
        "the image was written, or replaced by an older one, after its owner's last sign of life",
    )


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_clock_that_was_set_hides_no_write_after_a_death(disk: BackedUpDisk, ahead_s: int) -> None:
    """The owner's clock was an hour off, and was set right after its death."""
    died(disk)
    mtime_ns = disk.image.stat().st_mtime_ns
    with closing(Owner(disk.store.owner_path(disk.disk().uuid))) as dead:
        dead.beat(time.time_ns() + ahead_s * SECOND_NS, mtime_ns - LATER_NS)
    assert trust_of(disk.changes()) is Trust.UNTRUSTED


@pytest.mark.parametrize(
    "mtime_ns",
    [-LATER_NS, 1, time.time_ns() + LATER_NS, 2**62, 10**19],
    ids=["before 1970", "long ago", "soon", "never", "past 64 bits"],
)
def test_strange_mtime_hides_no_write(disk: BackedUpDisk, mtime_ns: int) -> None:
    os.utime(disk.image, ns=(mtime_ns, mtime_ns))
    session.adopt(disk.store, NAME)
    assert trust_of(disk.changes()) is Trust.EXACT
    with disk.image.open("r+b") as image:
        image.write(b"theirs")
    assert trust_of(disk.changes()) is Trust.UNTRUSTED


# --- the path leads elsewhere ---


def removed(disk: BackedUpDisk) -> None:
    disk.image.unlink()


def a_folder(disk: BackedUpDisk) -> None:
    disk.image.unlink()
    disk.image.mkdir()


def a_fifo(disk: BackedUpDisk) -> None:
    disk.image.unlink()
    os.mkfifo(disk.image)


def linked_in_a_circle(disk: BackedUpDisk) -> None:
    disk.image.unlink()
    disk.image.symlink_to(disk.image)


@pytest.mark.parametrize(
    ("deed", "error", "words"),
    [
        (removed, NotFound, "the image of disk 'sda', .* does not exist any more; .*`lmdbitmap rm sda`"),
        (a_folder, InvalidArgument, "neither a regular file nor a block device"),
        (a_fifo, InvalidArgument, "neither a regular file nor a block device"),
        (linked_in_a_circle, StorageError, "mend the symbolic links"),
    ],
)
def test_image_that_cannot_be_opened_is_refused_and_untrusted(
    disk: BackedUpDisk, deed: Deed, error: type[LmdbitmapError], words: str
) -> None:
    deed(disk)
    for attempt in (disk.attach, disk.backup, lambda: session.adopt(disk.store, NAME)):
        with pytest.raises(error, match=words):
            attempt()
    standing = disk.changes().standing
    assert standing.trust is Trust.UNTRUSTED
    assert "its image cannot be looked at" in str(standing.reason)
    session.remove(disk.store, NAME)


@needs_loop_devices
@requires("mkfs.ext4")
def test_image_that_became_read_only_can_still_be_backed_up(folder: Path) -> None:
    with loop_node(folder, 8 << 20) as node:
        run("mkfs.ext4", "-q", str(node))
        (mounted := folder / "mounted").mkdir()
        run("mount", node, mounted)
        try:
            image = make_raw_image(mounted / "disk.raw", SIZE)
            with Store.create(str(folder / "store")) as store:
                session.add(store, NAME, str(image), granularity_bits=12)
                run("mount", "-o", "remount,ro", mounted)
                with pytest.raises(StorageError, match="read-only: remount it for writing"):
                    Filter.attach(store, NAME)
                with session.owning(store, NAME, lambda image: open_image(image, read_only=True)) as held:
                    assert session.reconcile(store, held).epoch_number == 1
        finally:
            run("umount", mounted)


# --- the store was put back from a copy ---

PARTS = {"all": ("",), "lmdb": ("lmdb",), "lmdb and newest": ("lmdb", "newest"), "owners": ("owners",)}


def save_store(disk: BackedUpDisk) -> None:
    """By another process: closing LMDB's files here would drop our locks."""
    run("cp", "-a", disk.store.path, disk.folder / "saved")


def put_back(disk: BackedUpDisk, parts: tuple[str, ...]) -> None:
    disk.store.close()
    for part in parts:
        target = os.path.join(disk.store.path, part)
        run("rm", "-rf", target)
        run("cp", "-a", os.path.join(disk.folder / "saved", part), target)
    disk.store = Store.open(disk.store.path)


def age(disk: BackedUpDisk) -> None:
    """As if the image had been written for an hour since the copy; two seconds are forgiven, as after a death."""
    mtime_ns = disk.image.stat().st_mtime_ns + LATER_NS
    os.utime(disk.image, ns=(mtime_ns, mtime_ns))


@pytest.mark.parametrize("end", ["detached", "died"])
@pytest.mark.parametrize("saved_while", ["detached", "attached"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_store_put_back_never_calls_clean_what_was_written_since(
    disk: BackedUpDisk, parts: tuple[str, ...], saved_while: str, end: str
) -> None:
    """With and without its owners' files, saved at rest or in the middle of a session."""
    if saved_while == "detached":
        save_store(disk)
    attached = disk.attach()
    if saved_while == "attached":
        attached.beat()
        save_store(disk)
    attached.pwrite(b"since the copy", 7 * BLOCK)
    age(disk)
    attached.beat()
    attached.detach() if end == "detached" else attached.abandon()
    put_back(disk, parts)
    answer = disk.changes()
    assert answer.standing.trust is Trust.UNTRUSTED or 7 in blocks_of(answer)
    disk.backup()
    assert disk.restored() == disk.content()


def test_database_put_back_beside_newer_signs_of_life_is_not_believed(
    disk: BackedUpDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    """They vouch for the image as it is now, and the database lacks what was recorded meanwhile."""
    attached = disk.attach()
    save_store(disk)
    attached.pwrite(b"since the copy", 7 * BLOCK)
    attached.beat()
    attached.abandon()
    put_back(disk, PARTS["lmdb and newest"])
    expect_a_full_backup(disk, capsys, "the store's newest changes were lost", adoptable=False)


@pytest.mark.parametrize("end", ["detached", "died"])
def test_nobody_can_vouch_for_a_database_that_lacks_what_its_owner_recorded(
    disk: BackedUpDisk, end: str
) -> None:
    """That no stranger wrote the image may be true, and says nothing of the bits that were in the newer database."""
    save_store(disk)
    attached = disk.attach()
    attached.pwrite(b"since the copy", 7 * BLOCK)
    attached.beat()
    attached.detach() if end == "detached" else attached.abandon()
    put_back(disk, PARTS["lmdb and newest"])
    with pytest.raises(Untrusted, match=r"cannot be adopted: the store was put back .*; make a full backup"):
        session.adopt(disk.store, NAME)
    assert disk.changes().standing.trust is Trust.UNTRUSTED
    disk.backup()
    assert disk.restored() == disk.content()


def test_store_put_back_before_anything_was_written_lost_nothing(disk: BackedUpDisk) -> None:
    save_store(disk)
    put_back(disk, PARTS["all"])
    assert trust_of(disk.changes()) is Trust.EXACT
    assert blocks_of(disk.changes()) == {1}


# --- two stores, one image ---


def test_two_stores_that_take_turns_notice_each_others_writes(disk: BackedUpDisk) -> None:
    with Store.create(str(disk.folder / "second")) as second:
        session.add(second, NAME, str(disk.image), granularity_bits=12)
        turns = 0
        for epoch in (2, 3):
            disk.write(b"first", 0)
            with Filter.attach(second, NAME, background=False) as other:
                assert other.disk.epoch_number == epoch
                assert "written while it was not tracked" in other.disk.epoch_reason
                other.pwrite(b"second", BLOCK)
            assert trust_of(disk.changes()) is Trust.UNTRUSTED
            turns += 1
        assert turns == 2


def test_two_stores_cannot_have_the_image_at_once(disk: BackedUpDisk) -> None:
    with Store.create(str(disk.folder / "second")) as second:
        session.add(second, NAME, str(disk.image), granularity_bits=12)
        with disk.attach(), pytest.raises(Busy, match="open in QEMU or in another lmdbitmap"):
            Filter.attach(second, NAME, background=False)
        with (
            Filter.attach(second, NAME, background=False),
            pytest.raises(Busy, match="open in QEMU or in another lmdbitmap"),
        ):
            disk.attach()


# --- the store lies on the image ---


@needs_loop_devices
@requires("mkfs.ext4")
def test_image_that_holds_its_own_store_is_refused(folder: Path) -> None:
    with loop_node(folder, 16 << 20) as node:
        image = folder / "backing.raw"
        run("mkfs.ext4", "-q", node)
        (mounted := folder / "mounted").mkdir()
        run("mount", node, mounted)
        try:
            _refused_inside(mounted, image, node)
            _refused_after_a_move(folder, mounted, image)
        finally:
            run("umount", mounted)


def _refused_inside(mounted: Path, image: Path, node: Path) -> None:
    with Store.create(str(mounted / "store")) as store:
        for way in (image, node):
            with pytest.raises(InvalidArgument, match=r"each commit would write to the image.*--store"):
                session.add(store, NAME, str(way), granularity_bits=12)
        other = make_raw_image(mounted / "guest.raw", SIZE)
        session.add(store, "guest", str(other), granularity_bits=12)  # a neighbour of the store is no matter


def _refused_after_a_move(folder: Path, mounted: Path, image: Path) -> None:
    with Store.create(str(folder / "outside")) as store:
        session.add(store, NAME, str(image), granularity_bits=12)
    shutil.move(folder / "outside", mounted / "inside")
    with Store.open(str(mounted / "inside")) as store:
        with pytest.raises(InvalidArgument, match="each commit would write to the image"):
            Filter.attach(store, NAME)
        with pytest.raises(InvalidArgument, match="each commit would write to the image"):
            session.adopt(store, NAME)
        session.remove(store, NAME)


def test_untrusted_disk_of_an_older_epoch_says_why(disk: BackedUpDisk) -> None:
    written(disk)
    before = disk.checkpoints()[0]
    disk.attach().detach()
    with pytest.raises(Untrusted, match="written while it was not tracked; make a full backup"):
        disk.changes(since=before)
