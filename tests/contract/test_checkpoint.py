"""A checkpoint is answered when a power cut can no longer take back what came before it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmdbitmap import chain, session
from lmdbitmap.device import FileDevice
from lmdbitmap.errors import StorageError
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.store import Store
from tests.support import make_raw_image

SIZE = 1 << 20


class Watched(FileDevice):
    """An image that runs `at_flush` before each flush."""

    at_flush: Callable[[], None] = staticmethod(lambda: None)

    def flush(self) -> None:
        self.at_flush()
        super().flush()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(str(tmp_path / "store")) as made:
        yield made


def attach(store: Store, tmp_path: Path, name: str) -> Filter:
    session.add(store, name, str(make_raw_image(tmp_path / f"{name}.raw", SIZE)), granularity_bits=12)
    return Filter.attach(store, name, background=False, open_device=Watched.open)


def names(store: Store, disk: Filter) -> list[str]:
    with store.read() as reader:
        return [checkpoint.name for checkpoint in reader.checkpoints(disk.disk.uuid)]


def test_the_image_is_flushed_after_the_commit_and_while_writers_go_on(store: Store, tmp_path: Path) -> None:
    with attach(store, tmp_path, "sda") as disk:
        seen = []

        def look_and_write() -> None:
            seen.append(names(store, disk))
            disk.pwrite(b"the guest writes on", 8192)

        disk.device.at_flush = look_and_write  # type: ignore[attr-defined]
        disk.checkpoint("monday")
        del disk.device.at_flush  # type: ignore[attr-defined]
        assert seen == [["epoch-1", "monday"]]
        assert list(disk.changes(since="monday").runs()) == [(2, 3)]


def test_an_image_that_cannot_be_flushed_has_no_checkpoint_nor_have_the_others(
    store: Store, tmp_path: Path
) -> None:
    def refuse() -> None:
        raise OSError(errno.EIO, "the disk fails")

    with attach(store, tmp_path, "sda") as sound, attach(store, tmp_path, "sdb") as failing:
        take_checkpoint([sound, failing], "monday")
        sound.pwrite(b"x", 0)
        failing.device.at_flush = refuse  # type: ignore[attr-defined]
        with pytest.raises(StorageError, match="cannot be flushed"):
            take_checkpoint([sound, failing], "tuesday")
        del failing.device.at_flush  # type: ignore[attr-defined]
        sound.pwrite(b"x", 4096)
        assert names(store, sound) == names(store, failing) == ["epoch-1", "monday"]
        assert list(sound.changes(since="monday").runs()) == [(0, 2)]
        with store.read() as reader:
            assert chain.current_checkpoint(reader, sound.disk).name == "monday"
