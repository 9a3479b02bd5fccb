"""What `BlockDevice` promises of reading, asked of those who can do nothing else, beside a file open read-only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.filter import Filter
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.repository import backup_chain
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.scratch import Scratch
from tests.contract.checks import (
    check_allocation,
    check_closed_says_so,
    check_side_by_side,
    check_writes_are_refused,
)
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import make_raw_image

PAGE = 4096
SIZE = 24 * PAGE + 5
"""The last sector of a backup's image is longer than the disk."""
RANGES = [(0, SIZE), (0, 1), (SIZE - 1, 1), (PAGE, PAGE), (100, 30_000), (511, 2), (5000, 0), (SIZE, 0)]
OFF_THE_DISK = [(-1, 2), (0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (PAGE, -1), (1 << 63, 1)]
STEPS = [
    [(0, b"first" * 3000), (12 * PAGE, b"long" * 5000)],
    [(3 * PAGE + 7, b"second" * 1000), (20 * PAGE, bytes(2 * PAGE))],
    [(12 * PAGE, bytes(3 * PAGE)), (SIZE - 3, b"end")],
]
"""What is written before each of the backups; the file gets all of it at once."""


def content() -> bytes:
    made = bytearray(SIZE)
    for offset, data in (write for step in STEPS for write in step):
        made[offset : offset + len(data)] = data
    return bytes(made)


Opener: TypeAlias = Callable[[Path], AbstractContextManager[BlockDevice]]


@contextmanager
def file(folder: Path) -> Iterator[BlockDevice]:
    data = content()
    pieces = [(at, data[at : at + PAGE]) for at in range(0, SIZE, PAGE)]
    path = make_raw_image(folder / "disk.raw", SIZE, [piece for piece in pieces if any(piece[1])])
    with FileDevice.open(path, read_only=True) as device:
        yield device


@contextmanager
def backup(folder: Path) -> Iterator[BlockDevice]:
    """The newest of three, one on top of the other."""
    with closing(BackedUpDisk(folder, SIZE)) as disk:
        for step in STEPS:
            for offset, data in step:
                disk.write(data, offset)
            disk.backup()
        with backup_chain.opened(disk.backup_folder(), disk.manifest().backups) as chain:
            assert len(chain.images) == len(STEPS)
            yield chain


@contextmanager
def served_backup(folder: Path) -> Iterator[BlockDevice]:
    with backup(folder) as chain:
        server = Server({"sda": PlainDisk(chain)})
        server.listen_unix(str(folder / "nbd"))
        server.start()
        try:
            with NbdDevice.open(server.uris[0], read_only=True) as device:
                yield device
        finally:
            assert server.stop()


@contextmanager
def snapshot(folder: Path) -> Iterator[BlockDevice]:
    """Of a disk of which a part was written since, and another part discarded."""
    with file(folder) as image:
        assert isinstance(image, FileDevice)
        place = image.path
    with Store.create(folder / "store") as store:
        session.add(store, "sda", place, granularity_bits=12)
        with (
            Filter.attach(store, "sda", background=False) as disk,
            disk.snapshot("then", Scratch(folder)) as held,
        ):
            disk.pwrite(b"later" * 2000, PAGE + 7)
            disk.discard(12 * PAGE, 4 * PAGE)
            yield held


OPENERS: list[Opener] = [file, backup, served_backup]


@pytest.fixture(scope="module", params=[*OPENERS, snapshot], ids=lambda opener: opener.__name__)
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockDevice]:
    """One for all tests: what refuses every change stays as it is."""
    opener: Opener = request.param
    with opener(tmp_path_factory.mktemp("device")) as opened:
        yield opened


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_a_range_reads_as_what_was_written(device: BlockDevice, offset: int, length: int) -> None:
    assert (device.size, device.read_only) == (SIZE, True)
    assert device.pread(length, offset) == content()[offset : offset + length]
    buffer = bytearray(b"?" * (length + 2))
    device.pread_into(memoryview(buffer)[1:-1], offset)
    assert buffer == b"?" + content()[offset : offset + length] + b"?"


@pytest.mark.parametrize(("offset", "length"), OFF_THE_DISK)
def test_a_range_off_the_disk_is_refused(device: BlockDevice, offset: int, length: int) -> None:
    uses: list[Callable[[], object]] = [
        lambda: device.pread(length, offset),
        lambda: device.allocation(offset, length),
        lambda: device.write_zeroes(offset, length),
        lambda: device.discard(offset, length),
    ]
    for use in uses:
        with pytest.raises(InvalidArgument):
            use()


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_allocation_covers_what_was_asked_and_claims_no_zero_in_vain(
    device: BlockDevice, offset: int, length: int
) -> None:
    check_allocation(list(device.allocation(offset, length)), content()[offset : offset + length])


def test_what_was_never_written_is_known_to_be_zero(device: BlockDevice) -> None:
    assert any(part.zero for part in device.allocation(0, SIZE))


def test_two_walks_at_once_do_not_disturb_each_other(device: BlockDevice) -> None:
    alone = list(device.allocation(0, SIZE))
    together = list(zip(device.allocation(0, SIZE), device.allocation(0, SIZE), strict=True))
    assert together == [(part, part) for part in alone]


def test_writes_are_refused(device: BlockDevice) -> None:
    check_writes_are_refused(device)
    device.flush()
    assert device.pread(SIZE, 0) == content()


@pytest.mark.parametrize("opener", OPENERS)
def test_a_closed_device_refuses_and_may_be_closed_again(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path) as device:
        device.pread(SIZE, 0)
        check_closed_says_so(device)


def test_threads_read_what_they_asked_for(device: BlockDevice) -> None:
    truth = content()

    def reads_the_truth(number: int, turn: int) -> bool:
        randomness = random.Random(f"{number} {turn}")
        offset = randomness.randrange(SIZE)
        length = randomness.randrange(SIZE - offset)
        return device.pread(length, offset) == truth[offset : offset + length]

    check_side_by_side(60, reads_the_truth)
