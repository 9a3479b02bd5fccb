"""Folders that are nearly full, or get full and have room again, for tests of running out of space."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CRAMPED_BYTES = 256 * 1024
"""More than this does not fit."""


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FILLER = "filler"


@contextlib.contextmanager
def full_tmpfs(folder: Path, size: int = CRAMPED_BYTES) -> Iterator[Path]:
    """A file system of its own that holds `size` bytes; ENOSPC. Only root can have it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def file_size_limit(folder: Path) -> Iterator[Path]:
    """No file of this process grows beyond CRAMPED_BYTES; EFBIG. Anybody can have it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CRAMPED_BYTES, limits[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@functools.cache
def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)
    return mounted.returncode == 0


def fill(folder: Path) -> None:
    """Leave no byte free."""
    fd = os.open(folder / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while os.write(fd, bytes(4096)):
            pass
    except OSError as full:
        if full.errno not in FULL:
            raise
    finally:
        os.close(fd)


def free(folder: Path) -> None:
    """What `fill` took is there again."""
    (folder / _FILLER).unlink()
