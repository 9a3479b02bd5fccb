"""A bitmap in a qcow2 image in place of a flat file: what is refused, and what comes back from it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmdbitmap import export
from lmdbitmap.errors import AlreadyExists, FormatError, InvalidArgument, LmdbitmapError, NotFound, Untrusted
from lmdbitmap.export import FileForm
from lmdbitmap.extents import Trust
from lmdbitmap.flat_file.inspection import inspect_file
from lmdbitmap.geometry import Geometry
from lmdbitmap.qcow2 import Qcow2Writer
from lmdbitmap.qcow2.layout import BITMAPS_CONSISTENT, EXTENSION_BITMAPS
from lmdbitmap.store import Store
from lmdbitmap.system import files
from lmdbitmap.tracker import chain, standalone
from lmdbitmap.tracker.changes import Changes
from lmdbitmap.tracker.changes import changes as changes_of
from lmdbitmap.tracker.standalone import Operation
from tests.helpers.qcow2_model import DiskFile
from tests.helpers.tracked import NAME, TrackedDisk

SIZE = 1000 * 4096
CLUSTER = 1 << 16


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[TrackedDisk]:
    tracked = TrackedDisk(tmp_path, SIZE).clean()
    with tracked.attach() as disk:
        disk.mark(5 * 4096, 4096)
        disk.mark(SIZE - 1, 1)
    yield tracked
    tracked.close()


@pytest.fixture
def store(tracked: TrackedDisk) -> Store:
    return tracked.store


def changes(store: Store) -> Changes:
    return changes_of(store, NAME)


def dirty_in(store: Store, name: str) -> list[tuple[int, bytes]]:
    with store.read() as reader:
        bitmap = standalone.find(reader, name)
    return [(region, bytes(dirty).rstrip(b"\0")) for region, dirty, _ in standalone.slices(store, bitmap)]


def test_what_was_exported_is_imported_as_it_was(store: Store, tmp_path: Path) -> None:
    image, flat = tmp_path / "x.qcow2", tmp_path / "x.dbm"
    header = export.export_changes(changes(store), image, form=FileForm.QCOW2)
    assert header == export.export_changes(changes(store), flat)
    assert header.dirty_count == 2
    back = export.import_file(store, image, "back")
    export.import_file(store, flat, "flat")
    assert dirty_in(store, "back") == dirty_in(store, "flat") != []
    assert (back.geometry, back.superset, back.all_dirty) == (
        Geometry(SIZE, 12),
        "x.qcow2 may be a superset",
        None,
    )
    assert export.export_bitmap(store, "back", tmp_path / "y.qcow2", form=FileForm.QCOW2).dirty_count == 2
    assert export.importable_header(tmp_path / "y.qcow2", bitmap="back").geometry == back.geometry


def test_nothing_is_taken_away_for_a_bitmap_that_lost_its_superset_flag_on_the_way(
    store: Store, tmp_path: Path
) -> None:
    """An image has no room for that flag, so any bitmap in one may be a superset."""
    with store.read() as reader:
        disk = chain.find_disk(reader, NAME)
    export.keep_changes(changes(store), "changed")
    store.update(lambda writer: chain.note_superset(writer, disk, "after a crash"))
    image = tmp_path / "x.qcow2"
    assert export.export_changes(changes(store), image, form=FileForm.QCOW2).trust is Trust.SUPERSET
    export.import_file(store, image, "back")
    with pytest.raises(Untrusted, match=r"could hide changes, .* 'back' .* \(x.qcow2 may be a superset\)"):
        standalone.combine(store, "changed", Operation.AND_NOT, ["back"])


def test_the_same_import_may_be_made_again_and_another_one_not(store: Store, tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    export.export_changes(changes(store), image, form=FileForm.QCOW2)
    first = export.import_file(store, image, "back")
    assert export.import_file(store, image, "back", into=NAME) == first
    with pytest.raises(AlreadyExists):
        export.import_file(store, image, "back", all_dirty=True)


def test_bits_from_an_image_are_copied_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small image that calls a huge disk dirty they take half a GiB."""
    image, folders = tmp_path / "x.qcow2", []
    export.export_changes(changes(store), image, form=FileForm.QCOW2)

    def counting(folder: str) -> int:
        folders.append(folder)
        return make(folder)

    make = files.open_nameless
    monkeypatch.setattr(files, "open_nameless", counting)
    export.import_file(store, image, "back")
    assert folders == [store.path]


