"""A backup killed at any step costs its own work only: the next is incremental and right, and no trace is left."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.backups.consumers import holds_of
from lmdbitmap.errors import AlreadyExists, StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry, decode
from lmdbitmap.repository.manifest_file import COPY
from lmdbitmap.restoring.restore import restore
from lmdbitmap.storage.schema import DEFERRED, WRITE_AHEAD
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import changes
from tests.crash.dying import Death, Deaths
from tests.crash.full_disk import CRAMPED_BYTES, can_mount, file_size_limit, full_tmpfs
from tests.crash.lives import CLUSTER, IMAGES, OTHER
from tests.helpers.backed_up import ALWAYS_THERE, DIFFERENTIAL, FULL, INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.support import no_ascii, run
from tests.helpers.tracked import NAME, quick_folder, trust_of

SIZE = 200_003
BLOCK = 4096

STEPS = [
    "folder made", "synced", "folder made", "synced",
    "synced", "committed", "judged",
    "synced", "renamed", "synced", "noted",
    "synced", "renamed", "synced", "held",
    "committed",
    "data written", "image written", "synced", "renamed", "synced", "synced", "renamed", "synced",
    "synced", "renamed", "synced", "held",
    "synced", "renamed", "synced",
    "synced", "renamed", "synced", "manifest replaced",
    "committed", "removed",
]  # fmt: skip
"""What a first backup does. Law 3: the archive is synced before `manifest replaced`, and forgetting follows it.
What is synced before the first commit is the image, whose mtime that commit keeps."""


@contextlib.contextmanager
def disk_before(first: bool, durability: str = WRITE_AHEAD) -> Iterator[BackedUpDisk]:
    """A disk that was written; unless its next backup is the first, with a full and an incremental one before."""
    with quick_folder() as folder:
        disk = BackedUpDisk(folder, SIZE, durability=durability)
        disk.write(no_ascii(SIZE), 0)
        if not first:
            disk.backup()
            disk.write(no_ascii(3 * BLOCK), 10 * BLOCK)
            disk.backup()
        disk.write(no_ascii(2 * BLOCK), 20 * BLOCK)
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
def test_a_backup_killed_at_any_step_is_followed_by_a_right_increment(
    durability: str, deaths: Deaths
) -> None:
    made = [survives(death, {NAME: 2})[0] for death in deaths("backing_up", durability)]
    assert min(made.count(True), made.count(False)) >= 5


def test_the_manifest_and_its_second_copy_are_never_further_apart_than_one_backup(deaths: Deaths) -> None:
    """What the copy has more is whole: it may be brought back. Whoever locks the folder makes it the manifest's."""
    ahead = []
    for death in deaths("backing_up"):
        folder = BackupFolder(death.folder / "backups", NAME)
        entries = entries_of(folder)
        copied = decode(Path(folder.path_of(COPY)).read_bytes()).backups
        assert copied[: len(entries)] == entries, death
        folder.check_images(copied)
        ahead.append(len(copied) - len(entries))
        with folder.locked():
            assert decode(Path(folder.path_of(COPY)).read_bytes()).backups == entries, death
    assert set(ahead) == {0, 1}


def test_a_compressed_backup_killed_at_any_step_is_followed_by_a_right_increment(deaths: Deaths) -> None:
    made = [survives(death, {NAME: 2})[0] for death in deaths("backing_up_compressed")]
    assert min(made.count(True), made.count(False)) >= 5


def test_a_full_backup_killed_at_any_step_takes_nothing_from_the_chain_before_it(deaths: Deaths) -> None:
    made = [survives(death, {NAME: 2})[0] for death in deaths("backing_up_full")]
    assert min(made.count(True), made.count(False)) >= 5


def test_a_full_backup_in_place_of_a_rescan_killed_at_any_step_is_made_by_the_next(deaths: Deaths) -> None:
    made = []
    for death in deaths("backing_up_onto_rot"):
        with closing(Store.open(str(death.folder / "store"))) as store:
            made.append(len(entries_of(BackupFolder(death.folder / "backups", NAME))) == 2)
            assert made[-1] or not death.told, death
            [result] = backup(store, [NAME], death.folder / "backups")
            assert result.entry.type_actual is (INCREMENTAL if made[-1] else FULL), death
            leaves_no_trace(death, store, NAME)
    assert min(made.count(True), made.count(False)) >= 5


