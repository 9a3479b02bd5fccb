"""QEMU reads our backups without us: it checks every image, and reads every restore point as the disk was."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.restoring.restore import restore
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, BackedUpDisk
from tests.helpers.support import requires, run, spawn, wait_for_socket
from tests.helpers.tracked import NAME, quick_folder

pytestmark = [requires("qemu-img"), requires("qemu-nbd"), requires("nbdcopy"), requires("qemu-io")]

KIB, MIB = 1 << 10, 1 << 20
KINDS = [FULL, INCREMENTAL, DIFFERENTIAL, INCREMENTAL, FULL, INCREMENTAL]


class Backups:
    """A disk with six restore points, what it held at each, and the images behind them."""

    def __init__(self, folder: Path, granularity_bits: int, compression: str | None) -> None:
        self.disk = BackedUpDisk(folder, 9 * MIB + 700, granularity_bits)
        self.truths: list[Path] = []
        randomness = random.Random(5)
        for number, kind in enumerate(KINDS):
            self._change(randomness, number)
            self.disk.backup(kind, compression=compression)
            truth = folder / f"truth{number}.raw"
            truth.write_bytes(self.disk.content())
            self.truths.append(truth)

    def _change(self, randomness: random.Random, number: int) -> None:
        """Data, zeroes and a size for each restore point: shrunk at the third, grown at the fourth."""
        self.disk.resize({2: 5 * MIB + 1, 3: 12 * MIB + 513}.get(number, self.disk.disk().size))
        size = self.disk.disk().size
        with self.disk.attach() as attached:
            for _ in range(20 if number else 60):
                length = randomness.randrange(1, 40 * KIB)
                data = randomness.randbytes(1 + randomness.randrange(length)).ljust(length, b"-")
                attached.pwrite(data, randomness.randrange(size - length))
            for _ in range(3):
                attached.write_zeroes(randomness.randrange(size - MIB), randomness.randrange(MIB))

    @property
    def images(self) -> list[Path]:
        folder = self.disk.backup_folder()
        return [Path(folder.path_of(entry.file)) for entry in self.disk.manifest().backups]


SHAPES = {
    "4 KiB": (12, None),
    "64 KiB": (16, None),
    "4 KiB, zlib": (12, "zlib"),
    "64 KiB, zstd": (16, "zstd"),
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def backups(request: pytest.FixtureRequest) -> Iterator[Backups]:
    with quick_folder() as folder:
        made = Backups(folder, *request.param)
        yield made
        made.disk.close()


def info(*arguments: object) -> Any:
    return json.loads(run("qemu-img", "info", "--output=json", *map(str, arguments)).stdout)


def test_every_image_passes_qemus_check(backups: Backups) -> None:
    for image in backups.images:
        found = json.loads(run("qemu-img", "check", "--output=json", image).stdout)
        assert found["check-errors"] == 0
        assert not {"leaks", "corruptions"} & found.keys()
    assert len(backups.images) == len(KINDS)


def test_what_the_manifest_calls_compressed_is(backups: Backups) -> None:
    for image, entry in zip(backups.images, backups.disk.manifest().backups, strict=True):
        said = run("qemu-img", "check", image).stdout
        assert (" 0.00% compressed" in said) is (entry.compression is None)
        if entry.compression is not None:
            assert info(image)["format-specific"]["data"]["compression-type"] == entry.compression.value


def test_every_restore_point_compares_equal_with_the_disk_as_it_was(backups: Backups) -> None:
    compared = [
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, truth).stdout
        for image, truth in zip(backups.images, backups.truths, strict=True)
    ]
    assert compared == ["Images are identical.\n"] * len(KINDS)


def test_our_restore_equals_qemus_conversion_cut_to_the_disks_size(backups: Backups) -> None:
    folder = backups.disk.folder
    for number, (image, truth) in enumerate(zip(backups.images, backups.truths, strict=True), start=1):
        ours, theirs = folder / f"ours{number}.raw", folder / f"theirs{number}.raw"
        restore(folder / "backups", NAME, ours, at=str(number))
        run("qemu-img", "convert", "-O", "raw", image, theirs)
        os.truncate(theirs, truth.stat().st_size)
        assert ours.read_bytes() == theirs.read_bytes() == truth.read_bytes()
    assert number == len(KINDS)


def test_the_chain_has_relative_names_and_survives_a_move(backups: Backups) -> None:
    moved = backups.disk.folder / "moved"
    try:
        (backups.disk.folder / "backups").rename(moved)
        chain = info("--backing-chain", moved / NAME / "000004-incremental.qcow2")
        assert [Path(image["filename"]).name for image in chain] == [
            "000004-incremental.qcow2",
            "000003-differential.qcow2",
            "000001-full.qcow2",
        ]
        assert [image.get("backing-filename") for image in chain] == [
            "000003-differential.qcow2",
            "000001-full.qcow2",
            None,
        ]
        assert [image.get("backing-filename-format") for image in chain] == ["qcow2", "qcow2", None]
        run("qemu-img", "compare", moved / NAME / "000004-incremental.qcow2", backups.truths[3])
    finally:
        moved.rename(backups.disk.folder / "backups")


def test_a_restore_point_can_be_served_by_qemu_nbd(backups: Backups) -> None:
    socket, copy = backups.disk.folder / "socket", backups.disk.folder / "copy.raw"
    with spawn("qemu-nbd", "--read-only", "--persistent", f"--socket={socket}", backups.images[3]) as server:
        wait_for_socket(socket, server)
        run("nbdcopy", f"nbd+unix:///?socket={socket}", copy)
    truth = backups.truths[3].read_bytes()
    assert copy.read_bytes()[: len(truth)] == truth


def test_a_guest_can_go_on_from_a_restore_point_and_the_backup_stays(backups: Backups) -> None:
    """As a virtual machine would: on an overlay of its own."""
    overlay, image = backups.disk.folder / "overlay.qcow2", backups.images[-1]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay)
    run("qemu-io", "-c", "write -P 7 1M 100k", overlay)
    assert run("qemu-img", "compare", overlay, backups.truths[-1], check=False).returncode == 1
    run("qemu-img", "compare", image, backups.truths[-1])
    backups.disk.restored()


def test_an_empty_increment_of_a_sparse_terabyte_is_small(tmp_path: Path) -> None:
    disk = BackedUpDisk(tmp_path, 1 << 40, 16)
    disk.write(b"x" * 5000, 700 << 30)
    disk.backup()
    disk.backup()
    disk.resize(3 << 39)
    disk.backup()
    folder = disk.backup_folder()
    images = [Path(folder.path_of(entry.file)) for entry in disk.manifest().backups]
    assert [image.stat().st_size < 600 * KIB for image in images] == [True] * 3
    for image in images:
        run("qemu-img", "check", image)
    run("qemu-img", "compare", images[2], disk.image)
    disk.close()
