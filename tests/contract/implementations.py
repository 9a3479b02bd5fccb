"""Everyone who implements `BlockDevice`. A new one is a function here and a line in `implementations()`.

The function makes a disk of zeroes of `size` bytes in `folder`, opens it and closes it afterwards.
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.tls import server_context
from lmdbitmap.system.file_systems import filesystem_kind
from tests.helpers.certificates import shared_papers
from tests.helpers.support import Argument, make_raw_image, run, spawn, wait_for_socket, why_unusable
from tests.helpers.tracked import TrackedDisk

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
        Implementation("NBD client of our server", client_of_our_server, is_resizable=False),
    ]
    if why_unusable("openssl") is None:
        found.append(Implementation("NBD client over TLS", client_over_tls, is_resizable=False))
    if why_unusable("nbdkit") is None:
        found.append(Implementation("NBD client of nbdkit", client_of_nbdkit, 512, is_resizable=False))
    if why_unusable("qemu-nbd") is None:
        found.append(Implementation("NBD client of qcow2", client_of_qcow2, 512, is_resizable=False))
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
def loop_devices_to_oneself() -> Iterator[None]:
    """No test in another process gets one meanwhile: it might be one that is to be free for a moment only."""
    with open(Path(tempfile.gettempdir(), f"lmdbitmap-tests-loop-{os.getuid()}"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def loop_node(folder: Path, size: int = 1 << 20) -> Iterator[Path]:
    """The path of a block device over a file of zeroes."""
    with loop_devices_to_oneself():
        node = run("losetup", "--find", "--show", make_raw_image(folder / "backing.raw", size)).stdout.strip()
    try:
        yield Path(node)
    finally:
        run("losetup", "--detach", node)


@contextmanager
def client_of_our_server(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    with FileDevice.open(make_raw_image(folder / "disk.raw", size), read_only=read_only) as image:
        server = Server({"disk": PlainDisk(image)})
        server.listen_unix(str(folder / "nbd"))
        server.start()
        try:
            with NbdDevice.open(server.uris[0], read_only=read_only) as device:
                yield device
        finally:
            assert server.stop()


@contextmanager
def client_over_tls(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    papers = shared_papers().folder
    with FileDevice.open(make_raw_image(folder / "disk.raw", size), read_only=read_only) as image:
        server = Server({"disk": PlainDisk(image)})
        server.listen_tcp("127.0.0.1", 0, server_context(str(papers)))
        server.start()
        try:
            uri = f"{server.uris[0]}?tls-certificates={papers}"
            with NbdDevice.open(uri, read_only=read_only) as device:
                yield device
        finally:
            assert server.stop()


@contextmanager
def client_of_nbdkit(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    """Old manners and narrow limits: nothing is known of holes, no request is smaller than a sector or longer
    than two pages, so that everything is split and filled up."""
    limits: list[Argument] = ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=8192"]
    words: list[Argument] = [
        "--no-sr",
        "--filter=blocksize-policy",
        "memory",
        str(size),
        "blocksize-error-policy=error",
    ]
    with _served(
        folder, read_only, ["nbdkit", "--foreground", "--unix", folder / "nbd", *words, *limits]
    ) as device:
        yield device


@contextmanager
def client_of_qcow2(folder: Path, size: int, read_only: bool) -> Iterator[BlockDevice]:
    image = folder / "disk.qcow2"
    image.write_bytes(_empty_qcow2(size))
    command: list[Argument] = [
        "qemu-nbd",
        "--persistent",
        "--format=qcow2",
        f"--socket={folder / 'nbd'}",
        image,
    ]
    with _served(folder, read_only, command) as device:
        yield device


@functools.cache
def _empty_qcow2(size: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "disk.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
        return image.read_bytes()


@contextmanager
def _served(folder: Path, read_only: bool, command: list[Argument]) -> Iterator[BlockDevice]:
    """What a server that listens at the socket `nbd` in `folder` serves, through our client."""
    with spawn(*command) as server:
        wait_for_socket(folder / "nbd", server)
        with NbdDevice.open(f"nbd+unix:///?socket={folder / 'nbd'}", read_only=read_only) as device:
            yield device


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
