"""Requests that are done one at a time: in pieces, between which others have their turn."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.filter import Filter
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.commands import PIECE_BYTES, CutShortError, perform
from lmdbitmap.nbd.server.contexts import MAX_DESCRIPTORS
from lmdbitmap.nbd.server.forms import EXTENDED, STRUCTURED, Form
from lmdbitmap.nbd.server.handshake import MAX_QUERIES
from tests.helpers.support import PATIENCE_SECONDS
from tests.helpers.tracked import NAME, TrackedDisk

SIZE = 4 * PIECE_BYTES
CONTEXTS, EXTENTS = 24, 4096


def never() -> bool:
    return False


class HeldUpDevice(FileDevice):
    """Zeroes its first piece when it is let go."""

    zeroing, go_on = threading.Event(), threading.Event()

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self.zeroing.set()
        assert self.go_on.wait(PATIENCE_SECONDS)
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)


def test_a_checkpoint_gets_in_behind_the_piece_that_is_under_way(tmp_path: Path) -> None:
    """What is zeroed before it counts for the period that ends, the rest for the new one (law 2)."""
    request = nbd.Request(0, nbd.NBD_CMD_WRITE_ZEROES, 1, 0, SIZE)
    with closing(TrackedDisk(tmp_path, SIZE, 20).clean()) as tracked:
        disk = Filter.attach(tracked.store, NAME, open_device=HeldUpDevice.open, background=False)
        lane = disk.lane()
        zeroer = threading.Thread(target=lambda: perform(request, lane, {}, EXTENDED, never))
        zeroer.start()
        assert HeldUpDevice.zeroing.wait(PATIENCE_SECONDS)
        pointer = threading.Thread(target=disk.checkpoint, args=("monday",))
        pointer.start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while lane.size >= 0:  # until the gate is closed, for which there is no event
            assert time.monotonic() < deadline
        HeldUpDevice.go_on.set()
        for thread in (zeroer, pointer):
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
        before, after = disk.changes(since="start", until="monday"), disk.changes(since="monday")
        blocks = PIECE_BYTES >> 20
        assert list(before.runs()) == [(0, blocks)]
        assert list(after.runs()) == [(blocks, 4 * blocks)]
        disk.detach()


@pytest.mark.parametrize("command", [nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_TRIM])
def test_a_change_that_ends_between_two_pieces_has_marked_what_it_did(tmp_path: Path, command: int) -> None:
    request, stopping = nbd.Request(0, command, 1, 0, SIZE), iter([False, True])
    with closing(TrackedDisk(tmp_path, SIZE, 20).clean()) as tracked, tracked.attach() as disk:
        with pytest.raises(CutShortError, match="the server stops"):
            perform(request, disk.lane(), {}, EXTENDED, lambda: next(stopping))
        assert list(disk.changes(since="start").runs()) == [(0, 2 * PIECE_BYTES >> 20)]


def test_statuses_of_many_contexts_take_little_more_room_than_their_reply() -> None:
    def every_other(offset: int, length: int) -> Iterator[tuple[int, int]]:
        return ((4096, block % 2) for block in range(EXTENTS))

    request = nbd.Request(0, nbd.NBD_CMD_BLOCK_STATUS, 1, 0, EXTENTS * 4096)
    contexts = dict.fromkeys(range(CONTEXTS), every_other)
    lane = PlainDisk(MemoryDevice(0)).lane()
    tracemalloc.start()
    try:
        reply = perform(request, lane, contexts, STRUCTURED, never)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(reply) > CONTEXTS * EXTENTS * nbd.BLOCK_DESCRIPTOR.size
    assert peak_bytes < 4 * len(reply)


@pytest.mark.parametrize("form", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize("count", [1, 7, MAX_QUERIES])
def test_reply_has_so_many_statuses_however_many_contexts_there_are(form: Form, count: int) -> None:
    def endless(offset: int, length: int) -> Iterator[tuple[int, int]]:
        return ((1, block % 2) for block in range(length))

    request = nbd.Request(0, nbd.NBD_CMD_BLOCK_STATUS, 1, 0, MAX_DESCRIPTORS + 1)
    lane = PlainDisk(MemoryDevice(0)).lane()
    reply = perform(request, lane, dict.fromkeys(range(count), endless), form, never)
    descriptor = nbd.BLOCK_DESCRIPTOR if form is STRUCTURED else nbd.BLOCK_DESCRIPTOR_EXT
    most = MAX_DESCRIPTORS * descriptor.size
    assert most - count * descriptor.size < len(reply) < most + count * 100