def test_a_first_backup_killed_at_any_step_is_followed_by_a_right_one(deaths: Deaths) -> None:
    made = [survives(death, {NAME: 0})[0] for death in deaths("backing_up_first")]
    assert min(made.count(True), made.count(False)) >= 5


def test_of_two_disks_each_has_its_backup_or_not_and_both_of_one_moment(deaths: Deaths) -> None:
    made = []
    for death in deaths("backing_up_two"):
        with closing(Store.open(str(death.folder / "store"))) as store:
            points = [backup_checkpoints(store, name) for name in (NAME, OTHER)]
        assert len(points[0] & points[1]) == len(points[0]) - 1 == len(points[1]), (death, points)
        made.append(survives(death, {NAME: 1, OTHER: 0}))
    assert set(made) == {(False, False), (True, False), (True, True)}


def test_killed_beside_a_disk_that_fails_the_other_has_its_backup_or_not_and_both_go_on(
    deaths: Deaths,
) -> None:
    """What was made of the one that fails is undone while the other is not begun yet."""
    made = []
    for death in deaths("backing_up_beside_a_failure"):
        with closing(Store.open(str(death.folder / "store"))) as store:
            counts = {name: is_true(death, store, name) for name in (NAME, OTHER)}
            assert counts[NAME] == 1, death
            made.append(counts[OTHER] == 1)
            assert death.told in ((), (OTHER,)), death
            assert made[-1] or not death.told, death
            goes_on(death, store, counts, {NAME: False, OTHER: made[-1]})
    assert min(made.count(True), made.count(False)) >= 5


def test_a_backup_of_an_attached_disk_killed_at_any_step_is_followed_by_a_right_increment(
    deaths: Deaths,
) -> None:
    """Its disk died in the middle of being written: what was armed is read once more."""
    made = []
    for death in deaths("backing_up_attached"):
        with closing(Store.open(str(death.folder / "store"))) as store:
            made.append(is_true(death, store, NAME) > 2)
            assert made[-1] or not death.told, death
            [result] = backup(store, [NAME], death.folder / "backups")
            assert (result.entry.type_actual, result.entry.reason) == (INCREMENTAL, None), death
            leaves_no_trace(death, store, NAME)
            [again] = backup(store, [NAME], death.folder / "backups")
            assert (again.entry.trust, again.entry.bytes_changed) == (Trust.EXACT, 0), death
        assert os.listdir(death.folder / "scratch") == [], death
    assert min(made.count(True), made.count(False)) >= 5


def test_a_backup_elsewhere_merges_away_what_a_killed_one_left(deaths: Deaths) -> None:
    """But not where a manifest may name it; and the repository's own next backup is right in any case."""
    fates = {True: 0, False: 0}
    for death in deaths("backing_up"):
        with closing(Store.open(str(death.folder / "store"))) as store:
            made = is_true(death, store, NAME)
            left = backup_checkpoints(store, NAME) - names_of(death)
            is_noted = any(hold.under_way for hold in holds_of(store, NAME))
            [elsewhere] = backup(store, [NAME], death.folder / "elsewhere")
            after = backup_checkpoints(store, NAME) - names_of(death) - {elsewhere.entry.checkpoint.name}
            assert after == (set() if is_noted else left), death
            fates[bool(left - after)] += 1
            [result] = backup(store, [NAME], death.folder / "backups")
            assert (result.entry.type_actual, result.entry.reason) == (INCREMENTAL, None), death
            assert result.entry.bytes_changed == (0 if made > 2 else CLUSTER), death
            assert backup_checkpoints(store, NAME) == {
                *(
                    entry.checkpoint.name
                    for entry in needed(entries_of(BackupFolder(death.folder / "backups", NAME)))
                ),
                elsewhere.entry.checkpoint.name,
            }, death
    assert min(fates.values()) >= 5


