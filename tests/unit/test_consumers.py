"""Who holds a disk's checkpoints: what is merged away, by whom, and what never is."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.backups.consumers import (
    drop_hold,
    hold_lapse_days,
    holders_of,
    holds_of,
    merge_unheld_of,
    set_hold_lapse_days,
)
from lmdbitmap.errors import Busy, InvalidArgument, NotFound
from lmdbitmap.notes import sync_note
from lmdbitmap.notes.holds import Hold, HoldFile, UnderWay, hold_files
from lmdbitmap.notes.references import CheckpointRef
from lmdbitmap.repository.transfer import copy_backups
from lmdbitmap.streams.stream import stream_backup
from lmdbitmap.syncs.plan import SyncKind
from lmdbitmap.syncs.sync import sync
from lmdbitmap.tracker import session
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.tracked import NAME

pytestmark = pytest.mark.in_memory

BLOCK = 4096
SIZE = 50 * BLOCK
DAY_NS = 86_400 * 10**9


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(b"x" * BLOCK, BLOCK)
    yield made
    made.close()


def hold_of(disk: BackedUpDisk, repository: str) -> Hold:
    [found] = [
        hold for hold in holds_of(disk.store, NAME) if hold.repository == str(disk.folder / repository)
    ]
    return found


def age(disk: BackedUpDisk, repository: str, days: int) -> None:
    """As if nobody had backed up to there for so long."""
    wanted = hold_of(disk, repository).holder
    for file in hold_files(disk.store.path, disk.disk().uuid):
        if file.holder == wanted and file.hold is not None:
            file.replace(dataclasses.replace(file.hold, used_ns=file.hold.used_ns - days * DAY_NS))


def held_names(disk: BackedUpDisk, repository: str) -> list[str]:
    return [checkpoint.name for checkpoint in hold_of(disk, repository).checkpoints]


def kinds(disk: BackedUpDisk) -> dict[str, list[str]]:
    holders = holders_of(disk.store, disk.disk())
    with disk.store.read() as reader:
        return {
            member.name: [holder.kind for holder in holders(member)]
            for member in reader.checkpoints(disk.disk().uuid)
        }


# --- who holds what ---


def test_each_checkpoint_says_who_holds_it(disk: BackedUpDisk) -> None:
    left, right = disk.backup(to="left").checkpoint.name, disk.backup(to="right").checkpoint.name
    disk.clean("mine")
    copy = sync(disk.store, NAME, disk.folder / "copy.raw").checkpoint
    assert kinds(disk) == {
        "epoch-1": ["tracker"],
        left: ["repository"],
        right: ["repository"],
        "mine": ["person"],
        copy: ["sync"],
    }
    assert held_names(disk, "left") == [left]


def test_a_repository_is_known_by_its_uuid_wherever_it_is(disk: BackedUpDisk) -> None:
    disk.backup(to="there")
    before = hold_of(disk, "there")
    shutil.move(disk.folder / "there", disk.folder / "here")
    disk.backup(to="here")
    [hold] = holds_of(disk.store, NAME)
    assert hold.holder == before.holder == disk.manifest("here").holder
    assert hold.repository == str(disk.folder / "here")
    assert hold.used_ns > before.used_ns


def test_disks_that_take_turns_at_one_place_are_two_holders(disk: BackedUpDisk) -> None:
    """Neither is missed while the other is there."""
    for turn in ("a", "b", "a", "b"):
        if (disk.folder / turn).exists():
            shutil.move(disk.folder / turn, disk.folder / "mnt")
        is_new = not (disk.folder / "mnt").exists()
        disk.backup(to="mnt", new_repository=is_new)
        shutil.move(disk.folder / "mnt", disk.folder / turn)
    kinds_made = {turn: [entry.type_actual for entry in disk.manifest(turn).backups] for turn in "ab"}
    assert kinds_made == {"a": [FULL, INCREMENTAL], "b": [FULL, INCREMENTAL]}
    assert len({hold.holder for hold in holds_of(disk.store, NAME)}) == 2


def test_a_finished_streams_checkpoint_is_no_persons(disk: BackedUpDisk) -> None:
    """Whoever streamed may have named it in another stream's beginning, which nobody here knows."""
    name = stream_backup(disk.store, NAME, io.BytesIO()).checkpoint
    assert kinds(disk)[name] == ["unknown"]


