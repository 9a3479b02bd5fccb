"""QEMU reads pruned and copied repositories as before: every image is sound, every restore point the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.transfer import copy_backups
from tests.helpers.support import requires, run
from tests.helpers.tracked import NAME, quick_folder
from tests.interop.test_backup import KINDS, Backups

pytestmark = [requires("qemu-img")]


@pytest.fixture(
    params=[(12, None), (16, None), (12, "zlib"), (16, "zstd")],
    ids=["4 KiB", "64 KiB", "4 KiB zlib", "64 KiB zstd"],
)
def backups(request: pytest.FixtureRequest) -> Iterator[Backups]:
    with quick_folder() as folder:
        made = Backups(folder, *request.param)
        yield made
        made.disk.close()


def qemu_agrees(backups: Backups, repository: Path) -> int:
    """Answers how many images there are."""
    count = 0
    for entry in backups.disk.manifest(repository.name).backups:
        image, truth = repository / NAME / entry.file, backups.truths[entry.sequence - 1]
        run("qemu-img", "check", "-q", image)
        run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", image, truth)
        converted = repository.parent / "converted.raw"
        run("qemu-img", "convert", "-O", "raw", image, converted)
        assert converted.read_bytes()[: truth.stat().st_size] == truth.read_bytes()
        count += 1
    return count


def test_after_each_prune_every_image_is_sound_and_reads_the_same(backups: Backups) -> None:
    repository = backups.disk.folder / "backups"
    counts = []
    for last in range(len(KINDS), 0, -1):
        prune(repository, keep=Retention(last=last))
        counts.append(qemu_agrees(backups, repository))
    assert counts == [6, 5, 4, 3, 2, 1]


def test_a_pruned_repository_is_copied_and_moved_with_its_chains(backups: Backups) -> None:
    repository, copy = backups.disk.folder / "backups", backups.disk.folder / "copy"
    prune(repository, keep=Retention(last=4))
    copy_backups(repository, copy)
    os.rename(repository, backups.disk.folder / "away")
    assert qemu_agrees(backups, copy) == 4