def names_of(death: Death) -> set[str]:
    """The checkpoints that the manifest names."""
    return {entry.checkpoint.name for entry in entries_of(BackupFolder(death.folder / "backups", NAME))}


@pytest.mark.parametrize(("life", "code"), [("letting_lapse", "hold-lapsed"), ("dropping", "hold-dropped")])
def test_a_hold_is_ended_or_not_and_its_repository_gets_what_changed(
    life: str, code: str, deaths: Deaths
) -> None:
    fates = {True: 0, False: 0}
    for death in deaths(life):
        with closing(Store.open(str(death.folder / "store"))) as store:
            is_true_but_for_checkpoints(death)
            there = names_of(death) & backup_checkpoints(store, NAME)
            assert not there or not death.told, death
            newest = newest_checkpoint(death, NAME)
            [result] = backup(store, [NAME], death.folder / "backups")
            kept = newest in there
            fates[kept] += 1
            assert result.entry.type_actual is (INCREMENTAL if kept else RESCAN), death
            assert (result.entry.reason and result.entry.reason.code) == (None if kept else code), death
            assert result.entry.bytes_changed == CLUSTER, death
            restore(death.folder / "backups", NAME, death.folder / "out.raw")
            assert filecmp.cmp(death.folder / "out.raw", death.folder / "disk.raw", shallow=False), death
    assert min(fates.values()) >= 2


def test_a_folder_that_was_being_taken_over_is_the_one_disks_or_the_others_and_whole(deaths: Deaths) -> None:
    """And until it is the other's, that has to be asked for again; from then on its own checkpoints count."""
    made = []
    for death in deaths("taking_over"):
        with closing(Store.open(str(death.folder / "store"))) as store:
            is_true_but_for_checkpoints(death)
            folder = BackupFolder(death.folder / "backups", NAME)
            made.append(is_ours(store, folder))
            assert made[-1] == (len(entries_of(folder)) == 3) >= bool(death.told), death
            if not made[-1]:
                with pytest.raises(AlreadyExists):
                    backup(store, [NAME], death.folder / "backups")
            [result] = backup(store, [NAME], death.folder / "backups", take_over=not made[-1])
            if made[-1]:
                assert (result.entry.type_actual, result.entry.bytes_changed) == (INCREMENTAL, 0), death
            else:
                assert result.entry.reason is not None, death
                assert (result.entry.type_actual, result.entry.reason.code) == (RESCAN, "tracked-elsewhere")
                assert result.entry.bytes_changed == CLUSTER, death
            assert is_ours(store, folder), death
            assert backup_checkpoints(store, NAME) == {result.entry.checkpoint.name}, death
            [hold] = holds_of(store, NAME)
            assert [held.name for held in hold.checkpoints] == [result.entry.checkpoint.name], death
            restore(death.folder / "backups", NAME, death.folder / "out.raw")
            assert filecmp.cmp(death.folder / "out.raw", death.folder / "disk.raw", shallow=False), death
    assert min(made.count(True), made.count(False)) >= 5


def is_ours(store: Store, folder: BackupFolder) -> bool:
    """Whether the folder is that of the disk that the store has."""
    found = folder.manifest()
    assert found is not None
    with store.read() as reader:
        return found.disk.uuid == chain.find_disk(reader, folder.disk_name).uuid


def is_true_but_for_checkpoints(death: Death) -> None:
    for number in ("1", "2"):
        out = death.folder / "out.raw"
        restore(death.folder / "backups", NAME, out, at=number)
        assert filecmp.cmp(out, death.folder / f"{number}.raw", shallow=False), death
        out.unlink()


def survives(death: Death, earlier: dict[str, int]) -> tuple[bool, ...]:
    """Judge what a dead backup left of disks that had so many backups; whether each disk has one more."""
    with closing(Store.open(str(death.folder / "store"))) as store:
        counts = {name: is_true(death, store, name) for name in earlier}
        made = tuple(counts[name] > count for name, count in earlier.items())
        assert all(made) or not death.told, death
        if all(made):
            assert len({newest_checkpoint(death, name) for name in earlier}) == 1, death
        goes_on(death, store, counts, dict(zip(earlier, made, strict=True)))
    return made


