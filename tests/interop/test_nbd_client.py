"""Our NBD client before the servers that people use: what it writes is there, whoever dies meanwhile."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from lmdbitmap.errors import Busy, InvalidArgument, NotFound
from lmdbitmap.interfaces import Allocation
from lmdbitmap.nbd.client.device import NbdDevice
from tests.helpers.support import (
    Argument,
    Child,
    free_port,
    make_raw_image,
    requires,
    run,
    spawn,
    wait_for_socket,
)

MIB = 1 << 20
SIZE = 16 * MIB

pytestmark = [requires(tool) for tool in ("qemu-img", "qemu-nbd", "nbdkit", "nbdinfo")]


class Mortal(Protocol):
    def kill(self) -> None: ...
    def start(self) -> object: ...


class Far:
    """A server that can be killed and started again, at the socket `nbd` of a folder."""

    def __init__(self, folder: Path, stack: ExitStack, command: list[Argument]) -> None:
        self.socket = folder / "nbd"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._stack = stack
        self._command = command
        self.child = self.start()

    def start(self) -> Child:
        self.child = self._stack.enter_context(spawn(*self._command))
        wait_for_socket(self.socket, self.child)
        return self.child

    def kill(self) -> None:
        self.child.process.kill()
        self.child.wait()
        self.socket.unlink()


@contextmanager
def qemu_nbd(folder: Path, image: Path, image_format: str, *options: str) -> Iterator[Far]:
    with ExitStack() as stack:
        words = ["qemu-nbd", "--persistent", "--shared=4", f"--format={image_format}", *options]
        yield Far(folder, stack, [*words, f"--socket={folder / 'nbd'}", image])


@contextmanager
def nbdkit(folder: Path, *words: Argument) -> Iterator[Far]:
    with ExitStack() as stack:
        yield Far(folder, stack, ["nbdkit", "--foreground", "--unix", folder / "nbd", *words])


def made(folder: Path, image_format: str) -> Path:
    image = folder / f"disk.{image_format}"
    run("qemu-img", "create", "-q", "-f", image_format, image, str(SIZE))
    return image


def content(folder: Path, image: Path, image_format: str) -> bytes:
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", image, folder / "content")
    return (folder / "content").read_bytes()


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk"])
def test_what_is_written_is_in_the_image(tmp_path: Path, image_format: str) -> None:
    image = made(tmp_path, image_format)
    with qemu_nbd(tmp_path, image, image_format) as far, NbdDevice.open(far.uri) as device:
        assert device.size == SIZE
        device.pwrite(b"a" * 100_000, 12_345)
        device.pwrite(b"b" * 3 * MIB, 5 * MIB)
        device.write_zeroes(6 * MIB, MIB)
        device.discard(7 * MIB, 4096)
        device.flush()
    model = bytearray(SIZE)
    model[12_345:112_345] = b"a" * 100_000
    model[5 * MIB : 8 * MIB] = b"b" * MIB + bytes(MIB) + b"b" * MIB
    written = content(tmp_path, image, image_format)
    assert written[: 7 * MIB] == model[: 7 * MIB]
    assert written[7 * MIB + 4096 :] == model[7 * MIB + 4096 :]


def test_holes_are_those_that_nbdinfo_finds(tmp_path: Path) -> None:
    image = make_raw_image(tmp_path / "disk.raw", SIZE, [(MIB, b"x" * MIB), (9 * MIB, b"y" * 4096)])
    with nbdkit(tmp_path, "file", image) as far, NbdDevice.open(far.uri) as device:
        told = json.loads(run("nbdinfo", "--map", "--json", far.uri).stdout)
        assert len(told) == 5
        assert list(device.allocation(0, SIZE)) == [
            Allocation(extent["length"], bool(extent["type"] & 1), bool(extent["type"] & 2))
            for extent in told
        ]


def test_tcp_is_spoken_too(tmp_path: Path) -> None:
    port = free_port()
    with spawn(
        "nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", str(port), "memory", "1M"
    ) as server:
        wait_for_socket(("127.0.0.1", port), server)
        with NbdDevice.open(f"nbd://127.0.0.1:{port}/") as device:
            device.pwrite(b"over TCP", 5)
            assert device.pread(8, 5) == b"over TCP"


# --- refusals ---


@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit"])
def test_read_only_server_is_refused_for_writing(tmp_path: Path, server: str) -> None:
    image = made(tmp_path, "raw")
    serving = (
        qemu_nbd(tmp_path, image, "raw", "--read-only")
        if server == "qemu-nbd"
        else nbdkit(tmp_path, "--readonly", "file", image)
    )
    with serving as far:
        with pytest.raises(InvalidArgument, match="served read-only"):
            NbdDevice.open(far.uri)
        with NbdDevice.open(far.uri, read_only=True) as device:
            assert device.pread(10, 0) == bytes(10)
            device.flush()


def test_name_that_the_server_does_not_have_is_not_found(tmp_path: Path) -> None:
    with qemu_nbd(tmp_path, made(tmp_path, "raw"), "raw", "--export-name=sda") as far:
        NbdDevice.open(far.uri.replace(":///", ":///sda")).close()
        with pytest.raises(NotFound, match="no export called 'sdb'"):
            NbdDevice.open(far.uri.replace(":///", ":///sdb"))


def test_server_that_insists_on_tls_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("me:00112233445566778899aabbccddeeff")
    (tmp_path / "keys").chmod(0o600)
    keys = ["--tls=require", f"--tls-psk={tmp_path / 'keys'}"]
    with nbdkit(tmp_path, *keys, "memory", "1M") as far, pytest.raises(InvalidArgument, match="TLS"):
        NbdDevice.open(far.uri)


def test_server_that_serves_somebody_else_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        qemu_nbd(tmp_path, made(tmp_path, "raw"), "raw", "--shared=1") as far,
        NbdDevice.open(far.uri),
    ):
        monkeypatch.setattr("lmdbitmap.nbd.client.device.DIAL_S", 0.3)
        with pytest.raises(Busy, match="takes only one"):
            NbdDevice.open(far.uri)


def test_minimum_block_size_of_a_server_is_kept_to(tmp_path: Path) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=65536"]
    words = ["--filter=blocksize-policy", "memory", "1M", *policy, "blocksize-error-policy=error"]
    with nbdkit(tmp_path, *words) as far, NbdDevice.open(far.uri) as device:
        device.pwrite(b"x" * 200_001, 4095)
        assert device.pread(200_003, 4094) == b"\0" + b"x" * 200_001 + b"\0"
        device.write_zeroes(4097, 200_000)
        assert device.pread(4, 4095) == b"xx\0\0"


# --- servers that die ---


def test_writes_that_a_killed_server_held_in_its_memory_are_not_lost(tmp_path: Path) -> None:
    """qemu-nbd keeps a qcow2 image's tables in its memory until a flush: what it acknowledged dies with it."""
    image = made(tmp_path, "qcow2")
    with qemu_nbd(tmp_path, image, "qcow2") as far, NbdDevice.open(far.uri) as device:
        for number in range(100):
            device.pwrite(bytes([number + 1]) * 4096, number * 131_072)
        far.kill()
        assert content(tmp_path, image, "qcow2") == bytes(SIZE)
        far.start()
        device.flush()
        far.kill()
    written = content(tmp_path, image, "qcow2")
    assert [written[number * 131_072] for number in range(100)] == list(range(1, 101))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_threads_at_work_do_not_notice_that_the_server_is_killed(tmp_path: Path, image_format: str) -> None:
    image = made(tmp_path, image_format)
    with qemu_nbd(tmp_path, image, image_format) as far, NbdDevice.open(far.uri) as device:
        model = work_while_it_is_killed(device, far)
        device.flush()
        far.kill()
    assert content(tmp_path, image, image_format) == model


