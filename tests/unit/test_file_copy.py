"""Bytes copied from file to file, in the kernel or by hand."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest

from lmdbitmap.errors import StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.file_copy import FileCopier


def refuse(*_: object) -> int:
    raise OSError(errno.EXDEV, "another file system")


def copied(folder: Path, content: bytes) -> bytes:
    """Copy all but the first byte, behind one that stays."""
    (folder / "source").write_bytes(content)
    with FileDevice.open(folder / "source", read_only=True) as source, (folder / "copy").open("w+b") as file:
        FileCopier(file.fileno(), "the copy").copy(source, 1, 1, len(content) - 1)
        return os.pread(file.fileno(), 2 * len(content), 0)


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_what_is_copied_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, kernel_copies: bool
) -> None:
    if not kernel_copies:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    content = os.urandom(100_001)
    assert copied(tmp_path, content) == b"\0" + content[1:]


def test_a_file_that_takes_nothing_is_an_error_and_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def take_nothing(*_: object) -> int:
        assert next(calls) < 10, "it is asked for ever"
        return 0

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(os, "pwrite", take_nothing)
    with pytest.raises(StorageError, match="the copy: nothing was written"):
        copied(tmp_path, b"content")
