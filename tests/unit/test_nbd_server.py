"""The server as its owner sees it: clients come and go, misbehave, and are let go in good order."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import signal
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from lmdbitmap.errors import StorageError
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk, PlainLane
from lmdbitmap.interfaces import BlockDevice, ServedDisk
from lmdbitmap.nbd import keepalive
from lmdbitmap.nbd.listeners import accepted
from lmdbitmap.nbd.server.contexts import StatusSource, base_contexts
from lmdbitmap.nbd.server.rounds import Rounds
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.server.visit import Offer, Visit
from tests.helpers.listening import lack_memory_to_listen
from tests.helpers.nbd_raw import (
    BLOCK_STATUS,
    DISC,
    GO,
    READ,
    WRITE,
    RawClient,
    option,
    request,
    string,
    write,
)
from tests.helpers.support import PATIENCE_SECONDS

STRUCTURED_REPLY, LIST_META_CONTEXT = 8, 9
SIZE = 64 << 20
EXPORT_NAME = 1
INFO = 6
POLICY = 2**31 + 2
UNKNOWN = 2**31 + 6
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 0}
"""What makes 20 s of silence; the last would cut off a client that lives and does not read."""


class Gate:
    """Lets a test see that the disk is at work, and decide when it is done."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()


class GatedDisk(PlainDisk):
    """Its writes wait at the gate."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(MemoryDevice(SIZE))
        self.gate = gate

    def lane(self) -> PlainLane:
        return GatedLane(self._device, self.gate)

    def content(self, offset: int, length: int) -> bytes:
        return self._device.pread(length, offset)


class GatedLane(PlainLane):
    def __init__(self, device: BlockDevice, gate: Gate) -> None:
        super().__init__(device)
        self._gate = gate

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        self._gate.entered.set()
        assert self._gate.open.wait(PATIENCE_SECONDS)
        return super().write_many(writes)


class SlowlyBegunDisk(GatedDisk):
    """Its lanes wait at the gate before they are there."""

    def lane(self) -> PlainLane:
        self.gate.entered.set()
        assert self.gate.open.wait(PATIENCE_SECONDS)
        return PlainLane(self._device)


class BrokenDisk(PlainDisk):
    """A disk with a mistake in its program."""

    def __init__(self) -> None:
        super().__init__(MemoryDevice(SIZE))

    def lane(self) -> PlainLane:
        raise ZeroDivisionError("a mistake")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "nbd.sock")


@contextlib.contextmanager
def serving(path: str, disks: Mapping[str, ServedDisk] | None = None, **options: float) -> Iterator[Server]:
    server = Server(disks or {"disk": PlainDisk(MemoryDevice(SIZE))}, **options)  # type: ignore[arg-type]
    server.listen_unix(path)
    server.start()
    try:
        yield server
    finally:
        assert server.stop()


def transmitting(path: str, name: str = "disk") -> RawClient:
    client = RawClient.connect(path)
    client.go(name)
    return client


def test_clients_are_served_under_the_names_of_the_disks(path: str) -> None:
    one, two = MemoryDevice(SIZE), MemoryDevice(512)
    with serving(path, {"one": PlainDisk(one), "two": PlainDisk(two)}) as server:
        assert server.uris == [f"nbd+unix:///{name}?socket={path}" for name in ("one", "two")]
        with transmitting(path, "one") as client, transmitting(path, "two") as other:
            assert client.do(WRITE, 512, 3, data=b"one").error == 0
            assert other.do(WRITE, 512, 3, data=b"two").error == errno.ENOSPC
    assert one.pread(3, 512) == b"one"


def test_every_connection_to_a_disk_sees_what_the_others_wrote(path: str) -> None:
    with serving(path), transmitting(path) as writer, transmitting(path) as reader:
        assert writer.do(WRITE, 0, 5, data=b"fresh").error == 0
        assert reader.do(READ, 0, 5).data == b"fresh"


def test_allocation_can_be_asked_for(path: str) -> None:
    device = MemoryDevice(SIZE)
    device.pwrite(b"x", 8192)
    with serving(path, {"disk": PlainDisk(device)}), RawClient.connect(path) as client:
        ids = client.go("disk", contexts=["base:allocation", "base:other"])
        assert list(ids) == ["base:allocation"]
        statuses = client.do(BLOCK_STATUS, 0, 16384).statuses
    assert statuses == {ids["base:allocation"]: [(8192, 3), (4096, 0), (4096, 3)]}


# --- places ---


def refused(client: RawClient, name: str) -> bool:
    """Whether there is no room for it at that export, and it is sent away."""
    client.greet()
    [(kind, said)] = client.ask(GO, string(name) + b"\0\0")
    return (kind, b"no room" in said, client.is_closed_by_server()) == (POLICY, True, True)


def test_a_client_too_many_is_turned_away_until_another_leaves(path: str) -> None:
    with serving(path, max_connections=1) as server:
        with transmitting(path) as first:
            with RawClient.connect(path) as second:
                assert refused(second, "disk")
            first.send(request(DISC))
            assert first.is_closed_by_server()
        with transmitting(path) as third:
            assert third.do(READ, 0, 1).error == 0
            assert server.counters[2] == 1


def test_a_disk_that_is_removed_while_a_client_haggles_is_not_called_full(path: str) -> None:
    beside = PlainDisk(MemoryDevice(SIZE))
    with serving(path) as server, RawClient.connect(path) as client:
        server.add("disk@monday", beside)
        client.greet()
        assert client.ask(INFO, string("disk@monday") + b"\0\0")[-1] == (1, b"")
        server.remove("disk@monday", beside)
        [(kind, said)] = client.ask(GO, string("disk@monday") + b"\0\0")
        assert (kind, said) == (UNKNOWN, b"no disk named 'disk@monday' is served here")
        assert client.is_closed_by_server()
        assert server.counters.turned_away == 0


def test_one_too_many_of_the_old_kind_is_sent_away_without_a_word(path: str) -> None:
    with serving(path, max_connections=1), transmitting(path), RawClient.connect(path) as second:
        second.greet()
        second.send(option(EXPORT_NAME, b"disk"))
        assert second.is_closed_by_server()


def test_clients_of_one_disk_keep_none_of_another_out(path: str) -> None:
    disks: dict[str, ServedDisk] = {name: PlainDisk(MemoryDevice(SIZE)) for name in ("a", "b")}
    with serving(path, disks, max_connections=1), transmitting(path, "a"), transmitting(path, "b") as guest:
        assert guest.do(READ, 0, 1).error == 0
        with RawClient.connect(path) as one_more:
            assert refused(one_more, "a")


@pytest.mark.parametrize("handed_over_first", [True, False])
def test_those_who_were_handed_over_and_others_keep_each_other_out_of_no_export(
    path: str, handed_over_first: bool
) -> None:
    with serving(path, max_connections=1) as server, contextlib.ExitStack() as clients:
        ways = [functools.partial(handed_over, server), functools.partial(RawClient.connect, path)]
        for come in ways if handed_over_first else reversed(ways):
            clients.enter_context(come()).go("disk")
            assert refused(clients.enter_context(come()), "disk")


def handed_over(server: Server) -> RawClient:
    ours, theirs = socket.socketpair()
    assert server.take_in(ours)
    return RawClient(theirs)


def test_newcomers_take_no_place_of_clients(path: str) -> None:
    with serving(path, max_connections=1, max_newcomers=3), contextlib.ExitStack() as newcomers:
        for _ in range(2):
            newcomers.enter_context(RawClient.connect(path)).greet()
        with transmitting(path) as client:
            assert client.do(READ, 0, 1).error == 0


def test_the_newcomer_who_stood_at_the_door_for_longest_makes_room(path: str) -> None:
    with serving(path, max_newcomers=2) as server, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(RawClient.connect(path)) for _ in range(3))
        assert first.hears_the_end()
        for client in (second, third):
            client.go("disk")
        assert server.counters[2] == 1
        with transmitting(path) as fourth:
            assert fourth.do(READ, 0, 1).error == 0


def test_newcomers_at_one_door_make_no_room_for_those_at_another(path: str) -> None:
    other_path = path + "-other"
    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))}, max_newcomers=1)
    for place in (path, other_path):
        server.listen_unix(place)
    server.start()
    with RawClient.connect(other_path) as newcomer, handed_over(server) as backup:
        newcomer.greet()
        backup.greet()
        with RawClient.connect(path) as first, transmitting(path) as guest:
            assert first.hears_the_end()
            assert guest.do(READ, 0, 1).error == 0
        for client in (newcomer, backup):
            assert client.ask(GO, string("disk") + b"\0\0")[-1] == (1, b"")
    assert server.stop()


def test_clients_take_no_place_of_newcomers(path: str) -> None:
    with serving(path, max_newcomers=1), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(transmitting(path)) for _ in range(3)]
        assert [client.do(READ, 0, 1).error for client in clients] == [0, 0, 0]


def test_newcomers_who_were_let_go_and_hang_in_the_server_are_bounded_too(path: str) -> None:
    gate = Gate()
    entered = threading.Semaphore(0)

    def contexts_of(name: str, disk: ServedDisk) -> Mapping[str, StatusSource]:
        entered.release()
        assert gate.open.wait(PATIENCE_SECONDS)
        return {}

    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))}, max_newcomers=1, contexts_of=contexts_of)
    server.listen_unix(path)
    server.start()
    with contextlib.ExitStack() as clients:
        hanging = []
        for _ in range(2):
            hanging.append(clients.enter_context(RawClient.connect(path)))
            hanging[-1].greet()
            assert hanging[-1].ask(STRUCTURED_REPLY) == [(1, b"")]
            hanging[-1].send(option(LIST_META_CONTEXT, string("disk") + bytes(4)))
            assert entered.acquire(timeout=PATIENCE_SECONDS)
        with RawClient.connect(path) as third:
            assert third.is_closed_by_server()
        gate.open.set()
        assert hanging[0].is_closed_by_server()
        assert hanging[1].receive(20)
        hanging[1].send(option(GO, string("disk") + b"\0\0"))
        assert hanging[1].receive(20)
        assert server.traffic("disk")[0] == 1
    assert server.stop()


def test_contexts_are_looked_up_of_the_disk_alone_of_which_they_are_asked(path: str) -> None:
    asked: list[str] = []

    def contexts_of(name: str, disk: ServedDisk) -> Mapping[str, StatusSource]:
        asked.append(name)
        return base_contexts(name, disk)

    disks = {name: PlainDisk(MemoryDevice(SIZE)) for name in ("a", "b", "c")}
    server = Server(disks, contexts_of=contexts_of)
    server.listen_unix(path)
    server.start()
    try:
        with RawClient.connect(path) as client:
            client.go("a")
        assert asked == []
        with RawClient.connect(path) as client:
            assert list(client.go("b", contexts=["base:allocation"])) == ["base:allocation"]
        assert asked == ["b"]
    finally:
        assert server.stop()


def test_a_host_that_vanished_keeps_no_place_of_a_tcp_server() -> None:
    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))})
    listener = server.listen_tcp("127.0.0.1", 0)
    server.start()
    with socket.create_connection(listener.sock.getsockname()) as sock:
        RawClient(sock).go("disk")
        [visit] = server._places.visits()
        told = {name: visit._sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in KEEPALIVE}
        assert visit._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert told == KEEPALIVE
    assert server.stop()


def test_a_socket_that_lacks_an_option_is_served_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of MPTCP does. Its server ended with the first client."""
    unknown = (socket.IPPROTO_TCP, 9999, 1)
    monkeypatch.setattr(keepalive, "_OPTIONS", (unknown, *keepalive._OPTIONS))
    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))})
    listener = server.listen_tcp("127.0.0.1", 0)
    server.start()
    for _ in range(2):
        with socket.create_connection(listener.sock.getsockname()) as sock:
            client = RawClient(sock)
            client.go("disk")
            assert client.do(READ, 0, 1).error == 0
    assert server.stop()


