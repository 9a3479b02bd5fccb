"""A flush that failed once is never forgotten, and none succeeds beside it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from lmdbitmap.errors import StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.interfaces import FarAway
from lmdbitmap.tracker.flushing import Flusher
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image


def test_a_flush_that_failed_fails_for_good_and_tells_once() -> None:
    told: list[str] = []
    device = MemoryDevice(4096)
    flusher = Flusher("sda", device, told.append)
    flusher.flush()
    device.fail_next["flush"] = errno.ENOSPC
    for _ in range(3):
        with pytest.raises(StorageError, match="image of disk 'sda' could not be flushed") as refused:
            flusher.flush()
        assert refused.value.errno == errno.ENOSPC
        with pytest.raises(StorageError):
            flusher.require_sound()
    assert flusher.failed
    assert told == ["the image of disk 'sda' could not be flushed: No space left on device"]


def test_an_unwritten_page_is_not_read_from_memory_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *asked: advised.append(asked))

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "injected")

    with FileDevice.open(make_raw_image(tmp_path / "disk.raw", 4096)) as device:
        flusher = Flusher("sda", device, lambda _: None)
        flusher.flush()
        assert advised == []
        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError):
            flusher.flush()
        assert advised == [(device.fd, 0, 0, os.POSIX_FADV_DONTNEED)]


@pytest.mark.parametrize(("refusal", "is_final"), [(FarAway, False), (TimeoutError, True)])
def test_only_a_far_side_that_keeps_what_it_has_may_be_asked_again(
    monkeypatch: pytest.MonkeyPatch, refusal: type[OSError], is_final: bool
) -> None:
    """A local disk that timed out has forgotten, as after any other failure."""

    def fail() -> None:
        raise refusal(errno.ETIMEDOUT, "away")

    told: list[str] = []
    device = MemoryDevice(4096)
    flusher = Flusher("sda", device, told.append)
    monkeypatch.setattr(device, "flush", fail)
    with pytest.raises(StorageError) as refused:
        flusher.flush()
    monkeypatch.undo()
    assert ("dmesg" if is_final else "start that server again") in refused.value.next_step
    assert (flusher.failed, len(told)) == (is_final, int(is_final))
    if not is_final:
        flusher.flush()


class SlowDevice(MemoryDevice):
    """Its flushes wait until they are let go, and are counted."""

    def __init__(self) -> None:
        super().__init__(4096)
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        self.begun.release()
        assert self.go_on.acquire(timeout=PATIENCE_SECONDS)
        super().flush()


def flush_in_threads(
    flusher: Flusher, device: SlowDevice, waiting: int
) -> tuple[list[str], threading.Thread]:
    """One that is under way, and `waiting` others that came after it; what each of them says at its end."""
    ends: list[str] = []

    def flush() -> None:
        try:
            flusher.flush()
            ends.append("done")
        except StorageError:
            ends.append("failed")

    first = threading.Thread(target=flush)
    first.start()
    assert device.begun.acquire(timeout=PATIENCE_SECONDS)
    others = [threading.Thread(target=flush) for _ in range(waiting)]
    for other in others:
        other.start()

    def wait_for_all() -> None:
        for thread in (first, *others):
            thread.join(PATIENCE_SECONDS)

    waiter = threading.Thread(target=wait_for_all)
    waiter.start()
    return ends, waiter


def test_those_that_wait_share_flushes_that_begin_after_they_came() -> None:
    device = SlowDevice()
    flusher = Flusher("sda", device, lambda _: None)
    ends, waiter = flush_in_threads(flusher, device, 5)
    for _ in range(6):
        device.go_on.release()
    waiter.join(PATIENCE_SECONDS)
    assert ends == ["done"] * 6
    assert 2 <= device.flushes <= 6
    before = device.flushes
    device.go_on.release()
    flusher.flush()
    assert device.flushes == before + 1  # what is written later needs a flush of its own


def test_none_succeeds_beside_the_one_that_took_the_error() -> None:
    """The kernel tells only one of them."""
    device = SlowDevice()
    device.fail_next["flush"] = errno.EIO
    flusher = Flusher("sda", device, lambda _: None)
    ends, waiter = flush_in_threads(flusher, device, 5)
    for _ in range(6):
        device.go_on.release()
    waiter.join(PATIENCE_SECONDS)
    assert ends == ["failed"] * 6
    assert device.flushes == 1


def test_after_close_flushes_fail_as_they_are_told() -> None:
    told: list[str] = []
    device = MemoryDevice(4096)
    flusher = Flusher("sda", device, told.append)
    flusher.close(OSError(errno.ESHUTDOWN, "detached"))
    with pytest.raises(StorageError) as refused:
        flusher.flush()
    assert refused.value.errno == errno.ESHUTDOWN
    assert told == []


def test_what_a_device_lost_by_itself_is_told_at_once_and_fails_every_flush() -> None:
    told: list[str] = []
    device = MemoryDevice(4096)
    flusher = Flusher("sda", device, told.append)
    flusher.lose(OSError(errno.EIO, "injected"))
    assert (flusher.failed, told) == (
        True,
        ["the image of disk 'sda' could not be flushed: injected"],
    )
    with pytest.raises(StorageError, match="injected"):
        flusher.flush()
    assert len(told) == 1


def test_loss_while_a_flush_is_under_way_fails_that_one_too() -> None:
    device = SlowDevice()
    flusher = Flusher("sda", device, lambda _: None)
    ends, waiter = flush_in_threads(flusher, device, 2)
    flusher.lose(OSError(errno.EIO, "injected"))
    for _ in range(3):
        device.go_on.release()
    waiter.join(PATIENCE_SECONDS)
    assert ends == ["failed"] * 3
    assert device.flushes == 1


def test_failure_that_could_not_be_told_is_told_at_the_next_occasion() -> None:
    told: list[str] = []

    def hear(reason: str) -> None:
        told.append(reason)
        if len(told) == 1:
            raise StorageError("nobody listens", OSError(errno.EIO, "injected"), next_step="speak up")

    flusher = Flusher("sda", MemoryDevice(4096), hear)
    flusher.lose(OSError(errno.EIO, "injected"))
    for _ in range(2):
        with pytest.raises(StorageError, match="could not be flushed"):
            flusher.flush()
    assert len(told) == 2


def test_nothing_is_told_of_a_loss_after_close() -> None:
    told: list[str] = []
    flusher = Flusher("sda", MemoryDevice(4096), told.append)
    flusher.close(OSError(errno.ESHUTDOWN, "detached"))
    flusher.lose(OSError(errno.EIO, "injected"))
    assert told == []
