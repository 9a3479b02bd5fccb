"""Random lives of a disk with two copies: after every sync that succeeds the copy is what the disk is then.

Beside it a naive model, which knows of each copy whether it was ever whole, and what may have broken that: the kind
of each sync has to follow from it.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from lmdbitmap.access.access import open_to_read
from lmdbitmap.errors import InvalidArgument, StorageError
from lmdbitmap.notes import sync_note
from lmdbitmap.storage.schema import DEFERRED, WRITE_AHEAD
from lmdbitmap.syncs.plan import SyncKind
from lmdbitmap.syncs.sync import sync
from tests.helpers.tracked import LATER_NS, NAME
from tests.property.random_disk import BLOCK, UnluckyDisk, places, sizes
from tests.unit.test_sync import failing_after

targets = st.sampled_from(["left", "right"])
rarely = st.sampled_from([False, False, False, True])


@dataclass
class Copy:
    """Of what a sync can count on: `known_in` is the epoch of the last sync that was right, `changed` since then."""

    known_in: int | None = None
    checkpoint: str = ""
    changed: set[int] = field(default_factory=set)


class Stop(Exception):
    """What a caller's progress may raise."""


class Lives(UnluckyDisk):
    def __init__(self) -> None:
        super().__init__()
        self.copies = {"left": Copy(), "right": Copy()}
        self.left_behind: dict[str, set[str]] = {"left": set(), "right": set()}
        """Checkpoints of syncs that failed: the only one of an epoch stays until another follows it."""
        self.ticks = 0

    @initialize(durability=st.sampled_from([WRITE_AHEAD, DEFERRED]), size=sizes)
    def begin(self, durability: str, size: int) -> None:
        self.begin_with(size, durability)
        for to in self.copies:
            self.sync(to, False)

    # -- what happens to the disk --------------------------------------------------------------------------

    def note_changed(self, blocks: set[int]) -> None:
        for copy in self.copies.values():
            copy.changed |= blocks

    @rule(which=st.integers(0, 100))
    def forget_a_checkpoint(self, which: int) -> None:
        with self.disk.attach() as attached:
            names = self.disk.checkpoints()
            name = names[which % len(names)]
            with contextlib.suppress(InvalidArgument):  # the only one of its epoch
                attached.forget(name)
                for copy in self.copies.values():
                    if copy.checkpoint == name:
                        copy.known_in = None

    @rule()
    def back_up(self) -> None:
        self.disk.backup()

    # -- what happens to a copy ----------------------------------------------------------------------------

    def _path(self, to: str) -> Path:
        return self.disk.folder / f"{to}.raw"

    @rule(to=targets, offset=places, then=st.sampled_from(["", "sync", "fail"]))
    def copy_is_written_by_a_stranger(self, to: str, offset: int, then: str) -> None:
        path = self._path(to)
        if path.exists() and path.stat().st_size and self._is_settled(to):
            with path.open("r+b") as file:
                file.seek(min(offset, path.stat().st_size - 1))
                file.write(b"#")
            self.ticks += 1
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - self.ticks * LATER_NS))
            self.copies[to].known_in = None
        if then == "fail" and self.size:
            self.sync_and_fail(to, 0, False, False, True)
        elif then:
            self.sync(to, False)

    def _is_settled(self, to: str) -> bool:
        """Whether no sync is under way: what a stranger writes then is not noticed, as the documents say."""
        notes = [
            note for _, note in sync_note.notes(self.disk.store.path) if note.target == str(self._path(to))
        ]
        return not any(note.under_way and note.at is not None for note in notes)

    @rule(to=targets, really=rarely)
    def copy_is_removed(self, to: str, really: bool) -> None:
        if really:
            self._path(to).unlink(missing_ok=True)
            self.copies[to].known_in = None

    # -- syncs ---------------------------------------------------------------------------------------------

    def _expected(self, to: str, *, compare: bool) -> SyncKind:
        path, copy = self._path(to), self.copies[to]
        if copy.known_in == self.epoch and not compare:
            return SyncKind.INCREMENTAL
        return SyncKind.COMPARE if path.exists() and path.stat().st_size else SyncKind.FULL

    def _fits(self, to: str) -> bool:
        """Whether the target may be given another size, if it needs one: see target.py."""
        path = self._path(to)
        return not path.exists() or path.stat().st_size in (0, self.size) or self._is_ours(to)

    def _is_ours(self, to: str) -> bool:
        return self._expected(to, compare=False) is SyncKind.INCREMENTAL

    @rule(to=targets, compare=rarely)
    def sync(self, to: str, compare: bool) -> None:
        path, copy = self._path(to), self.copies[to]
        expected = self._expected(to, compare=compare)
        try:
            result = sync(self.disk.store, NAME, path, compare=compare)
        except InvalidArgument:
            assert not self._fits(to)
            path.unlink()
            copy.known_in = None
            return
        assert path.read_bytes() == self.disk.content()
        assert result.kind is expected
        if expected is SyncKind.INCREMENTAL:
            least = {block for block in copy.changed if block * BLOCK < self.size}
            assert result.bytes_changed >= sum(min(BLOCK, self.size - block * BLOCK) for block in least)
        self.copies[to] = Copy(self.epoch, result.checkpoint)
        held = {each.checkpoint for each in self.copies.values() if each.known_in == self.epoch}
        assert held <= set(self.disk.checkpoints())

    def _sync_checkpoints(self) -> set[str]:
        return {name for name in self.disk.checkpoints() if name.startswith("sync-")}

    @precondition(lambda self: self.size > 0)
    @rule(to=targets, reads=st.integers(0, 3), compare=rarely, late=st.booleans(), then=st.booleans())
    def sync_and_fail(self, to: str, reads: int, compare: bool, late: bool, then: bool) -> None:
        """What it wrote is inside of what the next one copies; a comparison leaves nothing to count from."""
        path = self._path(to)
        expected = self._expected(to, compare=compare)

        def stop(done: int, total: int) -> None:
            raise Stop

        opened = open_to_read if late else failing_after(reads)
        points = self._sync_checkpoints()
        try:
            result = sync(
                self.disk.store, NAME, path,
                compare=compare, open_device=opened, progress=stop if late else None,
            )  # fmt: skip
        except InvalidArgument:
            assert not self._fits(to)
        except (StorageError, Stop):
            now = self._sync_checkpoints()
            assert points - now <= {self.copies[to].checkpoint, *self.left_behind[to]}
            self.left_behind[to] |= now - points
            if expected is not SyncKind.INCREMENTAL:
                self.copies[to].known_in = None
        else:
            self.copies[to] = Copy(self.epoch, result.checkpoint)
            assert path.read_bytes() == self.disk.content()
        if then:
            self.sync(to, False)

    def check_at_the_end(self) -> None:
        for to in self.copies:
            if self._fits(to):
                self.sync(to, False)


TestLives = pytest.mark.timeout(240)(Lives.TestCase)  # a minute, if the machine is busy
TestLives.settings = settings(
    max_examples=20, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow], deadline=None
)
