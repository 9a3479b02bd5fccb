"""What is settled, armed, written and disarmed, asked of a period over a real store."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pytest

from lmdbitmap import bits
from lmdbitmap.errors import StorageError
from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_BLOCKS, REGION_BYTES, REGION_EXTENTS
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import Bitmap
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import arming
from lmdbitmap.tracker import period as period_module
from lmdbitmap.tracker.period import Period

BLOCKS = 3 * REGION_BLOCKS - 100
GRANULARITY_BITS = 9
PATIENCE_SECONDS = 20.0

T = TypeVar("T")


class Interrupted(BaseException):
    """What Ctrl-C is to a thread that waits for the disk."""


class Notebook:
    """A store with one bitmap, a period over it, and a tap on the store's commits."""

    def __init__(self, folder: Path, **bitmap: str) -> None:
        self.store = Store.create(str(folder))
        size = BLOCKS << GRANULARITY_BITS
        self.bitmap = Bitmap(7, uuid4(), size, GRANULARITY_BITS, **bitmap)  # type: ignore[arg-type]
        self.store.update(lambda writer: writer.put_bitmap(self.bitmap))
        self.commits = 0
        self.before_commit: Callable[[int], None] = lambda number: None
        self._update = self.store.update
        self.store.update = self._counted  # type: ignore[method-assign]

    def period(self, *, write_ahead: bool = True, max_armed: int = 1024) -> Period:
        return Period(self.store, self.bitmap, write_ahead=write_ahead, max_armed=max_armed)

    def _counted(self, change: Callable[[Writer], T]) -> T:
        self.commits += 1
        self.before_commit(self.commits)
        return self._update(change)

    def put(self, region: int, armed: int, block_bits: bytes) -> None:
        self._update(lambda writer: writer.put_region(self.bitmap.id, region, armed, block_bits))

    def dirty(self) -> set[int]:
        """What the store calls dirty: what we would know if we died now."""
        found: set[int] = set()
        with self.store.read() as reader:
            for number, region in reader.regions(self.bitmap.id):
                for start, stop in bits.runs(bits.dirty_bits(region.armed, region.bits)):
                    found.update(range(number * REGION_BLOCKS + start, number * REGION_BLOCKS + stop))
        return found

    def armed(self) -> set[int]:
        """The numbers of the extents that the store has armed."""
        with self.store.read() as reader:
            return {
                number * 64 + extent
                for number, region in reader.regions(self.bitmap.id)
                for extent in range(64)
                if region.armed >> extent & 1
            }

    def records(self) -> list[int]:
        """The regions that have one."""
        with self.store.read() as reader:
            return [number for number, _ in reader.regions(self.bitmap.id)]

    def fail(self, number: int) -> None:
        raise StorageError("store", OSError(28, "full"), next_step="free some space")


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    notebook = Notebook(tmp_path / "store")
    yield notebook
    notebook.store.close()


def settled(period: Period) -> set[int]:
    return {block for run in bits.runs(period._memory) for block in range(*run)}


def block_bits(*blocks: int) -> bytes:
    buffer = bytearray(512)
    for block in blocks:
        buffer[block // 8] |= 1 << block % 8
    return bytes(buffer)


# --- law 1 ---


def test_block_is_durable_when_it_is_settled(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(70, 71), (5000, 5003)])
    assert settled(period) == {70, 5000, 5001, 5002}
    assert settled(period) <= notebook.dirty()
    assert notebook.commits == 1


def test_nothing_is_settled_before_the_commit_ends(notebook: Notebook) -> None:
    period = notebook.period()
    seen: list[set[int]] = []
    notebook.before_commit = lambda number: seen.append(settled(period))
    period.make_durable([(70, 71)])
    assert seen == [set()]


def test_failed_commit_settles_nothing(notebook: Notebook) -> None:
    period = notebook.period()
    notebook.before_commit = notebook.fail
    with pytest.raises(StorageError):
        period.make_durable([(70, 71)])
    assert settled(period) == set()
    assert period.armed_count == 0
    notebook.before_commit = lambda number: None
    period.make_durable([(71, 72)])
    assert 71 in notebook.dirty()


