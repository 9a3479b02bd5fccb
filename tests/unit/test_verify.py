"""verify: every flipped bit is found and named by file and bytes, every structure that lies, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import shutil
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.copying.hashing import CHUNK_BYTES, digest_at
from lmdbitmap.errors import Busy, FormatError, InvalidArgument, NotFound, error_from_os
from lmdbitmap.repository import verify as verify_module
from lmdbitmap.repository.backup_files import sha256_of
from lmdbitmap.repository.manifest import BackupEntry, BackupType
from lmdbitmap.repository.manifest_file import MANIFEST, NEXT
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.verify import MAX_FLAWS, Flaw, VerifyResult, verify
from lmdbitmap.restoring.restore import restore
from lmdbitmap.system import files
from tests.helpers.backed_up import BackedUpDisk, Repositories
from tests.helpers.bad_disk import BAD_DISK, refuse
from tests.helpers.support import no_ascii
from tests.helpers.tracked import NAME, quick_folder
from tests.unit.test_digest_algorithms import forget_blake3

MIB = 1 << 20
SIZE = 20 * MIB
"""More than one batch of chunks."""


CHAINS = {"sha256": ["sha256"] * 3, "blake3": ["blake3"] * 3, "mixed": ["sha256", "blake3", "sha256"]}
"""What the digests of its backups are made with."""


@contextmanager
def backed_up(digests: list[str]) -> Iterator[BackedUpDisk]:
    """A disk with a full backup and two increments."""
    with quick_folder() as folder, closing(BackedUpDisk(folder, SIZE)) as made:
        made.write(no_ascii(SIZE), 0)
        for number, digest in enumerate(digests):
            made.write(no_ascii(5 * MIB // 2), number * MIB)
            assert made.backup(digest=digest).digest_algorithm.value == digest
        yield made


@pytest.fixture(scope="module", params=CHAINS)
def made_once(request: pytest.FixtureRequest) -> Iterator[BackedUpDisk]:
    with backed_up(CHAINS[request.param]) as made:
        yield made


@pytest.fixture
def disk(made_once: BackedUpDisk) -> Iterator[Repositories]:
    """Backups of a disk, to be damaged as one likes: each test has a copy of them."""
    with quick_folder() as folder:
        shutil.copytree(made_once.folder / "backups", folder / "backups")
        yield Repositories(folder)


@pytest.fixture(params=CHAINS)
def live_disk(request: pytest.FixtureRequest) -> Iterator[BackedUpDisk]:
    """For who backs it up once more."""
    with backed_up(CHAINS[request.param]) as made:
        yield made


def verified(disk: Repositories, at: str | None = None) -> VerifyResult:
    return verify(disk.folder / "backups", NAME, at=at)


def path_of(disk: Repositories, number: int) -> Path:
    return Path(disk.backup_folder().path_of(disk.manifest().backups[number].file))


def digests_of(disk: Repositories, number: int) -> Path:
    chunks = disk.manifest().backups[number].chunks
    assert chunks is not None
    return Path(disk.backup_folder().path_of(chunks.file))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def change_entry(disk: Repositories, number: int, **changes: object) -> None:
    manifest = disk.manifest()
    entries = list(manifest.backups)
    entries[number] = dataclasses.replace(entries[number], **changes)  # type: ignore[arg-type]
    disk.backup_folder().replace_manifest(dataclasses.replace(manifest, backups=tuple(entries)))


def test_sound_backups_are_read_whole(disk: Repositories) -> None:
    result = verified(disk)
    entries = disk.manifest().backups
    assert (result.is_sound, result.flaws, result.flaw_count) == (True, (), 0)
    assert (result.disks, result.image_count) == ((NAME,), 3)
    assert result.bytes_read == sum(entry.bytes_stored for entry in entries)


@pytest.fixture
def bad_sector(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Has the disk under a file be unable to read the byte at an offset from then on."""
    bad: dict[str, int] = {}

    def refusing(read: Callable[..., Any], length_of: Callable[[Any], int]) -> Callable[..., Any]:
        def refuse(fd: int, into: Any, offset: int) -> Any:
            at = bad.get(os.readlink(f"/proc/self/fd/{fd}"))
            if at is not None and offset <= at < offset + length_of(into):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(fd, into, offset)

        return refuse

    def refuse_to_read_all(path: str, limit: int) -> bytes:
        if path in bad:
            raise error_from_os(path, OSError(errno.EIO, os.strerror(errno.EIO)))
        return read_bounded(path, limit)

    read_bounded = files.read_bounded
    monkeypatch.setattr(files, "read_bounded", refuse_to_read_all)
    monkeypatch.setattr(os, "pread", refusing(os.pread, int))
    monkeypatch.setattr(os, "preadv", refusing(os.preadv, lambda buffers: sum(map(len, buffers))))
    return lambda path, offset: bad.update({str(path): offset})


