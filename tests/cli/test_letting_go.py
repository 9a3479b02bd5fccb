"""Removing and adopting disks that a process serves: it lets go of what nobody uses, and serves the others on."""

from __future__ import annotations

import contextlib
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from lmdbitmap import Store
from lmdbitmap.images.image import open_image
from lmdbitmap.tracker import chain
from tests.cli.conftest import MIB, Cli
from tests.helpers.nbd_raw import DISC, GO, WRITE, RawClient, request, string
from tests.helpers.support import PATIENCE_SECONDS, Child

KIB = 1 << 10
ERR_UNKNOWN = 0x80000006


def _leave(cli: Cli, client: RawClient, name: str) -> None:
    """Its place is free on return: that comes a moment after its connection was closed."""
    client.send(request(DISC))
    assert client.is_closed_by_server()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while cli.json("info", name)["served"]["connections"]["now"]:
        assert time.monotonic() < deadline


@contextlib.contextmanager
def _client(cli: Cli, door: str, name: str) -> Iterator[RawClient]:
    with RawClient.connect(str(cli.folder / f"{door}.sock")) as client:
        client.go(name)
        yield client


@contextlib.contextmanager
def _two_served(cli: Cli) -> Iterator[Child]:
    for name in ("sda", "sdb"):
        cli.add(name)
        cli.ok("checkpoint", name, "monday")
    with cli.serving("sda", "sdb", log=True) as served:
        yield served.child


def _control_path(cli: Cli, name: str) -> Path:
    with Store.open(str(cli.store)) as store, store.read() as reader:
        return Path(store.control_path(chain.find_disk(reader, name).uuid))


def test_a_served_disk_is_removed_and_the_others_are_served_on(cli: Cli) -> None:
    with _two_served(cli) as child:
        door = _control_path(cli, "sda")
        assert cli.ok("rm", "sda") == "sda: removed from the store\n"
        assert not door.exists()
        with _client(cli, "sda", "sdb") as client:
            assert client.do(WRITE, MIB, 4096, data=b"x" * 4096).error == 0
        assert cli.dirty("sdb") == ("exact", [(MIB, 64 * KIB)])
        assert [disk["name"] for disk in cli.json("ls")["disks"]] == ["sdb"]
        with RawClient.connect(str(cli.folder / "sda.sock")) as client:
            client.greet()
            assert client.ask(GO, string("sda") + b"\0\0")[-1][0] == ERR_UNKNOWN
        with contextlib.closing(open_image(str(cli.folder / "sda.raw"))) as image:  # nobody locks it
            image.pwrite(b"x", 0)
        child.process.terminate()
        assert child.process.wait() == 0
    assert "disk sda: it is no longer served, " in child.stderr


def test_a_disk_that_a_client_uses_is_not_removed(cli: Cli) -> None:
    with _two_served(cli):
        with _client(cli, "sda", "sda") as client:
            assert cli.fails(4, "rm", "sda") == (
                "disk 'sda' has 1 client; shut the guest down, or disconnect who uses the disk, and try again"
            )
            assert client.do(WRITE, MIB, 4096, data=bytes(4096)).error == 0
            _leave(cli, client, "sda")
        assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB)])
        cli.ok("rm", "sda")


def test_a_disk_that_is_held_for_a_reader_is_not_removed(cli: Cli) -> None:
    with _two_served(cli):
        cli.ok("snapshot", "sda", "held")
        said = cli.fails(4, "rm", "sda")
        assert (
            said
            == "disk 'sda' is held as at held; wait until it is released, or run `lmdbitmap release sda CHECKPOINT`"
        )
        cli.ok("release", "sda", "held")
        cli.ok("rm", "sda")


def test_with_its_last_disk_a_server_ends(cli: Cli) -> None:
    cli.add("sda")
    with cli.serving("sda", log=True) as served:
        cli.ok("rm", "sda")
        assert served.child.process.wait() == 0
    assert "no disk is left to serve" in served.child.stderr
    assert cli.json("ls")["disks"] == []


def test_scrapes_are_of_the_disks_that_are_left(cli: Cli) -> None:
    for name in ("sda", "sdb"):
        cli.add(name)
    with cli.serving("sda", "sdb", "--metrics=127.0.0.1:0", log=True) as served:
        url = served.child.wait_for_line("^metrics (.*)$").group(1)
        cli.ok("rm", "sda")
        text = urllib.request.urlopen(url).read().decode()
    assert 'disk="sdb"' in text
    assert 'disk="sda"' not in text
    assert "no metrics of it" not in served.child.stderr


# --- adopting ---


def test_nothing_is_to_be_said_for_an_image_that_its_server_knows(cli: Cli) -> None:
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    with cli.serving("sda"):
        assert cli.ok("adopt", "sda") == "sda: its image is known to the process that serves it\n"
        assert cli.json("adopt", "sda") == {"disk": "sda", "served": True, "lost": None}
    assert cli.dirty("sda", "--since", "monday") == ("exact", [])


def test_it_is_too_late_to_vouch_for_an_image_that_is_served(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    os.utime(image, ns=(2**61, 2**61))
    with cli.serving("sda", log=True):
        assert cli.fails(3, "adopt", "sda") == (
            "disk 'sda' cannot be adopted any more, as it is served: the image was written while it was not tracked;"
            " make a backup, which reads the whole disk; next time adopt it before it is served"
        )
        cli.ok("checkpoint", "sda", "tuesday")
        cli.ok("adopt", "sda")


def test_who_adopts_after_an_epoch_ended_is_told_what_that_is_worth(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    os.utime(image, ns=(2**61, 2**61))
    cli.ok("mark", "sda", 0, 1)
    assert cli.ok("adopt", "sda") == (
        "sda: its image is accepted as it is, and the next backup still reads the whole disk: the image was written"
        " while it was not tracked\n"
    )
