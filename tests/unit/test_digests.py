"""Digests of chunks: what the file beside an image holds, to the byte, and which name it has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.copying.hashing import CHUNK_BYTES, ChunkHasher
from lmdbitmap.errors import StorageError
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.digests import synced_digests
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.naive_digests import naive_digests


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, 3 * CHUNK_BYTES)
    made.write(os.urandom(made.size), 0)
    yield made
    made.close()


@pytest.mark.parametrize("algorithm", DigestAlgorithm)
def test_a_backup_has_digests_beside_it_that_the_manifest_vouches_for(
    disk: BackedUpDisk, algorithm: DigestAlgorithm
) -> None:
    entry = disk.backup(digest=algorithm.value)
    assert entry.chunks is not None
    assert entry.chunks.algorithm is entry.digest_algorithm is algorithm
    image, digests = (Path(disk.backup_folder().path_of(name)) for name in (entry.file, entry.chunks.file))
    assert entry.chunks.chunk_size == CHUNK_BYTES
    assert digests.read_bytes() == naive_digests(algorithm, image.read_bytes(), CHUNK_BYTES)
    assert hashlib.sha256(digests.read_bytes()).hexdigest() == entry.chunks.sha256
    assert entry.digest == entry.chunks.sha256
    assert digests.stat().st_mode & 0o777 == 0o600
    assert digests.stat().st_size == 4 * 32


def test_two_images_of_one_name_have_digests_of_two_names(tmp_path: Path) -> None:
    folder = BackupFolder(tmp_path, "sda")
    with (
        folder.locked(),
        (tmp_path / "image").open("w+b") as file,
        ChunkHasher(file.fileno(), str(tmp_path), DigestAlgorithm.SHA256) as hasher,
    ):
        made = [synced_digests(folder, "000001-full.qcow2", file.fileno(), hasher) for _ in range(2)]
    assert len({chunks.file for chunks in made} & set(os.listdir(folder.path))) == 2


def test_what_cannot_be_read_back_is_told_with_the_images_name(tmp_path: Path) -> None:
    folder = BackupFolder(tmp_path, "sda")
    with (
        folder.locked(),
        (tmp_path / "image").open("wb") as file,
        ChunkHasher(file.fileno(), str(tmp_path), DigestAlgorithm.SHA256) as hasher,
    ):
        hasher.wrote(0, file.write(b"?"))
        file.flush()
        with pytest.raises(StorageError, match=r"sda/000001-full\.qcow2: Bad file descriptor"):
            synced_digests(folder, "000001-full.qcow2", file.fileno(), hasher)
        assert os.listdir(folder.path) == ["lock"]
