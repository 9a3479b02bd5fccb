"""QEMU and we keep out of each other's images, both ways round, exactly as two QEMUs would."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

import pytest

from lmdbitmap.errors import Busy
from lmdbitmap.images.device import FileDevice
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image, requires, run, spawn, wait_for_socket

pytestmark = [requires("qemu-system-x86_64"), requires("qemu-nbd"), requires("qemu-io"), requires("qemu-img")]

Holder: TypeAlias = Callable[[Path], AbstractContextManager[object]]

QEMU = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg"]


def drive(image: Path, read_only: bool) -> str:
    return f"file={image},format=raw,if=virtio,readonly={'on' if read_only else 'off'}"


# --- who has the image open ---


@contextlib.contextmanager
def guest(image: Path, read_only: bool = False) -> Iterator[None]:
    """A virtual machine, stopped before its first instruction, that has the image as its disk."""
    with tempfile.TemporaryDirectory() as folder:
        control = Path(folder) / "qmp"
        server = f"unix:{control},server=on,wait=off"
        with spawn(*QEMU, "-drive", drive(image, read_only), "-qmp", server) as child:
            wait_for_socket(control, child)
            await_answer(control, b'{"execute":"qmp_capabilities"}', b'{"return"')
            yield


@contextlib.contextmanager
def qemu_nbd(image: Path, read_only: bool = False) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder) / "nbd"
        options = ["--read-only"] if read_only else []
        with spawn(
            "qemu-nbd", "--persistent", "--format=raw", f"--socket={served}", *options, image
        ) as child:
            wait_for_socket(served, child)
            await_answer(served, b"", b"NBDMAGIC")
            yield


def await_answer(path: Path, question: bytes, answer: bytes) -> None:
    """A server listens before the image is open; only its main loop, which comes after, answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(os.fspath(path))
        connection.sendall(question)
        heard = b""
        while answer not in heard:
            heard += (more := connection.recv(4096))
            assert more, f"closed after {heard!r}"


def our_writer(image: Path) -> FileDevice:
    return FileDevice.open(image)


def our_reader(image: Path) -> FileDevice:
    return FileDevice.open(image, read_only=True)


def our_sharing_reader(image: Path) -> FileDevice:
    return FileDevice.open(image, read_only=True, share_writes=True)


def guest_that_reads(image: Path) -> AbstractContextManager[None]:
    return guest(image, read_only=True)


def qemu_nbd_that_reads(image: Path) -> AbstractContextManager[None]:
    return qemu_nbd(image, read_only=True)


# --- we come second ---


@pytest.mark.parametrize(
    ("holder", "welcome"),
    [
        (guest, {our_sharing_reader}),
        (guest_that_reads, {our_sharing_reader, our_reader}),
        (qemu_nbd, {our_sharing_reader}),
        (qemu_nbd_that_reads, {our_sharing_reader, our_reader}),
    ],
)
def test_we_are_refused_what_qemu_does_not_share(
    tmp_path: Path, holder: Holder, welcome: set[Holder]
) -> None:
    image = make_raw_image(tmp_path / "disk.raw", 1 << 20)
    with holder(image):
        for ours in (our_writer, our_reader, our_sharing_reader):
            if ours in welcome:
                ours(image).close()
            else:
                with pytest.raises(Busy, match="is open in QEMU"):
                    ours(image)
    our_writer(image).close()


# --- QEMU comes second ---


def tries(image: Path) -> dict[str, tuple[list[str | Path], str]]:
    """Programs that open the image and end: the command and its standard input."""
    quit_at_once = '{"execute":"qmp_capabilities"} {"execute":"quit"}'
    return {
        "guest": ([*QEMU, "-qmp", "stdio", "-drive", drive(image, False)], quit_at_once),
        "guest that reads": ([*QEMU, "-qmp", "stdio", "-drive", drive(image, True)], quit_at_once),
        "write": (["qemu-io", "-f", "raw", "-c", "write 0 512", image], ""),
        "read": (["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", image], ""),
        "convert": (["qemu-img", "convert", "-f", "raw", "-O", "raw", image, image.with_name("copy")], ""),
        "info": (["qemu-img", "info", "-f", "raw", image], ""),
    }


@pytest.mark.parametrize(
    ("holder", "welcome"),
    [
        (guest, {"read", "info"}),
        (our_writer, {"read", "info"}),
        (guest_that_reads, {"guest that reads", "read", "convert", "info"}),
        (our_reader, {"guest that reads", "read", "convert", "info"}),
        (our_sharing_reader, {"guest", "guest that reads", "write", "read", "convert", "info"}),
    ],
)
def test_qemu_is_refused_what_we_do_not_share_as_by_a_guest(
    tmp_path: Path, holder: Holder, welcome: set[str]
) -> None:
    image = make_raw_image(tmp_path / "disk.raw", 1 << 20)
    with holder(image):
        done = {name: run(*words, stdin=said, check=False) for name, (words, said) in tries(image).items()}
    assert {name for name, result in done.items() if result.returncode == 0} == welcome
    for name in done.keys() - welcome:
        assert "lock" in done[name].stderr


@pytest.mark.parametrize("options", [[], ["--read-only"]])
def test_qemu_nbd_does_not_serve_what_we_write(tmp_path: Path, options: list[str]) -> None:
    image = make_raw_image(tmp_path / "disk.raw", 1 << 20)
    command: list[str | Path] = ["qemu-nbd", "--format=raw", f"--socket={tmp_path / 'nbd'}", *options, image]
    with our_writer(image):
        refused = run(*command, check=False)
    assert (refused.returncode, "lock" in refused.stderr) == (1, True)


@contextlib.contextmanager
def raw_file(folder: Path) -> Iterator[Path]:
    yield make_raw_image(folder / "disk.raw", 1 << 20)


@pytest.mark.parametrize("image_in", [raw_file, *([loop_node] if can_make_loop_devices() else [])])
def test_locks_hold_on_files_and_on_block_devices(
    tmp_path: Path, image_in: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    with image_in(tmp_path) as image:
        write: list[str | Path] = ["qemu-io", "-f", "raw", "-c", "write 0 512", image]
        with our_writer(image) as device:
            assert device.locked
            assert run(*write, check=False).returncode == 1
        with guest(image), pytest.raises(Busy):
            our_writer(image)
        assert run(*write).returncode == 0
