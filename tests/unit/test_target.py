"""What is restored into: what does not fit is refused in one sentence, and left as it was."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from lmdbitmap.errors import AlreadyExists, Busy, FormatError, InvalidArgument, NotFound, StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.repository import proof
from lmdbitmap.repository.digests import found_digest
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.restoring.restore import RestoreResult, restore
from lmdbitmap.system import atomic_files
from lmdbitmap.targets.target import Target, _other_size
from lmdbitmap.tracker import session
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.helpers.backed_up import DIFFERENTIAL, INCREMENTAL, BackedUpDisk
from tests.helpers.nbd_far import READ_ONLY, FarServer, crashing_at_first
from tests.helpers.nbd_raw import WRITE
from tests.helpers.tracked import NAME, blocks_of

KIB = 1 << 10
SIZE = 300 * KIB
BLOCK = 4 * KIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    """Two backups, and what was written after them."""
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(os.urandom(100 * KIB), 50 * KIB)
    made.backup()
    made.write(os.urandom(20 * KIB), 140 * KIB)
    made.backup()
    yield made
    made.close()


def in_place(disk: BackedUpDisk, out: object, at: str | None = None, **more: Any) -> RestoreResult:
    return restore(disk.folder / "backups", NAME, str(out), at=at, in_place=True, store=disk.store, **more)


def scribbled(disk: BackedUpDisk, name: str = "copy.raw", seed: int = 1) -> Path:
    """A copy of the disk, of which some bytes are wrong."""
    content = bytearray(disk.content())
    randomness = random.Random(seed)
    for _ in range(20):
        content[randomness.randrange(SIZE)] ^= 1
    path = disk.folder / name
    path.write_bytes(content)
    return path


# --- a new file ---


def test_a_new_file_for_which_no_descriptor_is_left_is_refused_in_words(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    out = disk.folder / "new.raw"
    with monkeypatch.context() as patched:
        patched.setattr(os, "dup", none_left)
        with pytest.raises(StorageError, match=r"new\.raw: Too many open files; raise the limit"):
            restore(disk.folder / "backups", NAME, out)
    assert not out.exists()
    assert not list(disk.folder.glob("*.partial"))


# --- a file in place ---


def test_a_file_is_mended_where_it_differs_and_stays_the_same_file(disk: BackedUpDisk) -> None:
    path = scribbled(disk)
    inode = path.stat().st_ino
    result = in_place(disk, path)
    assert path.read_bytes() == disk.content()
    assert path.stat().st_ino == inode
    assert 0 < result.bytes_written + result.bytes_zeroed <= 20 * BLOCK
    again = in_place(disk, path)
    assert (again.bytes_written, again.bytes_zeroed, again.tracked) == (0, 0, None)
    assert again.bytes_read <= SIZE, "what was punched is known to be zero"


def test_an_earlier_backup_is_put_in_place(disk: BackedUpDisk) -> None:
    path = scribbled(disk)
    in_place(disk, path, at="1")
    assert path.read_bytes() == disk.restored(at="1")


def test_a_file_in_place_that_is_not_there_is_not_found(disk: BackedUpDisk) -> None:
    with pytest.raises(NotFound, match="does not exist; leave out --in-place to make it"):
        in_place(disk, disk.folder / "none.raw")


@pytest.mark.parametrize("size", [0, 4096, SIZE - 1, SIZE + 1, SIZE + 512])
def test_a_file_of_another_size_is_refused_and_left_alone(disk: BackedUpDisk, size: int) -> None:
    path = disk.folder / "out.raw"
    path.write_bytes(b"x" * size)
    with pytest.raises(
        InvalidArgument, match=rf"has {size} bytes, and the disk had {SIZE}; make it that long"
    ):
        in_place(disk, path)
    assert path.read_bytes() == b"x" * size


def test_nothing_in_place_is_touched_before_the_digests_are_known_to_be_right(disk: BackedUpDisk) -> None:
    path = scribbled(disk)
    before = path.read_bytes()
    image = Path(disk.backup_folder().path_of("000001-full.qcow2"))
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    with pytest.raises(FormatError, match="expected BLAKE3"):
        in_place(disk, path)
    assert path.read_bytes() == before


def test_a_file_that_is_replaced_meanwhile_is_told(disk: BackedUpDisk) -> None:
    path = scribbled(disk)

    def replace(done: int, total: int) -> None:
        atomic_files.replace(path, b"mine")

    with pytest.raises(NotFound, match="was removed or replaced while it was written; restore again"):
        in_place(disk, path, progress=replace)
    assert path.read_bytes() == b"mine"


def test_a_file_that_somebody_has_open_for_writing_is_busy(disk: BackedUpDisk) -> None:
    path = scribbled(disk)
    with FileDevice.open(path), pytest.raises(Busy):
        in_place(disk, path)


@pytest.mark.parametrize("refusal", [errno.EACCES, errno.EROFS])
def test_a_file_that_may_not_be_written_is_told(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    path, really_open = scribbled(disk), os.open

    def refuse(name: str, flags: int, *more: int) -> int:
        if str(name) == str(path) and flags & os.O_RDWR:
            raise OSError(refusal, os.strerror(refusal))
        return really_open(name, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=f"copy.raw: {os.strerror(refusal)}; "):
        in_place(disk, path)


def test_a_folder_in_place_is_refused(disk: BackedUpDisk) -> None:
    with pytest.raises(InvalidArgument, match="neither a regular file nor a block device"):
        in_place(disk, disk.folder)


# --- the backups themselves ---


@pytest.mark.parametrize("inside", ["sda/out.raw", "out.raw", "sda/000001-full.qcow2", "sda/manifest.json"])
@pytest.mark.parametrize("place", [True, False])
def test_nothing_is_written_into_the_repository(disk: BackedUpDisk, inside: str, place: bool) -> None:
    folder = disk.folder / "backups"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (disk.folder / "other name").symlink_to("backups")
    for name in ("backups", "other name"):
        with pytest.raises(InvalidArgument, match="is inside of the repository"):
            restore(folder, NAME, disk.folder / name / inside, in_place=place)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", [True, False])
def test_nothing_is_written_among_the_backups_of_another_repository(disk: BackedUpDisk, place: bool) -> None:
    copied = disk.folder / "offsite" / "sda"
    shutil.copytree(disk.folder / "backups" / "sda", copied)
    for name in ("000001-full.qcow2", "new.raw"):
        with pytest.raises(InvalidArgument, match="is among the backups in"):
            restore(disk.folder / "backups", NAME, copied / name, in_place=place, larger=True)
    before = disk.backup_folder().path_of("000001-full.qcow2")
    assert (copied / "000001-full.qcow2").read_bytes() == Path(before).read_bytes()


def test_an_image_of_the_chain_under_another_name_is_refused(disk: BackedUpDisk) -> None:
    os.link(disk.backup_folder().path_of("000001-full.qcow2"), disk.folder / "link")
    with pytest.raises(InvalidArgument, match=r"link is the backup .*000001-full\.qcow2 itself"):
        in_place(disk, disk.folder / "link")


# --- the image of a disk that is tracked ---


@pytest.mark.parametrize("kind", [INCREMENTAL, DIFFERENTIAL])
def test_the_chain_goes_on_and_the_next_backup_holds_what_the_restore_changed(
    disk: BackedUpDisk, kind: Any
) -> None:
    epoch = disk.disk().epoch
    disk.write(os.urandom(3 * BLOCK), 200 * KIB)
    disk.backup()
    first = disk.restored(at="1")
    changed = {
        block for block in range(SIZE // BLOCK)
        if first[block * BLOCK : (block + 1) * BLOCK] != disk.content()[block * BLOCK : (block + 1) * BLOCK]
    }  # fmt: skip
    result = in_place(disk, disk.image, at="1")
    assert result.tracked == NAME
    assert disk.content() == first
    assert blocks_of(disk.changes()) == changed
    assert result.bytes_written + result.bytes_zeroed == len(changed) * BLOCK
    entry = disk.backup(kind)
    assert (entry.type_actual, entry.reason, entry.epoch) == (kind, None, epoch)
    assert disk.restored() == first
    assert disk.disk().epoch == epoch
    if kind is INCREMENTAL:
        assert entry.bytes_changed == len(changed) * BLOCK


def test_a_restore_of_what_is_there_makes_nothing_dirty(disk: BackedUpDisk) -> None:
    result = in_place(disk, disk.image)
    assert (result.bytes_written, result.bytes_zeroed, result.tracked) == (0, 0, NAME)
    assert blocks_of(disk.changes()) == set()


@pytest.mark.parametrize("how", ["path", "symbolic link", "hard link"])
def test_a_tracked_image_is_refused_around_its_tracker_whatever_it_is_called(
    disk: BackedUpDisk, how: str
) -> None:
    name = disk.image if how == "path" else disk.folder / "another"
    if how == "symbolic link":
        name.symlink_to(disk.image)
    elif how == "hard link":
        os.link(disk.image, name)
    before = disk.content()
    with pytest.raises(AlreadyExists, match=r"is the image of disk 'sda', and its tracker would not know"):
        restore(disk.folder / "backups", NAME, name, store=disk.store)
    assert disk.content() == before
    assert in_place(disk, name).tracked == NAME


@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
@pytest.mark.parametrize("place", [True, False])
def test_what_a_tracked_image_is_made_of_or_what_is_made_of_it_is_refused(
    disk: BackedUpDisk, tmp_path: Path, place: bool
) -> None:
    with loop_node(tmp_path, SIZE) as node:
        backing = tmp_path / "backing.raw"
        for tracked, out in ((backing, node), (node, backing)):
            session.add(disk.store, "sdb", str(tracked), granularity_bits=12)
            with pytest.raises(
                InvalidArgument, match=f"a write to {out} would change disk 'sdb', {tracked}, and"
            ):
                restore(tmp_path / "backups", NAME, out, in_place=place, store=disk.store)
            session.remove(disk.store, "sdb")
        assert backing.read_bytes() == bytes(SIZE)
        restore(tmp_path / "backups", NAME, node, in_place=place, store=disk.store)
        assert node.read_bytes() == disk.content()


def test_a_tracked_image_that_is_lost_may_be_made_anew_and_is_then_another_one(disk: BackedUpDisk) -> None:
    disk.image.unlink()
    restore(disk.folder / "backups", NAME, disk.image, store=disk.store)
    entry = disk.backup()
    assert entry.reason is not None
    assert entry.reason.code == "new-epoch"


def test_that_track_was_lost_before_is_told(disk: BackedUpDisk, caplog: pytest.LogCaptureFixture) -> None:
    disk.write_behind_our_back(b"stranger", 0)
    in_place(disk, disk.image)
    assert "disk sda: its next backup reads the whole disk: the image was written while it was" in caplog.text
    assert disk.content() == disk.restored()


def test_a_disk_that_somebody_has_attached_is_busy(disk: BackedUpDisk) -> None:
    with disk.attach(), pytest.raises(Busy, match="stop the process that serves it"):
        in_place(disk, disk.image)


def test_a_tracked_disk_that_grew_is_refused_and_told_how(disk: BackedUpDisk) -> None:
    disk.resize(SIZE + BLOCK)
    with pytest.raises(
        InvalidArgument, match=rf"truncate --size={SIZE}\), and then run `lmdbitmap adopt sda`"
    ):
        in_place(disk, disk.image)
    os.truncate(disk.image, SIZE)
    session.adopt(disk.store, NAME)
    in_place(disk, disk.image)
    assert disk.content() == disk.restored()


def test_the_image_of_a_tracked_device_is_not_to_be_truncated(disk: BackedUpDisk, far: FarServer) -> None:
    """`truncate` is for files: it cannot do that with a block device or with an image behind a server."""
    with NbdDevice.open(far.uri) as device:
        refused = str(_other_size(Target(far.uri, device, disk=NAME), SIZE + BLOCK))
    assert refused.endswith(f"; give the image {SIZE + BLOCK} bytes, and then run `lmdbitmap adopt sda`")


def test_a_restore_that_fails_in_the_middle_leaves_what_it_wrote_dirty(disk: BackedUpDisk) -> None:
    disk.write(b"\xff" * 200 * KIB, 0)
    disk.backup()

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_place(disk, disk.image, at="1", progress=fail)
    now = disk.content()
    disk.backup()
    assert disk.restored() == now


# --- proven before it is written ---


def test_it_is_told_how_far_the_proof_is_and_whoever_listens_can_cancel(tmp_path: Path) -> None:
    size, told = 16 << 20, []
    with closing(BackedUpDisk(tmp_path, size, 16)) as disk:
        disk.write(os.urandom(size), 0)
        disk.backup()
        path = tmp_path / "out.raw"
        path.write_bytes(b"x" * size)

        def cancel(done: int, total: int) -> None:
            told.append((done, total))
            if done >= size // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            in_place(disk, path, progress=cancel)
        assert path.read_bytes() == b"x" * size
        assert len(told) >= 2
        assert {total for _, total in told} == {2 * size}


def test_whoever_listens_can_cancel_while_an_image_is_proven_as_a_whole(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = disk.folder / "out.raw"
    path.write_bytes(b"x" * SIZE)
    chunks = disk.manifest().backups[0].chunks
    assert chunks is not None
    Path(disk.backup_folder().path_of(chunks.file)).unlink()
    began = Event()

    def slow_digest(entry: BackupEntry, fd: int, stopped: Callable[[], bool]) -> str:
        began.set()
        while not stopped():
            found_digest(entry, fd)
        return "cancelled"

    def cancel(done: int, total: int) -> None:
        if began.is_set():
            raise KeyboardInterrupt

    monkeypatch.setattr(proof, "found_digest", slow_digest)
    monkeypatch.setattr("lmdbitmap.restoring.restore._TELL_AGAIN_S", 0.01)
    with pytest.raises(KeyboardInterrupt):
        in_place(disk, path, progress=cancel)
    assert path.read_bytes() == b"x" * SIZE


# --- larger than the disk ---


@pytest.mark.parametrize("more", [1, 512, BLOCK, 3 << 20])
def test_a_larger_file_may_be_asked_for_and_what_is_behind_the_disk_is_zeroed(
    disk: BackedUpDisk, more: int
) -> None:
    path = disk.folder / "out.raw"
    path.write_bytes(b"x" * (SIZE + more))
    with pytest.raises(InvalidArgument, match=f"say --larger, which zeroes the {more} bytes behind the disk"):
        in_place(disk, path)
    told: list[tuple[int, int]] = []
    result = in_place(disk, path, larger=True, progress=lambda *news: told.append(news))
    assert path.read_bytes() == disk.content() + bytes(more)
    assert (result.bytes_behind, told[-1]) == (more, (2 * (SIZE + more), 2 * (SIZE + more)))
    again = in_place(disk, path, larger=True)
    assert (again.bytes_written, again.bytes_zeroed, again.bytes_behind) == (0, 0, more)


@pytest.mark.parametrize("size", [0, BLOCK, SIZE - 1])
def test_nothing_smaller_is_larger(disk: BackedUpDisk, size: int) -> None:
    path = disk.folder / "out.raw"
    path.write_bytes(b"x" * size)
    with pytest.raises(InvalidArgument, match=r"or name a new file$"):
        in_place(disk, path, larger=True)
    assert path.read_bytes() == b"x" * size


def test_a_disk_that_grew_since_keeps_its_size_and_its_next_backup_is_an_increment(
    disk: BackedUpDisk,
) -> None:
    disk.resize(SIZE + 20 * BLOCK)
    disk.write(b"newer" * 1000, SIZE)
    disk.backup()
    result = in_place(disk, disk.image, at="2", larger=True)
    assert (result.tracked, result.bytes_behind) == (NAME, 20 * BLOCK)
    assert disk.content() == disk.restored(at="2") + bytes(20 * BLOCK)
    assert disk.backup().type_actual is INCREMENTAL
    assert disk.restored() == disk.content()


@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
@pytest.mark.parametrize("place", [True, False])
def test_nothing_is_left_behind_the_disk_on_a_larger_block_device(
    disk: BackedUpDisk, tmp_path: Path, place: bool
) -> None:
    with loop_node(tmp_path, 2 << 20) as node:
        node.write_bytes(b"o" * (2 << 20))
        with pytest.raises(InvalidArgument, match="or say --larger"):
            restore(tmp_path / "backups", NAME, node, in_place=place)
        assert node.read_bytes() == b"o" * (2 << 20)
        result = restore(tmp_path / "backups", NAME, node, in_place=place, larger=True)
        assert node.read_bytes() == disk.content() + bytes((2 << 20) - SIZE)
    assert result.bytes_behind == (2 << 20) - SIZE


@pytest.mark.parametrize("place", [True, False])
def test_nothing_is_left_behind_the_disk_on_a_larger_export(
    disk: BackedUpDisk, far: FarServer, place: bool
) -> None:
    far.size = SIZE + 5 * BLOCK
    far.data[:] = b"o" * far.size
    result = restore(disk.folder / "backups", NAME, far.uri, in_place=place, larger=True)
    assert far.stable == disk.content() + bytes(5 * BLOCK)
    assert result.bytes_behind == 5 * BLOCK


def test_what_is_behind_the_disk_is_zeroed_in_pieces_between_which_it_can_be_cancelled(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmdbitmap.restoring.restore._TAIL_BYTES", 4 << 20)
    path = disk.folder / "out.raw"
    path.write_bytes(b"x" * (20 << 20))

    def stop(done: int, total: int) -> None:
        if done > 28 << 20:  # 20 MiB were proven
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_place(disk, path, larger=True, progress=stop)
    assert path.read_bytes()[16 << 20 :] == b"x" * (4 << 20)


# --- devices and servers ---


@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
@pytest.mark.parametrize("place", [True, False])
def test_a_block_device_may_be_as_long_as_the_disk_rounded_up(tmp_path: Path, place: bool) -> None:
    disk = BackedUpDisk(tmp_path, SIZE - 5)
    disk.write(b"end", SIZE - 8)
    disk.backup()
    with loop_node(tmp_path, SIZE) as node:
        node.write_bytes(b"o" * SIZE)
        result = restore(tmp_path / "backups", NAME, node, in_place=place)
        assert node.read_bytes() == disk.content() + bytes(5)
    assert (result.bytes_read == SIZE) is place
    disk.close()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarServer]:
    server = FarServer(tmp_path / "far", SIZE)
    yield server
    server.close()


@pytest.mark.parametrize("place", [True, False])
def test_an_export_is_written_flushed_and_no_more(disk: BackedUpDisk, far: FarServer, place: bool) -> None:
    far.data[:] = b"\xff" * SIZE
    restore(disk.folder / "backups", NAME, far.uri, in_place=place)
    assert far.data == far.stable == disk.content()


def test_an_export_in_place_is_written_where_it_differs(disk: BackedUpDisk, far: FarServer) -> None:
    far.data[:] = scribbled(disk).read_bytes()
    result = in_place(disk, far.uri)
    assert far.stable == disk.content()
    assert 0 < result.bytes_written + result.bytes_zeroed <= 20 * BLOCK
    assert result.bytes_read == SIZE


@pytest.mark.parametrize("place", [True, False])
def test_what_was_in_a_servers_memory_alone_is_not_found_right_and_then_lost(
    disk: BackedUpDisk, far: FarServer, place: bool
) -> None:
    """An interrupted run wrote it and did not flush; the server dies while this run writes what is missing."""
    far.stable[:] = b"o" * SIZE
    far.data[:] = scribbled(disk).read_bytes() if place else bytes(SIZE)
    far.statuses = None if place else [(SIZE, 3)]
    far.behave = crashing_at_first(WRITE)
    restore(disk.folder / "backups", NAME, far.uri, in_place=place)
    assert far.handshakes == 2
    assert far.stable == disk.content()


def test_an_export_of_another_size_is_refused(disk: BackedUpDisk, far: FarServer) -> None:
    far.size = SIZE - 512
    with pytest.raises(
        InvalidArgument, match=r"has 306688 bytes, and the disk had 307200; name one of that size"
    ):
        in_place(disk, far.uri)


def test_an_export_that_is_read_only_is_refused(disk: BackedUpDisk, far: FarServer) -> None:
    far.flags |= READ_ONLY
    with pytest.raises(InvalidArgument, match="is served read-only"):
        in_place(disk, far.uri)


def test_an_export_that_nobody_serves_is_not_found(disk: BackedUpDisk) -> None:
    with pytest.raises(NotFound, match="no server answers at"):
        in_place(disk, f"nbd+unix:///sda?socket={disk.folder}/none")


def test_a_server_that_goes_away_is_told_with_the_next_step(far: FarServer) -> None:
    with NbdDevice.open(far.uri, reconnect_s=0.01) as device:
        target = Target(far.uri, device)
        target.write_many([(0, memoryview(b"x"))])
        far.stop_listening()
        far.crash()
        with pytest.raises(
            StorageError,
            match=r"its server went away and has not come back; see why its server does not answer, and do it again",
        ):
            target.write_many([(0, memoryview(b"x"))])
        far.listen()
