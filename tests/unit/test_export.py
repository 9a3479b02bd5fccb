"""Bitmaps as flat files: what is written, what is believed, and what is left when it goes wrong."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lmdbitmap import export
from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    NotFound,
    StorageError,
    Untrusted,
)
from lmdbitmap.extents import Trust
from lmdbitmap.flat_file.flatfile import FlatFile
from lmdbitmap.flat_file.inspection import inspect_file
from lmdbitmap.format import BitsTally, Flags, Zeroes
from lmdbitmap.geometry import Geometry
from lmdbitmap.storage.schema import DEFERRED, Bitmap, region_key
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.standalone import Operation
from tests.helpers import naive_flat
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder, trust_of

BLOCKS = 200
SIZE = BLOCKS * 4096 - 100
LAST = BLOCKS - 1


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: these tests commit often."""
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(tmp_path, SIZE).clean("monday")) as tracked:
        yield tracked


def write(tracked: TrackedDisk, *blocks: int, checkpoint: str | None = None) -> None:
    with tracked.attach() as disk:
        for block in blocks:
            disk.pwrite(b"x", block * 4096)
        if checkpoint is not None:
            disk.checkpoint(checkpoint)


def bitmap_called(tracked: TrackedDisk, name: str) -> Bitmap:
    with tracked.store.read() as reader:
        return standalone.find(reader, name)


def blocks_called(tracked: TrackedDisk, name: str) -> set[int]:
    runs = standalone.runs(tracked.store, bitmap_called(tracked, name))
    return {block for run in runs for block in range(*run)}


def bitmap_names(tracked: TrackedDisk) -> list[str | None]:
    with tracked.store.read() as reader:
        return [bitmap.name for bitmap in reader.bitmaps()]


def a_file(path: Path, blocks: set[int], size: int = SIZE, granularity_bits: int = 12, **fields: int) -> Path:
    path.write_bytes(naive_flat.write(blocks, size, granularity_bits, b"\x80", **fields))
    return path


