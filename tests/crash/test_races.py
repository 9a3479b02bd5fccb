"""A short melee of each kind (races.py), races that are staged step by step, and proof that a loss is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager

import pytest

from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.interfaces import Buffer
from lmdbitmap.storage import schema
from lmdbitmap.store import Reader
from lmdbitmap.tracker import tracking as tracking_module
from lmdbitmap.tracker.lane import FilterLane
from lmdbitmap.tracker.tracking import Tracking
from tests.crash.melee import GEOMETRY, Melee, melee
from tests.crash.races import race_checkpoints, race_detach, race_failures, race_resizes
from tests.crash.tapped import WRITES, TappedDevice, Turnstile, join, start
from tests.helpers.support import PATIENCE_SECONDS
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder

TRIES = 40
"""In which a broken gate must be noticed."""


@pytest.mark.alone
@pytest.mark.parametrize("durability", schema.DURABILITIES)
def test_no_write_is_lost_among_checkpoints_and_all_else(durability: str) -> None:
    done = race_checkpoints(seed=1, checkpoints=12, durability=durability)
    assert done["landings"] > 100
    assert all(done[deed] for deed in ("ask", "export", "forget", "import", "over NBD", "mirrored")), done


@pytest.mark.alone
def test_no_write_is_lost_while_the_disk_grows_and_shrinks() -> None:
    done = race_resizes(seed=2, checkpoints=12)
    assert done["landings"] > 100
    assert done["refused"] > 10
    assert done["resize"] > 2


@pytest.mark.alone
def test_no_write_is_lost_while_commits_fail_and_trust_is_regained() -> None:
    done = race_failures(seed=4, checkpoints=12)
    assert done["landings"] > 100
    assert done["commit failed"] > 2
    assert done["epoch began"] > 1


@pytest.mark.alone
def test_write_beside_a_detach_is_dirty_or_refused() -> None:
    done = race_detach(seed=3, rounds=4)
    assert done["landings"] > 40
    assert done["refused"] == 4 * 4


# --- staged ---


@pytest.fixture
def tracked() -> Iterator[TrackedDisk]:
    with quick_folder() as folder, closing(TrackedDisk(folder, GEOMETRY.size).clean()) as tracked:
        yield tracked


def test_question_about_trust_may_be_asked_during_a_checkpoint(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its view of the store is from before the checkpoint, its view of memory from after it."""
    disk, read = tracked.attach(), tracked.store.read
    taken = []

    def read_during_a_checkpoint() -> AbstractContextManager[Reader]:
        monkeypatch.undo()
        return slow_read(read(), lambda: taken.append(disk.checkpoint("monday")))

    monkeypatch.setattr(tracked.store, "read", read_during_a_checkpoint)
    assert disk.standing().trust is Trust.EXACT
    assert len(taken) == 1
    disk.detach()


@contextmanager
def slow_read(view: AbstractContextManager[Reader], meanwhile: Callable[[], object]) -> Iterator[Reader]:
    with view as reader:
        join(start(meanwhile))
        yield reader


# --- the laboratory can fail ---


class UnseenLane(FilterLane):
    """Nobody sees that it is busy, so that a gate which closes does not wait for its write."""

    __slots__ = ()

    @property
    def busy(self) -> bool:
        return False

    @busy.setter
    def busy(self, busy: bool) -> None:
        pass


@pytest.fixture
def broken_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a disk notice a write that comes in the middle of a change of its chain."""
    monkeypatch.setattr(tracking_module, "FilterLane", UnseenLane)
    monkeypatch.setattr(Tracking, "stray", lambda tracking: None)


@pytest.mark.usefixtures("broken_gate")
@pytest.mark.parametrize("settled", [True, False], ids=["settled before", "new dirt"])
@pytest.mark.parametrize("kind", list(WRITES))
def test_freeze_that_does_not_drain_loses_the_write_between_its_mark_and_its_data(
    tracked: TrackedDisk, kind: str, settled: bool
) -> None:
    """The counterpart of the test in property/test_laws.py where the gate is sound, and waits."""
    disk = Filter.attach(tracked.store, NAME, open_device=TappedDevice.open, background=False)
    if settled:
        disk.pwrite(b"first", 0)
    turnstile, lane = Turnstile(), disk.lane()
    disk.device.before_change = turnstile  # type: ignore[attr-defined]
    writer = start(lambda: WRITES[kind](lane))
    assert turnstile.arrived.wait(PATIENCE_SECONDS)
    disk.checkpoint("monday")
    turnstile.go_on.set()
    join(writer)
    assert blocks_of(disk.changes(since="monday")) == set()  # though it was written after monday
    disk.detach()


@pytest.mark.alone
@pytest.mark.usefixtures("broken_gate")
def test_melee_notices_a_freeze_that_does_not_drain() -> None:
    assert any("before their dirt was durable" in said for said in complaints(Melee.judge))


@pytest.mark.alone
@pytest.mark.usefixtures("broken_gate")
def test_melee_notices_by_the_periods_alone_that_a_write_is_lost() -> None:
    def judge_periods(fighting: Melee) -> None:
        fighting.watcher.breaches.clear()
        fighting.judge()

    assert any("are in no period" in said for said in complaints(judge_periods))


@pytest.mark.usefixtures("broken_gate")
def test_mirror_notices_a_freeze_that_does_not_drain() -> None:
    """Staged, as the other disk's writes are too quick to be caught by chance between their mark and their data."""
    with melee(seed=0) as fighting:
        turnstile, lane = Turnstile(), fighting.sdb.lane()

        def held_pwrite(fd: int, data: Buffer, offset: int) -> int:
            turnstile(offset, len(data))
            return os.pwrite(fd, data, offset)

        lane._pwrite = held_pwrite
        writer = start(lambda: lane.pwrite(b"late", 0))
        assert turnstile.arrived.wait(PATIENCE_SECONDS)
        fighting.copy_to_mirror()
        turnstile.go_on.set()
        join(writer)
        fighting.end()
        with pytest.raises(AssertionError, match="the mirror is not the image"):
            fighting.judge_mirror()


def complaints(judge: Callable[[Melee], None]) -> Iterator[str]:
    """What each of some melees is judged to have done wrong."""
    for seed in range(TRIES):
        with melee(seed) as fighting:
            fighting.play_writers()
            fighting.troupe.play(fighting.copy_to_mirror)
            fighting.take_checkpoints(10)
            fighting.end()
            try:
                judge(fighting)
            except AssertionError as complaint:
                yield str(complaint)
