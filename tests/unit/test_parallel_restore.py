"""A backup's chain onto a file, by many threads: what is written was proven, and is what the disk held."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lmdbitmap.errors import FormatError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.file_pool import PooledFile
from lmdbitmap.repository import backup_chain
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.restoring.parallel_restore import CarryingBack
from lmdbitmap.system import linux
from lmdbitmap.targets.target import Target
from lmdbitmap.work.progress import Report
from tests.helpers.backed_up import BackedUpDisk

pytestmark = pytest.mark.in_memory

PATIENCE_S = 10.0
MIB = 1 << 20
SIZE = 9 * MIB + 700


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    """Of each kind of run, in three images."""
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(random.Random(1).randbytes(6 * MIB + 5000), MIB // 2)
    made.backup()
    made.write(random.Random(2).randbytes(300_000), MIB)
    made.zero(MIB // 2, 100_000)
    made.backup()
    for number in range(40):
        made.write(random.Random(number).randbytes(5000), 3 * MIB + number * 20_000)
    made.write(b"end", SIZE - 3)
    made.backup()
    yield made
    made.close()


def opened(disk: BackedUpDisk) -> AbstractContextManager[BackupChain]:
    return backup_chain.opened(disk.backup_folder(), disk.manifest().backups, verify=True)


def carried(disk: BackedUpDisk, out: Path, *, before: bytes | None = None) -> CarryingBack:
    out.write_bytes(before or b"")
    os.truncate(out, SIZE)
    with opened(disk) as chain, FileDevice.open(str(out)) as device:
        target = Target(str(out), device, is_fresh=before is None, fd=device.fd)
        carrying = CarryingBack(chain, target, Report(None, SIZE))
        carrying.put_all(chain.extents(0, SIZE))
    return carrying


@pytest.mark.parametrize("fresh", [True, False])
def test_the_file_holds_what_the_disk_held(disk: BackedUpDisk, tmp_path: Path, fresh: bool) -> None:
    out = tmp_path / "out.raw"
    carrying = carried(disk, out, before=None if fresh else b"\xff" * SIZE)
    assert out.read_bytes() == disk.content()
    assert (carrying.bytes_zeroed == 0) is fresh
    assert carrying.bytes_written + carrying.bytes_zeroed == (SIZE if not fresh else carrying.bytes_written)
    assert carrying.bytes_written > 5 * MIB


def test_what_a_device_knows_to_be_zeroes_is_left_alone(disk: BackedUpDisk, tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    assert carried(disk, out, before=b"").bytes_zeroed == 0
    assert out.read_bytes() == disk.content()


@pytest.mark.parametrize("image", [0, 1, 2])
def test_what_is_not_what_it_was_is_an_error_and_not_written(
    disk: BackedUpDisk, tmp_path: Path, image: int
) -> None:
    path = Path(disk.backup_folder().path_of(disk.manifest().backups[image].file))
    place = path.stat().st_size // 2 if image < 2 else 70_000
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(FormatError, match=f"{path.name}: bytes .*: expected"):
        carried(disk, tmp_path / "out.raw")
    content, written = disk.content(), (tmp_path / "out.raw").read_bytes()
    assert all(there in (0, right) for there, right in zip(written, content, strict=True))


def test_progress_comes_to_the_end(disk: BackedUpDisk, tmp_path: Path) -> None:
    told: list[int] = []
    with opened(disk) as chain, FileDevice.open(str(_empty(tmp_path))) as device:
        target = Target("out", device, is_fresh=True, fd=device.fd)
        report = Report(lambda done, total: told.append(done), SIZE)
        CarryingBack(chain, target, report).put_all(chain.extents(0, SIZE))
    assert told[-1] == SIZE


def test_one_processor_has_two_at_work(
    disk: BackedUpDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one waits for a disk, the other one needs the processor."""
    for module in ("work.gang", "copying.hashing", "work.crew"):
        monkeypatch.setattr(f"lmdbitmap.{module}.processors", lambda: 1)
    workers: list[int] = []
    new_carrier = CarryingBack._new_carrier

    def counted(carrying: CarryingBack) -> object:
        workers.append(threading.get_ident())
        return new_carrier(carrying)

    monkeypatch.setattr(CarryingBack, "_new_carrier", counted)
    carried(disk, tmp_path / "out.raw")
    assert len(set(workers)) == 2
    assert (tmp_path / "out.raw").read_bytes() == disk.content()


