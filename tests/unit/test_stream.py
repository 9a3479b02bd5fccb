"""A stream of a disk: what it names, which checkpoint it leads to, and what a failure leaves."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.errors import AlreadyExists, Busy, InvalidArgument, NotFound, StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.device import HOLE
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.interfaces import Allocation
from lmdbitmap.streams.rbd_diff import MAX_ZERO_BYTES, Head
from lmdbitmap.streams.stream import ByteOutput, stream_backup, write_stream
from tests.helpers import naive_rbd_diff
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.naive_rbd_diff import Stream
from tests.helpers.support import no_ascii
from tests.helpers.tracked import NAME

pytestmark = pytest.mark.in_memory

BLOCK = 4096
SIZE = 50 * BLOCK + 100


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(no_ascii(10 * BLOCK), BLOCK)
    yield made
    made.close()


def streamed(
    disk: BackedUpDisk, since: str | None = None, checkpoint: str | None = None, version: int = 1
) -> Stream:
    out = io.BytesIO()
    result = stream_backup(disk.store, NAME, out, since=since, checkpoint=checkpoint, version=version)
    stream = naive_rbd_diff.read(out.getvalue())
    named = [naive_rbd_diff.length_of(content) for _, content in stream.ranges]
    zero = [content for _, content in stream.ranges if isinstance(content, int)]
    assert result.streamed == (sum(named), sum(zero), len(out.getvalue()))
    assert (result.disk, result.since, result.size) == (NAME, since, stream.size)
    assert (stream.from_name, stream.to_name) == (since, result.checkpoint)
    assert result.checkpoint == disk.checkpoints()[-1]
    return stream


@pytest.mark.parametrize("version", [1, 2])
def test_a_full_stream_names_every_byte_and_nothing_to_count_from(disk: BackedUpDisk, version: int) -> None:
    stream = streamed(disk, version=version)
    assert stream[:3] == (version, SIZE, None)
    position = 0
    for offset, content in stream.ranges:
        assert offset == position
        position += naive_rbd_diff.length_of(content)
    assert position == SIZE
    assert naive_rbd_diff.applied(stream, b"") == disk.content()


def test_a_diff_names_what_changed_since_and_nothing_else(disk: BackedUpDisk) -> None:
    streamed(disk, checkpoint="monday")
    before = disk.content()
    disk.write(b"new", 5 * BLOCK)
    disk.zero(8 * BLOCK, 2 * BLOCK)
    disk.write(bytes(BLOCK), 40 * BLOCK)
    stream = streamed(disk, since="monday", checkpoint="tuesday")
    assert [(offset, naive_rbd_diff.length_of(content)) for offset, content in stream.ranges] == [
        (5 * BLOCK, BLOCK), (8 * BLOCK, 2 * BLOCK), (40 * BLOCK, BLOCK),
    ]  # fmt: skip
    assert [content for _, content in stream.ranges[1:]] == [2 * BLOCK, BLOCK], "dirty and zero, and no gap"
    assert naive_rbd_diff.applied(stream, before) == disk.content()
    assert disk.checkpoints()[-2:] == ["monday", "tuesday"]
    assert streamed(disk, since="tuesday").ranges == []
    assert naive_rbd_diff.applied(streamed(disk, since="monday"), before) == disk.content()


def test_the_size_may_change_between_two_streams(disk: BackedUpDisk) -> None:
    held = naive_rbd_diff.applied(streamed(disk, checkpoint="0"), b"")
    for number, size in enumerate((5 * BLOCK + 1, 80 * BLOCK, 30 * BLOCK + 5)):
        disk.resize(size)
        disk.write(b"tail", size - 4)
        held = naive_rbd_diff.applied(streamed(disk, since=str(number), checkpoint=str(number + 1)), held)
        assert held == disk.content()


def test_shrunk_and_grown_again_is_not_what_it_was(disk: BackedUpDisk) -> None:
    held = naive_rbd_diff.applied(streamed(disk, checkpoint="0"), b"")
    disk.resize(3 * BLOCK)
    disk.resize(SIZE)
    assert naive_rbd_diff.applied(streamed(disk, since="0"), held) == disk.content() != held


def test_checkpoints_get_a_name_of_their_own_unless_they_are_told_one(disk: BackedUpDisk) -> None:
    first, second = streamed(disk).to_name, streamed(disk).to_name
    assert first != second
    assert first is not None
    assert first.startswith("stream-")


def test_after_a_crash_more_is_streamed_and_the_result_says_so(disk: BackedUpDisk) -> None:
    streamed(disk, checkpoint="monday")
    with disk.attach(max_armed=4) as attached:
        attached.pwrite(b"x", 0)
        attached.abandon()
    result = stream_backup(disk.store, NAME, io.BytesIO(), since="monday")
    assert result.trust is Trust.SUPERSET


# --- what is refused, and leaves no checkpoint ---


def test_what_cannot_be_streamed_is_refused_before_a_checkpoint_is_taken(disk: BackedUpDisk) -> None:
    streamed(disk, checkpoint="monday")
    out = io.BytesIO()
    refusals: list[tuple[type[Exception], dict[str, Any]]] = [
        (NotFound, {"since": "sunday"}),
        (AlreadyExists, {"checkpoint": "monday"}),
        (InvalidArgument, {"version": 3}),
        (InvalidArgument, {"checkpoint": b"tuesday"}),
        (InvalidArgument, {"checkpoint": 5}),
    ]
    for error, options in refusals:
        points = disk.checkpoints()
        with pytest.raises(error):
            stream_backup(disk.store, NAME, out, **options)
        assert disk.checkpoints() == points
    assert out.getvalue() == b""


def test_nobody_counts_from_a_checkpoint_before_tracking_was_interrupted(disk: BackedUpDisk) -> None:
    streamed(disk, checkpoint="monday")
    disk.write_behind_our_back(b"stranger", 0)
    out = io.BytesIO()
    with pytest.raises(Untrusted):
        stream_backup(disk.store, NAME, out, since="monday", checkpoint="tuesday")
    assert out.getvalue() == b""
    assert "tuesday" not in disk.checkpoints()
    assert naive_rbd_diff.applied(streamed(disk), b"") == disk.content()


def test_a_disk_that_somebody_writes_is_refused(disk: BackedUpDisk) -> None:
    with disk.attach(), pytest.raises(Busy):
        stream_backup(disk.store, NAME, io.BytesIO())


class Failing(io.BytesIO):
    """Takes so many bytes, and does something else than taking more."""

    def __init__(self, room: int, otherwise: Exception | None = None) -> None:
        super().__init__()
        self._room = room
        self._otherwise = otherwise or BrokenPipeError(32, "Broken pipe")

    def write(self, data: object, /) -> int:
        taken = memoryview(data)[: self._room]  # type: ignore[arg-type]
        if not taken:
            raise self._otherwise
        self._room -= len(taken)
        return super().write(taken)


@pytest.mark.parametrize("otherwise", [None, OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("room", [0, 1, 20_000])
def test_a_stream_that_was_cut_takes_its_checkpoint_back(
    disk: BackedUpDisk, room: int, otherwise: Exception | None
) -> None:
    streamed(disk, checkpoint="monday")
    disk.write(no_ascii(8 * BLOCK), 0)
    disk.write(no_ascii(30 * BLOCK), 10 * BLOCK)
    points, held = disk.checkpoints(), Failing(room, otherwise)
    with pytest.raises(
        StorageError if otherwise is None or isinstance(otherwise, OSError) else KeyboardInterrupt
    ):
        stream_backup(disk.store, NAME, held, since="monday", checkpoint="tuesday")
    assert disk.checkpoints() == points
    with pytest.raises(ValueError, match=r"^$"):
        naive_rbd_diff.read(held.getvalue())
    assert len(streamed(disk, since="monday").ranges) == 2, "nothing was lost"


def test_nothing_of_a_whole_stream_is_left_in_a_buffer(disk: BackedUpDisk) -> None:
    """It could be lost, or refused, when the checkpoint counts already."""
    path = disk.folder / "stream"
    streamed(disk, checkpoint="monday")
    with path.open("wb") as out:
        stream_backup(disk.store, NAME, out, since="monday", checkpoint="tuesday")
        length = path.stat().st_size
    assert length == path.stat().st_size
    points = disk.checkpoints()
    with (
        contextlib.suppress(OSError),  # the file is closed with what it could not write
        open("/dev/full", "wb") as out,
        pytest.raises(StorageError, match="the stream: No space left"),
    ):
        stream_backup(disk.store, NAME, out, since="tuesday")
    assert disk.checkpoints() == points


def test_a_stream_into_a_file_is_durable_before_it_is_called_whole(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS, and over a quota, only a sync tells that the file did not take it."""
    lengths: list[int] = []

    def refuse(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            lengths.append(os.fstat(fd).st_size)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        sync(fd)

    path, sync = disk.folder / "stream", os.fsync
    streamed(disk, checkpoint="monday")
    points = disk.checkpoints()
    with monkeypatch.context() as sick, path.open("wb", buffering=0) as out:
        sick.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match="the stream: Disk quota exceeded"):
            stream_backup(disk.store, NAME, out, since="monday", checkpoint="tuesday")
    assert lengths == [path.stat().st_size]
    assert disk.checkpoints() == points


