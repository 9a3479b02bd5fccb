"""`serve --bitmap-file X.dbm`: what X says before, while and after its disk is served."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest

from lmdbitmap import export
from lmdbitmap.errors import AlreadyExists, FormatError, NotFound, StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file import bitmap_file
from lmdbitmap.flat_file.inspection import inspect_file
from lmdbitmap.format import Flags
from lmdbitmap.storage import owner, owner_file
from tests.helpers import naive_flat
from tests.helpers.tracked import TrackedDisk, blocks_of, quick_folder

BLOCKS = 200
SIZE = BLOCKS * 4096 - 100
ALL = set(range(BLOCKS))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: these tests commit often."""
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(tmp_path, SIZE).clean("monday")) as tracked:
        yield tracked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.dbm"


def served(tracked: TrackedDisk, path: Path, *blocks: int) -> str | None:
    """Serve the disk once, with a guest that writes these blocks; answer why the file was not believed."""
    with tracked.attach() as disk:
        reason = bitmap_file.begin(disk, path)
        write(disk, *blocks)
    return reason


def write(disk: Filter, *blocks: int) -> None:
    for block in blocks:
        disk.pwrite(b"x", block * 4096)


def in_file(path: Path) -> set[int]:
    assert inspect_file(path).problems == []
    return naive_flat.dirty_blocks(path.read_bytes())


def is_clean(path: Path) -> bool:
    return inspect_file(path).header.clean


def changed(path: Path, **fields: int) -> None:
    """Overrule fields of the header, under a right checksum."""
    data = path.read_bytes()
    header = bytearray(data[:4096])
    for name, number in fields.items():
        naive_flat.put(header, name, number)
    path.write_bytes(bytes(naive_flat.seal(header)) + data[4096:])


# --- its life ---


def test_a_missing_file_is_made_at_a_clean_detach(tracked: TrackedDisk, path: Path) -> None:
    with tracked.attach() as disk:
        assert bitmap_file.begin(disk, path) is None
        write(disk, 1, BLOCKS - 1)
        assert not path.exists()
    assert in_file(path) == {1, BLOCKS - 1}


def test_it_is_not_clean_from_before_the_first_write_until_the_detach(
    tracked: TrackedDisk, path: Path
) -> None:
    served(tracked, path, 1)
    assert is_clean(path)
    with tracked.attach() as disk:
        assert bitmap_file.begin(disk, path) is None
        assert not is_clean(path)
        write(disk, 2)
        assert not is_clean(path)
    assert in_file(path) == {1, 2}


def test_what_was_read_is_what_the_period_holds_already(tracked: TrackedDisk, path: Path) -> None:
    served(tracked, path, 1)
    served(tracked, path)
    assert tracked.stored_dirt() == {1}
    assert tracked.changes().summary.standing.trust is Trust.EXACT


def test_bits_that_only_the_file_knows_are_taken_in(tracked: TrackedDisk, path: Path) -> None:
    served(tracked, path, 1)
    disk = tracked.disk()
    numbers = {
        "disk_uuid": int.from_bytes(disk.uuid.bytes, "little"),
        "since_uuid": int.from_bytes(tracked.changes().since.uuid.bytes, "little"),
    }
    path.write_bytes(naive_flat.write({7, 8}, SIZE, 12, b"\x80", **numbers))
    assert served(tracked, path, 9) is None
    assert in_file(path) == tracked.stored_dirt() == {1, 7, 8, 9}
    assert tracked.changes().standing.trust is Trust.EXACT


def test_bits_since_another_checkpoint_make_a_superset(tracked: TrackedDisk, path: Path) -> None:
    served(tracked, path, 1)
    with tracked.attach() as disk:
        disk.checkpoint("tuesday")
    assert served(tracked, path, 2) is None
    assert tracked.stored_dirt() == {1, 2}
    assert "another checkpoint" in (tracked.changes().standing.reason or "")
    assert inspect_file(path).trust is Trust.SUPERSET


def test_a_file_whose_name_is_no_utf_8_is_taken_in_like_any_other(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    """Its name is in the reasons that the store keeps."""
    path = tmp_path / os.fsdecode(b"x\xff.dbm")
    served(tracked, path, 3)
    with tracked.attach() as disk:
        disk.checkpoint("tuesday")
        assert bitmap_file.begin(disk, path) is None
        assert disk.standing().trust is Trust.SUPERSET
        disk.abandon()
    assert served(tracked, path) is not None
    assert "x\\udcff.dbm" in tracked.disk().epoch_reason
    assert export.import_file(tracked.store, path, "all", all_dirty=True).all_dirty is not None


def test_distrust_keeps_a_reason_that_is_no_utf_8(tmp_path: Path) -> None:
    path = str(tmp_path / "owner")
    with closing(owner.Owner(path)) as held:
        held.declare_distrust(os.fsdecode(b"\xff"), time_ns=1)
    assert owner_file.distrust(path) == owner_file.Distrust(1, "\\udcff")


def test_after_a_crash_everything_is_dirty_and_the_epoch_says_why(tracked: TrackedDisk, path: Path) -> None:
    served(tracked, path, 1)
    disk = tracked.attach()
    bitmap_file.begin(disk, path)
    write(disk, 2)
    disk.abandon()
    assert not is_clean(path)
    epoch = tracked.disk().epoch
    reason = served(tracked, path)
    assert reason is not None
    assert "not closed cleanly" in reason
    assert tracked.disk().epoch != epoch
    assert tracked.disk().epoch_reason == reason
    assert in_file(path) == tracked.stored_dirt() == ALL
    with pytest.raises(Untrusted, match="not closed cleanly"):
        tracked.changes("monday")


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"flags": 0}, "not closed cleanly"),
        ({"disk_uuid": 0}, "does not say of which disk"),
        ({"disk_size": SIZE - 1}, f"{SIZE - 1} bytes"),
        ({"bits_checksum": 5}, "checksum"),
        ({"dirty_count": 5}, "set bits"),
        ({"incompatible_features": 1}, "incompatible_features"),
        ({"header_size": 4097}, "header_size"),
    ],
)
def test_what_cannot_be_believed_makes_everything_dirty(
    tracked: TrackedDisk, path: Path, lie: dict[str, int], said: str
) -> None:
    served(tracked, path, 1)
    changed(path, **lie)
    reason = served(tracked, path, 2)
    assert reason is not None
    assert said in reason
    assert in_file(path) == ALL
    assert blocks_of(tracked.changes()) == ALL


