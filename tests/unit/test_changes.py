"""What changed, and how far that can be believed, asked by somebody who is not the owner."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest

from lmdbitmap.errors import Busy, InvalidArgument, NotFound, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.storage import schema
from lmdbitmap.storage.mending import mend_closed_periods
from lmdbitmap.storage.owner import Owner
from lmdbitmap.storage.tally import GROUP_REGIONS
from lmdbitmap.store import Store
from lmdbitmap.tracker.changes import Changes, dirty_bytes_of_period
from tests.helpers.tracked import TrackedDisk, blocks_of, trust_of

SIZE = 40 * 4096 - 100
BLOCKS = 40
PATIENCE_S = 10.0


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked:
        yield tracked


def test_new_disk_is_all_dirty(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE)) as tracked:
        answer = tracked.changes()
        assert blocks_of(answer) == set(range(BLOCKS))
        assert answer.summary.dirty_bytes == SIZE


def test_changes_add_up_from_a_checkpoint_to_now_or_to_another(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 0)
        disk.checkpoint("monday")
        disk.pwrite(b"x", 4096)
        disk.checkpoint("tuesday")
        disk.pwrite(b"x", 39 * 4096)
    assert blocks_of(tracked.changes("start")) == {0, 1, 39}
    assert blocks_of(tracked.changes("monday")) == {1, 39}
    assert blocks_of(tracked.changes()) == blocks_of(tracked.changes("tuesday")) == {39}
    assert blocks_of(tracked.changes("start", "tuesday")) == {0, 1}
    assert blocks_of(tracked.changes("monday", "tuesday")) == {1}
    assert tracked.changes("tuesday").summary.dirty_bytes == 4096 - 100
    assert [extent[:2] for extent in tracked.changes("start").extents()] == [(0, 8192), (39 * 4096, 3996)]


def test_questions_that_have_no_answer(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        disk.checkpoint("monday")
    with pytest.raises(InvalidArgument):
        tracked.changes("monday", "start")
    with pytest.raises(InvalidArgument):
        tracked.changes("monday", "monday")
    for since, until in (("", None), ("start", ""), ("sunday", None), ("start", "sunday")):
        with pytest.raises(NotFound):
            tracked.changes(since, until)


def test_checkpoint_of_an_older_epoch_is_refused(tracked: TrackedDisk) -> None:
    tracked.write_behind_our_back(b"stranger", 0)
    tracked.attach().detach()
    with pytest.raises(Untrusted):
        tracked.changes("start")
    with pytest.raises(Untrusted):
        tracked.changes("epoch-1", "start")
    assert blocks_of(tracked.changes("epoch-2")) == set(range(BLOCKS))


# --- trust ---


def test_image_that_a_stranger_wrote_is_not_trusted(tracked: TrackedDisk) -> None:
    assert trust_of(tracked.changes("start")) is Trust.EXACT
    tracked.write_behind_our_back(b"stranger", 0)
    assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED
    assert blocks_of(tracked.changes("start")) == set(range(BLOCKS))


def test_lock_that_somebody_holds_does_not_vouch_for_the_image(tracked: TrackedDisk) -> None:
    """Whoever attaches or adopts holds the lock before he has looked at the image."""
    tracked.write_behind_our_back(b"stranger", 0)
    with closing(Owner(tracked.store.owner_path(tracked.disk().uuid))):
        assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED


def test_lock_held_after_a_crash_does_not_vouch_for_the_image(tracked: TrackedDisk) -> None:
    disk = tracked.attach()
    disk.pwrite(b"x", 0)
    disk.abandon()
    with closing(Owner(tracked.store.owner_path(tracked.disk().uuid))):
        assert trust_of(tracked.changes("start")) is not Trust.UNTRUSTED
        tracked.write_behind_our_back(b"stranger", 0)
        assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED


def test_owner_who_lives_vouches_for_his_own_writes(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 0)
        assert trust_of(tracked.changes("start")) is Trust.SUPERSET  # the extent is armed
        assert 0 in blocks_of(tracked.changes("start"))
        disk.persist()
        assert trust_of(tracked.changes("start")) is Trust.EXACT
        assert blocks_of(tracked.changes("start")) == {0}


def test_owner_whose_signs_of_life_ended_is_not_believed(tracked: TrackedDisk) -> None:
    """That is how an owner says that he lost track when he can write nothing else (filter.py)."""
    with tracked.attach() as disk:
        tracked.write_behind_our_back(b"untracked", 0)
        assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED
        disk.beat()
        assert trust_of(tracked.changes("start")) is Trust.EXACT


def test_deferred_disk_is_not_trusted_while_it_is_attached(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE, durability=schema.DEFERRED).clean()) as tracked:
        disk = tracked.attach()
        disk.pwrite(b"x", 0)
        assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED
        assert blocks_of(disk.changes(since="start")) == {0}
        disk.detach()
        assert blocks_of(tracked.changes("start")) == {0}
        disk = tracked.attach()
        disk.abandon()
        assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED


@pytest.mark.parametrize("damage", ["gone", "another"])
def test_image_that_cannot_be_compared_is_not_trusted(tracked: TrackedDisk, damage: str) -> None:
    data = tracked.image.read_bytes()
    tracked.image.unlink()
    if damage == "another":
        tracked.image.write_bytes(data)
    assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED


def damage_the_record(tracked: TrackedDisk, period: int = -1) -> None:
    with tracked.store.read() as reader:
        bitmap_id = reader.checkpoints(tracked.disk().uuid)[period].bitmap_id
    key = schema.region_key(bitmap_id, 0)
    record = bytearray(schema.encode_region(key, 0, schema.ALL_CLEAN_BITS))
    record[100] ^= 1
    tracked.store.update(lambda writer: writer._put("regions", key, bytes(record)))


def test_damaged_record_is_all_dirty_and_a_superset(
    tracked: TrackedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 0)
    damage_the_record(tracked)
    answer = tracked.changes("start")
    assert blocks_of(answer) == set(range(BLOCKS))
    assert trust_of(answer) is Trust.SUPERSET
    assert "damaged" in caplog.text


def forget_its_checkpoint(disk: Filter) -> None:
    disk.forget("damaged")


def forget_the_next_one(disk: Filter) -> None:
    disk.forget("next")


def grow(disk: Filter) -> None:
    disk.resize(SIZE + 4096)


def shrink(disk: Filter) -> None:
    disk.resize(SIZE - 4096)


def import_into_it(disk: Filter) -> None:
    disk.forget("next")
    disk.mark_regions([(0, bytes([1]).ljust(512, b"\0"))], disk.disk.geometry)


@pytest.mark.parametrize("deed", [forget_its_checkpoint, forget_the_next_one, grow, shrink, import_into_it])
def test_damaged_record_that_is_written_anew_leaves_a_superset(
    tracked: TrackedDisk, deed: Callable[[Filter], None]
) -> None:
    """Else what is named because of the damage would count as exact, and could be subtracted from other bitmaps."""
    with tracked.attach() as disk:
        for name in ("damaged", "next"):
            disk.checkpoint(name)
            disk.pwrite(b"x", 0)
    damage_the_record(tracked, period=-2)
    with tracked.attach() as disk:
        deed(disk)
    answer = tracked.changes("start")
    assert blocks_of(answer) == set(range(answer.geometry.block_count))
    assert trust_of(answer) is Trust.SUPERSET


def test_closed_period_does_not_depend_on_the_image(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 0)
        disk.checkpoint("monday")
    tracked.write_behind_our_back(b"stranger", 8192)
    assert trust_of(tracked.changes("start", "monday")) is Trust.EXACT
    assert blocks_of(tracked.changes("start", "monday")) == {0}


def test_each_period_of_a_chain_by_itself(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x" * 4096, 0)
        disk.checkpoint("monday")
        disk.pwrite(b"x" * 9000, 37 * 4096)
        disk.checkpoint("tuesday")
        disk.checkpoint("wednesday")
        with tracked.store.read() as reader:
            pairs = list(itertools.pairwise(reader.checkpoints(disk.disk.uuid)[1:]))
        found = [dirty_bytes_of_period(tracked.store, disk.disk, *pair) for pair in pairs]
        assert found == [4096, 2 * 4096 + 3996, 0]
        disk.forget("monday")
        for pair in pairs[:2]:
            with pytest.raises(Untrusted, match="was forgotten"):
                dirty_bytes_of_period(tracked.store, disk.disk, *pair)
        assert dirty_bytes_of_period(tracked.store, disk.disk, *pairs[2]) == 0
        before = disk.disk
        disk.resize(2 * SIZE)
        with pytest.raises(Busy):
            dirty_bytes_of_period(tracked.store, before, *pairs[2])
        disk.start_epoch("track was lost")
        with pytest.raises(Busy):
            dirty_bytes_of_period(tracked.store, disk.disk, *pairs[2])


# --- while others change the chain ---


def test_forgotten_middle_changes_nothing_and_a_forgotten_end_is_said(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        for number, name in enumerate(("monday", "tuesday", "wednesday")):
            disk.pwrite(b"x", 4096 * number)
            disk.checkpoint(name)
        answer = tracked.changes("start", "wednesday")
        disk.forget("monday")
        assert blocks_of(answer) == {0, 1, 2}
        disk.forget("wednesday")
        with pytest.raises(Untrusted):
            blocks_of(answer)


def test_bitmap_that_is_mended_under_a_reader_is_not_read_on(tmp_path: Path) -> None:
    """Its records go, as all of it is dirty from then on: where the reader has not been yet they would seem clean."""
    far = GROUP_REGIONS * REGION_BLOCKS
    with closing(TrackedDisk(tmp_path, 512 * (far + 1), granularity_bits=9).clean()) as tracked:
        with tracked.attach() as disk:
            disk.pwrite(b"x", 0)
            disk.pwrite(b"x", 512 * far)
            disk.checkpoint("monday")
        damage_the_record(tracked, period=-2)
        reader = tracked.changes("start", "monday").runs(0, far + 1)
        assert next(reader) == (0, REGION_BLOCKS)
        mend_closed_periods(tracked.store, tracked.disk())
        with pytest.raises(Busy, match="mended just now"):
            list(reader)
        assert list(tracked.changes("start", "monday").runs()) == [(0, far + 1)]


def test_new_epoch_under_a_reader_is_all_dirty(tracked: TrackedDisk) -> None:
    answer = tracked.changes("start")
    tracked.write_behind_our_back(b"stranger", 0)
    tracked.attach().detach()
    assert blocks_of(answer) == set(range(BLOCKS))


@pytest.mark.parametrize("regions", [1, 3, 5000], ids=lambda count: f"{count} regions")
def test_a_part_of_the_disk_can_be_asked_alone(tmp_path: Path, regions: int) -> None:
    """Also where slices of regions end, and whatever lies around the part."""
    chosen = random.Random(regions)
    blocks = regions * 4096 - 7
    with closing(TrackedDisk(tmp_path, blocks * 512, 9).clean()) as tracked:
        with tracked.attach() as disk:
            borders = {0, 1024 * 4096, blocks - 1} | {chosen.randrange(blocks) for _ in range(40)}
            for block in (border for border in borders if border < blocks):
                disk.mark(block * 512, min(chosen.choice([1, 3]), blocks - block) * 512)
        answer = tracked.changes()
        dirty = blocks_of(answer)
        edges = [0, blocks, 4096, 1024 * 4096, *chosen.sample(sorted(dirty), 10)]
        for start, stop in [(a, b) for a in edges for b in edges if a <= b <= blocks]:
            runs = list(answer.runs(start, stop))
            assert [b for run in runs for b in range(*run)] == sorted(b for b in dirty if start <= b < stop)
            assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))


class HungStore(Store):
    """A store that does not answer, as on a disk that hangs, until it is told to."""

    def __init__(self) -> None:
        self.asked, self.goes_on = threading.Event(), threading.Event()

    def read(self) -> NoReturn:
        self.asked.set()
        assert self.goes_on.wait(PATIENCE_S)
        raise Busy("it hung", next_step="ask again")


def test_store_that_hangs_delays_no_answer_from_another(tracked: TrackedDisk) -> None:
    store, summaries = HungStore(), []

    def ask(answer: Changes) -> threading.Thread:
        def look() -> None:
            with contextlib.suppress(Busy):
                summaries.append(answer.summary)

        thread = threading.Thread(target=look)
        thread.start()
        return thread

    answer = tracked.changes()
    hanging = ask(dataclasses.replace(answer, store=store))
    assert store.asked.wait(PATIENCE_S)
    answering = ask(answer)
    answering.join(PATIENCE_S / 2)
    answered = len(summaries)
    store.goes_on.set()
    hanging.join()
    answering.join()
    assert answered == 1