def test_an_image_that_was_written_meanwhile_gets_no_end(disk: BackedUpDisk) -> None:
    class Meddling(io.BytesIO):
        def write(self, data: object, /) -> int:
            disk.write_behind_our_back(b"stranger", 0)
            return super().write(data)  # type: ignore[arg-type]

    streamed(disk, checkpoint="monday")
    disk.write(no_ascii(30 * BLOCK), 0)
    out = Meddling()
    with pytest.raises(Busy, match="was written by another program"):
        stream_backup(disk.store, NAME, out, since="monday")
    assert len(out.getvalue()) > BLOCK
    with pytest.raises(ValueError, match=r"^$"):
        naive_rbd_diff.read(out.getvalue())


# --- any device ---


class HugeDevice(MemoryDevice):
    """One hole of any size, with an island of data."""

    def __init__(self, size: int, island: tuple[int, int]) -> None:
        super().__init__(0)
        self._huge, self._island = size, island

    @property
    def size(self) -> int:
        return self._huge

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        assert self._island[0] <= offset
        assert offset + len(buffer) <= sum(self._island)
        buffer[:] = b"\xa5" * len(buffer)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        start, island = self._island
        assert (offset, length) == (0, self._huge)
        yield Allocation(start, *HOLE)
        yield Allocation(island, hole=False, zero=False)
        yield Allocation(length - start - island, *HOLE)


