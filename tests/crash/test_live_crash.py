"""Backups of a served disk, killed at the beginning, in the middle or near the end of the copy; its server, or both.

The backup is a process of its own that says how far it is and stops itself there (SIGSTOP), so that every death has
its moment without a clock. The guest writes before, meanwhile and afterwards.
"""

from __future__ import annotations

import filecmp
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import pytest

from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.backup_folder import BackupFolder
from tests.cli.conftest import MIB, Cli, Served, quick_cli
from tests.helpers.backed_up import ALWAYS_THERE
from tests.helpers.support import PATIENCE_SECONDS, Child, run, spawn

__all__ = ["quick_cli"]

STEP = 4 * MIB
"""Between two reports of progress."""
MARKED = 100 * STEP
"""Called dirty as a whole, so that there is something to copy; what is behind it is dirty where it is written."""
BLOCK = 1 << 16
ROUNDS, WRITES = 4, 32
SIZE = MARKED + ROUNDS * WRITES * BLOCK
KEPT = {0: (WRITES, WRITES), 50: (WRITES // 3, WRITES // 2), 99: (0, 1)}
"""Blocks of old data, least and most, that are kept when the backup has come so far: none that it has read."""

_BACKUP_THAT_STOPS = """
import contextlib, os, signal, sys
from lmdbitmap.backups.backup import backup
from lmdbitmap.access.direct import DirectDevice
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.store import Store

DirectDevice.chunk_bytes = 1 << 16  # so that it has not read much more than it tells
store_path, repository_path, percent = sys.argv[1:]
stopped = []

def stop():
    print("stops", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

@contextlib.contextmanager
def moment():
    yield
    if percent == "0":
        stop()

def copied(done, total):
    if percent != "0" and int(percent) * total <= done * 100 and not stopped:
        stopped.append(done)
        stop()

with Store.open(store_path) as store:
    try:
        backup(store, ["sda"], repository_path, quiesced=moment, progress=copied)
    except LmdbitmapError as error:
        sys.exit(f"failed: {error}")
"""


@pytest.mark.parametrize("percent", [0, 50, 99])
@pytest.mark.parametrize("victims", ["backup", "server", "both"])
def test_the_backup_after_one_that_was_killed_is_right(quick_cli: Cli, victims: str, percent: int) -> None:
    cli = quick_cli
    cli.add("sda", SIZE)
    with serving(cli) as served:
        stored = set(os.listdir(cli.store))
        write(served, 0)
        back_up(cli)
        cli.ok("mark", "sda", 0, MARKED)
        write(served, 1)
        with backup_stopped_at(cli, percent) as child:
            write(served, 2)
            [held] = cli.json("info", "sda")["served"]["snapshots"]
            least, most = KEPT[percent]
            assert least <= held["kept_bytes"] // BLOCK <= most
            kill(victims, served, child)
        if victims == "backup":
            goes_on(cli, served, MARKED + 3 * WRITES * BLOCK)
    if victims != "backup":
        with serving(cli) as served:
            goes_on(cli, served, 4 * WRITES * BLOCK)
    leaves_no_trace(cli, stored)


def serving(cli: Cli) -> AbstractContextManager[Served]:
    (cli.folder / "scratch").mkdir(exist_ok=True)
    return cli.serving("sda", f"--scratch={cli.folder / 'scratch'}", log=True)


def write(served: Served, number: int) -> None:
    """Over what earlier rounds wrote, and to blocks that no other round writes."""
    with closing(NbdDevice.open(served.uris["sda"])) as disk:
        for count in range(WRITES):
            disk.pwrite(os.urandom(BLOCK), count * 3 * STEP)
            disk.pwrite(os.urandom(BLOCK), MARKED + (count * ROUNDS + number) * BLOCK)


@contextmanager
def backup_stopped_at(cli: Cli, percent: int) -> Iterator[Child]:
    paths = cli.store, cli.folder / "backups"
    with spawn(sys.executable, "-c", _BACKUP_THAT_STOPS, *paths, str(percent)) as child:
        child.wait_for_line("^stops$")
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)  # SIGCONT would be lost on one that runs yet
        try:
            yield child
        finally:
            child.process.send_signal(signal.SIGCONT)


def kill(victims: str, served: Served, child: Child) -> None:
    """A backup whose server is killed says so, and ends."""
    if victims != "backup":
        served.child.process.kill()
        served.child.wait()
    if victims == "server":
        child.process.send_signal(signal.SIGCONT)
        assert child.wait() == 1
        assert child.stderr.splitlines()[-1].startswith("failed: ")
        assert "Traceback" not in child.stderr
    else:
        child.process.kill()
        child.process.wait(PATIENCE_SECONDS)


def goes_on(cli: Cli, served: Served, changed: int) -> None:
    """The next backup needs no help, and holds all that was written since the last one that was made.

    After the death of an owner it holds nothing else: what is only called dirty is compared with the last one.
    """
    write(served, 3)
    [made] = back_up(cli)
    assert (made["type"], made["reason"]) == ("incremental", None)
    assert made["bytes_changed"] == changed
    assert cli.json("info", "sda")["served"]["snapshots"] == []
    cli.ok("restore", cli.folder / "backups", "sda", cli.folder / "restored.raw")
    assert filecmp.cmp(cli.folder / "restored.raw", cli.folder / "sda.raw", shallow=False)


def back_up(cli: Cli) -> list[dict[str, Any]]:
    """In a process of its own, as whoever serves has the disk."""
    told = run(*cli.command("backup", "sda", cli.folder / "backups", "--json")).stdout
    made: list[dict[str, Any]] = json.loads(told)["backups"]
    return made


def leaves_no_trace(cli: Cli, stored: set[str]) -> None:
    """Two backups, what belongs to them, and nothing else anywhere."""
    folder = BackupFolder(cli.folder / "backups", "sda")
    manifest = folder.manifest()
    assert manifest is not None
    assert [entry.sequence for entry in manifest.backups] == [1, 2]
    files = {file for entry in manifest.backups for file in (entry.file, entry.chunks and entry.chunks.file)}
    assert set(os.listdir(folder.path)) == files | ALWAYS_THERE
    assert os.listdir(cli.folder / "scratch") == []
    assert set(os.listdir(cli.store)) == stored
    points = {one["name"] for one in cli.json("info", "sda")["checkpoints"]}
    needed = {entry.checkpoint.name for entry in (manifest.backups[0], manifest.backups[-1])}
    assert {name for name in points if Maker.BACKUP.named(name)} == needed
