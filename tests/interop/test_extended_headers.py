"""Lengths of 64 bits, as the programs of a newer Debian ask for them: of a tracked disk of more than 4 GiB.

And as we ask a newer qemu-nbd for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lmdbitmap.filter import Filter
from lmdbitmap.interfaces import Allocation
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.server.traffic import BLOCK_STATUS, ZEROES
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from tests.helpers.newer import newer, requires_newer
from tests.helpers.support import make_raw_image, requires, run, spawn, wait_for_socket
from tests.helpers.tracked import NAME, TrackedDisk

MIB, GIB = 1 << 20, 1 << 30
SIZE = 24 * GIB + 512
SPOTS = [(5 * GIB, b"\1" * MIB), (11 * GIB + 4096, b"\2" * 4096), (SIZE - 512, b"\3" * 512)]
"""All the data there is."""
DIRTY = "qemu:dirty-bitmap:start"

pytestmark = [requires_newer, requires("nbdinfo")]


class House(NamedTuple):
    """A served disk with data at its spots, clean since checkpoint `start`."""

    disk: Filter
    server: Server

    @property
    def uri(self) -> str:
        return self.server.uris[0]

    def requests(self, kind: int) -> int:
        """So many of a kind were answered."""
        return self.server.traffic(NAME)[1].counts[kind]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with closing(TrackedDisk(tmp_path, SIZE, 16)) as tracked, tracked.attach() as disk:
        for offset, data in SPOTS:
            disk.pwrite(data, offset)
        disk.checkpoint("start")
        server = Server({NAME: disk})
        server.listen_unix(str(tmp_path / "nbd.sock"))
        server.start()
        yield House(disk, server)
        assert server.stop()


def nbdsh(house: House, script: str) -> Any:
    """What it prints, with `h` connected and both contexts selected; it must end well."""
    connect = f"for name in ('base:allocation', '{DIRTY}'): h.add_meta_context(name)\nh.connect_uri('{house.uri}')\n"
    said = run(newer("nbdsh"), "-c", "import json\n" + connect + script).stdout
    return json.loads(said)


def nbdinfo_map(house: House, name: str) -> list[tuple[int, int, int]]:
    told = json.loads(run(newer("nbdinfo"), f"--map={name}", "--json", house.uri).stdout)
    return [(entry["offset"], entry["length"], entry["type"]) for entry in told]


def dirty(house: House) -> list[tuple[int, int]]:
    return [
        (extent.offset, extent.length)
        for extent in house.disk.changes(since="start").extents()
        if extent.dirty
    ]


# --- libnbd ---


def test_nbdsh_zeroes_and_trims_8_gib_in_one_request_each(house: House) -> None:
    negotiated = nbdsh(
        house,
        f"""
h.zero({8 * GIB}, {4 * GIB}, nbd.CMD_FLAG_FUA)
h.trim({8 * GIB}, {13 * GIB})
print(json.dumps(h.get_extended_headers_negotiated()))
""",
    )
    assert negotiated is True
    assert house.requests(ZEROES) == 2
    assert dirty(house) == [(4 * GIB, 8 * GIB), (13 * GIB, 8 * GIB)]
    assert [house.disk.pread(len(data), offset) for offset, data in SPOTS] == [
        bytes(MIB),
        bytes(4096),
        b"\3" * 512,
    ]


def test_nbdsh_is_told_of_extents_longer_than_4_gib(house: House) -> None:
    house.disk.pwrite(b"x", 20 * GIB)
    told = nbdsh(
        house,
        f"""
found = {{}}
def note(context, offset, extents, error):
    found[context] = [list(extent) for extent in extents]
