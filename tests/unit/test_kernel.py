"""What /sys says of block devices, asked of a little /sys of our own: partitions, volumes, loop devices."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmdbitmap.interfaces import DeviceTrace
from lmdbitmap.system import kernel
from tests.helpers.support import spawn

SDA, SDA1, SDA2, VOLUME, LOOP = (os.makedev(*pair) for pair in ((8, 0), (8, 1), (8, 2), (253, 0), (7, 0)))


@dataclass
class Sys:
    """`/sys/dev/block` and the folders that it leads to."""

    folder: Path

    @property
    def devices(self) -> str:
        return str(self.folder / "by-number")

    def add(self, number: int, place: str, *, written: int = 0, discarded: int = 0, **files: str) -> Path:
        node = self.folder / "devices" / place
        node.mkdir(parents=True)
        name = f"{os.major(number)}:{os.minor(number)}"
        counts = [1, 2, 3, 4, 5, 6, written, 8, 9, 10, 11, 12, 13, discarded, 15, 16, 17]
        self.write(node, "stat", " ".join(map(str, counts)))
        self.write(node, "dev", name)
        for path, text in files.items():
            self.write(node, path.replace("__", "/"), text)
        (self.folder / "by-number").mkdir(exist_ok=True)
        (self.folder / "by-number" / name).symlink_to(node)
        return node

    def add_disk(
        self, number: int, place: str, *, iostats: str = "1", written: int = 0, **files: str
    ) -> Path:
        node = self.add(number, place, written=written, queue__iostats=iostats, diskseq="40")
        for path, text in files.items():
            self.write(node, path.replace("__", "/"), text)
        return node

    @staticmethod
    def write(node: Path, path: str, text: str) -> None:
        (node / path).parent.mkdir(exist_ok=True)
        (node / path).write_text(f"{text}\n")

    def trace(self, number: int) -> DeviceTrace | None:
        return kernel.device_trace(number, self.devices)

    def sectors(self, number: int) -> int:
        trace = self.trace(number)
        assert trace is not None
        return trace.sectors_written


@pytest.fixture
def sys_block(tmp_path: Path) -> Sys:
    return Sys(tmp_path)


def test_boot_is_known() -> None:
    assert len(kernel.boot_id()) == 36
    assert 0 < kernel.boot_time_ns() < time.time_ns()


def test_the_boot_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = kernel.boot_id()
    monkeypatch.setattr(kernel, "_line", None)
    assert kernel.boot_id() == known


# --- written? ---


def test_disk_is_told_by_its_sequence_its_counts_and_its_label(sys_block: Sys) -> None:
    node = sys_block.add_disk(SDA, "sda", written=1000, device__wwid="naa.5000")
    assert sys_block.trace(SDA) == DeviceTrace(kernel.boot_id(), 40, 1000, "naa.5000")
    counts = (node / "stat").read_text().split()
    sys_block.write(node, "stat", " ".join([*counts[:13], "24", *counts[14:]]))
    assert sys_block.sectors(SDA) == 1024


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ({}, ""),
        ({"dm__uuid": "LVM-abc", "serial": "s"}, "LVM-abc"),
        ({"serial": "", "loop__backing_file": "/srv/a b.img", "loop__offset": "0"}, "/srv/a b.img"),
        ({"loop__backing_file": "/srv/a.img", "loop__offset": "512"}, "/srv/a.img from byte 512"),
    ],
)
def test_label_is_the_first_that_there_is(sys_block: Sys, files: dict[str, str], label: str) -> None:
    sys_block.add_disk(SDA, "sda", **files)  # type: ignore[arg-type]
    trace = sys_block.trace(SDA)
    assert trace is not None
    assert trace.label == label


def test_partition_counts_what_may_have_hit_it(sys_block: Sys) -> None:
    """Through its own node 100, through the whole disk's 1000 - 100 - 700."""
    sys_block.add_disk(SDA, "sda", written=1000, serial="s1")
    sys_block.add(SDA1, "sda/sda1", written=100, partition="1", start="2048")
    sys_block.add(SDA2, "sda/sda2", written=700, partition="2", start="4096")
    assert sys_block.trace(SDA1) == DeviceTrace(kernel.boot_id(), 40, 300, "s1 from sector 2048")
    assert sys_block.sectors(SDA2) == 900
    assert sys_block.sectors(SDA) == 1000


@pytest.mark.parametrize("lack", ["queue/iostats", "diskseq", "stat"])
def test_kernel_that_does_not_say_enough_says_nothing(sys_block: Sys, lack: str) -> None:
    node = sys_block.add_disk(SDA, "sda")
    assert sys_block.trace(SDA) is not None
    (node / lack).write_text("" if lack != "diskseq" else "many")
    assert sys_block.trace(SDA) is None
    (node / lack).unlink()
    assert sys_block.trace(SDA) is None


