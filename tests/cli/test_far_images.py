"""A disk whose image another server has: qcow2 behind qemu-nbd, tracked, served, backed up and restored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, SIZE, Cli
from tests.cli.test_serve import write
from tests.helpers.support import Child, requires, run, spawn, wait_for_socket

KIB = 1 << 10
UNTRUSTED = 3

pytestmark = [requires("qemu-nbd"), requires("qemu-img"), requires("qemu-io")]


class FarDisk:
    """A qcow2 image, and qemu-nbd in front of it: started, killed and started again."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.image = folder / "sda.qcow2"
        self.socket = folder / "far"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._stack = stack
        run("qemu-img", "create", "-q", "-f", "qcow2", self.image, str(SIZE))
        self.server = self.start()

    def start(self, *options: str) -> Child:
        words = ["qemu-nbd", "--persistent", "--shared=4", "--format=qcow2", *options]
        self.server = self._stack.enter_context(spawn(*words, f"--socket={self.socket}", self.image))
        wait_for_socket(self.socket, self.server)
        return self.server

    def kill(self) -> None:
        self.server.process.kill()
        self.server.wait()
        self.socket.unlink()

    def content(self) -> bytes:
        """Of the image; its server must be gone."""
        raw = self.image.with_suffix(".raw")
        run("qemu-img", "convert", "-O", "raw", self.image, raw)
        return raw.read_bytes()


@pytest.fixture
def far(cli: Cli) -> Iterator[FarDisk]:
    """Tracked as `sda` since checkpoint `monday`."""
    with contextlib.ExitStack() as stack:
        disk = FarDisk(cli.folder, stack)
        cli.ok("add", "sda", disk.uri)
        cli.ok("checkpoint", "sda", "monday")
        yield disk


def test_changes_of_a_far_image_are_exact(cli: Cli, far: FarDisk) -> None:
    with cli.serving("sda") as served:
        write(served.uris["sda"], MIB, 64 * KIB)
        assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB)])
        assert cli.json("info", "sda")["image"] == far.uri
    assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB)])


def test_guest_does_not_notice_that_the_far_server_is_killed(cli: Cli, far: FarDisk) -> None:
    with cli.serving("sda", log=True) as served:
        write(served.uris["sda"], MIB, 64 * KIB)
        far.kill()
        far.start()
        write(served.uris["sda"], 3 * MIB, 64 * KIB)
        assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB), (3 * MIB, 64 * KIB)])
    assert "connected again" in served.child.stderr
    far.kill()
    content = far.content()
    assert content[MIB] == content[3 * MIB] != 0
    assert content.count(content[MIB]) == 128 * KIB


def test_increments_of_a_far_image_are_restored_to_what_it_holds(cli: Cli, far: FarDisk) -> None:
    cli.ok("backup", "sda", cli.folder / "backups")
    with cli.serving("sda") as served:
        write(served.uris["sda"], 5 * MIB, 100)
    [told] = cli.json("backup", "sda", cli.folder / "backups")["backups"]
    assert (told["type"], told["bytes_changed"]) == ("incremental", 64 * KIB)
    cli.ok("restore", cli.folder / "backups", "sda", cli.folder / "new.raw")
    far.kill()
    assert (cli.folder / "new.raw").read_bytes() == far.content()


def test_tracker_that_is_killed_knows_a_little_too_much_and_never_too_little(cli: Cli, far: FarDisk) -> None:
    with cli.serving("sda") as served:
        write(served.uris["sda"], MIB, 64 * KIB)
        served.child.process.kill()
        served.child.wait()
    trust, extents = cli.dirty("sda")
    assert trust == "superset"
    assert any(offset <= MIB and offset + length >= MIB + 64 * KIB for offset, length in extents)


def test_far_image_that_is_away_is_not_vouched_for_until_it_is_back(cli: Cli, far: FarDisk) -> None:
    far.kill()
    assert f"no server answers at {far.uri}" in cli.fails(1, "mark", "sda", 0, 1)
    told = cli.json("info", "sda")
    assert (told["trust"], "no server answers at" in told["reason"]) == ("untrusted", True)
    assert cli("changes", "sda").code == UNTRUSTED
    far.start()
    assert cli.dirty("sda") == ("exact", [])


def test_far_image_that_got_another_size_begins_anew_unless_it_is_adopted(cli: Cli, far: FarDisk) -> None:
    far.kill()
    run("qemu-img", "resize", "-q", far.image, str(2 * SIZE))
    far.start()
    assert "size went from" in cli.json("info", "sda")["reason"]
    cli.ok("adopt", "sda")
    assert cli.dirty("sda")[0] == "exact"
    assert cli.json("info", "sda")["size"] == 2 * SIZE


def test_one_place_is_one_image(cli: Cli, far: FarDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cli.folder)
    relative = f"nbd+unix:///?socket={os.path.relpath(far.socket)}"
    assert "is tracked already, as 'sda'" in cli.fails(1, "add", "again", relative)


def test_far_image_that_cannot_be_written_is_refused(cli: Cli, far: FarDisk) -> None:
    cli.ok("rm", "sda")
    far.kill()
    assert "no server answers at" in cli.fails(1, "add", "sdb", far.uri)
    far.start("--read-only")
    assert "is served read-only; let its server serve it for writing" in cli.fails(2, "add", "sdb", far.uri)
    assert cli.json("ls")["disks"] == []
