"""When a commit fails: `guest-first` lets the guest go on and believes nothing, `strict` refuses the write.

The store's refusals are injected where it hands out transactions; a disk that is really full is in
test_full_disk.py.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.storage import owner, owner_file, schema
from lmdbitmap.store import CommitInDoubt, Store
from lmdbitmap.tracker import continuity, session, vouching
from lmdbitmap.tracker.changes import changes
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, trust_of

BLOCK = 4096
BLOCKS = 300
SIZE = BLOCKS * BLOCK


class SickStore:
    """Makes a store's commits fail while `errno` is set; with ENOMEM as Python does, which is interrupted by that."""

    def __init__(self, store: Store) -> None:
        self.errno: int | None = None
        self.refused = 0
        self._update = store.update
        store.update = self.update  # type: ignore[method-assign]

    def update(self, change: Callable[..., Any]) -> Any:
        if self.errno is not None:
            self.refused += 1
            if self.errno == errno.ENOMEM:
                raise MemoryError
            raise StorageError("store", OSError(self.errno, "injected"), next_step="free some space")
        return self._update(change)


class Patient:
    """A disk whose store falls ill."""

    def __init__(self, folder: Path, policy: str, durability: str = schema.WRITE_AHEAD) -> None:
        self.tracked = TrackedDisk(folder, SIZE, policy=policy, durability=durability).clean()
        self.sick = SickStore(self.tracked.store)
        self.disk = self.tracked.attach()
        self.disk.pwrite(b"before", 0)
        self.owner_path = self.tracked.store.owner_path(self.disk.disk.uuid)

    def close(self) -> None:
        self.sick.errno = None
        self.disk.abandon()
        self.tracked.close()


@pytest.fixture
def guest_first(tmp_path: Path) -> Iterator[Patient]:
    with closing(Patient(tmp_path, schema.GUEST_FIRST)) as patient:
        yield patient


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Patient]:
    with closing(Patient(tmp_path, schema.STRICT)) as patient:
        yield patient


ILLNESSES = [errno.ENOSPC, errno.EIO, errno.EROFS]


# --- guest-first ---


@pytest.mark.parametrize("illness", [*ILLNESSES, errno.ENOMEM])
def test_guest_goes_on_and_nothing_is_believed(guest_first: Patient, illness: int) -> None:
    disk, tracked = guest_first.disk, guest_first.tracked
    guest_first.sick.errno = illness
    disk.pwrite(b"during", 100 * BLOCK)
    assert disk.pread(6, 100 * BLOCK) == b"during"
    assert guest_first.sick.refused == 1
    for answer in (disk.changes(since="start"), tracked.changes("start")):
        assert trust_of(answer) is Trust.UNTRUSTED
        assert blocks_of(answer) == set(range(BLOCKS))
    assert disk.standing().trust is Trust.UNTRUSTED
    with pytest.raises(Untrusted):
        disk.persist()
    disk.write_zeroes(200 * BLOCK, BLOCK)
    disk.discard(201 * BLOCK, BLOCK)
    assert disk.lane().write_many([(202 * BLOCK, memoryview(b"x"))]) == {}
    assert guest_first.sick.refused == 1  # what is lost is lost: the guest need not wait for more refusals


