"""The guest of io_errors.py, which falls ill: `python -m tests.crash.sick_guest LIFE FOLDER DISK`, under strace.

It starts thousands of times, so it imports what it needs and no more: with all that the inquest needs each start took
twice as long.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store

GRANULARITY_BITS = 9
BLOCK = 1 << GRANULARITY_BITS
BLOCKS = 4500
"""More than one region holds."""
SIZE = BLOCKS * BLOCK


class Diary:
    """What a guest was told, a line for each step. Survives its death, and is none of the files that fall ill."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = os.open(folder / "diary", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, *words: object) -> None:
        os.write(self._fd, json.dumps(words).encode() + b"\n")

    def attempt(self, step: str, act: Callable[[], object], *details: object) -> bool:
        """Do it and note how it ended. Only an error of ours, or one of the image, is an end that may be."""
        try:
            act()
        except LmdbitmapError as error:
            self.note(step, *details, getattr(error, "errno", None) or -1, str(error))
        except OSError as error:
            if step != "write":
                raise  # only the image's own refusal of a write comes through as it is
            self.note(step, *details, error.errno, str(error))
        else:
            self.note(step, *details, 0, "")
            return True
        return False

    def keep_image(self, disk: Filter, name: str) -> None:
        (self._folder / f"at-{name}").write_bytes(disk.pread(disk.size, 0))


class Guest:
    """Writes where nobody wrote, where somebody did, one after another, many at once; every byte tells which."""

    def __init__(self, folder: Path, disk: Filter, diary: Diary) -> None:
        self._disk = disk
        self._lane = disk.lane()
        self._diary = diary
        self._fill = 0

    def write(self, block: int, length: int = 100) -> None:
        self._fill += 1
        data, offset = bytes([self._fill]) * length, block * BLOCK + 50
        self._diary.attempt("write", lambda: self._lane.pwrite(data, offset), offset, length, self._fill)

    def write_many(self, *blocks: int) -> None:
        self._fill += 1
        data = bytes([self._fill]) * BLOCK
        failed = self._lane.write_many([(block * BLOCK, memoryview(data)) for block in blocks])
        for index, block in enumerate(blocks):
            self._diary.note("write", block * BLOCK, BLOCK, self._fill, failed.get(index, 0), "")

    def zero(self, block: int, count: int) -> None:
        place = block * BLOCK, count * BLOCK
        self._diary.attempt("write", lambda: self._lane.write_zeroes(*place), *place, 0)

    def checkpoint(self, name: str) -> None:
        self._diary.keep_image(self._disk, name)
        self._diary.attempt("checkpoint", lambda: self._disk.checkpoint(name), name)

    def do(self, step: str, act: Callable[[], object]) -> None:
        self._diary.attempt(step, act)

    def live(self) -> None:
        disk = self._disk
        for block in (5, 6, 7, 300, 5, 4499):
            self.write(block)
        self.write_many(100, 200, 4201, 5)
        self.do("pass", disk.background_pass)
        self.zero(400, 3)
        self.do("flush", self._lane.flush)
        self.do("beat", disk.beat)
        self.checkpoint("one")
        self.write(7)
        self.write(350, 3 * BLOCK)
        self.do("pass", disk.background_pass)
        self.do("pass", disk.background_pass)
        self.write(8)
        self.checkpoint("two")
        self.write(300)
        self.write_many(301, 450)
        self.do("forget", lambda: disk.forget("one"))
        self.do("grow", lambda: disk.resize(SIZE + 5 * BLOCK))
        self.write(9)
        self.do("changes", lambda: disk.changes(since="two"))
        self.write(10)


def dying(guest: Guest, disk: Filter) -> None:
    guest.live()
    os.kill(os.getpid(), signal.SIGKILL)


def leaving(guest: Guest, disk: Filter) -> None:
    guest.live()
    guest.do("detach", disk.detach)


LIVES = {life.__name__: life for life in (dying, leaving)}


def main(life: str, folder: str, name: str) -> None:
    diary = Diary(Path(folder))
    with Store.open(str(Path(folder, "store"))) as store:
        disks: list[Filter] = []
        attach = diary.attempt(
            "attach", lambda: disks.append(Filter.attach(store, name, max_armed=3, background=False))
        )
        if attach:
            LIVES[life](Guest(Path(folder), disks[0], diary), disks[0])
            disks[0].abandon()


if __name__ == "__main__":
    main(*sys.argv[1:])