def test_kernel_that_does_not_count_says_nothing(sys_block: Sys) -> None:
    sys_block.add_disk(SDA, "sda", iostats="0")
    assert sys_block.trace(SDA) is None
    assert sys_block.trace(VOLUME) is None


# --- what lies on what ---


def test_store_is_kept_in_every_image_beneath_it(sys_block: Sys, tmp_path: Path) -> None:
    """As if this folder lay on a volume, on a partition, on a loop device, on a file (in this folder: it may)."""
    image, other = tmp_path / "image.raw", tmp_path / "other.raw"
    image.write_bytes(b"")
    other.write_bytes(b"")
    volume = sys_block.add_disk(tmp_path.stat().st_dev, "dm-0")
    assert not kernel.is_kept_in(str(tmp_path), str(image), sys_block.devices)
    sys_block.add_disk(LOOP, "loop0", loop__backing_file=str(image))
    partition = sys_block.add(SDA1, "loop0/loop0p1", partition="1", start="8")
    (volume / "slaves").mkdir()
    (volume / "slaves" / "loop0p1").symlink_to(partition)
    assert kernel.is_kept_in(str(tmp_path), str(image), sys_block.devices)
    assert not kernel.is_kept_in(str(tmp_path), str(other), sys_block.devices)


@pytest.mark.parametrize("name", [b"image.raw ", b"\xffimage.raw", b"image\n"])
def test_file_behind_a_loop_device_may_have_any_name(sys_block: Sys, tmp_path: Path, name: bytes) -> None:
    image = tmp_path / os.fsdecode(name)
    image.write_bytes(b"")
    node = sys_block.add_disk(tmp_path.stat().st_dev, "loop0")
    (node / "loop").mkdir()
    (node / "loop" / "backing_file").write_bytes(os.fsencode(image) + b"\n")
    assert kernel.is_kept_in(str(tmp_path), str(image), sys_block.devices)


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("My Disk", rb"My\040Disk"),
        ("My\u00a0Disk", "My\u00a0Disk".encode()),
        ("My\rDisk", b"My\rDisk"),
        ("My\\040Disk", rb"My\134040Disk"),
        (os.fsdecode(b"My\xffDisk"), b"My\xffDisk"),
    ],
)
def test_mount_is_found_whatever_its_name(tmp_path: Path, folder: str, told: bytes) -> None:
    (tmp_path / folder).mkdir()
    point = os.fsencode(tmp_path) + b"/" + told
    table = tmp_path / "mountinfo"
    table.write_bytes(
        b"22 1 8:1 / / rw,relatime - btrfs /dev/sda1 rw\n"
        b"30 22 0:50 / " + point + rb" rw shared:1 - btrfs /dev/a\043b rw" + b"\n"
        b"31 22 0:51 / /other rw -  btrfs  rw\n"
    )
    assert kernel._mount_source(str(tmp_path / folder), str(table)) == "/dev/a#b"
    assert kernel._mount_source("/", str(table)) == "/dev/sda1"


def test_loop_device_whose_file_is_gone_hides_nothing_else(sys_block: Sys, tmp_path: Path) -> None:
    gone = f"{tmp_path}/gone.raw (deleted)"
    sys_block.add_disk(tmp_path.stat().st_dev, "loop0", loop__backing_file=gone)
    assert not kernel.is_kept_in(str(tmp_path), str(tmp_path), sys_block.devices)


def test_image_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kernel.is_kept_in(str(tmp_path), str(tmp_path / "none"))


def test_our_own_folder_lies_on_no_file_in_it(tmp_path: Path) -> None:
    """Whatever the file system of this machine is: it is found, and the walk ends."""
    image = tmp_path / "image.raw"
    image.write_bytes(b"")
    assert not kernel.is_kept_in(str(tmp_path), str(image))


_HOLDER = """
import fcntl, sys, threading
held = open(sys.argv[1])
fcntl.flock(held, getattr(fcntl, sys.argv[2]))
print("held", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("lock", "kind", "other"), [("LOCK_EX", "WRITE", "READ"), ("LOCK_SH", "READ", "WRITE")]
)
def test_whoever_holds_a_lock_is_told(tmp_path: Path, lock: str, kind: str, other: str) -> None:
    path = tmp_path / "lock"
    path.touch()
    with spawn(sys.executable, "-c", _HOLDER, path, lock) as child:
        child.wait_for_line("held")
        assert kernel.flock_pids(path.stat(), kind) == [str(child.pid)]
        assert kernel.flock_pids(path.stat(), other) == []
        assert kernel.flock_pids(tmp_path.stat(), kind) == []


def test_we_are_nobody_else(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        assert kernel.flock_pids(os.fstat(ours.fileno()), "WRITE") == []
