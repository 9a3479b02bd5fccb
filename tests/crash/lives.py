"""What dying.py's children live through: one generator for each thing that can die.

A life is given a fresh disk and does what it must until it yields `GROWN_UP`; from there on every step may be its
last. A word that it yields later was acknowledged: it tells the world that something is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import timezone
from pathlib import Path
from typing import NoReturn, TypeAlias

from lmdbitmap import export
from lmdbitmap.backups.backup import backup
from lmdbitmap.backups.consumers import drop_hold
from lmdbitmap.backups.result import BackupsFailed
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.flat_file import bitmap_file
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import Buffer
from lmdbitmap.notes import sync_note
from lmdbitmap.notes.holds import hold_files
from lmdbitmap.qcow2 import Kind, Qcow2Reader
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.transfer import copy_backups
from lmdbitmap.restoring.restore import restore
from lmdbitmap.store import Store
from lmdbitmap.streams.restore import apply_stream
from lmdbitmap.streams.stream import stream_backup
from lmdbitmap.syncs.sync import sync
from lmdbitmap.system.marks import put_new_mark
from lmdbitmap.tracker import session, standalone
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.standalone import Operation
from tests.helpers import naive_flat
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, BackedUpDisk
from tests.helpers.support import make_raw_image, no_ascii
from tests.helpers.tracked import NAME, TrackedDisk

GRANULARITY_BITS = 9
BLOCK = 1 << GRANULARITY_BITS
BLOCKS = 5000
SHRUNK_BLOCKS = 1000
SIZE = BLOCKS * BLOCK
FEW_BLOCKS = 400
"""Of a disk that is read and written as a whole."""
BEFORE = b"\x11" * BLOCK
"""What every block holds at the checkpoint `start`."""
OTHER = "sdb"
IMAGES = {NAME: "disk.raw", OTHER: "other.raw"}
MOVED = "moved.raw"
MAX_ARMED = 3
EXTENT_BLOCKS = 64
CLUSTER = 4096
"""The least that a backup copies of this disk."""

ROT = b"rotten" * 9999
"""What is left of the store's file in some lives."""

GROWN_UP = "grown up"
Life: TypeAlias = Iterator[str]


def prepare(folder: Path, durability: str, blocks: int = BLOCKS) -> BackedUpDisk:
    """A disk with known content and a checkpoint `start`, nothing dirty, nobody attached."""
    folder.mkdir()
    tracked = BackedUpDisk(folder, blocks * BLOCK, GRANULARITY_BITS, durability)
    _start(tracked, NAME, tracked.image)
    return tracked


def with_another(tracked: BackedUpDisk) -> None:
    """A second disk in the same store, in the same state."""
    image = make_raw_image(tracked.folder / IMAGES[OTHER], tracked.size)
    session.add(
        tracked.store, OTHER, str(image), granularity_bits=GRANULARITY_BITS, durability=tracked.durability
    )
    _start(tracked, OTHER, image)