def of_a_larger_disk(path: Path, disk_size: int, **fields: int) -> Path:
    """The header of another file of 512-byte blocks; its bits are left alone."""
    data = path.read_bytes()
    header = bytearray(data[:4096])
    bit_count = -(-disk_size // 512)
    sizes = {"disk_size": disk_size, "bit_count": bit_count, "bits_size": -(-bit_count // 64) * 8}
    for name, number in {**sizes, **fields}.items():
        naive_flat.put(header, name, number)
    path.write_bytes(bytes(naive_flat.seal(header)) + data[4096:])
    return path


# --- out ---


def test_changes_are_written_with_their_identity_and_read_by_the_plainest_reader(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    write(tracked, 1, 2, LAST, checkpoint="tuesday")
    write(tracked, 7)
    changes = tracked.changes("monday", "tuesday")
    header = export.export_changes(changes, tmp_path / "x.dbm")
    data = (tmp_path / "x.dbm").read_bytes()
    assert naive_flat.dirty_blocks(data) == {1, 2, LAST}
    assert naive_flat.get(data, "dirty_count") == 3
    assert naive_flat.get(data, "flags") == Flags.CLEAN
    assert (header.disk_uuid, header.epoch_uuid) == (changes.disk.uuid, changes.disk.epoch)
    assert (header.since_uuid, header.since_time_ns) == (changes.since.uuid, changes.since.time_ns)
    assert changes.until is not None
    assert header.until_uuid == changes.until.uuid
    with FlatFile.open(tmp_path / "x.dbm") as file:
        assert file.header == header
        assert file.metadata == {"disk": NAME, "checkpoint": "monday", "until": "tuesday"}


def test_an_open_period_says_that_it_records(tracked: TrackedDisk, tmp_path: Path) -> None:
    write(tracked, 7)
    header = export.export_changes(tracked.changes(), tmp_path / "x.dbm")
    assert header.flags == Flags.CLEAN | Flags.RECORDING
    assert header.until_uuid is None


def test_the_same_bitmap_exported_twice_gives_the_same_bytes(tracked: TrackedDisk, tmp_path: Path) -> None:
    write(tracked, 1, checkpoint="tuesday")
    os.mkdir(tmp_path / "elsewhere")
    files = [tmp_path / "x.dbm", tmp_path / "elsewhere" / "y.dbm"]
    for path in files:
        export.export_changes(tracked.changes("monday", "tuesday"), path)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_each_stretch_of_a_chain_is_a_bitmap_of_its_own(tracked: TrackedDisk, tmp_path: Path) -> None:
    write(tracked, 1, checkpoint="tuesday")
    stretches = [("monday", None), ("monday", "tuesday"), ("tuesday", None)]
    uuids = {
        export.export_changes(tracked.changes(since, until), tmp_path / "x.dbm").bitmap_uuid
        for since, until in stretches
    }
    assert len(uuids) == 3


def test_what_an_owner_lost_with_a_crash_is_exported_as_a_superset(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    disk = tracked.attach()
    disk.pwrite(b"x", 5 * 4096)
    disk.abandon()
    header = export.export_changes(tracked.changes(), tmp_path / "x.dbm")
    assert Flags.SUPERSET in header.flags
    assert naive_flat.dirty_blocks((tmp_path / "x.dbm").read_bytes()) >= {5}


def test_what_is_being_written_is_exported_as_a_superset(tracked: TrackedDisk, tmp_path: Path) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 5 * 4096)
        disk.beat()
        armed = export.export_changes(tracked.changes(), tmp_path / "x.dbm")
        disk.persist()
        exact = export.export_changes(tracked.changes(), tmp_path / "x.dbm")
    assert (armed.flags & Flags.SUPERSET, exact.flags & Flags.SUPERSET) == (Flags.SUPERSET, 0)
    assert (armed.dirty_count, exact.dirty_count) == (64, 1)


def test_everything_dirty_is_exported_as_ones_up_to_the_end_of_the_disk(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE)) as tracked:
        header = export.export_changes(tracked.changes(), tmp_path / "x.dbm")
    assert header.dirty_count == BLOCKS
    assert Flags.SUPERSET in header.flags
    assert inspect_file(tmp_path / "x.dbm").dirty_bytes == SIZE


def test_what_cannot_be_trusted_is_not_written(tracked: TrackedDisk, tmp_path: Path) -> None:
    (tmp_path / "x.dbm").write_bytes(b"old")
    tracked.write_behind_our_back(b"x", 0)
    with pytest.raises(Untrusted, match="not known"):
        export.export_changes(tracked.changes(), tmp_path / "x.dbm")
    with pytest.raises(Untrusted, match="not known"):
        export.keep_changes(tracked.changes(), "copy")
    assert (tmp_path / "x.dbm").read_bytes() == b"old"
    assert bitmap_names(tracked) == []


def test_clean_stretches_take_no_space(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, 1 << 36, granularity_bits=9).clean()) as tracked:
        write(tracked, 1, (1 << 24) - 1)
        export.export_changes(tracked.changes(), tmp_path / "x.dbm")
        export.import_file(tracked.store, tmp_path / "x.dbm", "copy")
        assert list(standalone.runs(tracked.store, bitmap_called(tracked, "copy"))) == list(
            tracked.changes().runs()
        )
    status = os.stat(tmp_path / "x.dbm")
    assert status.st_size == 4096 + (1 << 24)
    assert status.st_blocks * 512 < 1 << 21


def test_a_disk_without_bytes_is_exported_and_imported(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, 0)) as tracked:
        export.export_changes(tracked.changes(), tmp_path / "x.dbm")
        assert inspect_file(tmp_path / "x.dbm").dirty_bytes == 0
        export.import_file(tracked.store, tmp_path / "x.dbm", "empty")
        assert blocks_called(tracked, "empty") == set()


def test_a_disk_that_grew_since_it_was_asked_is_exported_as_it_was(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, 1 << 20, granularity_bits=9).clean()) as tracked:
        write(tracked, 3)
        asked = tracked.changes()
        with tracked.attach() as disk:
            disk.resize(4 << 30)
        header = export.export_changes(asked, tmp_path / "x.dbm")
    assert header.disk_size == 1 << 20
    assert naive_flat.dirty_blocks((tmp_path / "x.dbm").read_bytes()) == {24}


