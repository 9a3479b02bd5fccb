"""Merging images whose clusters differ in size, of disks that grew and shrank, beside reading their chains."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from pathlib import Path

import pytest

from lmdbitmap.copying.copier import ImageFile
from lmdbitmap.images.file_pool import FilePool
from lmdbitmap.qcow2 import Qcow2Writer
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry, Manifest
from lmdbitmap.repository.merge import View, write_merged
from lmdbitmap.repository.repository import known_backups
from lmdbitmap.restoring.restore import restore
from lmdbitmap.work.progress import Report
from tests.helpers.support import requires, run
from tests.unit.test_manifest import DISK, entry

CLUSTERS = (4096, 512, 16384, 4096)
SIZES = (300_001, 300_001, 120_777, 260_000)


@pytest.fixture
def folder(tmp_path: Path) -> BackupFolder:
    """Four backups on each other, with clusters of their own, each with some data and some zeroes."""
    made = BackupFolder(tmp_path / "backups", "sda")
    with made.locked():
        entries = [image(made, number) for number in range(len(CLUSTERS))]
        made.replace_manifest(Manifest(DISK, tuple(entries)))
    return made


def image(folder: BackupFolder, number: int) -> BackupEntry:
    """What shrank or grew is stored from the end of the smaller disk on, as a tracker would have it."""
    size, cluster = SIZES[number], CLUSTERS[number]
    name, parent = f"{number + 1:06}-x.qcow2", None if number == 0 else f"{number:06}-x.qcow2"
    randomness, changed_from = (
        random.Random(number),
        min(SIZES[max(number - 1, 0)], size) // cluster * cluster,
    )
    with open(folder.path_of(name), "xb") as file:
        writer = Qcow2Writer(
            ImageFile(file.fileno(), name),
            size=size,
            cluster_bits=cluster.bit_length() - 1,
            backing_file=parent,
        )
        for offset in range(0, size, cluster):
            length, choice = min(cluster, size - offset), randomness.random()
            if choice < 0.3 or number == 0:
                writer.write(offset, randomness.randbytes(length))
            elif choice < 0.5 or offset >= changed_from:
                writer.write_zeroes(offset, length)
        stored = writer.finish()
    return entry(
        number, None if number == 0 else number - 1, file=name, disk_size=size, cluster_size=cluster,
        bytes_stored=stored, sha256=digest_of(folder.path_of(name)),
    )  # fmt: skip


def digest_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def content(folder: BackupFolder, number: int) -> bytes:
    out = Path(folder.repository_path).parent / "out.raw"
    restore(folder.repository_path, "sda", out, at=f"b{number}", verify=False)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


@requires("qemu-img")
@pytest.mark.parametrize("kernel_copies", [True, False])
@pytest.mark.parametrize(("number", "down_to"), [(3, 0), (3, 1), (3, 2), (2, 1), (1, 0), (2, 0)])
def test_a_merged_image_reads_as_the_chain_did(
    folder: BackupFolder, number: int, down_to: int, kernel_copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_copies:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    entries = known_backups(folder).backups
    chain, below = entries[: number + 1], entries[:down_to]
    path = folder.path_of("merged.qcow2")
    with FilePool(most_open=2) as pool, open(path, "xb") as file:
        over = View(pool, folder, below, down_to=down_to) if down_to else None
        view = View(pool, folder, chain, down_to=down_to)
        copied, _ = write_merged(file.fileno(), path, view, over, Report(None, 0))
    assert copied.bytes_stored == os.path.getsize(path)
    truth = folder.path_of("truth.raw")
    Path(truth).write_bytes(content(folder, number) + bytes(-SIZES[number] % 512))
    run("qemu-img", "check", "-q", path)
    run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, truth)
    if not down_to:
        assert copied.bytes_changed == SIZES[number]


def refuse(*_: object) -> int:
    raise OSError(18, "another file system")


@requires("qemu-img")
def test_the_end_of_a_disk_that_shrank_into_a_sector_is_stored_over_a_longer_parent(tmp_path: Path) -> None:
    """What the parent has past the end would show in QEMU; no byte of that belongs to the disk."""
    folder = BackupFolder(tmp_path / "backups", "sda")
    entries = []
    with folder.locked():
        for number, size in enumerate((9000, 5000)):
            name, parent = f"{number + 1:06}-full.qcow2", "000001-full.qcow2" if number else None
            with open(folder.path_of(name), "xb") as file:
                writer = Qcow2Writer(
                    ImageFile(file.fileno(), name), size=size, cluster_bits=12, backing_file=parent
                )
                if not number:
                    writer.write(0, b"x" * size)
                stored = writer.finish()
            made = entry(
                number, number - 1 if number else None, file=name, disk_size=size, bytes_stored=stored,
                sha256=digest_of(folder.path_of(name)),
            )  # fmt: skip
            entries.append(dataclasses.replace(made, cluster_size=4096))
        folder.replace_manifest(Manifest(DISK, tuple(entries)))
    path, truth = folder.path_of("merged.qcow2"), folder.path_of("truth.raw")
    with FilePool() as pool, open(path, "xb") as file:
        over = View(pool, folder, entries[:1], down_to=1)
        write_merged(file.fileno(), path, View(pool, folder, entries, down_to=1), over, Report(None, 0))
    Path(truth).write_bytes(b"x" * 5000 + bytes(120))
    run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, truth)
