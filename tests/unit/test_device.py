"""What is particular to files, block devices and the fake; what they share is in tests/contract."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lmdbitmap.errors import Busy, InvalidArgument, LmdbitmapError, NotFound, StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.interfaces import Allocation, ImageIdentity
from lmdbitmap.system import linux
from tests.conftest import RawImage
from tests.helpers.support import open_files
from tests.helpers.tracked import quick_folder

MIB = 1 << 20
PAGE = 4096
TMPFS, EXT4 = 0x01021994, 0xEF53
PATIENCE_S = 10.0


# --- opening ---


def make_folder(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def make_character_device_link(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def make_nothing(path: Path) -> None:
    assert not path.exists()


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (make_folder, InvalidArgument),
        (make_fifo, InvalidArgument),
        (make_socket, InvalidArgument),
        (make_character_device_link, InvalidArgument),
        (make_link_to_itself, StorageError),
        (make_nothing, NotFound),
        (make_link_to_nothing, NotFound),
    ],
)
@pytest.mark.parametrize("read_only", [True, False])
def test_what_is_no_image_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], None], error: type[LmdbitmapError], read_only: bool
) -> None:
    path = tmp_path / "image"
    make(path)
    before = len(open_files())
    with pytest.raises(error, match=r"image.*; "):
        FileDevice.open(path, read_only=read_only)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("name", "error"),
    [("a\0b", InvalidArgument), ("\ud800", InvalidArgument), ("x" * 300, StorageError), ("", NotFound)],
)
def test_impossible_name_is_refused(name: str, error: type[LmdbitmapError]) -> None:
    with pytest.raises(error):
        FileDevice.open(name)


def test_file_inside_a_file_is_not_found(raw_image: RawImage) -> None:
    with pytest.raises(NotFound):
        FileDevice.open(raw_image(0) / "image")


def test_symbolic_link_to_an_image_is_followed(raw_image: RawImage, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(raw_image(1000, [(0, b"image")]))
    with FileDevice.open(link, read_only=True) as device:
        assert (device.path, device.size, device.pread(5, 0)) == (str(link), 1000, b"image")
        assert (device.is_block_device, device.locked) == (False, True)


def test_descriptor_is_not_inherited(raw_image: RawImage) -> None:
    with FileDevice.open(raw_image(0)) as device:
        assert device.fd is not None
        assert not os.get_inheritable(device.fd)
    assert device.fd is None


# --- identity ---


def test_identity_stays_while_nobody_writes(raw_image: RawImage) -> None:
    path = raw_image(1000)
    with FileDevice.open(path) as device:
        before = device.identity()
    path.chmod(0o400)
    with FileDevice.open(path, read_only=True) as device:
        assert device.identity() == before
    status = path.stat()
    assert before == ImageIdentity(status.st_dev, status.st_ino, 1000, status.st_mtime_ns)


def test_identity_is_asked_afresh(raw_image: RawImage) -> None:
    path = raw_image(1000)
    with FileDevice.open(path) as device:
        before = device.identity()
        os.utime(path, ns=(0, before.mtime_ns + 1))
        assert device.identity() == before._replace(mtime_ns=before.mtime_ns + 1)
        os.truncate(path, 2000)
        assert device.identity().size == 2000


@pytest.mark.parametrize(("second", "mtime_ns"), [(10**10, 2**63 - 1), (-(10**10), -(2**63)), (-1, -(10**9))])
def test_identity_has_a_time_that_64_bits_hold(second: int, mtime_ns: int) -> None:
    """In memory: not every file system keeps such times."""
    with quick_folder() as folder:
        path = folder / "image"
        path.write_bytes(bytes(1000))
        os.utime(path, (second, second))
        with FileDevice.open(path) as device:
            assert device.identity().mtime_ns == mtime_ns


def test_identity_of_a_block_device_is_its_number_and_size(raw_image: RawImage) -> None:
    path = raw_image(PAGE)
    with FileDevice(str(path), os.open(path, os.O_RDONLY), read_only=True, is_block_device=True) as device:
        assert device.identity() == ImageIdentity(path.stat().st_rdev, 0, PAGE, 0)


# --- a file that others change, a system that does things by halves ---


def test_file_that_was_cut_is_an_error_and_never_short_data(raw_image: RawImage) -> None:
    path = raw_image(2 * MIB, [(0, b"x" * PAGE)])
    with FileDevice.open(path) as device:
        os.truncate(path, PAGE + 1)
        assert device.pread(PAGE, 0) == b"x" * PAGE
        with pytest.raises(OSError, match="cut") as refused:
            device.pread(10, PAGE)
        assert refused.value.errno == errno.EIO
        with pytest.raises(OSError, match="cut") as refused:
            device.pread_into(memoryview(bytearray(MIB)), 0)
        assert refused.value.errno == errno.EIO


def test_what_lies_behind_the_end_of_a_cut_file_is_no_hole(raw_image: RawImage) -> None:
    path = raw_image(2 * MIB)
    with FileDevice.open(path) as device:
        os.truncate(path, MIB)
        hole, rest = Allocation(MIB, True, True), Allocation(MIB, False, False)
        assert list(device.allocation(0, 2 * MIB)) == [hole, rest]
        assert list(device.allocation(MIB, MIB)) == [rest]


def test_short_reads_and_writes_are_completed(raw_image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_pwrite, whole_preadv, whole_pread = os.pwrite, os.preadv, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole_pwrite(fd, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole_preadv(fd, [buffers[0][:3]], offset))
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: whole_pread(fd, min(length, 3), offset))
    with FileDevice.open(raw_image(100)) as device:
        device.pwrite(b"0123456789", 7)
        assert device.pread(12, 6) == b"\x000123456789\0"


def test_the_kernel_is_told_what_will_be_read_and_need_not_listen(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def fadvise(fd: int, offset: int, length: int, advice: int) -> None:
        told.append((offset, length, advice))
        if offset > 1 << 20:
            raise OSError(errno.ESPIPE, "Illegal seek")

    step = 512 << 10
    with FileDevice.open(raw_image(1 << 20)) as device:
        monkeypatch.setattr(os, "posix_fadvise", fadvise)
        device.will_need(4096, 2 * step + 8192)
        device.will_need(2 << 20, 1)
    assert [(offset, length) for offset, length, _ in told] == [
        (4096, step), (4096 + step, step), (4096 + 2 * step, 8192), (2 << 20, 1),
    ]  # fmt: skip
    assert {advice for _, _, advice in told} == {os.POSIX_FADV_WILLNEED}


def test_write_that_gets_nowhere_fails(raw_image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileDevice.open(raw_image(100)) as device:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
        with pytest.raises(OSError, match="nothing was written"):
            device.pwrite(b"x", 0)


def test_flush_syncs_the_data(raw_image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with FileDevice.open(raw_image(100)) as device:
        monkeypatch.setattr(os, "fdatasync", synced.append)
        device.flush()
        assert synced == [device.fd]


# --- zeroes ---


class Kernel:
    """Stands in for fallocate(2): answers each call with the next of `errors`, 0 being success."""

    def __init__(self, *errors: int) -> None:
        self.errors = list(errors)
        self.modes: list[int] = []

    def __call__(self, fd: int, mode: int, offset: int, length: int) -> int:
        self.modes.append(mode & ~linux.FALLOC_FL_KEEP_SIZE)
        ctypes.set_errno(self.errors[0])
        return -1 if self.errors.pop(0) else 0


PUNCH, ZERO = linux.FALLOC_FL_PUNCH_HOLE, linux.FALLOC_FL_ZERO_RANGE
NO = errno.EOPNOTSUPP


@pytest.mark.parametrize(
    ("may_unmap", "errors", "modes"),
    [
        (True, [0], [PUNCH]),
        (True, [NO, 0], [PUNCH, ZERO]),
        (True, [NO, NO], [PUNCH, ZERO]),
        (True, [errno.EINTR, errno.EINTR, 0], [PUNCH, PUNCH, PUNCH]),
        (False, [0], [ZERO]),
        (False, [NO], [ZERO]),
        (False, [errno.ENOSYS], [ZERO]),
    ],
)
def test_zeroing_asks_the_system_first_and_writes_only_if_it_cannot(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch, may_unmap: bool, errors: list[int], modes: list[int]
) -> None:
    kernel = Kernel(*errors)
    monkeypatch.setattr(linux, "_fallocate", lambda: kernel)
    with FileDevice.open(raw_image(PAGE, [(0, b"x" * PAGE)])) as device:
        device.write_zeroes(1, PAGE - 2, may_unmap=may_unmap)
        untouched = b"x" * PAGE
        assert device.pread(PAGE, 0) == (b"x" + bytes(PAGE - 2) + b"x" if errors[-1] else untouched)
    assert (kernel.modes, kernel.errors) == (modes, [])


def test_zeroed_and_discarded_ranges_of_a_file_give_their_space_back(raw_image: RawImage) -> None:
    path = raw_image(4 * MIB, [(0, b"x" * 4 * MIB)])
    with FileDevice.open(path) as device:
        device.flush()
        full = path.stat().st_blocks * 512
        device.write_zeroes(0, MIB)
        device.discard(2 * MIB, MIB)
        assert path.stat().st_blocks * 512 <= full - 2 * MIB
        assert device.pread(4 * MIB, 0) == bytes(MIB) + b"x" * MIB + bytes(MIB) + b"x" * MIB


def test_block_device_is_not_asked_to_write_zeroes_when_only_fast_will_do(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There ZERO_RANGE may write them out, one by one, inside the kernel."""
    kernel = Kernel(NO)
    monkeypatch.setattr(linux, "_fallocate", lambda: kernel)
    path = raw_image(PAGE)
    with FileDevice(str(path), os.open(path, os.O_RDWR), read_only=False, is_block_device=True) as device:
        with pytest.raises(OSError, match="supported"):
            device.write_zeroes(0, PAGE, fast_only=True)
        with pytest.raises(OSError, match="supported"):
            device.write_zeroes(0, PAGE, may_unmap=False, fast_only=True)
    assert kernel.modes == [PUNCH]


