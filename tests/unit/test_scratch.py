"""The file without a name in which old data is kept: what it takes, what it leaves, and what it gives back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.errors import NotFound, StorageError
from lmdbitmap.tracker.scratch import Scratch, ScratchFile
from tests.helpers.support import open_files
from tests.helpers.tracked import quick_folder

MIB = 1 << 20
BLOCK = 4096


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


def filled(file: ScratchFile, length: int, offset: int) -> bytes:
    buffer = bytearray(length)
    file.fill(memoryview(buffer), offset)
    return bytes(buffer)


def test_what_was_put_is_found_where_it_was_put(folder: Path) -> None:
    with closing(ScratchFile(Scratch(str(folder)))) as file:
        file.put(memoryview(b"second"), 6)
        file.put(memoryview(b"first."), 0)
        assert filled(file, 12, 0) == b"first.second"
        assert filled(file, 3, 8) == b"con"


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_the_system_may_take_it_in_small_pieces(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def by_three(fd: int, data: memoryview, offset: int) -> int:
        return pwrite(fd, data[:3], offset)

    def three_of(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:3]], offset)

    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, call, by_three if call == "pwrite" else three_of)
    with closing(ScratchFile(Scratch(str(folder)))) as file:
        file.put(memoryview(b"0123456789"), 5)
        assert filled(file, 10, 5) == b"0123456789"


@pytest.mark.parametrize("refusal", [None, errno.EISDIR, errno.EOPNOTSUPP])
def test_it_has_no_name_also_where_the_file_system_makes_files_with_names_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    before, system = os.listdir(folder), os.open
    refused = []

    def open_with_a_name(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if refusal is not None and flags & os.O_TMPFILE == os.O_TMPFILE:
            refused.append(path)
            raise OSError(refusal, os.strerror(refusal))
        return system(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_with_a_name)
    with closing(ScratchFile(Scratch(str(folder)))) as file:
        assert len(refused) == (0 if refusal is None else 1)
        assert os.listdir(folder) == before
        file.put(memoryview(b"kept"), 0)
        assert filled(file, 4, 0) == b"kept"


def test_folder_that_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(NotFound, match=r"the scratch folder .*missing does not exist"):
        ScratchFile(Scratch(str(folder / "missing")))


def test_preallocated_one_takes_its_room_at_once_or_is_refused(folder: Path) -> None:
    with closing(ScratchFile(Scratch(str(folder), 64 * MIB, preallocate=True))) as file:
        assert os.fstat(file._fd).st_blocks * 512 >= 64 * MIB
    descriptors = open_files()
    with pytest.raises(StorageError, match="the scratch folder"):
        ScratchFile(Scratch(str(folder), 1 << 60, preallocate=True))
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize(("blocks", "spare_blocks"), [(1000, 10), (1 << 30, 1 << 18)])
def test_it_does_not_take_the_last_space_unless_it_has_it_already(
    folder: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, spare_blocks: int
) -> None:
    """A hundredth of a small file system, 1 GiB of a large one."""
    available = [spare_blocks]

    def statvfs(fd: int) -> os.statvfs_result:
        return os.statvfs_result((BLOCK, BLOCK, blocks, *available * 2, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "fstatvfs", statvfs)
    monkeypatch.setattr(os, "statvfs", statvfs)
    with (
        closing(ScratchFile(Scratch(str(folder), MIB))) as growing,
        closing(ScratchFile(Scratch(str(folder), MIB, preallocate=True))) as preallocated,
    ):
        growing.require_room()
        assert Scratch(str(folder), MIB).room() == 0
        available[0] += 3
        assert [Scratch(str(folder), limit).room() for limit in (BLOCK, MIB)] == [BLOCK, 3 * BLOCK]
        available[0] -= 4
        assert Scratch(str(folder), MIB).room() == 0
        assert Scratch(str(folder), MIB, preallocate=True).room() == MIB
        preallocated.require_room()
        with pytest.raises(OSError, match="is left to the guest and the store"):
            growing.require_room()


def test_whoever_reads_one_that_was_emptied_is_not_in_trouble(folder: Path) -> None:
    with closing(ScratchFile(Scratch(str(folder)))) as file:
        file.put(memoryview(b"old data"), 0)
        file.empty()
        assert filled(file, 8, 0) == bytes(8)


def test_closed_one_is_closed_once(folder: Path) -> None:
    file = ScratchFile(Scratch(str(folder)))
    assert file.is_open
    file.close()
    file.close()
    assert not file.is_open


def test_what_is_said_of_its_data_when_it_is_closed_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS may say that it could not be written. Nobody reads it any more, and whoever releases goes on."""
    before, close = open_files(), os.close

    def complain(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "by intent")

    file = ScratchFile(Scratch(str(folder)))
    monkeypatch.setattr(os, "close", complain)
    file.close()
    monkeypatch.undo()
    assert open_files() == before


def test_a_file_that_takes_no_more_is_an_error_and_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(ScratchFile(Scratch(str(folder)))) as file, monkeypatch.context() as full:
        full.setattr(os, "pwrite", lambda fd, data, offset: 0)
        with pytest.raises(OSError, match="nothing was written"):
            file.put(memoryview(b"data"), 0)