def test_distrust_is_durable_before_the_data_is_written(
    guest_first: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    image, pwrite = guest_first.tracked.image.stat(), os.pwrite

    def watched(fd: int, data: bytes, offset: int) -> int:
        if os.path.samestat(os.fstat(fd), image):
            seen.append(owner_file.distrust(guest_first.owner_path) is not None)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    lane = guest_first.disk.lane()
    lane.pwrite(b"x", 10)
    guest_first.sick.errno = errno.ENOSPC
    lane.pwrite(b"x", 100 * BLOCK)
    assert seen == [False, True]


def test_closed_periods_are_still_believed(guest_first: Patient) -> None:
    disk = guest_first.disk
    disk.checkpoint("monday")
    guest_first.sick.errno = errno.ENOSPC
    disk.pwrite(b"x", 100 * BLOCK)
    answer = disk.changes(since="start", until="monday")
    assert (trust_of(answer), blocks_of(answer)) == (Trust.EXACT, {0})


def test_new_epoch_begins_as_soon_as_the_store_can_be_written(guest_first: Patient) -> None:
    disk, tracked = guest_first.disk, guest_first.tracked
    guest_first.sick.errno = errno.ENOSPC
    disk.pwrite(b"x", 100 * BLOCK)
    with pytest.raises(StorageError):
        disk.background_pass()
    assert tracked.checkpoints() == ["epoch-1", "start"]
    guest_first.sick.errno = None
    disk.background_pass()
    disk.background_pass()
    assert tracked.checkpoints() == ["epoch-1", "start", "epoch-2"]
    assert "tracking failed" in tracked.disk().epoch_reason
    assert owner_file.distrust(guest_first.owner_path) is None
    with pytest.raises(Untrusted):
        disk.changes(since="start")
    assert blocks_of(disk.changes(since="epoch-2")) == set(range(BLOCKS))
    disk.checkpoint("after")
    disk.pwrite(b"x", 7 * BLOCK)
    assert blocks_of(disk.changes(since="after")) == {7}
    assert trust_of(disk.changes(since="after")) is Trust.EXACT


def test_checkpoint_regains_trust_first_or_fails(guest_first: Patient) -> None:
    guest_first.sick.errno = errno.ENOSPC
    guest_first.disk.pwrite(b"x", 100 * BLOCK)
    with pytest.raises(StorageError):
        guest_first.disk.checkpoint("monday")
    guest_first.sick.errno = None
    guest_first.disk.checkpoint("monday")
    assert guest_first.tracked.checkpoints() == ["epoch-1", "start", "epoch-2", "monday"]
    assert blocks_of(guest_first.disk.changes(since="monday")) == set()


@pytest.mark.parametrize("end", ["detached", "dead"])
def test_lost_track_is_not_forgotten_by_detach_or_death(guest_first: Patient, end: str) -> None:
    guest_first.sick.errno = errno.ENOSPC
    guest_first.disk.pwrite(b"x", 100 * BLOCK)
    guest_first.disk.detach() if end == "detached" else guest_first.disk.abandon()
    assert trust_of(guest_first.tracked.changes("start")) is Trust.UNTRUSTED
    guest_first.sick.errno = None
    with guest_first.tracked.attach() as disk:
        with pytest.raises(Untrusted):
            disk.changes(since="start")
        assert blocks_of(disk.changes()) == set(range(BLOCKS))
    assert trust_of(guest_first.tracked.changes("epoch-2")) is not Trust.UNTRUSTED


def test_many_writers_lose_track_once(guest_first: Patient) -> None:
    guest_first.sick.errno = errno.EIO
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait(PATIENCE_SECONDS)
        guest_first.disk.pwrite(b"x", (100 + 20 * number) * BLOCK)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert [guest_first.disk.pread(1, (100 + 20 * number) * BLOCK) for number in range(8)] == [b"x"] * 8
    guest_first.sick.errno = None
    guest_first.disk.background_pass()
    assert guest_first.tracked.checkpoints() == ["epoch-1", "start", "epoch-2"]


def test_failed_pass_loses_nothing(guest_first: Patient) -> None:
    """A pass only makes the store sharper: that it fails is no reason for distrust."""
    disk = guest_first.disk
    disk.background_pass()
    guest_first.sick.errno = errno.ENOSPC
    with pytest.raises(StorageError):
        disk.background_pass()
    disk.pwrite(b"x", 0)
    assert disk.standing().trust is Trust.EXACT
    guest_first.sick.errno = None
    assert blocks_of(disk.changes(since="start")) == {0}


@pytest.mark.parametrize("change", ["checkpoint", "forget", "resize", "detach"])
def test_change_that_the_store_refuses_leaves_everything_as_it_was(guest_first: Patient, change: str) -> None:
    disk, tracked = guest_first.disk, guest_first.tracked
    changes: dict[str, Callable[[], object]] = {
        "checkpoint": lambda: disk.checkpoint("monday"),
        "forget": lambda: disk.forget("start"),
        "resize": lambda: disk.resize(10 * SIZE),
        "detach": disk.detach,
    }
    guest_first.sick.errno = errno.ENOSPC
    with pytest.raises(StorageError):
        changes[change]()
    guest_first.sick.errno = None
    if change == "detach":
        assert 0 in blocks_of(tracked.changes("start"))
        assert trust_of(tracked.changes("start")) is Trust.SUPERSET
        return
    disk.pwrite(b"x", 100 * BLOCK)
    assert (disk.size, disk.device.size) == (SIZE, SIZE)
    assert tracked.checkpoints() == ["epoch-1", "start"]
    assert blocks_of(disk.changes(since="start")) == {0, 100}


def test_deferred_disk_does_not_need_the_store_to_be_written(tmp_path: Path) -> None:
    with closing(Patient(tmp_path, schema.GUEST_FIRST, schema.DEFERRED)) as patient:
        patient.sick.errno = errno.ENOSPC
        patient.disk.pwrite(b"x", 100 * BLOCK)
        with pytest.raises(StorageError):
            patient.disk.changes(since="start")
        patient.sick.errno = None
        assert blocks_of(patient.disk.changes(since="start")) == {0, 100}
        patient.disk.pwrite(b"x", 101 * BLOCK)
        patient.sick.errno = errno.ENOSPC
        with pytest.raises(StorageError):
            patient.disk.detach()
        assert trust_of(patient.tracked.changes("start")) is Trust.UNTRUSTED


# --- when the store cannot say whether it took a commit ---


class DoubtfulStore(SickStore):
    """While `errno` is set its commits take place, and it says that nobody knows."""

    def update(self, change: Callable[..., Any]) -> Any:
        answer = self._update(change)
        if self.errno is not None and answer is not False:  # then it changed nothing, and LMDB wrote nothing
            raise CommitInDoubt("store", OSError(self.errno, "injected"), next_step="see the system's log")
        return answer


@pytest.mark.parametrize("policy", [schema.GUEST_FIRST, schema.STRICT])
@pytest.mark.parametrize("change", ["checkpoint", "forget", "resize", "start_epoch"])
def test_change_that_took_place_though_it_failed_makes_no_block_clean(
    tmp_path: Path, policy: str, change: str
) -> None:
    """Memory goes on with the old bitmap, the store with the new one: a death now must not cost a bit."""
    with closing(TrackedDisk(tmp_path, SIZE, policy=policy).clean()) as tracked:
        disk = tracked.attach()
        disk.checkpoint("monday")
        disk.pwrite(b"before", 0)
        store = DoubtfulStore(tracked.store)
        changes: dict[str, Callable[[], object]] = {
            "checkpoint": lambda: disk.checkpoint("tuesday"),
            "forget": lambda: disk.forget("monday"),
            "resize": lambda: disk.resize(SIZE),
            "start_epoch": lambda: disk.start_epoch("a person said so"),
        }
        store.errno = errno.EIO
        with pytest.raises(CommitInDoubt):
            changes[change]()
        store.errno = None
        disk.pwrite(b"the extent was armed", BLOCK)
        disk.abandon()
        assert trust_of(tracked.changes()) is Trust.UNTRUSTED
        with tracked.attach() as again:
            assert blocks_of(again.changes()) == set(range(BLOCKS))


def test_arming_that_took_place_though_it_failed_costs_no_more_than_a_block(strict: Patient) -> None:
    store = DoubtfulStore(strict.tracked.store)
    store.errno = errno.EIO
    with pytest.raises(StorageError):
        strict.disk.pwrite(b"x", 100 * BLOCK)
    store.errno = None
    strict.disk.pwrite(b"x", 150 * BLOCK)
    answer = strict.disk.changes(since="start")
    assert blocks_of(answer) >= {0, 150}
    assert trust_of(answer) is not Trust.UNTRUSTED


# --- when the image cannot be flushed ---


class Unflushable(FileDevice):
    """An image whose next flush fails, and no other: the kernel tells of lost data once."""

    refusals = 0

    def flush(self) -> None:
        if type(self).refusals:
            type(self).refusals -= 1
            raise OSError(errno.EIO, "injected")
        super().flush()


@pytest.fixture
def unflushable(monkeypatch: pytest.MonkeyPatch) -> type[Unflushable]:
    monkeypatch.setattr(Unflushable, "refusals", 0)
    return Unflushable


def test_backup_of_an_image_that_cannot_be_flushed_is_none_and_the_next_is_full(
    tmp_path: Path, unflushable: type[Unflushable]
) -> None:
    with closing(BackedUpDisk(tmp_path, SIZE)) as disk:
        disk.backup()
        disk.write(b"x", 7 * BLOCK)
        unflushable.refusals = 1
        with pytest.raises(StorageError, match="could not be flushed"):
            backup(disk.store, [NAME], disk.folder / "backups", open_device=Unflushable.open)
        assert trust_of(disk.changes()) is Trust.UNTRUSTED
        entry = disk.backup()
        assert entry.type_actual is BackupType.RESCAN
        assert "could not be flushed" in (entry.reason.words if entry.reason else "")
        assert disk.restored() == disk.content()


def test_detach_of_an_image_that_cannot_be_flushed_is_not_clean(
    tmp_path: Path, unflushable: type[Unflushable]
) -> None:
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked:
        disk = Filter.attach(tracked.store, NAME, open_device=Unflushable.open, background=False)
        disk.pwrite(b"x", 7 * BLOCK)
        unflushable.refusals = 1
        with pytest.raises(StorageError, match="could not be flushed"):
            disk.detach()
        assert tracked.disk().session is not None
        assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED
        with tracked.attach() as again, pytest.raises(Untrusted, match="could not be flushed"):
            again.changes(since="start")


def test_checkpoint_that_can_neither_be_flushed_nor_taken_back_is_believed_on_no_disk(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked:
        image = make_raw_image(tmp_path / "other.raw", SIZE)
        session.add(tracked.store, "sdb", str(image), granularity_bits=12)
        failing, other = tracked.attach(), Filter.attach(tracked.store, "sdb", background=False)
        sick = SickStore(tracked.store)

        def fall_ill() -> None:
            sick.errno = errno.EIO
            raise OSError(errno.EIO, "injected")

        failing.device.flush = fall_ill  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="no checkpoint was made"):
            take_checkpoint([failing, other], "monday")
        failing.abandon()
        other.abandon()
        sick.errno = None
        for name in (NAME, "sdb"):
            assert trust_of(changes(tracked.store, name, since="monday")) is Trust.UNTRUSTED
            with Filter.attach(tracked.store, name, background=False) as again, pytest.raises(Untrusted):
                again.changes(since="monday")


# --- strict ---


@pytest.mark.parametrize("illness", ILLNESSES)
def test_strict_write_fails_with_the_stores_errno_and_writes_nothing(strict: Patient, illness: int) -> None:
    disk = strict.disk
    strict.sick.errno = illness
    writes: list[Callable[[], object]] = [
        lambda: disk.pwrite(b"x", 100 * BLOCK),
        lambda: disk.write_zeroes(100 * BLOCK, 1),
        lambda: disk.discard(100 * BLOCK, 1),
        lambda: disk.mark(100 * BLOCK, 1),
    ]
    for write in writes:
        with pytest.raises(StorageError) as refused:
            write()
        assert refused.value.errno == illness
    batch = [(0, memoryview(b"settled")), (100 * BLOCK, memoryview(b"x")), (200 * BLOCK, memoryview(b"y"))]
    assert disk.lane().write_many(batch) == {1: illness, 2: illness}
    assert disk.pread(7, 0) == b"settled"
    assert disk.pread(1, 100 * BLOCK) == disk.pread(1, 200 * BLOCK) == b"\0"
    strict.sick.errno = None
    disk.pwrite(b"x", 150 * BLOCK)
    assert trust_of(disk.changes(since="start")) is Trust.EXACT
    assert blocks_of(disk.changes(since="start")) == {0, 150}
    assert 100 not in strict.tracked.stored_dirt()


def test_strict_write_for_which_there_is_no_memory_fails(strict: Patient) -> None:
    strict.sick.errno = errno.ENOMEM
    with pytest.raises(StorageError, match=r"cannot record a write .*: Cannot allocate memory") as refused:
        strict.disk.pwrite(b"x", 100 * BLOCK)
    assert refused.value.errno == errno.ENOMEM
    assert strict.disk.pread(1, 100 * BLOCK) == b"\0"
    strict.sick.errno = None
    strict.disk.pwrite(b"x", 150 * BLOCK)
    assert trust_of(strict.disk.changes(since="start")) is Trust.EXACT
    assert blocks_of(strict.disk.changes(since="start")) >= {0, 150}


def test_strict_write_to_settled_blocks_needs_no_store(strict: Patient) -> None:
    strict.sick.errno = errno.EIO
    strict.disk.pwrite(b"again", 0)
    strict.disk.pwrite(b"armed", BLOCK)
    assert strict.sick.refused == 0


# --- when the owner's file cannot be written either ---


def refused(*_: object) -> None:
    raise StorageError("owner", OSError(errno.EROFS, "injected"), next_step="mend it")


@pytest.fixture
def silent(guest_first: Patient, exact_grace: None, monkeypatch: pytest.MonkeyPatch) -> Patient:
    """Neither the store nor the owner's file can be written. Nobody really waits a minute."""
    wait_s = vouching.SILENCE_S
    real_write = owner.Owner._write_trust

    def refuse(self: owner.Owner, why: owner_file.Distrust | None) -> None:
        if guest_first.sick.errno is None:
            real_write(self, why)
            return
        raise StorageError("owner", OSError(errno.EROFS, "injected"), next_step="mend it")

    monkeypatch.setattr(owner.Owner, "_write_trust", refuse)
    monkeypatch.setattr(vouching, "SILENCE_S", 0.0)
    guest_first.disk.beat()
    guest_first.sick.errno = errno.EROFS
    guest_first.disk.pwrite(b"untracked", 100 * BLOCK)
    status = guest_first.tracked.image.stat()
    later = status.st_mtime_ns + int(wait_s * 1e9)
    os.utime(guest_first.tracked.image, ns=(status.st_atime_ns, later))  # the wait, as the image shows it
    return guest_first


def test_silence_says_that_track_was_lost(silent: Patient, caplog: pytest.LogCaptureFixture) -> None:
    assert "the guest goes on" in caplog.get_records("setup")[-1].getMessage()
    before = owner_file.last_beat(silent.owner_path)
    silent.disk.beat()
    assert owner_file.last_beat(silent.owner_path) == before
    assert owner_file.distrust(silent.owner_path) is None
    for answer in (silent.disk.changes(since="start"), silent.tracked.changes("start")):
        assert trust_of(answer) is Trust.UNTRUSTED


@pytest.mark.parametrize("end", ["detached", "dead"])
def test_silence_is_heard_by_the_next_owner(silent: Patient, end: str) -> None:
    silent.disk.detach() if end == "detached" else silent.disk.abandon()
    silent.sick.errno = None
    assert trust_of(silent.tracked.changes("start")) is Trust.UNTRUSTED
    with silent.tracked.attach() as disk, pytest.raises(Untrusted):
        disk.changes(since="start")


def test_silence_is_heard_after_a_restart_of_the_machine(
    silent: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a minute is forgiven, as the last signs of life may be lost."""
    silent.disk.abandon()
    silent.sick.errno = None
    restarted_ns = silent.tracked.image.stat().st_mtime_ns + 1
    monkeypatch.setattr(owner, "boot_id", lambda: "another boot")
    monkeypatch.setattr(owner, "boot_time_ns", lambda: restarted_ns)
    assert trust_of(silent.tracked.changes("start")) is Trust.UNTRUSTED


def test_silence_is_heard_after_a_power_cut_that_takes_the_mtime_of_the_write(
    guest_first: Patient, exact_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's flush makes its data durable, and leaves the mtime in memory. Nobody really waits a minute."""
    disk, image = guest_first.disk, guest_first.tracked.image
    durable_ns = [image.stat().st_mtime_ns]
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        real_fsync(fd)
        if os.path.samestat(os.fstat(fd), image.stat()):
            assert disk.pread(9, 100 * BLOCK) == bytes(9)
            durable_ns.append(os.fstat(fd).st_mtime_ns)

    monkeypatch.setattr(vouching, "SILENCE_S", 0.05)
    monkeypatch.setattr(continuity, "_POWER_CUT_GRACE_NS", 0)
    disk.beat()
    guest_first.sick.errno = errno.EROFS
    with monkeypatch.context() as patched:
        patched.setattr(owner.Owner, "_write_trust", refused)
        patched.setattr(os, "fsync", fsync)
        disk.pwrite(b"untracked", 100 * BLOCK)
        disk.flush()
    disk.abandon()
    guest_first.sick.errno = None
    os.utime(image, ns=(durable_ns[-1], durable_ns[-1]))
    monkeypatch.setattr(owner, "boot_id", lambda: "another boot")
    monkeypatch.setattr(owner, "boot_time_ns", lambda: durable_ns[-1] + 1)
    assert trust_of(guest_first.tracked.changes("start")) is Trust.UNTRUSTED


def test_write_fails_where_no_mtime_can_end_the_silence(
    guest_first: Patient, exact_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unowned(_: int) -> None:
        raise PermissionError(errno.EPERM, "injected")

    disk = guest_first.disk
    monkeypatch.setattr(vouching, "SILENCE_S", 0.0)
    guest_first.sick.errno = errno.EROFS
    with monkeypatch.context() as patched:
        patched.setattr(owner.Owner, "_write_trust", refused)
        patched.setattr(os, "utime", unowned)
        with pytest.raises(StorageError, match="cannot record a write"):
            disk.pwrite(b"x", 100 * BLOCK)
    guest_first.sick.errno = None
    assert disk.pread(1, 100 * BLOCK) == b"\0"
    disk.pwrite(b"tracked", 100 * BLOCK)
    assert trust_of(disk.changes(since="start")) is Trust.EXACT


def test_silence_that_is_interrupted_ends(
    guest_first: Patient, exact_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its write is given up. Else an owner that goes on tracking would give no more signs of life."""

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    disk = guest_first.disk
    guest_first.sick.errno = errno.EROFS
    with monkeypatch.context() as patched:
        patched.setattr(owner.Owner, "_write_trust", refused)
        patched.setattr("lmdbitmap.tracker.vouching.time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.pwrite(b"given up", 100 * BLOCK)
    guest_first.sick.errno = None
    assert disk.pread(8, 100 * BLOCK) == bytes(8)
    before = owner_file.last_beat(guest_first.owner_path)
    disk.beat()
    assert owner_file.last_beat(guest_first.owner_path) != before
    disk.pwrite(b"tracked", 100 * BLOCK)
    assert trust_of(disk.changes(since="start")) is Trust.EXACT
    assert blocks_of(disk.changes(since="start")) == {0, 100}


def test_no_epoch_begins_before_the_owners_file_can_be_written(
    silent: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every pass would begin one more."""
    monkeypatch.setattr(silent.tracked.store, "update", silent.sick._update)  # the store is well again
    for _ in range(3):
        with pytest.raises(StorageError):
            silent.disk.background_pass()
    assert silent.tracked.checkpoints() == ["epoch-1", "start"]
    silent.sick.errno = None
    silent.disk.background_pass()
    assert silent.tracked.checkpoints() == ["epoch-1", "start", "epoch-2"]
    before = owner_file.last_beat(silent.owner_path)
    silent.disk.beat()
    assert owner_file.last_beat(silent.owner_path) != before


class TimelessDevice(FileDevice):
    """An image without an mtime, as a block device is."""

    def identity(self) -> ImageIdentity:
        return super().identity()._replace(mtime_ns=0)


def test_without_an_mtime_silence_says_nothing_so_the_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(TrackedDisk(tmp_path, SIZE)) as tracked:
        disk = Filter.attach(tracked.store, NAME, open_device=TimelessDevice.open, background=False)
        disk.checkpoint("start")
        sick = SickStore(tracked.store)
        sick.errno = errno.ENOSPC

        def refuse(self: owner.Owner, why: owner_file.Distrust | None) -> None:
            raise StorageError("owner", OSError(errno.EIO, "injected"), next_step="mend it")

        monkeypatch.setattr(owner.Owner, "_write_trust", refuse)
        with pytest.raises(StorageError):
            disk.pwrite(b"untracked", 100 * BLOCK)
        assert disk.pread(9, 100 * BLOCK) == bytes(9)
        assert "the guest goes on" not in caplog.text
        disk.beat()
        sick.errno = None
        disk.pwrite(b"tracked", 100 * BLOCK)
        assert blocks_of(disk.changes(since="start")) == {100}
        disk.abandon()
