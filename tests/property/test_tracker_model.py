"""The sacred sentence beside a model: no changed block is ever reported clean.

The model is a list of periods, each a plain set of block numbers, and the image in a bytearray. After every
step everybody is asked: the store as a stranger would ask it, the image, the refusals of older epochs. What
may be named beyond the truth is in `loose`: what was armed when an owner died, and nothing else.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmdbitmap import bits, export
from lmdbitmap.errors import AlreadyExists, InvalidArgument, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file.flatfile import FlatFile
from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_BLOCKS, Geometry
from lmdbitmap.storage import schema
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.changes import Changes, dirty_bytes_of_period
from tests.helpers.tracked import LATER_NS, NAME, TrackedDisk, blocks_of, quick_folder, trust_of

SHAPES = {9: REGION_BLOCKS + 70, 12: 300, 16: 70}
"""Blocks of a disk, by granularity: two regions, five extents, two extents, all with a short last block."""

positions = st.floats(0, 1)
lengths = st.one_of(
    st.sampled_from([0, 1, 511, 512, 513, 4096]),
    st.tuples(st.sampled_from([1, 2, 63, 64, 65, 130]), st.integers(-1, 1)),
)
"""Bytes, or (blocks, bytes more)."""


@dataclass
class Period:
    name: str
    epoch: int
    dirty: set[int] = field(default_factory=set)
    loose: set[int] = field(default_factory=set)
    """Clean blocks that may be named: what was armed when an owner died."""
    all_dirty: bool = False
    superset: bool = False


class Model:
    """What the tracker should say, told in the plainest way there is."""

    def __init__(self, size: int, granularity_bits: int) -> None:
        self.geometry = Geometry(size, granularity_bits)
        self.image = bytearray(size)
        self.epoch = 1
        self.periods = [Period("epoch-1", 1, all_dirty=True)]

    @property
    def current(self) -> Period:
        return self.periods[-1]

    @property
    def everything(self) -> set[int]:
        return set(range(self.geometry.block_count))

    def bytes_in(self, blocks: set[int]) -> int:
        """All are on the disk, and its last one may be short."""
        size, g = self.geometry.size, self.geometry.granularity
        assert not blocks or max(blocks) * g < size
        return len(blocks) * g - (-size % g if (size - 1) // g in blocks else 0)

    def mark(self, offset: int, length: int, period: Period | None = None) -> None:
        g = self.geometry.granularity
        if length:
            (period or self.current).dirty.update(range(offset // g, (offset + length - 1) // g + 1))

    def write(self, offset: int, data: bytes) -> None:
        self.mark(offset, len(data))
        self.image[offset : offset + len(data)] = data

    def resize(self, size: int) -> None:
        before = self.geometry.size
        self.geometry = Geometry(size, self.geometry.granularity_bits)
        if size < before:
            del self.image[size:]
            for period in self.periods:
                period.dirty &= self.everything
                period.loose &= self.everything
        else:
            self.image.extend(bytes(size - before))
            for period in self.of_this_epoch():  # the closed ones too: they may have lost bits there
                self.mark(before, size - before, period)

    def new_epoch(self) -> None:
        self.epoch += 1
        self.periods.append(Period(f"epoch-{self.epoch}", self.epoch, all_dirty=True))

    def of_this_epoch(self) -> list[Period]:
        return [period for period in self.periods if period.epoch == self.epoch]

    def since(self, first: Period, last: Period | None = None) -> Period:
        """What was done from the beginning of `first` to now, or to the beginning of `last`, as one period."""
        stop = None if last is None else self.periods.index(last)
        parts = self.periods[self.periods.index(first) : stop]
        return Period(
            first.name, first.epoch,
            dirty={block for part in parts for block in part.dirty},
            loose={block for part in parts for block in part.loose},
            all_dirty=any(part.all_dirty for part in parts),
            superset=any(part.superset for part in parts),
        )  # fmt: skip

    def forget(self, period: Period) -> None:
        same = [other for other in self.periods if other.epoch == period.epoch]
        position = same.index(period)
        if position:
            before = same[position - 1]
            before.dirty |= period.dirty
            before.loose |= period.loose
            before.all_dirty |= period.all_dirty
            before.superset |= period.superset
        self.periods.remove(period)


class Tracker(RuleBasedStateMachine):
    """Random lives of one disk. It is attached between rules; a rule that detaches it attaches it again."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.names = 0
        self.last_end = 0
        self.files: list[tuple[Path, Geometry, set[int], bool]] = []

    @initialize(
        granularity_bits=st.sampled_from(list(SHAPES)),
        short_by=st.sampled_from([0, 1, 511]),
        durability=st.sampled_from([schema.WRITE_AHEAD, schema.WRITE_AHEAD, schema.DEFERRED]),
        max_armed=st.sampled_from([0, 2, 1024]),
    )
    def begin(self, granularity_bits: int, short_by: int, durability: str, max_armed: int) -> None:
        self.folder = self.stack.enter_context(quick_folder())
        size = (SHAPES[granularity_bits] << granularity_bits) - short_by
        self.tracked = TrackedDisk(self.folder, size, granularity_bits, durability)
        self.max_armed = max_armed
        self.deferred = durability == schema.DEFERRED
        self.model = Model(size, granularity_bits)
        self.disk = self.attach()
        self.checkpoint()

    def attach(self) -> Filter:
        return self.tracked.attach(max_armed=self.max_armed)

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.disk.detach()
            self.look_around()
            self.tracked.close()
        self.stack.close()

    # --- what a guest does ---

    def place(self, position: float, length: int | tuple[int, int]) -> tuple[int, int]:
        """(offset, length) on the disk, near a border of blocks more often than not."""
        size, g = self.model.geometry.size, self.model.geometry.granularity
        if isinstance(length, tuple):
            length = length[0] * g + length[1]
        length = min(length, size)
        offset = int(position * (size - length))
        return (offset - offset % g if offset % 3 else offset), length

    @rule(position=positions, length=lengths, fill=st.integers(1, 255))
    def write(self, position: float, length: int | tuple[int, int], fill: int) -> None:
        offset, count = self.place(position, length)
        self.disk.pwrite(bytes([fill]) * count, offset)
        self.model.write(offset, bytes([fill]) * count)
        self.last_end = offset + count

    @precondition(lambda self: 0 < self.last_end <= self.model.geometry.size)
    @rule(back=st.sampled_from([0, 1, 600]), length=lengths, fill=st.integers(1, 255))
    def write_on(self, back: int, length: int | tuple[int, int], fill: int) -> None:
        """From about where the last write ended, as a guest that copies a file."""
        offset = max(self.last_end - back, 0)
        count = min(self.place(0, length)[1], self.model.geometry.size - offset)
        self.disk.pwrite(bytes([fill]) * count, offset)
        self.model.write(offset, bytes([fill]) * count)
        self.last_end = offset + count

    @rule(seed=st.integers(0, 2**32), count=st.integers(1, 12), fill=st.integers(1, 255))
    def write_many(self, seed: int, count: int, fill: int) -> None:
        """Scattered writes that do not overlap, some of them in a row."""
        size, g = self.model.geometry.size, self.model.geometry.granularity
        chosen = random.Random(seed)
        starts = sorted(chosen.sample(range(0, max(size, 1), g), min(count, -(-size // g)) if size else 0))
        writes = [(start + chosen.randrange(min(g, size - start)), bytes([fill])) for start in starts]
        assert self.disk.lane().write_many([(offset, memoryview(data)) for offset, data in writes]) == {}
        for offset, data in writes:
            self.model.write(offset, data)

    @rule(position=positions, length=lengths, may_unmap=st.booleans())
    def write_zeroes(self, position: float, length: int | tuple[int, int], may_unmap: bool) -> None:
        offset, count = self.place(position, length)
        self.disk.write_zeroes(offset, count, may_unmap=may_unmap)
        self.model.write(offset, bytes(count))

    @rule(position=positions, length=lengths)
    def discard(self, position: float, length: int | tuple[int, int]) -> None:
        """What it reads as afterwards is the device's choice."""
        offset, count = self.place(position, length)
        self.disk.discard(offset, count)
        self.model.write(offset, self.disk.pread(count, offset))

    @rule(beyond=st.integers(1, 100_000), length=st.sampled_from([1, 100_000]))
    def write_off_the_disk(self, beyond: int, length: int) -> None:
        for offset in (-beyond, self.model.geometry.size - length + beyond):
            with pytest.raises(InvalidArgument):
                self.disk.pwrite(bytes(length), offset)

    # --- what its people do ---

    @rule()
    def checkpoint(self) -> None:
        name = f"c{self.names}"
        self.names += 1
        self.disk.checkpoint(name)
        self.model.periods.append(Period(name, self.model.epoch))
        with pytest.raises(AlreadyExists):
            self.disk.checkpoint(name)

    @rule(position=positions)
    def forget(self, position: float) -> None:
        chosen = self.model.periods[int(position * (len(self.model.periods) - 1))]
        if self.model.of_this_epoch() == [chosen]:
            with pytest.raises(InvalidArgument):
                self.disk.forget(chosen.name)
            return
        self.disk.forget(chosen.name)
        self.model.forget(chosen)

    @rule(position=positions, length=lengths)
    def mark(self, position: float, length: int | tuple[int, int]) -> None:
        offset, count = self.place(position, length)
        self.disk.mark(offset, count)
        self.model.mark(offset, count)

    @rule(blocks=st.integers(-70, 70), bytes_more=st.sampled_from([0, 1, -1, 300]))
    def resize(self, blocks: int, bytes_more: int) -> None:
        geometry = self.model.geometry
        wanted = geometry.size + blocks * geometry.granularity + bytes_more
        size = max(0, min(wanted, 2 * SHAPES[geometry.granularity_bits] << geometry.granularity_bits))
        self.disk.resize(size)
        self.model.mark(
            size, max(self.model.geometry.size - size, 0)
        )  # what is cut off is dirty before it is cut
        self.model.resize(size)

    @rule()
    def background_pass(self) -> None:
        self.disk.beat()
        self.disk.background_pass()

    @rule(position=positions)
    def ask_the_owner(self, position: float) -> None:
        """Its answer is sharp: everything in memory is written first."""
        asked = self.model.of_this_epoch()
        first = asked[int(position * (len(asked) - 1))]
        self.compare(self.disk.changes(since=first.name), self.model.since(first))
        assert self.disk.armed_count == 0
        for last in asked[asked.index(first) + 1 :]:
            self.compare(self.disk.changes(since=first.name, until=last.name), self.model.since(first, last))

    @rule()
    def export(self) -> None:
        first = self.model.of_this_epoch()[0]
        answer = self.disk.changes(since=first.name)
        path = self.folder / f"{len(self.files)}.dbm"
        export.export_changes(answer, path)
        with FlatFile.open(path) as file:
            flat = path.read_bytes()[file.header.header_size :]
        blocks = {block for run in bits.runs(flat) for block in range(*run)}
        assert blocks == blocks_of(answer)
        self.files.append((path, self.model.geometry, blocks, trust_of(answer) is not Trust.EXACT))

    def files_that_fit(self) -> list[tuple[Path, Geometry, set[int], bool]]:
        return [file for file in self.files if file[1] == self.model.geometry]

    @precondition(lambda self: bool(self.files_that_fit()))
    @rule(position=positions)
    def import_again(self, position: float) -> None:
        files = self.files_that_fit()
        path, _, blocks, is_loose = files[int(position * (len(files) - 1))]
        with FlatFile.open(path) as file:
            export.merge_file_into(self.disk, file, loose="it was a superset" if is_loose else None)
        self.model.current.dirty |= blocks
        self.model.current.superset |= is_loose

    # --- what fate does ---

    @rule()
    def detach(self) -> None:
        self.disk.detach()
        self.look_around()
        self.disk = self.attach()

    @rule(copied=st.booleans())
    def crash(self, copied: bool) -> None:
        """`copied`: go on with the store as it lay on the disk at that moment, whatever `abandon` does."""
        self.die(copied)
        if self.deferred:
            assert all(trust_of(answer) is Trust.UNTRUSTED for answer in self.answers().values())
            self.disk = self.attach()
            self.model.new_epoch()
            return
        self.look_around()
        self.disk = self.attach()

    def die(self, copied: bool) -> None:
        if not self.deferred:
            armed = self.armed_in_store()
            assert len(armed) <= self.max_armed * EXTENT_BLOCKS + len(self.model.current.loose)
            self.model.current.loose |= armed & self.model.everything
            self.model.current.superset = True
        if not copied:
            self.disk.abandon()
            return
        path = Path(self.tracked.store.path)
        lay = {file: file.read_bytes() for file in (path / "lmdb" / "data.mdb", *(path / "owners").iterdir())}
        self.disk.abandon()
        self.tracked.close()
        for file, content in lay.items():
            file.write_bytes(content)  # in place: it is the same file
        (path / "newest").unlink()
        self.tracked.store = Store.open(str(path))

    def armed_in_store(self) -> set[int]:
        disk = self.tracked.disk()
        with self.tracked.store.read() as reader:
            current = reader.checkpoints(disk.uuid)[-1]
            return {
                number * REGION_BLOCKS + block
                for number, region in reader.regions(current.bitmap_id)
                for run in bits.runs(bits.expand_mask(region.armed))
                for block in range(*run)
            }

    @precondition(lambda self: self.model.geometry.size)
    @rule(position=positions, fill=st.integers(1, 255), after_a_crash=st.booleans())
    def a_stranger_writes(self, position: float, fill: int, after_a_crash: bool) -> None:
        self.die(copied=False) if after_a_crash else self.disk.detach()
        offset, _ = self.place(position, 1)
        self.tracked.write_behind_our_back(bytes([fill]), offset, shift_ns=self.long_ago())
        self.model.image[offset] = fill
        for answer in self.answers().values():
            assert trust_of(answer) is Trust.UNTRUSTED
            assert blocks_of(answer) == self.model.everything
        self.disk = self.attach()
        self.model.new_epoch()

    def long_ago(self) -> int:
        """Longer ago each time, so that no sign of life vouches for it."""
        self.names += 1
        return -self.names * LATER_NS

    @rule(after_a_crash=st.booleans(), blocks=st.sampled_from([0, 0, -3, 3]))
    def a_person_vouches(self, after_a_crash: bool, blocks: int) -> None:
        """The image was touched, or cut and grown at its end, and nothing else was done to it."""
        self.die(copied=False) if after_a_crash else self.disk.detach()
        size = max(0, self.model.geometry.size + blocks * self.model.geometry.granularity)
        with self.tracked.image.open("r+b") as image:
            image.truncate(size)
        self.tracked.write_behind_our_back(b"", 0, shift_ns=self.long_ago())
        if after_a_crash and self.deferred:
            with pytest.raises(Untrusted):
                session.adopt(self.tracked.store, NAME)
            self.disk = self.attach()
            self.model.resize(size)
            self.model.new_epoch()
            return
        session.adopt(self.tracked.store, NAME)
        self.model.resize(size)
        self.look_around()
        self.disk = self.attach()

    # --- what everybody sees, after every step ---

    @invariant()
    def look_around(self) -> None:
        if not hasattr(self, "disk"):
            return
        attached = not self.disk._tracking.is_over
        if attached:
            self.disk.beat()
            self.check_memory()
        self.check_image()
        for first, answer in self.answers().items():
            if attached and self.deferred:
                assert trust_of(answer) is Trust.UNTRUSTED
                assert blocks_of(answer) == self.model.everything
            else:
                self.compare(answer, self.model.since(self.model.periods[first]))
        self.check_closed_periods()

    def check_closed_periods(self) -> None:
        """Each by itself, as `info` tells of them."""
        disk = self.tracked.disk()
        with self.tracked.store.read() as reader:
            pairs = list(pairwise(reader.checkpoints(disk.uuid)))
        for pair, period in zip(pairs, self.model.periods, strict=False):
            if period.epoch == self.model.epoch:
                dirty = self.model.everything if period.all_dirty else period.dirty
                least, most = (self.model.bytes_in(blocks) for blocks in (dirty, dirty | period.loose))
                assert least <= dirty_bytes_of_period(self.tracked.store, disk, *pair) <= most

    def answers(self) -> dict[int, Changes]:
        """Asked of the store alone, since every checkpoint; those of older epochs must be refused."""
        found: dict[int, Changes] = {}
        for number, period in enumerate(self.model.periods):
            if period.epoch == self.model.epoch:
                found[number] = self.tracked.changes(period.name)
            else:
                with pytest.raises(Untrusted):
                    self.tracked.changes(period.name)
        assert self.tracked.checkpoints() == [period.name for period in self.model.periods]
        assert found
        return found

    def compare(self, answer: Changes, truth: Period) -> None:
        reported, summary = blocks_of(answer), answer.summary
        armed = self.armed_in_store() & self.model.everything
        dirty = self.model.everything if truth.all_dirty else truth.dirty
        assert dirty <= reported, "a changed block is reported clean"
        assert reported <= dirty | truth.loose | armed
        assert summary.dirty_blocks == len(reported)
        assert summary.dirty_bytes == sum(extent.length for extent in answer.extents())
        if not (truth.all_dirty or truth.superset or armed):
            assert summary.standing.trust is Trust.EXACT
        if summary.standing.trust is Trust.EXACT:
            assert reported == dirty
        assert summary.standing.trust is not Trust.UNTRUSTED

    def check_image(self) -> None:
        assert self.tracked.image.read_bytes() == self.model.image
        assert self.tracked.disk().size == self.model.geometry.size
        if not self.disk._tracking.is_over:
            assert self.disk.size == self.disk.device.size == self.model.geometry.size

    def check_memory(self) -> None:
        """Law 1: what memory takes for settled is durably dirty, and dirty it is."""
        settled = {block for run in bits.runs(self.disk._tracking.period._memory) for block in range(*run)}
        current = self.model.current
        if not current.all_dirty:
            assert settled <= current.dirty | current.loose
        if not self.deferred:
            assert settled <= self.tracked.stored_dirt()
        assert self.disk.armed_count <= self.max_armed


Tracker.TestCase.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTracker = pytest.mark.timeout(400)(Tracker.TestCase)
"""A failure takes minutes to be made small, and is worth them."""