def test_counters_outlive_the_connections_they_count(path: str) -> None:
    with serving(path) as server:
        for _ in range(2):
            with transmitting(path) as client:
                client.do(WRITE, 0, 100, data=bytes(100))
                client.send(request(DISC))
                assert client.is_closed_by_server()
    assert server.counters == (2, 0, 0, 2, 2 * (28 + 100 + 28), 2 * 16)


def test_traffic_is_told_for_each_disk(path: str) -> None:
    disks: dict[str, ServedDisk] = {name: PlainDisk(MemoryDevice(SIZE)) for name in ("a", "b")}
    with serving(path, disks) as server, RawClient.connect(path) as client:
        client.go("a")
        client.do(READ, 0, 1)
        connected, traffic = server.traffic("a")
        assert (connected, traffic.connections, traffic.requests) == (1, 1, 1)
        assert server.traffic("b")[1].connections == 0
        with RawClient.connect(path) as second:
            second.go("b")
            second.do(WRITE, 0, 1, data=b"x")
            second.send(request(DISC))
            assert second.is_closed_by_server()
        connected, traffic = server.traffic("b")
        assert (connected, traffic.connections, traffic.requests) == (0, 1, 1)
        assert server.counters.requests == 2
        assert server.traffic_of_all() == {name: server.traffic(name) for name in disks}


