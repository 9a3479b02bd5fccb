"""Operations whoever owns the disk: the same through its server as by owning it for a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import lmdbitmap
from lmdbitmap.errors import Busy, InvalidArgument, NotFound
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.store import Store
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder

BLOCK = 4096
SIZE = 256 * BLOCK


@pytest.fixture
def tracked() -> Iterator[TrackedDisk]:
    """With a checkpoint called `start`, after which nothing is dirty."""
    with quick_folder() as folder:
        made = TrackedDisk(folder, SIZE).clean()
        yield made
        made.close()


@pytest.fixture(params=["at rest", "served"])
def owner(tracked: TrackedDisk, request: pytest.FixtureRequest) -> Iterator[Filter | None]:
    """The filter of the process that serves the disk, if there is one."""
    with ExitStack() as stack:
        if request.param == "at rest":
            yield None
            return
        filters = {NAME: stack.enter_context(tracked.attach())}
        server = Server(filters)
        stack.callback(server.stop)
        stack.enter_context(ControlServer(filters, server=server))
        yield filters[NAME]


def write(tracked: TrackedDisk, owner: Filter | None, block: int) -> None:
    with ExitStack() as stack:
        disk = stack.enter_context(tracked.attach()) if owner is None else owner
        disk.pwrite(b"x", block * BLOCK)


def changed(tracked: TrackedDisk, since: str) -> set[int]:
    answer = lmdbitmap.ask_changes(tracked.store, NAME, since=since)
    assert answer.summary.standing.trust is Trust.EXACT
    return blocks_of(answer)


def test_what_changed_is_exact_to_the_block_since_any_checkpoint(
    tracked: TrackedDisk, owner: Filter | None
) -> None:
    write(tracked, owner, 3)
    lmdbitmap.checkpoint_disks(tracked.store, [NAME], "noon")
    write(tracked, owner, 200)
    assert changed(tracked, "noon") == {200}
    assert changed(tracked, "start") == {3, 200}


def test_a_checkpoint_that_is_forgotten_gives_its_blocks_to_the_one_before(
    tracked: TrackedDisk, owner: Filter | None
) -> None:
    write(tracked, owner, 3)
    lmdbitmap.checkpoint_disks(tracked.store, [NAME], "noon")
    lmdbitmap.forget_checkpoint(tracked.store, NAME, "noon")
    assert "noon" not in tracked.checkpoints()
    assert changed(tracked, "start") == {3}
    with pytest.raises(NotFound, match="has no checkpoint 'noon'"):
        lmdbitmap.forget_checkpoint(tracked.store, NAME, "noon")


@pytest.mark.parametrize("name", [None, b"noon", 5, "a\nb"])
def test_what_cannot_name_a_checkpoint_is_refused(
    tracked: TrackedDisk, owner: Filter | None, name: Any
) -> None:
    with pytest.raises(InvalidArgument, match=r"^checkpoint name"):
        lmdbitmap.checkpoint_disks(tracked.store, [NAME], name)
    with pytest.raises(InvalidArgument, match=r"^checkpoint name"):
        lmdbitmap.take_served_snapshot(tracked.store, [NAME], name)


def test_marking_makes_every_block_dirty_that_the_range_touches(
    tracked: TrackedDisk, owner: Filter | None
) -> None:
    lmdbitmap.mark_dirty(tracked.store, NAME, 2 * BLOCK - 1, 2)
    assert tracked.stored_dirt() >= {1, 2}
    assert changed(tracked, "start") == {1, 2}
    with pytest.raises(InvalidArgument):
        lmdbitmap.mark_dirty(tracked.store, NAME, SIZE, 1)


def test_a_disk_that_is_removed_is_unknown_and_its_image_stays(
    tracked: TrackedDisk, owner: Filter | None
) -> None:
    lmdbitmap.remove(tracked.store, NAME)
    assert tracked.image.stat().st_size == SIZE
    with pytest.raises(NotFound, match="no disk is called"):
        lmdbitmap.mark_dirty(tracked.store, NAME, 0, 1)


OPERATIONS: list[Callable[[Store], None]] = [
    lambda store: lmdbitmap.checkpoint_disks(store, [NAME], "noon"),
    lambda store: lmdbitmap.forget_checkpoint(store, NAME, "start"),
    lambda store: lmdbitmap.mark_dirty(store, NAME, 0, 1),
    lambda store: lmdbitmap.remove(store, NAME),
]


@pytest.mark.parametrize("operate", OPERATIONS, ids=["checkpoint", "forget", "mark", "remove"])
def test_an_agent_that_only_embeds_the_tracker_is_in_the_way(
    tracked: TrackedDisk, operate: Callable[[Store], None]
) -> None:
    with tracked.attach() as embedded:
        with pytest.raises(Busy, match=NAME):
            operate(tracked.store)
        embedded.pwrite(b"x", 0)
    assert tracked.checkpoints()[1:] == ["start"]
    assert changed(tracked, "start") == {0}


def test_a_bitmap_is_removed_like_a_disk(tracked: TrackedDisk, owner: Filter | None) -> None:
    lmdbitmap.keep_changes(lmdbitmap.ask_changes(tracked.store, NAME, since="start"), "kept")
    lmdbitmap.remove(tracked.store, "kept")
    with tracked.store.read() as view:
        assert view.bitmaps() == []
        assert [disk.name for disk in view.disks()] == [NAME]
    with pytest.raises(NotFound, match="no disk or bitmap is called 'kept'"):
        lmdbitmap.remove(tracked.store, "kept")


def test_adopting_says_whether_there_was_anything_to_vouch_for(
    tracked: TrackedDisk, owner: Filter | None
) -> None:
    if owner is None:
        tracked.write_behind_our_back(b"x", 5 * BLOCK)
    assert lmdbitmap.adopt(tracked.store, NAME) == lmdbitmap.Adopted(is_served=owner is not None, lost=None)
    assert changed(tracked, "start") == set()