def _empty(folder: Path) -> Path:
    (folder / "out.raw").touch()
    os.truncate(folder / "out.raw", SIZE)
    return folder / "out.raw"


# --- reflinks ---


class Sharing:
    """A file system that can share, by copying; it cannot from the call of that number on."""

    def __init__(self, until: int) -> None:
        self.until = until
        self._shared: list[int] = []
        self._calls = itertools.count(1)

    @property
    def shared(self) -> int:
        return sum(self._shared)

    def clone_range(self, source: int, source_offset: int, length: int, target: int, offset: int) -> bool:
        if next(self._calls) > self.until:
            return False
        self._shared.append(os.pwrite(target, os.pread(source, length, source_offset), offset))
        return True


@pytest.mark.parametrize("until", [0, 1, 3, 999])
def test_what_can_be_shared_is(
    disk: BackedUpDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: int
) -> None:
    sharing = Sharing(until)
    written: list[int] = []
    monkeypatch.setattr(linux, "clone_range", sharing.clone_range)
    write = Target.write_many

    def write_many(target: Target, writes: list[tuple[int, memoryview]]) -> None:
        written.extend(len(data) for _, data in writes)
        write(target, writes)

    monkeypatch.setattr(Target, "write_many", write_many)
    carrying = carried(disk, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == disk.content()
    assert carrying.bytes_written <= sharing.shared + sum(written)
    assert (sum(written) == 0) is (until == 999)
    assert (sharing.shared > 0) is (until > 0)


def test_who_is_refused_writes_though_another_one_could_share_meanwhile(
    disk: BackedUpDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's answer comes between the refusal and whatever is made of it."""
    sharing, calls = Sharing(999), itertools.count()
    refused: list[threading.Thread] = []
    other_asks, refusal_is_known, other_has_shared = (threading.Event() for _ in range(3))

    def clone_range(*call: int) -> bool:
        if next(calls) == 0:
            refused.append(threading.current_thread())
            assert other_asks.wait(PATIENCE_S)
            return False
        if threading.current_thread() not in refused:
            other_asks.set()
            assert refusal_is_known.wait(PATIENCE_S)
        return sharing.clone_range(*call)

    @contextlib.contextmanager
    def reading(file: PooledFile) -> Iterator[FileDevice]:
        with real(file) as device:
            yield device
        if other_asks.is_set():
            if threading.current_thread() in refused:
                refusal_is_known.set()
                assert other_has_shared.wait(PATIENCE_S)
            elif refusal_is_known.is_set():
                other_has_shared.set()

    real = PooledFile.reading
    monkeypatch.setattr(linux, "clone_range", clone_range)
    monkeypatch.setattr(PooledFile, "reading", reading)
    carried(disk, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == disk.content()
    assert other_has_shared.is_set()


def test_a_disks_end_that_cannot_be_shared_does_not_keep_the_rest_from_it(
    disk: BackedUpDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = Sharing(999)

    def whole_blocks_only(source: int, source_offset: int, length: int, target: int, offset: int) -> bool:
        return length % 4096 == 0 and sharing.clone_range(source, source_offset, length, target, offset)

    monkeypatch.setattr(linux, "clone_range", whole_blocks_only)
    carrying = carried(disk, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == disk.content()
    assert sharing.shared > carrying.bytes_written - 4 * MIB - 4096


def test_nothing_is_shared_that_is_not_what_it_was(
    disk: BackedUpDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = Sharing(999)
    monkeypatch.setattr(linux, "clone_range", sharing.clone_range)
    test_what_is_not_what_it_was_is_an_error_and_not_written(disk, tmp_path, 0)
    assert sharing.shared < 6 * MIB


def test_what_cannot_be_shared_here_is_no_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 8192)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("r+b") as target:
        answer = linux.clone_range(source.fileno(), 0, 4096, target.fileno(), 4096)
        assert answer in (True, False)
        assert (tmp_path / "b").read_bytes() == b"x" * 8192
        read_end, write_end = os.pipe()
        assert linux.clone_range(source.fileno(), 0, 4096, write_end, 0) is False
        os.close(read_end)
        os.close(write_end)
