"""Random lives of a disk with its files, beside a plain list of sets: one set of blocks for each period."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmdbitmap import export
from lmdbitmap.errors import FormatError, Untrusted
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file import bitmap_file
from lmdbitmap.format import BitsTally, Flags, Zeroes
from lmdbitmap.store import Store
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.changes import changes
from tests.helpers import naive_flat
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

BLOCK = 4096
BLOCKS = 150
SIZE = BLOCKS * BLOCK - 100


class Life:
    """A disk, and `periods`: what a naive tracker would know, oldest first, the last one recording."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracked = TrackedDisk(folder, SIZE).clean("c0")
        self.periods: list[set[int]] = [set()]
        self.disk = self.tracked.attach()
        self.files = 0
        self.is_exact = True
        self.beside: int | None = None
        """How many periods there were when the bitmap file beside the disk was written."""

    @property
    def store(self) -> Store:
        return self.tracked.store

    def write(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        self.disk.pwrite(b"x" * length, offset)
        self.periods[-1] |= {position // BLOCK for position in range(offset, offset + length)}

    def checkpoint(self, *_: int) -> None:
        self.disk.checkpoint(f"c{len(self.periods)}")
        self.periods.append(set())

    def crash(self, *_: int) -> None:
        self.disk.abandon()
        self.disk = self.tracked.attach()
        self._learn_what_is_loose()

    def export(self, first: int, last: int) -> None:
        """Any stretch of the chain, to a file: read there by the plainest reader, and kept in the store too."""
        since = first % len(self.periods)
        until = since + 1 + last % (len(self.periods) - since)
        name = f"c{until}" if until < len(self.periods) else None
        self.disk.persist()
        asked = changes(self.store, NAME, since=f"c{since}", until=name, persisted=True)
        path, expected = self._new_path(), set[int]().union(*self.periods[since:until])
        header = export.export_changes(asked, path)
        assert naive_flat.dirty_blocks(path.read_bytes()) == expected
        assert (Flags.RECORDING in header.flags) == (name is None)
        assert not self.is_exact or Flags.SUPERSET not in header.flags
        export.import_file(self.store, path, path.name)
        assert blocks_of(self.store, path.name) == expected
        assert export.export_bitmap(self.store, path.name, self._new_path()) == header

    def take_in(self, seed: int, granularity_bits: int) -> None:
        """A file from elsewhere, with blocks of any size, goes into the open period."""
        granularity_bits = 9 + granularity_bits % 9
        granularity = 1 << granularity_bits
        count = -(-SIZE // granularity)
        blocks = {seed * step % count for step in range(seed % 7)}
        path = self._new_path()
        path.write_bytes(naive_flat.write(blocks, SIZE, granularity_bits))
        export.import_file(self.store, path, path.name)
        export.merge_into(self.disk, path.name)
        for block in blocks:
            stop = min((block + 1) * granularity, SIZE)
            self.periods[-1] |= {position // BLOCK for position in range(block * granularity, stop)}

    def detach(self, *_: int) -> None:
        """And serve it again, with a bitmap file beside it."""
        path = self.folder / "beside.dbm"
        self.disk.detach()
        with self.tracked.attach() as disk:
            assert bitmap_file.begin(disk, path) is None
            self._learn(disk)
        if self.beside not in (None, len(self.periods)):
            self.is_exact = False  # it counted from an older checkpoint, whatever it added
        self.beside = len(self.periods)
        assert naive_flat.dirty_blocks(path.read_bytes()) == self.periods[-1]
        self.disk = self.tracked.attach()

    def check(self) -> None:
        """Law 1: whatever dies now. Nothing is persisted for it."""
        assert self.tracked.stored_dirt() >= self.periods[-1]

    def check_chain(self) -> None:
        for number in range(len(self.periods)):
            known = self.disk.changes(since=f"c{number}")
            assert {block for run in known.runs() for block in range(*run)} == set().union(
                *self.periods[number:]
            )

    def close(self) -> None:
        self.disk.detach()
        self.tracked.close()

    def _learn_what_is_loose(self) -> None:
        """What a crash added, which the model cannot know, but it may not take anything away."""
        self.is_exact = False
        self._learn(self.disk)

    def _learn(self, disk: Filter) -> None:
        """A file that counts from an older checkpoint may add blocks too."""
        known = {block for run in disk.changes().runs() for block in range(*run)}
        assert known >= self.periods[-1]
        self.is_exact = self.is_exact and known == self.periods[-1]
        self.periods[-1] = known

    def _new_path(self) -> Path:
        self.files += 1
        return self.folder / f"{self.files}.dbm"


def blocks_of(store: Store, name: str) -> set[int]:
    with store.read() as reader:
        bitmap = standalone.find(reader, name)
    return {block for run in standalone.runs(store, bitmap) for block in range(*run)}


STEPS: dict[str, Callable[[Life, int, int], None]] = {
    "write": Life.write,
    "checkpoint": Life.checkpoint,
    "export": Life.export,
    "take in": Life.take_in,
    "detach": Life.detach,
    "crash": Life.crash,
}
steps = st.tuples(
    st.one_of(st.just("write"), st.sampled_from(sorted(STEPS))),
    st.integers(0, SIZE - 1),
    st.integers(0, 70 * BLOCK),
)


@settings(max_examples=60)
@example([("checkpoint", 0, 0), ("detach", 0, 0), ("checkpoint", 0, 0), ("detach", 0, 0), ("export", 0, 38)])
@given(st.lists(steps, max_size=12))
def test_files_and_chain_stay_beside_the_model(
    life: list[tuple[str, int, int]],
) -> None:
    with quick_folder() as folder:
        disk = Life(folder)
        try:
            for step, first, second in life:
                STEPS[step](disk, first, second)
                disk.check()
            disk.check_chain()
        finally:
            disk.close()


@given(data=st.binary(max_size=50), count=st.integers(0, 1 << 17), more=st.binary(max_size=50))
def test_zeroes_count_as_if_they_were_there(data: bytes, count: int, more: bytes) -> None:
    tally = BitsTally(8 << 20)
    for chunk in (data, Zeroes(count), more):
        tally.add(chunk)
    whole = data + bytes(count) + more
    assert (tally.checksum, tally.size) == (zlib.crc32(whole), len(whole))
    assert tally.dirty_count == sum(byte.bit_count() for byte in whole)


@pytest.fixture(scope="module")
def tracked() -> Iterator[TrackedDisk]:
    with quick_folder() as folder:
        tracked = TrackedDisk(folder, SIZE).clean()
        yield tracked
        tracked.close()


SOUND = naive_flat.write({0, 5, 99}, SIZE, 12, b"\x81\xa1a\x01")


@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SOUND) - 1), st.binary(min_size=1, max_size=8)), max_size=3
    ),
    length=st.integers(0, len(SOUND) + 50),
    sealed=st.booleans(),
)
def test_hostile_bytes_raise_only_our_errors_and_nothing_is_kept(
    tracked: TrackedDisk, changes: list[tuple[int, bytes]], length: int, sealed: bool
) -> None:
    data = bytearray(SOUND)
    for position, noise in changes:
        data[position : position + len(noise)] = noise
    if sealed:
        data[:4096] = naive_flat.seal(data[:4096])
    path = tracked.folder / "hostile.dbm"
    path.write_bytes(data.ljust(length, b"\0")[:length])
    before = tracked.stored_dirt()
    try:
        export.import_file(tracked.store, path, "hostile", into=NAME)
    except (FormatError, Untrusted):
        with tracked.store.read() as reader:
            assert reader.bitmaps() == []
        assert tracked.stored_dirt() == before
    else:
        assert blocks_of(tracked.store, "hostile") == {0, 5, 99}
        tracked.store.update(lambda writer: standalone.remove(writer, "hostile"))