def test_empty_run_is_nothing(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([])
    period.make_durable([(0, 0)])
    assert notebook.commits == 0


def test_run_over_the_borders_of_regions_is_settled_whole(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(REGION_BLOCKS - 1, BLOCKS)])
    assert settled(period) == set(range(REGION_BLOCKS - 1, BLOCKS))
    assert settled(period) <= notebook.dirty()
    assert notebook.commits == 1


def test_waiting_writers_share_one_commit(notebook: Notebook) -> None:
    period = notebook.period()
    first_is_in, go_on = threading.Event(), threading.Event()

    def hold_the_first(number: int) -> None:
        if number == 1:
            first_is_in.set()
            assert go_on.wait(PATIENCE_SECONDS)

    notebook.before_commit = hold_the_first
    threads = [threading.Thread(target=period.make_durable, args=([(64 * n, 64 * n + 1)],)) for n in range(6)]
    threads[0].start()
    assert first_is_in.wait(PATIENCE_SECONDS)
    for thread in threads[1:]:
        thread.start()
    wait_for_queue(period, 6)
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert notebook.commits == 2
    assert settled(period) == {64 * n for n in range(6)}


def wait_for_queue(period: Period, length: int) -> None:
    """Return when so many requests wait or are being committed; nobody is told of that, so we look."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(period._queue) < length:
        assert time.monotonic() < deadline, f"{len(period._queue)} requests wait, and not {length}"
        time.sleep(0.001)


def test_interrupted_thread_does_not_take_others_requests_with_it(notebook: Notebook) -> None:
    """The second committer dies of Ctrl-C with the third one's request in hand."""
    period = notebook.period()
    first_is_in, go_on = threading.Event(), threading.Event()
    outcome: dict[int, str] = {}

    def interrupt_the_second(number: int) -> None:
        if number == 1:
            first_is_in.set()
            assert go_on.wait(PATIENCE_SECONDS)
        if number == 2:
            raise Interrupted

    def write(block: int) -> None:
        try:
            period.make_durable([(block, block + 1)])
        except Interrupted:
            outcome[block] = "interrupted"
            return
        outcome[block] = "durable" if block in notebook.dirty() else "lost"

    notebook.before_commit = interrupt_the_second
    threads = [threading.Thread(target=write, args=(block,)) for block in (0, 200, 400)]
    threads[0].start()
    assert first_is_in.wait(PATIENCE_SECONDS)
    for thread in threads[1:]:
        thread.start()
    wait_for_queue(period, 3)
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert sorted(outcome.values()) == ["durable", "durable", "interrupted"]


# --- arming ---


def test_new_dirt_in_an_armed_extent_costs_no_commit(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(70, 71)])
    period.make_durable([(90, 91), (127, 128)])
    assert notebook.commits == 1
    assert settled(period) == {70, 90, 127} <= notebook.dirty()
    period.make_durable([(128, 129)])
    assert notebook.commits == 2


def test_extents_that_are_covered_whole_are_not_armed(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(64, 192)])
    assert period.armed_count == 0
    assert notebook.dirty() == set(range(64, 192))


def test_sequential_writer_arms_ahead(notebook: Notebook) -> None:
    period = notebook.period()
    for block in range(1000):
        period.make_durable([(block, block + 1)])
    assert notebook.commits < 1000 / EXTENT_BLOCKS
    assert settled(period) == set(range(1000)) <= notebook.dirty()


def scatter(period: Period, extents: Iterable[int]) -> None:
    """One write into each extent, of a block in its middle."""
    for extent in extents:
        period.make_durable([(extent * EXTENT_BLOCKS + 7, extent * EXTENT_BLOCKS + 8)])


def test_writes_all_over_a_region_arm_the_rest_of_it(notebook: Notebook) -> None:
    period = notebook.period()
    places = random.Random(1).sample(range(2 * REGION_EXTENTS), 2 * REGION_EXTENTS)
    scatter(period, places)
    assert notebook.armed() == set(range(2 * REGION_EXTENTS))
    assert notebook.commits < REGION_EXTENTS


def test_few_writes_in_a_region_arm_only_where_they_are(notebook: Notebook) -> None:
    period = notebook.period()
    places = {*range(0, 30, 2), *range(64, 94, 2)}
    scatter(period, places)
    assert notebook.armed() == places


