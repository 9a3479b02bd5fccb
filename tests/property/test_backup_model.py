"""Random lives of a disk with two repositories, beside a naive model: sets of blocks, and copies of everything.

The model says of every backup which type it must have and how many bytes it must store, and keeps what the disk
held; at the end every restore point of both repositories is compared with that. A repository that was not used for
long loses its hold to whoever comes next, and then only reads the disk once more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from lmdbitmap.backups.consumers import drop_hold, holds_of
from lmdbitmap.errors import InvalidArgument
from lmdbitmap.extents import Trust
from lmdbitmap.notes.holds import DROPPED as HOLD_DROPPED
from lmdbitmap.notes.holds import LAPSED as HOLD_LAPSED
from lmdbitmap.notes.holds import Hold, hold_files
from lmdbitmap.repository.manifest import BackupEntry, BackupType
from lmdbitmap.restoring.restore import restore
from lmdbitmap.storage.schema import DEFERRED, WRITE_AHEAD
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, RESCAN
from tests.helpers.tracked import NAME
from tests.property.random_disk import BLOCK, UnluckyDisk, sizes

LONG_AGO_NS = 1
KILLS = 2
"""In one life: each costs a process."""

repositories = st.sampled_from(["left", "right"])
kinds = st.sampled_from([INCREMENTAL, INCREMENTAL, DIFFERENTIAL, FULL])


@dataclass
class Point:
    """A backup as the model sees it, and the blocks that were changed since."""

    entry: BackupEntry
    content: bytes
    epoch: int
    changed: set[int] = field(default_factory=set)


class Lives(UnluckyDisk):
    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, list[Point]] = {"left": [], "right": []}
        self.forgotten: set[str] = set()
        self.ended: dict[str, str] = {}
        """Checkpoints whose hold ended, and the reason's code."""
        self.unused: set[str] = set()
        """Repositories that were not used for long."""
        self.dropped: set[str] = set()
        self.killed_in: set[str] = set()
        self.kills = 0
        self.names = 0

    @initialize(durability=st.sampled_from([WRITE_AHEAD, DEFERRED]), size=sizes)
    def begin(self, durability: str, size: int) -> None:
        self.begin_with(size, durability)

    # -- what happens to the disk --------------------------------------------------------------------------

    def note_changed(self, blocks: set[int]) -> None:
        for points in self.points.values():
            for point in points:
                point.changed |= blocks

    def note_resized(self, size: int) -> None:
        for points in self.points.values():
            for point in points:
                point.changed = {block for block in point.changed if block * BLOCK < size}

    @precondition(lambda self: any(self.points.values()))
    @rule(which=st.integers(0, 100), then=st.none() | repositories)
    def go_back_to_a_backup(self, which: int, then: str | None) -> None:
        """In place, through the tracker: what differs is changed, and nothing else."""
        points = [(of, point) for of in self.points for point in self.points[of]]
        fitting = [(of, point) for of, point in points if len(point.content) == self.size]
        of, point = (fitting or points)[which % len(fitting or points)]
        before = self.disk.content()
        if len(point.content) != self.size:
            with pytest.raises(InvalidArgument):
                self._go_back(of, point)
            assert self.disk.content() == before
            return
        self._go_back(of, point)
        assert self.disk.content() == point.content
        self.note_changed(
            {
                offset // BLOCK
                for offset in range(0, self.size, BLOCK)
                if before[offset : offset + BLOCK] != point.content[offset : offset + BLOCK]
            }
        )
        if then is not None:
            self.back_up(then, INCREMENTAL)

    def _go_back(self, of: str, point: Point) -> None:
        folder = self.disk.folder / of
        restore(folder, NAME, self.disk.image, at=point.entry.id, in_place=True, store=self.disk.store)

    @rule()
    def checkpoint_of_its_own(self) -> None:
        self.names += 1
        with self.disk.attach() as attached:
            attached.checkpoint(f"mine{self.names}")

    @rule(which=st.integers(0, 100))
    def forget_a_checkpoint(self, which: int) -> None:
        with self.disk.attach() as attached:
            names = self.disk.checkpoints()
            name = names[which % len(names)]
            with contextlib.suppress(InvalidArgument):  # the only one of its epoch
                attached.forget(name)
                self.forgotten.add(name)

    # -- backups -------------------------------------------------------------------------------------------

    @rule(to=repositories, kind=kinds, digest=st.sampled_from([None, None, "sha256", "blake3"]))
    def back_up(self, to: str, kind: BackupType, digest: str | None = None) -> None:
        parent = self._parent(to, kind)
        is_known = parent is not None and self._is_known_since(parent)
        dead = {hold.under_way.name for hold in holds_of(self.disk.store, NAME) if hold.under_way}
        before = self.points[to][-1].entry.digest_algorithm.value if self.points[to] else "blake3"
        entry = self.disk.backup(kind, to, digest=digest)
        usual = "blake3" if kind is FULL else before
        assert entry.digest_algorithm.value == (digest or usual)
        self.killed_in.discard(to)
        for of in (self.unused, self.dropped):
            of.discard(to)
        self._holds_end(HOLD_LAPSED, *self.unused)
        self._holds_end(HOLD_DROPPED, *self.dropped)
        assert not dead & set(self.disk.checkpoints()), "what died is merged away by whoever comes next"
        assert all(hold.under_way is None for hold in holds_of(self.disk.store, NAME))
        assert (entry.type_requested, entry.disk_size) == (kind, self.size)
        if parent is None or (kind is DIFFERENTIAL and not is_known):
            assert (entry.type_actual, entry.bytes_changed) == (FULL, self.size)
            assert (entry.reason is None) == (kind is FULL)
        elif is_known:
            assert (entry.type_actual, entry.parent) == (kind, parent.entry.id)
            self._check_bytes(entry, parent, parent.changed)
        else:
            assert (entry.type_actual, entry.parent) == (RESCAN, parent.entry.id)
            assert entry.reason is not None
            assert entry.reason.code in self._reasons(parent)
            self._check_bytes(entry, parent, differing(self.disk.content(), parent.content))
        self._note(to, entry)
        assert self.disk.restored(to=to) == self.points[to][-1].content

    def _parent(self, to: str, kind: BackupType) -> Point | None:
        """The backup that the next one is stacked on; None if it is a full one."""
        wanted = (FULL,) if kind is DIFFERENTIAL else tuple(BackupType)
        found = [point for point in self.points[to] if point.entry.type_actual in wanted]
        return None if kind is FULL or not found else found[-1]

    def _is_known_since(self, point: Point) -> bool:
        name = point.entry.checkpoint.name
        return point.epoch == self.epoch and name not in self.forgotten and name not in self.ended

    def _reasons(self, point: Point) -> set[str]:
        """Codes that say why nobody knows what changed since; one that went by hand may have had a hold that ended."""
        name = point.entry.checkpoint.name
        if point.epoch != self.epoch:
            return {"new-epoch"}
        if name in self.forgotten:
            return {"checkpoint-forgotten", HOLD_LAPSED, HOLD_DROPPED}
        return {self.ended[name]}

    @rule(of=repositories)
    def be_unused_for_long(self, of: str) -> None:
        """Its next backup, if it is the first to come, finds all as it was."""
        for file in hold_files(self.disk.store.path, self.disk.disk().uuid):
            with file.locked():
                if file.hold is not None and self._is_of(file.hold, of):
                    file.replace(dataclasses.replace(file.hold, used_ns=LONG_AGO_NS))
                    self.unused.add(of)

    @rule(of=repositories)
    def drop_what_it_holds(self, of: str) -> None:
        """Once more, and no note says any longer why. A run that died may have left a note of its own, in any order."""
        dropped = [hold for hold in holds_of(self.disk.store, NAME) if self._is_of(hold, of)]
        for hold in dropped:
            drop_hold(self.disk.store, NAME, str(hold.holder))
        if dropped:
            self.dropped.add(of)
            self._holds_end(HOLD_DROPPED, of)
        if any(hold.ended is not None and not hold.checkpoints for hold in dropped):
            self.forgotten |= {point.entry.checkpoint.name for point in self.points[of]}

    def _is_of(self, hold: Hold, repository: str) -> bool:
        return hold.repository == str(self.disk.folder / repository)

    def _holds_end(self, code: str, *repositories: str) -> None:
        """All that they held goes, but for the only one of its epoch, which has to wait for another.

        A run that died in a new epoch held nothing of older ones any more: these go with the next backup.
        """
        held = {point.entry.checkpoint.name for of in repositories for point in self.points[of]}
        stay = held & set(self.disk.checkpoints())
        killed = [point for of in self.killed_in for point in self.points[of]]
        older = {point.entry.checkpoint.name for point in killed if point.epoch != self.epoch}
        assert stay <= self._alone_in_their_epochs() | older
        for name in held - stay:
            self.ended.setdefault(name, code)

    def _alone_in_their_epochs(self) -> set[str]:
        with self.disk.store.read() as reader:
            members = reader.checkpoints(self.disk.disk().uuid)
        epochs = Counter(member.epoch for member in members)
        return {member.name for member in members if epochs[member.epoch] == 1}

    def _check_bytes(self, entry: BackupEntry, parent: Point, blocks: set[int]) -> None:
        """After a crash, what was written and is as it was before need not be stored."""
        least = differing(self.disk.content(), parent.content) if entry.trust is Trust.SUPERSET else blocks
        assert self._bytes_of(least, parent) <= entry.bytes_changed <= self._bytes_of(blocks, parent)

    def _bytes_of(self, blocks: set[int], parent: Point) -> int:
        if self.size < parent.entry.disk_size and self.size % 512:
            blocks = blocks | {self.size // BLOCK}
        return sum(min(BLOCK, self.size - block * BLOCK) for block in blocks)

    def _note(self, to: str, entry: BackupEntry) -> None:
        self.points[to].append(Point(entry, self.disk.content(), self.epoch))

    @precondition(lambda self: self.kills < KILLS)
    @rule(to=repositories, kind=kinds, step=st.integers(1, 30))
    def back_up_and_die(self, to: str, kind: BackupType, step: int) -> None:
        self.kills += 1
        self.disk.backup_and_die(step, kind, to)
        folder = self.disk.backup_folder(to)
        made = folder.manifest() if os.path.isdir(folder.path) else None
        if made is not None and len(made.backups) > len(self.points[to]):
            self._note(to, made.backups[-1])
        self.killed_in.add(to)
        for hold in holds_of(self.disk.store, NAME):
            if self._is_of(hold, to):
                self._mind_what_was_noted(hold, to)

    def _mind_what_was_noted(self, hold: Hold, of: str) -> None:
        """What died had said that its repository is in use, or what that holds from now on, and no longer why not."""
        if hold.used_ns > LONG_AGO_NS:
            self.unused.discard(of)
        if hold.ended is None:
            names = {point.entry.checkpoint.name for point in self.points[of]}
            gone = names - set(self.disk.checkpoints())
            self.forgotten |= gone if of in self.dropped else gone & self.ended.keys()
            self.dropped.discard(of)

    @invariant()
    def checkpoints_are_those_that_are_needed(self) -> None:
        if self.killed_in:
            return  # until the next backup there has cleaned up
        needed: set[str] = set()
        for points in self.points.values():
            fulls = [point for point in points if point.entry.type_actual is FULL]
            counted_from = [point for point in points[-1:] + fulls[-1:] if point.epoch == points[-1].epoch]
            needed |= {point.entry.checkpoint.name for point in counted_from}
        if any(self.points.values()):
            assert set(self.disk.backup_checkpoints()) == needed - self.forgotten - set(self.ended)

    def check_at_the_end(self) -> None:
        for to, points in self.points.items():
            for point in points:
                assert self.disk.restored(point.entry.id, to) == point.content


def differing(new: bytes, old: bytes) -> set[int]:
    old = old[: len(new)] + bytes(max(len(new) - len(old), 0))
    offsets = range(0, len(new), BLOCK)
    return {at // BLOCK for at in offsets if new[at : at + BLOCK] != old[at : at + BLOCK]}


TestLives = pytest.mark.timeout(240)(Lives.TestCase)  # a minute, if the machine is busy
TestLives.settings = settings(
    max_examples=15, stateful_step_count=20, suppress_health_check=[HealthCheck.too_slow]
)
