"""What is restored, where to, and what is refused before anything has its name."""

from __future__ import annotations

import dataclasses
import errno
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.errors import (
    AlreadyExists,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    StorageError,
)
from lmdbitmap.qcow2 import CompressionType
from lmdbitmap.repository import backup_chain, manifest
from lmdbitmap.repository.backup_chain import open_backup
from lmdbitmap.repository.manifest import BackupEntry, BackupType, chain_to
from lmdbitmap.restoring.restore import RestoreResult, restore
from lmdbitmap.system import linux
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.helpers.backed_up import DIFFERENTIAL, FULL, BackedUpDisk
from tests.helpers.tracked import NAME, quick_folder
from tests.unit.test_digest_algorithms import forget_blake3
from tests.unit.test_verify import change_entry, vouch_as_a_whole

KIB = 1 << 10
MIB = 1 << 20
SIZE = 300 * KIB + 5


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as found:
        yield found


@pytest.fixture
def disk(folder: Path) -> Iterator[BackedUpDisk]:
    """Three backups: full, incremental, incremental; the digests of the second are of another kind."""
    made = BackedUpDisk(folder, SIZE)
    made.write(os.urandom(100 * KIB), 50 * KIB)
    made.backup(digest="blake3")
    made.write(os.urandom(20 * KIB), 140 * KIB)
    made.backup(digest="sha256")
    made.zero(60 * KIB, 50 * KIB)
    made.write(b"end", SIZE - 3)
    made.backup(digest="blake3")
    yield made
    made.close()


def restored(disk: BackedUpDisk, at: str | None = None, verify: bool = True) -> RestoreResult:
    return restore(disk.folder / "backups", NAME, disk.folder / "out.raw", at=at, verify=verify)


def out(disk: BackedUpDisk) -> Path:
    return disk.folder / "out.raw"


def path_of(disk: BackedUpDisk, number: int) -> Path:
    return Path(disk.backup_folder().path_of(disk.manifest().backups[number].file))


# --- what is restored ---


def test_the_newest_backup_is_restored_to_the_byte(disk: BackedUpDisk) -> None:
    result = restored(disk)
    assert out(disk).read_bytes() == disk.content()
    assert (result.entry.id, result.path) == ("3", str(out(disk)))
    assert out(disk).stat().st_mode & 0o777 == 0o600


def test_an_earlier_backup_is_restored_by_its_id(disk: BackedUpDisk) -> None:
    before = disk.content()
    disk.write(b"later", 0)
    disk.backup(DIFFERENTIAL)
    assert restored(disk, at="3").entry.id == "3"
    assert out(disk).read_bytes() == before


@pytest.fixture
def compressed(folder: Path) -> Iterator[BackedUpDisk]:
    """Four backups: with zlib, with zstd, plain, and with zlib again."""
    made = BackedUpDisk(folder, SIZE)
    made.write(os.urandom(9) * 10_000, 50 * KIB)
    made.backup(compression="zlib")
    made.write(os.urandom(9) * 2_000, 140 * KIB)
    made.backup(compression="zstd:9")
    made.zero(60 * KIB, 30 * KIB)
    made.write(os.urandom(5000), 55 * KIB)
    made.backup()
    made.write(b"end" * 1000, SIZE - 3000)
    made.backup(compression="zlib:1")
    yield made
    made.close()


def test_a_chain_of_compressed_and_plain_images_is_restored_to_the_byte(compressed: BackedUpDisk) -> None:
    assert [entry.compression for entry in compressed.manifest().backups] == [
        CompressionType.ZLIB,
        CompressionType.ZSTD,
        None,
        CompressionType.ZLIB,
    ]
    truth = compressed.content()
    result = restored(compressed)
    assert out(compressed).read_bytes() == truth
    assert result.bytes_written == SIZE - truth_zeroes(truth)
    assert path_of(compressed, 0).stat().st_size < 64 * KIB


