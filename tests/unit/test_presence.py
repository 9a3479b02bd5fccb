"""Who uses a store: locks that an accident does not drop. With LMDB it is tried in crash/test_lmdb_in_the_wild.py."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest

from lmdbitmap.errors import Busy, StorageError
from lmdbitmap.storage import presence
from lmdbitmap.storage.presence import entering
from tests.helpers.support import open_files, run, spawn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment's folder; nobody has it open, and LMDB was never there."""
    (tmp_path / "lmdb").mkdir()
    return tmp_path / "lmdb"


def test_first_one_is_told_so_and_the_second_one_too(folder: Path) -> None:
    (folder / "lock.mdb").touch()
    with entering(str(folder)) as first:
        first.settle()
    fcntl.fcntl(first._lock_fd, fcntl.F_SETLK, presence._request(fcntl.F_RDLCK, 0))  # as LMDB does
    second = f"""
from lmdbitmap.storage.presence import entering
with entering({str(folder)!r}) as second:
    print(second.is_first)
"""
    assert first.is_first
    assert run("python3", "-c", second, env={"PYTHONPATH": os.getcwd()}).stdout == "False\n"
    first.close()
    assert run("python3", "-c", second, env={"PYTHONPATH": os.getcwd()}).stdout == "True\n"


def test_whoever_lives_without_lmdbs_lock_keeps_others_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "_LOOKS", 2)
    with entering(str(folder)) as first:
        pass
    (folder / "lock.mdb").touch()
    with pytest.raises(Busy) as refused, entering(str(folder)):
        pass
    assert "see what opens the store's files" in str(refused.value)
    first.close()
    with entering(str(folder)) as second:
        assert second.is_first
    second.close()


def test_whoever_lives_without_a_lock_file_keeps_others_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another lock file would let both write at once."""
    monkeypatch.setattr(presence, "_LOOKS", 2)
    (folder / "data.mdb").touch()
    with entering(str(folder)) as first:
        pass
    with pytest.raises(Busy) as refused, entering(str(folder)):
        pass
    assert "lock.mdb was removed" in str(refused.value)
    (folder / "data.mdb").unlink()  # now there is nothing to open, and salvage.py asks whether it is alone
    with entering(str(folder)) as second:
        assert not second.is_alone()
    second.close()
    first.close()


def test_whoever_lives_is_known_by_lmdbs_lock_where_the_users_were_removed(folder: Path) -> None:
    (folder / "lock.mdb").touch()
    with entering(str(folder)) as first:
        first.settle()
    fcntl.fcntl(first._lock_fd, fcntl.F_SETLK, presence._request(fcntl.F_RDLCK, 0))  # as LMDB does
    (folder.parent / presence.USERS).unlink()
    second = f"""
from lmdbitmap.storage import presence
presence._LOOKS = 2
with presence.entering({str(folder)!r}) as second:
    print(second.is_first, second.is_alone())
"""
    assert run("python3", "-c", second, env={"PYTHONPATH": os.getcwd()}).stdout == "False False\n"
    first.close()


def test_opener_that_does_not_come_to_an_end_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_TURN_TRIES", 2)
    with entering(str(folder)) as first, pytest.raises(Busy) as refused, entering(str(folder)):
        pass
    assert "fuser" in str(refused.value)
    first.close()


def test_lost_locks_are_taken_again_once(folder: Path) -> None:
    lock_file = folder / "lock.mdb"
    lock_file.touch()
    with entering(str(folder)) as here:
        here.settle()
    assert here.mend_locks()
    assert not here.mend_locks()
    lock_file.read_bytes()
    assert here.mend_locks()
    here.close()


def test_locks_that_somebody_else_takes_are_taken_later(folder: Path) -> None:
    lock_file = folder / "lock.mdb"
    lock_file.touch()
    take = f"""
import fcntl, time
from lmdbitmap.storage import presence
lock_file = open({str(lock_file)!r}, "r+b")
fcntl.fcntl(lock_file, fcntl.F_SETLK, presence._request(fcntl.F_WRLCK, 0))
print("taken", flush=True)
time.sleep(600)
"""
    with entering(str(folder)) as here:
        here.settle()
    with spawn(sys.executable, "-c", take) as child:
        child.wait_for_line("taken")
        assert not here.mend_locks()
    assert here.mend_locks()
    here.close()


def test_life_is_counted_and_sickness_is_remembered_until_somebody_looks(folder: Path) -> None:
    with entering(str(folder)) as here:
        assert [here.begin_life() for _ in range(3)] == [0, 1, 2]
        here.is_well()
        assert here.begin_life() == 0
        here.is_sick()
        here.is_well()
        assert here.begin_life() == presence.SICK
        assert here.begin_life() == presence.SICK - 1, "whoever looked for it died young"
        here.is_well()
        assert here.begin_life() == 0
    here.close()


def test_file_that_takes_no_byte_counts_nothing_and_refuses_nothing(folder: Path) -> None:
    """As on a full disk, where the file system writes no block in its place."""
    with entering(str(folder)) as here:
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, here._users_fd)
        os.close(full)
        assert here.begin_life() == 0
        here.is_sick()
        here.is_well()
    here.close()
    here.is_well()


def test_failure_inside_leaves_nothing_behind(folder: Path) -> None:
    before = len(open_files())
    with pytest.raises(ZeroDivisionError), entering(str(folder)):
        raise ZeroDivisionError
    assert len(os.listdir("/proc/self/fd")) == before
    with entering(str(folder)) as again:
        assert again.is_first
    again.close()


def test_folder_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((StorageError, LookupError)), entering(str(tmp_path / "file" / "lmdb")):
        pass
