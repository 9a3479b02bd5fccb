"""Everyone who implements `BlockDevice`. A new one is a function here and a line in `implementations()`.

The function makes a disk of zeroes of `size` bytes in `folder`, opens it and closes it afterwards:

    @contextmanager
    def nbd_client(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
        with some_server(folder, size, read_only) as uri, NbdClient.connect(uri) as device:
            yield device
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lmdbitmap.device import FileDevice, MemoryDevice
from lmdbitmap.files import filesystem_kind
from lmdbitmap.interfaces import BlockDevice
from tests.support import make_raw_image, run
from tests.tracked import TrackedDisk

Opener: TypeAlias = Callable[[Path, int, bool], AbstractContextManager[BlockDevice]]


@dataclass(frozen=True)
class Implementation:
    name: str
    open: Opener
    sector_bytes: int = 1
    """Sizes are multiples of it; offsets and lengths of requests never have to be."""
    is_resizable: bool = True
    can_be_read_only: bool = True


def implementations() -> list[Implementation]:
    found = [
        Implementation("memory", memory),
        Implementation("file", file),
        Implementation("file called a block device", file_called_block_device, 512, is_resizable=False),
        Implementation("filter", attached_filter, can_be_read_only=False),
    ]
    if os.path.isdir("/dev/shm") and filesystem_kind("/dev/shm") == "tmpfs":
        found.append(Implementation("file on tmpfs", file_on_tmpfs))
    if can_make_loop_devices():
        found.append(Implementation("block device", loop_device, 512, is_resizable=False))
    return found


@contextmanager
def memory(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    yield MemoryDevice(size, read_only=read_only)


@contextmanager
def file(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    with FileDevice.open(make_raw_image(folder / "disk.raw", size), read_only=read_only) as device:
        yield device


@contextmanager
def file_on_tmpfs(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    """tmpfs cannot ZERO_RANGE: here zeroes are really written out."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory_folder,
        file(Path(memory_folder), size, read_only) as device,
    ):
        yield device


@contextmanager
def file_called_block_device(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    """The way of a block device, where no loop device can be had: whole sectors, ioctls that are refused."""
    path = make_raw_image(folder / "disk.raw", size)
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    with FileDevice(str(path), fd, read_only=read_only, is_block_device=True, sector_bytes=512) as device:
        yield device


@contextmanager
def attached_filter(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    """A tracked disk: what is written through it must read and fail as it does on the image itself."""
    with closing(TrackedDisk(folder, size, granularity_bits=9).clean()) as tracked, tracked.attach() as disk:
        yield disk


@contextmanager
def loop_device(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    with loop_node(folder, size) as node, FileDevice.open(node, read_only=read_only) as device:
        yield device


@contextmanager
def loop_node(folder: Path, size: int = 1 << 20) -> Iterator[Path]:
    """The path of a block device over a file of zeroes."""
    node = run("losetup", "--find", "--show", make_raw_image(folder / "backing.raw", size)).stdout.strip()
    try:
        yield Path(node)
    finally:
        run("losetup", "--detach", node)


@functools.cache
def can_make_loop_devices() -> bool:
    """As root on most machines, but not in every container."""
    with tempfile.NamedTemporaryFile() as backing:
        backing.truncate(4096)
        try:
            made = subprocess.run(
                ["losetup", "--find", "--show", backing.name], capture_output=True, text=True
            )
        except FileNotFoundError:
            return False
        if made.returncode == 0:
            run("losetup", "--detach", made.stdout.strip())
    return made.returncode == 0
