"""A pool reads any number of files, with a few of them open."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from lmdbitmap.errors import Busy, NotFound, StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.file_pool import FilePool, PooledFile
from tests.helpers.support import open_files


def test_more_files_than_may_be_open_are_read_again_and_again(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / str(number)).write_bytes(b"%d" % number * 10)
    before = len(open_files())
    with FilePool(most_open=3) as pool:
        files = [PooledFile(pool, str(tmp_path / str(number))) for number in range(10)]
        for _ in range(3):
            read = [file.pread(2, 4) for file in files]
            assert read == [b"%d" % number * 2 for number in range(10)]
            assert len(os.listdir("/proc/self/fd")) == before + 3
        buffer = bytearray(4)
        files[7].pread_into(memoryview(buffer), 0)
        assert (bytes(buffer), files[7].size) == (b"7777", 10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_read_last_stays_open(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"x")
    with FilePool(most_open=2) as pool:
        first = read(pool, tmp_path / "a")
        read(pool, tmp_path / "b")
        assert read(pool, tmp_path / "a") is first
        read(pool, tmp_path / "c")
        assert read(pool, tmp_path / "a") is first


def read(pool: FilePool, path: Path) -> FileDevice:
    with pool.reading(str(path)) as device:
        assert device.pread(1, 0) == b"x"
    return device


def test_what_is_being_read_stays_open_whatever_else_is_asked_for(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"x")
    with FilePool(most_open=1) as pool:
        with pool.reading(str(tmp_path / "a")) as held:
            read(pool, tmp_path / "b")
            read(pool, tmp_path / "c")
            assert held.pread(1, 0) == b"x"
        read(pool, tmp_path / "b")
        assert held.fd is None


def test_threads_that_read_more_files_than_may_be_open_get_what_is_in_them(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{number:02}") for number in range(20)]
    for name in names:
        Path(name).write_bytes(name.encode())
    wrong: list[str] = []
    rounds: list[int] = []
    with FilePool(most_open=2) as pool:
        files = [PooledFile(pool, name) for name in names]

        def read_all(seed: int) -> None:
            for number in random.Random(seed).choices(range(20), k=300):
                if files[number].pread(files[number].size, 0) != names[number].encode():
                    wrong.append(names[number])
                rounds.append(number)

        threads = [threading.Thread(target=read_all, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(rounds), wrong) == (1200, [])


@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_that_was_replaced_or_renamed_while_it_was_closed_is_told(
    tmp_path: Path, is_there: bool
) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"x")
    with FilePool(most_open=1) as pool:
        file = PooledFile(pool, str(tmp_path / "a"))
        read(pool, tmp_path / "b")
        (tmp_path / "a").rename(tmp_path / "d")
        if is_there:
            (tmp_path / "c").rename(tmp_path / "a")
        with pytest.raises(Busy, match="a was changed or replaced while it was read; begin again"):
            file.pread(1, 0)


def test_a_file_that_cannot_be_looked_at_is_not_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks would keep writers out for as long as this process lives."""

    def refuse(fd: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
    with FilePool(most_open=1) as pool:
        file = PooledFile(pool, str(tmp_path / "a"))
        read(pool, tmp_path / "b")
        before = len(open_files())
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", refuse)
            with pytest.raises(StorageError, match="Stale file handle"):
                file.pread(1, 0)
        assert len(open_files()) == before - 1  # room was made for it
        assert file.pread(1, 0) == b"x"


def test_a_pool_that_is_closed_opens_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with FilePool() as pool:
        file = PooledFile(pool, str(tmp_path / "a"))
    with pytest.raises(OSError, match="the files are closed"):
        file.pread(1, 0)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with FilePool() as pool, pytest.raises(NotFound):
        PooledFile(pool, str(tmp_path / "none"))
