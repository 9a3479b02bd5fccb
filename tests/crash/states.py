"""What trouble leaves behind: one function for each state, given a disk that was backed up, and written to since.

A function changes what lies on the disk, or what holds it; the store is closed when it returns, unless it yields: then
something goes on, such as an owner, and ends when the test is through.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.unfinished import Unfinished
from lmdbitmap.storage import schema
from lmdbitmap.storage.owner import Owner
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import chain, session
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.tracked import NAME

BLOCK = 4096
PAGE_BYTES = 4096
_TXNID_AT = 144
"""Of the number of the transaction in a meta page, 16 bytes of header included."""


class State(NamedTuple):
    """`says` and `step` are of the finding that `check` has, or empty; `exit_code` is what it ends with."""

    bring_about: Callable[[BackedUpDisk], contextlib.AbstractContextManager[None]]
    exit_code: int = 0
    says: str = ""
    step: str = ""
    durability: str = schema.WRITE_AHEAD
    why_no_backup: str = ""
    """What every backup is refused with, as long as the state lasts."""
    why_no_increment: str = ""
    """What a backup that is not asked to be a full one is refused with."""


Trouble = Callable[[BackedUpDisk], None]


def lasting(trouble: Trouble) -> Callable[[BackedUpDisk], contextlib.AbstractContextManager[None]]:
    """Something that happened, and that nobody goes on with."""

    @contextlib.contextmanager
    def happened(tracked: BackedUpDisk) -> Iterator[None]:
        trouble(tracked)
        tracked.store.close()
        yield

    return happened


def _owner_file(tracked: BackedUpDisk) -> Path:
    return Path(tracked.store.owner_path(tracked.disk().uuid))


def _data(tracked: BackedUpDisk) -> Path:
    return Path(tracked.store.data_path)


def _overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _recording(tracked: BackedUpDisk) -> int:
    """The number of the bitmap that records."""
    with tracked.store.read() as reader:
        return chain.current_checkpoint(reader, tracked.disk()).bitmap_id


def _lose(tracked: BackedUpDisk, database: str, key: bytes) -> None:
    """As a damaged page might: the record goes, and its tally does not know."""

    def lose(writer: Writer) -> None:
        assert writer._txn.delete(key, db=writer._databases[database])
        writer.new_bitmap_id()

    tracked.store.update(lose)


# --- nothing, and owners that died ---


def nothing(tracked: BackedUpDisk) -> None:
    pass


def owner_died(tracked: BackedUpDisk) -> None:
    disk = tracked.attach()
    disk.pwrite(b"in flight", 20 * BLOCK)
    disk.abandon()


def owner_died_and_its_beat_is_lost(tracked: BackedUpDisk) -> None:
    owner_died(tracked)
    _overwrite(_owner_file(tracked), 0, bytes(512))


def owner_died_and_the_image_was_written(tracked: BackedUpDisk) -> None:
    owner_died(tracked)
    tracked.write_behind_our_back(b"stranger", 30 * BLOCK)


def shrinking_died(tracked: BackedUpDisk) -> None:
    disk = tracked.attach()
    tracked.store.update(lambda writer: writer.put_disk(replace(disk.disk, resizing_from=disk.size // 2)))
    disk.abandon()


def distrust_declared(tracked: BackedUpDisk) -> None:
    with contextlib.closing(Owner(str(_owner_file(tracked)))) as held:
        held.declare_distrust("tracking failed: the store was full", 1)


# --- the image ---


def image_written(tracked: BackedUpDisk) -> None:
    tracked.write_behind_our_back(b"stranger", 30 * BLOCK)


def image_replaced(tracked: BackedUpDisk) -> None:
    shutil.copy(tracked.image, tracked.folder / "copy")
    (tracked.folder / "copy").rename(tracked.image)


def image_grown(tracked: BackedUpDisk) -> None:
    os.truncate(tracked.image, tracked.size + 5 * BLOCK)


def image_shrunk(tracked: BackedUpDisk) -> None:
    os.truncate(tracked.image, 3 * BLOCK)


def image_missing(tracked: BackedUpDisk) -> None:
    tracked.image.unlink()


def image_is_a_folder(tracked: BackedUpDisk) -> None:
    tracked.image.unlink()
    tracked.image.mkdir()


# --- the store, from elsewhere or in part ---


def _put_back(tracked: BackedUpDisk, part: str) -> None:
    """What it was before the last changes."""
    tracked.store.close()
    place, copy = Path(tracked.store.path, part), tracked.folder / "copy"
    shutil.copytree(place, copy)
    tracked.store = Store.open(tracked.store.path)
    tracked.clean("later")
    tracked.write(b"newer", 40 * BLOCK)
    tracked.store.close()
    shutil.rmtree(place)
    copy.rename(place)


def store_put_back(tracked: BackedUpDisk) -> None:
    _put_back(tracked, "")


def environment_put_back(tracked: BackedUpDisk) -> None:
    _put_back(tracked, "lmdb")


def owners_put_back(tracked: BackedUpDisk) -> None:
    _put_back(tracked, "owners")


def owner_file_missing(tracked: BackedUpDisk) -> None:
    _owner_file(tracked).unlink()


def owner_file_empty(tracked: BackedUpDisk) -> None:
    _owner_file(tracked).write_bytes(b"")


def owner_file_damaged(tracked: BackedUpDisk) -> None:
    _overwrite(_owner_file(tracked), 4096, b"rot")


def small_files_missing(tracked: BackedUpDisk) -> None:
    tracked.store.close()
    for name in ("users", "newest", "README", ".nobackup", "lmdb/lock.mdb"):
        Path(tracked.store.path, name).unlink()


def small_files_garbage(tracked: BackedUpDisk) -> None:
    tracked.store.close()
    for name in ("users", "newest", "README", ".nobackup", "lmdb/lock.mdb"):
        Path(tracked.store.path, name).write_bytes(b"rot" * 9999)


def folders_missing(tracked: BackedUpDisk) -> None:
    for name in ("owners", "control", "syncs", "holds"):
        shutil.rmtree(os.path.join(tracked.store.path, name))


def strangers_may_write(tracked: BackedUpDisk) -> None:
    os.chmod(tracked.store.path, 0o777)


def leftovers(tracked: BackedUpDisk) -> None:
    for name in (
        f"owners/{uuid4()}",
        f"control/{uuid4()}",
        "owners/x.0123456789abcdef.partial",
        f"syncs/{uuid4()}-0123456789abcdef.json",
        f"holds/{uuid4()}-{uuid4()}.json",
        "README.0123456789abcdef.partial",
    ):
        Path(tracked.store.path, name).touch()
    for name in ("lmdb.new-0123", "lmdb.damaged-20250101T000000Z"):
        Path(tracked.store.path, name).mkdir()
    Path(tracked.backup_folder().path_of("000009-full.qcow2.0123456789abcdef.partial")).touch()


# --- the store's file ---


def record_damaged(tracked: BackedUpDisk) -> None:
    key = schema.region_key(_recording(tracked), 0)
    tracked.store.update(lambda writer: writer._put("regions", key, b"rot"))


def record_lost(tracked: BackedUpDisk) -> None:
    _lose(tracked, "regions", schema.region_key(_recording(tracked), 0))


def description_lost(tracked: BackedUpDisk) -> None:
    _lose(tracked, "disks", tracked.disk().uuid.bytes)


def newest_meta_page_damaged(tracked: BackedUpDisk) -> None:
    """It says that it is older than it is: LMDB takes the other one."""
    tracked.store.close()
    content = _data(tracked).read_bytes()
    numbers = [int.from_bytes(content[at : at + 8], "little") for at in (_TXNID_AT, PAGE_BYTES + _TXNID_AT)]
    newest = numbers.index(max(numbers))
    _overwrite(_data(tracked), newest * PAGE_BYTES + _TXNID_AT, (1).to_bytes(8, "little"))


def file_garbage(tracked: BackedUpDisk) -> None:
    tracked.store.close()
    _data(tracked).write_bytes(b"rot" * 9999)


def file_empty(tracked: BackedUpDisk) -> None:
    tracked.store.close()
    _data(tracked).write_bytes(b"")


def file_cut(tracked: BackedUpDisk) -> None:
    tracked.store.close()
    os.truncate(_data(tracked), 5 * PAGE_BYTES)


def environment_gone(tracked: BackedUpDisk) -> None:
    tracked.store.close()
    shutil.rmtree(os.path.join(tracked.store.path, "lmdb"))


# --- the repository ---


def manifest_damaged(tracked: BackedUpDisk) -> None:
    Path(tracked.backup_folder().path_of("manifest.json")).write_bytes(b"{}")


def manifest_missing(tracked: BackedUpDisk) -> None:
    Path(tracked.backup_folder().path_of("manifest.json")).unlink()


def note_damaged(tracked: BackedUpDisk) -> None:
    Path(tracked.backup_folder().path_of("unfinished")).write_bytes(b"\xff\n")


def backed_up_image_missing(tracked: BackedUpDisk) -> None:
    Path(tracked.backup_folder().path_of("000001-full.qcow2")).unlink()


def backed_up_image_cut(tracked: BackedUpDisk) -> None:
    os.truncate(tracked.backup_folder().path_of("000001-full.qcow2"), 100)


def backup_died(tracked: BackedUpDisk) -> None:
    """After its checkpoint, and with its image in place."""
    name, disk = Maker.BACKUP.new_name(1), tracked.disk()
    tracked.backup_folder().note_unfinished([Unfinished(name, "000002-incremental.qcow2")])
    tracked.store.update(lambda writer: chain.add_checkpoint(writer, disk, name, 1))
    Path(tracked.backup_folder().path_of("000002-incremental.qcow2")).write_bytes(b"half")


def repository_gone(tracked: BackedUpDisk) -> None:
    shutil.rmtree(tracked.folder / "backups")


def repository_is_of_another_disk(tracked: BackedUpDisk) -> None:
    """The disk was removed and added again, under the same name."""
    session.remove(tracked.store, NAME)
    session.add(tracked.store, NAME, str(tracked.image), granularity_bits=tracked.granularity_bits)


# --- what goes on ---


@contextlib.contextmanager
def attached_elsewhere(tracked: BackedUpDisk) -> Iterator[None]:
    with tracked.attach() as disk:
        disk.pwrite(b"served", 21 * BLOCK)
        yield
    tracked.store.close()


@contextlib.contextmanager
def read_by_somebody_slow(tracked: BackedUpDisk) -> Iterator[None]:
    tracked.store.close()
    with Store.open(tracked.store.path) as theirs, theirs.read() as reader:
        for _ in range(1001):
            theirs.update(lambda writer: writer.new_bitmap_id())
        yield
        assert reader.transaction > 0


_MADE_ANEW = "the store was damaged and was made anew"
STATES: dict[str, State] = {
    "nothing": State(lasting(nothing)),
    "owner died": State(lasting(owner_died), 0, "its owner died", "reads a little more"),
    "owner died, its beat is lost": State(
        lasting(owner_died_and_its_beat_is_lost), 3, "sign of life cannot be read", "`lmdbitmap adopt sda`"
    ),
    "owner died, image written": State(
        lasting(owner_died_and_the_image_was_written),
        3,
        "after its owner's last sign of life",
        "`lmdbitmap adopt sda`",
    ),
    "owner died, deferred": State(
        lasting(owner_died), 3, "in deferred mode", "make a full backup", durability=schema.DEFERRED
    ),
    "shrinking died": State(lasting(shrinking_died), 0, "its owner died", "reads a little more"),
    "distrust declared": State(lasting(distrust_declared), 3, "the store was full", "make a full backup"),
    "image written": State(
        lasting(image_written), 3, "written while it was not tracked", "`lmdbitmap adopt sda`"
    ),
    "image replaced": State(lasting(image_replaced), 3, "another file", "`lmdbitmap adopt sda`"),
    "image grown": State(lasting(image_grown), 3, "size went from", "`lmdbitmap adopt sda`"),
    "image shrunk": State(lasting(image_shrunk), 3, "size went from", "`lmdbitmap adopt sda`"),
    "image missing": State(
        lasting(image_missing),
        3,
        "does not exist",
        "`lmdbitmap relocate sda IMAGE`",
        why_no_backup="does not exist any more",
    ),
    "image is a folder": State(
        lasting(image_is_a_folder), 3, "neither a regular file", "", why_no_backup="neither a regular file"
    ),
    "store put back": State(
        lasting(store_put_back), 3, "written while it was not tracked", "`lmdbitmap adopt sda`"
    ),
    "environment put back": State(
        lasting(environment_put_back), 3, "newest changes were lost", "full backup"
    ),
    "owners' files put back": State(lasting(owners_put_back)),
    "owner's file missing": State(lasting(owner_file_missing), 3, "owner's file", "make a full backup"),
    "owner's file empty": State(lasting(owner_file_empty), 3, "owner's file", "make a full backup"),
    "owner's file damaged": State(lasting(owner_file_damaged), 3, "owner's file", "make a full backup"),
    "small files missing": State(lasting(small_files_missing)),
    "small files garbage": State(lasting(small_files_garbage)),
    "folders missing": State(lasting(folders_missing), 3, "owner's file", "make a full backup"),
    "strangers may write": State(lasting(strangers_may_write), 0, "other users may write", "chmod go-w"),
    "leftovers": State(lasting(leftovers), 0, "nothing needs it", "remove it"),
    "record damaged": State(lasting(record_damaged), 1, "region records are damaged", "make a full backup"),
    "record lost": State(lasting(record_lost), 1, "lost some of them", "make a full backup"),
    "description lost": State(lasting(description_lost), 3, _MADE_ANEW, "make a full backup"),
    "newest meta page damaged": State(
        lasting(newest_meta_page_damaged), 3, "newest changes were lost", "full backup"
    ),
    "file garbage": State(lasting(file_garbage), 3, _MADE_ANEW, "make a full backup"),
    "file empty": State(lasting(file_empty), 3, _MADE_ANEW, "make a full backup"),
    "file cut": State(lasting(file_cut), 3, _MADE_ANEW, "make a full backup"),
    "environment gone": State(lasting(environment_gone), 3, _MADE_ANEW, "make a full backup"),
    "manifest damaged": State(lasting(manifest_damaged), why_no_increment="`backup --full`"),
    "manifest missing": State(lasting(manifest_missing), why_no_increment="`backup --full`"),
    "note damaged": State(lasting(note_damaged)),
    "image of a backup missing": State(lasting(backed_up_image_missing)),
    "image of a backup cut": State(lasting(backed_up_image_cut)),
    "backup died": State(lasting(backup_died)),
    "repository gone": State(lasting(repository_gone), why_no_backup="say --new-repository"),
    "repository of another disk": State(
        lasting(repository_is_of_another_disk), why_no_backup="say --take-over"
    ),
    "attached elsewhere": State(
        attached_elsewhere, why_no_backup="owned by a process that does not serve it"
    ),
    "read by somebody slow": State(read_by_somebody_slow, 0, "transactions ago", "or end it"),
}
"""By their names in docs/store.md."""
