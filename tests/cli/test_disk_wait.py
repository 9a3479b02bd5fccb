"""--lock-wait: a disk that somebody has for itself is waited for, and who waits keeps nobody from a disk."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from lmdbitmap import Filter, Store, back_up, stream_backup, sync_disk
from lmdbitmap.access import waiting
from lmdbitmap.cli.main import run
from lmdbitmap.images.device import FileDevice
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.system import file_locks
from tests.cli.conftest import SIZE, Cli
from tests.cli.test_lock_wait import Clock
from tests.cli.test_lock_wait import clock as clock
from tests.helpers.serving import serving
from tests.helpers.support import PATIENCE_SECONDS, Child, spawn
from tests.helpers.tracked import NAME, TrackedDisk

HAS_IT = r"disk 'sda' is owned by a process that does not serve it, such as another backup"
VERBS = {"backup": ["sda", "REPO"], "stream": ["sda", "--stdout"], "sync": ["sda", "TARGET"]}


@pytest.fixture(params=VERBS)
def words(cli: Cli, request: pytest.FixtureRequest) -> list[object]:
    """Of a verb that reads the disk."""
    cli.add("sda")
    verb = "backup" if request.param == "stream" else request.param
    return [verb, *(cli.folder / word if word.isupper() else word for word in VERBS[request.param])]


def holding(cli: Cli, *names: str) -> ExitStack:
    """Has the disks for itself until it is closed."""
    held = ExitStack()
    store = held.enter_context(Store.open(str(cli.store)))
    for name in names:
        held.enter_context(Filter.attach(store, name, background=False))
    return held


# --- one process, in which time passes while somebody waits ---


def test_a_disk_is_waited_for(
    cli: Cli, words: list[object], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    held = holding(cli, "sda")
    clock.act = held.close
    assert cli(*words, "--lock-wait", 30).code == 0
    assert len(clock.waits_s) == 2
    [told] = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert told == f"{HAS_IT}: waiting for 29.9 s at most"


def test_the_wait_ends(cli: Cli, words: list[object], clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with holding(cli, "sda"):
        assert cli.fails(4, *words, "--lock-wait", 30).startswith(f"{HAS_IT}; wait for that process")
    assert sum(clock.waits_s) == pytest.approx(30)
    assert sum("waiting" in record.getMessage() for record in caplog.records) == 1


def test_without_the_option_nobody_waits(cli: Cli, words: list[object], clock: Clock) -> None:
    with holding(cli, "sda"):
        assert cli.fails(4, *words).startswith(HAS_IT)
    assert clock.waits_s == []


def test_an_image_that_somebody_has_open_is_waited_for(cli: Cli, words: list[object], clock: Clock) -> None:
    """As QEMU has: nothing says whether it is for a moment, as by qemu-img, or for days."""
    writer = FileDevice.open(str(cli.folder / "sda.raw"))
    clock.act = writer.close
    assert cli(*words, "--lock-wait", 30).code == 0
    assert len(clock.waits_s) == 2


def test_an_image_that_stays_open_is_busy(cli: Cli, words: list[object], clock: Clock) -> None:
    with contextlib.closing(FileDevice.open(str(cli.folder / "sda.raw"))):
        assert "is open in QEMU or in another" in cli.fails(4, *words, "--lock-wait", 30)
    assert sum(clock.waits_s) == pytest.approx(30)


def test_a_folder_and_its_disk_share_one_patience(cli: Cli, clock: Clock) -> None:
    cli.add("sda")
    cli.ok("backup", "sda", cli.folder / "repo")
    lock = file_locks.lock_file(BackupFolder(cli.folder / "repo", "sda").path_of("lock"))
    clock.act = lock.close
    with holding(cli, "sda"):
        assert cli.fails(4, "backup", "sda", cli.folder / "repo", "--lock-wait", 30).startswith(HAS_IT)
    assert sum(clock.waits_s) == pytest.approx(30)


def test_of_several_disks_one_that_stays_busy_is_left_out(cli: Cli, clock: Clock) -> None:
    for name in ("sda", "sdb", "sdc"):
        cli.add(name)
    with holding(cli, "sdb"):
        answer = cli("backup", "sdc", "sdb", "sda", cli.folder / "repo", "--lock-wait", 30)
    assert answer.code == 4
    assert [line.split(":")[0] for line in answer.out.splitlines()] == ["sdc", "sda"]
    assert sorted(os.listdir(cli.folder / "repo")) == ["sda", "sdc"]
    assert sum(clock.waits_s) == pytest.approx(30)


def test_a_disk_that_is_gone_meanwhile_leaves_the_others(cli: Cli, clock: Clock) -> None:
    for name in ("sda", "sdb", "sdc"):
        cli.add(name)
    held = holding(cli, "sda")

    def remove_one() -> None:
        assert run(["--store", str(cli.store), "rm", "sdc"]) == 0
        held.close()

    clock.act = remove_one
    answer = cli("backup", "sda", "sdb", "sdc", cli.folder / "repo", "--lock-wait", 30)
    assert answer.code == 1
    made = [line.split(":")[0] for line in answer.out.splitlines()]
    assert made[-2:] == ["sda", "sdb"], answer


def test_disks_of_which_only_some_are_served_are_not_waited_for(cli: Cli) -> None:
    """It is nobody's job that would end."""
    cli.add("sda")
    cli.add("sdb")
    with cli.serving("sda"):
        said = cli.fails(4, "backup", "sda", "sdb", cli.folder / "repo", "--lock-wait", 1000)
    assert said.startswith("of these disks only sda is served")