def test_backups_that_were_made_before_there_were_notes_are_held_from_the_next_one_on(
    disk: BackedUpDisk,
) -> None:
    first = disk.backup()
    older = dataclasses.replace(disk.manifest(), holder=None)
    disk.backup_folder().replace_manifest(older)
    shutil.rmtree(Path(disk.store.path, "holds"))
    assert kinds(disk)[first.checkpoint.name] == ["unknown"]
    entry = disk.backup()
    assert entry.type_actual is INCREMENTAL
    assert held_names(disk, "backups") == [first.checkpoint.name, entry.checkpoint.name]


def test_a_copy_that_is_backed_up_to_takes_nothing_from_the_original(disk: BackedUpDisk) -> None:
    disk.backup()
    copy_backups(disk.folder / "backups", disk.folder / "copy")
    assert disk.backup(to="copy").type_actual is INCREMENTAL
    assert disk.backup().type_actual is INCREMENTAL
    assert disk.backup(to="copy").type_actual is INCREMENTAL


# --- what lapses ---


def test_a_hold_lapses_at_the_next_backup_elsewhere_and_its_repository_reads_the_disk(
    disk: BackedUpDisk,
) -> None:
    gone = disk.backup(to="away").checkpoint.name
    disk.backup(to="here")
    disk.write(b"later", 30 * BLOCK)
    age(disk, "away", 181)
    disk.backup(to="here")
    assert gone not in disk.checkpoints()
    assert held_names(disk, "away") == []
    entry = disk.backup(to="away")
    assert entry.type_actual is RESCAN
    assert entry.reason is not None
    assert entry.reason.code == "hold-lapsed"
    assert entry.reason.words == (
        "its hold lapsed: no backup went into this repository for more than 180 days"
    )
    assert disk.restored(to="away") == disk.content()
    assert disk.backup(to="away").type_actual is INCREMENTAL


def test_a_lapsed_hold_shows_in_a_differential_backup_too(disk: BackedUpDisk) -> None:
    disk.backup(to="away")
    age(disk, "away", 181)
    disk.backup(to="here")
    entry = disk.backup(DIFFERENTIAL, to="away")
    assert (entry.type_actual, entry.reason and entry.reason.code) == (FULL, "hold-lapsed")


def test_a_repository_that_comes_first_after_a_long_time_finds_all_as_it_was(disk: BackedUpDisk) -> None:
    disk.backup(to="away")
    age(disk, "away", 999)
    assert disk.backup(to="away").type_actual is INCREMENTAL


@pytest.mark.parametrize(("days", "age_days", "stays"), [(0, 9999, True), (400, 399, True), (30, 31, False)])
def test_after_how_many_days_is_set_for_each_disk(
    disk: BackedUpDisk, days: int, age_days: int, stays: bool
) -> None:
    assert hold_lapse_days(disk.store, NAME) == 180
    set_hold_lapse_days(disk.store, NAME, days)
    away = disk.backup(to="away").checkpoint.name
    age(disk, "away", age_days)
    disk.backup(to="here")
    assert (away in disk.checkpoints()) is stays


def test_the_checkpoint_of_a_lapsed_hold_goes_into_the_period_before(disk: BackedUpDisk) -> None:
    """So whoever counts from an older one misses nothing."""
    disk.clean("mine")
    disk.write(b"1", 10 * BLOCK)
    disk.backup(to="away")
    disk.write(b"2", 20 * BLOCK)
    disk.backup(to="here")
    age(disk, "away", 181)
    disk.backup(to="here")
    assert [*disk.changes(since="mine").runs()] == [(10, 11), (20, 21)]


def test_what_a_person_made_never_lapses(disk: BackedUpDisk) -> None:
    disk.clean("mine")
    stream_backup(disk.store, NAME, io.BytesIO(), checkpoint="tuesday")
    streamed = stream_backup(disk.store, NAME, io.BytesIO()).checkpoint
    set_hold_lapse_days(disk.store, NAME, 1)
    disk.backup(to="away")
    age(disk, "away", 9999)
    disk.backup(to="here")
    assert {"epoch-1", "mine", "tuesday", streamed} <= set(disk.checkpoints())


