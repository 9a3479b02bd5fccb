"""Was anything lost? Every disk state is laid out where the recorded process had it, and asked as after a reboot.

What was acknowledged before the power went must be there, what had not begun must not, and what was between the
two is there as a whole or not at all. The truth about an image is what the recording says its readers saw at a
checkpoint; every block that differs from it now must be named, or nothing may be believed.

What there is of copies is judged in judging_copies.py.

A state is laid out in place, because a tracker knows its image by its inode; so there is one judge for a life at a
time. Clocks and ids are those of another boot.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from lmdbitmap import bits
from lmdbitmap.errors import Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file import bitmap_file
from lmdbitmap.flat_file.flatfile import FlatFile
from lmdbitmap.format import Flags
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain, session, standalone
from lmdbitmap.tracker.changes import Changes, changes
from lmdbitmap.upkeep.check import check_store
from lmdbitmap.upkeep.findings import Gravity
from tests.crash.power_cut.disk_states import NOTHING, SECTOR, DiskState, File
from tests.crash.power_cut.judging_copies import Copies
from tests.crash.power_cut.stage import BLOCK, FLAT_FILE, GRANULARITY_BITS, STORE
from tests.crash.power_cut.truth import Deed, Truth
from tests.helpers.tracked import blocks_of, trust_of

assert BLOCK == SECTOR, "a sector that differs is a block that differs"
_PROBE_BLOCK = 77
NEW_EPOCH = "new epoch"
Asking: TypeAlias = Callable[[str], Changes]
"""What changed since the checkpoint of that name?"""


def lay_out(root: Path, state: DiskState, lasting: Collection[str]) -> None:
    """Make the folder hold the state and nothing else. Files that stay keep their inodes, `lasting` ones also while
    they are not there: by its inode the product knows whether it is the file that it wrote."""
    for folder, folders, files in os.walk(root, topdown=False):
        for name in files:
            path = os.path.relpath(os.path.join(folder, name), root)
            if path not in state.files and path in lasting and not _aside(root, path).exists():
                os.replace(root / path, _aside(root, path))
            elif path not in state.files:
                os.unlink(root / path)
        for name in folders:
            if os.path.relpath(os.path.join(folder, name), root) not in state.folders:
                shutil.rmtree(os.path.join(folder, name))
    for name in state.folders:
        (root / name).mkdir(mode=0o700, exist_ok=True)
    for name in lasting:
        if name in state.files and _aside(root, name).exists():
            os.replace(_aside(root, name), root / name)
    for name, file in state.files.items():
        _write_out(root / name, file)


def _aside(root: Path, path: str) -> Path:
    return root.with_name(f"{root.name}-{path.replace('/', '-')}")


def _write_out(path: Path, file: File) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(descriptor, file.size)
        for number, sector in file.content.items():
            if sector != NOTHING:
                os.pwrite(descriptor, sector[: file.size - number * SECTOR], number * SECTOR)
    finally:
        os.close(descriptor)


class Judge:
    """Of one life. `trust` counts how answers could be believed, `reasons` why some could not."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.root = Path(truth.recording.root)
        self.trust: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        """How what was interrupted was done again: an oracle that copies all anew sees nothing wrong."""
        self.clean_blocks = 0
        """Blocks that were called clean, in all: an oracle that calls everything dirty is none."""

    def judge(self, state: DiskState, moment: int, luck: random.Random) -> None:
        """Raise `AssertionError`, or what the product raises, if anything was lost."""
        images = [f"{image}.raw" for image in self.truth.timed]
        lay_out(self.root, state, [*images, f"{STORE}/lmdb/data.mdb"])
        for image in sorted(self.truth.timed):
            mtimes = self.truth.mtimes(image, moment)
            mtime = luck.choice((mtimes[0], mtimes[-1], luck.choice(mtimes)))
            if f"{image}.raw" in state.files:
                os.utime(self.root / f"{image}.raw", ns=(mtime, mtime))
        _Case(self, state, moment).judge()

    def count(self, answer: Changes, blocks: set[int]) -> None:
        self.trust[trust_of(answer).value] += 1
        self.clean_blocks += answer.geometry.block_count - len(blocks)
        if trust_of(answer) is Trust.UNTRUSTED:
            self.reasons[answer.standing.reason or ""] += 1

    def count_epoch(self, untrusted: Untrusted) -> None:
        self.trust[NEW_EPOCH] += 1
        self.reasons[untrusted.problem.split(": ", 1)[-1]] += 1


