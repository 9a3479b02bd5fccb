"""Chains: what a checkpoint leaves to the next, what forgetting merges, what a new size does to every bitmap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from lmdbitmap import bits
from lmdbitmap.errors import AlreadyExists, InvalidArgument, NotFound, Untrusted
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.storage import records, schema, tally
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Reader, Store, Writer
from lmdbitmap.tracker import chain

GRANULARITY = 512
BLOCKS = 2 * REGION_BLOCKS + 10
SIZE = BLOCKS * GRANULARITY - 5

T = TypeVar("T")


class Archive:
    """A store with one disk called `sda`."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.create(str(folder / "store"))
        self.add("sda", "/images/sda.raw")

    def add(self, name: str, image: str, size: int = SIZE, granularity_bits: int = 9) -> Disk:
        identity = ImageIdentity(1, 2, size, 3)
        return self.store.update(
            lambda writer: chain.add_disk(
                writer, name, image, identity, granularity_bits=granularity_bits,
                durability=schema.WRITE_AHEAD, policy=schema.STRICT, time_ns=0,
            )
        )  # fmt: skip

    def disk(self, name: str = "sda") -> Disk:
        with self.store.read() as reader:
            return chain.find_disk(reader, name)

    def change(self, change: Callable[[Writer, Disk], T]) -> T:
        return self.store.update(lambda writer: change(writer, chain.find_disk(writer, "sda")))

    def checkpoint(self, name: str, *dirty: int, armed: dict[int, int] | None = None) -> None:
        """A checkpoint whose period then records `dirty` and, as a dead owner would leave them, `armed` extents."""
        self.change(lambda writer, disk: chain.add_checkpoint(writer, disk, name, 0))
        self.change(lambda writer, disk: self._record(writer, disk, dirty, armed or {}))

    def _record(self, writer: Writer, disk: Disk, dirty: tuple[int, ...], armed: dict[int, int]) -> None:
        bitmap = writer.bitmap(chain.current_checkpoint(writer, disk).bitmap_id)
        for block in dirty:
            chain.mark_outward(writer, bitmap, *bitmap.geometry.bytes_of(block, block + 1))
        for number, mask in armed.items():
            region = writer.region(bitmap.id, number)
            writer.put_region(bitmap.id, number, mask, region.bits if region else schema.ALL_CLEAN_BITS)

    def dirty(self, name: str) -> set[int]:
        """What the bitmap of one checkpoint names, armed extents and bits past the end included."""
        with self.store.read() as reader:
            point = chain.find_checkpoint(reader, chain.find_disk(reader, "sda"), name)
            return {
                number * REGION_BLOCKS + block
                for number, region in reader.regions(point.bitmap_id)
                for run in bits.runs(bits.dirty_bits(region.armed, region.bits))
                for block in range(*run)
            }

    def names(self) -> list[str]:
        return [point.name for point in self.points()]

    def points(self) -> list[Checkpoint]:
        with self.store.read() as reader:
            return reader.checkpoints(chain.find_disk(reader, "sda").uuid)

    def forget(self, name: str) -> None:
        self.change(lambda writer, disk: chain.forget(writer, disk, name))

    def resize(self, size: int) -> Disk:
        return self.change(lambda writer, disk: chain.resize(writer, disk, size))

    def region_keys(self) -> int:
        with self.store.read() as reader:
            return sum(1 for _ in reader._items("regions", b""))


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    archive = Archive(tmp_path)
    yield archive
    archive.store.close()


# --- disks ---


def test_new_disk_has_one_checkpoint_that_calls_everything_dirty(archive: Archive) -> None:
    (point,) = archive.points()
    with archive.store.read() as reader:
        bitmap = reader.bitmap(point.bitmap_id)
    assert point.name == "epoch-1"
    assert bitmap.all_dirty == chain.NEVER_BACKED_UP
    assert archive.disk().size == bitmap.size == SIZE


@pytest.mark.parametrize("name", ["", ".", "-x", "a/b", "a,b", "a@b", "x" * 201, "a\0b", "\udcff", "a\\b"])
def test_impossible_disk_name_is_refused(archive: Archive, name: str) -> None:
    with pytest.raises(InvalidArgument):
        archive.add(name, "/images/other.raw")


