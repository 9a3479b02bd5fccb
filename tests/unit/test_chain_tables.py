"""A chain whose tables cannot be followed is noticed before anything is stacked on it, and at a bounded price."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.copying.digest_algorithms import DIGEST_BYTES
from lmdbitmap.errors import FormatError, StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.qcow2 import Qcow2Reader, Qcow2Writer
from lmdbitmap.qcow2.layout import COPIED
from lmdbitmap.repository import chain_tables
from lmdbitmap.repository.chain_tables import is_plain, what_is_broken
from lmdbitmap.repository.manifest import BackupEntry, BackupType, chain_to
from tests.helpers.backed_up import FULL, INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.qcow2_model import MemoryFile
from tests.helpers.tracked import quick_folder

CLUSTER = 4096
TABLE_COVERS = CLUSTER * CLUSTER // 8
SIZE = 3 * TABLE_COVERS
"""Three second tables."""


@pytest.fixture
def disk() -> Iterator[BackedUpDisk]:
    """With a full backup and two increments, each of which has something in all three tables."""
    with quick_folder() as folder:
        made = BackedUpDisk(folder, SIZE)
        for number in range(3):
            for table in range(3):
                made.write(os.urandom(2 * CLUSTER), table * TABLE_COVERS + number * CLUSTER)
            made.backup()
        yield made
        made.close()


def entries(disk: BackedUpDisk) -> tuple[BackupEntry, ...]:
    manifest = disk.manifest()
    return chain_to(manifest, manifest.backups[-1].id)


def broken(disk: BackedUpDisk, **options: bool) -> str | None:
    error = what_is_broken(disk.backup_folder(), entries(disk), **options)
    return None if error is None else error.problem


def path_of(disk: BackedUpDisk, number: int) -> Path:
    return Path(disk.backup_folder().path_of(disk.manifest().backups[number - 1].file))


def second_table(path: Path, index: int) -> int:
    """Where it is in the file."""
    [l1] = struct.unpack_from(">Q", path.read_bytes(), 40)
    [pointer] = struct.unpack_from(">Q", path.read_bytes(), l1 + 8 * index)
    return int(pointer) & 0x00FFFFFFFFFFFE00


def flip(path: Path, offset: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ bits]))


def damage_magic(path: Path) -> None:
    flip(path, 0, 1)


def damage_backing_name(path: Path) -> None:
    [offset] = struct.unpack_from(">Q", path.read_bytes(), 8)
    flip(path, offset, 1) if offset else flip(path, 24, 1)


def damage_first_table(path: Path) -> None:
    [l1] = struct.unpack_from(">Q", path.read_bytes(), 40)
    flip(path, l1 + 8 * 2 + 2, 0x40)


def damage_second_table(path: Path) -> None:
    flip(path, second_table(path, 0) + 7, 0x10)


def test_a_sound_chain_has_nothing_wrong(disk: BackedUpDisk) -> None:
    assert broken(disk) is None
    assert broken(disk, thoroughly=True) is None


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "damage", [damage_magic, damage_backing_name, damage_first_table, damage_second_table]
)
def test_damage_of_any_image_is_found(
    disk: BackedUpDisk, damage: Callable[[Path], None], number: int
) -> None:
    damage(path_of(disk, number))
    for thoroughly in (False, True):
        found = broken(disk, thoroughly=thoroughly)
        assert found is not None
        assert found.startswith(str(path_of(disk, number)))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", [INCREMENTAL, RESCAN])
def test_a_header_that_was_written_anew_is_not_what_was_backed_up(
    disk: BackedUpDisk, kind: BackupType, number: int
) -> None:
    path = path_of(disk, number)
    subprocess.run(["qemu-img", "amend", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path], check=True)
    length = min(1 << 20, disk.manifest().backups[number - 1].bytes_stored)
    found = broken(disk)
    assert found is not None
    assert found.startswith(f"{path}: bytes 0..{length}: expected")
    entry = disk.backup(kind)
    assert (entry.type_actual, entry.reason and entry.reason.code) == (FULL, "image-damaged")
    assert disk.restored() == disk.content()


@pytest.mark.parametrize("number", [1, 2])
def test_headers_are_proven_as_far_as_the_ration_goes(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    newest = disk.manifest().backups[2]
    assert newest.chunks is not None
    one_proof = newest.bytes_stored + DIGEST_BYTES
    monkeypatch.setattr(chain_tables, "_MOST_PROVEN_BYTES", 2 * one_proof)
    flip(path_of(disk, number), 4 * CLUSTER - 1, 1)
    assert (broken(disk) is None) == (number == 1)


def test_where_digests_are_lost_nothing_is_known_against_a_header(disk: BackedUpDisk) -> None:
    for entry in disk.manifest().backups:
        assert entry.chunks is not None
        os.unlink(disk.backup_folder().path_of(entry.chunks.file))
    flip(path_of(disk, 2), 4 * CLUSTER - 1, 1)
    assert broken(disk) is None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_within_the_ration_all_second_tables_are_looked_at(disk: BackedUpDisk, index: int) -> None:
    flip(path_of(disk, 1), second_table(path_of(disk, 1), index) + 7, 0x10)
    found = broken(disk)
    assert found is not None
    assert f"L2 entry of byte {index * TABLE_COVERS}" in found


def test_beyond_the_ration_only_a_thorough_look_finds_it(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(path_of(disk, 1), second_table(path_of(disk, 1), 2) + 7, 0x10)
    monkeypatch.setattr(chain_tables, "_MOST_SECOND_BYTES", 3 * CLUSTER)
    monkeypatch.setattr(chain_tables, "_MOST_PROVEN_BYTES", 0)
    assert broken(disk) is None
    assert broken(disk, thoroughly=True) is not None
    flip(path_of(disk, 3), second_table(path_of(disk, 3), 0) + 7, 0x10)
    assert broken(disk) is not None


def test_no_more_is_read_than_the_ration_whatever_the_chains_length(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_file = FileDevice.open

    def counted(path: str, **options: bool) -> FileDevice:
        opened.append(os.path.basename(path))
        return open_file(path, **options)

    monkeypatch.setattr(FileDevice, "open", staticmethod(counted))
    monkeypatch.setattr(chain_tables, "_MOST_FIRST_BYTES", 2 * 8 * 3)
    monkeypatch.setattr(chain_tables, "_MOST_PROVEN_BYTES", 0)
    assert broken(disk) is None
    assert opened == ["000003-incremental.qcow2", "000002-incremental.qcow2"], "the newest first"


def test_an_image_that_the_disk_cannot_read_is_broken(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FileDevice.pread

    def refuse(self: FileDevice, length: int, offset: int) -> bytes:
        if self.path == str(path_of(disk, 2)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, length, offset)

    monkeypatch.setattr(FileDevice, "pread", refuse)
    assert isinstance(what_is_broken(disk.backup_folder(), entries(disk)), StorageError)


def test_where_looking_is_not_allowed_nothing_is_known_against_it(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileDevice.open(path_of(disk, 2)):
        assert broken(disk) is None, "somebody writes to it: who knows"
    open_file = FileDevice.open

    def refuse(path: str, **options: bool) -> FileDevice:
        raise StorageError(path, OSError(errno.EACCES, "no"), next_step="ask")

    monkeypatch.setattr(FileDevice, "open", staticmethod(refuse))
    assert broken(disk) is None
    monkeypatch.setattr(FileDevice, "open", staticmethod(open_file))
    damage_magic(path_of(disk, 1))
    with FileDevice.open(path_of(disk, 2)):
        assert broken(disk) is not None, "the others are looked at all the same"


def test_compressed_images_are_left_to_their_reader(disk: BackedUpDisk) -> None:
    disk.write(b"much the same" * 5000, 0)
    disk.backup(FULL, compression="zlib")
    assert broken(disk, thoroughly=True) is None
    flip(path_of(disk, 4), second_table(path_of(disk, 4), 0), 0x80)
    assert "compressed data inside the file" in str(broken(disk))


def test_a_table_that_stands_for_two_is_refused(disk: BackedUpDisk) -> None:
    path = path_of(disk, 3)
    [l1] = struct.unpack_from(">Q", path.read_bytes(), 40)
    with path.open("r+b") as file:
        file.seek(l1)
        first = file.read(8)
        file.seek(l1 + 8)
        file.write(first)
    assert "an L2 table of its own" in str(broken(disk))


@given(
    flips=st.lists(st.tuples(st.integers(0, CLUSTER - 1), st.integers(1, 255)), max_size=3),
    entry=st.sampled_from(
        [0, 1, COPIED, COPIED | 1, 1 << 62, CLUSTER, COPIED | CLUSTER, COPIED | 60 * CLUSTER]
    ),
)
def test_what_is_plain_is_what_the_reader_takes(flips: list[tuple[int, int]], entry: int) -> None:
    """The quick look lets nothing pass that the reader refuses."""
    table = bytearray(IMAGE.content[TABLE : TABLE + CLUSTER])
    struct.pack_into(">Q", table, 8 * 100, entry)
    for offset, bits in flips:
        table[offset] ^= bits
    file = MemoryFile(bytes(IMAGE.content))
    file.content[TABLE : TABLE + CLUSTER] = table
    try:
        reader = Qcow2Reader(file)
        deque(reader.extents(0, reader.size), maxlen=0)
    except FormatError:
        assert not is_plain(bytes(table), CLUSTER, file.size)


def test_plain_tables_are_told_as_such() -> None:
    """Or the quick look would be of no use."""
    table = bytes(IMAGE.content[TABLE : TABLE + CLUSTER])
    assert any(table)
    assert is_plain(table, CLUSTER, IMAGE.size)
    assert is_plain(bytes(CLUSTER), CLUSTER, CLUSTER)


def _image() -> MemoryFile:
    file = MemoryFile()
    writer = Qcow2Writer(file, size=TABLE_COVERS, cluster_bits=12, backing_file="below.qcow2")
    for cluster in (0, 1, 2, 50, 200):
        writer.write(cluster * CLUSTER, memoryview(os.urandom(CLUSTER)))
    writer.write_zeroes(300 * CLUSTER, 20 * CLUSTER)
    writer.finish()
    return file


IMAGE = _image()
TABLE = (
    struct.unpack_from(">Q", IMAGE.content, struct.unpack_from(">Q", IMAGE.content, 40)[0])[0] & (1 << 56) - 1
)


# --- what becomes of a backup ---


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("damage", [damage_magic, damage_first_table, damage_second_table])
@pytest.mark.parametrize("kind", [INCREMENTAL, RESCAN])
@pytest.mark.parametrize("epoch", ["same", "new"])
def test_on_a_chain_that_cannot_be_read_a_full_backup_is_made(
    disk: BackedUpDisk, epoch: str, kind: object, damage: Callable[[Path], None], number: int
) -> None:
    damage(path_of(disk, number))
    if epoch == "new":
        disk.write_behind_our_back(b"stranger", 0)
    else:
        disk.write(b"guest", 0)
    entry = disk.backup(INCREMENTAL if kind is INCREMENTAL else RESCAN)
    assert (entry.type_actual, entry.reason and entry.reason.code) == (FULL, "image-damaged")
    assert disk.restored() == disk.content()
    disk.write(b"later", 9 * CLUSTER)
    entry = disk.backup()
    assert (entry.type_actual, entry.parent) == (INCREMENTAL, "4")
    assert disk.restored() == disk.content()