class _Case:
    """One state at one moment."""

    def __init__(self, judge: Judge, state: DiskState, moment: int) -> None:
        self.judge_ = judge
        self.truth = judge.truth
        self.root = judge.root
        self.state = state
        self.moment = moment

    def judge(self) -> None:
        with closing(self._store()) as store:
            disks = [disk for disk in self.truth.images if self._has_disk(store, disk)]
            self._checkpoints_are_right(store, disks)
            self._bitmaps_are_right(store)
            self._flat_file_is_right(store)
            copies = Copies(self.truth, self.root, self.moment, self.judge_.ways)
            copies.are_right()
            for disk in disks:
                self._changes_are_named(store, disk)
            for disk in disks:
                self._life_goes_on(store, disk)
            copies.go_on(store)
            gravest = [finding for finding in check_store(store) if finding.gravity is Gravity.DAMAGE]
            assert not gravest, f"check found {gravest}"

    # -- what is there -----------------------------------------------------------------------------------

    def _store(self) -> Store:
        path = str(self.root / STORE)
        if self.truth.done("store", self.moment):
            return Store.open(path)
        return Store.create(path)  # nothing was promised yet, but making it must work

    def _has_disk(self, store: Store, disk: str) -> bool:
        """Whether it is there, which must be so or not; what was not promised is added."""
        added, removed = self.truth.of("add", disk), self.truth.of("remove", disk)
        with store.read() as reader:
            is_there = any(found.name == disk for found in reader.disks())
        if added[0].begun > self.moment or (removed and removed[0].done <= self.moment):
            assert not is_there, f"disk {disk} is there"
        elif added[0].done <= self.moment and not (removed and removed[0].begun <= self.moment):
            assert is_there, f"disk {disk} was added, and is gone"
        if not is_there:
            session.add(store, disk, str(self.root / f"{disk}.raw"), granularity_bits=GRANULARITY_BITS)
        return True

    def _checkpoints_are_right(self, store: Store, disks: list[str]) -> None:
        with store.read() as reader:
            found = {
                disk: {c.name for c in reader.checkpoints(chain.find_disk(reader, disk).uuid)}
                for disk in disks
            }
        for deed in self.truth.of("checkpoint"):
            there = {disk: deed.name in found[disk] for disk in deed.told["disks"]}
            assert len(set(there.values())) == 1 or self._forgets(deed), f"checkpoint {deed.name!r}: {there}"
            for disk, is_there in there.items():
                self._is_as_promised(deed, disk, is_there)

    def _is_as_promised(self, deed: Deed, disk: str, is_there: bool) -> None:
        forgotten = [f for f in self.truth.of("forget", disk) if f.name == deed.name]
        removed = self.truth.of("remove", disk)
        if is_there:
            assert deed.begun <= self.moment, f"checkpoint {deed.name!r} is there before it was made"
            assert all(f.done > self.moment for f in forgotten), f"checkpoint {deed.name!r} was forgotten"
        elif deed.done <= self.moment:
            assert any(d.begun <= self.moment for d in [*forgotten, *removed]), (
                f"checkpoint {deed.name!r} is gone"
            )

    def _forgets(self, deed: Deed) -> bool:
        return any(f.name == deed.name and f.begun <= self.moment for f in self.truth.of("forget"))

    def _acknowledged(self, store: Store, disk: str) -> list[Deed]:
        """The checkpoints that somebody was told of, and that are still there."""
        with store.read() as reader:
            names = {c.name for c in reader.checkpoints(chain.find_disk(reader, disk).uuid)}
        return [
            deed
            for deed in self.truth.of("checkpoint", disk)
            if deed.done <= self.moment and deed.name in names
        ]

    # -- what changed ------------------------------------------------------------------------------------

    def _changes_are_named(self, store: Store, disk: str) -> None:
        """As somebody asks who does not own the disk, before anybody has."""
        points = self._acknowledged(store, disk)
        for deed in points:
            self._names_all(lambda since: changes(store, disk, since=since), disk, deed)
        for first, last in pairwise(points):
            self._names_closed_period(store, disk, first, last)

    def _names_closed_period(self, store: Store, disk: str, first: Deed, last: Deed) -> None:
        try:
            answer = changes(store, disk, since=first.name, until=last.name)
        except Untrusted:
            return
        before, after = (self.truth.at_checkpoint(disk, deed) for deed in (first, last))
        missing = _differing_blocks(answer, before, after) - blocks_of(answer)
        assert not missing, f"{disk} from {first.name!r} to {last.name!r}: {_told(missing)} are called clean"

    def _names_all(self, ask: Asking, disk: str, deed: Deed) -> None:
        try:
            answer = ask(deed.name)
        except Untrusted as untrusted:
            self.judge_.count_epoch(untrusted)
            return
        named = blocks_of(answer)
        self.judge_.count(answer, named)
        before = self.truth.at_checkpoint(disk, deed)
        missing = _differing_blocks(answer, before, self._image(disk)) - named
        assert not missing, f"{disk} since {deed.name!r}: {_told(missing)} are called clean"

    def _image(self, disk: str) -> File:
        return self.state.files[f"{disk}.raw"]

    def _life_goes_on(self, store: Store, disk: str) -> None:
        points = self._acknowledged(store, disk)
        with Filter.attach(store, disk, background=False) as attached:
            assert attached.size == self._image(disk).size
            if self.truth.of("flat file taken in"):
                bitmap_file.begin(attached, self.root / FLAT_FILE)
            for deed in points:
                self._names_all(lambda since: attached.changes(since=since), disk, deed)
            attached.checkpoint("afterwards")
            attached.pwrite(b"afterwards", _PROBE_BLOCK * BLOCK)
            answer = attached.changes(since="afterwards")
            assert (blocks_of(answer), trust_of(answer)) == ({_PROBE_BLOCK}, Trust.EXACT)
        answer = changes(store, disk, since="afterwards")
        assert (blocks_of(answer), trust_of(answer)) == ({_PROBE_BLOCK}, Trust.EXACT)

    # -- files -------------------------------------------------------------------------------------------

    def _flat_file_is_right(self, store: Store) -> None:
        """One that says that it can be believed must name all; one that was exported must be there, and whole."""
        path, exports = self.root / FLAT_FILE, self.truth.done("export", self.moment)
        if not path.exists():
            assert not exports, "an exported file is gone"
            return
        with FlatFile.open(path) as file:
            if Flags.CLEAN not in file.header.flags:
                assert self.truth.of("flat file taken in"), "a file is there that is not whole"
                return
            file.prove()
            named = _blocks_of_file(file)
            since = next(d for d in self.truth.of("checkpoint") if d.name == file.metadata["checkpoint"])
        disk = since.told["disks"][0]
        now = self._image(disk)
        if self.truth.of("export"):
            now = self.truth.seen(disk, (exports or self.truth.of("export"))[-1 if exports else 0].begun)
        elif self.truth.of("import"):
            return
        missing = set(now.differing_sectors(self.truth.at_checkpoint(disk, since))) - named
        assert not missing, f"{FLAT_FILE} calls {_told(missing)} clean"

    def _bitmaps_are_right(self, store: Store) -> None:
        imports = self.truth.of("import")
        if all(deed.begun > self.moment for deed in imports):
            return
        with store.read() as reader:
            bitmaps = {bitmap.name: bitmap for bitmap in reader.bitmaps()}
        with FlatFile.open(self.root / FLAT_FILE) as file:
            named = _blocks_of_file(file)
        for deed in imports:
            bitmap = bitmaps.get(deed.told["bitmap"])
            assert bitmap is not None or deed.done > self.moment, f"bitmap {deed.told['bitmap']} is gone"
            if bitmap is not None:
                assert deed.begun <= self.moment, (
                    f"bitmap {deed.told['bitmap']} is there before it was imported"
                )
                assert {b for run in standalone.runs(store, bitmap) for b in range(*run)} == named
            if "into" in deed.told and deed.done <= self.moment:
                try:
                    answer = changes(store, deed.told["into"], since=deed.told["since"])
                except Untrusted:
                    continue
                assert named <= blocks_of(answer), "what was merged is called clean"


def _differing_blocks(answer: Changes, before: File, after: File) -> set[int]:
    """Where the image changed, as far as it and the disk reach now: the last block may be short."""
    size = min(answer.geometry.size, after.size)
    return set(File.cut(size, before.content).differing_sectors(File.cut(size, after.content)))


def _blocks_of_file(file: FlatFile) -> set[int]:
    header = file.header
    data = os.pread(file.fd, header.bits_size, header.header_size)
    return {block for run in bits.runs(data, 0, header.bit_count) for block in range(*run)}


def _told(blocks: set[int]) -> str:
    shown = ", ".join(map(str, sorted(blocks)[:5]))
    return f"{len(blocks)} changed blocks ({shown}{', …' if len(blocks) > 5 else ''})"