@pytest.mark.parametrize("lie", [{"incompatible_features": 1}, {"flags": 9}, {"header_size": 4097}])
def test_a_file_that_a_newer_version_may_understand_is_not_clean_while_its_disk_is_served(
    tracked: TrackedDisk, path: Path, lie: dict[str, int]
) -> None:
    served(tracked, path, 1)
    changed(path, **lie)
    disk = tracked.attach()
    assert bitmap_file.begin(disk, path) is not None
    assert not is_clean(path)
    assert inspect_file(path).header.disk_uuid == tracked.disk().uuid
    disk.abandon()
    assert "not closed cleanly" in str(served(tracked, path))


def test_a_file_that_was_cut_makes_everything_dirty(tracked: TrackedDisk, path: Path) -> None:
    served(tracked, path, 1)
    os.truncate(path, 4100)
    assert served(tracked, path, 2) is not None
    assert in_file(path) == ALL


# --- what is not ours is left alone ---


@pytest.mark.parametrize("content", [b"", b"a letter", b"\x89LDBM\r\n\x1a\x02\x00" + bytes(5000)])
def test_what_is_no_flat_file_of_this_version_is_refused_and_kept(
    tracked: TrackedDisk, path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    epoch = tracked.disk().epoch
    with tracked.attach() as disk, pytest.raises(FormatError):
        bitmap_file.begin(disk, path)
    assert path.read_bytes() == content
    assert tracked.disk().epoch == epoch


@pytest.mark.parametrize("lie", [{}, {"flags": 0}, {"bits_checksum": 5}])
def test_the_file_of_another_disk_is_refused_and_kept(
    tracked: TrackedDisk, path: Path, lie: dict[str, int]
) -> None:
    served(tracked, path, 1)
    changed(path, disk_uuid=5, **lie)
    content, epoch = path.read_bytes(), tracked.disk().epoch
    with tracked.attach() as disk, pytest.raises(AlreadyExists, match="is the file of another disk"):
        bitmap_file.begin(disk, path)
    assert path.read_bytes() == content
    assert tracked.disk().epoch == epoch
    assert tracked.stored_dirt() == {1}


def test_a_fifo_is_refused_and_not_waited_for(tracked: TrackedDisk, path: Path) -> None:
    os.mkfifo(path)
    with tracked.attach() as disk, pytest.raises((FormatError, StorageError)):
        bitmap_file.begin(disk, path)


def test_a_folder_that_is_not_there_is_missed_at_once(tracked: TrackedDisk, tmp_path: Path) -> None:
    with tracked.attach() as disk, pytest.raises(NotFound, match="nowhere"):
        bitmap_file.begin(disk, tmp_path / "nowhere" / "x.dbm")


def test_a_detach_that_cannot_write_the_file_leaves_it_unclean(tracked: TrackedDisk, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    disk = tracked.attach()
    bitmap_file.begin(disk, folder / "x.dbm")
    write(disk, 3)
    folder.rmdir()
    with pytest.raises(NotFound):
        disk.detach()
    assert blocks_of(tracked.changes()) == {3}  # the store knows it all the same
    with tracked.attach() as disk:
        assert disk.standing().trust is Trust.EXACT


def test_the_file_counts_as_written_only_for_what_was_detached_cleanly(
    tracked: TrackedDisk, path: Path
) -> None:
    disk = tracked.attach()
    bitmap_file.begin(disk, path)
    disk.abandon()
    assert not path.exists()


def test_a_file_is_not_written_for_a_session_that_lost_track(tracked: TrackedDisk, path: Path) -> None:
    served(tracked, path, 1)
    disk = tracked.attach()
    bitmap_file.begin(disk, path)
    update = tracked.store.update
    tracked.store.update = full  # type: ignore[method-assign]
    write(disk, 2)
    disk.detach()
    tracked.store.update = update  # type: ignore[method-assign]
    assert not is_clean(path)
    assert served(tracked, path) is not None


def full(change: object) -> NoReturn:
    raise StorageError("store", OSError(errno.ENOSPC, "full"), next_step="free some space")


def test_an_exported_file_of_a_superset_is_taken_in_as_one(tracked: TrackedDisk, path: Path) -> None:
    served(tracked, path, 1)
    changed(path, flags=Flags.CLEAN | Flags.RECORDING | Flags.SUPERSET)
    assert served(tracked, path) is None
    assert tracked.changes().standing.trust is Trust.SUPERSET