def test_taken_names_and_images_are_refused(archive: Archive) -> None:
    with pytest.raises(AlreadyExists):
        archive.add("sda", "/images/other.raw")
    with pytest.raises(AlreadyExists):
        archive.add("sdb", "/images/sda.raw")
    archive.store.update(
        lambda writer: writer.put_bitmap(dataclasses.replace(writer.bitmap(1), id=99, name="kept"))
    )
    with pytest.raises(AlreadyExists):
        archive.add("kept", "/images/other.raw")
    assert archive.add("sdb", "/images/other.raw", granularity_bits=16).granularity_bits == 16


@pytest.mark.parametrize(("size", "granularity_bits"), [(SIZE, 8), (SIZE, 32), (1 << 63, 16), (1 << 62, 9)])
def test_impossible_geometry_is_refused(archive: Archive, size: int, granularity_bits: int) -> None:
    with pytest.raises(InvalidArgument):
        archive.add("sdb", "/images/other.raw", size, granularity_bits)


def test_removed_disk_leaves_nothing(archive: Archive) -> None:
    archive.checkpoint("monday", 1, 5000)
    archive.change(chain.remove_disk)
    with archive.store.read() as reader:
        assert reader.disks() == []
        assert [
            name for name in ("checkpoints", "bitmaps", "regions") if list(reader._items(name, b""))
        ] == []
        with pytest.raises(NotFound):
            chain.find_disk(reader, "sda")


# --- checkpoints and epochs ---


def test_order_is_by_sequence_and_not_by_name(archive: Archive) -> None:
    for name in ("z", "a", "m"):
        archive.checkpoint(name)
    assert archive.names() == ["epoch-1", "z", "a", "m"]
    assert [point.sequence for point in archive.points()] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["", "epoch-1", "tab\t", "x" * 1024])
def test_impossible_checkpoint_is_refused(archive: Archive, name: str) -> None:
    with pytest.raises((InvalidArgument, AlreadyExists)):
        archive.checkpoint(name)
    assert archive.names() == ["epoch-1"]


def test_new_epoch_begins_all_dirty_and_answers_for_no_older_checkpoint(archive: Archive) -> None:
    archive.checkpoint("monday", 1)
    archive.checkpoint("epoch-2")
    disk = archive.change(lambda writer, disk: chain.start_epoch(writer, disk, "a test", 0))
    assert archive.names()[:3] == ["epoch-1", "monday", "epoch-2"]
    assert archive.names()[3].startswith("epoch-2-")
    assert (disk.epoch_number, disk.epoch_reason) == (2, "a test")
    with archive.store.read() as reader:
        assert "a test" in str(reader.bitmap(archive.points()[-1].bitmap_id).all_dirty)
        chain.require_same_epoch(disk, archive.points()[-1])
        for point in archive.points()[:-1]:
            with pytest.raises(Untrusted) as refused:
                chain.require_same_epoch(disk, point)
            assert "a test" in str(refused.value)
        assert [point.name for point in chain.epoch_chain(reader, disk)] == archive.names()[3:]


# --- forget ---


def test_forgotten_checkpoint_gives_its_bits_to_the_one_before(archive: Archive) -> None:
    archive.checkpoint("monday", 1, 5000)
    archive.checkpoint("tuesday", 1, 2, 8000)
    archive.checkpoint("wednesday", 3)
    archive.forget("tuesday")
    assert archive.names() == ["epoch-1", "monday", "wednesday"]
    assert archive.dirty("monday") == {1, 2, 5000, 8000}
    assert archive.dirty("wednesday") == {3}


@pytest.mark.parametrize("of", ["both", "the kept", "the forgotten"])
def test_what_a_dead_owner_left_armed_is_not_lost_in_a_merge(archive: Archive, of: str) -> None:
    """Changes in an armed extent may be nowhere but in its armed bit."""
    kept, gone = {0: 0b0110}, {0: 0b1000, 2: 0b1}
    archive.checkpoint("monday", 1, armed=kept if of != "the forgotten" else {})
    archive.checkpoint("tuesday", 2, armed=gone if of != "the kept" else {})
    expected = {1, 2}
    expected |= set(range(64, 192)) if of != "the forgotten" else set()
    expected |= {*range(192, 256), *range(8192, 8256)} if of != "the kept" else set()
    archive.forget("tuesday")
    assert archive.dirty("monday") == expected


