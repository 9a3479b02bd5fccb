"""What a rescan takes from the backup that it is stacked on is proven first: a restore of it will want that."""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.copying.hashing import CHUNK_BYTES, digest_at
from lmdbitmap.errors import FormatError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.qcow2 import Kind, MappedRun, Qcow2Reader
from lmdbitmap.repository import proof
from lmdbitmap.repository.manifest import BackupEntry
from tests.helpers.backed_up import FULL, RESCAN, BackedUpDisk
from tests.helpers.support import no_ascii
from tests.helpers.tracked import quick_folder
from tests.unit.test_digest_algorithms import forget_blake3
from tests.unit.test_verify import digests_of, path_of, vouch_as_a_whole

MIB = 1 << 20
CLUSTER = 4096
SIZE = 4 * MIB + 5


def half_random(length: int) -> bytes:
    """What compresses to half."""
    return no_ascii(length).translate(bytes(byte & 0x8F for byte in range(256)))


@pytest.fixture(params=["plain", "zlib"])
def disk(request: pytest.FixtureRequest) -> Iterator[BackedUpDisk]:
    """A full backup of all of it, and an increment of the third and fourth MiB."""
    compression = None if request.param == "plain" else request.param
    with quick_folder() as folder:
        made = BackedUpDisk(folder, SIZE)
        made.write(half_random(SIZE), 0)
        made.backup(compression=compression)
        made.write(half_random(2 * MIB), 2 * MIB)
        made.backup(compression=compression)
        yield made
        made.close()


@pytest.fixture(params=["blake3", "sha256"])
def one_chunk(request: pytest.FixtureRequest) -> Iterator[BackedUpDisk]:
    """A small disk of which a full backup is one chunk."""
    with quick_folder() as folder:
        made = BackedUpDisk(folder, 64 * CLUSTER)
        made.write(no_ascii(32 * CLUSTER), 0)
        made.backup(digest=request.param)
        yield made
        made.close()


def told(entry: BackupEntry) -> tuple[str, str | None]:
    return entry.type_actual.value, None if entry.reason is None else entry.reason.code


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def stored_at(path: Path, offset: int) -> MappedRun:
    """Where the image has this byte of the disk."""
    with FileDevice.open(path, read_only=True) as device:
        [run] = Qcow2Reader(device).extents(offset, 1)
    assert run.is_stored
    return run


def second_table(path: Path) -> int:
    """Where the image has the entries of the third and fourth MiB."""
    with path.open("rb") as file:
        [first] = struct.unpack_from(">Q", os.pread(file.fileno(), 8, 40))
        [pointer] = struct.unpack_from(">Q", os.pread(file.fileno(), 8, first + 8))
    return int(pointer) & (1 << 56) - 512


