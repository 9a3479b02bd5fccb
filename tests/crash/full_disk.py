"""A folder that is nearly full, for tests of running out of space."""

from __future__ import annotations

import contextlib
import functools
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CRAMPED_BYTES = 256 * 1024
"""More than this does not fit."""


@contextlib.contextmanager
def full_tmpfs(folder: Path) -> Iterator[Path]:
    """A file system of its own that holds CRAMPED_BYTES; ENOSPC. Only root can have it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={CRAMPED_BYTES}", "tmpfs", folder], check=True)
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
