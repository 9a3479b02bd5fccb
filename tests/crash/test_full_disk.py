"""Out of space: an error of ours that says what to do, the old content untouched, nothing left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.errors import StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.system import atomic_files
from tests.crash.full_disk import CRAMPED_BYTES, can_mount, file_size_limit, fill, full_tmpfs
from tests.helpers.support import make_raw_image

TOO_MUCH = 2 * CRAMPED_BYTES
NEXT_STEPS = {errno.ENOSPC: "free some space", errno.EFBIG: "raise the limit on file sizes"}


@pytest.fixture(
    params=[file_size_limit, *([full_tmpfs] if can_mount() else [])], ids=lambda made: made.__name__
)
def cramped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with request.param(tmp_path) as folder:
        yield folder


def check_refusal(refusal: StorageError, path: Path) -> None:
    assert refusal.errno in NEXT_STEPS
    assert str(refusal) == f"{path}: {os.strerror(refusal.errno)}; {refusal.next_step}"
    assert refusal.next_step.startswith(NEXT_STEPS[refusal.errno])


def test_replacement_that_does_not_fit_leaves_the_old_file(cramped: Path) -> None:
    path = cramped / "file"
    atomic_files.replace(path, b"old")
    with pytest.raises(StorageError) as refused:
        atomic_files.replace(path, b"x" * TOO_MUCH)
    check_refusal(refused.value, path)
    assert [(entry.name, entry.read_bytes()) for entry in cramped.iterdir()] == [("file", b"old")]
    atomic_files.replace(path, b"new")
    assert path.read_bytes() == b"new"


def test_small_writes_that_add_up_fail_in_our_words(cramped: Path) -> None:
    with pytest.raises(StorageError) as refused:
        write_piecemeal(cramped / "file", TOO_MUCH)
    check_refusal(refused.value, cramped / "file")
    assert list(cramped.iterdir()) == []


def write_piecemeal(path: Path, size: int) -> None:
    with atomic_files.replacing(path) as file:
        for _ in range(size // 1000):
            file.write(b"x" * 1000)


def test_last_bytes_in_the_buffer_fail_in_our_words(cramped: Path) -> None:
    with pytest.raises(StorageError) as refused:
        write_a_little_too_much(cramped / "file")
    check_refusal(refused.value, cramped / "file")
    assert list(cramped.iterdir()) == []


def write_a_little_too_much(path: Path) -> None:
    """What does not fit is still in the buffer when the block ends."""
    with atomic_files.replacing(path) as file:
        file.write(bytes(CRAMPED_BYTES))
        file.flush()
        file.write(b"x")


def test_file_that_does_not_fit_leaves_nothing(cramped: Path) -> None:
    with pytest.raises(StorageError) as refused:
        atomic_files.replace(cramped / "file", bytes(TOO_MUCH))
    check_refusal(refused.value, cramped / "file")
    assert list(cramped.iterdir()) == []


def test_file_written_in_full_can_be_overwritten_on_a_full_disk(cramped: Path) -> None:
    atomic_files.replace(cramped / "reserve", bytes(8192))
    with pytest.raises(StorageError):
        atomic_files.replace(cramped / "rest", bytes(TOO_MUCH))
    fill(cramped)
    with (cramped / "reserve").open("r+b") as file:
        file.write(b"x" * 8192)
        file.flush()
        os.fsync(file.fileno())
    assert (cramped / "reserve").read_bytes() == b"x" * 8192


def test_write_that_fits_in_part_is_an_error_of_the_device(tmp_path: Path) -> None:
    path = make_raw_image(tmp_path / "disk.raw", TOO_MUCH)
    with FileDevice.open(path) as device, file_size_limit(tmp_path):
        with pytest.raises(OSError, match="File too large"):
            device.pwrite(b"x" * TOO_MUCH, 0)
        device.pwrite(b"y", 0)
        assert device.pread(2, 0) == b"yx"
