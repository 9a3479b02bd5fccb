"""Digests of chunks: what the file beside an image holds, to the byte, and which name it has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.digests import CHUNK_BYTES, chunk_digests, synced_proof
from lmdbitmap.errors import StorageError
from lmdbitmap.repository import BackupFolder
from tests.backed_up import BackedUpDisk

LENGTHS = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, 3 * CHUNK_BYTES)
    made.write(os.urandom(made.size), 0)
    yield made
    made.close()


def naive(content: bytes, chunk_size: int) -> bytes:
    chunks = [content[start : start + chunk_size] for start in range(0, len(content), chunk_size)]
    return b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk_size", [4096, CHUNK_BYTES])
def test_each_chunk_has_its_digest_and_the_last_may_be_short(
    tmp_path: Path, length: int, chunk_size: int
) -> None:
    content = os.urandom(length)
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        assert b"".join(chunk_digests(file.fileno(), chunk_size)) == naive(content, chunk_size)


def test_a_backup_has_digests_beside_it_that_the_manifest_vouches_for(disk: BackedUpDisk) -> None:
    entry = disk.backup()
    assert entry.chunks is not None
    image, digests = (Path(disk.backup_folder().path_of(name)) for name in (entry.file, entry.chunks.file))
    assert entry.chunks.chunk_size == CHUNK_BYTES
    assert digests.read_bytes() == naive(image.read_bytes(), CHUNK_BYTES)
    assert hashlib.sha256(digests.read_bytes()).hexdigest() == entry.chunks.sha256
    assert hashlib.sha256(image.read_bytes()).hexdigest() == entry.sha256
    assert digests.stat().st_mode & 0o777 == 0o600
    assert digests.stat().st_size == 4 * 32


def test_two_images_of_one_name_have_digests_of_two_names(tmp_path: Path) -> None:
    folder = BackupFolder(tmp_path, "sda")
    with folder.locked(), (tmp_path / "image").open("w+b") as file:
        made = [synced_proof(folder, "000001-full.qcow2", file.fileno()) for _ in range(2)]
    assert len({proof.chunks.file for proof in made} & set(os.listdir(folder.path))) == 2


def test_what_cannot_be_read_back_is_told_with_the_images_name(tmp_path: Path) -> None:
    folder = BackupFolder(tmp_path, "sda")
    with folder.locked(), (tmp_path / "image").open("wb") as file:
        with pytest.raises(StorageError, match=r"sda/000001-full\.qcow2: Bad file descriptor"):
            synced_proof(folder, "000001-full.qcow2", file.fileno())
        assert os.listdir(folder.path) == ["lock"]