def test_trust_is_merged_to_the_worse(archive: Archive) -> None:
    archive.checkpoint("monday")
    archive.checkpoint("tuesday")
    archive.change(lambda writer, disk: chain.note_superset(writer, disk, "a crash"))
    archive.forget("tuesday")
    with archive.store.read() as reader:
        assert reader.bitmap(archive.points()[-1].bitmap_id).superset == "a crash"
    archive.forget("monday")
    with archive.store.read() as reader:
        merged = reader.bitmap(archive.points()[-1].bitmap_id)
        assert (merged.superset, merged.all_dirty) == ("a crash", chain.NEVER_BACKED_UP)


@pytest.mark.parametrize("of", ["the kept", "the forgotten"])
def test_where_everything_is_dirty_no_records_are_kept(archive: Archive, of: str) -> None:
    """An epoch's first period is such a one, and gets the bits of all that is ever forgotten."""
    archive.checkpoint("monday", 1, 5000)
    archive.checkpoint("tuesday", 2, armed={1: 0b1})
    make_all_dirty(archive, "monday" if of == "the kept" else "tuesday")
    archive.forget("tuesday")
    assert (archive.dirty("monday"), archive.region_keys()) == (set(), 0)
    with archive.store.read() as reader:
        assert reader.bitmap(archive.points()[-1].bitmap_id).all_dirty == "a test"


def make_all_dirty(archive: Archive, name: str) -> None:
    def change(writer: Writer, disk: Disk) -> None:
        bitmap = writer.bitmap(chain.find_checkpoint(writer, disk, name).bitmap_id)
        writer.put_bitmap(dataclasses.replace(bitmap, all_dirty="a test"))

    archive.change(change)


def test_first_checkpoint_takes_its_bits_with_it(archive: Archive) -> None:
    archive.checkpoint("monday", 1)
    archive.checkpoint("tuesday", 2)
    archive.forget("epoch-1")
    archive.forget("monday")
    assert (archive.names(), archive.dirty("tuesday"), archive.region_keys()) == (["tuesday"], {2}, 1)
    with pytest.raises(InvalidArgument):
        archive.forget("tuesday")
    with pytest.raises(NotFound):
        archive.forget("monday")


def test_epochs_are_never_merged_into_each_other(archive: Archive) -> None:
    archive.checkpoint("monday", 1)
    archive.change(lambda writer, disk: chain.start_epoch(writer, disk, "a test", 0))
    archive.checkpoint("tuesday", 2)
    archive.forget("epoch-2")
    assert archive.dirty("monday") == {1}
    archive.forget("epoch-1")
    archive.forget("monday")  # the last of an old epoch may go
    assert (archive.names(), archive.dirty("tuesday")) == (["tuesday"], {2})


