"""A real server whose disk loses what was written tells of it once, perhaps at a flush that nobody asked us for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lmdbitmap import session
from lmdbitmap.changes import changes
from lmdbitmap.errors import StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.client import NbdDevice
from lmdbitmap.store import Store
from tests.support import make_raw_image, requires, spawn, wait_for_socket
from tests.tracked import blocks_of, trust_of

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
