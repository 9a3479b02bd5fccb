"""The programs of a newer Debian against our server: what they write, read, map and measure is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.server.server import Server
from tests.conftest import RawImage
from tests.helpers.newer import newer, requires_newer
from tests.helpers.support import run

MIB = 1 << 20
SIZE = 64 * MIB + 512

pytestmark = requires_newer


class Place:
    """A served disk: its image and its URI."""

    def __init__(self, image: Path, server: Server) -> None:
        self.image = image
        self.server = server
        [self.uri] = server.uris


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


def content(length: int) -> bytes:
    return (bytes(range(1, 252)) * (length // 251 + 1))[:length]


def answer(program: str, *words: str | Path) -> Any:
    return json.loads(run(newer(program), *words).stdout)


def test_newer_qemu_img_reads_size_and_map_and_copies_out_and_in(
    place: Place, raw_image: RawImage, tmp_path: Path
) -> None:
    info = answer("qemu-img", "info", "--output=json", place.uri)
    assert (info["virtual-size"], info["format"]) == (SIZE, "raw")
    extents = answer("qemu-img", "map", "--output=json", place.uri)
    assert [(e["start"], e["length"], e["data"], e["zero"]) for e in extents] == [
        (0, MIB, False, True),
        (MIB, 3 * MIB, True, False),
        (4 * MIB, SIZE - 4 * MIB, False, True),
    ]
    run(newer("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", place.uri, tmp_path / "copy.qcow2")
    assert "identical" in run(newer("qemu-img"), "compare", tmp_path / "copy.qcow2", place.uri).stdout
    source = raw_image(SIZE, [(0, b"\1" * 70_000), (40 * MIB, b"\2" * 4096)], name="source.raw")
    run(newer("qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", source, place.uri)
    assert place.image.read_bytes() == source.read_bytes()
    assert place.image.stat().st_blocks * 512 < MIB


def test_newer_qemu_io_reads_back_patterns_written_in_every_way(place: Place) -> None:
    commands = [
        "write -P 0x11 0 1M", "write -f -P 0x22 5M 64k", "write -P 0x33 513 1", "aio_write -P 0x44 8M 8M",
        "aio_flush", "write -z 10M 1M", "write -z -u 12M 1M", "write -z -f 14M 64k", "discard 1M 1M", "flush",
        "read -P 0x11 514 100k", "read -P 0x33 513 1", "read -P 0x22 5M 64k", "read -P 0x44 8M 2M",
        "read -P 0 10M 1M", "read -P 0 12M 1M", "read -P 0 14M 64k", "read -P 0x44 15M 1M",
    ]  # fmt: skip
    said = run(newer("qemu-io"), "-f", "raw", *[w for c in commands for w in ("-c", c)], place.uri).stdout
    assert said.count("read ") == 8
    assert "failed" not in said
    assert place.image.read_bytes()[512:515] == b"\x11\x33\x11"


def test_newer_nbdinfo_lists_and_maps(place: Place) -> None:
    [export] = answer("nbdinfo", "--list", "--json", place.uri)["exports"]
    assert (export["export-name"], export["export-size"]) == ("disk", SIZE)
    assert export["contexts"] == ["base:allocation"]
    extents = answer("nbdinfo", "--map", "--json", place.uri)
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, MIB, 3),
        (MIB, 3 * MIB, 0),
        (4 * MIB, SIZE - 4 * MIB, 3),
    ]


@pytest.mark.parametrize(
    "options", [("--synchronous",), ("--connections=4", "--threads=4", "--request-size=2097152")]
)
def test_newer_nbdcopy_copies_out_and_in_over_many_connections(
    place: Place, raw_image: RawImage, tmp_path: Path, options: tuple[str, ...]
) -> None:
    run(newer("nbdcopy"), *options, place.uri, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == place.image.read_bytes()
    source = raw_image(SIZE, [(7 * MIB, content(9 * MIB))], name="source.raw")
    run(newer("nbdcopy"), "--flush", *options, source, place.uri)
    assert place.image.read_bytes() == source.read_bytes()
    if options[0] == "--connections=4":
        assert place.server.counters.connections == 8
