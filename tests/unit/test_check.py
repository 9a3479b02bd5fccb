"""What `check` finds: a sound store is sound, and every way of being unsound is told with a next step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.storage import owner_file, schema
from lmdbitmap.storage.owner_file import Distrust
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import chain, session
from lmdbitmap.upkeep.check import check_store, next_step_for
from lmdbitmap.upkeep.findings import Finding, Gravity
from tests.conftest import RawImage
from tests.helpers.tracked import TrackedDisk

MIB = 1 << 20
ANOTHER = UUID(int=0x5EED)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def disk(store: Store, raw_image: RawImage) -> Disk:
    """A disk `sda` of two regions with checkpoints `epoch-1` and `monday`, written to in both periods."""
    image = raw_image(2 * REGION_BLOCKS * 512)
    session.add(store, "sda", str(image), granularity_bits=9)
    with Filter.attach(store, "sda", background=False) as attached:
        attached.pwrite(b"a" * 512, 0)
        take_checkpoint([attached], "monday")
        attached.pwrite(b"b" * 512, MIB)
        return attached.disk


def _only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def _checkpoints(store: Store, disk: Disk) -> list[Checkpoint]:
    with store.read() as reader:
        return reader.checkpoints(disk.uuid)


def _now(store: Store, disk: Disk) -> Disk:
    with store.read() as reader:
        return chain.find_disk(reader, disk.name)


def test_a_store_that_was_used_as_it_should_be_is_sound(store: Store, disk: Disk) -> None:
    assert check_store(store) == []


def test_an_empty_store_is_sound(store: Store) -> None:
    assert check_store(store) == []


def test_without_progress_nobody_is_told(store: Store, disk: Disk) -> None:
    assert check_store(store, progress=None) == []


def test_progress_goes_up_to_the_whole(store: Store, disk: Disk) -> None:
    told: list[tuple[int, int]] = []
    check_store(store, lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * disk.size, 2 * disk.size), "of two bitmaps"
    assert told == sorted(told)


# --- descriptions that lie ---


@pytest.mark.parametrize("database", ["disks", "checkpoints", "bitmaps"])
def test_bytes_that_are_no_description_are_named_and_hide_nothing_else(
    store: Store, disk: Disk, database: str
) -> None:
    key = b"\xff" * {"disks": 16, "checkpoints": 24, "bitmaps": 8}[database]
    store.update(lambda writer: writer._put(database, key, b"\xc1 nonsense"))
    _damage_a_region(store, disk)
    garbage, region = check_store(store)
    assert garbage.gravity is Gravity.DAMAGE
    assert f"{database}/{key.hex()}" in garbage.place
    assert "CRC-32" in garbage.problem
    assert "make a full backup" in garbage.next_step
    assert "region 1" in region.problem


def test_a_description_under_another_key_is_named(store: Store, disk: Disk) -> None:
    store.update(lambda writer: writer._put("disks", ANOTHER.bytes, schema.encode(_now(store, disk))))
    found = _only(check_store(store))
    assert found.place == f"disk description at disks/{ANOTHER.bytes.hex()}"
    assert found.problem == "it belongs under another key"


Alter = Callable[[Writer, Disk, list[Checkpoint]], None]


def _disk_with(**changes: object) -> Alter:
    return lambda writer, disk, _: writer.put_disk(dataclasses.replace(disk, **changes))  # type: ignore[arg-type]


def _bitmap_with(position: int, **changes: object) -> Alter:
    def alter(writer: Writer, _: Disk, checkpoints: list[Checkpoint]) -> None:
        bitmap = writer.bitmap(checkpoints[position].bitmap_id)
        writer.put_bitmap(dataclasses.replace(bitmap, **changes))  # type: ignore[arg-type]

    return alter


def _without_checkpoints(writer: Writer, _: Disk, checkpoints: list[Checkpoint]) -> None:
    for checkpoint in checkpoints:
        writer.delete_checkpoint(checkpoint)
        writer.delete_bitmap(checkpoint.bitmap_id)


def _without_bitmap(writer: Writer, _: Disk, checkpoints: list[Checkpoint]) -> None:
    writer.delete_bitmap(checkpoints[0].bitmap_id)


def _with_a_checkpoint_of(epoch: UUID | None, name: str = "tuesday") -> Alter:
    """One more checkpoint at the end of the chain."""

    def alter(writer: Writer, disk: Disk, checkpoints: list[Checkpoint]) -> None:
        changed, checkpoint = chain.add_checkpoint(writer, disk, "tuesday", 0)
        writer.put_checkpoint(dataclasses.replace(checkpoint, epoch=epoch or disk.epoch, name=name))
        writer.put_disk(dataclasses.replace(changed, epoch=epoch or disk.epoch))

    return alter


def _with_a_split_epoch(writer: Writer, disk: Disk, checkpoints: list[Checkpoint]) -> None:
    _with_a_checkpoint_of(None)(writer, disk, checkpoints)
    writer.put_checkpoint(dataclasses.replace(checkpoints[1], epoch=ANOTHER))


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (_disk_with(name="../sda"), "disk name '../sda' starts with . or -, or has one of / \\ , @ in it"),
        (_without_checkpoints, "it has no checkpoint, so nothing records"),
        (_disk_with(epoch=ANOTHER), "its newest checkpoint is of another epoch than the disk"),
        (_with_a_split_epoch, "the checkpoints of an epoch do not follow each other"),
        (_disk_with(next_sequence=2), "checkpoint 'monday' has number 2, the next is 2"),
        (_with_a_checkpoint_of(None, "monday"), "several checkpoints are called 'monday'"),
        (_without_bitmap, "the bitmap of checkpoint 'epoch-1' is not described"),
        (_bitmap_with(1, granularity_bits=10), "the bitmap of checkpoint 'monday' is of another size or granularity"),
        (_bitmap_with(1, name="kept"), "the bitmap of checkpoint 'monday' stands alone as 'kept' too"),
    ],
)  # fmt: skip
def test_a_disk_that_contradicts_itself_is_damaged(
    store: Store, disk: Disk, alter: Alter, problem: str
) -> None:
    checkpoints = _checkpoints(store, disk)
    store.update(lambda writer: alter(writer, _now(store, disk), checkpoints))
    found = [finding for finding in check_store(store) if finding.problem == problem]
    assert _only(found).gravity is Gravity.DAMAGE
    assert _only(found).place.startswith("disk '")


def test_an_older_epoch_is_no_damage(store: Store, disk: Disk) -> None:
    store.update(lambda writer: chain.start_epoch(writer, _now(store, disk), "a test", 0))
    assert check_store(store) == []


def test_names_and_images_are_unique(store: Store, disk: Disk, raw_image: RawImage) -> None:
    other = session.add(store, "sdb", str(raw_image(MIB, name="other.raw")), granularity_bits=9)
    store.update(
        lambda writer: writer.put_disk(
            dataclasses.replace(other, name="sda", image=disk.image, next_sequence=2)
        )
    )
    findings = [finding for finding in check_store(store) if finding.gravity is Gravity.DAMAGE]
    assert [(finding.place, finding.problem) for finding in findings] == [
        ("name 'sda'", "several disks or bitmaps have it"),
        (f"image {disk.image}", "several disks track it"),
    ]


def test_checkpoints_without_their_disk_are_damage(store: Store, disk: Disk) -> None:
    store.update(lambda writer: writer.delete_disk(disk.uuid))
    damage, owner_file = check_store(store)
    assert damage.place == f"checkpoints of disk {disk.uuid}"
    assert owner_file.gravity is Gravity.NOTE


def test_two_checkpoints_of_one_bitmap_are_damage(store: Store, disk: Disk) -> None:
    first, second = _checkpoints(store, disk)
    shared = dataclasses.replace(second, bitmap_id=first.bitmap_id)
    store.update(lambda writer: writer.put_checkpoint(shared))
    shared_finding, orphan = check_store(store)
    assert shared_finding == (
        Gravity.DAMAGE, f"bitmap {first.bitmap_id}", "several checkpoints record into it", shared_finding.next_step
    )  # fmt: skip
    assert (orphan.gravity, orphan.place) == (Gravity.NOTE, f"bitmap {second.bitmap_id}")


def test_a_bitmap_number_that_was_never_given_out_is_damage(store: Store, disk: Disk) -> None:
    store.update(lambda writer: writer._put("meta", b"next bitmap id", (1).to_bytes(8, "big")))
    assert _only(check_store(store)).problem == "its number is past the last one given out, 1"


# --- region records ---


def _damage_a_region(store: Store, disk: Disk, region: int = 1) -> None:
    number = _checkpoints(store, disk)[1].bitmap_id

    def flip_a_bit(writer: Writer) -> None:
        key = schema.region_key(number, region)
        record = bytearray(schema.encode_region(key, 0, schema.ALL_CLEAN_BITS))
        record[100] ^= 1
        writer._put("regions", key, bytes(record))

    store.update(flip_a_bit)


def test_damaged_region_records_are_counted_for_their_bitmap(store: Store, disk: Disk) -> None:
    _damage_a_region(store, disk, 1)
    _damage_a_region(store, disk, 0)
    found = _only(check_store(store))
    assert found.gravity is Gravity.DAMAGE
    assert "(checkpoint 'monday' of disk 'sda')" in found.place
    assert found.problem == "2 of its region records are damaged, the first of region 0"
    assert "counts as dirty" in found.next_step


@pytest.mark.parametrize("how", ["damaged", "lost", "past the end"])
def test_no_backup_is_advised_for_a_bitmap_that_stands_alone(store: Store, how: str) -> None:
    """A backup neither reads nor mends it."""

    def keep(writer: Writer) -> None:
        bitmap = schema.Bitmap(writer.new_bitmap_id(), ANOTHER, MIB, 9, "kept")
        writer.put_bitmap(bitmap)
        region = 100 if how == "past the end" else 0
        writer.put_region(bitmap.id, region, 0, schema.ALL_CLEAN_BITS)

    store.update(keep)
    key = schema.region_key(1, 0)
    if how == "damaged":
        store.update(
            lambda writer: writer._put("regions", key, schema.encode_region(key, 0, b"\0" * 512)[::-1])
        )
    elif how == "lost":
        _lose(store, "regions", key)
    found = _only(check_store(store))
    assert (found.gravity, found.place) == (Gravity.DAMAGE, "bitmap 1 ('kept')")
    assert found.next_step.endswith("remove the bitmap (`lmdbitmap rm kept`) and import it again")
    assert "backup" not in found.next_step


def test_a_region_past_the_end_is_damage(store: Store, disk: Disk) -> None:
    number = _checkpoints(store, disk)[1].bitmap_id
    store.update(lambda writer: writer.put_region(number, 2, 0, schema.ALL_CLEAN_BITS))
    assert "past the disk's end" in _only(check_store(store)).problem


def test_regions_of_no_bitmap_only_take_space(store: Store, disk: Disk) -> None:
    def put_strays(writer: Writer) -> None:
        writer.put_region(4711, 0, 0, schema.ALL_CLEAN_BITS)
        writer._put("regions", b"odd key", b"")

    store.update(put_strays)
    found = _only(check_store(store))
    assert (found.gravity, found.problem) == (Gravity.NOTE, "2 of them belong to no bitmap")


def test_a_bitmap_of_no_checkpoint_only_takes_space(store: Store, disk: Disk) -> None:
    last = _checkpoints(store, disk)[1]
    store.update(lambda writer: writer.delete_checkpoint(last))
    found = _only(check_store(store))
    assert (found.gravity, found.place) == (Gravity.NOTE, f"bitmap {last.bitmap_id}")


def test_a_bitmap_that_stands_alone_is_sound(store: Store, disk: Disk) -> None:
    def keep(writer: Writer) -> None:
        number = writer.new_bitmap_id()
        writer.put_bitmap(schema.Bitmap(number, uuid4(), disk.size, 9, name="kept"))
        writer.put_region(number, 0, 0, schema.ALL_DIRTY_BITS)

    store.update(keep)
    assert check_store(store) == []


# --- around the environment ---


def test_an_image_that_was_written_meanwhile_needs_a_full_backup(store: Store, disk: Disk) -> None:
    os.utime(disk.image, ns=(1, 1))
    found = _only(check_store(store))
    assert found.gravity is Gravity.DISTRUST
    assert found.place == "disk 'sda'"
    assert "written while it was not tracked" in found.problem
    assert "`lmdbitmap adopt sda`" in found.next_step
    assert "that the store is no copy that was put back" in found.next_step


def test_an_image_that_is_gone_needs_a_full_backup(store: Store, disk: Disk) -> None:
    os.unlink(disk.image)
    found = _only(check_store(store))
    assert found.gravity is Gravity.DISTRUST
    assert "does not exist" in found.problem


def test_distrust_is_told_with_its_reason(store: Store, disk: Disk) -> None:
    owner_file.create(store.owner_path(disk.uuid), Distrust(0, "the store was full"))
    found = _only(check_store(store))
    assert (found.gravity, found.problem) == (Gravity.DISTRUST, "the store was full")


def test_a_missing_owner_file_needs_a_full_backup(store: Store, disk: Disk) -> None:
    os.unlink(store.owner_path(disk.uuid))
    assert _only(check_store(store)).gravity is Gravity.DISTRUST


def test_an_owner_file_that_cannot_be_read_hides_no_other_disk(
    store: Store, disk: Disk, tmp_path: Path
) -> None:
    image = tmp_path / "other.raw"
    image.write_bytes(bytes(4096))
    other = session.add(store, "sdb", image, granularity_bits=9)
    os.unlink(store.owner_path(disk.uuid))
    os.mkdir(store.owner_path(disk.uuid))
    os.unlink(other.image)
    gone, unknown = sorted(check_store(store))
    assert (unknown.gravity, unknown.place, gone.place) == (Gravity.DAMAGE, "disk 'sda'", "disk 'sdb'")
    assert unknown.problem.startswith("whether it can be trusted is not known: ")
    assert "Is a directory" in unknown.problem


def test_a_disk_whose_owner_died_is_worth_a_note(store: Store, disk: Disk) -> None:
    with contextlib.closing(Filter.attach(store, "sda", background=False)) as attached:
        beat = Path(store.owner_path(disk.uuid)).read_bytes()
        in_session = _now(store, disk)
        attached.detach()
    Path(store.owner_path(disk.uuid)).write_bytes(beat)
    store.update(lambda writer: writer.put_disk(in_session))
    found = _only(check_store(store))
    assert (found.gravity, found.problem.partition(":")[0]) == (Gravity.NOTE, "its owner died")


def test_a_disk_that_is_attached_is_sound(store: Store, disk: Disk) -> None:
    with Filter.attach(store, "sda", background=False) as attached:
        attached.pwrite(b"c", 0)
        assert check_store(store) == []


def test_a_deferred_disk_is_sound_while_attached_and_not_after_a_crash(
    store: Store, raw_image: RawImage
) -> None:
    image = str(raw_image(MIB))
    disk = session.add(store, "sda", image, granularity_bits=9, durability=schema.DEFERRED)
    with Filter.attach(store, "sda", background=False):
        in_session = _now(store, disk)
        assert check_store(store) == []
    store.update(lambda writer: writer.put_disk(in_session))
    assert _only(check_store(store)).gravity is Gravity.DISTRUST


def test_what_others_may_write_is_worth_a_note(store: Store, disk: Disk) -> None:
    folder = os.path.join(store.path, "owners")
    os.chmod(folder, 0o770)
    assert _only(check_store(store)) == (
        Gravity.NOTE, folder, "other users may write to it", f"chmod go-w {folder}"
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        f"owners/{ANOTHER}",
        f"control/{ANOTHER}",
        "owners/x.0123456789abcdef.partial",
        f"syncs/{ANOTHER}-0123456789abcdef.lock",
        f"holds/{ANOTHER}-{ANOTHER}.json",
        "lmdb.new-1",
    ],
)
def test_what_was_left_lying_about_is_worth_a_note(store: Store, disk: Disk, name: str) -> None:
    (Path(store.path) / name).touch()
    found = _only(check_store(store))
    assert (found.gravity, found.place) == (Gravity.NOTE, os.path.join(store.path, name))


@pytest.mark.parametrize(
    "folder", ["sda", "holds/sda", "owners/sda", f"owners/{ANOTHER}", "syncs/x.0123456789abcdef.partial"]
)
def test_backups_that_somebody_keeps_in_a_store_are_not_called_left_over(
    store: Store, disk: Disk, folder: str
) -> None:
    inside = Path(store.path) / folder
    inside.mkdir()
    (inside / "manifest.json").touch()
    (inside.parent / "notes.partial").touch()
    assert check_store(store) == []


def test_checking_changes_nothing(store: Store, disk: Disk) -> None:
    _damage_a_region(store, disk)
    before = check_store(store)
    assert before != []
    assert check_store(store) == before


# --- what is lost ---


def _lose(store: Store, database: str, key: bytes) -> None:
    """As a damaged page might: the record goes, and nothing else knows of it."""

    def lose(writer: Writer) -> None:
        assert writer._txn.delete(key, db=writer._databases[database])
        writer.new_bitmap_id()

    store.update(lose)


def test_a_lost_region_record_is_missed(store: Store, disk: Disk) -> None:
    monday = _checkpoints(store, disk)[-1]
    _lose(store, "regions", schema.region_key(monday.bitmap_id, 0))
    found = _only(check_store(store))
    assert found.gravity is Gravity.DAMAGE
    assert found.place == f"bitmap {monday.bitmap_id} (checkpoint 'monday' of disk 'sda')"
    assert "lost some" in found.problem
    assert "counts as dirty" in found.next_step


def test_a_region_record_that_is_older_than_it_should_be_is_missed(store: Store, disk: Disk) -> None:
    bitmap_id = _checkpoints(store, disk)[-1].bitmap_id
    key = schema.region_key(bitmap_id, 0)
    older = schema.encode_region(key, 0, schema.ALL_CLEAN_BITS)

    def go_back(writer: Writer) -> None:
        assert writer._txn.put(key, older, db=writer._databases["regions"])
        writer.new_bitmap_id()

    store.update(go_back)
    assert _only(check_store(store)).place.startswith(f"bitmap {bitmap_id}")


def test_a_lost_stand_alone_bitmap_is_missed(store: Store) -> None:
    store.update(
        lambda writer: writer.put_bitmap(schema.Bitmap(writer.new_bitmap_id(), ANOTHER, MIB, 9, "kept"))
    )
    _lose(store, "bitmaps", schema.bitmap_key(1))
    found = _only(check_store(store))
    assert (found.gravity, found.place) == (Gravity.DAMAGE, f"description of bitmap {1:016x}")


def test_a_damaged_page_is_found_before_anything_walks_over_it(store: Store, disk: Disk) -> None:
    """All pages that ever held the record: LMDB would end the process at the first one that it comes to."""
    data, page_bytes = Path(store.path, "lmdb", "data.mdb"), 4096
    content, key = data.read_bytes(), schema.region_key(_checkpoints(store, disk)[-1].bitmap_id, 0)
    starts = [at for at in range(0, len(content), page_bytes) if key in content[at : at + page_bytes]]
    assert starts
    with data.open("r+b") as file:
        for start in starts:
            file.seek(start)
            file.write(bytes(page_bytes))
    found = _only(check_store(store))
    assert found.gravity is Gravity.DAMAGE
    assert "data.mdb" in found.place
    assert "makes it anew" in found.next_step


def test_a_store_that_went_back_needs_a_full_backup(store: Store, disk: Disk) -> None:
    store._environment.highwater.set(10**6)
    path = store.path
    store.close()
    with Store.open(path) as again:
        found = _only(check_store(again))
    assert found.gravity is Gravity.DISTRUST
    assert "newest changes were lost" in found.problem


def test_whoever_serves_a_far_image_may_be_stopped(tmp_path: Path) -> None:
    """What its server has stays there; only a file ends with the process that has it open."""
    tracked = TrackedDisk(tmp_path, 1 << 20)
    far = dataclasses.replace(tracked.disk(), image=f"nbd+unix:///sda?socket={tmp_path}/none")
    with tracked.attach():
        assert "do not stop" not in next_step_for(tracked.store, far)
        tracked.image.unlink()
        assert "do not stop" in next_step_for(tracked.store, tracked.disk())
    tracked.close()