def test_a_disk_that_shrank_since_it_was_asked_is_not_exported_as_clean_there(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    """The bits past its new end are gone, and the file would be of the size that it had."""
    write(tracked, 0, LAST)
    asked = tracked.changes()
    with tracked.attach() as disk:
        disk.resize(4096)
    for keep in (
        lambda: export.export_changes(asked, tmp_path / "x.dbm"),
        lambda: export.keep_changes(asked, "kept"),
        lambda: blocks_of(asked),
    ):
        with pytest.raises(Busy, match="made smaller just now; ask again"):
            keep()
    assert (bitmap_names(tracked), (tmp_path / "x.dbm").exists()) == ([], False)
    assert blocks_of(tracked.changes()) == {0}


def test_ones_that_the_disk_has_no_room_for_are_not_begun(tracked: TrackedDisk, tmp_path: Path) -> None:
    """A not-CLEAN header of 4 KiB may stand for petabytes."""
    huge = of_a_larger_disk(a_file(tmp_path / "huge.dbm", set(), 1 << 20, 9), 2**63 - 1, flags=0)
    export.import_file(tracked.store, huge, "huge", all_dirty=True)
    with pytest.raises(StorageError, match="bytes are needed; free some space there"):
        export.export_bitmap(tracked.store, "huge", tmp_path / "x.dbm")
    assert not (tmp_path / "x.dbm").exists()


def test_leftovers_of_a_killed_export_are_swept_away(tracked: TrackedDisk, tmp_path: Path) -> None:
    leftover, foreign = (tmp_path / f"{name}.dbm.0123456789abcdef.partial" for name in "xy")
    for path in (leftover, foreign):
        path.write_bytes(b"half")
    export.export_changes(tracked.changes(), tmp_path / "x.dbm")
    assert (leftover.exists(), foreign.exists()) == (False, True)


# --- kept in the store ---


def test_kept_changes_stay_when_their_checkpoints_are_gone(tracked: TrackedDisk, tmp_path: Path) -> None:
    write(tracked, 1, 2, checkpoint="tuesday")
    changes = tracked.changes("monday", "tuesday")
    exported = export.export_changes(changes, tmp_path / "before.dbm")
    export.keep_changes(changes, "copy")
    with tracked.attach() as disk:
        disk.forget("monday")
    assert blocks_called(tracked, "copy") == {1, 2}
    assert export.export_bitmap(tracked.store, "copy", tmp_path / "after.dbm") == exported
    assert (tmp_path / "after.dbm").read_bytes()[4096:] == (tmp_path / "before.dbm").read_bytes()[4096:]


def test_kept_changes_are_as_loose_as_they_were(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE)) as tracked:
        assert export.keep_changes(tracked.changes(), "unknown").all_dirty is not None
        with tracked.attach() as disk:
            disk.checkpoint("monday")
            disk.pwrite(b"x", 0)
            disk.beat()
            assert export.keep_changes(tracked.changes(), "armed").superset is not None
        assert export.keep_changes(tracked.changes(), "exact").superset is None
        assert blocks_called(tracked, "unknown") == set(range(BLOCKS))
        assert blocks_called(tracked, "armed") == set(range(64))
        assert blocks_called(tracked, "exact") == {0}


# --- in ---


