"""A disk whose server hangs while it is read: the reader fails in time, and costs nobody anything else."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.access import questions, routes
from lmdbitmap.access.through_owner import open_held
from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import Busy
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.client import link
from lmdbitmap.store import Store
from lmdbitmap.streams.stream import stream_backup
from lmdbitmap.syncs.sync import sync
from tests.cli.conftest import SIZE, Cli, Served
from tests.helpers.support import PATIENCE_SECONDS, requires, run

pytestmark = requires("qemu-io")

LIMIT_S = 0.2
PART_S = 0.05
"""Of a connection to one that hangs, which is never through with what it was doing."""


@pytest.fixture(autouse=True)
def part_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_PART_S", PART_S)


def by_backup(store: Store, folder: Path, **how: object) -> object:
    return backup(store, ["sda"], folder / "backups", **how)  # type: ignore[arg-type]


def by_stream(store: Store, folder: Path, **how: object) -> object:
    return stream_backup(store, "sda", io.BytesIO(), **how)  # type: ignore[arg-type]


def by_sync(store: Store, folder: Path, **how: object) -> object:
    return sync(store, "sda", folder / "copy.raw", **how)  # type: ignore[arg-type]


def stop(pid: int) -> None:
    """Stop a child, and wait until every thread of it stands still."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def stop_and_wait(pid: int) -> str:
    """The same for a shell that is not its parent."""
    return f"{{ kill -STOP {pid}; while grep -L '^State:.T' /proc/{pid}/task/*/status | grep -q .; do :; done; }}"


