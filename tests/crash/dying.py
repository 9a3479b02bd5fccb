"""Lives that end at every step, for the fixture `deaths` (conftest.py).

A life (lives.py) is run again and again, each time by a fresh child on a disk of its own in `FOLDER/1`, `FOLDER/2`,
…, and dies of SIGKILL at its first step, its second, and so on, until one dies at its very end. A step is the
moment before a system call that changes a file or a folder, the moment inside a transaction when all is said but not
committed, and the moment after it: between two steps nothing changes that a survivor could find. The product knows
nothing of it: the child wraps the calls.

Children are forked by one process that has imported everything and done nothing: `python -m tests.crash.dying`. Each
line that it reads, `LIFE DURABILITY SIDE_BY_SIDE FOLDER`, is answered by what each child told the world, the step at
which it died, and that it is gone; after the last child comes an empty line. It does not wait for whoever looks at the
dead: the next ones live and die meanwhile.
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

from lmdbitmap.storage.schema import WRITE_AHEAD
from lmdbitmap.store import Store
from lmdbitmap.system import atomic_files, linux
from tests.crash.lives import ARCHIVE_LIVES, BLOCKS, FEW_BLOCKS, GROWN_UP, LIVES, Life, prepare
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.late_beats import let_beats_be_late

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
        self._is_answering = False
        self.graves = graves

    def __call__(self, life: str, durability: str = WRITE_AHEAD, *, side_by_side: int = 3) -> Iterator[Death]:
        """Live until each step of the life was the last one of some child: in the order of the steps."""
        told: dict[int, list[str]] = {}
        steps: dict[int, str] = {}
        gone: set[int] = set()
        looked_at = 0
        for line in self._asked(f"{life} {durability} {side_by_side} {self.graves}"):
            number, what, word = line.split(" ", 2)
            if what == "told":
                told.setdefault(int(number), []).append(word)
            elif what == "died":
                steps[int(number)] = word
            else:
                gone.add(int(number))
            while looked_at + 1 in gone:
                looked_at += 1
                if looked_at in steps:
                    yield Death(
                        self.graves / str(looked_at), steps[looked_at], tuple(told.get(looked_at, ()))
                    )
        assert len(steps) >= 3, "a life that dies too seldom proves nothing"
        assert len(gone) == looked_at > len(steps), "somebody was not looked at, or nobody outlived its end"

    def _asked(self, question: str) -> Iterator[str]:
        assert not self._is_answering, "it was not heard out"
        assert self._process.stdin is not None
        print(question, file=self._process.stdin, flush=True)
        self._is_answering = True
        yield from self._answer()
        assert not self._is_answering, "a child failed, and said why on standard error"

    def _answer(self) -> Iterator[str]:
        assert self._process.stdout is not None
        while self._is_answering and (line := self._process.stdout.readline()):
            self._is_answering = line != "\n"
            if self._is_answering:
                yield line.rstrip("\n")

    def hear_out(self) -> None:
        """Wait for the end of a life that nobody looks at any more."""
        for _ in self._answer():
            pass


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
        say(f"{self._fatal_step} {words}")

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
    let_beats_be_late()
    for line in sys.stdin:
        life, durability, side_by_side, folder = line.rstrip("\n").split(" ", 3)
        die_at_each_step(life, durability, Path(folder), int(side_by_side))
        say("")


def say(line: str) -> None:
    """In one piece, whoever else speaks."""
    os.write(1, f"{line}\n".encode())


def die_at_each_step(life: str, durability: str, folder: Path, side_by_side: int) -> None:
    """So many children live side by side. None is started once one of them outlived its end."""
    numbers, living = count(1), dict[int, int]()
    outlived = False
    while living or not outlived:
        while len(living) < side_by_side and not outlived:
            number = next(numbers)
            living[start(life, durability, folder / str(number), number)] = number
        child, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"{life}: child {living[child]} ended with {code}")
        outlived |= code == 0
        say(f"{living.pop(child)} gone {code}")


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
    fate.follow(atomic_files._NewFile, "write")
    fate.follow_transactions()
    for told in life(tracked):
        if told == GROWN_UP:
            fate.is_young = False
        else:
            fate.say(f"told {told}")
    fate("at the end")


if __name__ == "__main__":
    main()