def test_who_waits_holds_no_disk_and_its_image_neither(cli: Cli, clock: Clock) -> None:
    """Not even for a moment: each look at the busy one is a look at nothing else."""
    for name in ("sda", "sdb"):
        cli.add(name)
    held = holding(cli, "sda")

    def nothing_is_held() -> None:
        held.close()
        with holding(cli, "sdb"), contextlib.closing(FileDevice.open(str(cli.folder / "sda.raw"))):
            pass

    opened: list[str] = []

    def open_device(image: str) -> FileDevice:
        opened.append(os.path.basename(image))
        assert len(clock.waits_s) >= 2
        return FileDevice.open(image, read_only=True)

    clock.act = nothing_is_held
    with Store.open(str(cli.store)) as store:
        made = back_up(store, ["sdb", "sda"], cli.folder / "repo", open_device=open_device, lock_wait_s=30)
    assert [result.disk for result in made] == ["sdb", "sda"]
    assert opened == ["sda.raw", "sdb.raw"] * 2, "looked at, and then owned in the order of their names"


def test_a_target_that_is_tracked_meanwhile_is_not_written(cli: Cli, clock: Clock) -> None:
    cli.add("sda")
    target = cli.folder / "target.raw"
    target.write_bytes(bytes(1 << 20))
    held = holding(cli, "sda")

    def track_it() -> None:
        assert run(["--store", str(cli.store), "add", "sdb", str(target)]) == 0
        held.close()

    clock.act = track_it
    answer = cli("sync", "sda", target, "--lock-wait", 30)
    assert answer.code == 2
    assert "is the image of disk 'sdb'" in answer.err


# --- several processes ---


