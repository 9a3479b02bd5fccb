"""Sockets to listen at: who gets a path, what is left of it afterwards, and the URIs that name it."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from lmdbitmap.errors import AlreadyExists, Busy, InvalidArgument, NotFound
from lmdbitmap.nbd.listeners import InheritedListener, TcpListener, UnixListener


def leave_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def test_only_the_owner_may_connect_unless_said_otherwise(tmp_path: Path) -> None:
    for name, listener in [
        ("a", UnixListener(str(tmp_path / "a"))),
        ("b", UnixListener(str(tmp_path / "b"), 0o666)),
    ]:
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == (0o600 if name == "a" else 0o666)
        assert connects(tmp_path / name)
        listener.close()
        assert not (tmp_path / name).exists()


def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    leave_stale_socket(path)
    listener = UnixListener(str(path))
    assert connects(path)
    listener.close()


def test_a_living_server_keeps_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    listener = UnixListener(str(path))
    with pytest.raises(Busy, match="another server"):
        UnixListener(str(path))
    assert connects(path)
    listener.close()


def test_a_server_whose_queue_is_full_is_alive(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as deaf, socket.socket(socket.AF_UNIX) as waiting:
        deaf.bind(str(path))
        deaf.listen(0)
        waiting.connect(str(path))
        with pytest.raises(Busy):
            UnixListener(str(path))


def test_of_many_who_want_a_stale_path_one_gets_it(tmp_path: Path) -> None:
    outcomes = [race_for(tmp_path / f"{turn}.sock", contenders=6) for turn in range(25)]
    assert outcomes == [(1, 5)] * 25


def race_for(path: Path, contenders: int) -> tuple[int, int]:
    """How many won and lost a stale socket's path."""
    leave_stale_socket(path)
    start = threading.Barrier(contenders)
    won: list[UnixListener] = []
    lost: list[Busy] = []

    def claim() -> None:
        start.wait()
        try:
            won.append(UnixListener(str(path)))
        except Busy as busy:
            lost.append(busy)

    threads = [threading.Thread(target=claim) for _ in range(contenders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert connects(path)
    for listener in won:
        listener.close()
    return len(won), len(lost)


@pytest.mark.parametrize("step", ["setblocking", "close"])
def test_a_server_that_ends_while_its_socket_is_looked_at_leaves_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Before it was asked whether it is alive, or right after that: at this step of the socket that asks."""
    path = tmp_path / "server.sock"
    ending = UnixListener(path)
    if step == "close":  # it listens no more, and its file is there still
        ending.sock.close()

    def end(sock: socket.socket, *how: object) -> None:
        monkeypatch.undo()
        getattr(sock, step)(*how)
        ending.close()

    monkeypatch.setattr(socket.socket, step, end)
    listener = UnixListener(path)
    assert path.is_socket()
    listener.close()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(AlreadyExists, match="no socket"):
        UnixListener(str(path))
    assert path.read_text() == "data"


def test_a_socket_that_somebody_put_in_our_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    listener = UnixListener(str(path))
    (tmp_path / "new").write_text("theirs")
    (tmp_path / "new").replace(path)
    listener.close()
    assert path.read_text() == "theirs"


def test_a_socket_that_cannot_be_removed_is_closed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file system that is read-only by now. A server that ends has more to do than this."""

    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    path = tmp_path / "nbd.sock"
    listener = UnixListener(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        listener.close()
    assert not connects(path)
    assert f"the socket {path} is left behind" in caplog.text
    UnixListener(path).close()


def test_paths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="107"):
        UnixListener(str(tmp_path / ("x" * 200)))
    with pytest.raises(NotFound):
        UnixListener(str(tmp_path / "nowhere" / "nbd.sock"))


def test_uris_quote_names_and_paths(tmp_path: Path) -> None:
    listener = UnixListener(str(tmp_path / "a b&c.sock"))
    assert listener.uri("my disk/1") == f"nbd+unix:///my%20disk%2F1?socket={tmp_path}/a%20b%26c.sock"
    listener.close()


@pytest.mark.parametrize(("mode", "is_told"), [(0o666, True), (0o660, False), (None, False)])
def test_a_passed_socket_that_every_user_may_use_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int | None, is_told: bool
) -> None:
    """As systemd makes them without SocketMode=."""
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(path))
        path.unlink() if mode is None else path.chmod(mode)
        passed.listen()
        InheritedListener(os.dup(passed.fileno())).close()
    assert (f"every user of this host can connect to {path}; set SocketMode=0660" in caplog.text) == is_told


@pytest.mark.parametrize(
    ("address", "shown"), [(b"caf\xe9.sock", "caf%E9.sock"), (b"\0abstract", "%40abstract")]
)
def test_uris_show_the_sockets_that_others_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: bytes, shown: str
) -> None:
    """A service manager passes them; what they are called is no reason not to serve."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(address)
        passed.listen()
        listener = InheritedListener(os.dup(passed.fileno()))
    assert listener.uri("sda") == f"nbd+unix:///sda?socket={shown}"
    listener.close()


def test_a_port_that_is_free_is_found_and_named() -> None:
    listener = TcpListener("127.0.0.1", 0)
    port = listener.sock.getsockname()[1]
    assert listener.uri("sda") == f"nbd://127.0.0.1:{port}/sda"
    with pytest.raises(Busy, match=str(port)):
        TcpListener("127.0.0.1", port)
    listener.close()


def test_a_link_local_address_is_bound_and_named_with_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host need not have one: it is not bound here."""

    class Bound(socket.socket):
        def getsockname(self) -> object:
            return address

    def create(asked: object, *, family: int, backlog: int) -> socket.socket:
        assert (asked, family) == (address, socket.AF_INET6)
        return Bound(family)

    address = ("fe80::1", 10809, 0, socket.if_nametoindex("lo"))
    monkeypatch.setattr(socket, "create_server", create)
    listener = TcpListener("fe80::1%lo", 10809)
    assert listener.uri("sda") == "nbd://[fe80::1%25lo]:10809/sda"
    listener.close()


@pytest.mark.parametrize(("host", "port"), [("no such host.", 0), ("127.0.0.1", 65536), ("127.0.0.1", -1)])
def test_addresses_that_cannot_be_are_refused(host: str, port: int) -> None:
    with pytest.raises(InvalidArgument, match="no address"):
        TcpListener(host, port)