def test_fast_zeroing_never_writes_zeroes_out(raw_image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_fallocate", lambda: Kernel(NO, NO))
    with FileDevice.open(raw_image(PAGE, [(0, b"x" * PAGE)])) as device:
        with pytest.raises(OSError, match="supported") as refused:
            device.write_zeroes(0, PAGE, fast_only=True)
        assert (refused.value.errno, device.pread(PAGE, 0)) == (errno.ENOTSUP, b"x" * PAGE)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EPERM])
def test_failed_zeroing_is_not_taken_for_unsupported(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(linux, "_fallocate", lambda: Kernel(code))
    with FileDevice.open(raw_image(PAGE)) as device, pytest.raises(OSError) as refused:
        device.write_zeroes(0, PAGE)
    assert refused.value.errno == code


def test_discard_that_the_system_does_not_know_is_no_error(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(NO)
    monkeypatch.setattr(linux, "_fallocate", lambda: kernel)
    with FileDevice.open(raw_image(PAGE, [(0, b"x")])) as device:
        device.discard(0, PAGE)
        assert (device.pread(1, 0), kernel.modes) == (b"x", [PUNCH])


def test_zeroes_longer_than_a_chunk_are_written_whole(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "_fallocate", lambda: Kernel(NO, NO))
    size = 2 * MIB + 5
    with FileDevice.open(raw_image(size, [(0, b"x" * size)])) as device:
        device.write_zeroes(1, size - 2)
        assert device.pread(size, 0) == b"x" + bytes(size - 2) + b"x"


# --- holes ---


def test_holes_of_a_sparse_file_are_named(raw_image: RawImage) -> None:
    path = raw_image(10 * MIB, [(MIB, b"x" * MIB), (4 * MIB, b"x")])
    with FileDevice.open(path) as device:
        parts = list(device.allocation(0, 10 * MIB))
        assert [(part.hole, part.zero) for part in parts] == [(i % 2 == 0, i % 2 == 0) for i in range(5)]
        assert [part.length for part in parts[:3]] == [MIB, MIB, 2 * MIB]
        assert list(device.allocation(MIB + 5, MIB)) == [Allocation(MIB - 5, *DATA), Allocation(5, *HOLE)]


HOLE, DATA = (True, True), (False, False)


def test_block_device_is_all_data(raw_image: RawImage) -> None:
    path = raw_image(10 * MIB)
    with FileDevice(str(path), os.open(path, os.O_RDWR), read_only=False, is_block_device=True) as device:
        assert list(device.allocation(0, 10 * MIB)) == [Allocation(10 * MIB, *DATA)]


def lseeks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on each `whence` of an lseek."""
    asked, lseek = [], os.lseek

    def note(fd: int, offset: int, whence: int) -> int:
        asked.append(whence)
        return lseek(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", note)
    return asked


def test_walk_over_holes_is_lazy(raw_image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    path = raw_image(64 * MIB, [(offset, b"x") for offset in range(0, 64 * MIB, MIB)])
    with FileDevice.open(path) as device:
        asked = lseeks(monkeypatch)
        walk = device.allocation(0, device.size)
        assert asked == []
        assert not next(walk).hole
        assert 0 < len(asked) < 6


def test_walk_over_holes_ends_with_the_image_and_goes_on_in_no_other_file(raw_image: RawImage) -> None:
    """Which took the rest for a hole, and was moved to another position."""
    path = raw_image(4 * MIB, [(offset, b"x") for offset in range(0, 4 * MIB, MIB)])
    device = FileDevice.open(path)
    walk, fd = device.allocation(0, device.size), device.fd
    assert fd is not None
    assert not next(walk).hole
    device.close()
    other = os.open(path, os.O_RDWR)
    os.dup2(other, fd)  # the number is free, and whatever is opened next may have it
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            list(walk)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    finally:
        for number in {other, fd}:
            os.close(number)


@pytest.mark.parametrize(("number", "hole_at", "asks"), [(TMPFS, None, 0), (TMPFS, 3, 4), (EXT4, None, 2)])
def test_full_file_on_tmpfs_is_not_looked_through_for_holes(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch, number: int, hole_at: int | None, asks: int
) -> None:
    """That goes through all pages to say where data ends; whoever writes to the file waits meanwhile."""
    path = raw_image(10 * PAGE, [(page * PAGE, b"x" * PAGE) for page in range(10) if page != hole_at])
    monkeypatch.setattr(linux, "filesystem_number", lambda file: number)
    with FileDevice.open(path) as device:
        asked = lseeks(monkeypatch)
        zero = [part.length for part in device.allocation(0, device.size) if part.zero]
        assert (zero, len(asked)) == ([] if hole_at is None else [PAGE], asks)
        device.discard(0, PAGE)
        assert next(device.allocation(0, device.size)) == Allocation(PAGE, *HOLE)


def test_tmpfs_is_known_by_what_is_open_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with quick_folder() as folder:
        path = folder / "disk.raw"
        path.write_bytes(b"x" * 10 * PAGE)
        with FileDevice.open(path) as device:
            path.unlink()
            expected = linux.filesystem_number(str(folder)) == TMPFS
            asked = lseeks(monkeypatch)
            assert list(device.allocation(0, device.size)) == [Allocation(10 * PAGE, *DATA)]
            assert (asked == []) == expected


def test_whoever_cannot_say_where_a_file_is_asks_for_its_holes(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: str | int) -> int:
        raise OSError(errno.ENOSYS, "by intent")

    monkeypatch.setattr(linux, "filesystem_number", refuse)
    with FileDevice.open(raw_image(PAGE, [(0, b"x" * PAGE)])) as device:
        asked = lseeks(monkeypatch)
        assert list(device.allocation(0, PAGE)) == [Allocation(PAGE, *DATA)]
        assert len(asked) == 2


def test_image_whose_file_system_hangs_delays_no_other_image(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def hang_once(file: str | int) -> int:
        if not asked.is_set():
            asked.set()
            assert goes_on.wait(PATIENCE_S)
        return EXT4

    def look(device: FileDevice) -> threading.Thread:
        thread = threading.Thread(target=lambda: list(device.allocation(0, PAGE)))
        thread.start()
        return thread

    monkeypatch.setattr(linux, "filesystem_number", hang_once)
    path = raw_image(PAGE, [(0, b"x" * PAGE)])
    with FileDevice.open(path, read_only=True) as hung, FileDevice.open(path, read_only=True) as other:
        hanging = look(hung)
        assert asked.wait(PATIENCE_S)
        answering = look(other)
        answering.join(PATIENCE_S / 2)
        answers = not answering.is_alive()
        goes_on.set()
        hanging.join()
        answering.join()
    assert answers


def test_closed_image_is_not_asked_for_holes(raw_image: RawImage) -> None:
    device = FileDevice.open(raw_image(PAGE))
    device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        list(device.allocation(0, PAGE))


def test_walk_ends_when_every_answer_is_outdated(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data where we ask for data, a hole where we ask for a hole: as if somebody punched and wrote all the time."""
    with FileDevice.open(raw_image(10 * PAGE + 1)) as device:
        monkeypatch.setattr(os, "lseek", lambda fd, offset, whence: offset)
        assert list(device.allocation(0, device.size)) == [Allocation(10 * PAGE + 1, *DATA)]


def test_file_system_that_knows_no_holes_has_only_data(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "no such whence")

    with FileDevice.open(raw_image(MIB)) as device:
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(device.allocation(0, MIB)) == [Allocation(MIB, *DATA)]


# --- locks ---

WRITER = {"read_only": False}
READER = {"read_only": True}
SHARING_READER = {"read_only": True, "share_writes": True}


@pytest.mark.parametrize(
    ("holder", "other", "allowed"),
    [
        (WRITER, WRITER, False),
        (WRITER, READER, False),
        (WRITER, SHARING_READER, True),
        (READER, WRITER, False),
        (READER, READER, True),
        (READER, SHARING_READER, True),
        (SHARING_READER, WRITER, True),
        (SHARING_READER, READER, True),
        (SHARING_READER, SHARING_READER, True),
    ],
)
def test_who_may_open_an_image_that_is_open(
    raw_image: RawImage, holder: dict[str, bool], other: dict[str, bool], allowed: bool
) -> None:
    path = raw_image(100)
    before = len(open_files())
    with FileDevice.open(path, **holder):
        if allowed:
            FileDevice.open(path, **other).close()
        else:
            with pytest.raises(Busy, match=f"{path} is open in QEMU or in another lmdbitmap"):
                FileDevice.open(path, **other)
    FileDevice.open(path, **other).close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("how", "held"),
    [
        (WRITER, {100, 101, 103, 201, 203}),
        (READER, {100, 201, 203}),
        (SHARING_READER, {100}),
    ],
)
def test_locked_bytes_are_the_ones_that_qemu_looks_at(
    raw_image: RawImage, how: dict[str, bool], held: set[int]
) -> None:
    path = raw_image(100)
    with FileDevice.open(path, **how), path.open("rb") as other:
        assert {byte for byte in range(300) if is_locked(other.fileno(), byte)} == held


def is_locked(fd: int, byte: int) -> bool:
    question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    return struct.unpack_from("h", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)) != (fcntl.F_UNLCK,)


