"""Backups of disks that a server serves to guests, by another process: the real command, clients and signals."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.notes.checkpoint_names import Maker
from tests.cli.conftest import Cli, Served, quick_cli
from tests.helpers.support import PATIENCE_SECONDS, Child, requires, run, spawn

__all__ = ["quick_cli"]

MIB = 1 << 20
SIZE = 64 * MIB
SLOT = 4096
SLOTS = SIZE // SLOT
STAMP = struct.Struct("<Q")


class Stamper:
    """A guest that writes 1, 2, 3, ... at places by lot, one after another, until it is told to stop."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.history: list[int] = []
        """The slot of each stamp."""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._failure: BaseException | None = None

    def _write(self) -> None:
        try:
            with closing(NbdDevice.open(self._uri)) as disk:
                chosen = random.Random(5)
                for number in itertools.count(1):
                    if self._ending.is_set():
                        return
                    slot = chosen.randrange(SLOTS)
                    self.history.append(slot)
                    disk.pwrite(STAMP.pack(number) + os.urandom(64), slot * SLOT)
        except BaseException as failure:
            self._failure = failure

    def __enter__(self) -> Stamper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(PATIENCE_SECONDS)
        assert self._failure is None

    def require_prefix(self, image: bytes) -> int:
        """The image holds the first N stamps, and nothing of any later one; answers N."""
        found = {slot: STAMP.unpack_from(image, slot * SLOT)[0] for slot in range(SLOTS)}
        last = int(max(found.values()))
        expected = dict.fromkeys(range(SLOTS), 0)
        for number, slot in enumerate(self.history[:last], 1):
            expected[slot] = number
        assert found == expected
        return last


@pytest.fixture
def cli(quick_cli: Cli) -> Cli:
    for name in ("sda", "sdb"):
        quick_cli.add(name, SIZE)
    return quick_cli


def back_up(cli: Cli, *words: object, check: bool = True) -> str:
    """In a process of its own, as whoever serves has the disk."""
    return run(*cli.command("backup", *words), check=check).stdout


def restored(cli: Cli, name: str, *options: object) -> bytes:
    out = cli.folder / "restored.raw"
    out.unlink(missing_ok=True)
    cli.ok("restore", cli.folder / "backups", name, out, *options)
    return out.read_bytes()


def snapshots(cli: Cli, name: str) -> list[str]:
    return [held["checkpoint"] for held in cli.json("info", name)["served"]["snapshots"]]


def test_every_backup_of_a_busy_guest_holds_a_prefix_of_its_writes(cli: Cli) -> None:
    with cli.serving("sda", "--verbose", log=True) as served:
        with Stamper(served.uris["sda"]) as stamper:
            for _ in range(3):
                back_up(cli, "sda", cli.folder / "backups")
        counts = [stamper.require_prefix(restored(cli, "sda", "--at", number)) for number in range(1, 4)]
        assert snapshots(cli, "sda") == []
    assert len(sent_of_held("sda", served)) == 2 * 3  # what was kept is asked on a connection of its own
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    [last] = cli.json("backup", "sda", cli.folder / "backups")["backups"]
    assert last["type"] == "incremental"
    assert stamper.require_prefix(restored(cli, "sda")) == len(stamper.history)


def sent_of_held(name: str, served: Served) -> list[int]:
    """Bytes that a server, which has ended, has sent to each client of snapshots of a disk."""
    gone = re.compile(rf"disk {name}@.* is gone: .* (\d+) out$", re.MULTILINE)
    return [int(found.group(1)) for found in gone.finditer(served.child.stderr)]


def test_data_of_a_backup_does_not_go_through_the_server(cli: Cli) -> None:
    with cli.serving("sda", "--verbose", log=True) as served:
        with guest_of(served.uris["sda"]) as disk:
            disk.pwrite(os.urandom(16 * MIB), 4 * MIB)
        back_up(cli, "sda", cli.folder / "backups")
        with (cli.folder / "stream").open("wb") as stream:
            subprocess.run(cli.command("backup", "sda", "--stdout"), stdout=stream, check=True)
        run(*cli.command("sync", "sda", cli.folder / "copy.raw"))
    sent = sent_of_held("sda", served)
    assert len(sent) == 2 * 3
    assert sum(sent) < MIB
    assert (cli.folder / "copy.raw").read_bytes() == (cli.folder / "sda.raw").read_bytes()