def write_all(device: MemoryDevice, out: ByteOutput, progress: list[tuple[int, int]]) -> object:
    head, geometry = Head(1, device.size), Geometry(device.size, 16)
    return write_stream(out, device, head, geometry, None, progress=lambda *news: progress.append(news))


def test_holes_are_told_in_long_records_and_never_read() -> None:
    device, out, progress = HugeDevice(1 << 40, (1 << 39, 3 << 20)), io.BytesIO(), list[tuple[int, int]]()
    counts = write_all(device, out, progress)
    assert counts == (1 << 40, (1 << 40) - (3 << 20), len(out.getvalue()))
    assert len(out.getvalue()) < (3 << 20) + 17 * ((1 << 40) // MAX_ZERO_BYTES + 10)
    assert progress[-1] == (1 << 40, 1 << 40)
    assert progress == sorted(progress)


def test_memory_does_not_grow_with_the_stream() -> None:
    class Nowhere:
        def write(self, data: object, /) -> int:
            return len(memoryview(data))  # type: ignore[arg-type]

    device = HugeDevice(1 << 30, (0, 1 << 30))
    tracemalloc.start()
    write_all(device, Nowhere(), [])
    assert tracemalloc.get_traced_memory()[1] < 6 << 20
    tracemalloc.stop()


def test_a_file_that_takes_nothing_is_an_error_and_not_asked_for_ever() -> None:
    class Full:
        calls = 0

        def write(self, data: object, /) -> int:
            self.calls += 1
            assert self.calls < 10, "it is asked for ever"
            return 0

    with pytest.raises(StorageError, match="the stream: nothing was written"):
        write_all(MemoryDevice(1 << 20), Full(), [])


def test_a_name_that_another_stream_has_is_refused_again_and_again_and_takes_nothing_from_it(
    disk: BackedUpDisk,
) -> None:
    name = stream_backup(disk.store, NAME, io.BytesIO()).checkpoint
    disk.write(b"new", 5 * BLOCK)
    for _ in range(2):
        with pytest.raises(AlreadyExists):
            stream_backup(disk.store, NAME, io.BytesIO(), checkpoint=name)
        disk.backup()
    stream = streamed(disk, since=name)
    assert [offset for offset, _ in stream.ranges] == [5 * BLOCK]
