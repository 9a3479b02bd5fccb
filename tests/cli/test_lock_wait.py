"""--lock-wait: a folder or target that another run uses is waited for, without keeping anybody else from the disk, and
not for ever. How the disk itself is waited for is in test_disk_wait.py."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lmdbitmap import Filter, InvalidArgument, Store, back_up, sync_disk
from lmdbitmap.cli.main import run
from lmdbitmap.notes import holds
from lmdbitmap.notes.sync_note import NoteFile
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.repository import known_backups
from lmdbitmap.system import file_locks
from lmdbitmap.system.file_locks import LockedFile
from lmdbitmap.tracker import chain
from lmdbitmap.work import patience
from tests.cli.conftest import Cli

VERBS = {
    "backup": ["sda", "REPO"],
    "prune": ["REPO", "--keep", "1"],
    "copy": ["REPO", "COPY"],
    "sync": ["sda", "TARGET"],
}


class Clock:
    """Time passes while somebody waits, and then only; `act` is done before the second look."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.act: Callable[[], object] = lambda: None
        self.waits_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.waits_s.append(seconds)
        self.now_s += seconds
        if len(self.waits_s) == 2:
            self.act()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    passing = types.SimpleNamespace(monotonic=lambda: clock.now_s, sleep=clock.sleep)
    monkeypatch.setattr(patience, "time", passing)
    return clock


@pytest.fixture
def words(cli: Cli) -> dict[str, list[str]]:
    """Of each verb, on a disk that was backed up, copied and synced once."""
    places = {name: str(cli.folder / name.lower()) for name in ("REPO", "COPY", "TARGET")}
    words = {verb: [verb, *(places.get(word, word) for word in given)] for verb, given in VERBS.items()}
    cli.add("sda")
    for verb in ("backup", "copy", "sync"):
        cli.ok(*words[verb])
    return words


@pytest.fixture(params=VERBS)
def verb(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def held(cli: Cli, words: dict[str, list[str]], verb: str) -> Iterator[LockedFile]:
    """What another run of the verb would hold."""
    if verb == "sync":
        with Store.open(str(cli.store)) as store, store.read() as reader:
            disk = chain.find_disk(reader, "sda").uuid
        lock = NoteFile.of(str(cli.store), disk, words[verb][2]).locked()
    else:
        repository = words[verb][2 if verb in ("backup", "copy") else 1]
        lock = file_locks.lock_file(BackupFolder(repository, "sda").path_of("lock"))
    with lock:
        yield lock


def test_another_run_is_waited_for(
    cli: Cli, words: dict[str, list[str]], verb: str, held: LockedFile, clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    clock.act = held.close
    cli.ok(*words[verb], "--lock-wait", 30)
    assert len(clock.waits_s) == 2
    [told] = [record.getMessage() for record in caplog.records if "is held by" in record.getMessage()]
    assert told.endswith("is held by another run: waiting for 30 s at most")


def test_the_wait_ends(
    cli: Cli, words: dict[str, list[str]], verb: str, held: LockedFile, clock: Clock
) -> None:
    assert "is in use by another program" in cli.fails(4, *words[verb], "--lock-wait", 30)
    assert sum(clock.waits_s) == pytest.approx(30)


def test_without_the_option_nobody_waits(
    cli: Cli, words: dict[str, list[str]], verb: str, held: LockedFile, clock: Clock
) -> None:
    assert "is in use by another program" in cli.fails(4, *words[verb])
    assert clock.waits_s == []


@pytest.mark.parametrize("verb", ["backup"], indirect=True)
def test_the_disk_may_be_served_while_a_backup_waits(
    cli: Cli, words: dict[str, list[str]], held: LockedFile, clock: Clock
) -> None:
    def serve_for_a_moment() -> None:
        with Store.open(str(cli.store)) as store, Filter.attach(store, "sda", background=False) as disk:
            disk.pwrite(b"while it waited", 0)
        held.close()

    clock.act = serve_for_a_moment
    assert "incremental" in cli.ok(*words["backup"], "--lock-wait", 30)
    cli.ok("restore", words["backup"][2], "sda", cli.folder / "out.raw")
    assert (cli.folder / "out.raw").read_bytes().startswith(b"while it waited")


def test_a_run_that_merges_what_a_repository_no_longer_holds_is_waited_for(
    cli: Cli, words: dict[str, list[str]], clock: Clock
) -> None:
    with Store.open(str(cli.store)) as store, store.read() as reader:
        [note] = holds.hold_files(str(cli.store), chain.find_disk(reader, "sda").uuid)
    with ExitStack() as merging:
        merging.enter_context(note.locked())
        clock.act = merging.close
        assert "incremental" in cli.ok(*words["backup"], "--lock-wait", 30)
    assert len(clock.waits_s) == 2


@pytest.mark.parametrize("verb", ["copy"], indirect=True)
def test_what_is_backed_up_while_a_copy_waits_is_copied_too(
    cli: Cli, words: dict[str, list[str]], held: LockedFile, clock: Clock
) -> None:
    def make_one_more() -> None:
        assert run(["--store", str(cli.store), *words["backup"]]) == 0
        held.close()

    clock.act = make_one_more
    cli.ok(*words["copy"], "--lock-wait", 30)
    assert len(known_backups(BackupFolder(words["copy"][2], "sda")).backups) == 2


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e8])
def test_for_ever_is_no_wait(cli: Cli, seconds: float) -> None:
    cli.add("sda")
    place = cli.folder / "place"
    with Store.open(str(cli.store)) as store:
        asks: list[Callable[[], object]] = [
            lambda: back_up(store, ["sda"], place, lock_wait_s=seconds),
            lambda: sync_disk(store, "sda", place, lock_wait_s=seconds),
        ]
        for ask in asks:
            with pytest.raises(InvalidArgument, match="seconds are no time limit; name more than 0"):
                ask()
    assert not place.exists()


def test_two_backups_that_wait_do_not_wait_for_each_other(cli: Cli, clock: Clock) -> None:
    """Each takes the folders in the same order, whatever the order in which its disks are named."""
    for name in ("sda", "sdb"):
        cli.add(name)
    repository = cli.folder / "repo"
    cli.ok("backup", "sda", "sdb", repository)
    first = file_locks.lock_file(BackupFolder(repository, "sda").path_of("lock"))

    def second_is_free() -> None:
        file_locks.lock_file(BackupFolder(repository, "sdb").path_of("lock")).close()
        first.close()

    clock.act = second_is_free
    cli.ok("backup", "sdb", "sda", repository, "--lock-wait", 30)
    assert len(clock.waits_s) == 2


def test_several_disks_share_one_patience(cli: Cli, clock: Clock) -> None:
    for name in ("sda", "sdb"):
        cli.add(name)
    repository = str(cli.folder / "repo")
    cli.ok("backup", "sda", "sdb", repository)
    locks = [file_locks.lock_file(BackupFolder(repository, name).path_of("lock")) for name in ("sda", "sdb")]
    assert cli("backup", "sda", "sdb", repository, "--lock-wait", 30).code == 4
    assert sum(clock.waits_s) == pytest.approx(30)
    for lock in locks:
        lock.close()
