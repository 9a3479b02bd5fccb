"""A disk to which random things happen, for state machines that look at what became of its backups and copies."""

from __future__ import annotations

import contextlib

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from lmdbitmap.storage.schema import DEFERRED, WRITE_AHEAD
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.tracked import LATER_NS, quick_folder

BLOCK = 4096
MAX_SIZE = 40 * BLOCK

sizes = st.integers(0, MAX_SIZE) | st.integers(0, 40).map(lambda blocks: blocks * BLOCK)
places = st.integers(0, MAX_SIZE)


class RandomDisk(RuleBasedStateMachine):
    """It is written, zeroed and resized. A model overrides the notes, which tell it of that."""

    def __init__(self) -> None:
        super().__init__()
        self._cleanup = contextlib.ExitStack()

    def begin_with(self, size: int, durability: str = WRITE_AHEAD) -> None:
        folder = self._cleanup.enter_context(quick_folder())
        self.disk = BackedUpDisk(folder, size, durability=durability)
        self.size = size

    def note_changed(self, blocks: set[int]) -> None:
        """Nobody may call these blocks clean from now on."""

    def note_resized(self, size: int) -> None:
        """What lies behind `size` is gone."""

    def check_at_the_end(self) -> None:
        """While the disk is still there."""

    def _changed(self, offset: int, length: int) -> None:
        self.note_changed(set(range(offset // BLOCK, -(-(offset + length) // BLOCK))) if length else set())

    @rule(offset=places, length=st.integers(0, 5 * BLOCK), value=st.integers(0, 255))
    def write(self, offset: int, length: int, value: int) -> None:
        offset = min(offset, self.size)
        length = min(length, self.size - offset)
        self.disk.write(bytes([value]) * length, offset)
        self._changed(offset, length)

    @rule(offset=places, length=st.integers(0, 20 * BLOCK))
    def write_zeroes(self, offset: int, length: int) -> None:
        offset = min(offset, self.size)
        length = min(length, self.size - offset)
        self.disk.zero(offset, length)
        self._changed(offset, length)

    @rule(size=sizes)
    def resize(self, size: int) -> None:
        self.disk.resize(size)
        self._changed(min(self.size, size), max(size - self.size, 0))
        self.note_resized(size)
        self.size = size

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.check_at_the_end()
            self.disk.close()
        self._cleanup.close()


class UnluckyDisk(RandomDisk):
    """Its owner may die, and others write it: `epoch` counts how often track was lost."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    @rule(offset=places)
    def be_written_by_a_stranger(self, offset: int) -> None:
        if self.size:
            self.epoch += 1
            # Longer ago each time: another mtime than any before it, in one tick too, and older than the next owner's.
            self.disk.write_behind_our_back(b"!", min(offset, self.size - 1), shift_ns=-self.epoch * LATER_NS)

    @rule(offset=places)
    def lose_its_owner(self, offset: int) -> None:
        if self.size:
            attached = self.disk.attach()
            attached.pwrite(b"?", min(offset, self.size - 1))
            attached.abandon()
            self._changed(min(offset, self.size - 1), 1)
            if self.disk.durability == DEFERRED:
                self.epoch += 1
