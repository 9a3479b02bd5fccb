"""The owner's file: who holds it, the last sign of life, and distrust that is never lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

import pytest

from lmdbitmap.errors import Busy, StorageError
from lmdbitmap.interfaces import StoreMark
from lmdbitmap.storage import owner, owner_file, owner_name
from lmdbitmap.storage.owner import Owner
from lmdbitmap.storage.owner_file import Beat, Distrust
from lmdbitmap.storage.owner_name import OWNED_TWICE
from lmdbitmap.system import file_locks, files
from tests.helpers.support import PATIENCE_SECONDS, spawn

HOLD_AND_SAY_SO = """
import sys
from lmdbitmap.storage.owner import Owner
held = Owner(sys.argv[1])
held.beat(5_000_000_000, 4_000_000_000)
print("held", flush=True)
sys.stdin.read()
import time; time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "owner")
    owner_file.create(path)
    return path


@pytest.fixture
def held(path: str) -> Iterator[Owner]:
    held = Owner(path)
    yield held
    held.close()


# --- the lock ---


def test_only_one_holds_a_disk(path: str, held: Owner) -> None:
    assert owner.is_owned(path)
    with pytest.raises(Busy):
        Owner(path)
    held.close()
    assert not owner.is_owned(path)
    Owner(path).close()


def test_lock_and_beat_of_a_killed_owner(path: str) -> None:
    with spawn(sys.executable, "-c", HOLD_AND_SAY_SO, path) as child:
        child.wait_for_line("held")
        assert owner.is_owned(path)
        child.process.kill()
        child.wait()
    assert not owner.is_owned(path)
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 5_000_000_000, 4_000_000_000)
    assert owner_file.distrust(path) is None
    Owner(path).close()


def test_those_who_only_ask_do_not_take_each_other_for_the_owner(path: str) -> None:
    answers: list[bool] = []
    start = threading.Barrier(4)

    def ask() -> None:
        start.wait(PATIENCE_SECONDS)
        answers.extend(owner.is_owned(path) for _ in range(200))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert len(answers) == 800
    assert not any(answers)


def test_two_that_find_the_file_missing_do_not_both_own_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second would replace the file that the first has locked by then."""
    path, create = str(tmp_path / "owner"), owner_file.create
    is_late, first_ends = threading.Event(), threading.Event()
    held: list[Owner] = []

    def create_late(*arguments: Any) -> None:
        if not is_late.is_set():
            is_late.set()
            first_ends.wait(0.3)
        create(*arguments)

    def own() -> None:
        with contextlib.suppress(Busy):
            held.append(Owner(path))
        first_ends.set()

    monkeypatch.setattr(owner_file, "create", create_late)
    late = threading.Thread(target=own)
    late.start()
    assert is_late.wait(PATIENCE_SECONDS)
    own()
    late.join(PATIENCE_SECONDS)
    for each in held:
        each.close()
    assert len(held) == 1


def test_missing_file_is_owned_by_nobody(tmp_path: Path) -> None:
    assert not owner.is_owned(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# --- the file is taken away ---


@pytest.mark.parametrize("how", ["removed", "replaced"])
@pytest.mark.parametrize("lost", [None, Distrust(5, "just now")])
def test_file_that_is_taken_away_under_its_owner_keeps_others_out_all_the_same(
    tmp_path: Path, how: str, lost: Distrust | None
) -> None:
    """Else another process would own the disk as well. An image behind an NBD server has no locks of its own."""
    path, copy = str(tmp_path / "owner"), str(tmp_path / "copy")
    owner_file.create(path, description=b"what it is")
    owner_file.create(copy, Distrust(1, "long ago"), b"what it was")
    with closing(Owner(path)) as held:
        held.beat(1, 2)
        os.unlink(path) if how == "removed" else os.rename(copy, path)
        if lost is not None:
            held.declare_distrust(lost.reason, lost.since_ns)
        held.beat(3, 4)
        with pytest.raises(Busy):
            Owner(path)
        assert owner_file.last_beat(path) == Beat(owner.boot_id(), 3, 4)
        assert owner_file.distrust(path) == lost
        assert owner_file.description(path) == b"what it is"
    Owner(path).close()


@pytest.mark.parametrize("failing", ["pwrite_whole", "fdatasync"])
def test_distrust_is_not_lost_with_a_failed_write_to_the_file_that_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path, copy = str(tmp_path / "owner"), str(tmp_path / "copy")
    owner_file.create(path)
    owner_file.create(copy)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "injected")

    with closing(Owner(path)) as held:
        held.declare_distrust("just now", 5)
        os.rename(copy, path)
        with monkeypatch.context() as patched:
            patched.setattr(files if failing == "pwrite_whole" else os, failing, full)
            with pytest.raises(StorageError):
                held.beat(1, 2)
        held.beat(3, 4)
        assert owner_file.distrust(path) == Distrust(5, "just now")
        assert owner_file.last_beat(path) == Beat(owner.boot_id(), 3, 4)


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_owner_that_has_no_memory_to_tell_of_the_file_that_it_took_keeps_it(
    path: str, held: Owner, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Else nobody would be kept out any more, and it could not even say that the disk cannot be trusted."""

    def no_memory(*_: object) -> None:
        raise MemoryError

    os.unlink(path) if how == "removed" else os.rename(path, path + ".away")
    with monkeypatch.context() as patched:
        patched.setattr(owner_name.log, "error", no_memory)
        with pytest.raises(MemoryError):
            held.beat(1, 2)
    with pytest.raises(Busy):
        Owner(path)
    held.beat(3, 4)
    held.declare_distrust("just now", 5)
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 3, 4)
    assert owner_file.distrust(path) == Distrust(5, "just now")


