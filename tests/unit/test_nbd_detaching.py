"""Letting go of a served disk, where that is not the owner's to do, or where the disk does not let go cleanly."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lmdbitmap.errors import Busy, NotFound, StorageError
from lmdbitmap.filter import Filter
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.control import orders
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.tracker.scratch import Scratch
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

SIZE = 64 * 4096


class Owner(NamedTuple):
    tracked: TrackedDisk
    attached: Filter
    filters: dict[str, Filter]
    server: Server
    control: ControlServer

    def call(self, operation: str) -> dict[str, Any]:
        path = self.tracked.store.control_path(self.attached.disk.uuid)
        return control_client.call(path, operation, disk=NAME)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@contextmanager
def owning(folder: Path, *, serves: bool) -> Iterator[Owner]:
    with ExitStack() as stack:
        tracked = TrackedDisk(folder, SIZE).clean()
        stack.callback(tracked.close)
        filters = {NAME: tracked.attach()}
        attached = stack.enter_context(filters[NAME])
        server = Server(filters)
        stack.callback(server.stop)
        control = stack.enter_context(ControlServer(filters, server=server if serves else None))
        yield Owner(tracked, attached, filters, server, control)


def test_bits_are_exact_and_the_disk_free_when_it_is_let_go(folder: Path) -> None:
    with owning(folder, serves=True) as owner:
        owner.attached.pwrite(b"x", 5 * 4096)
        assert owner.call("detach") == {}
        assert owner.filters == {}
        assert owner.tracked.stored_dirt() == {5}
        with owner.tracked.attach() as again:
            assert again.disk.epoch_number == 1


def test_a_snapshot_of_a_disk_that_is_let_go_is_held_no_more(folder: Path) -> None:
    """Also where the agent gave one mapping to both: the caller whom it was bound to may hang up later."""
    with owning(folder, serves=True) as owner:
        held = HeldSnapshots(owner.filters, owner.server, Scratch(folder))
        [snapshot] = held.take([NAME], "monday")
        assert held.is_held(snapshot)
        held.release(snapshot)
        owner.call("detach")
        assert not held.is_held(snapshot)


def test_an_agent_that_embeds_the_tracker_keeps_its_disk(folder: Path) -> None:
    with owning(folder, serves=False) as owner:
        with pytest.raises(Busy, match="is used by the process that has it"):
            owner.call("detach")
        owner.attached.pwrite(b"x", 0)


def test_a_disk_that_does_not_end_cleanly_is_let_go_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flush() -> None:
        raise OSError(errno.EIO, "no flush")

    with owning(folder, serves=True) as owner:
        monkeypatch.setattr(owner.attached.device, "flush", no_flush)
        caller = control_client.reach(owner.tracked.store.control_path(owner.attached.disk.uuid))
        assert caller is not None
        with caller:
            with pytest.raises(StorageError):
                caller.call("detach", disk=NAME)
            with pytest.raises(NotFound, match="is not served by this process"):
                caller.call("mark", disk=NAME, offset=0, length=1)
        monkeypatch.undo()
        with owner.tracked.attach() as again:
            assert again.disk.epoch_number == 2


def test_a_disk_about_which_something_is_asked_just_now_stays(folder: Path) -> None:
    with owning(folder, serves=True) as owner:
        assert owner.control.detaching is not None
        with owner.control.detaching.staying([NAME]), pytest.raises(Busy, match="is used at this moment"):
            owner.call("detach")
        owner.call("detach")


def test_names_that_callers_make_up_are_not_kept(folder: Path) -> None:
    with owning(folder, serves=True) as owner:
        assert owner.control.detaching is not None
        path = owner.tracked.store.control_path(owner.attached.disk.uuid)
        with pytest.raises(Busy, match="and not no such disk"):
            control_client.call(path, "checkpoint", disks=["no such disk", NAME], name="a")
        assert not owner.control.detaching._used


def test_a_checkpoint_and_a_snapshot_keep_their_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From when it is looked up until it is done."""
    refusals: list[str] = []

    def let_go_meanwhile(*_: object) -> None:
        try:
            owner.call("detach")
        except Busy as busy:
            refusals.append(busy.problem)
        raise NotFound("enough", next_step="none")

    with owning(folder, serves=True) as owner:
        monkeypatch.setattr(orders, "_require_ours", let_go_meanwhile)
        path = owner.tracked.store.control_path(owner.attached.disk.uuid)
        with pytest.raises(NotFound, match="enough"):
            control_client.call(path, "checkpoint", disks=[NAME], name="a")
        with pytest.raises(NotFound, match="enough"):
            control_client.call(path, "snapshot", disks=[NAME], name="b", since=[""], bound=False, once=False)
        assert refusals == [f"disk {NAME!r} is used at this moment"] * 2


def test_a_server_ends_when_its_last_disk_is_let_go_and_not_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may take long to be detached."""
    with owning(folder, serves=True) as owner:
        stops: list[bool] = []
        monkeypatch.setattr(owner.server, "request_stop", lambda: stops.append(True))
        detaching = owner.control.detaching
        assert detaching is not None
        detaching._detaching += 1
        owner.call("detach")
        assert stops == []
        detaching._end_with_the_last()
        assert stops == [True]