@contextlib.contextmanager
def going_on(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def hanging_once_opened(pid: int) -> Iterator[None]:
    """In the block it hangs as soon as its snapshots are open to be read."""

    def opened(*held: Any) -> object:
        devices = open_held(*held)
        stop(pid)
        return devices

    with pytest.MonkeyPatch.context() as patch, going_on(pid):
        patch.setattr(routes, "open_held", opened)
        yield


def write(served: Served, offset: str, byte: int) -> None:
    run("qemu-io", "-f", "raw", "-c", f"write -q -P {byte} {offset} 64k", served.uris["sda"])


def await_release(cli: Cli) -> None:
    """Return when the owner, which goes on, has let go of what it held for a reader that is gone."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while cli.json("info", "sda")["served"]["snapshots"]:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("read", [by_backup, by_stream, by_sync])
def test_reader_of_an_owner_that_hangs_fails_in_time_and_in_one_sentence(
    cli: Cli, read: Callable[..., object]
) -> None:
    cli.add("sda")
    with cli.serving("sda", log=True) as served, Store.open(str(cli.store)) as store:
        pid = served.child.pid
        with (
            hanging_once_opened(pid),
            pytest.raises(Busy, match=r"'sda' through .*: not a byte .* within 0\.2 s; see what"),
        ):
            read(store, cli.folder, owner_limit_s=LIMIT_S)
        read(store, cli.folder)


def test_backup_after_one_whose_owner_hung_is_a_right_increment(cli: Cli) -> None:
    image, repository = cli.add("sda"), cli.folder / "backups"
    with cli.serving("sda", log=True) as served, Store.open(str(cli.store)) as store:
        cli.ok("backup", "sda", repository)
        write(served, "1M", 7)
        pid = served.child.pid
        with hanging_once_opened(pid), pytest.raises(Busy):
            by_backup(store, cli.folder, owner_limit_s=LIMIT_S)
        await_release(cli)
        write(served, "2M", 9)
        [made] = cli.json("backup", "sda", repository)["backups"]
        assert (made["type"], made["bytes_changed"]) == ("incremental", 2 * 65536)
        assert len(cli.json("info", "sda")["checkpoints"]) == 3, "the first, and those of two backups"
    cli.ok("restore", repository, "sda", cli.folder / "new.raw")
    assert (cli.folder / "new.raw").read_bytes() == image.read_bytes()
    assert len(image.read_bytes()) == SIZE


@pytest.mark.parametrize("verb", [("backup", "sda", "backups"), ("sync", "sda", "copy.raw")])
def test_limit_is_an_option_of_the_command(
    cli: Cli, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cli.folder)
    cli.add("sda")
    with cli.serving("sda", log=True) as served:
        pid = served.child.pid
        with hanging_once_opened(pid):
            answer = cli(*verb, "--owner-limit", LIMIT_S)
            assert "not a byte of an answer came within 0.2 s" in answer.err
        assert cli(*verb).code == 0


@pytest.mark.parametrize(
    ("words", "times"), [(["metrics"], 2), (["ls"], 2), (["info", "sda"], 1)], ids=["metrics", "ls", "info"]
)
def test_each_process_that_hangs_is_waited_for_once_and_all_of_them_not_for_long(
    cli: Cli,
    words: list[str],
    times: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waited: list[float | None] = []

    def noted(path: str, timeout_s: float | None = None) -> control_client.Client | None:
        waited.append(timeout_s)
        return reach(path, timeout_s)

    reach = control_client.reach
    monkeypatch.setattr(control_client, "reach", noted)
    monkeypatch.setattr(questions, "_INFO_S", LIMIT_S)
    monkeypatch.setattr(questions, "_LEAST_S", PART_S)
    for name in ("sda", "sdb", "sdc"):
        cli.add(name)
    with cli.serving("sda", "sdc") as one, cli.serving("sdb") as other, contextlib.ExitStack() as hanging:
        for served in (one, other):
            hanging.enter_context(going_on(served.child.pid))
            stop(served.child.pid)
        code, out, _ = cli(*words)
    assert (code, waited) == (0, [LIMIT_S, PART_S][:times])
    assert "superset" in out or 'lmdbitmap_served{disk="sda"} 0.0' in out
    assert f"the owner did not answer within {LIMIT_S:g} s" in caplog.text


IMPATIENTLY = f"""
from lmdbitmap.access import routes
from lmdbitmap.nbd.client import link
routes.LAST_WORD_S, link._PART_S = 0.2, {PART_S}
"""
"""Begins a program whose owner hangs at its last words; one that lives may well take so long for them."""


def interruptible(command: list[str], begin: str = "") -> list[str]:
    """Also where these tests run in the background, and who is started there ignores SIGINT, or SIGHUP."""
    begin += "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    begin += "[signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)];"
    return [command[0], "-c", f"{begin} from lmdbitmap.cli.main import main; main()", *command[3:]]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_ends_a_reader_whose_owner_hangs(cli: Cli, ending: signal.Signals) -> None:
    cli.add("sda").write_bytes(os.urandom(SIZE))
    cli.ok("adopt", "sda")
    with cli.serving("sda", log=True) as served:
        pid, hook, noted = served.child.pid, cli.folder / "hook", cli.folder / "noted"
        hook.write_text(f"#!/bin/sh\n[ $1 = freeze ] || {{ {stop_and_wait(pid)}; touch {noted}; }}\n")
        hook.chmod(0o755)
        with (
            going_on(pid),
            subprocess.Popen(
                interruptible(
                    cli.command("backup", "sda", cli.folder / "backups", "--hook", hook), IMPATIENTLY
                )
            ) as reader,
        ):
            children = Path(f"/proc/{reader.pid}/task/{reader.pid}/children")
            while not noted.exists() or children.read_text():
                assert reader.poll() is None
                time.sleep(0.01)
            reader.send_signal(ending)
            assert reader.wait(30) == 128 + ending


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("served", [True, False])
def test_what_a_signal_ends_in_the_middle_is_undone_and_a_word_is_said(
    cli: Cli, ending: signal.Signals, served: bool
) -> None:
    """As systemd ends a unit, and a terminal that is closed its programs."""
    cli.add("sda").write_bytes(os.urandom(SIZE))
    cli.ok("adopt", "sda")
    folder = cli.folder / "backups" / "sda"
    with cli.serving("sda") if served else contextlib.nullcontext():
        words = cli.command("backup", "sda", folder.parent, "--speed-limit", "1M")
        with subprocess.Popen(interruptible(words), stderr=subprocess.PIPE, text=True) as backup:
            while not any(folder.glob("*.partial")):
                assert backup.poll() is None
                time.sleep(0.01)
            backup.send_signal(ending)
            assert backup.wait(30) == 128 + ending
            assert backup.stderr is not None
            said = f"lmdbitmap: ended by {ending.name} before it reported that its work was done; "
            assert backup.stderr.read().startswith(said)
        assert not folder.exists()
        assert len(cli.json("info", "sda")["checkpoints"]) == 1, "the first"
