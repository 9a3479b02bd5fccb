"""Where a life happens: a store and disks in a folder that was empty, and what it tells of itself.

What is told before something is done and after it was acknowledged is all that judging.py knows about it; what an
image held at a moment the recording itself tells. Lines of JSON go to /dev/null, where strace sees them between the
system calls.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from lmdbitmap import filter
from lmdbitmap.filter import Filter
from lmdbitmap.storage import owner
from lmdbitmap.store import Store
from lmdbitmap.tracker import session

GRANULARITY_BITS = 9
BLOCK = 1 << GRANULARITY_BITS
BLOCKS = 5000
"""A little more than one region."""
A, B = "sda", "sdb"
COPY = "copy"
STORE, REPOSITORY, SECOND_REPOSITORY = "store", "backups", "more-backups"
FLAT_FILE, RESTORED = "changes.dbm", "restored.raw"
_fsync = os.fsync
"""Without any flaw."""
_TOLD_TO = os.open(os.devnull, os.O_WRONLY)


def tell(what: str, **facts: Any) -> None:
    os.write(_TOLD_TO, json.dumps({"what": what, **facts}).encode())


@contextmanager
def telling(what: str, **facts: Any) -> Iterator[None]:
    """Say that it begins, and, if it succeeds, that it was acknowledged."""
    tell(what, phase="begun", **facts)
    yield
    tell(what, phase="done", **facts)


class Guest:
    """Who uses an attached disk. What it writes is never the same twice."""

    _stamps = itertools.count(1)

    def __init__(self, stage: Stage, name: str, **options: Any) -> None:
        self.name = name
        self.image = stage.image(name)
        options = {"max_armed": 3, "background": False} | options
        with telling("attach", disk=name):
            self.disk = Filter.attach(stage.store, name, **options)

    def write(self, block: int, count: int = 1, *, shift: int = 0, length: int | None = None) -> None:
        with self._changing():
            data = _stamped(next(self._stamps), count * BLOCK if length is None else length)
            self.disk.pwrite(data, block * BLOCK + shift)

    def write_many(self, blocks: Sequence[int]) -> None:
        with self._changing():
            data = memoryview(_stamped(next(self._stamps), 100))
            assert self.disk.lane().write_many([(block * BLOCK + 7, data) for block in blocks]) == {}

    def zero(self, block: int, count: int) -> None:
        with self._changing():
            self.disk.write_zeroes(block * BLOCK, count * BLOCK)

    def zero_by_hand(self, block: int, count: int) -> None:
        with self._changing():
            self.disk.write_zeroes(block * BLOCK, count * BLOCK, may_unmap=False)

    def discard(self, block: int, count: int) -> None:
        with self._changing():
            self.disk.discard(block * BLOCK, count * BLOCK)

    def resize(self, size: int) -> None:
        with self._changing(), telling("resize", disk=self.name, size=size):
            self.disk.resize(size)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        yield
        tell_mtime(self.name, self.image)

    def flush(self) -> None:
        with telling("flush", disk=self.name):
            self.disk.lane().flush()

    def checkpoint(self, name: str) -> None:
        checkpoint([self], name)

    def forget(self, name: str) -> None:
        with telling("forget", disk=self.name, name=name):
            self.disk.forget(name)

    def detach(self) -> None:
        with telling("detach", disk=self.name):
            self.disk.detach()

    def abandon(self) -> None:
        """As after `kill -9`: the machine goes on."""
        self.disk.abandon()

    def live_a_little(self) -> None:
        """Scattered, sequential and large writes, zeroes and a discard, with few extents armed at a time."""
        for block in (5, 6, 7, 300, 4500, 900, 4999):
            self.write(block, shift=50, length=20)
        self.write_many([n * 97 for n in range(6)])
        self.write(2000, 30, shift=-3)
        self.flush()
        self.zero(3000, 2)
        self.zero_by_hand(3010, 2)
        self.discard(3100, 100)


def tell_mtime(name: str, image: Path) -> None:
    tell("mtime", disk=name, mtime_ns=image.stat().st_mtime_ns)


def checkpoint(guests: Sequence[Guest], name: str) -> None:
    with telling("checkpoint", disks=[guest.name for guest in guests], name=name):
        filter.take_checkpoint([guest.disk for guest in guests], name)


def _stamped(stamp: int, length: int) -> bytes:
    unit = b"%07d " % stamp
    return (unit * (length // len(unit) + 1))[:length]


class Stage:
    """An empty folder, and what comes into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Store

    def image(self, name: str) -> Path:
        return self.folder / f"{name}.raw"

    def create_store(self) -> None:
        with telling("store"):
            self.store = Store.create(str(self.folder / STORE))

    def make_image(self, name: str, blocks: int = BLOCKS) -> None:
        """Sparse, with something here and there, and as durable as a file can be."""
        with self.image(name).open("xb", buffering=0) as image:
            image.truncate(blocks * BLOCK)
            for block in range(0, BLOCKS, 250):
                os.pwrite(image.fileno(), _stamped(0, 3 * BLOCK), block * BLOCK)
            os.pwrite(image.fileno(), _stamped(0, 40 * BLOCK), 3090 * BLOCK)
            _fsync(image.fileno())
        sync(self.folder)
        tell_mtime(name, self.image(name))

    def add(self, name: str, **options: Any) -> None:
        with telling("add", disk=name):
            session.add(self.store, name, str(self.image(name)), granularity_bits=GRANULARITY_BITS, **options)

    def prepare(self, *names: str, blocks: int = BLOCKS, **options: Any) -> None:
        """Disks that were tracked for a while: a checkpoint `start`, nothing dirty, nobody attached."""
        self.create_store()
        for name in names:
            self.make_image(name, blocks)
            self.add(name, **options)
            guest = self.attach(name)
            guest.checkpoint("start")
            guest.detach()
        tell("born")

    def attach(self, name: str, **options: Any) -> Guest:
        return Guest(self, name, **options)


def sync(path: Path) -> None:
    """A file or a folder, whatever the flaw."""
    descriptor = os.open(path, os.O_RDONLY)
    _fsync(descriptor)
    os.close(descriptor)


def reboot() -> None:
    """From now on this process believes to run after a reboot that comes after everything until now."""
    boot_id, boot_time_ns = str(uuid4()), time.time_ns()
    owner.boot_id = lambda: boot_id
    owner.boot_time_ns = lambda: boot_time_ns