def truth_zeroes(truth: bytes) -> int:
    """Bytes in clusters of 4 KiB, the smallest there are, that are all zero."""
    clusters = (truth[start : start + 4096] for start in range(0, len(truth), 4096))
    return sum(len(cluster) for cluster in clusters if not any(cluster))


def test_a_compressed_backup_is_a_block_device_of_which_any_part_is_read(compressed: BackedUpDisk) -> None:
    truth = compressed.content()
    entries = chain_to(compressed.manifest(), "4")
    with backup_chain.opened(compressed.backup_folder(), entries) as disk:
        for offset in range(0, SIZE - 7000, 6001):
            assert disk.pread(7000, offset) == truth[offset : offset + 7000]
        zero = 0
        for part in disk.allocation(0, SIZE):
            zero += part.length if part.zero else 0
        assert zero == truth_zeroes(truth)


def test_what_cannot_be_decompressed_fails_the_restore_also_without_digests(compressed: BackedUpDisk) -> None:
    image = path_of(compressed, 0)
    with open(image, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 1000)
    with pytest.raises(FormatError, match="compressed cluster of byte") as refused:
        restored(compressed, verify=False)
    assert str(image) in str(refused.value)
    assert not out(compressed).exists()


def test_without_the_library_for_zstd_nothing_is_begun(
    compressed: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("backports", "compression"):
        monkeypatch.setitem(sys.modules, package, None)
    assert restored(compressed, at="1").entry.compression is CompressionType.ZLIB
    out(compressed).unlink()
    before = sorted(os.listdir(compressed.folder))
    with pytest.raises(NotFound, match=r"run: pip install 'lmdbitmap\[zstd\]'"):
        restored(compressed)
    assert sorted(os.listdir(compressed.folder)) == before


def test_a_backup_without_the_library_for_zstd_is_refused_before_anything_is_done(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("backports", "compression"):
        monkeypatch.setitem(sys.modules, package, None)
    before = disk.checkpoints(), disk.files()
    with pytest.raises(NotFound, match="pip install"):
        disk.backup(compression="zstd")
    assert (disk.checkpoints(), disk.files()) == before


def test_without_the_package_for_digests_a_restore_is_refused_unless_it_leaves_them_out(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_blake3(monkeypatch)
    refusal = refused(disk)
    assert isinstance(refusal, NotFound)
    assert str(refusal).startswith(f"{path_of(disk, 0)}: expected the package blake3, which BLAKE3 digests ")
    assert refusal.next_step == ("run: pip install 'lmdbitmap[fast]', or restore without proof: --no-verify")
    assert restored(disk, verify=False).entry.id == "3"
    assert out(disk).read_bytes() == disk.content()


def test_an_open_backup_cannot_be_proven_without_the_package_for_digests(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_blake3(monkeypatch)
    repository = disk.folder / "backups"
    with pytest.raises(NotFound, match="expected the package blake3"), open_backup(repository, NAME):
        raise AssertionError("nothing is served unproven")
    with open_backup(repository, NAME, verify=False) as chain:
        assert chain.pread(SIZE, 0) == disk.content()


def test_what_reads_as_zeroes_takes_no_space(tmp_path: Path) -> None:
    disk = BackedUpDisk(tmp_path, 64 * MIB, granularity_bits=16)
    disk.write(b"x" * 4 * KIB, 32 * MIB)
    disk.backup()
    assert restored(disk).bytes_written == 64 * KIB
    status = out(disk).stat()
    assert (status.st_size, status.st_blocks * 512 <= 128 * KIB) == (64 * MIB, True)
    disk.close()


def test_a_repository_can_be_moved(disk: BackedUpDisk) -> None:
    (disk.folder / "backups").rename(disk.folder / "moved")
    assert disk.restored(to="moved") == disk.content()


def test_a_repository_that_cannot_be_written_is_read(disk: BackedUpDisk) -> None:
    folder = Path(disk.backup_folder().path)
    before = sorted(os.listdir(folder))
    (folder / "lock").unlink()
    restored(disk)
    assert sorted([*os.listdir(folder), "lock"]) == before


@pytest.mark.parametrize("refusal", [errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_what_cannot_be_shared_is_copied(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def refuse(*_: object) -> int:
        seen.append(refusal)
        raise OSError(refusal, os.strerror(refusal))

    seen: list[int] = []
    monkeypatch.setattr(linux.fcntl, "ioctl", refuse)  # type: ignore[attr-defined]
    restored(disk)
    assert out(disk).read_bytes() == disk.content()
    assert seen


def test_progress_ends_at_the_disks_size(disk: BackedUpDisk) -> None:
    said: list[tuple[int, int]] = []
    restore(disk.folder / "backups", NAME, out(disk), progress=lambda *told: said.append(told))
    assert said[-1] == (SIZE, SIZE)


# --- where to ---


def test_an_empty_file_is_replaced(disk: BackedUpDisk) -> None:
    out(disk).touch()
    restored(disk)
    assert out(disk).read_bytes() == disk.content()


def test_a_file_with_something_in_it_is_refused_and_stays(disk: BackedUpDisk) -> None:
    out(disk).write_bytes(b"mine")
    with pytest.raises(AlreadyExists, match="exists, and is not empty; name a new file"):
        restored(disk)
    assert out(disk).read_bytes() == b"mine"


def test_a_file_that_appears_meanwhile_stays(disk: BackedUpDisk) -> None:
    def appear(done: int, total: int) -> None:
        out(disk).write_bytes(b"mine")

    with pytest.raises(AlreadyExists):
        restore(disk.folder / "backups", NAME, out(disk), progress=appear)
    assert out(disk).read_bytes() == b"mine"
    assert [path.name for path in disk.folder.glob("out.raw*")] == ["out.raw"]


def test_a_folder_is_refused(disk: BackedUpDisk) -> None:
    out(disk).mkdir()
    with pytest.raises(InvalidArgument, match="is a folder; name a new file in it"):
        restored(disk)


def test_a_place_in_no_folder_is_not_found(disk: BackedUpDisk) -> None:
    with pytest.raises(NotFound):
        restore(disk.folder / "backups", NAME, disk.folder / "nowhere" / "out.raw")


def test_a_character_device_is_refused(disk: BackedUpDisk) -> None:
    with pytest.raises(InvalidArgument):
        restore(disk.folder / "backups", NAME, "/dev/null")


@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
def test_a_block_device_of_the_disks_size_is_written_all_over(tmp_path: Path) -> None:
    disk = BackedUpDisk(tmp_path, MIB)
    disk.write(b"x" * 300 * KIB, 100 * KIB)
    disk.backup()
    disk.zero(200 * KIB, 100 * KIB)
    disk.backup()
    with loop_node(tmp_path, MIB) as node:
        node.write_bytes(b"old" * (MIB // 3))
        restore(disk.folder / "backups", NAME, node)
        assert node.read_bytes() == disk.content()
    disk.close()


@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
@pytest.mark.parametrize("wrong", ["size", "digest"])
def test_a_block_device_is_not_touched_before_everything_is_known_to_be_right(
    tmp_path: Path, wrong: str
) -> None:
    disk = BackedUpDisk(tmp_path, MIB)
    disk.write(b"x" * 300 * KIB, 100 * KIB)
    disk.backup()
    if wrong == "digest":
        flip(path_of(disk, 0), -1)
    size = 2 * MIB if wrong == "size" else MIB
    with loop_node(tmp_path, size) as node:
        node.write_bytes(b"o" * size)
        with pytest.raises((FormatError, InvalidArgument)):
            restore(disk.folder / "backups", NAME, node)
        assert node.read_bytes() == b"o" * size
    disk.close()


# --- what is refused ---


def refused(disk: BackedUpDisk, at: str | None = None, verify: bool = True) -> LmdbitmapError:
    """The refusal of a restore, which leaves nothing behind."""
    with pytest.raises(LmdbitmapError) as refusal:
        restored(disk, at, verify)
    assert list(disk.folder.glob("out.raw*")) == []
    return refusal.value


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def accept_bytes(disk: BackedUpDisk, number: int) -> BackupEntry:
    """Make the manifest vouch for an image as it is now, as an attacker would."""
    vouch_as_a_whole(disk, number)
    return disk.manifest().backups[number]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_wrong_bit_in_any_image_of_the_chain_is_found(disk: BackedUpDisk, number: int) -> None:
    flip(path_of(disk, number), 5000)
    refusal = refused(disk)
    assert isinstance(refusal, FormatError)
    path = path_of(disk, number)
    assert refusal.place == f"{path}: bytes 0..{path.stat().st_size}"
    assert refusal.expected.startswith(["BLAKE3 ", "SHA-256 ", "BLAKE3 "][number])


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("lack", ["never made", "gone", "damaged"])
def test_without_digests_by_chunks_one_wrong_bit_is_found_by_the_digest_of_the_whole(
    disk: BackedUpDisk, number: int, lack: str
) -> None:
    lose_digests(disk, number, lack)
    assert restored(disk).entry.id == "3"
    out(disk).unlink()
    flip(path_of(disk, number), 5000)
    refusal = refused(disk)
    assert isinstance(refusal, FormatError)
    assert refusal.place == str(path_of(disk, number))
    assert refusal.expected == f"SHA-256 {disk.manifest().backups[number].digest}"


def lose_digests(disk: BackedUpDisk, number: int, lack: str = "never made") -> None:
    chunks = disk.manifest().backups[number].chunks
    assert chunks is not None
    path = Path(disk.backup_folder().path_of(chunks.file))
    if lack == "never made":
        vouch_as_a_whole(disk, number)
    elif lack == "gone":
        path.unlink()
    else:
        flip(path, 0)


FROM_ELSEWHERE = "get the file from a copy of the repository, or use another repository"


@pytest.mark.parametrize("lack", [None, "gone"])
@pytest.mark.parametrize(("number", "kind", "spare"), [
    (0, None, None), (1, None, "1"), (2, None, "2"), (0, FULL, "4"), (2, FULL, "4"),
    (0, DIFFERENTIAL, None), (1, DIFFERENTIAL, "4"),
])  # fmt: skip
def test_where_an_image_is_damaged_the_newest_backup_without_it_is_named(
    disk: BackedUpDisk, number: int, kind: BackupType | None, spare: str | None, lack: str | None
) -> None:
    if kind is not None:
        disk.backup(kind)
    if lack is not None:
        lose_digests(disk, number, lack)
    flip(path_of(disk, number), 5000)
    step = refused(disk, at="3").next_step
    if spare is None:
        assert step == FROM_ELSEWHERE
    else:
        assert step.startswith(
            f"use backup {spare}, the newest that does without this file, or get the file "
        )
        assert restored(disk, at=spare).entry.id == spare


def test_where_nobody_can_say_which_backups_there_are_none_is_named(disk: BackedUpDisk) -> None:
    newest = disk.manifest().backups[-1]
    assert disk.backup_folder().step_without(newest).startswith("use backup 2, ")
    Path(disk.backup_folder().path_of("manifest.json")).write_bytes(b"rot")
    assert disk.backup_folder().step_without(newest) == FROM_ELSEWHERE


def test_a_cut_image_or_one_with_another_header_has_the_same_next_step(disk: BackedUpDisk) -> None:
    change_entry(disk, 2, disk_size=SIZE + 512)
    assert refused(disk).next_step.startswith("use backup 2, ")
    os.truncate(path_of(disk, 1), 10000)
    assert refused(disk, at="2").next_step.startswith("use backup 1, ")


def test_digests_can_be_left_out(disk: BackedUpDisk) -> None:
    flip(path_of(disk, 0), 4096 + 10)
    restored(disk, verify=False)
    assert out(disk).read_bytes() != disk.content()


def test_an_image_that_is_not_in_the_chain_does_not_matter(disk: BackedUpDisk) -> None:
    restored(disk, at="2")
    as_of_then = out(disk).read_bytes()
    out(disk).unlink()
    flip(path_of(disk, 2), 5000)
    restored(disk, at="2")
    assert out(disk).read_bytes() == as_of_then != disk.content()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_image_is_named(disk: BackedUpDisk, number: int) -> None:
    path = path_of(disk, number)
    path.unlink()
    refusal = refused(disk)
    assert isinstance(refusal, NotFound)
    assert str(path) in refusal.problem


def test_a_cut_image_is_named_without_digests_too(disk: BackedUpDisk) -> None:
    os.truncate(path_of(disk, 1), 10000)
    assert "found 10000 bytes" in str(refused(disk, verify=False))


def test_a_backing_file_name_is_compared_and_never_followed(disk: BackedUpDisk) -> None:
    """The image and the manifest agree with each other, but the name leads to a file that we may not read."""
    path = path_of(disk, 1)
    content = bytearray(path.read_bytes())
    offset, length = struct.unpack_from(">QI", content, 8)
    content[offset : offset + length] = b"/etc/passwd".ljust(length, b"x")[:length]
    path.write_bytes(content)
    accept_bytes(disk, 1)
    refusal = refused(disk)
    assert isinstance(refusal, FormatError)
    assert refusal.place == f"{path}: backing file name"
    assert refusal.expected == "000001-full.qcow2"


def test_an_image_of_another_size_than_the_manifest_says_is_refused(disk: BackedUpDisk) -> None:
    change_entry(disk, 2, disk_size=SIZE + 512)
    assert "image size" in str(refused(disk))


@pytest.mark.parametrize("position", [0, 7, 20, 40, 48, 72, 79])
def test_a_header_that_lies_is_refused_in_our_words(disk: BackedUpDisk, position: int) -> None:
    path = path_of(disk, 0)
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    accept_bytes(disk, 0)
    assert str(path) in str(refused(disk))


def test_an_unknown_backup_is_not_found(disk: BackedUpDisk) -> None:
    said = "disk sda has no backup 17; name one of 1 to 3; `lmdbitmap ls REPO` tells of each"
    assert str(refused(disk, at="17")) == said
    assert str(refused(disk, at="1999-12-31")).startswith(
        "disk sda has no backup as old as 1999-12-31; name one"
    )


def test_a_disk_without_backups_is_not_found_and_the_others_are_named(disk: BackedUpDisk) -> None:
    with pytest.raises(NotFound, match=r"has no backup of a disk called 'sdb'; .* backups of sda"):
        restore(disk.folder / "backups", "sdb", out(disk))


def test_a_repository_that_is_not_there_is_not_found(disk: BackedUpDisk) -> None:
    with pytest.raises(NotFound, match="nowhere does not exist"):
        restore(disk.folder / "nowhere", NAME, out(disk))


def test_a_name_that_leaves_the_repository_is_refused(disk: BackedUpDisk) -> None:
    with pytest.raises(InvalidArgument):
        restore(disk.folder / "backups" / "x", "../sda", out(disk))


def test_a_manifest_of_no_backups_is_not_found(disk: BackedUpDisk) -> None:
    path = Path(disk.backup_folder().path_of("manifest.json"))
    path.write_bytes(manifest.encode(dataclasses.replace(disk.manifest(), backups=())))
    assert isinstance(refused(disk), NotFound)


def test_a_listener_that_raises_cancels_the_restore(disk: BackedUpDisk) -> None:
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(disk.folder / "backups", NAME, out(disk), progress=cancel)
    assert list(disk.folder.glob("out.raw*")) == []


def test_a_full_target_fails_in_our_words(disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(os, "pwrite", refuse)
    refusal = refused(disk)
    assert isinstance(refusal, StorageError)
    assert (refusal.errno, refusal.place) == (errno.ENOSPC, str(out(disk)))


def test_a_full_chain_restores_from_itself_alone(disk: BackedUpDisk) -> None:
    disk.backup(FULL)
    for number in range(3):
        path_of(disk, number).unlink()
    restored(disk)
    assert out(disk).read_bytes() == disk.content()