def test_what_the_disk_cannot_read_is_a_flaw_and_the_rest_is_proven(
    disk: Repositories, bad_sector: Callable[[Path, int], None]
) -> None:
    bad_sector(path_of(disk, 0), 3 * MIB + 7)
    flip(path_of(disk, 0), 5 * MIB)
    flip(path_of(disk, 1), MIB)
    result = verified(disk)
    assert [(flaw.backup, flaw.offset, flaw.length) for flaw in result.flaws] == [
        ("1", 5 * MIB, MIB), ("1", 3 * MIB, MIB), ("2", MIB, MIB)
    ]  # fmt: skip
    assert result.flaws[1].problem.endswith("bytes 3145728..4194304: the disk cannot read the data")
    assert result.image_count == 3


@pytest.mark.parametrize("what", ["header", "digests", "tables"])
def test_whatever_the_disk_cannot_read_of_an_image_is_a_flaw(
    disk: Repositories, bad_sector: Callable[[Path, int], None], what: str
) -> None:
    path = digests_of(disk, 0) if what == "digests" else path_of(disk, 0)
    bad_sector(path, 0 if what != "tables" else path.stat().st_size - 1)
    result = verified(disk)
    assert {(flaw.backup, flaw.path) for flaw in result.flaws} == {("1", str(path))}
    assert "Input/output error" in result.flaws[0].problem or what == "tables"