def test_owner_whose_file_another_took_is_told_so(path: str, held: Owner) -> None:
    os.unlink(path)
    with closing(Owner(path)), pytest.raises(Busy):
        held.beat(1, 2)
    held.beat(3, 4)
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 3, 4)


def test_disk_that_was_owned_twice_is_given_up_only_once_that_is_noted(
    path: str, held: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its guest would write untracked, and after a death nobody would know. The other file must say so as well."""
    put, refused = owner_file.put, {os.stat(path).st_ino}

    def put_or_refuse(fd: int, *arguments: Any, **named: Any) -> None:
        if os.fstat(fd).st_ino in refused:
            raise OSError(errno.EIO, "injected")
        put(fd, *arguments, **named)

    monkeypatch.setattr(owner_file, "put", put_or_refuse)
    os.rename(path, path + ".away")
    with closing(Owner(path)):
        with pytest.raises(StorageError, match="injected"):
            held.beat(1, 2)
        assert (held.was_owned_twice, owner_file.distrust(path)) == (False, Distrust(1, OWNED_TWICE))
        refused.clear()
        with pytest.raises(Busy):
            held.beat(3, 4)
        assert held.was_owned_twice
        assert held.distrust() == Distrust(3, OWNED_TWICE)


def test_owner_goes_on_in_a_store_that_is_moved(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    owner_file.create(str(before / "owner"))
    with closing(Owner(str(before / "owner"))) as held:
        before.rename(after)
        held.beat(1, 2)
        assert owner.is_owned(str(after / "owner"))
    assert owner_file.last_beat(str(after / "owner")) == Beat(owner.boot_id(), 1, 2)
    assert not before.exists()


@pytest.mark.parametrize("is_known_there", [False, True])
def test_owner_keeps_a_moved_store_too_where_another_took_its_place(
    tmp_path: Path, *, is_known_there: bool
) -> None:
    """It still writes to the one that was moved. A copy may have been put in its place, or a new store."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    owner_file.create(str(before / "owner"))
    with closing(Owner(str(before / "owner"))) as held:
        before.rename(after)
        before.mkdir()
        if is_known_there:
            owner_file.create(str(before / "owner"))
        held.beat(1, 2)
        held.declare_distrust("just now", 3)
        for folder in (before, after):
            path = str(folder / "owner")
            assert owner.is_owned(path)
            assert owner_file.last_beat(path) == Beat(owner.boot_id(), 1, 2)
            assert owner_file.distrust(path) == Distrust(3, "just now")
    assert not owner.is_owned(str(after / "owner"))


@pytest.mark.parametrize("how", ["moved", "moved, then removed", "removed with its store"])
@pytest.mark.parametrize("is_known_there", [False, True])
def test_file_of_another_store_is_never_called_trusted_by_the_owner_whose_name_it_has(
    tmp_path: Path, how: str, *, is_known_there: bool
) -> None:
    """That store may lack what this one recorded since the copy."""
    path, copy = tmp_path / "store" / "owner", tmp_path / "copy"
    path.parent.mkdir()
    owner_file.create(str(path))
    copy.mkdir()
    if is_known_there:
        owner_file.create(str(copy / "owner"), Distrust(1, "bits were lost"))
    is_there = how != "removed with its store"
    with closing(Owner(str(path), is_in_place=lambda: is_there)) as held:
        held.beat(1, 2)
        path.parent.rename(tmp_path / "away") if is_there else shutil.rmtree(path.parent)
        copy.rename(path.parent)
        held.beat(3, 4)
        if how == "moved, then removed":
            shutil.rmtree(tmp_path / "away")
            held.beat(5, 6)
        assert held.distrust() is None
        assert owner.is_owned(str(path))
        found = owner_file.distrust(str(path))
        assert found is not None
        assert found.reason == (
            "bits were lost" if is_known_there else "the owner's file of this disk was missing"
        )
        held.declare_distrust("just now", 7)
        held.restore_trust()
        assert owner_file.distrust(str(path)) == Distrust(7, "just now")
        if how == "moved":
            assert owner_file.distrust(str(tmp_path / "away" / "owner")) is None
    assert not owner.is_owned(str(path))


def test_distrust_reaches_a_file_that_took_the_name_before(tmp_path: Path, path: str, held: Owner) -> None:
    """It may be in the store that is used, though the one that was moved away is not lost."""
    held.declare_distrust("just now", 3)
    os.rename(path, tmp_path / "away")
    owner_file.create(path)
    held.beat(5, 6)
    assert owner_file.distrust(path) == Distrust(3, "just now")


def test_owner_does_not_vouch_in_another_store(tmp_path: Path, path: str) -> None:
    """Its signs of life would hide since when nobody records there what is written."""
    is_there = True
    with closing(Owner(path, is_in_place=lambda: is_there)) as held:
        held.beat(1, 2)
        shutil.copy(path, tmp_path / "copy")
        os.rename(path, tmp_path / "away")
        os.rename(tmp_path / "copy", path)
        held.beat(3, 4)
        assert owner_file.last_beat(path) == Beat(owner.boot_id(), 3, 4)
        is_there = False
        held.beat(5, 6)
        assert owner_file.last_beat(path) == Beat(owner.boot_id(), 3, 4)
        assert held.last_beat() == Beat(owner.boot_id(), 5, 6)
        os.rename(path, tmp_path / "copy")
        os.rename(tmp_path / "away", path)
        held.beat(7, 8)
        assert not owner.is_owned(str(tmp_path / "copy"))
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 7, 8)


