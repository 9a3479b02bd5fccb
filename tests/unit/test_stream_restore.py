"""What a stream makes of a target: new, in place, of the wrong size; and what a stream that was cut leaves."""

from __future__ import annotations

import io
import os
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.errors import AlreadyExists, Busy, FormatError, InvalidArgument, NotFound, StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.store import Store
from lmdbitmap.streams.restore import AppliedResult, apply_stream
from lmdbitmap.tracker import session
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.helpers import naive_rbd_diff
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.naive_rbd_diff import Stream
from tests.helpers.nbd_far import crashing_at_first, far_server
from tests.helpers.nbd_raw import FLUSH
from tests.helpers.tracked import TrackedDisk

MIB = 1 << 20
SIZE = 3 * MIB + 513


def stream(
    ranges: list[tuple[int, bytes | int]], *, since: str | None = None, size: int = SIZE, version: int = 1
) -> Stream:
    return Stream(version, size, since, "tuesday", ranges)


def apply(
    made: Stream, target: Path, *, cut: int = 0, more: bytes = b"", larger: bool = False
) -> AppliedResult:
    data = naive_rbd_diff.written(made)
    return apply_stream(io.BytesIO(data[: len(data) - cut] + more), target, larger=larger)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file that a diff can be applied to."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def test_no_stream_becomes_a_disk_inside_of_a_store(tmp_path: Path) -> None:
    Store.create(str(tmp_path / "store")).close()
    with pytest.raises(InvalidArgument, match="is inside of the store"):
        apply(stream([]), tmp_path / "store" / "x.raw")


@pytest.mark.parametrize("since", [None, "monday"])
def test_no_stream_is_applied_to_a_backup(tmp_path: Path, since: str | None) -> None:
    with closing(BackedUpDisk(tmp_path, SIZE)) as backed_up:
        image = tmp_path / "backups" / "sda" / backed_up.backup().file
    before = image.read_bytes()
    with pytest.raises(InvalidArgument, match="is among the backups in"):
        apply(stream([(0, b"x")], since=since), image)
    assert image.read_bytes() == before


def test_image_of_a_tracked_disk_is_left_alone(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE)) as tracked:
        data = io.BytesIO(naive_rbd_diff.written(stream([(0, b"untracked")], since="monday")))
        with pytest.raises(AlreadyExists, match="its tracker would not know"):
            apply_stream(data, tracked.image, store=tracked.store)
        assert tracked.image.read_bytes() == bytes(SIZE)


# --- a new file ---


@pytest.mark.parametrize("version", [1, 2])
def test_a_full_stream_makes_a_sparse_file(tmp_path: Path, version: int) -> None:
    out = tmp_path / "out.raw"
    made = stream([(5, b"data"), (MIB, MIB), (2 * MIB, b"x" * MIB)], version=version)
    result = apply(made, out)
    assert out.read_bytes() == naive_rbd_diff.applied(made, b"")
    assert out.stat().st_blocks * 512 < SIZE // 2
    assert (result.head, result.path) == (made[:4], str(out))
    assert (result.bytes_written, result.bytes_zero) == (4 + MIB, MIB)
    assert os.listdir(tmp_path) == ["out.raw"]
    assert out.stat().st_mode & 0o777 == 0o600