@pytest.mark.parametrize(("most", "armed"), [(128, REGION_EXTENTS), (127, 20)])
def test_rest_of_a_region_is_armed_within_half_of_the_limit(
    notebook: Notebook, most: int, armed: int
) -> None:
    """The other half is for writes: what is armed ahead must not drive out what is in use."""
    period = notebook.period(max_armed=most)
    scatter(period, range(0, 40, 2))
    assert period.armed_count == len(notebook.armed()) == armed


@pytest.mark.parametrize("max_armed", [0, 1, 2, 9])
def test_limit_of_armed_extents_holds_whatever_is_written(notebook: Notebook, max_armed: int) -> None:
    period = notebook.period(max_armed=max_armed)
    model: set[int] = set()
    for runs in [
        [(n * 64 + 1, n * 64 + 2) for n in range(0, 20)],
        [(n * 64 + 3, n * 64 + 4) for n in range(60, 70)],
        [(500, 2000)],
        [(block, block + 1) for block in range(2000, 2200)],
        [(1, 2), (5000, 5001), (9000, 9001)],
    ]:
        for run in runs:
            period.make_durable([run])
            model.update(range(*run))
        period.make_durable(runs)
        assert period.armed_count <= max_armed
        assert len(notebook.armed()) <= max_armed
        assert settled(period) == model <= notebook.dirty()
    assert max_armed == 0 or notebook.armed()


def test_many_extents_at_once_respect_the_limit_too(notebook: Notebook) -> None:
    period = notebook.period(max_armed=2)
    period.make_durable([(n * 64 + 1, n * 64 + 2) for n in range(100)])
    assert len(notebook.armed()) <= 2
    assert settled(period) == {n * 64 + 1 for n in range(100)} <= notebook.dirty()