def test_an_imported_file_is_exported_with_the_same_bits_and_identity(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    write(tracked, 1, 63, 64, LAST)
    first = export.export_changes(tracked.changes(), tmp_path / "x.dbm")
    export.import_file(tracked.store, tmp_path / "x.dbm", "copy")
    assert blocks_called(tracked, "copy") == {1, 63, 64, LAST}
    second = export.export_bitmap(tracked.store, "copy", tmp_path / "y.dbm")
    assert second == first
    export.import_file(tracked.store, tmp_path / "y.dbm", "copy of the copy")
    third = export.export_bitmap(tracked.store, "copy of the copy", tmp_path / "z.dbm")
    assert third == first


def test_a_file_of_strangers_without_any_identity_is_imported(tracked: TrackedDisk, tmp_path: Path) -> None:
    path = a_file(tmp_path / "x.dbm", {0, 9}, 5 << 20, 16)
    kept = export.import_file(tracked.store, path, "foreign")
    assert (kept.origin_disk, kept.origin_since, kept.superset) == (None, None, None)
    header = export.export_bitmap(tracked.store, "foreign", tmp_path / "y.dbm")
    assert header.flags == Flags.CLEAN
    assert header.bitmap_uuid == uuid.UUID(int=0)
    assert (tmp_path / "y.dbm").read_bytes()[4096:] == path.read_bytes()[4096:]


def test_a_superset_stays_one(tracked: TrackedDisk, tmp_path: Path) -> None:
    path = a_file(tmp_path / "x.dbm", {0}, flags=Flags.CLEAN | Flags.SUPERSET)
    export.import_file(tracked.store, path, "loose")
    assert Flags.SUPERSET in export.export_bitmap(tracked.store, "loose", tmp_path / "y.dbm").flags


def test_what_is_not_clean_is_imported_as_everything_dirty_or_not_at_all(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    path = a_file(tmp_path / "x.dbm", {0}, flags=0)
    with pytest.raises(Untrusted, match="not closed cleanly"):
        export.import_file(tracked.store, path, "unclean")
    assert bitmap_names(tracked) == []
    export.import_file(tracked.store, path, "unclean", all_dirty=True)
    assert blocks_called(tracked, "unclean") == set(range(BLOCKS))


def test_all_dirty_is_taken_at_its_word_for_a_clean_file_too(tracked: TrackedDisk, tmp_path: Path) -> None:
    export.import_file(tracked.store, a_file(tmp_path / "x.dbm", {0}), "all", all_dirty=True)
    assert blocks_called(tracked, "all") == set(range(BLOCKS))


def test_a_name_that_is_taken_is_not_taken_over(tracked: TrackedDisk, tmp_path: Path) -> None:
    path = a_file(tmp_path / "x.dbm", {0})
    export.import_file(tracked.store, path, "one")
    for name in ("one", NAME):
        with pytest.raises(AlreadyExists, match=name):
            export.import_file(tracked.store, a_file(tmp_path / "y.dbm", {1}), name)
    assert blocks_called(tracked, "one") == {0}


@pytest.mark.parametrize("into", [None, NAME])
@pytest.mark.parametrize("all_dirty", [False, True])
def test_the_same_file_again_is_welcome(
    tracked: TrackedDisk, tmp_path: Path, into: str | None, all_dirty: bool
) -> None:
    path = a_file(tmp_path / "x.dbm", {3, LAST})
    first = export.import_file(tracked.store, path, "copy", all_dirty=all_dirty)
    again = export.import_file(tracked.store, path, "copy", into=into, all_dirty=all_dirty)
    assert (again, bitmap_names(tracked)) == (first, ["copy"])
    wanted = set(range(BLOCKS)) if all_dirty else {3, LAST}
    assert (blocks_called(tracked, "copy"), tracked.stored_dirt()) == (wanted, wanted if into else set())


@pytest.mark.parametrize(
    ("blocks", "fields"), [({3}, {}), ({3, 4, LAST}, {}), ({3, LAST}, {"flags": 5}), ({LAST}, {})]
)
def test_the_same_uuid_with_other_dirt_is_another_bitmap(
    tracked: TrackedDisk, tmp_path: Path, blocks: set[int], fields: dict[str, int]
) -> None:
    export.import_file(tracked.store, a_file(tmp_path / "x.dbm", {3, LAST}), "copy")
    other = a_file(tmp_path / "y.dbm", blocks, **fields)
    with pytest.raises(AlreadyExists):
        export.import_file(tracked.store, other, "copy", into=NAME)
    assert (blocks_called(tracked, "copy"), tracked.stored_dirt()) == ({3, LAST}, set())


def test_the_same_file_again_into_a_disk_that_cannot_be_had_keeps_the_bitmap(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    path = a_file(tmp_path / "x.dbm", {0})
    export.import_file(tracked.store, path, "copy")
    with tracked.attach(), pytest.raises(Busy):
        export.import_file(tracked.store, path, "copy", into=NAME)
    assert blocks_called(tracked, "copy") == {0}


def damaged(path: Path, position: int) -> Path:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    return path


def test_nothing_of_a_file_is_kept_whose_last_bit_is_wrong(tracked: TrackedDisk, tmp_path: Path) -> None:
    before = tracked.stored_dirt()
    path = damaged(a_file(tmp_path / "x.dbm", {0, 1, LAST}), 4096 + 24)
    with pytest.raises(FormatError, match="checksum"):
        export.import_file(tracked.store, path, "damaged", into=NAME)
    assert (bitmap_names(tracked), tracked.stored_dirt()) == ([], before)


def test_a_wrong_file_does_not_even_keep_the_stores_writers_waiting(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    path = damaged(a_file(tmp_path / "x.dbm", {0, 1, LAST}), 4096 + 24)
    tracked.store.update = forbidden  # type: ignore[method-assign]
    with pytest.raises(FormatError):
        export.import_file(tracked.store, path, "damaged", into=NAME)


def forbidden(change: object) -> NoReturn:
    pytest.fail("the store was asked for a transaction")


def test_a_file_that_changes_before_it_is_proven_is_not_kept_in_part(
    tracked: TrackedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_file(tmp_path / "x.dbm", {0, LAST})
    proven_copy = FlatFile.proven_copy

    def change_it_first(file: FlatFile, folder: str) -> FlatFile:
        damaged(path, 4096)
        return proven_copy(file, folder)

    monkeypatch.setattr(FlatFile, "proven_copy", change_it_first)
    with pytest.raises(FormatError):
        export.import_file(tracked.store, path, "moving")
    assert bitmap_names(tracked) == []


def test_a_transaction_does_not_wait_for_the_file(
    tracked: TrackedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file system may hang, and every guest's commit would hang with it. What was proven is what is kept."""
    path = a_file(tmp_path / "x.dbm", {0, LAST})
    update = tracked.store.update

    def change_it_first(change: object) -> object:
        damaged(path, 4096)
        return update(change)  # type: ignore[arg-type]

    monkeypatch.setattr(tracked.store, "update", change_it_first)
    export.import_file(tracked.store, path, "moving")
    assert blocks_called(tracked, "moving") == {0, LAST}


def test_no_file_and_what_is_no_file_are_told_apart(tracked: TrackedDisk, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NotFound):
        inspect_file(tmp_path / "nothing.dbm")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(FormatError, match="a regular file"):
            export.import_file(tracked.store, path, "x")


def test_a_file_of_holes_is_read_in_no_time(tracked: TrackedDisk, tmp_path: Path) -> None:
    """Eight terabytes of bits, all but one of them clean; the test's own timeout is the judge."""
    bits_size = 2**43
    path = of_a_larger_disk(
        a_file(tmp_path / "x.dbm", {0}, 1 << 20, 9),
        8 * bits_size * 512,
        bits_checksum=checksum_with_zeroes(b"\1", bits_size - 1),
    )
    os.truncate(path, 4096 + bits_size)
    export.import_file(tracked.store, path, "holes")
    assert blocks_called(tracked, "holes") == {0}
    assert inspect_file(path).dirty_bytes == 512


@pytest.mark.parametrize("most", [1000, 4095])
def test_a_file_that_the_system_gives_in_short_pieces_has_the_same_bits(
    tracked: TrackedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """As file systems in user space may. Such a piece ends inside of a region."""
    blocks = set(range(7, 1 << 17, 331))
    path = a_file(tmp_path / "x.dbm", blocks, 512 << 17, 9)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, most), offset))
    export.import_file(tracked.store, path, "short")
    assert blocks_called(tracked, "short") == blocks
    assert inspect_file(path).problems == []


def test_a_file_system_that_reports_no_holes_gives_the_same_bits(
    tracked: TrackedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {0, 5 << 15, (1 << 20) - 1}
    path = a_file(tmp_path / "x.dbm", blocks, 512 << 20, 9)

    def no_holes(fd: int, position: int, how: int) -> NoReturn:
        raise OSError(errno.EINVAL, "no holes here")

    monkeypatch.setattr(os, "lseek", no_holes)
    export.import_file(tracked.store, path, "dense")
    assert blocks_called(tracked, "dense") == blocks
    assert inspect_file(path).problems == []


def checksum_with_zeroes(data: bytes, count: int) -> int:
    """Of more zeroes than zlib would get through in hours."""
    tally = BitsTally(0)
    tally.add(data)
    tally.add(Zeroes(count))
    return tally.checksum


# --- into a disk ---


def test_an_import_into_a_disk_marks_it_and_is_kept_too(tracked: TrackedDisk, tmp_path: Path) -> None:
    write(tracked, 7)
    path = a_file(tmp_path / "x.dbm", {0, 64, LAST})
    export.import_file(tracked.store, path, "copy", into=NAME)
    assert blocks_of(tracked.changes()) == tracked.stored_dirt() == {0, 7, 64, LAST}
    assert tracked.changes().summary.standing.trust is Trust.EXACT
    assert blocks_called(tracked, "copy") == {0, 64, LAST}


def test_coarser_and_finer_bitmaps_are_regrained_outward(tracked: TrackedDisk, tmp_path: Path) -> None:
    export.import_file(tracked.store, a_file(tmp_path / "x.dbm", {1, 12}, SIZE, 16), "coarse", into=NAME)
    export.import_file(tracked.store, a_file(tmp_path / "y.dbm", {8 * 40 + 7}, SIZE, 9), "fine", into=NAME)
    assert tracked.stored_dirt() == set(range(16, 32)) | set(range(192, BLOCKS)) | {40}


def test_a_loose_import_makes_the_period_a_superset(tracked: TrackedDisk, tmp_path: Path) -> None:
    unclean = a_file(tmp_path / "x.dbm", set(), flags=0)
    export.import_file(tracked.store, unclean, "unclean", into=NAME, all_dirty=True)
    assert tracked.stored_dirt() == set(range(BLOCKS))
    assert tracked.changes().standing.trust is Trust.SUPERSET


def test_an_import_goes_into_a_disk_that_is_attached_here(tracked: TrackedDisk, tmp_path: Path) -> None:
    export.import_file(tracked.store, a_file(tmp_path / "x.dbm", {3, LAST}), "copy")
    with tracked.attach() as disk:
        disk.pwrite(b"x", 5 * 4096)
        export.merge_into(disk, "copy")
        assert tracked.stored_dirt() >= {3, LAST}  # durable at once
        disk.pwrite(b"x", 3 * 4096)  # settled: nothing is lost or armed by it
        assert blocks_of(disk.changes()) == {3, 5, LAST}
    assert blocks_of(tracked.changes()) == {3, 5, LAST}


def test_what_is_being_written_beside_an_import_stays_armed(tracked: TrackedDisk, tmp_path: Path) -> None:
    export.import_file(tracked.store, a_file(tmp_path / "x.dbm", {100}), "copy")
    disk = tracked.attach()
    disk.pwrite(b"x", 5 * 4096)
    export.merge_into(disk, "copy")
    disk.pwrite(b"x", 6 * 4096)  # memory alone knows this one, and the armed extent stands for it
    disk.abandon()
    assert tracked.stored_dirt() >= {5, 6, 100}


def test_an_import_that_the_store_refuses_costs_the_guest_nothing(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    export.import_file(tracked.store, a_file(tmp_path / "x.dbm", {3, 100}), "copy")
    with tracked.attach() as disk:
        update = tracked.store.update
        tracked.store.update = refused  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="full"):
            export.merge_into(disk, "copy")
        tracked.store.update = update  # type: ignore[method-assign]
        disk.pwrite(b"x", 3 * 4096)
        assert disk.standing().trust is Trust.EXACT
    assert blocks_of(tracked.changes()) == {3}


def refused(change: object) -> NoReturn:
    raise StorageError("store", OSError("full"), next_step="free some space")


def test_an_import_into_a_disk_in_deferred_mode_is_durable_when_that_is_detached(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE, durability=DEFERRED).clean()) as tracked:
        with tracked.attach() as disk:
            disk.pwrite(b"x", 0)
            export.import_file(tracked.store, a_file(tmp_path / "x.dbm", {3}), "copy")
            export.merge_into(disk, "copy")
            disk.pwrite(b"x", 4 * 4096)
        assert blocks_of(tracked.changes()) == {0, 3, 4}


def test_a_bitmap_of_another_size_goes_nowhere(tracked: TrackedDisk, tmp_path: Path) -> None:
    path = a_file(tmp_path / "x.dbm", {0}, SIZE + 1)
    with pytest.raises(InvalidArgument, match=f"{SIZE + 1} bytes.* {SIZE} bytes"):
        export.import_file(tracked.store, path, "copy", into=NAME)
    assert (bitmap_names(tracked), tracked.stored_dirt()) == ([], set())


@pytest.mark.parametrize("others", [["other"], []])
def test_an_import_that_somebody_else_changes_before_it_is_in_the_disk_fails(
    tracked: TrackedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: list[str]
) -> None:
    """It would say that the disk has all of the file's blocks; what the other one made stays."""
    store, merge = tracked.store, export._merge_wherever_owned
    export.import_file(store, a_file(tmp_path / "y.dbm", {3}), "other")

    def slowly(*words: Any) -> None:
        if others:
            standalone.combine(store, "copy", Operation.AND, others)
        merge(*words)
        if not others:
            store.update(lambda writer: standalone.remove(writer, "copy"))

    monkeypatch.setattr(export, "_merge_wherever_owned", slowly)
    with pytest.raises(Busy, match=r"'copy' was changed or removed .* 'sda'; import the file again"):
        export.import_file(store, a_file(tmp_path / "x.dbm", {3, LAST}), "copy", into=NAME)
    assert bitmap_names(tracked) == (["copy", "other"] if others else ["other"])
    if others:
        assert blocks_called(tracked, "copy") == {3}


def test_a_damaged_bitmap_makes_the_period_that_it_goes_into_a_superset(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    copy = export.import_file(tracked.store, a_file(tmp_path / "x.dbm", {3}), "copy")
    rot = region_key(copy.id, 0)
    tracked.store.update(lambda writer: writer._put("regions", rot, b"rot"))
    with tracked.attach() as disk:
        export.merge_into(disk, "copy")
    answer = tracked.changes()
    assert (trust_of(answer), blocks_of(answer)) == (Trust.SUPERSET, set(range(BLOCKS)))


def test_an_import_into_a_disk_that_cannot_be_had_leaves_no_bitmap(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    path = a_file(tmp_path / "x.dbm", {0})
    with tracked.attach(), pytest.raises(Busy):  # whoever owns it listens to nobody
        export.import_file(tracked.store, path, "copy", into=NAME)
    with pytest.raises(NotFound, match="'sdb'"):
        export.import_file(tracked.store, path, "copy", into="sdb")
    assert (bitmap_names(tracked), tracked.stored_dirt()) == ([], set())


def test_marking_regions_of_another_disk_is_refused(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk, pytest.raises(InvalidArgument, match="resized"):
        disk.mark_regions([(0, b"\xff" * 512)], Geometry(SIZE - 4096, 12))
    assert tracked.stored_dirt() == set()


# --- inspected ---


def test_a_sound_file_is_described(tracked: TrackedDisk, tmp_path: Path) -> None:
    write(tracked, 0, LAST)
    header = export.export_changes(tracked.changes(), tmp_path / "x.dbm")
    found = inspect_file(tmp_path / "x.dbm")
    assert (found.header, found.trust, found.problems) == (header, Trust.EXACT, [])
    assert found.metadata == {"disk": NAME, "checkpoint": "monday"}
    assert found.dirty_bytes == 2 * 4096 - 100


def test_an_unclean_file_is_described_and_worth_nothing(tmp_path: Path) -> None:
    found = inspect_file(a_file(tmp_path / "x.dbm", {0}, flags=0))
    assert (found.trust, found.dirty_bytes) == (Trust.UNTRUSTED, SIZE)
    assert found.problems[0] == "its CLEAN flag is not set, so everything counts as dirty"


def test_a_file_with_wrong_bits_is_described_with_what_is_wrong(tmp_path: Path) -> None:
    found = inspect_file(damaged(a_file(tmp_path / "x.dbm", {0}), 4096))
    assert (found.trust, found.dirty_bytes, found.header.disk_size) == (Trust.UNTRUSTED, SIZE, SIZE)
    assert "checksum" in found.problems[0]


def test_a_file_whose_header_is_wrong_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="header_checksum"):
        inspect_file(damaged(a_file(tmp_path / "x.dbm", {0}), 40))
