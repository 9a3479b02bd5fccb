"""A repository as a whole: which disks have backups in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdbitmap.errors import NotFound
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.repository import disk_names
from tests.unit.test_manifest import CHAIN


def test_disks_are_listed_by_their_manifests(tmp_path: Path) -> None:
    for name in ("sdb", "sda"):
        made = BackupFolder(tmp_path, name)
        with made.locked():
            made.replace_manifest(CHAIN)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert disk_names(tmp_path) == ["sda", "sdb"]


def test_a_repository_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        disk_names(tmp_path / "nowhere")
