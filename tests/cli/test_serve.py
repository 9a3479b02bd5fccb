"""serve: what guests write through it is known afterwards, however it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from lmdbitmap.cli.serving import Ending
from lmdbitmap.images.device import FileDevice
from lmdbitmap.nbd.server.server import Server
from tests.cli.conftest import MIB, SIZE, Cli
from tests.helpers.support import (
    PATIENCE_SECONDS,
    handled,
    make_raw_image,
    read_by_nobody,
    requires,
    run,
    signal_another_thread,
    spawn,
)

KIB = 1 << 10


def write(uri: str, offset: int, length: int, pattern: int = 0xA5) -> None:
    run("qemu-io", "-f", "raw", "-c", f"write -P {pattern} {offset} {length}", "-c", "flush", uri)


@requires("qemu-io")
def test_what_was_written_is_exactly_what_changed(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    with cli.serving("sda") as served:
        write(served.uris["sda"], MIB + 1, 1)
        write(served.uris["sda"], 3 * MIB, 64 * KIB)
    assert cli.dirty("sda") == ("exact", [(MIB, 64 * KIB), (3 * MIB, 64 * KIB)])
    assert image.read_bytes()[MIB + 1] == 0xA5


@requires("nbdinfo")
def test_the_only_disk_is_the_default_export_too(cli: Cli) -> None:
    cli.add("sda")
    with cli.serving("sda") as served:
        default = served.uris["sda"].replace("/sda?", "/?")
        assert run("nbdinfo", "--size", default).stdout == f"{SIZE}\n"


@requires("nbdinfo")
@requires("nbdcopy")
def test_several_disks_are_served_under_their_names(cli: Cli) -> None:
    cli.add("a")
    cli.add("b", 3 * MIB)
    cli.ok("checkpoint", "a,b", "monday")
    source = make_raw_image(cli.folder / "source", 3 * MIB, [(MIB, b"x" * MIB)])
    with cli.serving("a", "b", log=True) as served:
        assert run("nbdinfo", "--size", served.uris["a"]).stdout == f"{SIZE}\n"
        run("nbdcopy", source, served.uris["b"])
        default = served.uris["a"].replace("/a?", "/?")
        assert run("nbdinfo", "--size", default, check=False).returncode != 0
    [said] = served.child.stderr.splitlines()
    assert "expected the name of a served disk, found ''; name one that `nbdinfo --list` shows" in said
    assert (cli.folder / "b.raw").read_bytes() == source.read_bytes()
    assert (MIB, MIB) in cli.dirty("b")[1] or (0, 3 * MIB) in cli.dirty("b")[1]
    assert cli.dirty("a") == ("exact", [])


@requires("nbdinfo")
def test_a_tcp_port_on_loopback_is_served(cli: Cli) -> None:
    cli.add("sda")
    with spawn(*cli.command("serve", "sda", "--listen", "127.0.0.1:0")) as child:
        uri = child.wait_for_line(r"^nbd://127\.0\.0\.1:\d+/sda$").group()
        assert run("nbdinfo", "--size", uri).stdout == f"{SIZE}\n"
    assert child.process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly_even_when_sent_twice(cli: Cli, number: signal.Signals) -> None:
    cli.add("sda")
    with handled(number, signal.SIG_DFL), cli.serving("sda") as served:
        served.child.process.send_signal(number)
        served.child.process.send_signal(number)
        assert served.child.wait() == 0
    assert cli.json("info", "sda")["attached"] is False
    assert cli.ok("check") == f"{cli.store}: sound\n"


@requires("nbdinfo")
def test_under_nohup_it_outlives_its_terminal(cli: Cli) -> None:
    cli.add("sda")
    with handled(signal.SIGHUP, signal.SIG_IGN), cli.serving("sda") as served:
        served.child.process.send_signal(signal.SIGHUP)
        assert run("nbdinfo", "--size", served.uris["sda"]).stdout == f"{SIZE}\n"
        assert served.child.process.poll() is None


def test_a_signal_that_does_not_wake_the_main_thread_ends_it_too(cli: Cli) -> None:
    cli.add("sda")
    with cli.serving("sda") as served:
        signal_another_thread(served.child, signal.SIGTERM)
        assert served.child.wait() == 0


def test_a_signal_that_comes_before_there_is_a_server_ends_it_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(KeyError), Ending() as ending:
        signal.raise_signal(signal.SIGTERM)
        server = Server({})
        ending.ends(server)
        server.serve_forever()
        assert server.stop()
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before, "whoever failed to serve gives the signals back"


@requires("qemu-io")
def test_after_a_kill_the_next_command_knows_at_least_what_was_written(cli: Cli) -> None:
    cli.add("sda", 64 * MIB)
    cli.ok("checkpoint", "sda", "monday")
    with cli.serving("sda") as served:
        write(served.uris["sda"], 9 * MIB, 64 * KIB)
        served.child.process.kill()
        served.child.wait()
    told = cli.json("changes", "sda")
    assert told["trust"] == "superset"
    assert told["reason"] == "its owner died: whatever was being written then counts as dirty"
    assert cli.dirty("sda") == ("superset", [(8 * MIB, 4 * MIB)]), "the armed extent"
    cli.ok("checkpoint", "sda", "tuesday")
    assert cli.json("info", "sda")["epoch"]["number"] == 1
    assert cli.dirty("sda") == ("exact", [])
    assert cli.dirty("sda", "--since", "monday")[0] == "superset"


@requires("qemu-io")
def test_a_crash_costs_no_more_extents_than_were_allowed(cli: Cli) -> None:
    cli.add("sda", 64 * MIB)
    cli.ok("checkpoint", "sda", "monday")
    with cli.serving("sda", "--max-armed=1") as served:
        for offset in (1 * MIB, 9 * MIB, 17 * MIB):
            write(served.uris["sda"], offset, 64 * KIB)
        served.child.process.kill()
        served.child.wait()
    written = [(1 * MIB, 64 * KIB), (9 * MIB, 64 * KIB), (16 * MIB, 4 * MIB)]
    assert cli.dirty("sda") == ("superset", written), "only the last extent is armed"


def test_after_a_kill_the_disk_is_served_again_at_the_same_socket(cli: Cli) -> None:
    cli.add("sda")
    with cli.serving("sda") as served:
        served.child.process.kill()
        served.child.wait()
    with cli.serving("sda"):
        assert cli.json("info", "sda")["attached"] is True


def test_a_new_epoch_is_told_to_whoever_serves(cli: Cli) -> None:
    image = cli.add("sda")
    os.utime(image, ns=(2**61, 2**61))
    with cli.serving("sda", log=True) as served:
        pass
    assert served.child.stderr == (
        "lmdbitmap: disk sda: the next backup reads the whole disk: the image was written while it was not tracked\n"
    )


def test_readiness_is_told_to_programs(cli: Cli) -> None:
    cli.add("sda")
    path = cli.folder / "s"
    with spawn(*cli.command("serve", "sda", "--socket", path, "--json")) as child:
        said = child.wait_for_line("ready").group(0)
        assert said == "ready"
        assert child.stdout == f'{{"ready": true, "uris": ["nbd+unix:///sda?socket={path}"]}}\n'
    assert child.process.returncode == 0


# --- refusals ---


def test_a_second_server_of_a_disk_is_refused(cli: Cli) -> None:
    cli.add("a")
    cli.add("b")
    with cli.serving("a"):
        said = cli.fails(4, "serve", "b", "a", "--socket", cli.folder / "other")
        assert said.startswith("disk 'a' is owned by another process; ")
        assert cli.json("info", "b")["attached"] is False, "none is served"
        assert not (cli.folder / "other").exists()


def test_an_image_that_qemu_has_open_is_refused(cli: Cli) -> None:
    with FileDevice.open(cli.add("sda")):
        cli.fails(4, "serve", "sda", "--socket", cli.folder / "s")


def test_a_socket_that_is_in_use_is_refused(cli: Cli) -> None:
    cli.add("sda")
    path = cli.folder / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "another server listens" in cli.fails(4, "serve", "sda", "--socket", path)
    assert cli.json("info", "sda")["attached"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "say where to serve"),
        (["--listen", "0.0.0.0:0"], "say --insecure"),
        (["--listen", "[::]:0"], "say --insecure"),
        (["--listen", "0.0.0.0:0", "--insecure-metrics"], "say --insecure"),
        (["--listen", "example.org:10809"], "say --insecure"),
        (["--listen", "10809"], "is not HOST:PORT"),
        (["--listen", "127.0.0.1:65536"], "is not HOST:PORT"),
        (["--listen", ":1"], "is not HOST:PORT"),
        (["--listen", "127.0.0.1:" + "9" * 5000], "is not HOST:PORT"),
        (["--socket", "s", "--metrics", "127.0.0.1:" + "9" * 5000], "is not HOST:PORT"),
        (["sda", "--socket", "s"], "names a disk twice"),
        (["--socket", "s" * 200], "longer than 107 bytes"),
        (["--socket", "caf\udce9"], "is no UTF-8 name of a file"),
        (["--tls", "x", "--socket", "s"], "--tls is for --listen"),
        (["--password", "x", "--socket", "s"], "No such option"),
    ],
)
def test_where_it_cannot_serve_it_does_not(cli: Cli, options: list[str], said: str) -> None:
    cli.add("sda")
    assert said in cli.fails(2, "serve", "sda", *options)


def test_certificates_that_are_not_there_are_named(cli: Cli) -> None:
    cli.add("sda")
    told = cli.fails(1, "serve", "sda", "--listen", "127.0.0.1:0", "--tls", cli.folder)
    assert f"{cli.folder / 'server-cert.pem'} does not exist" in told
    assert cli.json("info", "sda")["attached"] is False


def test_whoever_reads_its_answer_may_leave(cli: Cli) -> None:
    """Nobody will ever know the URI, so it ends, cleanly."""
    cli.add("sda")
    command = cli.command("serve", "sda", "--socket", cli.folder / "s")
    with read_by_nobody() as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=PATIENCE_SECONDS)
    assert (done.returncode, done.stderr) == (141, b"")
    assert cli.ok("check") == f"{cli.store}: sound\n"
    assert not (cli.folder / "s").exists()


def test_whoever_insists_may_listen_to_other_hosts(cli: Cli) -> None:
    """Only asked for, not connected to: servers in tests keep to this host."""
    cli.add("sda")
    said = cli.fails(2, "serve", "sda", "--listen", "no such host.:0", "--insecure")
    assert "is no address" in said


def test_a_socket_in_a_folder_that_is_not_there_is_told(cli: Cli, tmp_path: Path) -> None:
    cli.add("sda")
    assert "does not exist" in cli.fails(1, "serve", "sda", "--socket", tmp_path / "nowhere" / "s")


def test_old_objects_of_a_server_are_never_looked_through_for_garbage(cli: Cli) -> None:
    """That holds up all guests for as long as it takes."""
    cli.add("sda")
    begin = (
        "import atexit, gc; atexit.register(lambda: print('left out', gc.get_freeze_count(), flush=True));"
    )
    serving = cli.command("serve", "sda", "--socket", cli.folder / "sock")
    command = [serving[0], "-c", f"{begin} from lmdbitmap.cli.main import main; main()", *serving[3:]]
    with spawn(*command) as child:
        child.wait_for_line("^ready$")
        child.process.terminate()
        left_out = child.wait_for_line(r"^left out (\d+)$")
    assert int(left_out[1]) > 10_000