def test_a_hold_that_lapsed_takes_nothing_that_another_holds(disk: BackedUpDisk) -> None:
    first = disk.backup().checkpoint.name
    copy_backups(disk.folder / "backups", disk.folder / "copy")
    disk.backup(to="copy")
    age(disk, "backups", 181)
    disk.backup(to="here")
    assert first in disk.checkpoints(), "the copy's differential backups count from it"
    assert disk.backup(DIFFERENTIAL, to="copy").type_actual is DIFFERENTIAL


def test_a_checkpoint_made_by_hand_merges_away_what_lapsed(disk: BackedUpDisk) -> None:
    away = disk.backup(to="away").checkpoint.name
    disk.clean("mine")
    merge_unheld_of(disk.store, [NAME])
    assert away in disk.checkpoints()
    age(disk, "away", 181)
    merge_unheld_of(disk.store, [NAME])
    assert away not in disk.checkpoints()


def test_of_an_attached_disk_its_filter_merges(disk: BackedUpDisk) -> None:
    away = disk.backup(to="away").checkpoint.name
    disk.backup(to="here")
    age(disk, "away", 181)
    with disk.attach() as attached:
        attached.pwrite(b"!", 40 * BLOCK)
        backup(disk.store, [NAME], disk.folder / "here", attached={NAME: attached})
        assert away not in disk.checkpoints()
    assert disk.backup(to="here").bytes_changed == 0


def test_a_sync_merges_away_what_lapsed(disk: BackedUpDisk) -> None:
    away = disk.backup(to="away").checkpoint.name
    age(disk, "away", 181)
    sync(disk.store, NAME, disk.folder / "copy.raw")
    assert away not in disk.checkpoints()


# --- what died ---


def leave_dead_run(disk: BackedUpDisk, name: str, *, with_uuid: bool = False) -> HoldFile:
    """As a killed stream does."""
    file = HoldFile(disk.store.path, disk.disk().uuid, uuid4())
    with disk.attach() as attached:
        uuid = attached.checkpoint(name).uuid
    with file.locked():
        file.begin(None, [], UnderWay(name, uuid if with_uuid else None), 5)
    return file


@pytest.mark.parametrize(
    ("name", "with_uuid", "stays"),
    [("stream-20260101T000000Z-abcdef", False, False), ("tuesday", True, False), ("tuesday", False, True)],
)
def test_what_a_dead_run_left_goes_with_the_next_backup_if_it_is_surely_its_own(
    disk: BackedUpDisk, name: str, with_uuid: bool, stays: bool
) -> None:
    leave_dead_run(disk, name, with_uuid=with_uuid)
    disk.backup()
    assert (name in disk.checkpoints()) is stays
    assert [hold.repository for hold in holds_of(disk.store, NAME)] == [str(disk.folder / "backups")]


def test_what_a_run_that_lives_took_stays(disk: BackedUpDisk) -> None:
    name = "stream-20260101T000000Z-abcdef"
    file = leave_dead_run(disk, name)
    with file.locked():
        disk.backup()
        assert kinds(disk)[name] == ["run"]
    disk.backup()
    assert name not in disk.checkpoints()


def test_a_run_of_whose_checkpoint_an_archive_may_tell_holds_it(disk: BackedUpDisk) -> None:
    """It died right before the manifest was there, or right after: only its own repository knows."""
    file = leave_dead_run(disk, "backup-20260101T000000Z-abcdef")
    with disk.store.read() as reader:
        uuid = reader.checkpoints(disk.disk().uuid)[-1].uuid
    with file.locked():
        file.keep(CheckpointRef(uuid, "backup-20260101T000000Z-abcdef"), 10**9)
    set_hold_lapse_days(disk.store, NAME, 0)
    disk.backup()
    assert "backup-20260101T000000Z-abcdef" in disk.checkpoints()


def test_a_backup_that_fails_leaves_no_note(disk: BackedUpDisk) -> None:
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backup(disk.store, [NAME], disk.folder / "backups", progress=cancel)
    assert holds_of(disk.store, NAME) == []
    assert disk.checkpoints() == ["epoch-1"]


