"""The images of a backup as one disk: which file each byte is in, and what is refused about each of them."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, NotFound, StorageError
from lmdbitmap.qcow2 import Kind
from lmdbitmap.repository import backup_chain
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from tests.helpers.backed_up import FULL, BackedUpDisk
from tests.helpers.tracked import NAME

KIB = 1 << 10
SIZE = 300 * KIB + 5
TABLE_ENTRIES = 512
"""Of an L2 table with clusters of 4 KiB: one maps 2 MiB."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    """Three backups, one on the other; the newest zeroes what the oldest has."""
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(b"a" * 100 * KIB, 48 * KIB)
    made.backup()
    made.write(b"b" * 20 * KIB, 140 * KIB)
    made.backup()
    made.zero(60 * KIB, 40 * KIB)
    made.write(b"end", SIZE - 3)
    made.backup()
    yield made
    made.close()


@pytest.fixture
def chain(disk: BackedUpDisk) -> Iterator[BackupChain]:
    with backup_chain.opened(disk.backup_folder(), disk.manifest().backups) as opened:
        yield opened


def test_backups_that_are_pruned_while_they_are_opened_are_not_called_damaged(disk: BackedUpDisk) -> None:
    before = disk.manifest().backups
    prune(disk.folder / "backups", [NAME], keep=Retention(last=1))
    with pytest.raises(Busy, match="try again"), backup_chain.opened(disk.backup_folder(), before):
        raise AssertionError("the block is not entered")
    with backup_chain.opened(disk.backup_folder(), disk.manifest().backups) as opened:
        assert opened.pread(SIZE, 0) == disk.content()


def image(disk: BackedUpDisk, number: int) -> Path:
    return Path(disk.backup_folder().path_of(disk.manifest().backups[number].file))


def test_images_come_newest_first(chain: BackupChain) -> None:
    assert [one.entry.id for one in chain.images] == ["3", "2", "1"]
    assert chain.entry.id == "3"


def test_each_byte_is_in_the_newest_image_that_has_it(chain: BackupChain) -> None:
    found = [(run.offset // KIB, run.kind, run.layer) for run in chain.extents(0, SIZE)]
    assert found == [
        (0, Kind.ZERO, 0),
        (48, Kind.DATA, 2),
        (60, Kind.ZERO, 0),
        (100, Kind.DATA, 2),
        (140, Kind.DATA, 1),
        (160, Kind.ZERO, 0),
        (300, Kind.DATA, 0),
    ]


def test_a_view_of_larger_items_is_filled_with_bytes(disk: BackedUpDisk, chain: BackupChain) -> None:
    length = SIZE // 4 * 4
    buffer = bytearray(length)
    chain.pread_into(memoryview(buffer).cast("I"), 0)
    assert buffer == disk.content()[:length]


def test_an_extent_of_data_is_where_its_file_says(disk: BackedUpDisk, chain: BackupChain) -> None:
    seen = 0
    for run in chain.extents(0, SIZE):
        if run.kind is Kind.DATA:
            data = chain.images[run.layer].file.pread(run.length, run.host_offset)
            assert data == disk.content()[run.offset : run.end]
            seen += 1
    assert seen == 4


def test_the_disk_ends_where_it_ended_and_not_with_its_last_sector(chain: BackupChain) -> None:
    assert chain.size == SIZE
    assert list(chain.extents(0, SIZE))[-1].end == SIZE
    with pytest.raises(InvalidArgument):
        chain.pread(1, SIZE)


def test_an_earlier_backup_is_a_shorter_chain(disk: BackedUpDisk) -> None:
    with backup_chain.opened(disk.backup_folder(), disk.manifest().backups[:2]) as earlier:
        assert earlier.pread(KIB, 60 * KIB) == b"a" * KIB
        assert earlier.pread(3, SIZE - 3) == bytes(3)


def test_a_backup_cannot_be_resized(chain: BackupChain) -> None:
    with pytest.raises(InvalidArgument, match="resize what it is restored to"):
        chain.resize(SIZE + 1)


def test_threads_do_not_take_each_others_tables(tmp_path: Path) -> None:
    """More tables than a reader keeps, and two threads that need another one each time."""
    disk = BackedUpDisk(tmp_path, 8 << 20)
    pieces = 4
    for piece in range(pieces):
        disk.write(bytes([piece + 1]) * 4 * KIB, piece * TABLE_ENTRIES * 4 * KIB)
    disk.backup()
    with backup_chain.opened(disk.backup_folder(), disk.manifest().backups) as chain:
        start = threading.Barrier(2)
        wrong: list[int] = []
        rounds = []

        def read() -> None:
            randomness = random.Random(threading.get_ident())
            start.wait()
            for _ in range(400):
                piece = randomness.randrange(pieces)
                if chain.pread(1, piece * TABLE_ENTRIES * 4 * KIB) != bytes([piece + 1]):
                    wrong.append(piece)
                rounds.append(piece)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    disk.close()
    assert (len(rounds), wrong) == (800, [])


# --- what is refused ---


def test_a_missing_image_is_not_found(disk: BackedUpDisk) -> None:
    image(disk, 0).unlink()
    with pytest.raises(NotFound, match=r"000001-full\.qcow2 does not exist"):
        opened(disk)


def test_a_cut_image_is_refused(disk: BackedUpDisk) -> None:
    os.truncate(image(disk, 1), 4096)
    with pytest.raises(FormatError, match=r"000002-incremental\.qcow2: expected .* found 4096 bytes"):
        opened(disk)


def test_a_chain_that_begins_in_the_middle_is_refused(disk: BackedUpDisk) -> None:
    with pytest.raises(FormatError, match="backing file name: expected None, found '000001-full"):
        opened(disk, first=1)


def test_an_image_of_another_disk_size_is_refused(disk: BackedUpDisk) -> None:
    entries = disk.manifest().backups
    wrong = [*entries[:2], dataclasses.replace(entries[2], disk_size=SIZE + 512)]
    with (
        pytest.raises(FormatError, match="image size"),
        backup_chain.opened(disk.backup_folder(), wrong),
    ):
        pass


def test_a_table_that_lies_is_refused_when_it_is_needed_and_never_read_as_something(
    disk: BackedUpDisk,
) -> None:
    """The L2 entry of the disk's last cluster leads past the end of the file."""
    disk.backup(FULL)
    path = image(disk, 3)
    content = bytearray(path.read_bytes())
    [l1_offset] = struct.unpack_from(">Q", content, 40)
    [l2_offset] = struct.unpack_from(">Q", content, l1_offset)
    place = (l2_offset & 0x00FFFFFFFFFFFE00) + 8 * (SIZE // (4 * KIB))
    struct.pack_into(">Q", content, place, 1 << 63 | 1 << 40)
    path.write_bytes(content)
    with backup_chain.opened(disk.backup_folder(), disk.manifest().backups[3:]) as chain:
        assert chain.pread(1, 48 * KIB) == b"a"
        with pytest.raises(FormatError, match=r"000004-full\.qcow2: L2 entry of byte 307204"):
            chain.pread(1, SIZE - 1)
        with pytest.raises(FormatError, match="L2 entry"):
            list(chain.allocation(0, SIZE))


def test_a_file_that_cannot_be_read_is_named(chain: BackupChain, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(StorageError, match=r"000003-incremental\.qcow2: Input/output error"):
        chain.pread(1, 50 * KIB)


def opened(disk: BackedUpDisk, first: int = 0) -> None:
    with backup_chain.opened(disk.backup_folder(), disk.manifest().backups[first:]):
        pass


@pytest.mark.parametrize("call", ["lstat", "open"])
def test_a_succession_that_ends_while_the_chain_is_opened_is_not_taken_for_damage(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """What is beside its name when it is looked for has it when it is opened."""
    prune(disk.folder / "backups", [NAME], keep=Retention(last=1))
    folder, [entry] = disk.backup_folder(), disk.manifest().backups
    os.rename(folder.path_of(entry.file), folder.successor_path(entry.file))
    shutil.copy(folder.path_of("manifest.json"), folder.path_of("manifest.next"))
    do, when = getattr(os, call), {"lstat": 1, "open": 0}[call]  # it is looked for by `lstat` first
    asked: list[Any] = []

    def ended_before(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(".qcow2.next"):
            asked.append(path)
            if len(asked) == when + 1:
                folder.settle()
        return do(path, *arguments, **options)

    monkeypatch.setattr(os, call, ended_before)
    with backup_chain.opened(folder, [entry]) as opened:
        assert opened.pread(SIZE, 0) == disk.content()
    assert len(asked) > when
    assert disk.files() == [entry.file]
