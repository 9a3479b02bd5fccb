"""A checkpoint is answered when a power cut can no longer take back what came before it."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import msgpack
import pytest

from lmdbitmap.errors import StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import FarAway
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain, points, session
from lmdbitmap.tracker.tracking import Tracking
from tests.helpers.support import make_raw_image

SIZE = 1 << 20


class Watched(FileDevice):
    """An image that runs `at_flush` before each flush."""

    at_flush: Callable[[], None] = staticmethod(lambda: None)

    def flush(self) -> None:
        self.at_flush()
        super().flush()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(str(tmp_path / "store")) as made:
        yield made


def attach(store: Store, tmp_path: Path, name: str) -> Filter:
    session.add(store, name, str(make_raw_image(tmp_path / f"{name}.raw", SIZE)), granularity_bits=12)
    return Filter.attach(store, name, background=False, open_device=Watched.open)


def names(store: Store, disk: Filter) -> list[str]:
    with store.read() as reader:
        return [checkpoint.name for checkpoint in reader.checkpoints(disk.disk.uuid)]


def test_writers_do_not_wait_longer_the_more_checkpoints_there_are(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    def counted(data: bytes, **how: object) -> object:
        decoded.append(data)
        return unpackb(data, **how)

    unpackb = msgpack.unpackb
    monkeypatch.setattr(msgpack, "unpackb", counted)
    costs = []
    with attach(store, tmp_path, "sda") as disk:
        for number in range(40):
            decoded.clear()
            disk.checkpoint(f"number {number}")
            costs.append(len(decoded))
    assert costs[-1] == costs[1] > 0


def test_the_image_is_flushed_after_the_commit_and_while_writers_go_on(store: Store, tmp_path: Path) -> None:
    with attach(store, tmp_path, "sda") as disk:
        seen = []

        def look_and_write() -> None:
            seen.append(names(store, disk))
            disk.pwrite(b"the guest writes on", 8192)

        disk.device.at_flush = look_and_write  # type: ignore[attr-defined]
        disk.checkpoint("monday")
        del disk.device.at_flush  # type: ignore[attr-defined]
        assert seen == [["epoch-1", "monday"]]
        assert list(disk.changes(since="monday").runs()) == [(2, 3)]


def test_an_image_that_cannot_be_flushed_has_no_checkpoint_nor_have_the_others(
    store: Store, tmp_path: Path
) -> None:
    def refuse() -> None:
        raise OSError(errno.EIO, "the disk fails")

    failing = attach(store, tmp_path, "sdb")
    with attach(store, tmp_path, "sda") as sound:
        take_checkpoint([sound, failing], "monday")
        sound.pwrite(b"x", 0)
        failing.device.at_flush = refuse  # type: ignore[attr-defined]
        with pytest.raises(StorageError, match="no checkpoint was made"):
            take_checkpoint([sound, failing], "tuesday")
        failing.abandon()
        sound.pwrite(b"x", 4096)
        assert names(store, sound) == names(store, failing) == ["epoch-1", "monday"]
        assert list(sound.changes(since="monday").runs()) == [(0, 2)]
        with store.read() as reader:
            assert chain.current_checkpoint(reader, sound.disk).name == "monday"


def test_an_image_that_hangs_in_a_write_keeps_no_other_disks_guest_waiting(
    store: Store, tmp_path: Path
) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(offset: int, length: int) -> None:
        hangs.set()
        assert goes_on.wait(20)

    with attach(store, tmp_path, "sda") as one, attach(store, tmp_path, "sdb") as two:
        sound, hanging = sorted((one, two), key=lambda disk: disk.disk.uuid)  # as they are frozen together
        hanging.device.discard = hang  # type: ignore[method-assign]
        with ThreadPoolExecutor() as pool:
            watched = hanging.lane()
            pool.submit(hanging.discard, 0, 4096)
            assert hangs.wait(10)
            taken = pool.submit(take_checkpoint, [one, two], "monday")
            try:
                while watched.size >= 0:  # until its gate is closed
                    time.sleep(0.001)
                pool.submit(sound.pwrite, b"the guest writes on", 0).result(5)
            finally:
                goes_on.set()
            assert len(taken.result(10)) == 2


class Far(Watched):
    """An image behind another server: it has no descriptor, and may hang at any time."""

    fd = None


def test_a_far_image_that_begins_to_hang_while_all_are_frozen_keeps_no_local_disks_guest_waiting(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was awaited in vain: nothing was under way then."""
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(offset: int, length: int) -> None:
        hangs.set()
        assert goes_on.wait(20)

    disks = [attach(store, tmp_path, name) for name in ("sda", "sdb")]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for disk in disks:
            stack.enter_context(disk)
        local, far = sorted(disks, key=lambda disk: disk.disk.uuid)
        far.device.__class__ = Far
        far.device.discard = hang  # type: ignore[method-assign]
        watched = far.lane()

        def begin_to_hang(tracking: Tracking) -> points._Likely:
            if not hangs.is_set():
                pool.submit(far.discard, 0, 4096)
                assert hangs.wait(10)
            return points._Likely(tracking.disk.geometry, {})

        monkeypatch.setattr(points, "_write_beforehand", begin_to_hang)
        taken = pool.submit(take_checkpoint, disks, "monday")
        try:
            while watched.size >= 0:  # until its gate is closed
                time.sleep(0.001)
            pool.submit(local.pwrite, b"the guest writes on", 0).result(5)
        finally:
            goes_on.set()
        assert len(taken.result(10)) == 2


