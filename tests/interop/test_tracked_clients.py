"""The clients that people use, against a tracked disk: each is served, and every write of theirs is named."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.server.server import Server
from tests.conftest import RawImage
from tests.helpers.support import requires, run, spawn, wait_for_socket
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder, trust_of

MIB = 1 << 20
BLOCK = 1 << 12
SIZE = 64 * MIB + 1024
DEBIAN_PYTHON = "/usr/bin/python3"
"""For which Debian's libnbd is built, and no other."""

pytestmark = [
    requires(tool)
    for tool in ("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "nbdsh", "nbd-client", "fio")
]


class House(NamedTuple):
    tracked: TrackedDisk
    disk: Filter
    server: Server
    before: bytes

    @property
    def uri(self) -> str:
        return self.server.uris[0]

    @property
    def socket(self) -> str:
        return self.uri.partition("socket=")[2]

    def changed(self) -> set[int]:
        """The blocks in which the image differs from what it was."""
        now = self.tracked.image.read_bytes()
        return {
            at // BLOCK
            for at in range(0, SIZE, BLOCK)
            if now[at : at + BLOCK] != self.before[at : at + BLOCK]
        }

    def named(self) -> set[int]:
        answer = self.disk.changes(since="start")
        assert trust_of(answer) is Trust.EXACT
        return blocks_of(answer)


@pytest.fixture
def house() -> Iterator[House]:
    """A disk with data here and there, clean since checkpoint `start`."""
    with quick_folder() as folder, closing(TrackedDisk(folder, SIZE, 12)) as tracked:
        chosen = random.Random(7)
        with tracked.attach() as disk:
            for _ in range(50):
                disk.pwrite(chosen.randbytes(20_000), chosen.randrange(SIZE - 20_000))
            disk.checkpoint("start")
            server = Server({NAME: disk})
            server.listen_unix(str(folder / "nbd.sock"))
            server.start()
            yield House(tracked, disk, server, tracked.image.read_bytes())
            assert server.stop()


Writer: TypeAlias = Callable[[House, Path], object]


def by_qemu_io(house: House, source: Path) -> None:
    said = [
        "write -P 1 5M 70k",
        "write -z 9M 100k",
        "discard 11M 1M",
        "aio_write -P 3 20M 3M",
        "aio_flush",
        "flush",
    ]
    run("qemu-io", "-f", "raw", *(word for one in said for word in ("-c", one)), house.uri)


def by_qemu_img(house: House, source: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, house.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, house.uri)


def by_nbdcopy(house: House, source: Path) -> None:
    run(
        "nbdcopy",
        "--connections=8",
        "--threads=4",
        "--requests=16",
        "--destination-is-zero",
        source,
        house.uri,
    )


def by_nbdsh(house: House, source: Path) -> None:
    script = (
        "h.pwrite(b'sh' * 3000, 12345); h.zero(70000, 1 << 20); h.trim(1 << 20, 8 << 20); h.flush();"
        "h.pwrite(b'f' * 512, 30 << 20, nbd.CMD_FLAG_FUA); assert h.pread(4, 12345) == b'shsh'"
    )
    run(DEBIAN_PYTHON, "-m", "nbd", "-u", house.uri, "-c", script)


def by_fio(house: House, source: Path) -> None:
    run(
        "fio", "--thread", "--name=many", "--numjobs=4", "--ioengine=nbd", f"--uri={house.uri}", "--rw=randrw",
        "--bs=4k-64k", "--bsrange=4k-64k", "--iodepth=8", "--size=4m", "--offset_increment=12m", "--verify=crc32c",
        "--fsync=50", "--trim_percentage=5", cwd=source.parent,
    )  # fmt: skip


def by_a_proxy(house: House, source: Path) -> None:
    """qemu-nbd in front of us, and a client of it."""
    listen_at = source.parent / "proxy.sock"
    options = f"driver=nbd,server.type=unix,server.path={house.socket},export={NAME}"
    with spawn(
        "qemu-nbd", "--persistent", "-k", listen_at, "-x", "proxy", "--discard=unmap", "--image-opts", options
    ) as qemu:
        wait_for_socket(listen_at, qemu)
        said = ["write -P 9 3M 3M", "write -z -u 40M 2M", "flush"]
        uri = f"nbd+unix:///proxy?socket={listen_at}"
        run("qemu-io", "-f", "raw", *(word for one in said for word in ("-c", one)), uri)


@pytest.mark.parametrize(
    "write",
    [by_qemu_io, by_qemu_img, by_nbdcopy, by_nbdsh, by_fio, by_a_proxy],
    ids=lambda write: write.__name__,
)
def test_whatever_a_client_wrote_is_named(house: House, raw_image: RawImage, write: Writer) -> None:
    chosen = random.Random(3)
    data = [
        (n * 8 * MIB + chosen.randrange(MIB), chosen.randbytes(chosen.randrange(300_000))) for n in range(7)
    ]
    write(house, raw_image(SIZE, data, name="source.raw"))
    changed = house.changed()
    assert changed <= house.named()
    assert len(changed) >= 3


def test_every_client_reads_what_is_there(house: House, tmp_path: Path) -> None:
    run("nbdcopy", "--connections=4", house.uri, tmp_path / "nbdcopy.raw")
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", house.uri, tmp_path / "convert.raw")
    # QEMU rounds sizes up to whole sectors
    copies = [(tmp_path / name).read_bytes()[:SIZE] for name in ("nbdcopy.raw", "convert.raw")]
    assert copies == [house.before, house.before]
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "nbdcopy.raw", house.uri)
    assert house.named() == set()


