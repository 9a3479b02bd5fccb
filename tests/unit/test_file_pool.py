"""A pool reads any number of files, with a few of them open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmdbitmap.errors import NotFound
from lmdbitmap.file_pool import FilePool, PooledFile


def test_more_files_than_may_be_open_are_read_again_and_again(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / str(number)).write_bytes(b"%d" % number * 10)
    before = len(os.listdir("/proc/self/fd"))
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
        first = pool.device(str(tmp_path / "a"))
        pool.device(str(tmp_path / "b"))
        assert pool.device(str(tmp_path / "a")) is first
        pool.device(str(tmp_path / "c"))
        assert pool.device(str(tmp_path / "a")) is first


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with FilePool() as pool, pytest.raises(NotFound):
        PooledFile(pool, str(tmp_path / "none"))