def work_while_it_is_killed(device: NbdDevice, far: Mortal) -> bytes:
    """Each thread owns a part of the disk and knows what it wrote there; the server is killed five times.

    What the disk must hold in the end.
    """
    threads, kills, part = 8, 5, SIZE // 8
    models = [bytearray(part) for _ in range(threads)]
    over = threading.Event()
    gate = threading.Semaphore(0)
    steps: list[Callable[[random.Random, int], None]] = [
        lambda chance, number: write(device, models[number], chance, number * part),
        lambda chance, number: zero(device, models[number], chance, number * part),
        lambda chance, number: check(device, models[number], chance, number * part),
        lambda chance, number: device.flush(),
    ]

    def work(number: int) -> int:
        chance, rounds = random.Random(number), 0
        while not over.is_set():
            chance.choices(steps, (10, 2, 10, 1))[0](chance, number)
            rounds += 1
            gate.release()
        return rounds

    with ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(work, number) for number in range(threads)]
        try:
            for _ in range(kills):
                for _ in range(300):
                    assert gate.acquire(timeout=20)
                far.kill()
                far.start()
        finally:
            over.set()
        assert all(one.result() > 0 for one in working)
    return b"".join(models)


def write(device: NbdDevice, model: bytearray, chance: random.Random, base: int) -> None:
    offset, length = chance.randrange(len(model) - 20_000), chance.choice([1, 512, 4096, 20_000])
    data = chance.randbytes(length)
    device.pwrite(data, base + offset)
    model[offset : offset + length] = data


def zero(device: NbdDevice, model: bytearray, chance: random.Random, base: int) -> None:
    offset, length = chance.randrange(len(model) - 200_000), chance.choice([1, 4096, 200_000])
    device.write_zeroes(base + offset, length)
    model[offset : offset + length] = bytes(length)


def check(device: NbdDevice, model: bytearray, chance: random.Random, base: int) -> None:
    offset = chance.randrange(len(model) - 20_000)
    assert device.pread(20_000, base + offset) == model[offset : offset + 20_000]
