"""Whoever carries which load when: the image and its digests are the same, and what fails ends all of it."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmdbitmap.bits import Run
from lmdbitmap.copying.copier import Copied, ImageFile, copy_clusters
from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.copying.hashing import CHUNK_BYTES, ChunkHasher
from lmdbitmap.errors import NotFound, StorageError
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.interfaces import Buffer
from lmdbitmap.work.crew import Spared, none_spared
from lmdbitmap.work.progress import Report
from tests.helpers.naive_digests import naive_digests
from tests.helpers.qcow2_model import naive_chain_read
from tests.helpers.spared import EACH, MORE_THAN_THERE_ARE

PATIENCE_S = 10.0
CLUSTER_BITS = 14
CLUSTER = 1 << CLUSTER_BITS
MIB = 1 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


class Disk(MemoryDevice):
    """Leaves processors to a guest, and may do something before it reads."""

    def __init__(self, content: bytes, spared: Spared = none_spared) -> None:
        super().__init__(len(content))
        self.pwrite(content, 0)
        self._spared = spared
        self.before_read: Callable[[int], None] = _nothing
        self.interrupted = threading.Event()

    @property
    def spared_processors(self) -> int:
        return self._spared()

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.before_read(offset)
        super().pread_into(buffer, offset)

    def interrupt(self) -> None:
        self.interrupted.set()


def _nothing(offset: int) -> None:
    pass


def copied(
    fd: int,
    disk: Disk,
    runs: list[Run] | None = None,
    *,
    report: Report | None = None,
    file: ImageFile | None = None,
    backing_file: str | None = None,
) -> tuple[Copied, bytes, bytes]:
    """What came of it, the image, and its digests."""
    clusters = Geometry(disk.size, CLUSTER_BITS)
    with ChunkHasher(fd, "/tmp", DigestAlgorithm.SHA256) as hasher:
        counts = copy_clusters(
            disk,
            file or ImageFile(fd, "image.qcow2"),
            hasher,
            clusters,
            [(0, clusters.block_count)] if runs is None else runs,
            backing_file=backing_file,
            report=report or Report(None, disk.size),
        )
        digests = b"".join(hasher.digests())
    return counts, os.pread(fd, os.fstat(fd).st_size, 0), digests


def random_content(lot: random.Random) -> bytes:
    """Data, holes, and clusters of zeroes but for one byte, up to somewhere within a cluster."""
    parts = []
    for _ in range(lot.randrange(1, 60)):
        length = CLUSTER * lot.choice([1, 2, 30, 150])
        kind = lot.randrange(4)
        parts.append(lot.randbytes(length) if kind > 1 else bytes(length) if kind else one_byte(lot, length))
    return b"".join(parts)[: -lot.choice([1, 512, CLUSTER - 1, CLUSTER])]


def one_byte(lot: random.Random, length: int) -> bytes:
    content = bytearray(length)
    content[lot.randrange(length)] = 1
    return bytes(content)


def random_runs(lot: random.Random, clusters: int) -> Iterator[Run]:
    position = 0
    while position < clusters:
        stop = min(position + lot.choice([1, 1, 3, 40, 200]), clusters)
        yield position, stop
        position = stop + lot.choice([1, 2, 50])


@pytest.mark.parametrize("seed", range(25))
def test_the_image_holds_the_runs_and_is_the_same_however_many_carry(fd: int, seed: int) -> None:
    lot = random.Random(seed)
    content = random_content(lot)
    runs = list(random_runs(lot, Geometry(len(content), CLUSTER_BITS).block_count))
    below, expected = lot.randbytes(len(content)), bytearray()
    expected += below
    for start, stop in runs:
        expected[start * CLUSTER : stop * CLUSTER] = content[start * CLUSTER : stop * CLUSTER]
    base = copied(fd, Disk(below))[1]
    made = {}
    for name, spared in EACH.items():
        os.ftruncate(fd, 0)
        made[name] = copied(fd, Disk(content, spared), runs, backing_file="base")
    counts, image, digests = made["without threads"]
    assert naive_chain_read([image, base])[: len(content)] == expected
    assert counts.bytes_changed == sum(Geometry(len(content), CLUSTER_BITS).bytes_of(*run)[1] for run in runs)
    assert digests == naive_digests(DigestAlgorithm.SHA256, image, CHUNK_BYTES)
    assert [name for name in EACH if made[name] != made["without threads"]] == []


def test_two_loads_are_carried_at_once(fd: int) -> None:
    """Nobody comes through the barrier alone."""
    disk, barrier = Disk(random.Random(1).randbytes(8 * MIB)), threading.Barrier(2)
    disk.before_read = lambda offset: None if offset >= 2 * MIB else both(barrier)
    _, image, _ = copied(fd, disk)
    assert naive_chain_read([image]) == disk.pread(disk.size, 0)


def both(barrier: threading.Barrier) -> None:
    barrier.wait(PATIENCE_S)


def test_a_load_that_is_read_first_has_its_place_behind_the_one_before_it(fd: int) -> None:
    disk, another_was_read = Disk(random.Random(2).randbytes(4 * MIB)), threading.Event()

    def before_read(offset: int) -> None:
        if offset == 0:
            assert another_was_read.wait(PATIENCE_S)
        else:
            another_was_read.set()

    disk.before_read = before_read
    _, image, digests = copied(fd, disk)
    assert naive_chain_read([image]) == disk.pread(disk.size, 0)
    assert digests == naive_digests(DigestAlgorithm.SHA256, image, CHUNK_BYTES)


def test_beside_a_guest_the_caller_carries_alone(fd: int) -> None:
    disk, readers = Disk(random.Random(3).randbytes(6 * MIB), lambda: MORE_THAN_THERE_ARE), set()
    disk.before_read = lambda offset: readers.add(threading.current_thread())
    copied(fd, disk)
    assert readers == {threading.current_thread()}


def test_the_header_is_written_last(fd: int) -> None:
    """A file without one is not taken for an image: somebody may look at it before it is whole."""

    class Noted(ImageFile):
        def pwrite(self, data: Buffer, offset: int) -> None:
            super().pwrite(data, offset)
            written.append(offset)

    written: list[int] = []
    content = random.Random(5).randbytes(5 * MIB)
    _, image, digests = copied(fd, Disk(content), file=Noted(fd, "image.qcow2"))
    assert written[-1] == 0
    assert 0 not in written[:-1]
    assert naive_chain_read([image]) == content
    assert digests == naive_digests(DigestAlgorithm.SHA256, image, CHUNK_BYTES)


def test_what_will_be_read_is_announced_long_before(fd: int) -> None:
    """Beside a guest, where nobody else reads."""

    class Announced(Disk):
        def will_need(self, offset: int, length: int) -> None:
            told.append(offset)

    told: list[int] = []
    ahead: dict[int, int] = {}
    disk = Announced(random.Random(3).randbytes(40 * MIB), lambda: MORE_THAN_THERE_ARE)
    disk.before_read = lambda offset: ahead.update({offset // MIB: len(told)})
    copied(fd, disk)
    assert told == [number * MIB for number in range(40)]
    assert all(ahead[number] >= number + 8 for number in range(15, 30))


def test_a_system_without_threads_copies_too(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    disk, clusters = Disk(random.Random(4).randbytes(6 * MIB)), Geometry(6 * MIB, CLUSTER_BITS)
    runs = [(0, clusters.block_count)]
    copy_clusters(
        disk, ImageFile(fd, "image"), Unheard(), clusters, runs, backing_file=None, report=Report(None, 0)
    )
    assert naive_chain_read([os.pread(fd, os.fstat(fd).st_size, 0)]) == disk.pread(disk.size, 0)


class Unheard:
    """Nobody wants digests."""

    def feed(self, offset: int, data: memoryview) -> Callable[[], None]:
        return lambda: None

    def wrote(self, offset: int, length: int) -> None:
        pass


def test_progress_is_told_in_the_callers_thread_up_to_the_end(fd: int) -> None:
    told: list[tuple[int, threading.Thread]] = []
    disk = Disk(random.Random(5).randbytes(12 * MIB + 5))
    copied(fd, disk, report=Report(lambda done, total: told.append((done, here())), disk.size))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (disk.size, here())
    assert {thread for _, thread in told} == {here()}


def here() -> threading.Thread:
    return threading.current_thread()


# --- what fails ---


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
@pytest.mark.parametrize("bad", [0, 1, 5])
def test_a_read_that_fails_is_the_devices_error_and_leaves_no_thread_behind(
    fd: int, bad: int, spared: Spared
) -> None:
    before, disk = set(threading.enumerate()), Disk(random.Random(6).randbytes(6 * MIB), spared)

    def fail(offset: int) -> None:
        if offset == bad * MIB:
            raise OSError(errno.EIO, "a bad sector")

    disk.before_read = fail
    with pytest.raises(OSError, match="a bad sector") as failed:
        copied(fd, disk)
    assert not isinstance(failed.value, StorageError)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
@pytest.mark.parametrize("bad", [0, 1, 5])
def test_a_write_that_fails_names_the_image_and_leaves_no_thread_behind(
    fd: int, bad: int, spared: Spared
) -> None:
    before, disk = set(threading.enumerate()), Disk(random.Random(7).randbytes(6 * MIB), spared)

    class Full(ImageFile):
        def pwrite(self, data: Buffer, offset: int) -> None:
            if offset >= bad * MIB:
                raise StorageError("image.qcow2", OSError(errno.ENOSPC, ""), next_step="make room")
            super().pwrite(data, offset)

    with pytest.raises(StorageError, match=r"image\.qcow2: No space left"):
        copied(fd, disk, file=Full(fd, "image.qcow2"))
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
def test_what_a_listener_raises_ends_it(fd: int, spared: Spared) -> None:
    before, disk = set(threading.enumerate()), Disk(random.Random(8).randbytes(16 * MIB), spared)

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copied(fd, disk, report=Report(cancel, disk.size))
    assert disk.interrupted.is_set()
    assert set(threading.enumerate()) <= before


def test_a_read_that_hangs_is_interrupted_when_another_one_fails(fd: int) -> None:
    """Whichever of both is the caller's."""
    disk, hangs = Disk(random.Random(9).randbytes(6 * MIB)), threading.Event()

    def before_read(offset: int) -> None:
        if offset == 0:
            hangs.set()
            assert disk.interrupted.wait(PATIENCE_S)
            raise OSError(errno.ESHUTDOWN, "interrupted")
        assert hangs.wait(PATIENCE_S)
        raise OSError(errno.EIO, "a bad sector")

    disk.before_read = before_read
    with pytest.raises(OSError, match="a bad sector"):
        copied(fd, disk)