def test_writer_cannot_share_writes(raw_image: RawImage) -> None:
    with pytest.raises(InvalidArgument):
        FileDevice.open(raw_image(100), share_writes=True)


def test_closing_another_descriptor_of_the_image_keeps_the_lock(raw_image: RawImage) -> None:
    path = raw_image(100)
    with FileDevice.open(path):
        path.read_bytes()
        with pytest.raises(Busy):
            FileDevice.open(path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_system_without_locks_is_used_without_and_told_of(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(fd: int, command: int, request: bytes) -> bytes:
        raise OSError(code, os.strerror(code))

    path = raw_image(100)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with caplog.at_level(logging.WARNING), FileDevice.open(path) as device:
        assert not device.locked
    assert [record.name for record in caplog.records] == ["lmdbitmap.system.image_locks"]


@pytest.mark.parametrize(("code", "error"), [(errno.EIO, StorageError), (errno.EAGAIN, Busy)])
def test_lock_that_fails_fails_the_opening(
    raw_image: RawImage, monkeypatch: pytest.MonkeyPatch, code: int, error: type[LmdbitmapError]
) -> None:
    ask = fcntl.fcntl

    def refuse(fd: int, command: int, request: bytes) -> bytes:
        if command == fcntl.F_OFD_SETLK:
            raise OSError(code, os.strerror(code))
        return ask(fd, command, request)

    path = raw_image(100)
    before = len(open_files())
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(error):
        FileDevice.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


# --- the fake ---


@pytest.mark.parametrize(
    ("operation", "use"),
    [
        ("pread", lambda device: device.pread(1, 0)),
        ("pread_into", lambda device: device.pread_into(memoryview(bytearray(1)), 0)),
        ("pwrite", lambda device: device.pwrite(b"y", 0)),
        ("write_zeroes", lambda device: device.write_zeroes(0, 1)),
        ("discard", lambda device: device.discard(0, 1)),
        ("flush", lambda device: device.flush()),
        ("allocation", lambda device: device.allocation(0, 1)),
        ("resize", lambda device: device.resize(50)),
    ],
)
def test_fake_fails_once_on_demand_having_done_nothing(
    operation: str, use: Callable[[MemoryDevice], object]
) -> None:
    device = MemoryDevice(100)
    device.pwrite(b"x" * 100, 0)
    device.fail_next[operation] = errno.ENOSPC
    with pytest.raises(OSError, match="space") as refused:
        use(device)
    assert refused.value.errno == errno.ENOSPC
    assert device.pread(device.size, 0) == b"x" * 100
    use(device)


def test_fake_calls_pages_of_zeroes_holes() -> None:
    device = MemoryDevice(10 * PAGE)
    device.pwrite(b"x", 3 * PAGE - 1)
    assert list(device.allocation(PAGE + 1, 5 * PAGE)) == [
        Allocation(PAGE - 1, *HOLE),
        Allocation(PAGE, *DATA),
        Allocation(3 * PAGE + 1, *HOLE),
    ]