def test_ranges_in_any_order_and_over_each_other_are_what_came_last(tmp_path: Path) -> None:
    made = stream([(MIB, b"y" * 9000), (0, b"x" * 9000), (4000, 2 * MIB), (MIB + 5, b"z"), (MIB + 6, 0)])
    apply(made, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == naive_rbd_diff.applied(made, b"")


def test_an_empty_file_is_as_good_as_none_and_one_with_something_in_it_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    out.touch()
    apply(stream([(0, b"x")]), out)
    with pytest.raises(AlreadyExists, match="is not empty, and a full stream makes a new disk"):
        apply(stream([(0, b"y")]), out)
    assert out.read_bytes()[:1] == b"x"
    with pytest.raises(InvalidArgument, match="is a folder"):
        apply(stream([(0, b"y")]), tmp_path)


@pytest.mark.parametrize("cut", [1, 10, MIB, 2 * MIB + 17])
def test_a_full_stream_that_was_cut_leaves_no_name(tmp_path: Path, cut: int) -> None:
    with pytest.raises(FormatError, match="found no more bytes"):
        apply(stream([(0, b"x" * (2 * MIB))]), tmp_path / "out.raw", cut=cut)
    assert os.listdir(tmp_path) == []


def test_what_comes_after_the_end_spoils_the_stream(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nothing after the end"):
        apply(stream([(0, b"x")]), tmp_path / "out.raw", more=b"\n")
    assert os.listdir(tmp_path) == []


def test_nothing_is_no_stream(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"^the stream, byte 0: "):
        apply_stream(io.BytesIO(), tmp_path / "out.raw")
    assert os.listdir(tmp_path) == []


# --- in place ---


def test_a_diff_changes_a_file_in_place_and_nothing_but_what_it_names(disk: Path) -> None:
    before, inode = disk.read_bytes(), disk.stat().st_ino
    made = stream([(5, b"data"), (MIB, MIB)], since="monday")
    apply(made, disk)
    assert disk.read_bytes() == naive_rbd_diff.applied(made, before)
    assert disk.stat().st_ino == inode


@pytest.mark.parametrize("size", [100, SIZE - 1, SIZE + 1, 5 * MIB])
def test_a_file_gets_the_size_of_the_stream(disk: Path, size: int) -> None:
    before = disk.read_bytes()
    made = stream([(size - 4, b"tail")], since="monday", size=size)
    apply(made, disk)
    assert disk.read_bytes() == naive_rbd_diff.applied(made, before)


def test_a_diff_needs_the_disk_that_it_counts_from(tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    for is_there in (False, True):
        if is_there:
            out.touch()
        with pytest.raises(NotFound, match="counts from 'monday', and there is no disk at"):
            apply(stream([], since="monday"), out)
    assert out.stat().st_size == 0


def test_a_cut_diff_says_that_it_has_to_be_applied_again_and_then_all_is_well(disk: Path) -> None:
    made = stream([(0, b"x" * (2 * MIB)), (2 * MIB, MIB)], since="monday")
    after = naive_rbd_diff.applied(made, disk.read_bytes())
    with pytest.raises(FormatError, match=f"; {disk} is unusable until the same stream is applied again$"):
        apply(made, disk, cut=30)
    assert disk.read_bytes() != after
    apply(made, disk)
    assert disk.read_bytes() == after


def test_a_stream_that_does_not_wait_is_no_program_that_uses_it(disk: Path) -> None:
    class Unready(io.RawIOBase):
        def readinto(self, buffer: object, /) -> None:
            return None

    with pytest.raises(
        StorageError, match="the stream: it does not block; give a file or a pipe without O_NONBLOCK"
    ):
        apply_stream(Unready(), disk)


def test_a_disk_that_is_in_use_is_not_touched(disk: Path) -> None:
    before = disk.read_bytes()
    with FileDevice.open(disk), pytest.raises(Busy):
        apply(stream([(0, b"x")], since="monday"), disk)
    assert disk.read_bytes() == before


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    with loop_node(tmp_path, 4 * MIB) as node:
        node.write_bytes(b"old" * MIB + b"!" * MIB)
        yield node


needs_loop = pytest.mark.skipif(
    not can_make_loop_devices(), reason="a loop device cannot be had here: run as root"
)


@needs_loop
def test_a_full_stream_onto_a_block_device_leaves_nothing_of_what_was_there(loop: Path) -> None:
    made = stream([(MIB + 5, b"data"), (MIB, b"before"), (2 * MIB, 4096)], size=4 * MIB)
    apply(made, loop)
    assert loop.read_bytes() == naive_rbd_diff.applied(made, b"")


@needs_loop
def test_a_block_device_made_of_a_tracked_image_is_left_alone(loop: Path, tmp_path: Path) -> None:
    backing = tmp_path / "backing.raw"
    before, made = backing.read_bytes(), naive_rbd_diff.written(stream([(0, b"untracked")], size=4 * MIB))
    with Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", str(backing), granularity_bits=12)
        with pytest.raises(InvalidArgument, match=f"a write to {loop} would change disk 'sda'"):
            apply_stream(io.BytesIO(made), loop, store=store)
    assert backing.read_bytes() == before


@needs_loop
def test_a_diff_onto_a_block_device_changes_what_it_names(loop: Path) -> None:
    before = loop.read_bytes()
    made = stream([(MIB + 5, b"data"), (2 * MIB, 4096)], size=4 * MIB, since="monday")
    apply(made, loop)
    assert loop.read_bytes() == naive_rbd_diff.applied(made, before)


@needs_loop
@pytest.mark.parametrize("since", [None, "monday"])
def test_a_block_device_of_another_size_is_refused_untouched(loop: Path, since: str | None) -> None:
    before = loop.read_bytes()
    with pytest.raises(InvalidArgument, match=r"has 4194304 bytes, and the stream's disk has 4194303; give"):
        apply(stream([(0, b"x")], size=4 * MIB - 1, since=since), loop)
    assert loop.read_bytes() == before


@needs_loop
@pytest.mark.parametrize("since", [None, "monday"])
def test_what_is_behind_the_disk_on_a_larger_block_device_is_zeroed_if_that_is_asked_for(
    loop: Path, since: str | None
) -> None:
    before, made = loop.read_bytes(), stream([(0, b"x")], size=MIB, since=since)
    with pytest.raises(InvalidArgument, match=f"or say --larger, which zeroes the {3 * MIB} bytes behind"):
        apply(made, loop)
    result = apply(made, loop, larger=True)
    assert loop.read_bytes() == naive_rbd_diff.applied(made, before[:MIB] if since else b"") + bytes(3 * MIB)
    assert result.bytes_behind == 3 * MIB


def test_zeroes_behind_the_disk_that_were_in_a_servers_memory_alone_are_not_lost(tmp_path: Path) -> None:
    with far_server(tmp_path, 2 * MIB) as far:
        far.stable[:] = b"o" * (2 * MIB)
        far.behave = crashing_at_first(FLUSH)
        made = stream([(0, b"new")], size=MIB)
        apply_stream(io.BytesIO(naive_rbd_diff.written(made)), far.uri, larger=True)
        assert far.handshakes == 2
        assert far.stable == b"new" + bytes(2 * MIB - 3)


def test_a_larger_file_keeps_its_size_if_that_is_asked_for(disk: Path) -> None:
    before, made = disk.read_bytes(), stream([(0, b"x")], size=MIB, since="monday")
    apply(made, disk, larger=True)
    assert disk.read_bytes() == naive_rbd_diff.applied(made, before[:MIB]) + bytes(SIZE - MIB)


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    data = naive_rbd_diff.written(stream([(0, b"x" * (2 * MIB))], size=9 * MIB))
    apply_stream(io.BytesIO(data), tmp_path / "out.raw", progress=lambda *news: told.append(news))
    assert told[-1] == (9 * MIB, 9 * MIB)


def test_memory_does_not_grow_with_a_record(tmp_path: Path) -> None:
    size = 64 * MIB
    data = naive_rbd_diff.written(stream([(0, b"x" * size)], size=size))
    source = io.BytesIO(data)
    tracemalloc.start()
    apply_stream(source, tmp_path / "out.raw")
    assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    tracemalloc.stop()
    assert (tmp_path / "out.raw").stat().st_size == size