def test_what_plans_may_fail_too(fd: int) -> None:
    before, disk = set(threading.enumerate()), Disk(random.Random(10).randbytes(16 * MIB))

    def runs() -> Iterator[Run]:
        yield 0, 8 * MIB // CLUSTER
        raise NotFound("there is no such checkpoint", next_step="look at them")

    clusters = Geometry(disk.size, CLUSTER_BITS)
    with pytest.raises(NotFound, match="no such checkpoint"):
        copy_clusters(
            disk, ImageFile(fd, "image"), Unheard(), clusters, runs(), backing_file=None,
            report=Report(None, 0),
        )  # fmt: skip
    assert set(threading.enumerate()) <= before


def test_digests_that_cannot_be_kept_are_told_with_the_images_name(fd: int) -> None:
    class Full(Unheard):
        def feed(self, offset: int, data: memoryview) -> Callable[[], None]:
            return refuse

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "no room")

    disk = Disk(random.Random(11).randbytes(3 * MIB))
    clusters = Geometry(disk.size, CLUSTER_BITS)
    with pytest.raises(StorageError, match=r"image\.qcow2: No space left|image\.qcow2: no room"):
        copy_clusters(
            disk, ImageFile(fd, "image.qcow2"), Full(), clusters, [(0, clusters.block_count)],
            backing_file=None, report=Report(None, 0),
        )  # fmt: skip
