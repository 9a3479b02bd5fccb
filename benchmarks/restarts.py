"""Restarts of the server: the time from the signal that ends it until the next server has answered a client.

The socket belongs to a service manager, as in contrib/, and the next client connects to it when the next server is
started. The manager's wait before that start (RestartSec) is not in the figure. Before each signal the server has armed
the most extents that it arms: a clean end has to write them out, and after a kill all of them are dirty.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import tracked
from benchmarks.table import Line

EXPORT = "disk"
EXTENT_BYTES = 64 << 16
ARMED = 1024
PATIENCE_S = 60.0
READ, WRITE = 0, 1
REQUEST = struct.Struct(">IHHQQI")
REPLY_BYTES = 16
PASSED = 'exec 3<&0 0</dev/null; export LISTEN_FDS=1; export LISTEN_PID=$$; exec "$@"'
"""A shell script that passes its standard input on as the socket that systemd would pass."""


class Disk(NamedTuple):
    name: str
    size: int
    all_dirty: bool
    """Whether every block was written since the newest checkpoint; otherwise none was."""


DISKS = [Disk("64 TiB sparse", 64 << 40, all_dirty=False), Disk("1 TiB all dirty", 1 << 40, all_dirty=True)]
SIGNALS = {"SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}


def measure(rounds: int = 5) -> Iterator[Line]:
    for disk in DISKS:
        with made(disk) as folder, listening() as listener:
            for name, number in SIGNALS.items():
                seconds = [restart(folder, listener, number) for _ in range(rounds)]
                yield Line(
                    f"restart, {name}, {disk.name}", statistics.median(seconds), "s", "", None, "< 1 s",
                    f"at most {max(seconds):.2g} s",
                )  # fmt: skip


@contextlib.contextmanager
def made(disk: Disk) -> Iterator[Path]:
    """Yield a folder on disk with a store that tracks the disk. The image is on tmpfs, where it may have any size."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        image = Path(memory) / "disk.raw"
        with image.open("xb") as file:
            file.truncate(disk.size)
        tracked.command(folder, "add", EXPORT, str(image), "--granularity", "64K")
        dirty_bytes = disk.size if disk.all_dirty else 0
        subprocess.run([sys.executable, "-m", "benchmarks.restarts", folder, str(dirty_bytes)], check=True)
        yield Path(folder)


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/nbd.sock")
        listener.listen()
        yield listener


def restart(folder: Path, listener: socket.socket, number: int) -> float:
    """Return the seconds from the signal on. The next server starts after the first, the disk's owner, has ended."""
    with server(folder, listener) as first, client(listener) as sock:
        for extent in range(ARMED):
            ask(sock, WRITE, extent * EXTENT_BYTES, b"x" * 512)
        start = time.monotonic()
        first.send_signal(number)
        first.wait(PATIENCE_S)
    with server(folder, listener), client(listener) as sock:
        ask(sock, READ, 0, b"")
        return time.monotonic() - start


@contextlib.contextmanager
def server(folder: Path, listener: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "lmdbitmap", "--store", f"{folder}/store", "serve", EXPORT]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            ["/bin/sh", "-c", PASSED, "sh", *command], stdin=listener.fileno(), stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE_S)


@contextlib.contextmanager
def client(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield a connection to the export, as soon as a server accepts it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(listener.getsockname())
        sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(EXPORT)) + EXPORT.encode())
        receive(sock, 18 + 10)
        yield sock


def ask(sock: socket.socket, command: int, offset: int, data: bytes) -> None:
    """Send one request of 512 bytes and receive its answer."""
    sock.sendall(REQUEST.pack(0x25609513, 0, command, offset, offset, 512) + data)
    reply = receive(sock, REPLY_BYTES if command == WRITE else REPLY_BYTES + 512)
    assert reply[:8] == b"\x67\x44\x66\x98\0\0\0\0", reply[:8]


def receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError("the server hung up")
        data += piece
    return data


def begin_period(folder: str, dirty_bytes: int) -> None:
    """Make a checkpoint and mark `dirty_bytes` as dirty, block for block, in a process that ends before the serving."""
    from lmdbitmap.filter import Filter
    from lmdbitmap.store import Store

    with Store.open(f"{folder}/store") as store, Filter.attach(store, EXPORT) as attached:
        attached.checkpoint("start")
        if dirty_bytes:
            attached.mark(0, dirty_bytes)


if __name__ == "__main__":
    begin_period(sys.argv[1], int(sys.argv[2]))
