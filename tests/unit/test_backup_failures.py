"""One bad disk of several: the others have the backups that they would have had alone, and the same moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.backups.result import BackupResult, BackupsFailed
from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    LmdbitmapError,
    NotFound,
    OwnerGone,
    SomeFailed,
    StorageError,
    Untrusted,
)
from lmdbitmap.filter import Filter
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import TrackableDevice
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.restoring.restore import restore
from lmdbitmap.store import Store
from lmdbitmap.system import atomic_files, file_locks
from lmdbitmap.tracker import chain, session
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.work.disks_failed import code_of
from tests.helpers.support import make_raw_image
from tests.helpers.tracked import quick_folder

BLOCK = 4096
SIZE = 40 * BLOCK
FIVE = ("a", "b", "c", "d", "e")
BAD = "b"
GOOD = tuple(name for name in FIVE if name != BAD)
WRITTEN = {name: number for number, name in enumerate(FIVE, start=1)}
"""Blocks of each disk that were written since its full backup."""


class Disks:
    """Five of one store, each with a full backup in a repository, and something written since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.create(str(folder / "store"))
        self.repository = folder / "backups"
        for name in FIVE:
            image = make_raw_image(folder / f"{name}.raw", SIZE, [(0, name.encode() * SIZE)])
            session.add(self.store, name, str(image), granularity_bits=12)
        backup(self.store, FIVE, self.repository)
        for name in FIVE:
            with Filter.attach(self.store, name, background=False) as disk:
                disk.pwrite(os.urandom(WRITTEN[name] * BLOCK), 0)

    def backup(self, **options: Any) -> list[BackupResult]:
        return backup(self.store, FIVE, self.repository, **options)

    def fails(self, **options: Any) -> BackupsFailed:
        with pytest.raises(BackupsFailed) as raised:
            self.backup(**options)
        return raised.value

    def path(self, name: str, file: str = "manifest.json") -> Path:
        return Path(BackupFolder(self.repository, name).path_of(file))

    def checkpoints(self, name: str) -> list[str]:
        with self.store.read() as reader:
            members = reader.checkpoints(chain.find_disk(reader, name).uuid)
        return [member.name for member in members if Maker.BACKUP.named(member.name)]

    def images(self, name: str) -> list[str]:
        return sorted(path.name for path in self.path(name).parent.glob("*.qcow2"))

    def restored(self, name: str) -> bytes:
        out = self.folder / "restored.raw"
        restore(self.repository, name, out)
        try:
            return out.read_bytes()
        finally:
            out.unlink()


@pytest.fixture
def disks() -> Iterator[Disks]:
    with quick_folder() as folder:
        made = Disks(folder)
        yield made
        made.store.close()


def have_increments_of_one_moment(
    disks: Disks, results: tuple[BackupResult, ...], names: tuple[str, ...]
) -> None:
    assert [result.disk for result in results] == list(names)
    assert len({(result.entry.checkpoint.name, result.entry.time_ns) for result in results}) == 1
    for result in results:
        entry = result.entry
        assert (entry.type_actual, entry.reason) == (BackupType.INCREMENTAL, None)
        assert entry.bytes_changed == WRITTEN[result.disk] * BLOCK
        assert disks.restored(result.disk) == (disks.folder / f"{result.disk}.raw").read_bytes()
        assert len(disks.images(result.disk)) == len(disks.checkpoints(result.disk)) == 2
        assert not disks.path(result.disk, "unfinished").exists()


# --- before the checkpoint ---

Trouble: TypeAlias = "Callable[[Disks], AbstractContextManager[None]]"


@contextmanager
def missing_image(disks: Disks) -> Iterator[None]:
    image = disks.folder / f"{BAD}.raw"
    image.rename(disks.folder / "away")
    yield
    (disks.folder / "away").rename(image)


@contextmanager
def damaged_manifest(disks: Disks) -> Iterator[None]:
    content = disks.path(BAD).read_bytes()
    disks.path(BAD).write_bytes(content[:-10])
    yield
    disks.path(BAD).write_bytes(content)


@contextmanager
def busy_folder(disks: Disks) -> Iterator[None]:
    with file_locks.lock_file(str(disks.path(BAD, "lock"))):
        yield


@contextmanager
def busy_image(disks: Disks) -> Iterator[None]:
    with FileDevice.open(disks.folder / f"{BAD}.raw"):
        yield


@contextmanager
def backed_up_elsewhere(disks: Disks) -> Iterator[None]:
    with Filter.attach(disks.store, BAD, background=False):
        yield


@contextmanager
def unreadable_owner_file(disks: Disks) -> Iterator[None]:
    path = Path(disks.store.owner_path(chain.disk_called(disks.store, BAD).uuid))
    path.rename(disks.folder / "away")
    path.mkdir()  # root may read any file
    yield
    path.rmdir()
    (disks.folder / "away").rename(path)