def _start(tracked: TrackedDisk, name: str, image: Path) -> None:
    image.write_bytes(BEFORE * (tracked.size // BLOCK))
    session.adopt(tracked.store, name)
    with Filter.attach(tracked.store, name, background=False) as disk:
        disk.checkpoint("start")


# --- a disk and its chain ---


def adding(tracked: BackedUpDisk) -> Life:
    """A disk of a store that is there, and one that makes its store first."""
    images = [make_raw_image(tracked.folder / f"{name}.raw", SIZE) for name in ("third", "first")]
    yield GROWN_UP
    session.add(tracked.store, "third", str(images[0]), granularity_bits=GRANULARITY_BITS)
    yield "third"
    store = Store.create(str(tracked.folder / "new store"))
    session.add(store, "first", str(images[1]), granularity_bits=GRANULARITY_BITS)
    yield "first"


def attaching(tracked: BackedUpDisk) -> Life:
    tracked.write(b"new", 5 * BLOCK)
    yield GROWN_UP
    disk = tracked.attach()
    yield "attached"
    disk.abandon()


def arming(tracked: BackedUpDisk) -> Life:
    disk = tracked.attach()
    yield GROWN_UP
    disk.pwrite(b"new", 300 * BLOCK)
    yield "written"
    disk.abandon()


def attach_and_write(tracked: TrackedDisk) -> Filter:
    """Scattered, sequential and large writes, zeroes and a discard, with few extents armed at a time."""
    disk = tracked.attach(max_armed=MAX_ARMED)
    for block in (5, 6, 7, 300, 4500, 900, 4999):
        disk.pwrite(b"new", block * BLOCK + 50)
    assert disk.lane().write_many([(n * 97 * BLOCK, memoryview(b"many")) for n in range(8)]) == {}
    disk.pwrite(b"large" * BLOCK * 30, 2000 * BLOCK - 3)
    disk.write_zeroes(3000 * BLOCK, 2 * BLOCK)
    disk.discard(3100 * BLOCK, 100 * BLOCK)
    return disk


def writing(tracked: BackedUpDisk) -> Life:
    yield GROWN_UP
    attach_and_write(tracked).abandon()


def passing(tracked: BackedUpDisk) -> Life:
    disk = attach_and_write(tracked)
    yield GROWN_UP
    disk.background_pass()
    disk.pwrite(b"between", 8 * BLOCK)
    disk.background_pass()
    disk.beat()
    disk.background_pass()
    disk.pwrite(b"later", 9 * BLOCK)
    disk.abandon()


def asking(tracked: BackedUpDisk) -> Life:
    disk = attach_and_write(tracked)
    yield GROWN_UP
    disk.changes(since="start")
    disk.pwrite(b"later", 10 * BLOCK)
    disk.abandon()


def marking(tracked: BackedUpDisk) -> Life:
    yield GROWN_UP
    disk = tracked.attach()
    for block in (1, 70, 4999):
        disk.mark(block * BLOCK, 1)
        yield str(block)
    disk.detach()
    yield "detached"


def checkpointing(tracked: BackedUpDisk) -> Life:
    """What was written is quiet, so that it is written in a commit of its own before the gate closes."""
    disk = attach_and_write(tracked)
    disk.background_pass()
    yield GROWN_UP
    disk.checkpoint("both")
    yield "both"
    disk.pwrite(b"later", 10 * BLOCK)
    disk.pwrite(b"later", 2000 * BLOCK)
    disk.abandon()


def checkpointing_two(tracked: BackedUpDisk) -> Life:
    with_another(tracked)
    disk, other = attach_and_write(tracked), Filter.attach(tracked.store, OTHER, background=False)
    other.pwrite(b"new", 0)
    yield GROWN_UP
    take_checkpoint([disk, other], "both")
    yield "both"
    disk.pwrite(b"later", 10 * BLOCK)
    other.pwrite(b"later", BLOCK)
    for one in (disk, other):
        one.abandon()


def holding(tracked: BackedUpDisk) -> Life:
    """A snapshot, taken and released, while the disk is written."""
    disk, scratch = attach_and_write(tracked), scratch_of(tracked.folder)
    yield GROWN_UP
    snapshot = disk.snapshot("held", scratch)
    yield "held"
    disk.pwrite(b"over old data", 5 * BLOCK)
    disk.pwrite(b"over what was zeroed" * BLOCK, 3000 * BLOCK)
    snapshot.release()
    yield "released"
    disk.pwrite(b"later", 5 * BLOCK)
    disk.abandon()


def forgetting(tracked: BackedUpDisk) -> Life:
    """One in the middle, the newest, and the first."""
    disk = attach_and_write(tracked)
    for number, name in enumerate(("monday", "tuesday", "wednesday")):
        disk.checkpoint(name)
        disk.pwrite(b"more", (20 + number) * BLOCK)
    yield GROWN_UP
    disk.forget("tuesday")
    yield "tuesday"
    disk.forget("wednesday")
    yield "wednesday"
    disk.pwrite(b"more", 30 * BLOCK)
    disk.forget("epoch-1")
    yield "epoch-1"
    disk.abandon()


def growing(tracked: BackedUpDisk) -> Life:
    disk = attach_and_write(tracked)
    yield GROWN_UP
    disk.resize(6000 * BLOCK + 1)
    yield str(6000 * BLOCK + 1)
    disk.pwrite(b"x", 6000 * BLOCK)
    disk.abandon()


def shrinking(tracked: BackedUpDisk) -> Life:
    disk = attach_and_write(tracked)
    yield GROWN_UP
    disk.resize(SHRUNK_BLOCKS * BLOCK + 1)
    yield str(SHRUNK_BLOCKS * BLOCK + 1)
    disk.pwrite(b"x", SHRUNK_BLOCKS * BLOCK)
    disk.abandon()


def detaching(tracked: BackedUpDisk) -> Life:
    disk = attach_and_write(tracked)
    yield GROWN_UP
    disk.detach()
    yield "detached"


def adopting(tracked: BackedUpDisk) -> Life:
    """The owner died; then the image was touched and made longer by somebody who tells us so."""
    attach_and_write(tracked).abandon()
    os.truncate(tracked.image, SIZE + 100 * BLOCK)
    tracked.write_behind_our_back(b"", 0)
    yield GROWN_UP
    session.adopt(tracked.store, NAME)
    yield "adopted"


def living_twice(tracked: BackedUpDisk) -> Life:
    """Attached again after a death, so that extents of a dead owner are armed in the store."""
    attach_and_write(tracked).abandon()
    yield GROWN_UP
    disk = tracked.attach(max_armed=MAX_ARMED - 1)
    for block in (5, 8, 301, 302, 4000):
        disk.pwrite(b"second life", block * BLOCK)
    disk.background_pass()
    disk.background_pass()
    disk.detach()


def removing(tracked: BackedUpDisk) -> Life:
    tracked.write(b"new", 5 * BLOCK)
    yield GROWN_UP
    session.remove(tracked.store, NAME)
    yield "removed"


def relocating(tracked: BackedUpDisk) -> Life:
    tracked.write(b"new", 5 * BLOCK)
    os.rename(tracked.image, tracked.folder / MOVED)
    yield GROWN_UP
    session.relocate(tracked.store, NAME, str(tracked.folder / MOVED))
    yield "relocated"


def healing(tracked: BackedUpDisk) -> Life:
    """The store's file is garbage; whoever opens it makes it anew."""
    tracked.write(b"new", 5 * BLOCK)
    tracked.store.close()
    Path(tracked.store.path, "lmdb", "data.mdb").write_bytes(ROT)
    yield GROWN_UP
    tracked.store = Store.open(tracked.store.path)
    yield "healed"


# --- flat files ---

OLD, NEW = {1, 4999}, {2, 4998}


def _write_blocks(tracked: BackedUpDisk, blocks: set[int]) -> None:
    with tracked.attach() as disk:
        for block in blocks:
            disk.pwrite(b"x", block * BLOCK)


def exporting_anew(tracked: BackedUpDisk) -> Life:
    _write_blocks(tracked, NEW)
    yield GROWN_UP
    export.export_changes(tracked.changes(), tracked.folder / "x.dbm")
    yield "exported"


def exporting(tracked: BackedUpDisk) -> Life:
    """Over a file that is there."""
    (tracked.folder / "x.dbm").write_bytes(naive_flat.write(OLD, SIZE, GRANULARITY_BITS))
    yield from exporting_anew(tracked)


def importing(tracked: BackedUpDisk) -> Life:
    path = tracked.folder / "x.dbm"
    path.write_bytes(naive_flat.write(NEW, SIZE, GRANULARITY_BITS))
    yield GROWN_UP
    export.import_file(tracked.store, path, "copy", into=NAME)
    yield "imported"


def combining(tracked: BackedUpDisk) -> Life:
    """In place, and under a name of its own."""
    for name, blocks in (("old", OLD), ("new", NEW)):
        path = tracked.folder / f"{name}.dbm"
        path.write_bytes(naive_flat.write(blocks, SIZE, GRANULARITY_BITS))
        export.import_file(tracked.store, path, name)
    yield GROWN_UP
    standalone.combine(tracked.store, "old", Operation.XOR, ["new"])
    yield "combined"
    standalone.combine(tracked.store, "old", Operation.AND, ["new"], into="both")
    yield "kept"


def serving_beside_a_file(tracked: BackedUpDisk) -> Life:
    """`serve --bitmap-file`, from its beginning to its end; the file knows more than the open period does."""
    path = tracked.folder / "x.dbm"
    _write_blocks(tracked, OLD)
    export.export_changes(tracked.changes(), path)
    tracked.clean("later")
    yield GROWN_UP
    disk = tracked.attach()
    bitmap_file.begin(disk, path)
    yield "began"
    disk.pwrite(b"x", 7 * BLOCK)
    yield "written"
    disk.detach()
    yield "detached"


# --- archives ---


def _repository(tracked: BackedUpDisk) -> str:
    return str(tracked.folder / "backups")


def _backed_up(tracked: BackedUpDisk, times: int, kinds: Sequence[BackupType] = ()) -> None:
    """A full backup and increments, each beside a copy of what the disk held then; and a block that is in none."""
    for number in range(1, times + 1):
        tracked.write(b"backed up %d" % number, number * 80 * BLOCK % tracked.size)
        tracked.backup(kinds[number - 1] if kinds else INCREMENTAL)
        shutil.copy(tracked.image, tracked.folder / f"{number}.raw")
    tracked.write(b"not backed up", 0)


def backing_up_first(tracked: BackedUpDisk) -> Life:
    """The repository is made too."""
    yield GROWN_UP
    backup(tracked.store, [NAME], _repository(tracked))
    yield "1"


def backing_up(tracked: BackedUpDisk) -> Life:
    _backed_up(tracked, 2)
    yield GROWN_UP
    backup(tracked.store, [NAME], _repository(tracked), kind=INCREMENTAL)
    yield "3"


def backing_up_compressed(tracked: BackedUpDisk) -> Life:
    """Other threads have a part in the image."""
    _backed_up(tracked, 2)
    yield GROWN_UP
    backup(tracked.store, [NAME], _repository(tracked), kind=INCREMENTAL, compression="zlib")
    yield "3"


def backing_up_full(tracked: BackedUpDisk) -> Life:
    """After it, the checkpoints of both earlier backups go."""
    _backed_up(tracked, 2)
    yield GROWN_UP
    backup(tracked.store, [NAME], _repository(tracked), kind=FULL)
    yield "3"


def backing_up_onto_rot(tracked: BackedUpDisk) -> Life:
    """What was to be a rescan becomes a full one when it comes to data of the backup before that cannot be read."""
    tracked.write(b"backed up 1" * 500, 80 * BLOCK)
    image = tracked.backup_folder().path_of(tracked.backup(compression="zlib").file)
    with FileDevice.open(image) as device:
        runs = Qcow2Reader(device).extents(0, tracked.size)
        device.pwrite(b"\xff" * 64, next(run for run in runs if run.kind is Kind.COMPRESSED).host_offset)
    tracked.write_behind_our_back(b"stranger", 0)
    yield GROWN_UP
    backup(tracked.store, [NAME], _repository(tracked))
    yield "2"


def backing_up_two(tracked: BackedUpDisk) -> Life:
    """The one for the second time, the other for the first."""
    _backed_up(tracked, 1)
    with_another(tracked)
    yield GROWN_UP
    backup(tracked.store, [NAME, OTHER], _repository(tracked))
    yield "both"


def backing_up_beside_a_failure(tracked: BackedUpDisk) -> Life:
    """Of two disks the first one's image cannot be read when it comes to that."""
    _backed_up(tracked, 1)
    with_another(tracked)

    class Unreadable(FileDevice):
        def pread_into(self, buffer: memoryview, offset: int) -> None:
            if os.path.basename(self.path) == IMAGES[NAME]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().pread_into(buffer, offset)

    yield GROWN_UP
    try:
        backup(
            tracked.store, [NAME, OTHER], _repository(tracked),
            open_device=lambda image: Unreadable.open(image, read_only=True),
        )  # fmt: skip
    except BackupsFailed as failed:
        yield " ".join(result.disk for result in failed.results)


def scratch_of(folder: Path) -> Scratch:
    """Where lives keep old data."""
    (folder / "scratch").mkdir(exist_ok=True)
    return Scratch(str(folder / "scratch"))


def backing_up_attached(tracked: BackedUpDisk) -> Life:
    """Of a disk whose guest writes on: over what is to be copied, beside it, and over what was copied."""
    _backed_up(tracked, 2)
    disk, scratch = tracked.attach(max_armed=MAX_ARMED), scratch_of(tracked.folder)

    @contextlib.contextmanager
    def moment() -> Iterator[None]:
        shutil.copy(tracked.image, tracked.folder / "3.raw")
        yield
        disk.pwrite(b"during the backup", 0)
        disk.write_zeroes(80 * BLOCK, 8 * BLOCK)

    def write_on(done: int, total: int) -> None:
        disk.pwrite(b"copied already", 0)
        disk.pwrite(b"not in this one", 300 * BLOCK)

    yield GROWN_UP
    backup(
        tracked.store, [NAME], _repository(tracked),
        attached={NAME: disk}, scratch=scratch, quiesced=moment, progress=write_on,
    )  # fmt: skip
    yield "3"
    disk.abandon()


def letting_lapse(tracked: BackedUpDisk) -> Life:
    """A backup to another repository, long after anybody used the one with two backups."""
    _backed_up(tracked, 2)
    for file in hold_files(tracked.store.path, tracked.disk().uuid):
        assert file.hold is not None
        file.replace(dataclasses.replace(file.hold, used_ns=0))
    yield GROWN_UP
    backup(tracked.store, [NAME], tracked.folder / "elsewhere")
    yield "backed up"


def dropping(tracked: BackedUpDisk) -> Life:
    """By hand, what a repository with two backups holds."""
    _backed_up(tracked, 2)
    yield GROWN_UP
    drop_hold(tracked.store, NAME, _repository(tracked))
    yield "dropped"


def taking_over(tracked: BackedUpDisk) -> Life:
    """A repository of two backups, after the disk was added anew: nothing in the store is as old as they are."""
    _backed_up(tracked, 2)
    session.remove(tracked.store, NAME)
    session.add(tracked.store, NAME, str(tracked.image), granularity_bits=GRANULARITY_BITS)
    yield GROWN_UP
    backup(tracked.store, [NAME], _repository(tracked), take_over=True)
    yield "3"


def pruning(tracked: BackedUpDisk) -> Life:
    """Of four backups two stay: the third becomes full."""
    _backed_up(tracked, 4)
    yield GROWN_UP
    prune(_repository(tracked), keep=Retention(last=2))
    yield "3 4"


def thinning(tracked: BackedUpDisk) -> Life:
    """Of two chains the newest backup of each of three days stays: one becomes full and another is moved onto it
    in the same step, the third becomes full by itself; where the kernel will not copy from file to file.

        1 full ─ 2         1 ─ 3 differential         4 full ─ 5
    """
    _backed_up(tracked, 5, (FULL, INCREMENTAL, DIFFERENTIAL, FULL, INCREMENTAL))
    _dated(tracked, (1, 1, 2, 3, 3))
    _refuse_to_copy()
    yield GROWN_UP
    prune(_repository(tracked), keep=Retention(daily=3), zone=timezone.utc)
    yield "2 3 5"


def merging(tracked: BackedUpDisk) -> Life:
    """The one in the middle of three goes, and the full one stays."""
    _backed_up(tracked, 3)
    _dated(tracked, (1, 2, 2))
    yield GROWN_UP
    prune(_repository(tracked), keep=Retention(daily=2), zone=timezone.utc)
    yield "1 3"


def copying(tracked: BackedUpDisk) -> Life:
    """To a folder that has the first of three backups."""
    _backed_up(tracked, 1)
    copy_backups(_repository(tracked), tracked.folder / "copy")
    tracked.write(b"later", 50 * BLOCK)
    tracked.backup()
    tracked.backup()
    yield GROWN_UP
    copy_backups(_repository(tracked), tracked.folder / "copy")
    yield "copied"


def copying_first(tracked: BackedUpDisk) -> Life:
    """To a folder that is not there."""
    _backed_up(tracked, 2)
    yield GROWN_UP
    copy_backups(_repository(tracked), tracked.folder / "copy")
    yield "copied"


def copying_what_was_pruned(tracked: BackedUpDisk) -> Life:
    """To a folder that has the first three of five backups, of which the source has let go of the first two."""
    _backed_up(tracked, 3)
    copy_backups(_repository(tracked), tracked.folder / "copy")
    for number in (4, 5):
        tracked.write(bytes([number]) * 100, 50 * BLOCK)
        shutil.copy(tracked.image, tracked.folder / f"{number}.raw")
        tracked.backup()
    prune(_repository(tracked), keep=Retention(last=3))
    yield GROWN_UP
    copy_backups(_repository(tracked), tracked.folder / "copy")
    yield "copied"


def _dated(tracked: BackedUpDisk, days: Sequence[int]) -> None:
    """Let the manifest say on which day of 1970 each backup was made."""
    entries = zip(tracked.manifest().backups, days, strict=True)
    dated = tuple(dataclasses.replace(entry, time_ns=day * 86_400 * 10**9) for entry, day in entries)
    tracked.backup_folder().replace_manifest(dataclasses.replace(tracked.manifest(), backups=dated))


def restoring(tracked: BackedUpDisk) -> Life:
    _backed_up(tracked, 2)
    yield GROWN_UP
    restore(_repository(tracked), NAME, tracked.folder / "out.raw")
    yield "restored"


def restoring_by_hand(tracked: BackedUpDisk) -> Life:
    """Where the kernel will not copy from file to file, onto an empty file that is there."""
    _refuse_to_copy()
    (tracked.folder / "out.raw").touch()
    yield from restoring(tracked)


def _refuse_to_copy() -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EXDEV, "another file system")

    os.copy_file_range = refuse  # type: ignore[assignment]


def restoring_to_a_device(tracked: BackedUpDisk) -> Life:
    """Onto the block device that is called `device` beside all the graves."""
    _backed_up(tracked, 2)
    yield GROWN_UP
    restore(_repository(tracked), NAME, tracked.folder.parent / "device")
    yield "restored"


def restoring_in_place(tracked: BackedUpDisk) -> Life:
    """A copy of the disk that nobody tracks, written all over since, also where it was zero."""
    tracked.zero(200 * BLOCK, 64 * BLOCK)
    _backed_up(tracked, 2)
    content = bytearray(tracked.content())
    for block in (10, 100, 150, 210, 240, 390):
        content[block * BLOCK : (block + 1) * BLOCK] = b"?" * BLOCK
    (tracked.folder / "copy.raw").write_bytes(content)
    yield GROWN_UP
    restore(_repository(tracked), NAME, tracked.folder / "copy.raw", in_place=True)
    yield "restored"


def restoring_what_is_tracked(tracked: BackedUpDisk) -> Life:
    """Back to the first of two backups, through the tracker."""
    tracked.zero(200 * BLOCK, 64 * BLOCK)
    _backed_up(tracked, 2)
    for block in (10, 150, 210, 240, 390):
        tracked.write(b"?" * BLOCK, block * BLOCK)
    yield GROWN_UP
    restore(_repository(tracked), NAME, tracked.image, at="1", in_place=True, store=tracked.store)
    yield "restored"


# --- streams ---


class _Stream:
    """A pipe that remembers: what was written when its writer died. Writing to it is a step."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        self._length = 0

    def write(self, data: Buffer, /) -> int:
        os.pwrite(self._fd, data, self._length)
        self._length += len(data)
        return len(data)


def streaming(tracked: BackedUpDisk) -> Life:
    """What changed since `start`, in several records; `start.raw` is what the receiver has."""
    _written_since_start(tracked)
    yield GROWN_UP
    stream_backup(
        tracked.store, NAME, _Stream(tracked.folder / "out.diff"), since="start", checkpoint="streamed"
    )
    yield "streamed"


def streaming_without_a_name(tracked: BackedUpDisk) -> Life:
    """Of its checkpoint, which gets a name that nothing else has; in records that are written as they come."""
    _written_since_start(tracked)
    tracked.write(no_ascii(tracked.size), 0)
    yield GROWN_UP
    stream_backup(tracked.store, NAME, _Stream(tracked.folder / "out.diff"), since="start")
    yield "streamed"


def receiving(tracked: BackedUpDisk) -> Life:
    """A full stream, into a new file."""
    yield from _receiving(tracked, since=None)


def receiving_a_diff(tracked: BackedUpDisk) -> Life:
    """In place: `out.raw` is what the disk held at `start`, and gets another size too."""
    yield from _receiving(tracked, since="start")


def _receiving(tracked: BackedUpDisk, since: str | None) -> Life:
    _written_since_start(tracked)
    if since is not None:
        shutil.copy(tracked.folder / "start.raw", tracked.folder / "out.raw")
        tracked.resize(tracked.size + 5 * BLOCK)
    path = tracked.folder / "in.diff"
    stream_backup(tracked.store, NAME, _Stream(path), since=since)
    yield GROWN_UP
    with path.open("rb", buffering=0) as stream:
        apply_stream(stream, tracked.folder / "out.raw")
    yield "received"


def syncing_first(tracked: BackedUpDisk) -> Life:
    """To a file that is not there yet."""
    tracked.zero(200 * BLOCK, 64 * BLOCK)
    yield GROWN_UP
    sync(tracked.store, NAME, tracked.folder / "copy.raw")
    yield "synced"


def syncing(tracked: BackedUpDisk) -> Life:
    """What changed since the sync before, in several places; the disk has grown, too."""
    sync(tracked.store, NAME, tracked.folder / "copy.raw")
    tracked.resize(tracked.size + 10 * BLOCK)
    _written_since_start(tracked)
    yield GROWN_UP
    sync(tracked.store, NAME, tracked.folder / "copy.raw")
    yield "synced"


def comparing(tracked: BackedUpDisk) -> Life:
    """A copy that somebody else has written, and that has to be compared."""
    copy = tracked.folder / "copy.raw"
    sync(tracked.store, NAME, copy)
    _written_since_start(tracked)
    with copy.open("r+b") as file:
        for block in (60, 250, 390):
            file.seek(block * BLOCK)
            file.write(b"?" * BLOCK)
    yield GROWN_UP
    sync(tracked.store, NAME, copy)
    yield "synced"


def restoring_onto_a_copy(tracked: BackedUpDisk) -> Life:
    """Back to the first of two backups. A sync to the copy was killed, so that nothing shows who has written it."""
    copy = tracked.folder / "copy.raw"
    _backed_up(tracked, 2)
    sync(tracked.store, NAME, copy)
    [(path, note)] = sync_note.notes(tracked.store.path)
    with copy.open("r+b") as file:
        mark = put_new_mark(file.fileno())
    sync_note.NoteFile(path, note).replace(dataclasses.replace(note, under_way=True, mark=mark))
    yield GROWN_UP
    restore(_repository(tracked), NAME, copy, at="1", in_place=True, store=tracked.store)
    yield "restored"


def _written_since_start(tracked: BackedUpDisk) -> None:
    shutil.copy(tracked.image, tracked.folder / "start.raw")
    for block in (0, 80, 160):
        tracked.write(no_ascii(CLUSTER * 5), block * BLOCK)
    tracked.zero(240 * BLOCK, 40 * BLOCK)


ARCHIVE_LIVES = (
    backing_up_first, backing_up, backing_up_compressed, backing_up_full, backing_up_onto_rot, backing_up_two,
    backing_up_beside_a_failure, backing_up_attached,
    letting_lapse, dropping, taking_over,
    restoring, restoring_by_hand, restoring_to_a_device, restoring_in_place, restoring_what_is_tracked,
    streaming, streaming_without_a_name, receiving, receiving_a_diff, syncing_first, syncing, comparing,
    restoring_onto_a_copy,
    pruning, thinning, merging, copying, copying_first, copying_what_was_pruned,
)  # fmt: skip
LIVES: dict[str, Callable[[BackedUpDisk], Life]] = {
    life.__name__: life
    for life in (
        adding, attaching, arming, writing, passing, asking, marking, checkpointing, checkpointing_two, holding,
        forgetting, growing, shrinking, detaching, adopting, living_twice, relocating, removing, healing,
        exporting, exporting_anew, importing, combining, serving_beside_a_file,
        *ARCHIVE_LIVES,
    )
}  # fmt: skip
