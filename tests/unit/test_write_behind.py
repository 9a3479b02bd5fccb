"""A file that is written behind whoever has the bytes: what it holds, what is waited for, and what fails."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lmdbitmap.copier import ImageFile, Report, copy_clusters
from lmdbitmap.crew import Spared
from lmdbitmap.device import MemoryDevice
from lmdbitmap.digest_algorithms import DigestAlgorithm
from lmdbitmap.errors import StorageError, os_errors_at
from lmdbitmap.geometry import Geometry
from lmdbitmap.hashing import CHUNK_BYTES, ChunkHasher
from lmdbitmap.interfaces import Buffer
from lmdbitmap.write_behind import WriteBehind
from tests.naive_digests import naive_digests
from tests.qcow2_model import naive_chain_read
from tests.spared import EACH

LARGE = 256 << 10
PATIENCE_S = 10.0


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


@pytest.fixture
def hasher(fd: int, tmp_path: Path) -> Iterator[ChunkHasher]:
    with ChunkHasher(fd, str(tmp_path), DigestAlgorithm.SHA256) as made:
        yield made


class Gated(ImageFile):
    """A file whose writes wait until they are let."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "image")
        self.begun, self.let = threading.Semaphore(0), threading.Semaphore(0)

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.begun.release()
        assert self.let.acquire(timeout=PATIENCE_S)
        super().pwrite(data, offset)


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
@pytest.mark.parametrize("seed", range(20))
def test_the_file_holds_what_was_written_and_so_do_the_digests(
    fd: int, hasher: ChunkHasher, seed: int, spared: Spared
) -> None:
    """Large and small, at the end and elsewhere, out of buffers that are used again as soon as they are let go."""
    lot, expected = random.Random(seed), bytearray()
    buffers = [bytearray(3 * LARGE) for _ in range(3)]
    with WriteBehind(ImageFile(fd, "image"), hasher, spared=spared) as behind:
        for number in range(lot.randrange(1, 25)):
            buffer = buffers[number % len(buffers)]
            behind.let_go(buffer)
            length = lot.choice([1, 4096, LARGE - 1, LARGE, 3 * LARGE])
            buffer[:length] = lot.randbytes(length)
            offset = len(expected) if lot.random() < 0.8 else lot.randrange(len(expected) + LARGE)
            behind.pwrite(memoryview(buffer)[:length], offset)
            expected.extend(bytes(max(offset + length - len(expected), 0)))
            expected[offset : offset + length] = buffer[:length]
        behind.settle()
        assert os.pread(fd, len(expected) + 1, 0) == expected
        digests = b"".join(hasher.digests())
        assert digests == naive_digests(DigestAlgorithm.SHA256, bytes(expected), CHUNK_BYTES)


def test_whoever_has_a_large_piece_goes_on_before_it_is_written(fd: int, hasher: ChunkHasher) -> None:
    gated, buffers = Gated(fd), [bytearray(b"1" * LARGE), bytearray(b"2" * LARGE)]
    with WriteBehind(gated, hasher) as behind:
        for number, buffer in enumerate(buffers):
            behind.pwrite(buffer, number * LARGE)
        assert gated.begun.acquire(timeout=PATIENCE_S)
        assert os.fstat(fd).st_size == 0
        gated.let.release()
        behind.let_go(buffers[0])
        assert os.pread(fd, LARGE, 0) == buffers[0]
        gated.let.release()
        behind.settle()
        assert os.pread(fd, LARGE, LARGE) == buffers[1]


def test_no_more_is_held_than_was_said(fd: int, hasher: ChunkHasher) -> None:
    """The third write waits until the first is done."""
    gated = Gated(fd)
    with WriteBehind(gated, hasher) as behind:
        assert behind.most_held == 2
        for number in range(2):
            behind.pwrite(bytes(LARGE), number * LARGE)
        third = threading.Thread(target=behind.pwrite, args=(bytes(LARGE), 2 * LARGE))
        third.start()
        assert gated.begun.acquire(timeout=PATIENCE_S)
        assert third.is_alive()
        gated.let.release(3)
        third.join(PATIENCE_S)
        assert not third.is_alive()
        behind.settle()
    assert os.fstat(fd).st_size == 3 * LARGE


def test_what_is_small_is_written_behind_what_came_before_it(fd: int, hasher: ChunkHasher) -> None:
    with WriteBehind(ImageFile(fd, "image"), hasher) as behind:
        behind.pwrite(b"l" * LARGE, 0)
        behind.pwrite(b"small", 10)
        assert os.pread(fd, 16, 8) == b"llsmall" + b"l" * 9


