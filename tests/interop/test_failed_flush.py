"""Real servers that lose what they acknowledged: at a flush that nobody asked us for, or coming back full."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from lmdbitmap.errors import StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.changes import changes
from tests.helpers.support import Argument, Child, make_raw_image, requires, spawn, wait_for_socket
from tests.helpers.tracked import blocks_of, trust_of

pytestmark = requires("nbdkit")

SIZE, PIECE = 1 << 20, 64 << 10
KEEP_BYTES = 4 * PIECE


@contextmanager
def nbdkit_that_loses(folder: Path, image: Path, next_flush_fails: Path) -> Iterator[str]:
    """Its flush fails while that file is there, which it removes."""
    fail_once = f"if rm '{next_flush_fails}' 2>/dev/null; then echo EIO lost >&2; exit 1; fi"
    scripts = [
        f"get_size=echo {SIZE}",
        f"pread=dd if='{image}' skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
        f"pwrite=dd of='{image}' seek=$4 conv=notrunc oflag=seek_bytes status=none",
        f"flush={fail_once}",
    ]
    with spawn("nbdkit", "--foreground", "--unix", folder / "nbd", "eval", *scripts) as server:
        wait_for_socket(folder / "nbd", server)
        yield f"nbd+unix:///?socket={folder / 'nbd'}"


def open_device(uri: str) -> NbdDevice:
    return NbdDevice.open(uri, keep_bytes=KEEP_BYTES)


def test_no_checkpoint_is_made_after_a_flush_of_our_own_failed_once(tmp_path: Path) -> None:
    image, trigger = make_raw_image(tmp_path / "disk.raw", SIZE), tmp_path / "fails"
    with (
        nbdkit_that_loses(tmp_path, image, trigger) as uri,
        closing(Store.create(str(tmp_path / "store"))) as store,
    ):
        session.add(store, "sda", uri, granularity_bits=16)
        disk = Filter.attach(store, "sda", background=False, open_device=open_device)
        disk.checkpoint("before")
        trigger.touch()
        for number in range(4):
            disk.pwrite(b"x" * PIECE, number * PIECE)
        with pytest.raises(StorageError, match="could not be flushed"):
            disk.checkpoint("after")
        assert not trigger.exists(), "the server is well again, and yet"
        with pytest.raises(StorageError, match="could not be flushed"):
            disk.checkpoint("after")
        assert trust_of(disk.changes(since="before")) is Trust.UNTRUSTED
        with pytest.raises(StorageError, match="could not be flushed"):
            disk.detach()
        assert trust_of(changes(store, "sda")) is Trust.UNTRUSTED
        with Filter.attach(store, "sda", background=False, open_device=open_device) as disk:
            disk.checkpoint("anew")
            disk.pwrite(b"y", 7 * PIECE)
            assert blocks_of(disk.changes(since="anew")) == {7}


def test_image_of_a_server_that_came_back_full_can_be_read(tmp_path: Path) -> None:
    """What it had acknowledged and not flushed is refused when it is written again; that is never called durable."""
    image, full = make_raw_image(tmp_path / "disk.raw", SIZE), tmp_path / "full"
    command: list[Argument] = [
        "nbdkit",
        "--foreground",
        "--unix",
        tmp_path / "nbd",
        "--filter=error",
        "file",
        image,
    ]
    command += ["error=ENOSPC", "error-pwrite-rate=100%", f"error-pwrite-file={full}"]
    with ExitStack() as stack:

        def serve() -> Child:
            child = stack.enter_context(spawn(*command))
            wait_for_socket(tmp_path / "nbd", child)
            return child

        server = serve()
        store = stack.enter_context(closing(Store.create(str(tmp_path / "store"))))
        session.add(store, "sda", f"nbd+unix:///?socket={tmp_path / 'nbd'}", granularity_bits=16)
        disk = Filter.attach(store, "sda", background=False, open_device=open_device)
        disk.checkpoint("before")
        disk.pwrite(b"x" * PIECE, 3 * PIECE)
        server.process.kill()
        server.wait()
        (tmp_path / "nbd").unlink()
        full.touch()
        serve()
        assert disk.pread(4, 5 * PIECE) == bytes(4)
        with pytest.raises(OSError) as refused:
            disk.pwrite(b"y", 0)
        assert refused.value.errno == errno.ENOSPC
        full.unlink()
        disk.pwrite(b"y", 0)
        assert disk.pread(1, 0) == b"y"
        with pytest.raises(
            StorageError, match="could not be flushed: its server answered: No space left on device"
        ):
            disk.checkpoint("after")
        disk.abandon()
        assert trust_of(changes(store, "sda", since="before")) is Trust.UNTRUSTED