@pytest.mark.parametrize("most", [1, 2])
def test_limit_of_armed_regions_holds_whatever_is_written(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Else a checkpoint would have records without end to write while writers wait."""
    monkeypatch.setattr(arming, "MOST_REGIONS", most)
    period, model = notebook.period(), set[int]()
    places = [(number * 7919) % BLOCKS for number in range(60)]
    for place in [*places, *range(100, 300), *places]:
        period.make_durable([(place, place + 1)])
        model.add(place)
        assert settled(period) == model <= notebook.dirty()
        assert len({extent // REGION_EXTENTS for extent in notebook.armed()}) <= most
    assert notebook.armed()


def test_extent_that_had_to_go_keeps_its_bits_and_commits_anew(notebook: Notebook) -> None:
    period = notebook.period(max_armed=1)
    period.make_durable([(0, 1)])
    period.make_durable([(1, 2)])
    period.make_durable([(REGION_BLOCKS, REGION_BLOCKS + 1)])
    assert notebook.armed() == {64}
    assert {0, 1} <= notebook.dirty()
    assert 2 not in notebook.dirty()
    before = notebook.commits
    period.make_durable([(2, 3)])
    assert notebook.commits == before + 1
    assert 2 in notebook.dirty()


# --- loading ---


def test_what_a_dead_owner_left_armed_is_dirty_to_the_last_block(notebook: Notebook) -> None:
    notebook.put(1, 0b10, block_bits(5))
    period = notebook.period()
    period.make_durable([(REGION_BLOCKS + 4000, REGION_BLOCKS + 4001)])
    expected = {REGION_BLOCKS + block for block in (5, 4000, *range(64, 128))}
    assert settled(period) == expected
    period.persist()
    assert notebook.dirty() == expected


def test_bits_past_the_end_are_not_taken_over(notebook: Notebook) -> None:
    notebook.put(2, (1 << 64) - 1, schema.ALL_DIRTY_BITS)
    period = notebook.period()
    period.make_durable([(BLOCKS - 1, BLOCKS)])
    assert settled(period) == set(range(2 * REGION_BLOCKS, BLOCKS))


def test_all_dirty_bitmap_needs_no_commit(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path / "store", all_dirty="a new epoch")
    period = notebook.period()
    period.make_durable([(0, BLOCKS)])
    assert notebook.commits == 0
    assert settled(period) == set(range(BLOCKS))
    notebook.store.close()


def test_extents_carried_over_are_armed_and_not_dirty(notebook: Notebook) -> None:
    """After a checkpoint the busy extents are armed in a bitmap that is all clean."""
    period = notebook.period()
    notebook.store.update(lambda writer: period.begin(writer, {0: 0b110}, []))
    before = notebook.commits
    period.make_durable([(100, 101)])
    assert notebook.commits == before
    assert settled(period) == {100}
    period.persist()
    assert notebook.dirty() == {100}


@pytest.mark.parametrize("how", ["persist", "put_exact", "disarm_quiet"])
def test_nothing_is_left_of_an_extent_that_was_armed_for_nothing(notebook: Notebook, how: str) -> None:
    period = notebook.period()
    notebook.store.update(lambda writer: period.begin(writer, {0: 0b110, 1: 1}))
    period.make_durable([(100, 101)])
    assert notebook.records() == [0, 1]
    if how == "put_exact":
        notebook.store.update(period.put_exact)
    else:
        for _ in range(2):
            period.persist() if how == "persist" else period.disarm_quiet(3)
    assert (notebook.records(), notebook.dirty(), notebook.armed()) == ([0], {100}, set())
    if how != "put_exact":  # which ends the period
        period.make_durable([(REGION_BLOCKS + 1, REGION_BLOCKS + 2)])
        assert notebook.dirty() >= {100, REGION_BLOCKS + 1}


@pytest.mark.parametrize("armed", [{}, {0: 0b110}])
def test_what_is_dirty_from_the_start_is_so_at_once_and_stays(
    notebook: Notebook, armed: dict[int, int]
) -> None:
    from_the_start = {3, 4, *range(REGION_BLOCKS - 2, REGION_BLOCKS + 2), BLOCKS - 1}
    runs = [(3, 5), (REGION_BLOCKS - 2, REGION_BLOCKS + 2), (BLOCKS - 1, BLOCKS)]
    period = notebook.period()
    notebook.store.update(lambda writer: period.begin(writer, armed, runs))
    assert from_the_start <= notebook.dirty()
    assert settled(period) == from_the_start
    before = notebook.commits
    period.make_durable(runs)
    assert notebook.commits == before
    period.make_durable([(7, 8)])
    period.persist()
    assert notebook.dirty() == {*from_the_start, 7}


@pytest.mark.parametrize("left_armed", [0, 0b110])
def test_what_is_dirty_already_stays_so_where_extents_are_armed_again(
    notebook: Notebook, left_armed: int
) -> None:
    """What a dead owner left armed is dirty, and is not taken for what is armed for us."""
    exact = bytearray(REGION_BYTES)
    exact[0] = 0b1000
    notebook.put(0, left_armed, bytes(exact))
    already = {3, *(range(EXTENT_BLOCKS, 3 * EXTENT_BLOCKS) if left_armed else ())}
    period = notebook.period()
    notebook.store.update(lambda writer: period.begin(writer, {0: 0b11}))
    before = notebook.commits
    period.make_durable([(7, 8)])
    assert notebook.commits == before
    assert settled(period) == {*already, 7}
    period.persist()
    assert notebook.dirty() == {*already, 7}


def test_nothing_is_armed_where_everything_is_dirty(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path / "store", all_dirty="by intent")
    period = notebook.period()
    notebook.store.update(lambda writer: period.begin(writer, {0: 0b11}))
    assert (period.armed_count, notebook.armed()) == (0, set())
    notebook.store.close()


# --- where dirt is likely next ---


def likely(period: Period) -> list[tuple[int, int]]:
    return list(period.likely_extents().items())


@pytest.mark.parametrize("how", ["pass", "persist"])
def test_dirt_is_likely_where_it_was_before_and_likelier_where_extents_are_armed(
    notebook: Notebook, how: str
) -> None:
    period = notebook.period()
    period.make_durable([(REGION_BLOCKS + 1, REGION_BLOCKS + 2)])
    period.make_durable([(70, 71)])
    if how == "persist":
        period.persist()
    else:
        period.disarm_quiet(0)
        assert period.disarm_quiet(10) == 2
    period.make_durable([(1, 2)])
    assert likely(period) == [(1, 0b1), (0, 0b11)]
    period.make_durable([(REGION_BLOCKS + 2, REGION_BLOCKS + 3)])
    assert likely(period) == [(0, 0b11), (1, 0b1)]


def test_dirt_is_not_likely_where_it_did_not_come_though_it_was(notebook: Notebook) -> None:
    period = notebook.period()
    notebook.store.update(lambda writer: period.begin(writer, {0: 0b101}, []))
    period.make_durable([(1, 2)])
    period.disarm_quiet(0)
    assert period.disarm_quiet(10) == 2
    assert likely(period) == [(0, 0b1)]


def test_half_of_what_may_be_armed_is_likely_the_last_that_was(notebook: Notebook) -> None:
    period = notebook.period(max_armed=6)
    for extent in range(5):
        period.make_durable([(extent * 64 + 1, extent * 64 + 2)])
        period.persist()
    assert likely(period) == [(0, 0b11100)]
    period.make_durable([(2, 3)])
    period.persist()
    assert likely(period) == [(0, 0b11001)]
    for extent in range(8, 13):
        period.make_durable([(extent * 64 + 1, extent * 64 + 2)])
    assert likely(period) == [(0, 0b11111 << 8)]


# --- the background pass ---


def test_extent_is_disarmed_after_a_whole_pass_without_new_dirt(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(70, 71)])
    assert period.disarm_quiet(10) == 0
    period.make_durable([(71, 72)])
    assert period.disarm_quiet(10) == 0
    assert period.disarm_quiet(10) == 1
    assert notebook.dirty() == {70, 71}
    assert notebook.armed() == set()


def test_extent_stays_armed_for_as_many_passes_as_one_asks_for(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(70, 71)])
    assert [period.disarm_quiet(10, passes=3) for _ in range(2)] == [0, 0]
    before = notebook.commits
    period.make_durable([(71, 72)])
    assert notebook.commits == before
    assert [period.disarm_quiet(10, passes=3) for _ in range(4)] == [0, 0, 0, 1]
    assert notebook.dirty() == {70, 71}


def test_one_quiet_pass_will_do_where_more_than_half_of_what_may_be_armed_is(notebook: Notebook) -> None:
    period = notebook.period(max_armed=8)
    for extent in range(6):
        period.make_durable([(extent * 64 + 1, extent * 64 + 2)])
    assert [period.disarm_quiet(10, passes=3) for _ in range(4)] == [0, 2, 0, 4]
    assert notebook.armed() == set()


def test_pass_disarms_a_bounded_number_longest_quiet_first(notebook: Notebook) -> None:
    period = notebook.period()
    for extent in (5, 3, 9, 1):
        period.make_durable([(extent * 64 + 1, extent * 64 + 2)])
    period.disarm_quiet(0)
    assert period.disarm_quiet(3) == 3
    assert notebook.armed() == {1}
    assert notebook.dirty() == {64 * 5 + 1, 64 * 3 + 1, 64 * 9 + 1, *range(64, 128)}


def test_pass_lets_writers_in_between(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has all that they wrote into extents that it disarms later."""
    monkeypatch.setattr(period_module, "_TAKEN_AT_ONCE", 3)
    period = notebook.period()
    scatter(period, range(10))
    disarm = period._disarm_some

    def followed_by_a_write(limit: int, passes: int) -> Counter[int]:
        found = disarm(limit, passes)
        bits.set_range(period.settled, 9 * EXTENT_BLOCKS + limit, 9 * EXTENT_BLOCKS + limit + 1)
        return found

    monkeypatch.setattr(period, "_disarm_some", followed_by_a_write)
    assert period.disarm_quiet(9, passes=0) == 9
    assert notebook.armed() == {9}
    period.persist()
    assert notebook.armed() == set()
    assert (
        notebook.dirty()
        == settled(period)
        == {
            *(extent * EXTENT_BLOCKS + 7 for extent in range(10)),
            *(9 * EXTENT_BLOCKS + limit for limit in (1, 3)),
        }
    )


def test_failed_pass_leaves_the_store_saying_too_much(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(70, 71)])
    period.disarm_quiet(0)
    notebook.before_commit = notebook.fail
    with pytest.raises(StorageError):
        period.disarm_quiet(10)
    assert notebook.dirty() == set(range(64, 128))
    notebook.before_commit = lambda number: None
    period.make_durable([(80, 81)])
    assert {70, 80} <= notebook.dirty()
    period.persist()
    assert notebook.dirty() == {70, 80}


