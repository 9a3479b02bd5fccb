"""Every verb, while another process serves the disk and a real client writes to it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap import Filter, Store
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.control.control import ControlServer
from tests.cli.conftest import MIB, SIZE, Cli, Served
from tests.cli.test_serve import write
from tests.helpers.support import make_raw_image, requires

KIB = 1 << 10

pytestmark = requires("qemu-io")


@contextlib.contextmanager
def _served_and_written(cli: Cli, *, log: bool = False) -> Iterator[Served]:
    """Disk `sda`, served since checkpoint `monday`, with 64 KiB written at 1 MiB."""
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    with cli.serving("sda", log=log) as served:
        write(served.uris["sda"], MIB, 64 * KIB)
        yield served


def test_changes_are_exact_up_to_the_moment(cli: Cli) -> None:
    with _served_and_written(cli) as served:
        assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB)])
        write(served.uris["sda"], 5 * MIB, 1)
        assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB), (5 * MIB, 64 * KIB)])


def test_zeroes_of_a_served_image_are_seen(cli: Cli) -> None:
    with _served_and_written(cli):
        cli.ok("mark", "sda", 3 * MIB, 1)
        extents = cli.json("changes", "sda")["extents"]
        assert [(e["offset"], e["zero"]) for e in extents] == [(MIB, False), (3 * MIB, True)]


def test_ls_and_info_know_it_is_attached(cli: Cli) -> None:
    with _served_and_written(cli):
        told = cli.json("info", "sda")
        assert (told["attached"], told["trust"], told["dirty_bytes"]) == (True, "exact", 64 * KIB)
        assert told["checkpoints"][-1]["dirty_bytes"] == 64 * KIB
        assert cli.json("ls")["disks"][0]["attached"] is True
    assert cli.json("info", "sda")["attached"] is False


def test_a_checkpoint_divides_what_was_written_from_what_will_be(cli: Cli) -> None:
    with _served_and_written(cli) as served:
        cli.ok("checkpoint", "sda", "tuesday")
        write(served.uris["sda"], 5 * MIB, 1)
        assert cli.dirty("sda", "--since", "monday", "--until", "tuesday") == ("exact", [(MIB, 64 * KIB)])
        assert cli.dirty("sda") == ("exact", [(5 * MIB, 64 * KIB)])
    assert cli.dirty("sda") == ("exact", [(5 * MIB, 64 * KIB)])


def test_marking_and_forgetting_are_done_by_the_owner(cli: Cli) -> None:
    with _served_and_written(cli) as served:
        cli.ok("mark", "sda", 0, 1)
        cli.ok("checkpoint", "sda", "tuesday")
        write(served.uris["sda"], 5 * MIB, 1)
        cli.ok("forget", "sda", "tuesday")
        everything = [(0, 64 * KIB), (MIB, 64 * KIB), (5 * MIB, 64 * KIB)]
        assert cli.dirty("sda") == ("exact", everything)
        write(served.uris["sda"], 7 * MIB, 1)
    assert cli.dirty("sda") == ("exact", [*everything, (7 * MIB, 64 * KIB)])


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (1, ["checkpoint", "sda", "monday"], "has a checkpoint 'monday' already"),
        (2, ["checkpoint", "sda", "\x07"], "has control characters"),
        (1, ["forget", "sda", "sunday"], "has no checkpoint 'sunday'"),
        (2, ["mark", "sda", SIZE, "1"], "are not on a disk of 8388608 bytes"),
        (1, ["changes", "sda", "--since", "sunday"], "has no checkpoint 'sunday'"),
    ],
)
def test_the_owners_refusals_are_ours(cli: Cli, code: int, words: list[object], said: str) -> None:
    with _served_and_written(cli):
        assert said in cli.fails(code, *words)


def test_a_backup_of_a_served_disk_and_another_one_is_refused(cli: Cli) -> None:
    with _served_and_written(cli):
        cli.add("sdb")
        said = cli.fails(4, "backup", "sdb", "sda", cli.folder / "backups")
        assert said.startswith("of these disks only sda is served; serve all of them in one process")
        assert not list((cli.folder / "backups").glob("*/*.qcow2"))


def test_an_export_is_exact_up_to_the_moment(cli: Cli) -> None:
    with _served_and_written(cli):
        file = cli.folder / "sda.dbm"
        cli.ok("export", "sda", file)
        told = cli.json("inspect", file)
    assert (told["trust"], told["dirty_bytes"], told["recording"]) == ("exact", 64 * KIB, True)


def test_an_import_into_a_served_disk_is_done_by_its_owner(cli: Cli) -> None:
    with _served_and_written(cli) as served:
        file = cli.folder / "sda.dbm"
        cli.ok("export", "sda", file)
        cli.ok("checkpoint", "sda", "tuesday")
        assert cli.dirty("sda") == ("exact", [])
        cli.ok("import", file, "before", "--into", "sda")
        assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB)])
        write(served.uris["sda"], 5 * MIB, 1)
    assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB), (5 * MIB, 64 * KIB)])


def test_what_is_served_cannot_be_added_or_served_again(cli: Cli) -> None:
    with _served_and_written(cli):
        image, other = cli.folder / "sda.raw", make_raw_image(cli.folder / "other.raw", SIZE)
        assert "'sda'" in cli.fails(1, "add", "sda", other)
        assert "is tracked already, as 'sda'" in cli.fails(1, "add", "again", image)
        assert cli.fails(4, "serve", "sda", "--socket", cli.folder / "s").startswith(
            "disk 'sda' is owned by "
        )
        assert [disk["name"] for disk in cli.json("ls")["disks"]] == ["sda"]


def test_callers_that_are_stuck_keep_nobody_waiting(cli: Cli) -> None:
    """One says nothing, one half a line, one asks on and on and never reads: at the control socket, and as guests."""
    with _served_and_written(cli, log=True) as served, contextlib.ExitStack() as stuck:
        uuid = cli.json("info", "sda")["uuid"]
        control = [stuck.enter_context(_connected(cli.store / "control" / uuid)) for _ in range(3)]
        guests = [stuck.enter_context(_connected(cli.folder / "sda.sock")) for _ in range(3)]
        for caller, half, whole in (
            (control, b'{"operation": ', b'{"operation": "info", "arguments": {}}\n'),
            (guests, b"IHAVE", bytes(4) + b"IHAVEOPT" + bytes([0, 0, 0, 3, 0, 0, 0, 0])),
        ):
            caller[1].send(half)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                for _ in range(1 << 16):
                    caller[2].send(whole)
        write(served.uris["sda"], 5 * MIB, 1)
        cli.ok("checkpoint", "sda", "tuesday")
        assert cli.dirty("sda") == ("exact", [])
        assert cli.json("info", "sda")["served"]["connections"]["ever"] == 2
        served.child.process.terminate()
        assert served.child.wait() == 0


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as caller:
        with control_client.short_path(str(path)) as address:
            caller.connect(address)
        caller.setblocking(False)
        yield caller


def test_a_store_in_use_is_sound(cli: Cli) -> None:
    with _served_and_written(cli):
        assert cli.ok("check") == f"{cli.store}: sound\n"


def test_an_owner_that_lost_track_is_believed_before_the_store(cli: Cli) -> None:
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    with (
        Store.open(str(cli.store)) as store,
        Filter.attach(store, "sda", background=False) as attached,
        ControlServer({"sda": attached}),
    ):
        attached._voucher.lost = "the store was full"
        assert "the store was full" in cli("changes", "sda").err
        assert cli("changes", "sda").code == 3
        assert cli.json("ls")["disks"][0]["trust"] == "untrusted"
        assert cli("changes", "sda", "--since", "epoch-1", "--until", "monday").code == 0
        attached._voucher.lost = None


def test_an_owner_that_takes_no_orders_is_asked_nothing(cli: Cli) -> None:
    """An agent that embeds the library may have no control socket: what the store says is still right."""
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    with Store.open(str(cli.store)) as store, Filter.attach(store, "sda", background=False) as attached:
        attached.pwrite(b"x", MIB)
        assert cli.dirty("sda") == ("superset", [(0, 4 * MIB)])
        assert cli.fails(4, "mark", "sda", 0, 1).startswith(
            "disk 'sda' is owned by a process that does not serve it, such as another backup; "
        )
    assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB)])


# --- several disks ---


def test_disks_of_one_process_share_a_checkpoint(cli: Cli) -> None:
    cli.add("a")
    cli.add("b")
    with cli.serving("a", "b") as served:
        cli.ok("checkpoint", "a,b", "monday")
        write(served.uris["b"], 0, 1)
        assert cli.dirty("a") == ("exact", [])
        assert cli.dirty("b") == ("exact", [(0, 64 * KIB)])
    times = {cli.json("info", name)["checkpoints"][-1]["time"] for name in "ab"}
    assert len(times) == 1


def test_disks_of_several_processes_share_none(cli: Cli) -> None:
    cli.add("a")
    cli.add("b")
    cli.add("c")
    with cli.serving("a"), cli.serving("b"):
        refused = (
            f"process {cli.json('info', 'a')['served']['pid']} serves a, and not {{}}; "
            "serve all of the disks in one process, or run the command for each disk alone"
        )
        assert cli.fails(4, "checkpoint", "a,b", "monday") == refused.format("b")
        assert cli.fails(4, "snapshot", "a,c", "monday") == refused.format("c")
        said = cli.fails(4, "checkpoint", "a,c", "monday")
        assert said == (
            "of these disks only a is served; serve all of them in one process, or none,"
            " or run the command for each disk alone"
        )
    assert {len(cli.json("info", name)["checkpoints"]) for name in "abc"} == {1}
