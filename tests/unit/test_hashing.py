"""Digests of a file's chunks that are computed while the file is written, beside those of its final bytes."""

from __future__ import annotations

import os
import random
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmdbitmap.copying import hashing
from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.copying.hashing import CHUNK_BYTES, ChunkHasher, chunk_digests
from lmdbitmap.work.crew import Spared
from tests.helpers.naive_digests import naive_digest, naive_digests
from tests.helpers.spared import EACH

CHUNK = 4096
FOLDER = tempfile.gettempdir()
LENGTHS = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


@pytest.fixture(params=DigestAlgorithm, ids=lambda algorithm: algorithm.value)
def algorithm(request: pytest.FixtureRequest) -> DigestAlgorithm:
    chosen: DigestAlgorithm = request.param
    return chosen


def content_of(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk_size", [4096, CHUNK_BYTES])
def test_each_chunk_has_its_digest_and_the_last_may_be_short(
    fd: int, algorithm: DigestAlgorithm, length: int, chunk_size: int
) -> None:
    content = os.urandom(length)
    os.pwrite(fd, content, 0)
    assert b"".join(chunk_digests(fd, algorithm, chunk_size)) == naive_digests(algorithm, content, chunk_size)
    with ChunkHasher(fd, FOLDER, algorithm, chunk_size) as hasher:
        assert b"".join(hasher.digests()) == naive_digests(algorithm, content, chunk_size)


@pytest.mark.parametrize("spared", EACH.values(), ids=EACH)
@pytest.mark.parametrize("seed", range(30))
def test_in_whatever_order_a_file_is_written_the_digests_are_of_what_it_holds_in_the_end(
    fd: int, algorithm: DigestAlgorithm, seed: int, spared: Spared
) -> None:
    """Half of it is fed, in turn or not, and hashed some time later; the other half is read back."""
    lot = random.Random(seed)
    later: list[Callable[[], None]] = []
    with ChunkHasher(fd, FOLDER, algorithm, CHUNK, spared=spared) as hasher:
        for _ in range(lot.randrange(60)):
            end = os.fstat(fd).st_size
            offset = end if lot.random() < 0.7 else lot.randrange(end + 5 * CHUNK)
            data = lot.randbytes(lot.randrange(1, 9 * CHUNK))
            if lot.random() < 0.5:
                later.append(hasher.feed(offset, memoryview(data)))
                os.pwrite(fd, data, offset)
            else:
                hasher.wrote(offset, os.pwrite(fd, data, offset))
        lot.shuffle(later)
        for work in later:
            work()
        assert b"".join(hasher.digests()) == naive_digests(algorithm, content_of(fd), CHUNK)


@pytest.mark.parametrize("first", [0, 1, 300_000, CHUNK_BYTES])
def test_what_is_fed_in_the_order_of_the_file_is_not_read_back(
    fd: int, algorithm: DigestAlgorithm, first: int
) -> None:
    """All but the chunk that something else is in, and the last one, if it is short."""
    small, large = os.urandom(first), [os.urandom(CHUNK_BYTES + 70_001) for _ in range(5)]
    content = b"".join([small, *large])
    with ChunkHasher(fd, FOLDER, algorithm) as hasher:
        hasher.wrote(0, os.pwrite(fd, small, 0))
        works = [
            hasher.feed(first + number * len(piece), memoryview(piece)) for number, piece in enumerate(large)
        ]
        for work in reversed(works):
            work()
        os.pwrite(fd, content, 0)
        os.pwrite(fd, bytes(4 * CHUNK_BYTES), CHUNK_BYTES)  # behind its back
        assert b"".join(hasher.digests()) == naive_digests(algorithm, content, CHUNK_BYTES)


def test_what_was_written_once_is_hashed_before_the_file_is_whole(
    fd: int, algorithm: DigestAlgorithm
) -> None:
    with ChunkHasher(fd, FOLDER, algorithm, CHUNK) as hasher:
        hasher.wrote(0, os.pwrite(fd, b"a" * 64 * CHUNK, 0))
        hasher._threads.shutdown()
        os.pwrite(fd, b"b" * 64 * CHUNK, 0)  # behind its back
        assert b"".join(hasher.digests()) == naive_digests(algorithm, b"a" * 64 * CHUNK, CHUNK)


def test_a_header_that_is_written_last_is_hashed_again(fd: int, algorithm: DigestAlgorithm) -> None:
    with ChunkHasher(fd, FOLDER, algorithm, CHUNK) as hasher:
        hasher.wrote(CHUNK, os.pwrite(fd, b"d" * 40 * CHUNK, CHUNK))
        hasher.wrote(0, os.pwrite(fd, b"header", 0))
        assert b"".join(hasher.digests()) == naive_digests(algorithm, content_of(fd), CHUNK)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("wb", buffering=0) as file,
        ChunkHasher(file.fileno(), FOLDER, DigestAlgorithm.SHA256, CHUNK) as hasher,
    ):
        os.pwrite(file.fileno(), bytes(64 * CHUNK), 0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            list(hasher.digests())


@pytest.mark.parametrize("times", [1, 2])
def test_memory_does_not_grow_with_the_file(
    fd: int, algorithm: DigestAlgorithm, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Nor with what is written again."""
    monkeypatch.setattr(hashing, "_MOST_IN_MEMORY", 1 << 14)
    content = os.urandom(CHUNK) * 12_500
    tracemalloc.start()
    with ChunkHasher(fd, FOLDER, algorithm, CHUNK) as hasher:
        for offset in [*range(0, len(content), 8 * CHUNK)] * times:
            hasher.wrote(offset, os.pwrite(fd, content[offset : offset + 8 * CHUNK], offset))
        one = naive_digest(algorithm, content[:CHUNK])
        assert sum(digest == one for digest in hasher.digests()) == 12_500
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()
