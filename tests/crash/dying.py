"""Lives that end at every step: `python -m tests.crash.dying LIFE DURABILITY FOLDER`.

A life is run again and again, each time by a fresh child on a disk of its own in `FOLDER/1`, `FOLDER/2`, …, and
dies of SIGKILL at its first step, its second, and so on, until one lives to its end. A step is the moment before or
after a system call that changes something, or before, inside or after a transaction. The product knows nothing of
it: the child wraps the calls. A life is a generator: what it does before its `yield` is only its youth, where nobody
dies. Prints a line for each death, its number and the step's name. The last line says `lived`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from lmdbitmap import linux, session
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.store import Store
from tests.support import make_raw_image
from tests.tracked import NAME, TrackedDisk

GRANULARITY_BITS = 9
BLOCK = 1 << GRANULARITY_BITS
BLOCKS = 5000
BEFORE = b"\x11" * BLOCK
"""What every block holds at the checkpoint `start`."""
OTHER = "sdb"


class Fate:
    """Counts the steps once youth is over, and ends the process at the one that is fatal."""

    def __init__(self, fatal_step: int) -> None:
        self.is_young = True
        self._steps_left = fatal_step
        self._fatal_step = fatal_step

    def __call__(self, name: str) -> None:
        if self.is_young:
            return
        self._steps_left -= 1
        if self._steps_left == 0:
            os.write(1, f"{self._fatal_step} {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def follow(self, place: object, name: str) -> None:
        call = getattr(place, name)

        def followed(*arguments: Any, **options: Any) -> Any:
            self(f"before {name}")
            answer = call(*arguments, **options)
            self(f"after {name}")
            return answer

        setattr(place, name, followed)

    def follow_transactions(self) -> None:
        update = Store.update

        def followed(store: Store, change: Callable[..., Any]) -> Any:
            def inside(writer: Any) -> Any:
                answer = change(writer)
                self("in a transaction")
                return answer

            self("before a transaction")
            answer = update(store, inside)
            self("after a transaction")
            return answer

        Store.update = followed  # type: ignore[method-assign, assignment]


def prepare(folder: Path, durability: str) -> TrackedDisk:
    """Two disks with known content and a checkpoint `start`, nothing dirty, nobody attached."""
    folder.mkdir()
    tracked = TrackedDisk(folder, BLOCKS * BLOCK, GRANULARITY_BITS, durability)
    other = make_raw_image(folder / "other.raw", BLOCKS * BLOCK)
    session.add(tracked.store, OTHER, str(other), granularity_bits=GRANULARITY_BITS, durability=durability)
    for image in (tracked.image, other):
        image.write_bytes(BEFORE * BLOCKS)
    for name in (NAME, OTHER):
        session.adopt(tracked.store, name)
        with Filter.attach(tracked.store, name, background=False) as disk:
            disk.checkpoint("start")
    return tracked


# --- lives ---

Life: TypeAlias = Iterator[None]


def attach_and_write(tracked: TrackedDisk) -> Filter:
    """Scattered, sequential and large writes, zeroes and a discard, with few extents armed at a time."""
    disk = tracked.attach(max_armed=3)
    for block in (5, 6, 7, 300, 4500, 900, 4999):
        disk.pwrite(b"new", block * BLOCK + 50)
    assert disk.lane().write_many([(n * 97 * BLOCK, memoryview(b"many")) for n in range(8)]) == {}
    disk.pwrite(b"large" * BLOCK * 30, 2000 * BLOCK - 3)
    disk.write_zeroes(3000 * BLOCK, 2 * BLOCK)
    disk.discard(3100 * BLOCK, 100 * BLOCK)
    return disk


def writing(tracked: TrackedDisk) -> Life:
    yield
    attach_and_write(tracked).abandon()


def passing(tracked: TrackedDisk) -> Life:
    disk = attach_and_write(tracked)
    yield
    disk.background_pass()
    disk.pwrite(b"between", 8 * BLOCK)
    disk.background_pass()
    disk.beat()
    disk.background_pass()
    disk.pwrite(b"later", 9 * BLOCK)
    disk.abandon()


def asking(tracked: TrackedDisk) -> Life:
    disk = attach_and_write(tracked)
    yield
    disk.changes(since="start")
    disk.pwrite(b"later", 10 * BLOCK)
    disk.abandon()


def checkpointing(tracked: TrackedDisk) -> Life:
    disk = attach_and_write(tracked)
    yield
    disk.checkpoint("both")
    disk.pwrite(b"later", 10 * BLOCK)
    disk.pwrite(b"later", 2000 * BLOCK)
    disk.abandon()


def checkpointing_two(tracked: TrackedDisk) -> Life:
    disk, other = attach_and_write(tracked), Filter.attach(tracked.store, OTHER, background=False)
    other.pwrite(b"new", 0)
    yield
    take_checkpoint([disk, other], "both")
    disk.pwrite(b"later", 10 * BLOCK)
    other.pwrite(b"later", BLOCK)
    for one in (disk, other):
        one.abandon()


def forgetting(tracked: TrackedDisk) -> Life:
    disk = attach_and_write(tracked)
    for number, name in enumerate(("monday", "tuesday", "wednesday")):
        disk.checkpoint(name)
        disk.pwrite(b"more", (20 + number) * BLOCK)
    yield
    disk.forget("tuesday")
    disk.forget("wednesday")  # the newest
    disk.pwrite(b"more", 30 * BLOCK)
    disk.forget("epoch-1")
    disk.abandon()


def growing(tracked: TrackedDisk) -> Life:
    disk = attach_and_write(tracked)
    yield
    disk.resize(6000 * BLOCK + 1)
    disk.pwrite(b"x", 6000 * BLOCK)
    disk.abandon()


def shrinking(tracked: TrackedDisk) -> Life:
    disk = attach_and_write(tracked)
    yield
    disk.resize(1000 * BLOCK + 1)
    disk.pwrite(b"x", 1000 * BLOCK)
    disk.abandon()


def detaching(tracked: TrackedDisk) -> Life:
    disk = attach_and_write(tracked)
    yield
    disk.detach()


def living_twice(tracked: TrackedDisk) -> Life:
    """Attached again after a death, so that extents of a dead owner are armed in the store."""
    attach_and_write(tracked).abandon()
    yield
    disk = tracked.attach(max_armed=2)
    for block in (5, 8, 301, 302, 4000):
        disk.pwrite(b"second life", block * BLOCK)
    disk.background_pass()
    disk.background_pass()
    disk.detach()


LIVES = {
    life.__name__: life
    for life in (
        writing, passing, asking, checkpointing, checkpointing_two, forgetting, growing, shrinking, detaching,
        living_twice,
    )
}  # fmt: skip


def main(life: str, durability: str, folder: str) -> None:
    number = 0
    died = True
    while died:
        number += 1
        child = os.fork()
        if child == 0:
            live(LIVES[life], durability, Path(folder, str(number)), number)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print("lived", flush=True)


def live(life: Callable[[TrackedDisk], Life], durability: str, folder: Path, fatal_step: int) -> None:
    tracked = prepare(folder, durability)
    fate = Fate(fatal_step)
    for call in ("pwrite", "ftruncate", "fdatasync", "fsync"):
        fate.follow(os, call)
    fate.follow(linux, "fallocate")
    fate.follow_transactions()
    for _ in life(tracked):
        fate.is_young = False
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
