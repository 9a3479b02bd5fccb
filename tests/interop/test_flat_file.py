"""QEMU as the oracle: for the same writes, its bitmap and the bits of our flat file have one SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from lmdbitmap import bits
from lmdbitmap import format as flat
from lmdbitmap.format import BitsTally, FlatHeader
from lmdbitmap.geometry import Geometry
from tests.conftest import RawImage
from tests.helpers.support import PATIENCE_SECONDS, requires, run, spawn, wait_for_socket

pytestmark = [requires("qemu-storage-daemon", "7.0"), requires("qemu-io")]

VERBS = ["write", "write -z", "discard"]


class Qemu:
    """A QEMU that serves one image over NBD and takes orders over QMP."""

    def __init__(self, nbd_socket: Path, orders: IO[str]) -> None:
        self.uri = f"nbd+unix:///disk?socket={nbd_socket}"
        self._orders = orders
        self._answer()  # the greeting
        self.order("qmp_capabilities")

    def order(self, command: str, **arguments: object) -> Any:
        self._orders.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._orders.flush()
        answer = self._answer()
        assert "return" in answer, f"{command}: {answer}"
        return answer["return"]

    def write(self, changes: list[tuple[str, int, int]]) -> None:
        commands = [word for verb, offset, length in changes for word in ("-c", f"{verb} {offset} {length}")]
        run("qemu-io", "-f", "raw", "-d", "unmap", *commands, self.uri)

    def dirty_bytes(self) -> int:
        (node,) = [node for node in self.order("query-named-block-nodes") if node["node-name"] == "disk"]
        (bitmap,) = node["dirty-bitmaps"]
        count: int = bitmap["count"]
        return count

    def digest(self) -> str:
        answer = self.order("x-debug-block-dirty-bitmap-sha256", node="disk", name="ours")
        digest: str = answer["sha256"]
        return digest

    def _answer(self) -> dict[str, Any]:
        while True:
            answer: dict[str, Any] = json.loads(self._orders.readline())
            if "event" not in answer:
                return answer


@contextlib.contextmanager
def qemu_serving(image: Path, folder: Path) -> Iterator[Qemu]:
    orders, nbd = folder / "qmp.sock", folder / "nbd.sock"
    daemon = spawn(
        "qemu-storage-daemon",
        *("--chardev", f"socket,id=orders,path={orders},server=on,wait=off", "--monitor", "chardev=orders"),
        *("--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap"),
        *("--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"),
        *("--nbd-server", f"addr.type=unix,addr.path={nbd}"),
        *("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"),
    )
    with daemon as child, socket.socket(socket.AF_UNIX) as connection:
        wait_for_socket(nbd, child)
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(str(orders))
        with connection.makefile("rw") as stream:
            yield Qemu(nbd, stream)


def random_changes(size: int, seed: int, count: int) -> list[tuple[str, int, int]]:
    """Writes, zeroes and trims in whole sectors, which is how every peer sees the same bytes."""
    dice = random.Random(seed)
    changes = []
    for _ in range(count):
        offset = dice.randrange(size // 512)
        sectors = min(dice.choice([1, 1, 3, 40, 1000]), size // 512 - offset)
        changes.append((dice.choice(VERBS), offset * 512, sectors * 512))
    return changes


def flat_file(geometry: Geometry, changes: list[tuple[str, int, int]]) -> bytes:
    header = FlatHeader(
        disk_size=geometry.size,
        granularity_bits=geometry.granularity_bits,
        bitmap_uuid=uuid.uuid4(),
        disk_uuid=uuid.uuid4(),
        epoch_uuid=uuid.uuid4(),
        since_uuid=uuid.uuid4(),
        until_uuid=None,
        since_time_ns=0,
    )
    data = bytearray(header.bits_size)
    for _, offset, length in changes:
        blocks = geometry.blocks_outward(offset, length)
        bits.set_range(bits.bitmap_view(data), blocks.start, blocks.stop)
    tally = BitsTally(header.bit_count)
    tally.add(data)
    return flat.encode_header(header.sealed(tally), {}) + bytes(data)


@pytest.mark.parametrize(
    ("size", "granularity_bits"),
    [
        (1_000_448, 9),  # 1954 bits: the last word is padded
        (4 << 20, 16),  # 64 bits: exactly one word
        (67 * 65536 + 512, 16),  # the last block is one sector
        (512, 31),  # one bit for a disk that is much smaller than a block
        (1 << 30, 12),  # 32 KiB of bits
    ],
)
def test_qemu_and_the_flat_file_agree_to_the_last_bit(
    raw_image: RawImage, tmp_path: Path, size: int, granularity_bits: int
) -> None:
    geometry = Geometry(size, granularity_bits)
    compared = 0
    with qemu_serving(raw_image(size), tmp_path) as qemu:
        qemu.order("block-dirty-bitmap-add", node="disk", name="ours", granularity=geometry.granularity)
        changes: list[tuple[str, int, int]] = []
        for seed in range(4):
            more = random_changes(size, seed, count=4 * seed)  # at first none: an empty bitmap agrees too
            qemu.write(more)
            changes += more
            data = flat_file(geometry, changes)
            header, _ = flat.decode_header(data, file_size=len(data), place="x.dbm")
            assert hashlib.sha256(data[header.header_size :]).hexdigest() == qemu.digest()
            assert header.dirty_count * geometry.granularity == qemu.dirty_bytes()
            compared += 1
    assert compared == 4
