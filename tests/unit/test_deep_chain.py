"""A chain of a thousand images with few descriptors: restored, restored in place, read here and there, compared."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.backups.rescan import differing
from lmdbitmap.errors import Busy, FormatError
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.repository import backup_chain
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.restoring.restore import restore
from tests.helpers.backed_up import RESCAN, BackedUpDisk
from tests.helpers.deep_chain import CLUSTER, make_deep_chain
from tests.helpers.support import open_files
from tests.helpers.tracked import NAME
from tests.unit.test_verify import few_open_files, flip

SIZE = 1 << 20
IMAGES = 1000
DESCRIPTORS = 256


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[BackupFolder, bytes]]:
    folder, truth = make_deep_chain(tmp_path_factory.mktemp("deep") / "backups", IMAGES, size=SIZE, written=2)
    with few_open_files(DESCRIPTORS):
        yield folder, bytes(truth)


def test_it_is_restored_and_restored_in_place(deep: tuple[BackupFolder, bytes], tmp_path: Path) -> None:
    folder, truth = deep
    out = tmp_path / "out.raw"
    restore(folder.repository_path, NAME, out)
    assert out.read_bytes() == truth
    flip(out, SIZE // 2)
    assert restore(folder.repository_path, NAME, out, in_place=True).bytes_written <= CLUSTER
    assert out.read_bytes() == truth


def test_it_is_read_here_and_there_with_half_of_the_descriptors(deep: tuple[BackupFolder, bytes]) -> None:
    folder, truth = deep
    before = len(open_files())
    randomness = random.Random(2)
    with backup_chain.open_backup(folder.repository_path, NAME) as chain:
        assert (len(chain.images), list(chain.unproven)) == (IMAGES, [])
        for length in [1, CLUSTER, 5 * CLUSTER, SIZE // 3] * 5:
            offset = randomness.randrange(SIZE - length)
            assert chain.pread(length, offset) == truth[offset : offset + length]
        assert sum(part.length for part in chain.allocation(0, SIZE)) == SIZE
        assert len(os.listdir("/proc/self/fd")) <= before + DESCRIPTORS // 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_is_compared_with_a_disk(deep: tuple[BackupFolder, bytes]) -> None:
    folder, truth = deep
    disk = MemoryDevice(SIZE)
    disk.pwrite(truth, 0)
    disk.pwrite(bytes([truth[70 * CLUSTER] ^ 1]), 70 * CLUSTER)
    with backup_chain.open_backup(folder.repository_path, NAME) as chain:
        assert list(differing(disk, chain, Geometry(SIZE, 12))) == [(70, 71)]


def test_a_long_chain_is_backed_up_by_comparison_with_few_files_open(tmp_path: Path) -> None:
    disk = BackedUpDisk(tmp_path, 40 * CLUSTER)
    for number in range(40):
        disk.write(b"x" * CLUSTER, number * CLUSTER)
        disk.backup()
    with few_open_files(64):
        disk.write(b"y", 0)
        assert disk.backup(RESCAN).bytes_changed == CLUSTER
        assert disk.restored() == disk.content()
    disk.close()


def test_an_image_that_is_replaced_while_it_is_closed_is_told(tmp_path: Path) -> None:
    """As by a prune: its tables are others."""
    folder, _ = make_deep_chain(tmp_path / "backups", 40, size=SIZE, written=2)
    path = Path(folder.path_of("000002-full.qcow2"))
    (tmp_path / "other").write_bytes(path.read_bytes())
    with few_open_files(64), backup_chain.open_backup(folder.repository_path, NAME) as chain:
        (tmp_path / "other").rename(path)
        with pytest.raises(Busy, match=r"000002-full\.qcow2 was changed or replaced while it was read"):
            chain.pread(SIZE, 0)


def test_one_wrong_bit_in_one_of_a_thousand_images_is_found(
    deep: tuple[BackupFolder, bytes], tmp_path: Path
) -> None:
    folder, _ = deep
    path = Path(folder.path_of("000500-full.qcow2"))
    flip(path, 100)
    try:
        with pytest.raises(FormatError, match=r"000500-full\.qcow2: bytes 0\.\."):
            restore(folder.repository_path, NAME, tmp_path / "out.raw")
    finally:
        flip(path, 100)
    assert not (tmp_path / "out.raw").exists()
