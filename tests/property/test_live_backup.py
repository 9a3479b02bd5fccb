"""Backups of a disk that is written in the middle of them, beside copies of what it held when each began."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import StorageError
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.tracker.scratch import Scratch
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, BackedUpDisk
from tests.helpers.tracked import NAME, quick_folder

SIZE = (20 << 20) - 700
PLACES = st.integers(0, SIZE - 1)
GRANULARITY_BITS = 15


class Interrupted(Exception):
    """Somebody pressed Ctrl-C."""


class LiveBackups(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self.folder = self._stack.enter_context(quick_folder())
        self.tracked = BackedUpDisk(self.folder, SIZE, GRANULARITY_BITS)
        self._stack.enter_context(contextlib.closing(self.tracked))
        self.disk = self.tracked.attach()
        self._stack.enter_context(self.disk)
        self.disk.pwrite(os.urandom(SIZE // 3), SIZE // 2)
        self.points: list[bytes] = []
        self.chosen = random.Random(1)
        self.then = b""

    def teardown(self) -> None:
        for number, content in enumerate(self.points, 1):
            assert self.tracked.restored(str(number)) == content
        self._stack.close()

    @rule(offset=PLACES, length=st.sampled_from([1, 5000, 200_000]))
    def write(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        self.disk.pwrite(self.chosen.randbytes(length), offset)

    @rule(offset=PLACES, length=st.sampled_from([1, 5000, 3_000_000]))
    def zero(self, offset: int, length: int) -> None:
        self.disk.write_zeroes(offset, min(length, SIZE - offset))

    @contextlib.contextmanager
    def note_the_moment(self) -> Iterator[None]:
        yield
        self.then = self.tracked.content()

    def write_meanwhile(self, done: int, total: int) -> None:
        for _ in range(3):
            self.write(self.chosen.randrange(SIZE), 200_000)
            self.zero(self.chosen.randrange(SIZE), 5000)

    @rule(kind=st.sampled_from([INCREMENTAL, INCREMENTAL, DIFFERENTIAL, FULL]))
    def back_up(self, kind: BackupType) -> None:
        [made] = backup(
            self.tracked.store, [NAME], self.folder / "backups", kind=kind, attached={NAME: self.disk},
            quiesced=self.note_the_moment, progress=self.write_meanwhile,
        )  # fmt: skip
        self.points.append(self.then)
        assert made.entry.type_actual is (kind if len(self.points) > 1 else FULL)

    @rule()
    def be_interrupted(self) -> None:
        def interrupt(done: int, total: int) -> None:
            self.write_meanwhile(done, total)
            raise Interrupted

        with contextlib.suppress(Interrupted):  # an increment without a change has nothing to tell of
            backup(
                self.tracked.store, [NAME], self.folder / "backups", attached={NAME: self.disk},
                quiesced=self.note_the_moment, progress=interrupt,
            )  # fmt: skip
            self.points.append(self.then)

    @rule()
    def run_out_of_room(self) -> None:
        """The guest overwrites more than the scratch file takes."""

        def overwrite(done: int, total: int) -> None:
            self.disk.pwrite(self.chosen.randbytes(4 << 20), SIZE // 2)

        self.disk.pwrite(self.chosen.randbytes(8 << 20), SIZE // 2)
        with pytest.raises(StorageError, match="full"):
            backup(
                self.tracked.store, [NAME], self.folder / "backups", attached={NAME: self.disk},
                scratch=Scratch(str(self.folder), 1 << 20), progress=overwrite,
                quiesced=self.overwrite_at_once,
            )  # fmt: skip

    @contextlib.contextmanager
    def overwrite_at_once(self) -> Iterator[None]:
        yield
        self.disk.pwrite(self.chosen.randbytes(6 << 20), SIZE // 2)

    @invariant()
    def nothing_is_held(self) -> None:
        assert self.disk.snapshots == ()
        needed = 1 + bool(self.points and len(self.points) > 1) if self.points else 0
        assert len(self.tracked.backup_checkpoints()) <= max(needed, 1)


TestLiveBackups = LiveBackups.TestCase
TestLiveBackups.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