def test_merge_of_more_than_one_group_is_whole(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (records, tally):
        monkeypatch.setattr(module, "GROUP_REGIONS", 1)
    archive.checkpoint("monday", 1)
    archive.checkpoint("tuesday", 0, 4095, 4096, 8192)
    archive.forget("tuesday")
    assert archive.dirty("monday") == {0, 1, 4095, 4096, 8192}


# --- sizes ---


@pytest.mark.parametrize("blocks", [0, 1, 63, 64, 4095, 4096, 4097, 8192, BLOCKS])
def test_shrunk_disk_has_no_bits_past_its_end_in_any_bitmap(archive: Archive, blocks: int) -> None:
    dirty = (0, 62, 63, 64, 4095, 4096, 8191, 8192, BLOCKS - 1)
    archive.checkpoint("monday", *dirty)
    archive.checkpoint("tuesday", *dirty, armed={1: 0b10})
    archive.resize(blocks * GRANULARITY)
    left = {block for block in dirty if block < blocks}
    armed = {block for block in range(4096 + 64, 4096 + 128) if block < blocks}
    assert archive.dirty("monday") == left
    assert archive.dirty("tuesday") == left | armed
    with archive.store.read() as reader:
        assert {reader.bitmap(point.bitmap_id).size for point in archive.points()} == {blocks * GRANULARITY}


@pytest.mark.parametrize("size", [0, 1, 513])
def test_block_that_the_end_cuts_keeps_its_bit(archive: Archive, size: int) -> None:
    archive.checkpoint("monday", 0, 1, 2)
    archive.resize(size)
    assert archive.dirty("monday") == set(range(-(-size // GRANULARITY)))


@pytest.mark.parametrize("stale", [False, True], ids=["lost", "stale"])
def test_what_was_lost_before_a_shrink_is_dirty_after_it(archive: Archive, stale: bool) -> None:
    """Only the tally of the group misses it, and that goes with the group."""

    def lose(writer: Writer, disk: Disk) -> None:
        key = schema.region_key(chain.current_checkpoint(writer, disk).bitmap_id, 0)
        where = writer._databases["regions"]
        before = schema.encode_region(key, 0, schema.ALL_CLEAN_BITS)
        assert writer._txn.put(key, before, db=where) if stale else writer._txn.delete(key, db=where)
        writer.new_bitmap_id()

    archive.checkpoint("monday", 7)
    archive.change(lose)
    archive.resize(9 * GRANULARITY)
    assert archive.dirty("monday") == set(range(9))
    with archive.store.read() as reader:
        assert reader.bitmap(archive.points()[-1].bitmap_id).superset


def test_where_all_is_dirty_a_grown_disk_needs_no_records(archive: Archive) -> None:
    """An image that somebody else grew by terabytes begins an epoch, and would have millions in every period."""
    archive.checkpoint("monday", 1)
    before = archive.region_keys()
    archive.change(lambda writer, disk: chain.start_epoch(writer, disk, "it was grown", 0))
    disk = archive.resize(1 << 34)
    assert archive.region_keys() == before
    with archive.store.read() as reader:
        newest = reader.bitmap(chain.current_checkpoint(reader, disk).bitmap_id)
    assert (newest.size, newest.all_dirty) == (1 << 34, "a new epoch began: it was grown")


def test_grown_disk_is_dirty_from_its_old_end_on_in_every_bitmap(archive: Archive) -> None:
    archive.checkpoint("monday", 1)
    archive.checkpoint("tuesday", 2)
    archive.resize(SIZE + 3 * GRANULARITY)
    assert archive.dirty("monday") == {1, *range(BLOCKS - 1, BLOCKS + 3)}
    assert archive.dirty("tuesday") == {2, *range(BLOCKS - 1, BLOCKS + 3)}
    archive.resize(SIZE + 3 * GRANULARITY)
    assert archive.dirty("tuesday") == {2, *range(BLOCKS - 1, BLOCKS + 3)}


# --- marks by hand ---


@pytest.mark.parametrize(
    ("offset", "length", "blocks"),
    [
        (0, 0, set()),
        (0, 1, {0}),
        (511, 2, {0, 1}),
        (4095 * 512, 1024, {4095, 4096}),
        (SIZE - 1, 1, {BLOCKS - 1}),
        (0, SIZE, set(range(BLOCKS))),
    ],
)
def test_marking_rounds_outward(archive: Archive, offset: int, length: int, blocks: set[int]) -> None:
    archive.checkpoint("monday")

    def mark(writer: Writer, disk: Disk) -> None:
        bitmap = writer.bitmap(chain.current_checkpoint(writer, disk).bitmap_id)
        chain.mark_outward(writer, bitmap, offset, length)

    archive.change(mark)
    assert archive.dirty("monday") == blocks


def test_lookups_say_what_is_missing(archive: Archive) -> None:
    def look(reader: Reader) -> None:
        chain.find_checkpoint(reader, chain.find_disk(reader, "sda"), "sunday")

    with archive.store.read() as reader:
        with pytest.raises(NotFound) as refused:
            look(reader)
        assert "sunday" in str(refused.value)
        with pytest.raises(NotFound) as refused:
            chain.find_disk(reader, "sdz")
        assert "sdz" in str(refused.value)