def damage_data(path: Path, offset: int) -> None:
    run = stored_at(path, offset)
    flip(path, run.host_offset + (run.host_length or 1) // 2)


def damage_data_early(path: Path) -> None:
    damage_data(path, 2 * MIB)


def damage_data_late(path: Path) -> None:
    damage_data(path, 4 * MIB - 1)


def damage_a_place(path: Path) -> None:
    """An entry of a table leads to another cluster that is there, or says that none is."""
    flip(path, second_table(path) + 8 + 6, bit=5)


def damage_a_refcount(path: Path) -> None:
    """Where no reader looks, but a digest does."""
    with path.open("rb") as file:
        [table] = struct.unpack_from(">Q", os.pread(file.fileno(), 8, 48))
        [block] = struct.unpack_from(">Q", os.pread(file.fileno(), 8, table))
    flip(path, block + 1)


def require_full(disk: BackedUpDisk) -> None:
    """The next rescan has to become one, and a restore of it the disk."""
    entry = disk.backup(RESCAN)
    assert (told(entry), entry.parent, entry.bytes_changed) == (("full", "image-damaged"), None, disk.size)
    assert disk.restored() == disk.content()
    disk.write(b"later", 0)
    assert told(disk.backup()) == ("incremental", None)
    assert disk.restored() == disk.content()


# --- bits that flip ---


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("damage", [damage_data_early, damage_data_late, damage_a_place, damage_a_refcount])
def test_on_a_chain_that_rotted_a_full_backup_is_made_and_can_be_restored(
    disk: BackedUpDisk, damage: Callable[[Path], None], number: int
) -> None:
    damage(path_of(disk, number))
    with pytest.raises(FormatError):
        disk.restored()
    require_full(disk)


def test_what_rotted_is_not_mended_by_storing_what_changed_there(disk: BackedUpDisk) -> None:
    """The rest of its chunk is needed."""
    damage_data(path_of(disk, 0), 9 * CLUSTER)
    disk.write(b"changed", 9 * CLUSTER)
    require_full(disk)


def test_the_reason_names_what_rotted(disk: BackedUpDisk) -> None:
    damage_data(path_of(disk, 1), 2 * MIB)
    reason = disk.backup(RESCAN).reason
    assert reason is not None
    assert reason.words.startswith(f"{path_of(disk, 1)}: bytes 0..1048576: expected BLAKE3 ")


def test_a_rescan_of_a_new_epoch_proves_too(disk: BackedUpDisk, caplog: pytest.LogCaptureFixture) -> None:
    damage_data(path_of(disk, 0), 100)
    disk.write_behind_our_back(b"stranger", 3 * MIB)
    assert told(disk.backup()) == ("full", "image-damaged")
    assert f"disk sda: a full backup is made instead: {path_of(disk, 0)}: " in caplog.text
    assert disk.restored() == disk.content()


def test_an_image_that_the_system_cannot_read_makes_it_full_as_well(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, algorithm: DigestAlgorithm, offset: int, length: int) -> bytes:
        if offset == CHUNK_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest_at(fd, algorithm, offset, length)

    monkeypatch.setattr(proof, "digest_at", refuse)
    assert told(disk.backup(RESCAN)) == ("full", "image-damaged")


# --- what is no damage ---


def test_on_a_sound_chain_it_stays_a_rescan(disk: BackedUpDisk) -> None:
    disk.write(b"changed", 9 * CLUSTER)
    entry = disk.backup(RESCAN)
    assert (told(entry), entry.bytes_changed, entry.parent) == (("rescan", None), CLUSTER, "2")
    assert disk.restored() == disk.content()


def test_what_a_newer_image_hides_may_rot() -> None:
    with quick_folder() as folder:
        disk = BackedUpDisk(folder, SIZE)
        disk.write(no_ascii(SIZE), 0)
        disk.backup()
        disk.write(no_ascii(3 * MIB), MIB)
        disk.backup()
        damage_data(path_of(disk, 0), 5 * MIB // 2)
        disk.write(b"changed", 0)
        entry = disk.backup(RESCAN)
        assert (told(entry), entry.bytes_changed) == (("rescan", None), CLUSTER)
        assert disk.restored() == disk.content()
        disk.close()


def test_each_chunk_is_judged_once(disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = proof.ChunkProof._judge
    judged = Counter[tuple[int, int]]()

    def counted(self: proof.ChunkProof, chunk: int, found: bytes) -> None:
        judged[id(self), chunk] += 1
        judge(self, chunk, found)

    monkeypatch.setattr(proof.ChunkProof, "_judge", counted)
    assert told(disk.backup(RESCAN)) == ("rescan", None)
    assert set(judged.values()) == {1}
    assert len(judged) > 4


# --- without digests ---


def test_an_image_that_never_had_digests_of_chunks_is_compared_as_it_is(one_chunk: BackedUpDisk) -> None:
    vouch_as_a_whole(one_chunk, 0)
    damage_data(path_of(one_chunk, 0), 2 * CLUSTER)
    entry = one_chunk.backup(RESCAN)
    assert (told(entry), entry.bytes_changed) == (("rescan", None), CLUSTER)


@pytest.mark.parametrize("rotten", [True, False])
@pytest.mark.parametrize("lost", [True, False])
def test_an_image_whose_digests_are_lost_or_damaged_is_proven_as_a_whole(
    one_chunk: BackedUpDisk, lost: bool, rotten: bool
) -> None:
    if lost:
        digests_of(one_chunk, 0).unlink()
    else:
        flip(digests_of(one_chunk, 0), 0)
    if not rotten:
        assert told(one_chunk.backup(RESCAN)) == ("rescan", None)
    else:
        damage_data(path_of(one_chunk, 0), 2 * CLUSTER)
        require_full(one_chunk)


def test_without_the_package_nothing_is_proven_and_the_log_says_so(
    one_chunk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_blake3(monkeypatch)
    needs_it = one_chunk.manifest().backups[0].digest_algorithm is DigestAlgorithm.BLAKE3
    damage_data(path_of(one_chunk, 0), 2 * CLUSTER)
    assert told(one_chunk.backup(RESCAN)) == (("rescan", None) if needs_it else ("full", "image-damaged"))
    assert ("what the disk is compared with is not proven" in caplog.text) is needs_it


def test_data_that_cannot_be_decompressed_is_noticed_without_digests(one_chunk: BackedUpDisk) -> None:
    one_chunk.write(b"much the same" * 5000, 0)
    one_chunk.backup(FULL, compression="zlib")
    path = path_of(one_chunk, 1)
    run = stored_at(path, 0)
    assert run.kind is Kind.COMPRESSED
    with path.open("r+b") as file:
        file.seek(run.host_offset)
        file.write(b"\xff" * 16)
    vouch_as_a_whole(one_chunk, 1)
    entry = one_chunk.backup(RESCAN)
    assert told(entry) == ("full", "image-damaged")
    assert entry.reason is not None
    assert "compressed cluster of byte" in entry.reason.words