def test_nothing_is_read_back_before_it_is_written(fd: int, hasher: ChunkHasher) -> None:
    """A chunk that began small is read back when the next one is whole."""
    gated, content = Gated(fd), random.Random(3).randbytes(100 + 3 * CHUNK_BYTES)
    gated.let.release()
    with WriteBehind(gated, hasher) as behind:

        def let_and(settle: Callable[[], None]) -> None:
            gated.let.release(99)
            settle()

        hasher.before_reading = partial(let_and, hasher.before_reading)
        behind.pwrite(content[:100], 0)
        for start in range(100, len(content), CHUNK_BYTES):
            behind.pwrite(content[start : start + CHUNK_BYTES], start)
        behind.settle()
        assert b"".join(hasher.digests()) == naive_digests(DigestAlgorithm.SHA256, content, CHUNK_BYTES)


@pytest.mark.parametrize("length", [1, LARGE])
@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
def test_a_write_that_fails_is_told_by_every_later_call(length: int, spared: Spared) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with (
        ChunkHasher(write_end, "/", DigestAlgorithm.SHA256) as hasher,
        pytest.raises(StorageError, match=r"^image\.qcow2: Illegal seek"),
        WriteBehind(ImageFile(write_end, "image.qcow2"), hasher, spared=spared) as behind,
    ):
        fail_again_and_again(behind, bytearray(length))
    os.close(write_end)


def fail_again_and_again(behind: WriteBehind, piece: bytearray) -> None:
    with contextlib.suppress(StorageError):
        behind.pwrite(piece, 0)
    for call in (behind.settle, lambda: behind.let_go(piece), lambda: behind.pwrite(b"x", len(piece))):
        with pytest.raises(StorageError, match=r"^image\.qcow2: Illegal seek"):
            call()


def test_a_file_that_cannot_be_read_back_is_named(tmp_path: Path) -> None:
    """And not the disk that is being read meanwhile."""
    with (
        (tmp_path / "file").open("wb", buffering=0) as file,
        ChunkHasher(file.fileno(), str(tmp_path), DigestAlgorithm.SHA256) as hasher,
        pytest.raises(StorageError, match=r"^image\.qcow2: Bad file descriptor"),
        WriteBehind(ImageFile(file.fileno(), "image.qcow2"), hasher) as behind,
    ):
        write_on(behind, bytes(5 * CHUNK_BYTES))


def write_on(behind: WriteBehind, content: bytes) -> None:
    with os_errors_at("the disk"):
        behind.pwrite(content[:1], 0)
        for number in range(20):
            behind.pwrite(content, 1 + number * len(content))


def test_an_image_that_is_written_slowly_holds_what_was_read(fd: int, hasher: ChunkHasher) -> None:
    """No buffer is filled anew while it is being written, and all is written when the digests are there."""

    class Slow(ImageFile):
        def pwrite(self, data: Buffer, offset: int) -> None:
            if len(memoryview(data)) >= LARGE:
                for_a_moment.wait(0.005)
            super().pwrite(data, offset)

    for_a_moment = threading.Event()
    content = random.Random(4).randbytes(24 << 20)
    device, clusters = MemoryDevice(len(content)), Geometry(len(content), 18)
    device.pwrite(content, 0)
    with WriteBehind(Slow(fd, "image"), hasher) as behind:
        runs = [(0, clusters.block_count)]
        copy_clusters(device, behind, clusters, runs, backing_file=None, report=Report(None, 0))
        digests = b"".join(hasher.digests())
    written = os.pread(fd, os.fstat(fd).st_size, 0)
    assert naive_chain_read([written]) == content
    assert digests == naive_digests(DigestAlgorithm.SHA256, written, CHUNK_BYTES)


def test_whoever_leaves_has_written_all_and_leaves_no_thread_behind(fd: int, hasher: ChunkHasher) -> None:
    before, gated = set(threading.enumerate()), Gated(fd)
    with WriteBehind(gated, hasher) as behind:
        behind.pwrite(bytes(LARGE), 0)
        behind.pwrite(bytes(LARGE), LARGE)
        gated.let.release(2)
    assert os.fstat(fd).st_size == 2 * LARGE
    assert set(threading.enumerate()) <= before


def test_a_write_that_fails_last_fails_whoever_leaves(tmp_path: Path, hasher: ChunkHasher) -> None:
    with (
        (tmp_path / "read only").open("xb", buffering=0),
        (tmp_path / "read only").open("rb", buffering=0) as file,
        pytest.raises(StorageError, match=r"^image\.qcow2: Bad file descriptor"),
        WriteBehind(ImageFile(file.fileno(), "image.qcow2"), hasher) as behind,
    ):
        behind.pwrite(bytes(LARGE), 0)