@pytest.mark.parametrize("content", [b"x", b"QFI\xfb"])
def test_no_image_is_replaced(store: Store, tmp_path: Path, content: bytes) -> None:
    """A guest's data may be in it."""
    image = tmp_path / "x.qcow2"
    image.write_bytes(content)
    with pytest.raises(FormatError, match="expected an empty file or none"):
        export.export_changes(changes(store), image, form=FileForm.QCOW2)
    assert image.read_bytes() == content
    image.write_bytes(b"")
    export.export_changes(changes(store), image, form=FileForm.QCOW2)
    with pytest.raises(FormatError):
        export.export_changes(changes(store), image)


def test_nothing_is_left_of_an_image_that_could_not_be_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(fd: int, data: bytes, offset: int) -> None:
        raise OSError(28, os.strerror(28))

    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr("lmdbitmap.flat_file.in_qcow2.files.pwrite_whole", refused)
    with pytest.raises(LmdbitmapError, match=r"x\.qcow2: No space left on device"):
        export.export_changes(changes(store), tmp_path / "x.qcow2", form=FileForm.QCOW2)
    assert sorted(os.listdir(tmp_path)) == before


def without_bitmaps(path: Path) -> None:
    with DiskFile(path, create=True) as sink:
        Qcow2Writer(sink, size=SIZE).finish()


def cut(path: Path) -> None:
    without_bitmaps(path)
    os.truncate(path, 100)


@pytest.mark.parametrize(
    ("make", "refusal", "words"),
    [
        (without_bitmaps, NotFound, "has no bitmap; name one that it has: none"),
        (cut, FormatError, "a file of 100; look at it with qemu-img check, or make a full backup"),
        (lambda path: path.write_bytes(b""), FormatError, "bytes"),
    ],
)
def test_an_image_that_has_none_is_refused_before_anything_is_done(
    store: Store, tmp_path: Path, make: Callable[[Path], object], refusal: type[Exception], words: str
) -> None:
    image = tmp_path / "guest.qcow2"
    make(image)
    for use in (
        lambda: export.importable_header(image),
        lambda: export.import_file(store, image, "back"),
    ):
        with pytest.raises(refusal, match=words):
            use()
    with store.read() as reader:
        assert reader.bitmaps() == []


def test_of_many_bitmaps_some_are_told(store: Store, tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    names = [b"%04d" % number for number in range(1000)]
    with DiskFile(image, create=True) as sink:
        writer = Qcow2Writer(sink, size=SIZE)
        entry = struct.pack(">QIIBBHI", CLUSTER, 1, 0, 1, 12, 4, 0)
        directory = b"".join(entry + name.ljust(8, b"\0") for name in names)
        extension = struct.pack(">IIQQ", len(names), 0, len(directory), writer.append(directory))
        writer.add_extension(EXTENSION_BITMAPS, extension, autoclear_features=BITMAPS_CONSISTENT)
        writer.finish()
    with pytest.raises(InvalidArgument, match=r"several bitmaps: '0000', .*'0015' and 984 more; name one"):
        export.importable_header(image)
    with pytest.raises(NotFound, match=r"no bitmap 'x'; .*'0015' and 984 more"):
        export.importable_header(image, bitmap="x")
    assert export.importable_header(image, bitmap="0999").granularity_bits == 12


def test_a_bitmap_in_use_is_imported_only_as_all_dirty(store: Store, tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    export.export_changes(changes(store), image, form=FileForm.QCOW2)
    with DiskFile(image) as file:
        content = bytearray(file.pread(file.size, 0))
    directory = int.from_bytes(content[136:144], "big")
    content[directory + 15] |= 1
    image.write_bytes(content)
    with pytest.raises(Untrusted, match="was not stored when its program ended"):
        export.import_file(store, image, "back")
    assert export.import_file(store, image, "back", all_dirty=True).all_dirty is not None


def test_who_inspects_an_image_is_told_what_to_do_with_it(store: Store, tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    export.export_changes(changes(store), image, form=FileForm.QCOW2)
    with pytest.raises(FormatError, match=r"found a qcow2 image; see its bitmaps with `qemu-img info`"):
        inspect_file(image)


def test_a_flat_file_holds_one_bitmap(store: Store, tmp_path: Path) -> None:
    flat = tmp_path / "x.dbm"
    export.export_changes(changes(store), flat)
    with pytest.raises(InvalidArgument, match=r"x\.dbm is no qcow2 image, and holds one bitmap"):
        export.import_file(store, flat, "back", bitmap=NAME)
    with pytest.raises(NotFound, match=r"nothing\.qcow2 does not exist"):
        export.import_file(store, tmp_path / "nothing.qcow2", "back", bitmap=NAME)