class Waiting:
    """Whatever runs in a thread of this process, from when it waits for a disk."""

    def __init__(self, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
        self._waits = threading.Event()
        self._errors: list[BaseException] = []
        monkeypatch.setattr(waiting.log, "warning", lambda *_: self._waits.set())
        self._thread = threading.Thread(target=self._run, args=(work,))
        self._thread.start()
        assert self._waits.wait(PATIENCE_SECONDS)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)

    def end(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()
        assert self._errors == []


@pytest.mark.parametrize("verb", ["backup", "stream", "sync"])
def test_a_server_that_comes_up_meanwhile_is_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """It has the disk first, and listens then. It goes on, and so does its guest."""
    tracked = TrackedDisk(tmp_path, 1 << 20).clean()
    sink = (tmp_path / "stream").open("wb")
    work: dict[str, Callable[[], object]] = {
        "backup": lambda: back_up(tracked.store, [NAME], tmp_path / "repo", lock_wait_s=1000),
        "stream": lambda: stream_backup(tracked.store, NAME, sink, lock_wait_s=1000),
        "sync": lambda: sync_disk(tracked.store, NAME, tmp_path / "copy", lock_wait_s=1000),
    }
    with sink, contextlib.ExitStack() as held:
        attaching = TrackedDisk.attach

        def attach_and_be_waited_for(self: TrackedDisk) -> Filter:
            disk = attaching(self)
            waits.append(Waiting(work[verb], monkeypatch))
            return disk

        waits: list[Waiting] = []
        monkeypatch.setattr(TrackedDisk, "attach", attach_and_be_waited_for)
        serves = held.enter_context(serving(tracked, tmp_path))
        waits[0].end()
        serves.disk.pwrite(b"the guest goes on", 0)


class Job(NamedTuple):
    """A run in a process of its own, which is in the middle of its moment, and stays there until it is let go."""

    child: Child
    gate: int

    def end(self) -> None:
        os.write(self.gate, b"go on\n")
        assert self.child.wait() == 0, self.child.stderr


@contextlib.contextmanager
def in_its_moment(cli: Cli, *words: object) -> Iterator[Job]:
    hook, told, gate = (cli.folder / name for name in ("hook", "told", "gate"))
    hook.write_text(f'#!/bin/sh\n[ "$1" = thaw ] || {{ echo now > {told}; read word < {gate}; }}\n')
    hook.chmod(0o700)
    with ExitStack() as ends:
        fds = []
        for fifo in (told, gate):
            os.mkfifo(fifo)
            fds.append(os.open(fifo, os.O_RDWR))
            ends.callback(os.close, fds[-1])
        child = ends.enter_context(spawn(*cli.command(*words, "--hook", hook)))
        assert select.select([fds[0]], [], [], PATIENCE_SECONDS)[0], child.stderr
        yield Job(child, fds[1])


@contextlib.contextmanager
def waiting_for(cli: Cli, disk: str, *words: object) -> Iterator[Child]:
    """A run in a process of its own, which waits for a disk. What it says comes to one place."""
    command = cli.command(*words, "--lock-wait", 1000)
    with spawn("sh", "-c", 'exec "$@" 2>&1', "sh", *command) as child:
        child.wait_for_line(f"disk '{disk}' .*: waiting for (1000|9[0-9.]+) s at most")
        yield child


def test_two_backups_of_a_resting_disk_into_two_repositories(cli: Cli) -> None:
    image = cli.add("sda")
    image.write_bytes(os.urandom(SIZE))
    with (
        in_its_moment(cli, "backup", "sda", cli.folder / "one") as first,
        waiting_for(cli, "sda", "backup", "sda", cli.folder / "two") as second,
    ):
        assert f"(process {first.child.pid}): waiting" in second.stdout
        first.end()
        assert second.wait() == 0, second.stdout
    for repository in ("one", "two"):
        cli.ok("restore", cli.folder / repository, "sda", cli.folder / f"{repository}.raw")
        assert (cli.folder / f"{repository}.raw").read_bytes() == image.read_bytes()


def test_a_sync_and_a_stream_wait_for_a_backup(cli: Cli) -> None:
    image = cli.add("sda")
    with (
        in_its_moment(cli, "backup", "sda", cli.folder / "one") as first,
        waiting_for(cli, "sda", "sync", "sda", cli.folder / "copy.raw") as sync,
    ):
        assert cli.fails(4, "sync", "sda", cli.folder / "other.raw") == (
            f"{HAS_IT} (process {first.child.pid}); wait for that process, or stop it"
        )
        first.end()
        assert sync.wait() == 0, sync.stdout
    assert (cli.folder / "copy.raw").read_bytes() == image.read_bytes()


def test_runs_that_want_the_same_disks_do_not_wait_in_a_circle(cli: Cli) -> None:
    """Neither has what the other one is waiting for, whatever the order in which its disks are named."""
    for name in ("sda", "sdb"):
        cli.add(name)
    with (
        in_its_moment(cli, "backup", "sdb", cli.folder / "first") as first,
        waiting_for(cli, "sdb", "backup", "sda", "sdb", cli.folder / "second") as second,
        waiting_for(cli, "sdb", "backup", "sdb", "sda", cli.folder / "third") as third,
    ):
        cli.ok("backup", "sda", cli.folder / "fourth")
        first.end()
        assert [second.wait(), third.wait()] == [0, 0], second.stdout + third.stdout


def test_whoever_waits_can_be_ended(cli: Cli) -> None:
    cli.add("sda")
    with holding(cli, "sda"), waiting_for(cli, "sda", "backup", "sda", cli.folder / "repo") as child:
        child.process.send_signal(signal.SIGTERM)  # who is started in the background ignores SIGINT
        assert child.wait() == 128 + signal.SIGTERM
        assert not (cli.folder / "repo").exists()
    cli.ok("backup", "sda", cli.folder / "repo")