def test_who_heard_that_it_may_come_in_is_counted(path: str) -> None:
    gate = Gate()
    disks: dict[str, ServedDisk] = {"disk": SlowlyBegunDisk(gate)}
    with serving(path, disks) as server, transmitting(path) as client:
        assert gate.entered.wait(PATIENCE_SECONDS)
        connected, traffic = server.traffic("disk")
        gate.open.set()
        assert client.do(READ, 0, 1).error == 0
        assert (connected, traffic.connections, traffic.requests) == (1, 1, 0)
        assert server.traffic("disk")[1].connections == 1


def test_log_tells_who_came_and_what_they_did(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), serving(path), transmitting(path) as client:
        client.do(WRITE, 0, 100, data=bytes(100))
        client.send(request(DISC))
        assert client.is_closed_by_server()
    came, left = [record for record in caplog.records if record.name == "lmdbitmap.nbd.server.visit"]
    who = f"process {os.getpid()} of user {os.getuid()}"
    assert came.getMessage() == f"disk disk: {who} is connected"
    assert left.getMessage() == f"disk disk: {who} is gone: 1 writes; 156 bytes in, 16 out"
    assert (left.__dict__["disk"], left.__dict__["client"]) == ("disk", who)


class FullSocket(socket.socket):
    """Accepts as often as there is room."""

    room = 0

    def accept(self) -> tuple[socket.socket, object]:
        if not self.room:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.room -= 1
        return socket.socket(), None


