"""Lives that end at every step, for the fixture `deaths` (conftest.py).

A life (lives.py) is run again and again, each time by a fresh child on a disk of its own in `FOLDER/1`, `FOLDER/2`,
…, and dies of SIGKILL at its first step, its second, and so on, until one dies at its very end. A step is the
moment before a system call that changes a file or a folder, the moment inside a transaction when all is said but not
committed, and the moment after it: between two steps nothing changes that a survivor could find. The product knows
nothing of it: the child wraps the calls.

Children are forked by one process that has imported everything and done nothing: `python -m tests.crash.dying`. Each
line that it reads, `LIFE DURABILITY SIDE_BY_SIDE FOLDER`, is answered by what each child told the world, and the step
at which it died; then comes an empty line.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lmdbitmap import files, linux
from lmdbitmap.schema import WRITE_AHEAD
from lmdbitmap.store import Store
from tests.backed_up import BackedUpDisk
from tests.crash.lives import ARCHIVE_LIVES, BLOCKS, FEW_BLOCKS, GROWN_UP, LIVES, Life, prepare

CALLS = (
    "pwrite", "ftruncate", "truncate", "fdatasync", "fsync", "fchmod", "rename", "unlink", "mkdir", "copy_file_range",
)  # fmt: skip
"""What the product calls to change a file or a folder, apart from `open`."""
_OWN_NAME = re.compile(r"[0-9a-f]{16}\.partial$")


# --- for tests ---


@dataclass(frozen=True)
class Death:
    """One child: where it lay, the step at which it died (`before rename manifest.json`), what it told before."""

    folder: Path
    step: str
    told: tuple[str, ...]

    def __str__(self) -> str:
        return f"died {self.step}, {self.folder.name}"


class Deaths:
    """Asks the forking process, and reads what became of the children."""

    def __init__(self, process: subprocess.Popen[str], graves: Path) -> None:
        self._process = process
        self.graves = graves

    def __call__(self, life: str, durability: str = WRITE_AHEAD, *, side_by_side: int = 3) -> list[Death]:
        """Live until each step of the life was the last one of some child."""
        told: dict[str, list[str]] = {}
        steps: dict[str, str] = {}
        for line in self._asked(f"{life} {durability} {side_by_side} {self.graves}"):
            number, what, word = line.split(" ", 2)
            if what == "told":
                told.setdefault(number, []).append(word)
            else:
                steps[number] = word
        assert len(steps) >= 3, "a life that dies too seldom proves nothing"
        return [
            Death(self.graves / number, step, tuple(told.get(number, ()))) for number, step in steps.items()
        ]

    def _asked(self, question: str) -> Iterator[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(question, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line == "\n":
                return
            yield line.rstrip("\n")
        raise AssertionError("a child failed, and said why on standard error")


@contextmanager
def forking() -> Iterator[subprocess.Popen[str]]:
    """The process that forks, in a group of its own with its children: none of them outlives the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.crash.dying"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# --- the children ---


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
            self.say(f"died {name}")
            os.kill(os.getpid(), signal.SIGKILL)

    def say(self, words: str) -> None:
        os.write(1, f"{self._fatal_step} {words}\n".encode())

    def follow(self, place: object, name: str, counts: Callable[..., bool] = lambda *_: True) -> None:
        call = getattr(place, name)

        def followed(*arguments: Any, **options: Any) -> Any:
            if counts(*arguments):
                self(f"before {name} {_target(arguments)}".strip())
            return call(*arguments, **options)

        setattr(place, name, followed)

    def follow_transactions(self) -> None:
        update = Store.update

        def followed(store: Store, change: Callable[..., Any]) -> Any:
            def inside(writer: Any) -> Any:
                answer = change(writer)
                self("in a transaction")
                return answer

            answer = update(store, inside)
            self("after a transaction")
            return answer

        Store.update = followed  # type: ignore[method-assign, assignment]


def _target(arguments: tuple[Any, ...]) -> str:
    """The name of the file that a call makes, replaces or removes."""
    paths = [argument for argument in arguments if isinstance(argument, str)]
    return _OWN_NAME.sub("partial", os.path.basename(paths[-1])) if paths else ""


def _creates(_: object, flags: int, *__: object) -> bool:
    return bool(flags & os.O_CREAT)


def main() -> None:
    for line in sys.stdin:
        life, durability, side_by_side, folder = line.rstrip("\n").split(" ", 3)
        die_at_each_step(life, durability, Path(folder), int(side_by_side))
        print(flush=True)


def die_at_each_step(life: str, durability: str, folder: Path, side_by_side: int) -> None:
    """Children that live side by side are started together, and are the last if one of them outlives its end."""
    for first in count(1, side_by_side):
        numbers = range(first, first + side_by_side)
        children = [start(life, durability, folder / str(number), number) for number in numbers]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if not set(codes) <= {0, -signal.SIGKILL}:
            sys.exit(f"{life}: children ended with {codes}")
        if 0 in codes:
            return


def start(life: str, durability: str, folder: Path, fatal_step: int) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live(LIVES[life], durability, folder, fatal_step)
            code = 0
        finally:
            os._exit(code)
    return child


def live(life: Callable[[BackedUpDisk], Life], durability: str, folder: Path, fatal_step: int) -> None:
    tracked = prepare(folder, durability, BLOCKS if life not in ARCHIVE_LIVES else FEW_BLOCKS)
    fate = Fate(fatal_step)
    for call in CALLS:
        fate.follow(os, call)
    fate.follow(os, "open", _creates)
    fate.follow(linux, "fallocate")
    fate.follow(files._NewFile, "write")
    fate.follow_transactions()
    for told in life(tracked):
        if told == GROWN_UP:
            fate.is_young = False
        else:
            fate.say(f"told {told}")
    fate("at the end")


if __name__ == "__main__":
    main()