def test_two_disks_of_one_server_are_of_one_moment(cli: Cli) -> None:
    """A guest that writes to both in turn is never seen to have written to the second before the first."""
    ending = threading.Event()

    def write(uris: dict[str, str]) -> None:
        with closing(NbdDevice.open(uris["sda"])) as first, closing(NbdDevice.open(uris["sdb"])) as second:
            for number in itertools.count(1):
                if ending.is_set():
                    return
                first.pwrite(STAMP.pack(number), 0)
                second.pwrite(STAMP.pack(number), 0)

    with cli.serving("sda", "sdb") as served:
        writer = threading.Thread(target=write, args=(served.uris,))
        writer.start()
        try:
            for _ in range(4):
                back_up(cli, "sda", "sdb", cli.folder / "backups")
        finally:
            ending.set()
            writer.join(PATIENCE_SECONDS)
    for number in range(1, 5):
        first, second = (STAMP.unpack_from(restored(cli, name, "--at", number))[0] for name in ("sda", "sdb"))
        assert 0 <= first - second <= 1


@contextmanager
def backup_stopped_in_the_middle(cli: Cli, served: Served) -> Iterator[Child]:
    """A backup that waits for its disk to be read, as the server is stopped (SIGSTOP)."""
    with guest_of(served.uris["sda"]) as disk:
        disk.pwrite(os.urandom(32 * MIB), 0)
    folder = cli.folder / "backups" / "sda"
    with spawn(*cli.command("backup", "--speed-limit=8M", "sda", cli.folder / "backups")) as child:
        while not list(folder.glob("*.qcow2.*partial")):  # its note has one too
            assert child.process.poll() is None
        os.kill(served.child.process.pid, signal.SIGSTOP)
        try:
            yield child
        finally:
            with suppress(ProcessLookupError):  # it was waited for
                os.kill(served.child.process.pid, signal.SIGCONT)


def guest_of(uri: str) -> closing[NbdDevice]:
    return closing(NbdDevice.open(uri))


def test_killed_backup_is_released_by_the_server_and_followed_by_a_right_one(cli: Cli) -> None:
    with cli.serving("sda", log=True) as served:
        back_up(cli, "sda", cli.folder / "backups")
        with backup_stopped_in_the_middle(cli, served) as child:
            child.process.kill()
            child.process.wait(PATIENCE_SECONDS)
        told = back_up(cli, "sda", cli.folder / "backups")
        assert "incremental" in told
        assert snapshots(cli, "sda") == []
        checkpoints = [one["name"] for one in cli.json("info", "sda")["checkpoints"]]
        assert len([name for name in checkpoints if Maker.BACKUP.named(name)]) == 2
        assert restored(cli, "sda") == (cli.folder / "sda.raw").read_bytes()
    for line in served.child.stderr.splitlines():
        assert "the snapshot was released" in line, "at most what the dead one had asked for may be told"


def test_killed_server_fails_the_backup_and_the_next_one_is_right(cli: Cli) -> None:
    with cli.serving("sda") as served:
        back_up(cli, "sda", cli.folder / "backups")
        with backup_stopped_in_the_middle(cli, served) as child:
            served.child.process.kill()
            assert child.wait() == 1
    cleans_up, failed = child.stderr.splitlines()
    assert "the next backup will clean up" in cleans_up
    assert "the process that served it ended while its disk was read; serve the disk again" in failed
    [made] = cli.json("backup", "sda", cli.folder / "backups")["backups"]
    assert made["type"] == "incremental"
    assert restored(cli, "sda") == (cli.folder / "sda.raw").read_bytes()