def test_clients_see_the_same_map(house: House) -> None:
    """Of allocation, and of dirt; totals add up to the disk."""
    house.disk.pwrite(b"x" * 5 * BLOCK, 100 * BLOCK)
    dirty = "qemu:dirty-bitmap:start"
    contexts = json.loads(run("nbdinfo", "--list", "--json", house.uri).stdout)["exports"][0]["contexts"]
    assert set(contexts) >= {"base:allocation", dirty}
    totals = json.loads(run("nbdinfo", f"--map={dirty}", "--totals", "--json", house.uri).stdout)
    assert {entry["description"]: entry["size"] for entry in totals} == {
        "clean": SIZE - 5 * BLOCK,
        "dirty": 5 * BLOCK,
    }
    theirs = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", house.uri).stdout)
    holes = sum(entry["length"] for entry in theirs if entry["zero"] and entry["start"] < SIZE)
    mine = json.loads(run("nbdinfo", "--map", "--totals", "--json", house.uri).stdout)
    assert holes == sum(entry["size"] for entry in mine if entry["type"] & 2)


def test_exports_are_listed_to_nbd_client(house: House) -> None:
    """All that it can do without the kernel's nbd module; with the module it is the kernel that speaks to us."""
    assert NAME in run("nbd-client", "-l", "-unix", house.socket, check=False).stdout


@pytest.mark.skipif(not os.path.exists(DEBIAN_PYTHON), reason="needs Debian's Python")
def test_many_contexts_in_one_question_come_back_together(house: House) -> None:
    """libnbd asks for all contexts that it was told of in one BLOCK_STATUS."""
    house.disk.checkpoint("monday")
    house.disk.pwrite(b"x", 7 * BLOCK)
    script = (
        "found = {}\n"
        "for c in ('base:allocation', 'qemu:dirty-bitmap:start', 'qemu:dirty-bitmap:monday'): h.add_meta_context(c)\n"
        f"h.connect_uri({house.uri!r})\n"
        "def told(name, offset, entries, error): found[name] = entries\n"
        f"h.block_status(8 * {BLOCK}, {BLOCK} * 4 + 1, told)\n"
        "print(sorted(found.items()))\n"
    )
    said = run(DEBIAN_PYTHON, "-m", "nbd", "-c", script).stdout
    for name in ("start", "monday"):
        assert f"('qemu:dirty-bitmap:{name}', [{3 * BLOCK - 1}, 0, {BLOCK}, 1," in said
    assert "base:allocation" in said
