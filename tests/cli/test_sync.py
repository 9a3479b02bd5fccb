"""sync: what it says, in words and in JSON, its exit codes, and what the other verbs make of its notes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap import Filter, Store
from tests.cli.conftest import MIB, SIZE, Cli


@pytest.fixture
def copy(cli: Cli) -> Path:
    """A copy of disk `sda`, half a MiB of data, that is up to date."""
    image = cli.add("sda")
    with image.open("r+b") as file:
        file.write(b"x" * (MIB // 2))
    cli.ok("adopt", "sda")
    target = cli.folder / "copy.raw"
    said = cli.ok("sync", "sda", target)
    assert said.startswith(
        f"{target}: sda as of now · full: the disk was never synced to this target, or that was restored onto or"
        " tracked since · 8 MiB of 8 MiB changed · 512 KiB written and 0 B zeroed · "
    )
    return target


def _write(cli: Cli, offset: int, data: bytes) -> None:
    """As a guest would, through the tracker."""
    with Store.open(str(cli.store)) as store, Filter.attach(store, "sda", background=False) as disk:
        disk.pwrite(data, offset)


def test_a_larger_target_may_be_asked_for(cli: Cli, copy: Path) -> None:
    target = cli.folder / "larger.raw"
    target.write_bytes(b"x" * (SIZE + MIB))
    assert "or say --larger" in cli.fails(2, "sync", "sda", target)
    assert " · zeroes on the 1 MiB behind it · " in cli.ok("sync", "sda", target, "--larger")
    assert cli.json("sync", "sda", target, "--larger")["bytes_behind"] == MIB
    assert target.read_bytes() == copy.read_bytes() + bytes(MIB)


def test_what_changed_is_copied_and_told(cli: Cli, copy: Path) -> None:
    _write(cli, MIB, b"y" * 100)
    told = cli.json("sync", "sda", copy)
    assert told == {
        "disk": "sda", "target": str(copy), "kind": "incremental", "reason": None,
        "checkpoint": told["checkpoint"], "size": SIZE, "trust": "exact",
        "bytes_changed": 65536, "bytes_read": 65536, "bytes_compared": 0,
        "bytes_written": 65536, "bytes_zeroed": 0, "bytes_behind": 0, "seconds": told["seconds"], "thaw_failure": None,
    }  # fmt: skip
    assert copy.read_bytes() == (cli.folder / "sda.raw").read_bytes()
    assert cli.json("info", "sda")["since"] == told["checkpoint"]


def test_a_copy_that_somebody_wrote_is_compared_and_the_reason_told(cli: Cli, copy: Path) -> None:
    copy.write_bytes(b"?" * SIZE)
    told = cli.json("sync", "sda", copy)
    assert (told["kind"], told["reason"]["code"]) == ("compare", "target-changed")
    assert copy.read_bytes() == (cli.folder / "sda.raw").read_bytes()
    assert cli.ok("sync", "sda", copy, "--compare").startswith(f"{copy}: sda as of now · compare · 0 B of")


def test_only_incrementally(cli: Cli, copy: Path) -> None:
    cli.ok("sync", "sda", copy, "--require-incremental")
    copy.write_bytes(b"?" * SIZE)
    said = cli.fails(3, "sync", "sda", copy, "--require-incremental")
    assert said.endswith("leave out --require-incremental")
    assert copy.read_bytes() == b"?" * SIZE
    both = cli("sync", "sda", copy, "--require-incremental", "--compare")
    assert both.code == 2
    assert "exclude each other" in both.err


def test_what_is_refused_says_what_to_do(cli: Cli, copy: Path) -> None:
    assert "is the image of disk 'sda'" in cli.fails(2, "sync", "sda", cli.folder / "sda.raw")
    assert "no disk is called 'sdx'" in cli.fails(1, "sync", "sdx", copy)
    with Store.open(str(cli.store)) as store, Filter.attach(store, "sda", background=False):
        assert "is owned by" in cli.fails(4, "sync", "sda", copy)
    cli.add("sdb")
    assert "is the synced copy of disk 'sda'" in cli.fails(1, "sync", "sdb", copy)


def test_the_hook_runs_around_the_point_in_time(cli: Cli, copy: Path) -> None:
    hook = cli.folder / "hook"
    hook.write_text(f'#!/bin/sh\necho "$*" >> {cli.folder}/said\n')
    hook.chmod(0o700)
    cli.ok("sync", "sda", copy, "--hook", hook)
    assert (cli.folder / "said").read_text() == "freeze sda\nthaw sda\n"


def test_other_verbs_know_of_the_notes(cli: Cli, copy: Path) -> None:
    assert cli.json("check")["findings"] == []
    [note] = (cli.store / "syncs").glob("*.json")
    kept = note.read_bytes()
    cli.ok("rm", "sda")
    assert list((cli.store / "syncs").iterdir()) == []
    note.write_bytes(kept)
    [finding] = cli.json("check")["findings"]
    assert (finding["place"], finding["next_step"]) == (str(note), "remove it")


@pytest.fixture
def own_export(cli: Cli) -> Iterator[str]:
    cli.add("sda")
    with cli.serving("sda") as served:
        yield served.uris["sda"]


def test_a_served_disk_is_not_synced_onto_itself(cli: Cli, own_export: str) -> None:
    own = cli.folder / "sda.sock"
    elsewhere = cli.folder / "elsewhere.sock"
    elsewhere.symlink_to(own)
    os.link(own, cli.folder / "other.sock")
    before = cli.json("info", "sda")["checkpoints"]
    for uri in (
        own_export,
        f"nbd+unix:///?socket={own}",
        f"nbd+unix:///sda?socket={elsewhere}",
        f"nbd+unix:///sda?socket={cli.folder / 'other.sock'}",
    ):
        said = cli.fails(2, "sync", "sda", uri)
        assert said.endswith(" is disk 'sda' itself, as it is served; name another target")
    assert cli.json("info", "sda")["checkpoints"] == before


def test_a_served_disk_is_known_behind_a_tunnel_too(cli: Cli, own_export: str) -> None:
    with tunnel_to(cli.folder / "sda.sock") as port:
        said = cli.fails(2, "sync", "sda", f"nbd://127.0.0.1:{port}/sda")
    assert "is disk 'sda' itself, as it is served" in said


def test_another_disk_that_is_served_can_be_a_copy(cli: Cli, own_export: str) -> None:
    cli.add("sdb")
    with cli.serving("sdb") as served:
        assert "sda as of now" in cli.ok("sync", "sda", served.uris["sdb"])


@contextlib.contextmanager
def tunnel_to(socket_path: Path) -> Iterator[int]:
    """A port of this host that leads to that socket, for one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(socket.AF_UNIX) as inside:
        inside.connect(str(socket_path))
        carrying = threading.Thread(target=_carry_one, args=(listening, inside), daemon=True)
        carrying.start()
        yield listening.getsockname()[1]
        carrying.join()


def _carry_one(listening: socket.socket, inside: socket.socket) -> None:
    outside, _ = listening.accept()
    with outside:
        back = threading.Thread(target=_carry, args=(inside, outside), daemon=True)
        back.start()
        _carry(outside, inside)
        back.join()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