@contextmanager
def stopped(child: Child) -> Iterator[None]:
    """It neither reads nor hangs up."""
    os.kill(child.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(child.process.pid, signal.SIGCONT)


def test_server_that_ends_does_not_wait_for_a_stuck_backup(cli: Cli) -> None:
    """Its detach is clean, the backup fails, and the next one is an increment."""
    with cli.serving("sda") as served:
        back_up(cli, "sda", cli.folder / "backups")
        with backup_stopped_in_the_middle(cli, served) as child:
            with stopped(child):
                os.kill(served.child.process.pid, signal.SIGCONT)
                served.child.process.terminate()
                assert served.child.wait() == 0
            assert child.wait() in (1, 4)
    assert cli.json("info", "sda")["trust"] == "exact"
    [made] = cli.json("backup", "sda", cli.folder / "backups")["backups"]
    assert made["type"] == "incremental"
    assert restored(cli, "sda") == (cli.folder / "sda.raw").read_bytes()
    checkpoints = [one["name"] for one in cli.json("info", "sda")["checkpoints"]]
    assert len([name for name in checkpoints if Maker.BACKUP.named(name)]) == 2


def test_snapshot_of_a_stuck_backup_can_be_released(cli: Cli) -> None:
    with cli.serving("sda") as served:
        back_up(cli, "sda", cli.folder / "backups")
        with backup_stopped_in_the_middle(cli, served) as child:
            with stopped(child):
                os.kill(served.child.process.pid, signal.SIGCONT)
                [held] = snapshots(cli, "sda")
                assert "released" in cli.ok("release", "sda", held)
            assert child.wait() in (1, 4)
        assert "incremental" in back_up(cli, "sda", cli.folder / "backups")
        assert restored(cli, "sda") == (cli.folder / "sda.raw").read_bytes()


def test_backup_that_runs_out_of_room_fails_and_the_guest_does_not_notice(cli: Cli) -> None:
    with cli.serving("sda", "--scratch-limit=1M", log=True) as served:
        with guest_of(served.uris["sda"]) as disk:
            disk.pwrite(os.urandom(16 * MIB), 0)
            cli.ok("snapshot", "sda", "monday")
            disk.pwrite(os.urandom(2 * MIB), 0)
            assert cli.json("info", "sda")["served"]["snapshots"][0]["broken"] is not None
        said = cli.fails(1, "release", "sda", "monday")
        assert "scratch file is full" in said
        assert "full" in back_up(cli, "sda", cli.folder / "backups")
        assert restored(cli, "sda") == (cli.folder / "sda.raw").read_bytes()


@requires("nbdcopy", "1.0")
@requires("nbdinfo", "1.0")
@requires("qemu-img", "7.0")
def test_other_programs_read_a_held_disk_and_what_changed(cli: Cli) -> None:
    with cli.serving("sda", log=True) as served:
        with guest_of(served.uris["sda"]) as disk:
            disk.pwrite(os.urandom(8 * MIB), 0)
            cli.ok("checkpoint", "sda", "sunday")
            disk.pwrite(os.urandom(MIB), 4 * MIB)
            before = (cli.folder / "sda.raw").read_bytes()
            cli.ok("snapshot", "sda", "monday")
            disk.pwrite(os.urandom(8 * MIB), 0)
        uri = served.uris["sda"].replace("/sda?", "/sda%40monday?")
        run("nbdcopy", uri, cli.folder / "copy.raw")
        run("qemu-img", "convert", "-O", "raw", uri, cli.folder / "converted.raw")
        assert (cli.folder / "copy.raw").read_bytes() == before
        assert (cli.folder / "converted.raw").read_bytes() == before
        told = run("nbdinfo", "--map=qemu:dirty-bitmap:sunday", "--json", uri).stdout
        assert '{ "offset": 4194304, "length": 1048576, "type": 1' in " ".join(told.split())
        assert "monday" not in run("nbdinfo", "--json", uri).stdout.replace("sda@monday", "").replace(
            "%40monday", ""
        )
        refused = run("qemu-io", "-f", "raw", "-c", "write 0 1M", uri, check=False)
        assert refused.returncode != 0
        cli.ok("release", "sda", "monday")
        assert run("nbdinfo", uri, check=False).returncode != 0
        assert run("nbdinfo", served.uris["sda"].replace("/sda?", "/?")).returncode == 0
    assert "found 'sda@monday'; name one that `nbdinfo --list` shows" in served.child.stderr
