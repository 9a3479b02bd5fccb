"""The clients that people use, against our server: what they write, read, map and measure is right."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.plain import PlainDisk, PlainLane
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.nbd.server.server import Server
from tests.conftest import RawImage
from tests.helpers.support import PATIENCE_SECONDS, requires, run

MIB = 1 << 20
SIZE = 64 * MIB + 512
"""No multiple of a page or of any granularity."""

pytestmark = [requires(tool) for tool in ("qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "fio")]


class Place:
    """A served disk: its image and its URI."""

    def __init__(self, image: Path, server: Server) -> None:
        self.image = image
        self.server = server
        [self.uri] = server.uris


def content(length: int) -> bytes:
    return (bytes(range(1, 252)) * (length // 251 + 1))[:length]


@pytest.fixture
def place(raw_image: RawImage, tmp_path: Path) -> Iterator[Place]:
    """3 MiB of data at 1 MiB, and nothing else, on a sparse image."""
    image = raw_image(SIZE, [(MIB, content(3 * MIB))])
    with FileDevice.open(image) as device:
        server = Server({"disk": PlainDisk(device)})
        server.listen_unix(str(tmp_path / "nbd.sock"))
        server.start()
        yield Place(image, server)
        assert server.stop()


def answer(*command: str | Path) -> Any:
    return json.loads(run(*command).stdout)


def qemu_io(place: Place, *commands: str, options: tuple[str, ...] = ()) -> str:
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", *options, *words, place.uri)
    assert "failed" not in said.stdout + said.stderr, said.stdout + said.stderr
    return said.stdout


# --- qemu-img ---


def test_qemu_img_reads_the_size(place: Place) -> None:
    info = answer("qemu-img", "info", "--output=json", place.uri)
    assert (info["virtual-size"], info["format"]) == (SIZE, "raw")


def test_qemu_img_converts_out_and_compares_equal(place: Place, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", place.uri, tmp_path / "copy.qcow2")
    assert "identical" in run("qemu-img", "compare", tmp_path / "copy.qcow2", place.uri).stdout
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", place.image, place.uri).stdout


def test_qemu_img_converts_in_and_leaves_holes_as_holes(place: Place, raw_image: RawImage) -> None:
    source = raw_image(SIZE, [(0, b"\1" * 70_000), (40 * MIB, b"\2" * 4096)], name="source.raw")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", source, place.uri)
    assert place.image.read_bytes() == source.read_bytes()
    assert place.image.stat().st_blocks * 512 < MIB


def test_qemu_img_maps_data_and_holes(place: Place) -> None:
    extents = answer("qemu-img", "map", "--output=json", place.uri)
    assert [(e["start"], e["length"], e["data"], e["zero"]) for e in extents] == [
        (0, MIB, False, True),
        (MIB, 3 * MIB, True, False),
        (4 * MIB, SIZE - 4 * MIB, False, True),
    ]


# --- qemu-io ---


def test_qemu_io_reads_back_patterns_written_in_every_way(place: Place) -> None:
    said = qemu_io(
        place,
        "write -P 0x11 0 1M",
        "write -f -P 0x22 5M 64k",
        "write -P 0x33 513 1",
        "aio_write -P 0x44 8M 8M",
        "aio_flush",
        "write -z 10M 1M",
        "write -z -u 12M 1M",
        "write -z -f 14M 64k",
        "discard 1M 1M",
        "flush",
        "read -P 0x11 514 100k",
        "read -P 0x33 513 1",
        "read -P 0x22 5M 64k",
        "read -P 0x44 8M 2M",
        "read -P 0 10M 1M",
        "read -P 0 12M 1M",
        "read -P 0 14M 64k",
        "read -P 0x44 15M 1M",
    )
    assert said.count("read ") == 8
    assert "Pattern verification failed" not in said
    assert place.image.read_bytes()[512:515] == b"\x11\x33\x11"


def test_qemu_io_finds_discarded_ranges_unallocated(place: Place) -> None:
    qemu_io(place, "discard 1M 2M", "write -z -u 3M 512k", "write -z 3584k 256k", options=("-d", "unmap"))
    extents = answer("qemu-img", "map", "--output=json", place.uri)
    data = [(e["start"], e["length"]) for e in extents if e["data"]]
    assert (3 * MIB + 512 * 1024 + 256 * 1024, 256 * 1024) in data
    assert not any(start < 3 * MIB + 512 * 1024 for start, _ in data)


def test_qemu_io_reaches_the_last_byte_and_nothing_behind_it(place: Place) -> None:
    qemu_io(place, f"write -P 0x55 {SIZE - 512} 512", f"read -P 0x55 {SIZE - 1} 1")
    beyond = run("qemu-io", "-f", "raw", "-c", f"write {SIZE - 512} 1024", place.uri, check=False)
    assert "failed" in beyond.stdout + beyond.stderr
    assert place.image.stat().st_size == SIZE


def test_a_read_only_disk_is_known_as_such(raw_image: RawImage, tmp_path: Path) -> None:
    with FileDevice.open(raw_image(SIZE, [(0, b"keep")]), read_only=True) as device:
        server = Server({"disk": PlainDisk(device)})
        server.listen_unix(str(tmp_path / "nbd.sock"))
        server.start()
        refused = run("qemu-io", "-f", "raw", "-c", "write 0 512", server.uris[0], check=False)
        assert refused.returncode != 0
        qemu_img = run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", server.uris[0])
        assert "512/512" in qemu_img.stdout
        [export] = answer("nbdinfo", "--json", server.uris[0])["exports"]
        assert (export["is_read_only"], export["can_trim"], export["can_zero"]) == (True, False, False)
        assert server.stop()


# --- libnbd ---


def test_nbdinfo_lists_what_the_server_can(place: Place) -> None:
    info = answer("nbdinfo", "--json", place.uri)
    assert (info["protocol"], info["structured"]) == ("newstyle-fixed", True)
    [export] = info["exports"]
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation"]
    able = [key for key, value in export.items() if key.startswith("can_") and value is True]
    assert set(able) == {
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    }
    sizes = [export[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 * MIB]


def test_nbdinfo_lists_every_disk_of_a_server(raw_image: RawImage, tmp_path: Path) -> None:
    names = ["sda", "sdb", "name with spaces"]
    devices = [FileDevice.open(raw_image(512 * (i + 1), name=f"{i}.raw")) for i in range(len(names))]
    server = Server({name: PlainDisk(device) for name, device in zip(names, devices, strict=True)})
    server.listen_unix(str(tmp_path / "nbd.sock"))
    server.start()
    exports = answer("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={tmp_path}/nbd.sock")["exports"]
    assert [(export["export-name"], export["export-size"]) for export in exports] == [
        (name, 512 * (i + 1)) for i, name in enumerate(names)
    ]
    assert server.stop()
    for device in devices:
        device.close()


def test_nbdinfo_maps_the_whole_disk_without_a_gap(place: Place) -> None:
    extents = answer("nbdinfo", "--map", "--json", place.uri)
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, MIB, 3),
        (MIB, 3 * MIB, 0),
        (4 * MIB, SIZE - 4 * MIB, 3),
    ]


@pytest.mark.parametrize(
    "options", [(), ("--synchronous",), ("--connections=4", "--threads=4", "--request-size=2097152")]
)
def test_nbdcopy_copies_out_and_in_over_many_connections(
    place: Place, raw_image: RawImage, tmp_path: Path, options: tuple[str, ...]
) -> None:
    run("nbdcopy", *options, place.uri, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == place.image.read_bytes()
    source = raw_image(SIZE, [(7 * MIB, content(9 * MIB))], name="source.raw")
    run("nbdcopy", "--flush", *options, source, place.uri)
    assert place.image.read_bytes() == source.read_bytes()
    if options and options[0] == "--connections=4":
        assert place.server.counters.connections == 8


# --- fio ---


@pytest.mark.parametrize(("block", "depth"), [("4k", 32), ("64k", 16), ("1m", 4), ("4k", 1)])
def test_fio_verifies_what_it_wrote(place: Place, tmp_path: Path, block: str, depth: int) -> None:
    """Every block once, in random order, its checksum verified afterwards; FUA and flushes in between."""
    said = run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={place.uri}",
        "--rw=randwrite",
        f"--bs={block}",
        f"--iodepth={depth}",
        "--size=16m",
        "--fsync=200",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--output-format=json",
        cwd=tmp_path,
    ).stdout
    [job] = json.loads(said[said.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["write"]["io_bytes"] == job["read"]["io_bytes"] == 16 * MIB


class StoppedDisk(PlainDisk):
    """Its first discard lasts until `stopping` is set."""

    def __init__(self, device: FileDevice) -> None:
        super().__init__(device)
        self.discards = threading.Event()
        self.stopping = threading.Event()

    def lane(self) -> PlainLane:
        return StoppedLane(self, self._device)


class StoppedLane(PlainLane):
    def __init__(self, disk: StoppedDisk, device: BlockDevice) -> None:
        super().__init__(device)
        self._disk = disk

    def discard(self, offset: int, length: int) -> None:
        self._disk.discards.set()
        assert self._disk.stopping.wait(PATIENCE_SECONDS)
        super().discard(offset, length)


def test_a_guest_whose_discard_a_restart_cuts_short_notices_nothing(
    raw_image: RawImage, tmp_path: Path
) -> None:
    """QEMU takes any answer for the outcome, also that the server shuts down, and asks again where there is none."""
    image = raw_image(2048 * MIB, [(MIB, b"x"), (1536 * MIB, b"x")])
    path = str(tmp_path / "nbd.sock")
    qemu = (
        f"driver=nbd,server.type=unix,server.path={path},export=disk,reconnect-delay={PATIENCE_SECONDS:.0f}"
    )
    with FileDevice.open(image) as device, ThreadPoolExecutor() as pool:
        disk = StoppedDisk(device)
        with served(disk, path) as server:
            guest = pool.submit(
                run, "qemu-io", "-d", "unmap", "--image-opts", qemu, "-c", f"discard 0 {2048 * MIB - 512}"
            )
            assert disk.discards.wait(PATIENCE_SECONDS)
            stopping = pool.submit(server.stop)
            [visit] = server._places.visits()
            while not visit._leaving:
                time.sleep(0.001)
            disk.stopping.set()
            assert stopping.result(PATIENCE_SECONDS)
        with served(disk, path):
            said = guest.result(2 * PATIENCE_SECONDS)
        assert "failed" not in said.stdout + said.stderr, said.stdout + said.stderr
        assert (device.pread(1, MIB), device.pread(1, 1536 * MIB)) == (b"\0", b"\0")


@contextlib.contextmanager
def served(disk: PlainDisk, path: str) -> Iterator[Server]:
    server = Server({"disk": disk})
    server.listen_unix(path)
    server.start()
    yield server
    assert server.stop()
