"""Bit rot: any page of the store's file damaged in any way, and what is said of the disks then.

A store is made once, with everything in it that a store can have, in many pages, and with the truth beside it: which
blocks were written since when. Each damage is done to a copy; a child opens it, asks every question, then goes
on as an owner would (writes, takes a checkpoint, asks again), and every answer is held against the truth.

| verdict   | what it means                                                                   |
|-----------|---------------------------------------------------------------------------------|
| `right`   | every block that was written is named, and nothing more                         |
| `dirty`   | more is named, because something was found to be lost                           |
| `refused` | one clear error of ours                                                         |
| `died`    | LMDB took the process with it: ugly, but nobody was told that a block is clean  |
| `silent`  | a written block is called clean: what must never be                             |

`python -m tests.crash.bit_rot FOLDER SEED FIRST COUNT` tries COUNT damages, each in a child that it forks, and prints
a line for each: the kind of damage, a tab, and the verdict with what it was reached by.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from lmdbitmap.bits import Run
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.storage import environment
from lmdbitmap.store import Store
from lmdbitmap.tracker.changes import changes
from lmdbitmap.upkeep.check import check_store
from lmdbitmap.upkeep.findings import Gravity
from tests.helpers.tracked import NAME, TrackedDisk

PAGE_BYTES = 4096
SECTOR_BYTES = 512
BLOCK = 512
REGIONS = 60
BLOCKS = REGIONS * REGION_BLOCKS
CASE_PATIENCE_S = 20
DAMAGES_AT_FULL_LENGTH = 2400
DAMAGES_PER_PROCESS = 20
VERDICTS = ("right", "dirty", "refused", "died", "silent")

Truth: TypeAlias = dict[str, list[int]]
"""The blocks that were written since each checkpoint."""


# --- the store, before ---


def make(folder: Path) -> None:
    """FOLDER/store, FOLDER/disk.raw, FOLDER/truth, and FOLDER/older: the file as it was some transactions ago."""
    folder.mkdir()
    tracked = TrackedDisk(folder, BLOCKS * BLOCK, 9)
    random_blocks = random.Random(7)
    written: dict[str, set[int]] = {}

    def write(disk: Filter, count: int) -> None:
        for block in random_blocks.sample(range(BLOCKS), count):
            disk.pwrite(b"new", block * BLOCK)
            for blocks in written.values():
                blocks.add(block)

    with tracked.attach(max_armed=8) as disk:
        for number in range(8):
            disk.checkpoint(f"c{number}")
            written[f"c{number}"] = set()
            write(disk, 150)
            disk.background_pass()
        disk.forget("c4")
        del written["c4"]
        shutil.copy(folder / "store" / "lmdb" / "data.mdb", folder / "older")
        write(disk, 40)
    tracked.close()
    truth: Truth = {name: sorted(blocks) for name, blocks in written.items()}
    (folder / "truth").write_text(json.dumps(truth))


# --- damages: each changes the bytes of a file, and says what it did ---

Damage: TypeAlias = Callable[[bytearray, bytes, random.Random], str]


def flip_a_bit(data: bytearray, older: bytes, chance: random.Random) -> str:
    position, bit = chance.randrange(len(data)), chance.randrange(8)
    data[position] ^= 1 << bit
    return f"bit {bit} of byte {position} (page {position // PAGE_BYTES})"


def flip_bits_of_one_page(data: bytearray, older: bytes, chance: random.Random) -> str:
    page = _page(data, chance)
    for _ in range(chance.randrange(2, 20)):
        data[page * PAGE_BYTES + chance.randrange(PAGE_BYTES)] ^= 1 << chance.randrange(8)
    return f"page {page}"


def flip_in_a_page_header(data: bytearray, older: bytes, chance: random.Random) -> str:
    """Where LMDB keeps what a page is and where its nodes are."""
    page, place = _page(data, chance), chance.randrange(48)
    data[page * PAGE_BYTES + place] ^= 1 << chance.randrange(8)
    return f"byte {place} of page {page}"


def flip_in_a_meta_page(data: bytearray, older: bytes, chance: random.Random) -> str:
    page, place = chance.randrange(2), chance.randrange(168)
    data[page * PAGE_BYTES + place] ^= 1 << chance.randrange(8)
    return f"byte {place} of meta page {page}"


def zero_a_sector(data: bytearray, older: bytes, chance: random.Random) -> str:
    return _overwrite(data, chance, SECTOR_BYTES, bytes(SECTOR_BYTES))


def garble_a_sector(data: bytearray, older: bytes, chance: random.Random) -> str:
    return _overwrite(data, chance, SECTOR_BYTES, chance.randbytes(SECTOR_BYTES))


def zero_a_page(data: bytearray, older: bytes, chance: random.Random) -> str:
    return _overwrite(data, chance, PAGE_BYTES, bytes(PAGE_BYTES))


def swap_pages(data: bytearray, older: bytes, chance: random.Random) -> str:
    one, other = _page(data, chance), _page(data, chance)
    here, there = (slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES) for page in (one, other))
    data[here], data[there] = data[there], data[here]
    return f"{one} and {other}"


def bring_an_old_page_back(data: bytearray, older: bytes, chance: random.Random) -> str:
    """A write that never reached the disk: the page is whole, and what it was."""
    pages = range(0, min(len(data), len(older)), PAGE_BYTES)
    changed = [at for at in pages if data[at : at + PAGE_BYTES] != older[at : at + PAGE_BYTES]]
    at = chance.choice(changed)
    data[at : at + PAGE_BYTES] = older[at : at + PAGE_BYTES]
    return f"page {at // PAGE_BYTES}"


def cut_off(data: bytearray, older: bytes, chance: random.Random) -> str:
    del data[chance.randrange(len(data)) :]
    return f"at {len(data)}"


DAMAGES: tuple[Damage, ...] = (
    flip_a_bit, flip_bits_of_one_page, flip_in_a_page_header, flip_in_a_meta_page, zero_a_sector, garble_a_sector,
    zero_a_page, swap_pages, bring_an_old_page_back, cut_off,
)  # fmt: skip


def _page(data: bytearray, chance: random.Random) -> int:
    return chance.randrange(len(data) // PAGE_BYTES)


def _overwrite(data: bytearray, chance: random.Random, length: int, content: bytes) -> str:
    at = chance.randrange(len(data) // length) * length
    data[at : at + length] = content
    return f"{length} bytes at {at}"


# --- judging, in a child of its own ---


def pretend_it_is_tracked(path: Path, tracked: ImageIdentity) -> None:
    """From now on every image that is opened is this one, and in the eyes of continuity the one that was tracked."""
    open_it, identity = FileDevice.open, FileDevice.identity

    def open_ours(_: str, **options: Any) -> FileDevice:
        return open_it(str(path), **options)

    def identity_of_tracked(device: FileDevice) -> ImageIdentity:
        return identity(device)._replace(device=tracked.device, inode=tracked.inode)

    FileDevice.open = staticmethod(open_ours)  # type: ignore[method-assign, assignment]
    FileDevice.identity = identity_of_tracked  # type: ignore[method-assign, assignment]


def judge(folder: Path, truth: Truth) -> str:
    """The verdict on all answers that the damaged store in the folder gives, and what it was reached by."""
    try:
        with Store.open(str(folder / "store")) as store:
            verdicts = [_judge_answer(store, name, set(blocks)) for name, blocks in truth.items()]
            verdicts.append(_judge_check(store, _worst(verdicts)))
            verdicts.append(_judge_further_life(store, truth))
    except LmdbitmapError as error:
        return f"refused: {error}"
    return _worst(verdicts)


def _worst(verdicts: list[str]) -> str:
    return max(verdicts, key=lambda said: VERDICTS.index(said.partition(":")[0]))


def _judge_answer(store: Store, since: str, written: set[int]) -> str:
    try:
        answer = changes(store, NAME, since=since)
        named = list(answer.runs())
        trust = answer.summary.standing.trust
    except LmdbitmapError as error:
        return f"refused: {error}"
    missing = sorted(block for block in written if not _is_in(block, named))
    if missing:
        return f"silent: since {since}, {len(missing)} blocks such as {missing[0]}, {trust}"
    return "right" if sum(stop - start for start, stop in named) == len(written) else f"dirty: {trust}"


def _is_in(block: int, runs: list[Run]) -> bool:
    position = bisect_right(runs, (block, BLOCKS))
    return position > 0 and runs[position - 1][0] <= block < runs[position - 1][1]


def _judge_check(store: Store, answers: str) -> str:
    """What has an answer that is not right, `check` must have a finding about."""
    try:
        findings = check_store(store)
    except LmdbitmapError as error:
        return f"refused: {error}"
    sound = not any(finding.gravity >= Gravity.DISTRUST for finding in findings)
    return f"silent: check finds nothing, and: {answers}" if sound and answers != "right" else "right"


def _judge_further_life(store: Store, truth: Truth) -> str:
    """What an owner writes on top of the damage must be known as well, and nothing from before forgotten by it."""
    more = [5, 100 * 64, BLOCKS - 1, 30 * REGION_BLOCKS, 30 * REGION_BLOCKS + 77]
    try:
        with Filter.attach(store, NAME, background=False, max_armed=4) as disk:
            for block in more:
                disk.pwrite(b"later", block * BLOCK)
            disk.checkpoint("later")
            disk.pwrite(b"last", 9 * BLOCK)
            disk.forget("c5")
    except LmdbitmapError as error:
        return f"refused: {error}"
    asked = [name for name in truth if name != "c5"][::3]  # each sees all that is newer
    verdicts = [_judge_answer(store, name, {*truth[name], *more, 9}) for name in asked]
    return _worst([*verdicts, _judge_answer(store, "later", {9})])


# --- many of them ---


class Laboratory:
    """Damaged copies of one sound store, as many as one likes."""

    def __init__(self, sound: Path) -> None:
        self.sound = sound
        self.truth: Truth = json.loads((sound / "truth").read_text())
        self.data = (sound / "store" / "lmdb" / "data.mdb").read_bytes()
        self.older = (sound / "older").read_bytes()
        image = FileDevice.open(str(sound / "disk.raw"), read_only=True)
        self.image = image.identity()
        image.close()

    def try_one(self, seed: str) -> str:
        chance, data = random.Random(seed), bytearray(self.data)
        damage = chance.choice(DAMAGES)
        done = damage(data, self.older, chance)
        folder = self.sound.parent / seed
        try:
            self._lay_out(folder, data)
            is_large = chance.random() < 0.5
            said = self._judged(folder, is_large)
            return f"{damage.__name__}\t{said} after {damage.__name__} of {done} ({seed}, large: {is_large})"
        finally:
            shutil.rmtree(folder)

    def _lay_out(self, folder: Path, data: bytearray) -> None:
        """A store with that file, and an image that nobody wrote since."""
        ignored = shutil.ignore_patterns("data.mdb", "lock.mdb")
        shutil.copytree(self.sound / "store", folder / "store", ignore=ignored)
        (folder / "store" / "lmdb" / "data.mdb").write_bytes(data)
        with (folder / "disk.raw").open("xb") as image:
            image.truncate(self.image.size)
        mtime_ns = self.image.mtime_ns
        os.utime(folder / "disk.raw", ns=(mtime_ns, mtime_ns))

    def _judged(self, folder: Path, is_large: bool) -> str:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self._answer(folder, writer, is_large)
        os.close(writer)
        with open(reader, encoding="utf-8") as answers:
            said = answers.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGALRM:
            return "silent: it hangs"
        return said or f"died: of signal {-code}"

    def _answer(self, folder: Path, writer: int, is_large: bool) -> None:
        """In the child: its one line, unless LMDB ends it before. A large store is not looked through when opened."""
        if is_large:
            environment.LOOKED_THROUGH_BYTES = 0
        signal.alarm(CASE_PATIENCE_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where LMDB says what it died of
        pretend_it_is_tracked(folder / "disk.raw", self.image)
        try:
            said = judge(folder, self.truth)
        except BaseException:
            said = f"silent: no error of ours: {traceback.format_exc()}"
        os.write(writer, said.replace("\n", " | ").encode())
        os._exit(0)


def main(sound: str, seed: str, first: str, count: str) -> None:
    logging.disable()
    laboratory = Laboratory(Path(sound))
    for number in range(int(first), int(first) + int(count)):
        print(laboratory.try_one(f"{seed}-{number}"), flush=True)


def verdicts(seed: int, count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """(kind of damage, verdict) of `count` damages that follow from the seed."""
    make(folder / "sound")

    def some(first: int) -> list[str]:
        words = [folder / "sound", seed, first, min(DAMAGES_PER_PROCESS, count - first)]
        command = [sys.executable, "-m", "tests.crash.bit_rot", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    with ThreadPoolExecutor(os.cpu_count()) as several:
        for lines in several.map(some, range(0, count, DAMAGES_PER_PROCESS)):
            for line in lines:
                kind, _, said = line.partition("\t")
                yield kind, said


@contextlib.contextmanager
def quick_place() -> Iterator[Path]:
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=in_memory, prefix="lmdbitmap-test-") as folder:
        yield Path(folder)


def torture(seed: int, scale: float) -> str:
    """One line of figures. Raises `AssertionError` at a silent loss."""
    told: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    with quick_place() as folder:
        for kind, said in verdicts(seed, max(1, int(DAMAGES_AT_FULL_LENGTH * scale)), folder):
            verdict = verdict_of(said)
            assert verdict != "silent", said
            told[verdict] += 1
            kinds.setdefault(kind, Counter())[verdict] += 1
    each = "; ".join(f"{kind} {_figures(kinds[kind])}" for kind in sorted(kinds))
    return f"{told.total()} damages, none silent: {_figures(told)} ({each})"


def verdict_of(said: str) -> str:
    return said.partition(":")[0].partition(" ")[0]


def _figures(counted: Counter[str]) -> str:
    return " ".join(f"{verdict} {counted[verdict]}" for verdict in VERDICTS if counted[verdict])


if __name__ == "__main__":
    main(*sys.argv[1:])
