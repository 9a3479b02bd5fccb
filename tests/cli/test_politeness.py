"""Verbs that copy give way to guests once the point in time is taken, and not before."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from lmdbitmap import Filter, Store
from tests.cli.conftest import Cli

MIB = 1 << 20


@pytest.fixture
def image(cli: Cli) -> Path:
    path = cli.folder / "sda.raw"
    path.write_bytes(os.urandom(4 * MIB))
    cli.ok("add", "sda", path)
    return path


@pytest.mark.parametrize(("options", "niceness"), [((), 10), (("--nice", "3"), 3), (("--nice", "0"), 0)])
def test_a_stream_gives_way_as_far_as_it_is_told(
    cli: Cli, image: Path, options: tuple[str, ...], niceness: int
) -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    with cli.serving("sda"):
        assert niceness_while_streaming(cli, *options) == max(ours, niceness)


def test_nobody_gives_way_who_changes_the_store_himself(cli: Cli, image: Path) -> None:
    assert niceness_while_streaming(cli) == os.getpriority(os.PRIO_PROCESS, 0)


def test_whoever_had_a_disk_before_is_not_given_way_to(cli: Cli, image: Path) -> None:
    """What it was waited for is a disk that nobody serves by then."""
    with ExitStack() as held:
        store = held.enter_context(Store.open(str(cli.store)))
        held.enter_context(Filter.attach(store, "sda", background=False))
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        assert niceness_while_streaming(cli, "--lock-wait", "1000", when_it_waits=held.close) == ours


def niceness_while_streaming(
    cli: Cli, *options: str, when_it_waits: Callable[[], object] | None = None
) -> int:
    command = cli.command("backup", "sda", "--stdout", *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        if when_it_waits is not None:
            assert b"waiting" in child.stderr.readline()
            when_it_waits()
        assert child.stdout.read(12) == b"rbd diff v1\n"
        niceness = os.getpriority(os.PRIO_PROCESS, child.pid)
        child.stdout.read()
    return niceness


@pytest.mark.parametrize("verb", ["backup", "sync", "stream"])
def test_a_guest_is_frozen_and_thawed_by_a_hook_that_gives_way_to_nobody(
    cli: Cli, image: Path, verb: str
) -> None:
    hook, noted = cli.folder / "hook", cli.folder / "noted"
    hook.write_text(f'#!/bin/sh\necho "$1 $(nice)" >> {noted}\n')
    hook.chmod(0o700)
    words = ("backup", "sda", "--stdout") if verb == "stream" else (verb, "sda", cli.folder / "copy")
    subprocess.run(cli.command(*words, "--hook", hook), check=True, capture_output=True)
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert noted.read_text().split("\n") == [f"freeze {ours}", f"thaw {ours}", ""]


def test_a_process_that_is_not_its_own_keeps_its_priority(cli: Cli, image: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    cli.ok("backup", "sda", cli.folder / "copy")
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.parametrize("verb", ["backup", "sync"])
def test_how_far_is_0_to_19(cli: Cli, image: Path, verb: str) -> None:
    assert "20 is not in the range 0<=x<=19" in cli.fails(2, verb, "sda", cli.folder / "x", "--nice", "20")


@pytest.mark.parametrize("verb", ["backup", "sync"])
def test_a_speed_limit_holds(cli: Cli, image: Path, verb: str) -> None:
    """Of four reads at two a second the last begins a second and a half after the first, or later."""
    answer = cli.json(verb, "sda", cli.folder / "copy", "--speed-limit", "2M")
    [facts] = answer.get("backups", [answer])
    assert facts["bytes_read"] == 4 * MIB
    assert facts["seconds"] >= 1.5


@pytest.mark.parametrize("verb", ["backup", "sync"])
def test_a_speed_limit_that_would_take_for_ever_is_refused(cli: Cli, image: Path, verb: str) -> None:
    said = cli.fails(2, verb, "sda", cli.folder / "copy", "--speed-limit", "1000")
    assert said.startswith("1000 bytes a second are too few; allow 1048576 at least")
    assert not (cli.folder / "copy").exists()


def test_a_stream_is_as_fast_as_its_reader(cli: Cli, image: Path) -> None:
    assert "limit the reader, as with pv -L" in cli.fails(
        2, "backup", "sda", "--stdout", "--speed-limit", "2M"
    )