@BAD_DISK
@pytest.mark.parametrize("what", ["image", "digests"])
def test_what_the_disk_cannot_even_find_is_a_flaw_and_the_rest_is_proven(
    disk: Repositories, what: str, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(disk, 0) if what == "image" else digests_of(disk, 0)
    refuse(monkeypatch, path, error)
    flip(path_of(disk, 1), MIB)
    result = verified(disk)
    assert [(flaw.backup, flaw.path) for flaw in result.flaws] == [
        ("1", str(path)), ("2", str(path_of(disk, 1)))
    ]  # fmt: skip
    assert os.strerror(error) in result.flaws[0].problem


@BAD_DISK
def test_digests_that_the_disk_cannot_even_find_keep_nothing_from_being_restored(
    disk: Repositories, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, digests_of(disk, 0), error)
    restore(disk.folder / "backups", NAME, disk.folder / "out.raw")
    assert (disk.folder / "out.raw").stat().st_size == SIZE


def test_digests_that_the_disk_cannot_read_keep_nothing_from_being_restored(
    disk: Repositories, bad_sector: Callable[[Path, int], None]
) -> None:
    bad_sector(digests_of(disk, 0), 0)
    restore(disk.folder / "backups", NAME, disk.folder / "out.raw")
    assert (disk.folder / "out.raw").stat().st_size == SIZE


@pytest.mark.parametrize("by", ["progress", "flaw"])
def test_whoever_gives_up_does_not_wait_for_what_was_not_begun(
    disk: Repositories, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """On a slow disk that could be a minute."""

    def slow(*where: Any) -> bytes:
        read.append(where)
        time.sleep(0.01)
        return digest_at(*where)

    def cancel(done: int, total: int) -> NoReturn:
        raise KeyboardInterrupt

    read: list[object] = []
    monkeypatch.setattr(verify_module, "digest_at", slow)
    monkeypatch.setattr(verify_module, "_BATCH_BYTES", MIB)
    monkeypatch.setattr(verify_module, "thread_count", lambda: 1)
    before = set(threading.enumerate())
    if by == "progress":
        with pytest.raises(KeyboardInterrupt):
            verify(disk.folder / "backups", progress=cancel)
    else:
        flip(path_of(disk, 0), 4 * MIB)
        with pytest.raises(FormatError, match="found a flaw"):
            prune(disk.folder / "backups", keep=Retention(last=1))
    assert set(threading.enumerate()) <= before
    assert 4 <= len(read) <= 7


def test_short_reads_are_no_damage(disk: Repositories, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system in user space may give less than was asked for."""
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 100), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:100_000]], offset))
    assert verified(disk).flaws == ()


def test_progress_comes_to_its_end(disk: Repositories) -> None:
    told: list[tuple[int, int]] = []
    verify(disk.folder / "backups", progress=lambda *news: told.append(news))
    total = sum(entry.bytes_stored for entry in disk.manifest().backups)
    assert told[-1] == (total, total)
    assert len(told) >= 2


@pytest.mark.parametrize("chunk", [0, 1, 15, 16, 20])
def test_one_flipped_bit_is_named_by_file_and_chunk(disk: Repositories, chunk: int) -> None:
    stored = disk.manifest().backups[0].bytes_stored
    place = min(chunk * CHUNK_BYTES + 300_000, stored - 1)
    flip(path_of(disk, 0), place)
    [flaw] = [flaw for flaw in verified(disk).flaws if flaw.offset is not None]
    assert (flaw.disk, flaw.backup, flaw.path) == (NAME, "1", str(path_of(disk, 0)))
    assert flaw.offset == chunk * CHUNK_BYTES
    assert flaw.length == min(CHUNK_BYTES, stored - flaw.offset)
    assert f": bytes {flaw.offset}..{flaw.offset + flaw.length}: " in flaw.problem


def test_all_damage_is_told_and_neighbouring_chunks_together(disk: Repositories) -> None:
    for number, place in [(0, 3 * MIB), (0, 4 * MIB + 5), (0, 7 * MIB), (2, MIB)]:
        flip(path_of(disk, number), place)
    found = [(flaw.backup, flaw.offset, flaw.length) for flaw in verified(disk).flaws]
    assert found == [("1", 3 * MIB, 2 * MIB), ("1", 7 * MIB, MIB), ("3", MIB, MIB)]


def test_only_what_a_restore_needs_is_looked_at(disk: Repositories) -> None:
    flip(path_of(disk, 2), MIB)
    result = verified(disk, at="2")
    assert (result.is_sound, result.image_count) == (True, 2)
    assert not verified(disk, at="3").is_sound


def test_a_missing_or_cut_image_is_a_flaw_and_the_others_are_looked_at(disk: Repositories) -> None:
    path_of(disk, 0).unlink()
    os.truncate(path_of(disk, 1), 100)
    flip(path_of(disk, 2), MIB)
    problems = [(flaw.backup, flaw.problem) for flaw in verified(disk).flaws]
    assert [backup for backup, _ in problems] == ["1", "2", "3"]
    assert problems[0][1].endswith("000001-full.qcow2 does not exist")
    assert problems[1][1].endswith("found 100 bytes")


def vouch_as_a_whole(disk: Repositories, number: int) -> None:
    """Have the manifest vouch for the image as it is, as before there were digests of chunks."""
    path = path_of(disk, number)
    with path.open("rb") as image:
        sha256 = sha256_of(image.fileno())
    change_entry(disk, number, sha256=sha256, bytes_stored=path.stat().st_size, chunks=None)


# --- structure ---


def rewrite(disk: Repositories, number: int, offset: int, data: bytes) -> None:
    """Change an image, and make its digests those of what it is now."""
    path = path_of(disk, number)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    vouch_as_a_whole(disk, number)


def first_l2_entry(disk: Repositories) -> int:
    with path_of(disk, 0).open("rb") as file:
        header = file.read(104)
        (l1_offset,) = struct.unpack_from(">Q", header, 40)
        file.seek(l1_offset)
        (l1_entry,) = struct.unpack(">Q", file.read(8))
    return int(l1_entry & 0x00FFFFFFFFFFFE00)


def test_an_entry_that_leads_out_of_the_file_is_found_though_the_digests_fit(disk: Repositories) -> None:
    rewrite(disk, 0, first_l2_entry(disk) + 800, struct.pack(">Q", 1 << 63 | 1 << 40))
    [flaw] = verified(disk).flaws
    assert (flaw.backup, flaw.offset) == ("1", None)
    assert "L2 entry of byte" in flaw.problem
    assert "data inside the file" in flaw.problem


def test_a_parent_that_is_not_the_manifests_is_found(disk: Repositories) -> None:
    change_entry(disk, 2, parent="1")
    [flaw] = verified(disk).flaws
    assert flaw.backup == "3"
    assert "backing file name: expected 000001-full.qcow2, found '000002-incremental.qcow2'" in flaw.problem


def test_another_size_is_found(disk: Repositories) -> None:
    change_entry(disk, 1, disk_size=SIZE + 4096)
    [flaw] = verified(disk).flaws
    assert "image size: expected" in flaw.problem


# --- digests of chunks that cannot be used ---


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "none"])
def test_without_digests_of_chunks_the_image_is_proven_as_a_whole(disk: Repositories, damage: str) -> None:
    digests = digests_of(disk, 0)
    if damage == "gone":
        digests.unlink()
    elif damage == "cut":
        os.truncate(digests, 32)
    elif damage == "flipped":
        flip(digests, 40)
    else:
        vouch_as_a_whole(disk, 0)
    flaws = verified(disk).flaws
    assert [flaw.path for flaw in flaws] == ([] if damage == "none" else [str(digests)])
    flip(path_of(disk, 0), 7 * MIB)
    whole = verified(disk).flaws[-1]
    assert (whole.path, whole.offset) == (str(path_of(disk, 0)), 0)
    assert whole.length == path_of(disk, 0).stat().st_size
    assert "expected SHA-256" in whole.problem


# --- repositories ---


def test_what_a_restore_of_a_time_needs_is_proven_by_that_time(disk: Repositories) -> None:
    second = disk.manifest().backups[1]
    moment = datetime.fromtimestamp(second.time_ns // 10**9, timezone.utc).isoformat()
    count = verified(disk, at=moment).image_count
    assert count == sum(
        entry.time_ns // 10**9 <= second.time_ns // 10**9 for entry in disk.manifest().backups
    )


def test_a_damaged_manifest_is_a_flaw_of_its_disk(disk: Repositories) -> None:
    folder = disk.folder / "backups"
    (folder / "sdb").mkdir()
    (folder / "sdb" / "manifest.json").write_bytes(b"{")
    result = verify(folder)
    [flaw] = result.flaws
    assert (flaw.disk, flaw.backup, result.disks, result.image_count) == ("sdb", None, (NAME,), 3)


def test_what_is_not_there_is_not_found(disk: Repositories, tmp_path: Path) -> None:
    folder = disk.folder / "backups"
    with pytest.raises(
        NotFound,
        match="has no backup of a disk called 'sdx'; name another disk: the repository has backups of",
    ):
        verify(folder, "sdx")
    with pytest.raises(NotFound, match="has no backup 7"):
        verify(folder, NAME, at="7")
    with pytest.raises(InvalidArgument, match="the disk of backup 2 is not named"):
        verify(folder, at="2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="has no backups"):
        verify(tmp_path / "empty")
    with pytest.raises(NotFound, match="does not exist"):
        verify(tmp_path / "nowhere")


def test_flaws_are_counted_and_the_first_thousand_told() -> None:
    flaws = verify_module._Flaws()
    for number in range(MAX_FLAWS + 5):
        flaws.add([Flaw("sda", str(number), "x", "x")])
    assert (len(flaws.told), flaws.count) == (MAX_FLAWS, MAX_FLAWS + 5)


# --- what is changed meanwhile ---


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what is to be proven is not even read when the first progress is told."""
    monkeypatch.setattr(verify_module, "_BATCH_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(verify_module, "thread_count", lambda: 1)


def verified_while(disk: Repositories, change: Callable[[], object]) -> VerifyResult:
    """What comes of it if the folder is changed when the first pieces are proven, and the rest not yet."""
    changes = [change]
    result = verify(disk.folder / "backups", progress=lambda *_: _once(changes))
    assert not changes
    return result


def _once(changes: list[Callable[[], object]]) -> None:
    if changes:
        changes.pop()()


def test_damage_is_named_although_a_backup_lands_meanwhile(live_disk: BackedUpDisk) -> None:
    flip(path_of(live_disk, 2), MIB)
    result = verified_while(live_disk, live_disk.backup)
    assert [(flaw.backup, flaw.offset) for flaw in result.flaws] == [("3", MIB)]
    assert len(live_disk.manifest().backups) == 4


def test_damage_is_named_although_other_backups_are_pruned_meanwhile(live_disk: BackedUpDisk) -> None:
    live_disk.backup(BackupType.FULL)
    flip(path_of(live_disk, 3), MIB)
    result = verified_while(
        live_disk, lambda: prune(live_disk.folder / "backups", keep=Retention(last=2))
    )  # merges backup 3, and takes the two before it
    assert [(flaw.backup, flaw.offset) for flaw in result.flaws] == [("4", MIB)]


@pytest.mark.parametrize("name", ["sdb", "a"])  # proven after the disk, and before it
def test_damage_is_named_although_another_disk_is_pruned_meanwhile(disk: Repositories, name: str) -> None:
    folder = disk.folder / "backups"
    shutil.copytree(folder / NAME, folder / name)
    flip(folder / name / disk.manifest().backups[1].file, MIB)
    result = verified_while(disk, lambda: prune(folder, [NAME], keep=Retention(last=1)))
    assert [(flaw.disk, flaw.backup, flaw.offset) for flaw in result.flaws] == [(name, "2", MIB)]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.usefixtures("small_batches")
def test_what_is_wrong_with_what_was_pruned_meanwhile_says_nothing(disk: Repositories, keep: int) -> None:
    """Images are gone, and others have their names."""
    repository = disk.folder / "backups"
    with pytest.raises(Busy, match="was pruned while it was verified; verify it again"):
        verified_while(disk, lambda: prune(repository, keep=Retention(last=keep)))
    assert verified(disk).is_sound


@pytest.mark.usefixtures("small_batches")
def test_files_that_go_meanwhile_are_flaws_if_the_manifest_has_them_still(disk: Repositories) -> None:
    result = verified_while(disk, path_of(disk, 0).unlink)
    assert {flaw.backup for flaw in result.flaws} == {"1"}
    assert result.flaws[0].problem.endswith("000001-full.qcow2 does not exist")


@pytest.mark.usefixtures("small_batches")
def test_an_image_that_gets_its_name_meanwhile_is_sound(disk: Repositories) -> None:
    """The next run carries on a prune that was killed when it was decided."""
    folder, image = disk.backup_folder(), disk.manifest().backups[0].file
    shutil.copy2(folder.path_of(MANIFEST), folder.path_of(NEXT))
    os.rename(folder.path_of(image), folder.successor_path(image))

    def carry_on() -> None:
        with folder.locked():
            assert os.path.exists(folder.path_of(image))

    result = verified_while(disk, carry_on)
    assert (result.flaws, result.image_count) == ((), 3)


def test_a_manifest_that_is_damaged_meanwhile_excuses_nothing(disk: Repositories) -> None:
    flip(path_of(disk, 2), MIB)
    result = verified_while(
        disk, lambda: (disk.folder / "backups" / NAME / "manifest.json").write_bytes(b"{")
    )
    assert [(flaw.backup, flaw.offset) for flaw in result.flaws] == [("3", MIB)]


def test_the_library_for_zstd_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = BackedUpDisk(tmp_path, MIB)
    disk.write(b"compressible" * 40_000, 0)
    disk.backup(compression="zstd")
    for package in ("backports", "compression"):
        monkeypatch.setitem(sys.modules, package, None)
    assert verified(disk).is_sound
    flip(path_of(disk, 0), 5000)
    assert [flaw.offset for flaw in verified(disk).flaws] == [0]
    disk.close()


@contextmanager
def few_open_files(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_chain_may_have_more_images_than_files_can_be_open() -> None:
    with quick_folder() as folder, closing(BackedUpDisk(folder, 4096)) as disk:
        entries: list[BackupEntry] = [disk.backup() for _ in range(80)]
        with few_open_files(64):
            assert verified(disk).image_count == 80
            paths = [disk.backup_folder().image_path(entry.file) for entry in entries]
            with contextlib.ExitStack() as stack, pytest.raises(OSError, match="open files"):
                deque(map(stack.enter_context, map(open, paths)))  # the limit is real


def test_without_the_package_for_digests_its_images_are_not_called_sound_and_the_rest_is_proven(
    disk: Repositories, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = disk.manifest().backups
    other = [entry for entry in entries if entry.digest_algorithm is not DigestAlgorithm.SHA256]
    ours = [entry for entry in entries if entry not in other]
    for entry in ours:
        flip(Path(disk.backup_folder().path_of(entry.file)), entry.bytes_stored - 1)
    forget_blake3(monkeypatch)
    found = verified(disk)
    flaws = {flaw.backup: flaw for flaw in found.flaws}
    assert set(flaws) == {entry.id for entry in entries}
    assert found.bytes_read == sum(entry.bytes_stored for entry in ours)
    for entry in other:
        path = disk.backup_folder().path_of(entry.file)
        assert (flaws[entry.id].path, flaws[entry.id].offset) == (path, None)
        assert f"{path}: expected the package blake3" in flaws[entry.id].problem
        assert "run: pip install 'lmdbitmap[fast]'" in flaws[entry.id].problem


def test_damage_is_told_although_a_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(BackedUpDisk(tmp_path, SIZE)) as disk:
        disk.backup(digest="blake3")
        disk.write(b"x", 0)
        disk.backup(digest="sha256")
        (tmp_path / "backups" / "other").mkdir()
        (tmp_path / "backups" / "other" / "manifest.json").write_text("{")
        forget_blake3(monkeypatch)
        found = verify(tmp_path / "backups")
        assert [(flaw.disk, flaw.backup) for flaw in found.flaws] == [("other", None), (NAME, "1")]
