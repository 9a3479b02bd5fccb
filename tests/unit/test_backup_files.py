"""The names of a backup's files, and the digest of one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lmdbitmap.repository.backup_files import image_name, sha256_of
from lmdbitmap.repository.manifest import BackupType


def test_images_are_named_so_that_they_sort() -> None:
    assert image_name(7, BackupType.INCREMENTAL) == "000007-incremental.qcow2"
    assert image_name(1234567, BackupType.FULL) == "1234567-full.qcow2"


@pytest.mark.parametrize("length", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 5])
def test_the_digest_is_that_of_sha256sum(tmp_path: Path, length: int) -> None:
    content = bytes(range(256)) * (length // 256 + 1)
    (tmp_path / "file").write_bytes(content[:length])
    with (tmp_path / "file").open("rb") as file:
        assert sha256_of(file.fileno()) == hashlib.sha256(content[:length]).hexdigest()


def test_hashing_ends_when_it_is_told_to(tmp_path: Path) -> None:
    asked = []
    (tmp_path / "file").write_bytes(bytes(3 << 20))

    def stopped() -> bool:
        asked.append(True)
        return len(asked) == 3

    with (tmp_path / "file").open("rb") as file:
        assert sha256_of(file.fileno(), stopped) == hashlib.sha256(bytes(2 << 20)).hexdigest()