def test_what_a_dead_sync_left_goes_with_the_next_backup(disk: BackedUpDisk) -> None:
    """What its note calls unneeded and is called as we call it; not what the copy is at."""
    at = sync(disk.store, NAME, disk.folder / "copy.raw").checkpoint
    left = "sync-20260101T000000Z-abcdef"
    with disk.attach() as attached:
        attached.checkpoint(left)
        attached.checkpoint("mine")
    [(path, note)] = sync_note.notes(disk.store.path)
    file = sync_note.NoteFile(path, note)
    with file.locked():
        file.replace(dataclasses.replace(note, unneeded=(left, "mine", "gone")))
        disk.backup()
        assert left in disk.checkpoints(), "somebody syncs"
    disk.backup()
    assert left not in disk.checkpoints()
    assert {at, "mine"} <= set(disk.checkpoints())
    assert [note.unneeded for _, note in sync_note.notes(disk.store.path)] == [("mine",)]
    assert sync(disk.store, NAME, disk.folder / "copy.raw").kind is SyncKind.INCREMENTAL


# --- by hand ---


@pytest.mark.parametrize("by", ["path", "uuid", "digits"])
def test_a_hold_is_dropped_by_path_or_uuid(disk: BackedUpDisk, by: str) -> None:
    gone = disk.backup(to="away").checkpoint.name
    disk.backup(to="here")
    holder = str(hold_of(disk, "away").holder)
    named = {"path": str(disk.folder / "away"), "uuid": holder, "digits": holder[:8]}
    assert drop_hold(disk.store, NAME, named[by]).repository == str(disk.folder / "away")
    assert gone not in disk.checkpoints()
    entry = disk.backup(to="away")
    assert (entry.type_actual, entry.reason and entry.reason.code) == (RESCAN, "hold-dropped")


def test_a_hold_of_a_repository_that_is_gone_is_dropped_by_where_it_was(disk: BackedUpDisk) -> None:
    gone = disk.backup(to="away").checkpoint.name
    disk.clean("mine")
    shutil.rmtree(disk.folder / "away")
    drop_hold(disk.store, NAME, str(disk.folder / "away"))
    assert gone not in disk.checkpoints()
    drop_hold(disk.store, NAME, str(disk.folder / "away"))
    assert holds_of(disk.store, NAME) == []
    with pytest.raises(NotFound, match="name a uuid that `lmdbitmap holds sda` lists"):
        drop_hold(disk.store, NAME, str(disk.folder / "away"))


def test_of_two_repositories_that_were_at_one_place_the_one_that_is_there_is_meant_or_none(
    disk: BackedUpDisk,
) -> None:
    disk.backup(to="mnt")
    shutil.move(disk.folder / "mnt", disk.folder / "a")
    disk.backup(to="mnt", new_repository=True)
    there = disk.manifest("mnt").holder
    assert drop_hold(disk.store, NAME, str(disk.folder / "mnt")).holder == there
    shutil.move(disk.folder / "mnt", disk.folder / "b")
    with pytest.raises(InvalidArgument, match="several repositories"):
        drop_hold(disk.store, NAME, str(disk.folder / "mnt"))


def test_a_hold_that_is_in_use_is_not_dropped(disk: BackedUpDisk) -> None:
    disk.backup()
    [file] = hold_files(disk.store.path, disk.disk().uuid)
    with file.locked(), pytest.raises(Busy):
        drop_hold(disk.store, NAME, str(file.holder))


def test_what_alone_records_goes_when_there_is_another(disk: BackedUpDisk) -> None:
    name = disk.backup(to="away").checkpoint.name
    with disk.attach() as attached:
        attached.forget("epoch-1")
    drop_hold(disk.store, NAME, str(disk.folder / "away"))
    assert disk.checkpoints() == [name]
    disk.clean("mine")
    merge_unheld_of(disk.store, [NAME])
    assert disk.checkpoints() == ["mine"]


def test_a_disk_that_is_removed_takes_its_holds_along(disk: BackedUpDisk) -> None:
    disk.backup()
    set_hold_lapse_days(disk.store, NAME, 7)
    session.remove(disk.store, NAME)
    assert list(Path(disk.store.path, "holds").iterdir()) == []


@pytest.mark.parametrize("kind", ["link to nowhere", "folder"])
def test_a_note_that_cannot_be_read_fails_no_backup_and_no_question(disk: BackedUpDisk, kind: str) -> None:
    disk.backup()
    note = Path(disk.store.path, "holds", f"{disk.disk().uuid}-{uuid4()}.json")
    if kind == "folder":
        note.mkdir()
    else:
        note.symlink_to("nowhere")
    disk.write(b"new", 0)
    assert disk.backup().type_actual is INCREMENTAL
    assert [hold.repository for hold in holds_of(disk.store, NAME)] == [str(disk.folder / "backups")]
    assert disk.restored() == disk.content()
