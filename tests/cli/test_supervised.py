"""`serve` under a service manager: the sockets that it passes, and what it is told."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from lmdbitmap.nbd.supervisor import Supervisor
from tests.cli.conftest import SIZE, Cli
from tests.helpers.certificates import shared_papers
from tests.helpers.support import PATIENCE_SECONDS, Child, requires, run, spawn

pytestmark = requires("nbdinfo")

MANAGER = """
import os, socket, sys
kind, address, sockets, *command = sys.argv[1:]
with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as bound:
    bound.bind(address if kind == "unix" else ("0.0.0.0" if kind == "open" else "127.0.0.1", int(address)))
    if kind != "deaf":
        bound.listen()
    os.dup2(bound.fileno(), 3)
    os.set_inheritable(3, True)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sockets)
    os.execv(command[0], command)
"""


@contextlib.contextmanager
def managed(cli: Cli, kind: str, address: object, *options: str, sockets: str = "1") -> Iterator[Child]:
    command = cli.command("serve", "sda", *options)
    with spawn(sys.executable, "-c", MANAGER, kind, str(address), sockets, *command) as child:
        yield child


def test_passed_unix_socket_is_served_and_left_alone_at_the_end(cli: Cli) -> None:
    cli.add("sda")
    path = cli.folder / "passed.sock"
    with managed(cli, "unix", path) as child:
        uri = child.wait_for_line(r"^nbd\+unix:///sda\?socket=.*passed.sock$").group()
        assert run("nbdinfo", "--size", uri).stdout.strip() == str(SIZE)
    assert child.process.returncode == 0
    assert path.is_socket()  # the manager goes on listening at it


def test_passed_tcp_socket_is_served(cli: Cli) -> None:
    cli.add("sda")
    with managed(cli, "tcp", 0) as child:
        uri = child.wait_for_line(r"^nbd://127\.0\.0\.1:\d+/sda$").group()
        assert run("nbdinfo", "--size", uri).stdout.strip() == str(SIZE)


@pytest.mark.parametrize(
    ("kind", "sockets", "said"),
    [
        ("deaf", "1", "descriptor 3 is no listening stream socket"),
        ("tcp", "many", "LISTEN_FDS='many' is not a number from 0 to 64"),
        ("tcp", "9" * 5000, "LISTEN_FDS='99999999999999999999' is not a number from 0 to 64"),
        ("tcp", "0", "say where to serve"),
    ],
)
def test_what_is_passed_and_cannot_be_served_is_said(cli: Cli, kind: str, sockets: str, said: str) -> None:
    cli.add("sda")
    with managed(cli, kind, 0, sockets=sockets) as child:
        assert child.wait() == 2
    assert said in child.stderr
    assert cli.json("info", "sda")["attached"] is False


@pytest.mark.parametrize(("options", "is_right"), [([], False), (["--insecure"], True), (["--tls"], True)])
def test_passed_socket_that_other_hosts_reach_needs_tls_or_a_word(
    cli: Cli, options: list[str], is_right: bool
) -> None:
    """It is never served: what is passed beside it is no socket, which is said where all is right with this one."""
    cli.add("sda")
    folder = [str(shared_papers().folder)] if options == ["--tls"] else []
    with managed(cli, "open", 0, *options, *folder, sockets="2") as child:
        assert child.wait() == 2
    refused = "every host that reaches 0.0.0.0 could read and write the disks; give certificates with --tls"
    assert ("descriptor 4 is no listening" if is_right else refused) in child.stderr


def test_sockets_of_another_process_are_not_ours(cli: Cli) -> None:
    cli.add("sda")
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    done = run(*cli.command("serve", "sda"), env=environment, check=False)
    assert (done.returncode, "say where to serve" in done.stderr) == (2, True)


@pytest.mark.parametrize("prefix", ["", "@"], ids=["path", "abstract"])
def test_manager_is_told_when_it_is_ready_and_when_it_stops(cli: Cli, tmp_path: Path, prefix: str) -> None:
    cli.add("sda")
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("\0" + address if prefix else address)
        ear.settimeout(PATIENCE_SECONDS)
        command = cli.command("serve", "sda", "--socket", cli.folder / "s")
        with spawn(*command, env={"NOTIFY_SOCKET": prefix + address}) as child:
            assert ear.recv(100) == b"READY=1"
            assert run("nbdinfo", "--size", f"nbd+unix:///sda?socket={cli.folder / 's'}").returncode == 0
            child.process.send_signal(signal.SIGTERM)
            assert ear.recv(100) == b"STOPPING=1"
            assert child.wait() == 0


def test_manager_that_does_not_listen_costs_nothing(cli: Cli, tmp_path: Path) -> None:
    cli.add("sda")
    command = cli.command("serve", "sda", "--socket", cli.folder / "s")
    with spawn(*command, env={"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as child:
        child.wait_for_line("^ready$")
    assert (child.process.returncode, child.stderr) == (0, "")


def test_manager_that_has_much_to_do_is_waited_for(tmp_path: Path) -> None:
    """Without READY=1 it would end the server after two minutes."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear, ThreadPoolExecutor(1) as pool:
        ear.bind(address)
        ear.settimeout(PATIENCE_SECONDS)
        waiting = fill(address)
        telling = pool.submit(Supervisor(address).tell, "READY=1")
        assert wait([telling], 0.1).not_done
        heard = [ear.recv(100) for _ in range(waiting + 1)]
        assert telling.result(PATIENCE_SECONDS) is None
    assert heard == [b"x"] * waiting + [b"READY=1"]


def fill(address: str) -> int:
    """Say as much as nobody has heard yet; answers how often. Each time as another, as one alone may be held back."""
    for count in range(10_000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            try:
                other.sendto(b"x", address)
            except BlockingIOError:
                return count
    pytest.fail("it hears everything")


def test_server_may_open_as_many_files_as_the_system_lets_it(cli: Cli) -> None:
    """Else the connections of one disk could use up those of another."""
    cli.add("sda")
    command = cli.command("serve", "sda", "--socket", cli.folder / "s")
    with spawn("sh", "-c", 'ulimit -Sn 256; ulimit -Hn 2000; exec "$@"', "sh", *command) as child:
        child.wait_for_line("^ready$")
        limits = Path(f"/proc/{child.process.pid}/limits").read_text()
    [line] = [line for line in limits.splitlines() if line.startswith("Max open files")]
    assert line.split()[3:5] == ["2000", "2000"]