def test_want_of_descriptors_is_told_once_until_it_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lmdbitmap.nbd.listeners._ACCEPT_PAUSE_S", 0)
    with FullSocket() as listening, FullSocket() as other:
        for _ in range(2):
            for _ in range(20):
                assert accepted(listening, "client") is None
            assert accepted(other, "caller") is None
            listening.room = 1
            client = accepted(listening, "client")
            assert client is not None
            client.close()
    told = [record.message.partition(",")[0] for record in caplog.records]
    assert told == ["cannot take a client in", "cannot take a caller in", "cannot take a client in"]


def test_a_client_that_says_nothing_is_dropped_when_its_time_is_up(path: str) -> None:
    with serving(path, handshake_timeout_s=0.5), RawClient.connect(path) as client:
        client.receive(18)
        assert client.is_closed_by_server()


def test_a_client_in_transmission_may_be_silent_for_ever(path: str) -> None:
    for timeout_s in (
        0.5,
        2,
        8,
    ):  # a machine that stands still for as long may keep a client from getting there
        with (
            contextlib.suppress(OSError, EOFError),
            serving(path, handshake_timeout_s=timeout_s),
            RawClient.connect(path) as client,
        ):
            client.go("disk")
            with RawClient.connect(path) as impatient:
                impatient.receive(18)
                assert impatient.is_closed_by_server()  # so the time was up for the other too
            assert client.do(READ, 0, 1).error == 0
            return
    pytest.fail("no client was served for longer than its handshake may take")


def test_a_client_that_never_reads_holds_up_nobody_and_is_cut_off_at_the_end(path: str) -> None:
    with serving(path, grace_s=2) as server, RawClient.connect(path) as deaf:
        deaf.go("disk")
        deaf.send(request(READ, 0, 32 << 20) * 4)
        with transmitting(path) as other:
            assert other.do(WRITE, 0, 4, data=b"work").error == 0
        assert server.stop()