@contextmanager
def another_disks_folder(disks: Disks) -> Iterator[None]:
    content = disks.path(BAD).read_text()
    with disks.store.read() as reader:
        uuid = str(chain.find_disk(reader, BAD).uuid)
    disks.path(BAD).write_text(content.replace(uuid, f"{'0' * 8}{uuid[8:]}"))
    yield
    disks.path(BAD).write_text(content)


@contextmanager
def folder_that_takes_no_note(disks: Disks) -> Iterator[None]:
    replace = atomic_files.replace

    def refuse(path: str, data: bytes, **options: bool) -> None:
        if path == str(disks.path(BAD, "unfinished")):
            raise StorageError(path, OSError(errno.ENOSPC, "full"), next_step="free some space")
        replace(path, data, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(atomic_files, "replace", refuse)
        yield


@pytest.mark.parametrize(
    ("trouble", "kind", "code"),
    [
        (missing_image, NotFound, "not-found"),
        (damaged_manifest, FormatError, "damaged"),
        (busy_folder, Busy, "busy"),
        (busy_image, Busy, "busy"),
        (backed_up_elsewhere, Busy, "busy"),
        (unreadable_owner_file, StorageError, "storage-failed"),
        (another_disks_folder, AlreadyExists, "already-exists"),
        (folder_that_takes_no_note, StorageError, "storage-failed"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_disk_that_cannot_be_prepared_is_left_out_before_the_checkpoint(
    disks: Disks, trouble: Trouble, kind: type[LmdbitmapError], code: str
) -> None:
    before = disks.checkpoints(BAD), disks.images(BAD)
    with trouble(disks):
        failed = disks.fails()
        [(failed_disk, failure)] = failed.failures.items()
        assert (failed_disk, type(failure), code_of(failure)) == (BAD, kind, code)
        assert failed.causes == (failure,)
        assert str(failed).startswith(f"1 of 5 disks was not backed up: {BAD}: {failure.problem}; ")
        have_increments_of_one_moment(disks, failed.results, GOOD)
        assert (disks.checkpoints(BAD), disks.images(BAD)) == before
    [later] = backup(disks.store, [BAD], disks.repository)
    assert (later.entry.type_actual, later.entry.bytes_changed) == (
        BackupType.INCREMENTAL,
        WRITTEN[BAD] * BLOCK,
    )


def test_an_unknown_disk_is_left_out_too(disks: Disks) -> None:
    with pytest.raises(
        BackupsFailed, match="1 of 6 disks was not backed up: f: no disk is called 'f'"
    ) as some:
        backup(disks.store, ["f", *FIVE], disks.repository)
    have_increments_of_one_moment(disks, some.value.results, FIVE)
    assert not (disks.repository / "f").exists()


def test_an_unknown_disk_is_left_out_beside_those_that_are_attached(disks: Disks) -> None:
    with attached(disks) as filters, pytest.raises(BackupsFailed, match="f: no disk is called 'f'") as some:
        backup(
            disks.store, ["f", *FIVE], disks.repository, attached=filters, scratch=Scratch(str(disks.folder))
        )
    have_increments_of_one_moment(disks, some.value.results, FIVE)


def test_the_advice_makes_no_other_disk_full(disks: Disks) -> None:
    with damaged_manifest(disks):
        failed = disks.fails()
        assert "begin a new chain with `backup b REPO --full`" in str(failed.failures[BAD])
        assert "begin a new chain with `backup b REPO --full`" in str(failed)
        with pytest.raises(FormatError, match="begin a new chain with `backup --full`"):
            backup(disks.store, [BAD], disks.repository)


def test_a_disk_that_is_left_out_can_be_had_by_others_while_the_rest_is_copied(disks: Disks) -> None:
    def attach_it(done: int, total: int) -> None:
        with Filter.attach(disks.store, BAD, background=False), busy_folder(disks):
            seen.append(done)

    seen: list[int] = []
    with another_disks_folder(disks):
        disks.fails(progress=attach_it, kind=BackupType.FULL)
    assert seen


def test_a_disk_alone_is_told_by_its_own_error(disks: Disks) -> None:
    with missing_image(disks), pytest.raises(NotFound):
        backup(disks.store, [BAD], disks.repository)


def test_where_all_fail_nothing_is_made_and_nobody_is_frozen(disks: Disks) -> None:
    def frozen() -> AbstractContextManager[object]:
        raise AssertionError("there is no moment")

    with ExitStack() as held:
        for name in FIVE:
            held.enter_context(file_locks.lock_file(str(disks.path(name, "lock"))))
        failed = disks.fails(quiesced=frozen)
    assert (failed.results, [*failed.failures]) == ((), list(FIVE))
    assert str(failed).endswith("; see each of the `failures`")


def test_where_the_whole_run_fails_later_the_log_tells_who_was_left_out(
    disks: Disks, caplog: pytest.LogCaptureFixture
) -> None:
    def frozen() -> AbstractContextManager[object]:
        raise Busy("the guest does not listen", next_step="ask it again")

    before = [disks.checkpoints(name) for name in FIVE]
    with missing_image(disks), pytest.raises(Busy, match="does not listen"):
        disks.backup(quiesced=frozen)
    assert "disk b was left out: the image of disk 'b'" in caplog.text
    assert [disks.checkpoints(name) for name in FIVE] == before


def test_with_require_incremental_one_that_is_not_keeps_all_of_them_away(disks: Disks) -> None:
    with disks.path(BAD, "000001-full.qcow2").open("r+b") as image:
        image.truncate(100)
    before = {name: (disks.checkpoints(name), disks.images(name)) for name in FIVE}
    with pytest.raises(Untrusted, match="disk 'b' cannot have an incremental backup"):
        disks.backup(only_that=True)
    assert {name: (disks.checkpoints(name), disks.images(name)) for name in FIVE} == before


def test_with_require_incremental_one_without_any_backup_is_left_out_like_ever(disks: Disks) -> None:
    with damaged_manifest(disks):
        failed = disks.fails(only_that=True)
    have_increments_of_one_moment(disks, failed.results, GOOD)


# --- while the images are copied ---


def opening(troubles: Mapping[str, Callable[[], None]]) -> Callable[[str], TrackableDevice]:
    """Opens images; when the one of a disk that has a trouble is read, it comes."""

    class Troubled(FileDevice):
        def pread_into(self, buffer: memoryview, offset: int) -> None:
            troubles.get(Path(self.path).stem, lambda: None)()
            super().pread_into(buffer, offset)

    return lambda image: Troubled.open(image, read_only=True)


def fail_to_read() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("bad", FIVE)
def test_an_image_that_cannot_be_read_costs_its_own_backup_only(disks: Disks, bad: str) -> None:
    before = disks.checkpoints(bad)
    failed = disks.fails(open_device=opening({bad: fail_to_read}))
    [(failed_disk, failure)] = failed.failures.items()
    assert (failed_disk, code_of(failure)) == (bad, "storage-failed")
    have_increments_of_one_moment(disks, failed.results, tuple(name for name in FIVE if name != bad))
    assert (disks.checkpoints(bad), disks.images(bad)) == (before, ["000001-full.qcow2"])
    assert not disks.path(bad, "unfinished").exists()
    [later] = backup(disks.store, [bad], disks.repository)
    assert (later.entry.type_actual, later.entry.bytes_changed) == (
        BackupType.INCREMENTAL,
        WRITTEN[bad] * BLOCK,
    )
    assert disks.restored(bad) == (disks.folder / f"{bad}.raw").read_bytes()


def test_several_that_fail_are_all_told_of(disks: Disks) -> None:
    failed = disks.fails(open_device=opening({"a": fail_to_read, "e": fail_to_read}))
    assert [*failed.failures] == ["a", "e"]
    assert str(failed) == (
        f"2 of 5 disks were not backed up: a: {disks.folder}/a.raw: Input/output error,"
        f" e: {disks.folder}/e.raw: Input/output error; see each of the `failures`"
    )
    have_increments_of_one_moment(disks, failed.results, ("b", "c", "d"))


def test_progress_comes_to_its_end_all_the_same(disks: Disks) -> None:
    said: list[tuple[int, int]] = []
    disks.fails(
        open_device=opening({BAD: fail_to_read}),
        kind=BackupType.FULL,
        progress=lambda *told: said.append(told),
    )
    assert said[-1] == (5 * SIZE, 5 * SIZE)


@pytest.mark.parametrize("wish", [KeyboardInterrupt(), Busy("enough", next_step="rest"), OSError(5, "x")])
def test_a_listener_that_raises_ends_the_whole_run(disks: Disks, wish: BaseException) -> None:
    def cancel(done: int, total: int) -> None:
        if done == total:
            raise wish

    before = disks.checkpoints("e"), disks.images("e")
    with pytest.raises(type(wish)):
        disks.backup(progress=cancel)
    assert (disks.checkpoints("e"), disks.images("e")) == before
    assert [len(disks.images(name)) for name in FIVE] == [2, 2, 2, 2, 1]


def test_an_interrupt_in_the_copy_of_one_ends_the_run_for_those_after_it(disks: Disks) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disks.backup(open_device=opening({BAD: interrupt}))
    assert [len(disks.images(name)) for name in FIVE] == [2, 1, 1, 1, 1]
    assert [len(disks.checkpoints(name)) for name in FIVE] == [2, 1, 1, 1, 1]


# --- while guests write on ---


@contextmanager
def attached(disks: Disks) -> Iterator[dict[str, Filter]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Filter.attach(disks.store, name, background=False)) for name in FIVE}


@contextmanager
def served(disks: Disks) -> Iterator[dict[str, Filter]]:
    """By this process, to whoever asks at its control socket."""
    with ExitStack() as stack:
        filters = stack.enter_context(attached(disks))
        server = Server(filters)
        server.start()
        stack.callback(server.stop)
        held = HeldSnapshots(filters, server, Scratch(str(disks.folder), limit_bytes=64 * BLOCK))
        stack.enter_context(ControlServer(filters, held=held))
        yield filters


@pytest.mark.parametrize("route", [attached, served], ids=["attached", "served"])
def test_a_snapshot_that_breaks_costs_its_own_backup_only(
    disks: Disks, route: Callable[[Disks], AbstractContextManager[dict[str, Filter]]]
) -> None:
    contents = {name: (disks.folder / f"{name}.raw").read_bytes() for name in FIVE}
    with route(disks) as filters:

        @contextmanager
        def moment() -> Iterator[None]:
            yield
            for name, disk in filters.items():
                if name == BAD:
                    disk.snapshots[0]._break("its scratch file is full")
                else:
                    disk.pwrite(b"later" * BLOCK, 0)

        options: dict[str, Any] = {"attached": filters} if route is attached else {}
        failed = disks.fails(quiesced=moment, scratch=Scratch(str(disks.folder)), **options)
        assert [len(disk.snapshots) for disk in filters.values()] == [0] * 5
    [(failed_disk, failure)] = failed.failures.items()
    assert (failed_disk, type(failure)) == (BAD, StorageError)
    assert "its scratch file is full" in str(failure)
    assert [result.disk for result in failed.results] == list(GOOD)
    assert [disks.restored(name) for name in GOOD] == [contents[name] for name in GOOD]
    assert len(disks.checkpoints(BAD)) == 1
    [later] = backup(disks.store, [BAD], disks.repository)
    assert later.entry.type_actual is BackupType.INCREMENTAL


@pytest.mark.parametrize("route", [attached, served], ids=["attached", "served"])
def test_of_disks_that_are_served_one_is_left_out_too(
    disks: Disks, route: Callable[[Disks], AbstractContextManager[dict[str, Filter]]]
) -> None:
    with route(disks) as filters, damaged_manifest(disks):
        options: dict[str, Any] = {"attached": filters} if route is attached else {}
        failed = disks.fails(**options)
        assert len(disks.checkpoints(BAD)) == 1
    have_increments_of_one_moment(disks, failed.results, GOOD)


@pytest.mark.parametrize("route", [attached, served], ids=["attached", "served"])
def test_what_is_kept_for_a_disk_that_failed_is_let_go_at_once(
    disks: Disks,
    route: Callable[[Disks], AbstractContextManager[dict[str, Filter]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its guest does not pay for a backup that there will not be, and its checkpoint can go."""
    rename = os.rename

    def refuse(source: str, target: str) -> None:
        if target == str(disks.path("a", "000002-incremental.qcow2")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    seen: list[tuple[int, int]] = []
    with route(disks) as filters:

        def look(done: int, total: int) -> None:
            seen.append((len(filters["a"].snapshots), len(filters["e"].snapshots)))

        options: dict[str, Any] = {"attached": filters} if route is attached else {}
        failed = disks.fails(scratch=Scratch(str(disks.folder)), progress=look, **options)
        assert len(disks.checkpoints("a")) == 1
    assert seen[-1] == (0, 1)
    have_increments_of_one_moment(disks, failed.results, FIVE[1:])


def test_a_disk_whose_tracking_begins_anew_at_that_moment_is_told_alone(disks: Disks) -> None:
    with attached(disks) as filters:

        @contextmanager
        def moment() -> Iterator[None]:
            filters[BAD].start_epoch("by intent")
            yield

        failed = disks.fails(attached=filters, scratch=Scratch(str(disks.folder)), quiesced=moment)
    assert "began again just now: by intent" in str(failed.failures[BAD])
    have_increments_of_one_moment(disks, failed.results, GOOD)


# --- the error ---


def test_it_is_one_of_several_that_failed() -> None:
    failed = BackupsFailed((), {"a": LmdbitmapError("it broke", next_step="mend it")})
    assert isinstance(failed, SomeFailed)
    assert str(failed) == "1 of 1 disks was not backed up: a: it broke; mend it"
    assert code_of(failed.failures["a"]) == "failed"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OwnerGone("it ended", next_step="serve it again"), "owner-gone"),
        (Busy("somebody has it", next_step="wait"), "busy"),
        (SomeFailed("some", [], next_step="see"), "failed"),
    ],
)
def test_programs_know_errors_by_a_code(error: LmdbitmapError, code: str) -> None:
    assert code_of(error) == code