def test_owner_goes_on_in_a_file_that_is_moved_away_and_back(path: str, held: Owner) -> None:
    os.rename(path, path + ".away")
    held.beat(1, 2)
    os.rename(path + ".away", path)
    held.beat(3, 4)
    assert owner.is_owned(path)
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 3, 4)


def test_owner_that_may_not_look_for_its_file_any_more_beats_all_the_same(
    path: str, held: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an agent that gives up root after it attached its disks."""

    def refused(fd: int, path: str) -> bool:
        raise PermissionError(errno.EACCES, "injected", path)

    monkeypatch.setattr(file_locks, "_is_named", refused)
    held.beat(1, 2)
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 1, 2)


# --- distrust ---


def test_new_file_is_trusted_and_shows_no_life(path: str) -> None:
    assert (owner_file.distrust(path), owner_file.last_beat(path)) == (None, None)
    assert os.path.getsize(path) == 16384


def test_distrust_stays_until_trust_is_restored(path: str, held: Owner) -> None:
    held.declare_distrust("the store was full", 12345)
    assert owner_file.distrust(path) == held.distrust() == Distrust(12345, "the store was full")
    held.beat(1, 1)
    assert owner_file.distrust(path) is not None
    held.restore_trust()
    assert owner_file.distrust(path) is None
    assert os.path.getsize(path) == 16384


def test_distrust_is_said_again_if_an_older_copy_is_written_over_the_file(path: str, held: Owner) -> None:
    """As by `cp`, which leaves the owner the file that it has open."""
    before = Path(path).read_bytes()
    held.declare_distrust("just now", 5)
    Path(path).write_bytes(before)
    held.beat(6, 7)
    assert owner_file.distrust(path) == Distrust(5, "just now")
    held.restore_trust()
    held.beat(8, 9)
    assert owner_file.distrust(path) is None


@pytest.mark.parametrize("reason", ["", "ä" * 1000, "x" * 5000])
def test_any_reason_is_distrust(path: str, held: Owner, reason: str) -> None:
    held.declare_distrust(reason, 1)
    found = owner_file.distrust(path)
    assert found is not None
    assert found.reason
    assert reason.startswith(found.reason.rstrip("\ufffd")) or not reason


def test_missing_file_is_distrust_and_stays_so(tmp_path: Path) -> None:
    path = str(tmp_path / "owner")
    assert owner_file.distrust(path) is not None
    Owner(path).close()
    found = owner_file.distrust(path)
    assert found is not None
    assert "missing" in found.reason


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 4097, 8191])
def test_file_that_was_cut_is_distrust(path: str, size: int) -> None:
    os.truncate(path, size)
    is_whole = size >= 4096 + 512
    assert (owner_file.distrust(path) is None) == is_whole


def test_every_damaged_byte_of_the_trust_record_is_distrust(path: str) -> None:
    damaged = 0
    for offset in range(4096, 4096 + 512):
        flip(path, offset)
        assert owner_file.distrust(path) is not None
        flip(path, offset)
        damaged += 1
    assert damaged == 512
    assert owner_file.distrust(path) is None


def test_beat_tells_how_the_image_and_the_store_stood(path: str) -> None:
    stood, session = StoreMark(2**63, 2**64 - 1, 2**63 - 1), UUID(int=2**128 - 1)
    with closing(Owner(path, lambda: stood)) as held:
        held.beat(7, 8, 2**40, awake_ns=9, session=session)
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 7, 8, 2**40, stood, 9, session)


def test_beat_of_an_older_version_is_no_beat(path: str) -> None:
    """It says nothing of the store. Then an image that was written since the attach is not believed."""
    body = b"LDBMbeat" + owner.boot_id().encode() + (7).to_bytes(8, "little") + (8).to_bytes(8, "little")
    body = body.ljust(508, b"\0")
    with open(path, "r+b") as file:
        file.write(body + crc32(body).to_bytes(4, "little"))
    assert owner_file.last_beat(path) is None


def test_every_damaged_byte_of_the_beat_is_no_beat(path: str, held: Owner) -> None:
    held.beat(7, 8)
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 7, 8)
    for offset in range(512):
        flip(path, offset)
        assert owner_file.last_beat(path) is None
        flip(path, offset)
    assert owner_file.last_beat(path) == Beat(owner.boot_id(), 7, 8)


def flip(path: str, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_distrust_needs_no_space_and_no_name(path: str, held: Owner, tmp_path: Path) -> None:
    """The file's blocks are there, and its name is not asked for: a full disk or a lost folder is no matter."""
    assert os.stat(path).st_blocks * 512 >= 16384
    os.rename(path, tmp_path / "elsewhere")
    held.declare_distrust("lost", 1)
    assert owner_file.distrust(str(tmp_path / "elsewhere")) == Distrust(1, "lost")


def test_refusal_of_the_file_is_an_error_of_ours(held: Owner) -> None:
    held.close()
    with pytest.raises(StorageError) as refused:
        held.declare_distrust("lost", 1)
    assert refused.value.errno == errno.EBADF


def test_boot_is_known() -> None:
    assert len(owner.boot_id()) == 36
    assert 0 < owner.boot_time_ns() < time.time_ns()