def test_a_mistake_in_a_disk_costs_its_own_client_only(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving(path, {"broken": BrokenDisk(), "disk": PlainDisk(MemoryDevice(SIZE))}):
        with transmitting(path, "broken") as unlucky:
            assert unlucky.is_closed_by_server()
        with transmitting(path) as other:
            assert other.do(READ, 0, 1).error == 0
    assert "a mistake of the server" in caplog.text


# --- stopping ---


def test_a_request_in_progress_is_finished_and_answered_before_the_end(path: str) -> None:
    gate = Gate()
    disk = GatedDisk(gate)
    server = Server({"disk": disk})
    server.listen_unix(path)
    server.start()
    with transmitting(path) as client:
        client.send(write(0, b"kept", cookie=3))
        assert gate.entered.wait(PATIENCE_SECONDS)
        server.request_stop()
        gate.open.set()
        assert client.reply()[:2] == (3, 0)
        assert client.is_closed_by_server()
    assert server.stop()
    assert not Path(path).exists()


def test_a_disk_that_hangs_is_told_of_by_stop(path: str) -> None:
    gate = Gate()
    server = Server({"disk": GatedDisk(gate)}, grace_s=0.05)
    server.listen_unix(path)
    server.start()
    with transmitting(path) as client:
        client.send(write(0, b"stuck"))
        assert gate.entered.wait(PATIENCE_SECONDS)
        assert server.stop() is False
        gate.open.set()
    assert server.stop()


def test_what_was_not_taken_in_before_the_end_is_not_done() -> None:
    gate = Gate()
    disk = GatedDisk(gate)
    ours, theirs = socket.socketpair()
    forgotten = threading.Event()
    visit = Visit(
        ours,
        lambda: {"disk": Offer(disk, {})},
        handshake_timeout_s=PATIENCE_SECONDS,
        enter=lambda visit, name: True,
        ended=lambda _: forgotten.set(),
        rounds=Rounds(),
    )
    visit.start()
    with RawClient(theirs) as client:
        client.go("disk")
        client.send(write(0, b"taken in", cookie=1))
        assert gate.entered.wait(PATIENCE_SECONDS)
        client.send(write(100, b"too late", cookie=2))
        visit.ask_to_leave()
        gate.open.set()
        assert client.reply()[:2] == (1, 0)
        assert client.is_closed_by_server()
    assert forgotten.is_set()
    assert visit.join(PATIENCE_SECONDS)
    assert disk.content(0, 8) == b"taken in"
    assert disk.content(100, 8) == bytes(8)


def test_a_client_in_the_middle_of_the_handshake_is_let_go_at_once(path: str) -> None:
    too_long = 100 * PATIENCE_SECONDS
    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))}, grace_s=too_long, handshake_timeout_s=too_long)
    server.listen_unix(path)
    server.start()
    with RawClient.connect(path) as client:
        client.greet()
        assert server.stop()
        assert client.is_closed_by_server()


def test_stopping_twice_or_before_the_start_is_no_mistake(path: str) -> None:
    server = Server({})
    server.listen_unix(path)
    assert server.stop()
    assert not Path(path).exists()
    server.serve_forever()
    assert server.stop()


