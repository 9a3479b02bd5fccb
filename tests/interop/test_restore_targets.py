"""Restores onto what other programs serve, and through QEMU into its own formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from lmdbitmap.restoring.restore import restore
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import Argument, requires, run, spawn, wait_for_socket
from tests.helpers.tracked import NAME

pytestmark = [requires("qemu-img"), requires("qemu-nbd"), requires("nbdkit")]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
Served: TypeAlias = Callable[[Path], AbstractContextManager[str]]


@contextmanager
def served(folder: Path, *command: Argument) -> Iterator[str]:
    """The URI of what a server at the socket `nbd` serves."""
    with spawn(*command) as server:
        wait_for_socket(folder / "nbd", server)
        yield f"nbd+unix:///?socket={folder / 'nbd'}"


@contextmanager
def qcow2(folder: Path, size: int = SIZE) -> Iterator[str]:
    """Behind qemu-nbd, full of something else."""
    image = folder / "target.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 0x77 0 {size}", image)
    with served(
        folder, "qemu-nbd", "--persistent", "--format=qcow2", f"--socket={folder / 'nbd'}", image
    ) as uri:
        yield uri


@contextmanager
def modest(folder: Path) -> Iterator[str]:
    """Behind nbdkit, which is told to know neither holes nor zeroing, and to take little at a time."""
    limits = ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    with served(
        folder, "nbdkit", "--foreground", "--unix", folder / "nbd", "--no-sr",
        "--filter=nozero", "--filter=blocksize-policy", "memory", str(SIZE), "blocksize-error-policy=error", *limits,
    ) as uri:  # fmt: skip
        run("qemu-io", "-f", "raw", "-c", f"write -P 0x77 0 {SIZE}", uri)
        yield uri


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE, 16)
    made.write(b"\x11" * MIB, MIB)
    made.write(b"\x22" * 700 * KIB, 5 * MIB + 100)
    made.backup()
    made.zero(MIB + 10 * KIB, 300 * KIB)
    made.write(b"end", SIZE - 3)
    made.backup()
    yield made
    made.close()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("target", [qcow2, modest])
def test_what_another_server_has_is_restored_to_the_byte(
    disk: BackedUpDisk, tmp_path: Path, target: Served, in_place: bool
) -> None:
    with target(tmp_path) as uri:
        result = restore(tmp_path / "backups", NAME, uri, in_place=in_place)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, disk.image)
        again = restore(tmp_path / "backups", NAME, uri, in_place=True)
    assert result.bytes_written + result.bytes_zeroed == SIZE
    assert (again.bytes_written, again.bytes_zeroed) == (0, 0)


def test_a_larger_export_is_alike_to_qemu_which_takes_what_is_missing_for_zeroes(
    disk: BackedUpDisk, tmp_path: Path
) -> None:
    with qcow2(tmp_path, SIZE + 3 * MIB) as uri:
        result = restore(tmp_path / "backups", NAME, uri, larger=True)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, disk.image)
    assert result.bytes_behind == 3 * MIB


def test_zeroes_take_no_space_in_the_qcow2_image_behind_a_server(disk: BackedUpDisk, tmp_path: Path) -> None:
    with qcow2(tmp_path) as uri:
        restore(tmp_path / "backups", NAME, uri)
    run("qemu-img", "compare", tmp_path / "target.qcow2", disk.image)
    told = json.loads(run("qemu-img", "map", "--output=json", tmp_path / "target.qcow2").stdout)
    assert sum(part["length"] for part in told if part["data"]) <= 3 * MIB