def test_dirt_that_comes_while_a_pass_commits_is_not_lost(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(70, 71), (200, 201)])
    period.disarm_quiet(0)
    period.make_durable([(201, 202)])

    def write_in_between(number: int) -> None:
        notebook.before_commit = lambda number: None
        period.make_durable([(202, 203)])  # its extent is still armed: memory only

    notebook.before_commit = write_in_between
    assert period.disarm_quiet(10) == 1
    assert {70, 200, 201, 202} <= notebook.dirty()
    period.persist()
    assert notebook.dirty() == {70, 200, 201, 202}


@pytest.mark.parametrize("work", ["pass", "persist", "write"])
def test_commits_come_one_after_another_in_the_order_in_which_they_read(
    notebook: Notebook, work: str
) -> None:
    """A record that was read before another thread's commit, and written after it, would take its dirt away."""
    period = notebook.period()
    period.make_durable([(70, 71)])
    period.disarm_quiet(0)
    overtaken = threading.Event()
    other = threading.Thread(target=period.make_durable, args=([(640, 641)],))

    def let_another_try(number: int) -> None:
        notebook.before_commit = lambda number: overtaken.set()
        other.start()
        if overtaken.wait(0.2):
            other.join(PATIENCE_SECONDS)

    notebook.before_commit = let_another_try
    works: dict[str, Callable[[], object]] = {
        "pass": lambda: period.disarm_quiet(10),
        "persist": period.persist,
        "write": lambda: period.make_durable([(1280, 1281)]),
    }
    works[work]()
    other.join(PATIENCE_SECONDS)
    assert overtaken.is_set()
    assert {70, 640} <= notebook.dirty()


