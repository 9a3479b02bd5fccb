"""A file that is written behind whoever has the bytes: what it holds, what is waited for, and what fails."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.copier import ImageFile
from lmdbitmap.digest_algorithms import DigestAlgorithm
from lmdbitmap.errors import StorageError
from lmdbitmap.hashing import CHUNK_BYTES, ChunkHasher
from lmdbitmap.interfaces import Buffer
from lmdbitmap.write_behind import WriteBehind
from tests.naive_digests import naive_digests

LARGE = 256 << 10
NOBODY = 1 << 20
"""Processors to be spared: more than there are."""
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


class Gated:
    """A file whose writes wait until they are let."""

    def __init__(self, fd: int) -> None:
        self._file = ImageFile(fd, "image")
        self.begun, self.let = threading.Semaphore(0), threading.Semaphore(0)

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.begun.release()
        assert self.let.acquire(timeout=PATIENCE_S)
        self._file.pwrite(data, offset)


@pytest.mark.parametrize("spared", [0, NOBODY])
@pytest.mark.parametrize("seed", range(20))
def test_the_file_holds_what_was_written_and_so_do_the_digests(
    fd: int, hasher: ChunkHasher, seed: int, spared: int
) -> None:
    """Large and small, at the end and elsewhere, out of buffers that are used again as soon as they are let go."""
    lot, expected = random.Random(seed), bytearray()
    buffers = [bytearray(3 * LARGE) for _ in range(3)]
    with WriteBehind(ImageFile(fd, "image"), hasher, spared_processors=spared) as behind:
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

        def settle() -> None:
            gated.let.release(99)
            behind.settle()

        hasher.before_reading = settle
        behind.pwrite(content[:100], 0)
        for start in range(100, len(content), CHUNK_BYTES):
            behind.pwrite(content[start : start + CHUNK_BYTES], start)
        behind.settle()
        assert b"".join(hasher.digests()) == naive_digests(DigestAlgorithm.SHA256, content, CHUNK_BYTES)


def test_a_write_that_fails_is_told_by_every_later_call() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    piece = bytearray(LARGE)
    with (
        ChunkHasher(write_end, "/", DigestAlgorithm.SHA256) as hasher,
        WriteBehind(ImageFile(write_end, "image.qcow2"), hasher) as behind,
    ):
        behind.pwrite(piece, 0)
        for call in (behind.settle, lambda: behind.let_go(piece), lambda: behind.pwrite(b"x", LARGE)):
            with pytest.raises(StorageError, match=r"^image\.qcow2: Illegal seek"):
                call()
    os.close(write_end)


def test_whoever_leaves_early_leaves_no_thread_behind(fd: int, hasher: ChunkHasher) -> None:
    before = threading.active_count()
    with WriteBehind(ImageFile(fd, "image"), hasher) as behind:
        behind.pwrite(bytes(LARGE), 0)
    assert threading.active_count() == before