@pytest.mark.parametrize("has_namesake", [False, True])
def test_a_checkpoint_that_somebody_forgot_meanwhile_is_taken_back_and_no_other(
    store: Store, tmp_path: Path, has_namesake: bool
) -> None:
    with attach(store, tmp_path, "sda") as disk:

        def forget_and_refuse() -> None:
            disk.forget("monday")
            if has_namesake:
                points._take_points([disk._tracking], "monday")
            raise FarAway(errno.ETIMEDOUT, "its server is away")

        disk.device.at_flush = forget_and_refuse  # type: ignore[attr-defined]
        with pytest.raises(StorageError, match="no checkpoint was made"):
            disk.checkpoint("monday")
        del disk.device.at_flush  # type: ignore[attr-defined]
        assert names(store, disk) == ["epoch-1", *["monday"] * has_namesake]
        disk.pwrite(b"x", 4096)
        assert disk.standing().trust is not Trust.UNTRUSTED
        disk.checkpoint("tuesday")
        disk.pwrite(b"x", 8192)
        assert list(disk.changes(since="tuesday").runs()) == [(2, 3)]


def test_a_write_that_loses_track_while_a_checkpoint_waits_for_it_is_not_called_clean(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write's commit begins before the gate closes, and fails after that: the period must not close over it."""
    commit_begins, draining = threading.Event(), threading.Event()
    real_update = store.update

    def fail_once(_: object) -> None:
        commit_begins.set()
        assert draining.wait(10)
        monkeypatch.setattr(store, "update", real_update)
        raise StorageError("store", OSError(errno.EIO, "for a moment"), next_step="wait")

    with attach(store, tmp_path, "sda") as disk:
        disk.checkpoint("monday")
        lane = disk.lane()
        real_drain = disk._tracking.gate.drained

        def drained() -> AbstractContextManager[None]:
            monkeypatch.setattr(disk._tracking.gate, "drained", real_drain)
            writer.start()
            assert commit_begins.wait(10)
            draining.set()
            return real_drain()

        monkeypatch.setattr(disk._tracking.gate, "drained", drained)
        monkeypatch.setattr(store, "update", fail_once)
        writer = threading.Thread(target=lane.pwrite, args=(b"x" * 4096, 40960))
        disk.checkpoint("tuesday")
        writer.join()
        with pytest.raises(Untrusted, match="tracking failed"):
            disk.changes(since="monday", until="tuesday")
        assert disk.disk.epoch_number == 2


def test_an_answer_that_is_read_in_another_epoch_is_all_dirty(store: Store, tmp_path: Path) -> None:
    with attach(store, tmp_path, "sda") as disk:
        disk.checkpoint("monday")
        answer = disk.changes(since="monday")
        disk.start_epoch("a person said so")
        disk.checkpoint("tuesday")
        disk.forget("epoch-2")
        assert list(answer.runs()) == [(0, SIZE // 4096)]
