"""Syncs onto what other programs serve, and of disks that a server serves to a guest that writes."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.syncs.plan import SyncKind
from lmdbitmap.syncs.sync import sync
from tests.cli.conftest import Cli
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import PATIENCE_SECONDS, requires, run, spawn
from tests.helpers.tracked import NAME
from tests.interop.test_live_backups import SIZE, Stamper, guest_of, snapshots
from tests.interop.test_restore_targets import MIB, Served, modest, qcow2
from tests.interop.test_restore_targets import SIZE as TARGET_SIZE

pytestmark = [requires("qemu-img"), requires("qemu-nbd"), requires("nbdkit")]


@pytest.mark.parametrize("target", [qcow2, modest])
def test_what_another_server_has_becomes_a_copy_and_follows(tmp_path: Path, target: Served) -> None:
    disk = BackedUpDisk(tmp_path, TARGET_SIZE, 16)
    disk.write(os.urandom(MIB), MIB)
    chosen = random.Random(7)
    with target(tmp_path) as uri:
        first = sync(disk.store, NAME, uri)
        assert (first.kind, first.bytes_written + first.bytes_zeroed) == (SyncKind.COMPARE, TARGET_SIZE)
        for _ in range(5):
            disk.write(os.urandom(chosen.randrange(1, MIB)), chosen.randrange(7 * MIB))
            disk.zero(chosen.randrange(7 * MIB), MIB)
            result = sync(disk.store, NAME, uri)
            assert result.kind is SyncKind.INCREMENTAL
            assert result.bytes_changed <= 3 * MIB
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, disk.image)
    disk.close()


def test_every_copy_of_a_busy_guest_holds_a_prefix_of_its_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = Cli(tmp_path, capsys)
    cli.add("sda", SIZE)
    copy = tmp_path / "copy.raw"
    counts = []
    with cli.serving("sda") as served:
        with Stamper(served.uris["sda"]) as stamper:
            for number in range(6):
                told = run(*cli.command("sync", "sda", copy, "--json")).stdout
                assert f'"kind": "{"incremental" if number else "full"}"' in told
                counts.append(stamper.require_prefix(copy.read_bytes()))
        run(*cli.command("sync", "sda", copy, "--require-incremental"))
        assert stamper.require_prefix(copy.read_bytes()) == len(stamper.history)
        assert cli.json("info", "sda")["served"]["snapshots"] == []
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert copy.read_bytes() == (tmp_path / "sda.raw").read_bytes()


@pytest.mark.parametrize("first", [True, False])
def test_a_killed_sync_is_released_by_the_server_and_followed_by_a_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: bool
) -> None:
    cli = Cli(tmp_path, capsys)
    cli.add("sda", SIZE)
    copy = tmp_path / "copy.raw"
    with cli.serving("sda") as served:
        with guest_of(served.uris["sda"]) as disk:
            if not first:
                run(*cli.command("sync", "sda", copy))
            disk.pwrite(os.urandom(32 * MIB), 0)
        with spawn(*cli.command("sync", "sda", copy, "--speed-limit=8M")) as child:
            while not is_under_way(tmp_path / "store/syncs"):
                assert child.process.poll() is None
            os.kill(served.child.process.pid, signal.SIGSTOP)
            try:
                child.process.kill()
                child.process.wait(PATIENCE_SECONDS)
            finally:
                os.kill(served.child.process.pid, signal.SIGCONT)
        with guest_of(served.uris["sda"]) as disk:
            disk.pwrite(os.urandom(MIB), 40 * MIB)
        told = run(*cli.command("sync", "sda", copy, "--json")).stdout
        assert ('"incremental"' in told) is not first
        assert snapshots(cli, "sda") == []
        checkpoints = [one["name"] for one in cli.json("info", "sda")["checkpoints"]]
        assert len([name for name in checkpoints if Maker.SYNC.named(name)]) == 1
        assert copy.read_bytes() == (tmp_path / "sda.raw").read_bytes()


def is_under_way(folder: Path) -> bool:
    return any('"under_way": true' in note.read_text() for note in folder.glob("*.json"))