# --- persist, and the end of a period ---


def test_store_is_exact_after_persist(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(70, 71), (5000, 5001)])
    period.persist()
    assert notebook.dirty() == {70, 5000}
    assert period.armed_count == 0
    period.make_durable([(71, 72)])
    assert 71 in notebook.dirty()


def test_ended_period_writes_nothing_more(notebook: Notebook) -> None:
    period = notebook.period()
    period.make_durable([(70, 71)])
    with period.without_commits():
        period.end()
    before = notebook.commits
    period.disarm_quiet(10)
    period.disarm_quiet(10)
    period.persist()
    assert notebook.commits == before


# --- deferred mode ---


def test_deferred_commits_nothing_before_persist(notebook: Notebook) -> None:
    period = notebook.period(write_ahead=False)
    period.make_durable([(70, 71), (5000, 5001)])
    assert settled(period) == {70, 5000}
    assert (notebook.commits, notebook.dirty()) == (0, set())
    period.persist()
    assert notebook.dirty() == {70, 5000}


@pytest.mark.parametrize("how", ["fails", "is interrupted"])
def test_deferred_bits_survive_a_persist_that(notebook: Notebook, how: str) -> None:
    period = notebook.period(write_ahead=False)
    period.make_durable([(70, 71)])

    def stop(number: int) -> None:
        notebook.before_commit = lambda number: None
        if how == "fails":
            notebook.fail(number)
        raise Interrupted

    notebook.before_commit = stop
    with pytest.raises((StorageError, Interrupted)):
        period.persist()
    assert notebook.dirty() == set()
    period.persist()
    assert notebook.dirty() == {70}


def test_deferred_dirt_that_comes_while_persist_commits_is_written_next(notebook: Notebook) -> None:
    period = notebook.period(write_ahead=False)
    period.make_durable([(70, 71)])

    def write_in_between(number: int) -> None:
        notebook.before_commit = lambda number: None
        period.make_durable([(71, 72)])

    notebook.before_commit = write_in_between
    period.persist()
    assert notebook.dirty() == {70}
    notebook.store.update(period.put_exact)
    assert notebook.dirty() == {70, 71}


@pytest.mark.parametrize("loaded", [False, True])
def test_the_last_word_of_a_period_has_what_it_is_told_and_all_that_it_had(
    notebook: Notebook, loaded: bool
) -> None:
    notebook.period().make_durable([(70, 71), (REGION_BLOCKS - 1, REGION_BLOCKS)])
    period = notebook.period()
    if loaded:
        period.make_durable([(72, 73)])
    notebook.store.update(
        lambda writer: period.put_exact(writer, [(75, 77), (REGION_BLOCKS - 2, REGION_BLOCKS + 1)])
    )
    told = {75, 76, REGION_BLOCKS - 2, REGION_BLOCKS - 1, REGION_BLOCKS}
    assert {70, *told, *([72] if loaded else [])} <= notebook.dirty()
    assert notebook.armed() == set()