def is_true(death: Death, store: Store, name: str) -> int:
    """Both newest backups that the manifest names are whole, the checkpoints to count from are there (law 3), and
    any other image is known to be unfinished. Answers how many backups there are."""
    folder = BackupFolder(death.folder / "backups", name)
    entries = entries_of(folder)
    for entry in entries[-2:]:
        restored = death.folder / f"restored-{name}-{entry.id}.raw"
        restore(folder.repository_path, name, restored, at=entry.id)
        assert filecmp.cmp(restored, content_at(death, name, entry), shallow=False), (death, entry.id)
        restored.unlink()
    assert {entry.checkpoint.name for entry in needed(entries)} <= backup_checkpoints(store, name), death
    images = {path.name for path in Path(folder.path).glob("*.qcow2")} - {entry.file for entry in entries}
    assert not images or all(file in Path(folder.path, "unfinished").read_text() for file in images), death
    assert trust_of(changes(store, name)) is not Trust.UNTRUSTED, death
    return len(entries)


def entries_of(folder: BackupFolder) -> Sequence[BackupEntry]:
    found = folder.manifest() if Path(folder.path).exists() else None
    return found.backups if found else ()


def newest_checkpoint(death: Death, name: str) -> str:
    return entries_of(BackupFolder(death.folder / "backups", name))[-1].checkpoint.name


def content_at(death: Death, name: str, entry: BackupEntry) -> Path:
    """A copy that was made beside the backup, or the image, which nobody has written since."""
    copy = death.folder / f"{entry.id}.raw"
    return copy if copy.exists() and name == NAME else death.folder / IMAGES[name]


def needed(entries: Sequence[BackupEntry]) -> Sequence[BackupEntry]:
    """Those that the next increment and the next differential backup count from."""
    fulls = [entry for entry in entries if entry.type_actual is FULL]
    return [*fulls[-1:], *entries[-1:]]


def backup_checkpoints(store: Store, name: str) -> set[str]:
    with store.read() as reader:
        points = reader.checkpoints(chain.find_disk(reader, name).uuid)
    return {point.name for point in points if Maker.BACKUP.named(point.name)}


def goes_on(death: Death, store: Store, counts: dict[str, int], made: dict[str, bool]) -> None:
    """The next backup needs no help, costs what was written since the last one that was made, and leaves no trace."""
    for name in counts:
        with Filter.attach(store, name, background=False) as disk:
            disk.pwrite(b"later", 30 * CLUSTER)
    for result in backup(store, list(counts), death.folder / "backups"):
        name, entry = result.disk, result.entry
        assert entry.trust is Trust.EXACT, death
        if counts[name]:
            assert (entry.type_actual, entry.reason) == (INCREMENTAL, None), death
            assert entry.bytes_changed == (CLUSTER if made[name] else 2 * CLUSTER), death
        else:
            assert (entry.type_actual, entry.reason and entry.reason.code) == (FULL, "no-earlier-backup"), (
                death
            )
        leaves_no_trace(death, store, name)


def leaves_no_trace(death: Death, store: Store, name: str) -> None:
    """The newest backup is the image as it is, and there is nothing beside what the manifest names."""
    folder = BackupFolder(death.folder / "backups", name)
    entries = entries_of(folder)
    files = {file for entry in entries for file in (entry.file, entry.chunks and entry.chunks.file)}
    assert set(os.listdir(folder.path)) == files | ALWAYS_THERE, death
    assert backup_checkpoints(store, name) == {entry.checkpoint.name for entry in needed(entries)}, death
    restore(folder.repository_path, name, death.folder / "out.raw")
    assert filecmp.cmp(death.folder / "out.raw", death.folder / IMAGES[name], shallow=False), death
    (death.folder / "out.raw").unlink()


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
    disk.write(no_ascii(disk.size), 0)
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
    disk.write(no_ascii(disk.size), 0)
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