h.block_status_64({SIZE}, 0, note)
print(json.dumps(found))
""",
    )
    assert house.requests(BLOCK_STATUS) == 1
    assert told[DIRTY] == [[20 * GIB, 0], [65536, 1], [SIZE - 20 * GIB - 65536, 0]]
    assert told["base:allocation"][0] == [5 * GIB, 3]
    assert sum(length for length, _ in told["base:allocation"]) == SIZE


def test_nbdinfo_maps_allocation_and_dirt_as_it_does_without_extended_headers(house: House) -> None:
    house.disk.pwrite(b"x", 20 * GIB)
    assert nbdinfo_map(house, DIRTY) == [
        (0, 20 * GIB, 0),
        (20 * GIB, 65536, 1),
        (20 * GIB + 65536, SIZE - 20 * GIB - 65536, 0),
    ]
    allocation = nbdinfo_map(house, "base:allocation")
    assert [kind for _, _, kind in allocation] == [3, 0, 3, 0, 3, 0, 3, 0]
    assert max(length for _, length, _ in allocation) > 8 * GIB
    older = json.loads(run("nbdinfo", "--map=base:allocation", "--json", house.uri).stdout)
    assert [(e["offset"], e["length"], e["type"]) for e in older] == allocation
    [export] = json.loads(run(newer("nbdinfo"), "--json", house.uri).stdout)["exports"]
    assert DIRTY in export["contexts"]


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_copies_a_sparse_disk_out_and_in(house: House, tmp_path: Path, connections: int) -> None:
    copy, options = tmp_path / "copy.raw", [f"--connections={connections}"]
    run(newer("nbdcopy"), *options, house.uri, copy)
    assert_spots(copy)
    source = make_raw_image(tmp_path / "source.raw", SIZE, [(17 * GIB, b"\7" * 70_000), (3 * GIB, b"\6")])
    run(newer("nbdcopy"), "--flush", *options, source, house.uri)
    assert [house.disk.pread(len(data), offset) for offset, data in SPOTS] == [
        bytes(len(data)) for _, data in SPOTS
    ]
    assert house.disk.pread(70_001, 17 * GIB) == b"\7" * 70_000 + b"\0"
    assert house.disk.pread(2, 3 * GIB) == b"\6\0"
    assert dirty(house) == [(0, SIZE)]


def assert_spots(copy: Path) -> None:
    """It holds what the disk does, and no more than that takes space."""
    assert copy.stat().st_size == SIZE
    assert copy.stat().st_blocks * 512 <= 2 * MIB
    with copy.open("rb") as file:
        for offset, data in SPOTS:
            file.seek(offset)
            assert file.read(len(data)) == data


# --- QEMU ---


def test_qemu_io_zeroes_8_gib_in_one_request_and_discards(house: House) -> None:
    """Its own limit of a discard is 2 GiB."""
    commands = ["discard 4G 2047M", "write -z -u -n 11G 8G", "read -P 0 11G 1M", "read -P 0 5G 1M"]
    words = [word for command in commands for word in ("-c", command)]
    said = run(newer("qemu-io"), "-f", "raw", "-d", "unmap", *words, house.uri).stdout
    assert "failed" not in said
    assert house.requests(ZEROES) == 2
    assert dirty(house) == [(4 * GIB, 2047 * MIB), (11 * GIB, 8 * GIB)]


def test_qemu_img_maps_converts_and_compares(house: House, tmp_path: Path) -> None:
    house.disk.pwrite(b"x" * 512, 20 * GIB)
    options = (
        f"driver=nbd,export={NAME},server.type=unix,server.path={tmp_path}/nbd.sock,x-dirty-bitmap={DIRTY}"
    )
    told = json.loads(run(newer("qemu-img"), "map", "--output=json", "--image-opts", options).stdout)
    assert [(e["start"], e["length"], e["data"]) for e in told] == [
        (0, 20 * GIB, True),
        (20 * GIB, 65536, False),
        (20 * GIB + 65536, SIZE - 20 * GIB - 65536, True),
    ]
    run(newer("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", house.uri, tmp_path / "copy.qcow2")
    compared = run(newer("qemu-img"), "compare", tmp_path / "copy.qcow2", house.uri).stdout
    assert "identical" in compared
    assert (tmp_path / "copy.qcow2").stat().st_size < 8 * MIB


# --- the other end: our client, and a newer qemu-nbd ---


@pytest.fixture
def far(tmp_path: Path) -> Iterator[str]:
    """The URI of a qcow2 image with data at 11 GiB."""
    image, path = tmp_path / "far.qcow2", tmp_path / "far.sock"
    run(newer("qemu-img"), "create", "-f", "qcow2", image, str(SIZE))
    words = ("-f", "qcow2", "-x", "disk", "-k", path, "--shared=4", "--persistent", "--discard=unmap", image)
    with spawn(newer("qemu-nbd"), *words) as server:
        wait_for_socket(path, server)
        uri = f"nbd+unix:///disk?socket={path}"
        with NbdDevice.open(uri) as device:
            device.pwrite(b"x" * MIB, 11 * GIB)
        yield uri


def test_our_client_asks_a_newer_qemu_nbd_for_the_allocation_of_a_whole_disk_at_once(far: str) -> None:
    with NbdDevice.open(far) as device:
        assert device.export.extended
        assert list(device.allocation(0, SIZE)) == [
            Allocation(11 * GIB, hole=True, zero=True),
            Allocation(MIB, hole=False, zero=False),
            Allocation(SIZE - 11 * GIB - MIB, hole=True, zero=True),
        ]
        device.write_zeroes(11 * GIB + 4096, 9 * GIB)
        device.discard(0, 10 * GIB)
        device.flush()
        assert device.pread(8192, 11 * GIB) == b"x" * 4096 + bytes(4096)


def test_a_far_disk_of_a_newer_qemu_nbd_is_tracked_and_read_back(far: str, tmp_path: Path) -> None:
    with closing(Store.create(str(tmp_path / "store"))) as store:
        session.add(store, NAME, far, granularity_bits=16)
        with Filter.attach(store, NAME, background=False) as disk:
            disk.checkpoint("start")
            disk.write_zeroes(8 * GIB, 8 * GIB)
            disk.pwrite(b"y" * 4096, 20 * GIB)
            assert [(e.offset, e.length) for e in disk.changes(since="start").extents() if e.dirty] == [
                (8 * GIB, 8 * GIB),
                (20 * GIB, 65536),
            ]
    with NbdDevice.open(far, read_only=True) as device:
        assert device.pread(MIB, 11 * GIB) == bytes(MIB)
        assert device.pread(4096, 20 * GIB) == b"y" * 4096