@pytest.mark.parametrize("comes_to", ["the thread that serves", "another thread"])
def test_a_signal_handler_may_stop_the_server_of_its_own_thread(path: str, comes_to: str) -> None:
    """Python runs it in the main thread either way."""
    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))})
    server.listen_unix(path)
    answers = []

    def connect_and_signal() -> None:
        with transmitting(path) as client:
            serving = comes_to == "the thread that serves"
            thread = threading.main_thread() if serving else threading.current_thread()
            signal.pthread_kill(thread.ident or 0, signal.SIGUSR1)
            answers.append(client.is_closed_by_server())

    before = signal.signal(signal.SIGUSR1, lambda number, frame: answers.append(server.stop()))
    try:
        thread = threading.Thread(target=connect_and_signal)
        thread.start()
        server.serve_forever()
        thread.join(PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert answers == [False, True]
    assert server.stop()


def test_an_end_that_was_interrupted_is_left_to_stop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a second Ctrl-C."""
    gate, ask_to_leave = Gate(), Visit.ask_to_leave
    server = Server({"disk": GatedDisk(gate)})
    server.listen_unix(path)
    answers = []

    def connect_and_stop() -> None:
        with transmitting(path) as client:
            client.send(write(0, b"kept", cookie=3))
            assert gate.entered.wait(PATIENCE_SECONDS)
            server.request_stop()
            answers.append(client.reply()[:2])

    def ask_and_interrupt(visit: Visit) -> None:
        ask_to_leave(visit)
        raise KeyboardInterrupt

    thread = threading.Thread(target=connect_and_stop)
    thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(Visit, "ask_to_leave", ask_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()
    gate.open.set()
    assert server.stop()
    thread.join(PATIENCE_SECONDS)
    assert answers == [(3, 0)]


def test_who_comes_while_the_server_ends_is_told_of_as_that(caplog: pytest.LogCaptureFixture) -> None:
    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))})
    assert server.stop()
    ours, theirs = socket.socketpair()
    with theirs:
        assert not server.take_in(ours)
    assert [record.message.partition(" was ")[2] for record in caplog.records] == [
        "turned away: the server ends"
    ]


def test_server_that_finds_no_thread_has_ended(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more_threads(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))}, grace_s=0)
    server.listen_unix(path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more_threads)
        with pytest.raises(StorageError, match="can't start new thread; have fewer threads"):
            server.start()
    assert server.stop()


def test_client_for_whom_there_is_no_memory_costs_the_others_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with serving(path), transmitting(path) as guest:
        with monkeypatch.context() as patch:
            patch.setattr("lmdbitmap.nbd.server.server.Visit", no_memory)
            with RawClient.connect(path) as unlucky:
                assert unlucky.is_closed_by_server()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_memory)
            with RawClient.connect(path) as unlucky:
                assert unlucky.is_closed_by_server()
        with transmitting(path) as later:
            assert guest.do(WRITE, 0, 5, data=b"guest").error == later.do(READ, 0, 5).error == 0


def test_a_lack_of_memory_to_listen_does_not_end_the_server(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(path), transmitting(path) as guest:
        lacks = lack_memory_to_listen(monkeypatch)
        for _ in range(2):  # it listened for the first one before
            with transmitting(path) as other:
                assert other.do(READ, 0, 5).error == 0
        assert guest.do(READ, 0, 5).error == 0
    assert lacks == [0]


def test_nothing_of_a_client_that_was_lost_waits_to_be_collected(path: str) -> None:
    """The collector comes seldom to what has lived long: with each lost client went its last READ, of up to 32 MiB."""
    gc.disable()
    try:
        with serving(path, {"disk": PlainDisk(MemoryDevice(32 << 20))}) as server:
            with transmitting(path) as client:
                assert client.do(READ, 0, 1).error == 0
                [visit] = server._places.visits()
                connection = weakref.ref(visit._connection)
                client.send(request(READ, 0, 32 << 20))
                client.receive(1)
            assert visit.join(PATIENCE_SECONDS)
            visit._thread.join(PATIENCE_SECONDS)
            del visit
            assert connection() is None
    finally:
        gc.enable()


def test_client_of_whose_end_nobody_can_tell_for_want_of_memory_has_ended(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lmdbitmap.nbd.server.visit._traffic_words", no_memory)
    with serving(path, max_connections=1) as server:
        for _ in range(2):
            with transmitting(path) as client:
                client.send(request(DISC))
                assert client.is_closed_by_server()
        assert server.stop()


def test_client_for_whom_there_is_no_memory_keeps_no_place(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if there is none to tell of it: nobody else would ever end its visit, and `stop` waited for that."""

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))}, grace_s=0.1)
    server.listen_unix(path)
    server.start()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_memory)
        patch.setattr("lmdbitmap.nbd.server.visit.Complaints.turned_away", no_memory)
        with RawClient.connect(path) as unlucky:
            assert unlucky.is_closed_by_server()
    with transmitting(path):
        assert server.counters.connected == 1
    assert server.stop()


def test_a_tcp_server_answers_where_its_uri_says() -> None:
    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))})
    listener = server.listen_tcp("127.0.0.1", 0)
    server.start()
    with socket.create_connection(listener.sock.getsockname()) as sock:
        client = RawClient(sock)
        client.go("disk")
        assert client.do(WRITE, 1, 3, data=b"tcp").error == 0
        assert client.do(READ, 0, 5).data == b"\0tcp\0"
    assert server.stop()
