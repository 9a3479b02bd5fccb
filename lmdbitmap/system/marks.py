"""Marks on files: an extended attribute that names whoever began to write a file last.

A file's mtime tells that it was written, and not by whom. A mark is on the file itself, so it stays when a note about
the file is put back to an earlier day. Some file systems keep none, such as vfat.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final
from uuid import uuid4

_MARK: Final = "user.lmdbitmap.mark"


def put_new_mark(fd: int) -> str | None:
    """Mark a file anew, and return the mark: durable with the next fsync. None if its file system keeps no marks."""
    mark = uuid4().hex
    try:
        os.setxattr(fd, _MARK, mark.encode())
    except OSError:
        with contextlib.suppress(OSError):  # rather none than an older one
            os.removexattr(fd, _MARK)
        return None
    return mark


def has_mark(fd: int, mark: str) -> bool:
    try:
        return os.getxattr(fd, _MARK) == mark.encode()
    except OSError:
        return False
