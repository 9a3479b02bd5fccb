"""Our NBD client over TLS, before the servers that people use and before one that lies (tests/nbd_far.py)."""

from __future__ import annotations

import logging
import os
import random
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from lmdbitmap.device import FileDevice
from lmdbitmap.errors import Busy, InvalidArgument, NotFound
from lmdbitmap.nbd.client import NbdDevice
from lmdbitmap.nbd.client_tls import TlsWire
from lmdbitmap.nbd.server import Server
from lmdbitmap.nbd.tls import client_context, server_context
from lmdbitmap.plain import PlainDisk
from tests.cli.conftest import Cli, cli
from tests.interop.test_nbd_client import SIZE, content, made, work_while_it_is_killed
from tests.nbd_far import FarServer, far_server
from tests.papers import Papers
from tests.support import PATIENCE_SECONDS, Argument, Child, requires, run, spawn, wait_for_socket
from tests.unit.test_nbd_client import (
    test_acknowledged_writes_survive_a_server_that_forgot_them,
    test_allocation_is_what_the_server_says,
    test_answers_in_another_order_reach_those_who_asked,
    test_caller_that_is_interrupted_leaves_the_others_alone,
    test_closed_device_says_so,
    test_disconnect_at_every_byte_of_a_reply_is_mended,
    test_disconnect_at_every_byte_of_the_handshake_is_an_error_and_no_hang,
    test_flush_that_dies_with_the_server_still_promises_what_it_should,
    test_lie_costs_the_connection_and_not_the_request,
    test_many_callers_fail_together_when_the_server_stays_away,
    test_many_writes_in_one_call_fail_one_by_one,
    test_replies_may_come_in_any_pieces,
    test_requests_keep_to_the_servers_block_sizes,
    test_server_that_stays_away_fails_requests_and_is_used_again_when_it_is_back,
    test_threads_at_work_do_not_notice_crashes,
    test_what_was_in_flight_is_done_on_the_next_connection,
)

__all__ = [
    "cli",
    "test_acknowledged_writes_survive_a_server_that_forgot_them",
    "test_allocation_is_what_the_server_says",
    "test_answers_in_another_order_reach_those_who_asked",
    "test_caller_that_is_interrupted_leaves_the_others_alone",
    "test_closed_device_says_so",
    "test_disconnect_at_every_byte_of_a_reply_is_mended",
    "test_disconnect_at_every_byte_of_the_handshake_is_an_error_and_no_hang",
    "test_flush_that_dies_with_the_server_still_promises_what_it_should",
    "test_lie_costs_the_connection_and_not_the_request",
    "test_many_callers_fail_together_when_the_server_stays_away",
    "test_many_writes_in_one_call_fail_one_by_one",
    "test_replies_may_come_in_any_pieces",
    "test_requests_keep_to_the_servers_block_sizes",
    "test_server_that_stays_away_fails_requests_and_is_used_again_when_it_is_back",
    "test_threads_at_work_do_not_notice_crashes",
    "test_what_was_in_flight_is_done_on_the_next_connection",
]

MIB = 1 << 20

pytestmark = [requires(tool) for tool in ("openssl", "qemu-img", "qemu-nbd", "nbdkit")]


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers") / "ours")


@pytest.fixture
def far(tmp_path: Path, papers: Papers) -> Iterator[FarServer]:
    """In place of the plain one of the tests that are imported above."""
    with far_server(tmp_path) as server:
        server.tls = server_context(str(papers.folder))
        server.uri = f"nbds+unix:///disk?socket={server.path}&tls-certificates={papers.folder}"
        yield server


class Far:
    """A server at a port of ours that can be killed and started again."""

    def __init__(self, stack: ExitStack, command: list[Argument], port: int) -> None:
        self._stack = stack
        self._command = command
        self._port = port
        self.start()

    def uri(self, folder: Path, more: str = "") -> str:
        return f"nbds://localhost:{self._port}/?tls-certificates={folder}{more}"

    @property
    def plain_uri(self) -> str:
        return f"nbd://localhost:{self._port}/"

    def start(self) -> Child:
        self.child = self._stack.enter_context(spawn(*self._command))
        wait_for_socket(("127.0.0.1", self._port), self.child)
        return self.child

    def kill(self) -> None:
        self.child.process.kill()
        self.child.wait()


@contextmanager
def qemu_nbd(folder: Path, image: Path, image_format: str) -> Iterator[Far]:
    port = free_port()
    creds = f"tls-creds-x509,id=papers,endpoint=server,dir={folder},verify-peer=yes"
    with ExitStack() as stack:
        yield Far(stack, [
            "qemu-nbd", "--persistent", "--shared=9", f"--format={image_format}", f"--port={port}",
            "--bind=127.0.0.1", "--object", creds, "--tls-creds=papers", image,
        ], port)  # fmt: skip


@contextmanager
def nbdkit(folder: Path, *words: Argument) -> Iterator[Far]:
    port = free_port()
    tls = ["--tls=require", f"--tls-certificates={folder}", "--tls-verify-peer"]
    with ExitStack() as stack:
        place = ["--foreground", "--ipaddr", "127.0.0.1", "--port", str(port)]
        yield Far(stack, ["nbdkit", *place, *tls, *words], port)


@contextmanager
def ours(folder: Path, image: Path) -> Iterator[str]:
    """The URI of our own server, without credentials."""
    with FileDevice.open(image) as device:
        server = Server({"disk": PlainDisk(device)})
        listener = server.listen_tcp("127.0.0.1", 0, server_context(str(folder)))
        server.start()
        try:
            yield f"nbds://localhost:{listener.sock.getsockname()[1]}/disk"
        finally:
            assert server.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def exercise(device: NbdDevice, size: int) -> bytes:
    """Reads and writes of many threads at once, of a few bytes and of many records; what the disk must hold."""
    part = size // 4
    models = [bytearray(part) for _ in range(4)]

    def work(number: int) -> int:
        chance, base, model = random.Random(number), number * part, models[number]
        for _ in range(30):
            length = chance.choice([1, 4096, 16_384, 16_385, 300_000, MIB])
            offset = chance.randrange(part - length)
            data = chance.randbytes(length)
            device.pwrite(data, base + offset)
            model[offset : offset + length] = data
            assert device.pread(part, base) == model
        return 30

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [30] * 4
    device.flush()
    return b"".join(models)


# --- servers that people use ---


def test_qcow2_behind_qemu_nbd_is_read_and_written(tmp_path: Path, papers: Papers) -> None:
    image = made(tmp_path, "qcow2")
    with qemu_nbd(papers.folder, image, "qcow2") as far:
        with NbdDevice.open(far.uri(papers.folder)) as device:
            model = exercise(device, SIZE)
            device.write_zeroes(MIB, MIB)
            device.flush()
            assert device.pread(3, MIB) == bytes(3)
        far.kill()
    assert content(tmp_path, image, "qcow2") == model[:MIB] + bytes(MIB) + model[2 * MIB :]


def test_nbdkit_is_read_and_written(papers: Papers) -> None:
    with nbdkit(papers.folder, "memory", str(SIZE)) as far, NbdDevice.open(far.uri(papers.folder)) as device:
        model = exercise(device, SIZE)
        assert device.pread(SIZE, 0) == model


def test_our_own_server_is_read_and_written(tmp_path: Path, papers: Papers) -> None:
    image = made(tmp_path, "raw")
    with (
        ours(papers.folder, image) as uri,
        NbdDevice.open(f"{uri}?tls-certificates={papers.folder}") as device,
    ):
        model = exercise(device, SIZE)
    assert image.read_bytes() == model


def test_tls_is_spoken_over_a_unix_socket_too(tmp_path: Path, papers: Papers) -> None:
    tls = ["--tls=require", f"--tls-certificates={papers.folder}", "--tls-verify-peer"]
    with spawn("nbdkit", "--foreground", "--unix", tmp_path / "nbd", *tls, "memory", "1M") as server:
        wait_for_socket(tmp_path / "nbd", server)
        uri = f"nbds+unix:///?socket={tmp_path / 'nbd'}&tls-certificates={papers.folder}"
        with NbdDevice.open(uri) as device:
            device.pwrite(b"over TLS", 5)
            assert device.pread(8, 5) == b"over TLS"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_threads_at_work_do_not_notice_that_the_server_is_killed(
    tmp_path: Path, papers: Papers, image_format: str
) -> None:
    image = made(tmp_path, image_format)
    with (
        qemu_nbd(papers.folder, image, image_format) as far,
        NbdDevice.open(far.uri(papers.folder)) as device,
    ):
        model = work_while_it_is_killed(device, far)
        device.flush()
        far.kill()
    assert content(tmp_path, image, image_format) == model


def test_certificates_that_were_renewed_are_used_from_the_next_connection_on(tmp_path: Path) -> None:
    shutil.copytree(Papers(tmp_path / "old").folder, tmp_path / "present")
    new = Papers(tmp_path / "new")
    present = tmp_path / "present"
    with nbdkit(present, "memory", "1M") as far, NbdDevice.open(far.uri(present)) as device:
        far.kill()
        shutil.copytree(new.folder, present, dirs_exist_ok=True)
        far.start()
        assert device.pread(4, 0) == bytes(4)


# --- who is not believed ---


def test_server_of_another_authority_is_not_believed(tmp_path: Path, papers: Papers) -> None:
    strangers = Papers(tmp_path / "strangers")
    with nbdkit(papers.folder, "memory", "1M") as far:
        with pytest.raises(InvalidArgument, match=r"certificate is not believed .*; with tls-certificates="):
            NbdDevice.open(far.uri(strangers.folder))
        with pytest.raises(InvalidArgument, match=r"certificate is not believed"):
            NbdDevice.open(far.plain_uri.replace("nbd:", "nbds:"))
        NbdDevice.open(far.uri(papers.folder)).close()


def test_certificate_must_be_of_the_host_or_of_the_name_that_is_given(papers: Papers) -> None:
    with nbdkit(papers.folder, "memory", "1M") as far:
        with pytest.raises(InvalidArgument, match=r"[Hh]ostname mismatch"):
            NbdDevice.open(far.uri(papers.folder, "&tls-hostname=other.example"))
        by_address = far.uri(papers.folder).replace("localhost", "127.0.0.1")
        NbdDevice.open(by_address).close()
        NbdDevice.open(by_address + "&tls-hostname=localhost").close()


def test_certificate_that_expired_is_not_believed(tmp_path: Path) -> None:
    old = Papers(tmp_path / "old", days=-1)
    image = made(tmp_path, "raw")
    with ours(old.folder, image) as uri, pytest.raises(InvalidArgument, match=r"has expired"):
        NbdDevice.open(f"{uri}?tls-certificates={old.without_client(tmp_path / 'ca')}")


@pytest.mark.parametrize("server", ["nbdkit", "qemu-nbd", "ours"])
def test_client_without_a_certificate_is_told_that_it_may_need_one(
    tmp_path: Path, papers: Papers, server: str
) -> None:
    authority, image = papers.without_client(tmp_path / "ca"), made(tmp_path, "raw")
    with ExitStack() as stack:
        if server == "ours":
            uri = stack.enter_context(ours(papers.folder, image)) + f"?tls-certificates={authority}"
        elif server == "nbdkit":
            uri = stack.enter_context(nbdkit(papers.folder, "memory", "1M")).uri(authority)
        else:
            uri = stack.enter_context(qemu_nbd(papers.folder, image, "raw")).uri(authority)
        with pytest.raises(InvalidArgument, match=r"broke TLS off .*client-cert.pem"):
            NbdDevice.open(uri)


def test_client_certificate_of_another_authority_is_not_taken(tmp_path: Path, papers: Papers) -> None:
    strangers = Papers(tmp_path / "strangers")
    shutil.copy(papers.folder / "ca-cert.pem", strangers.folder)
    with (
        ours(papers.folder, made(tmp_path, "raw")) as uri,
        pytest.raises(InvalidArgument, match=r"broke TLS off"),
    ):
        NbdDevice.open(f"{uri}?tls-certificates={strangers.folder}")


def test_whoever_answers_is_believed_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = Papers(tmp_path / "old", days=-1)
    (old.folder / "ca-crl.pem").write_text("what is not needed is not read")
    (tmp_path / "empty").mkdir()
    with far_server(tmp_path) as far:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(old.folder / "server-cert.pem", old.folder / "server-key.pem")
        far.tls = context
        uri = f"nbds+unix:///disk?socket={far.path}&tls-certificates={tmp_path / 'empty'}"
        with pytest.raises(NotFound, match=r"ca-cert.pem does not exist"):
            NbdDevice.open(uri)
        with caplog.at_level(logging.WARNING), NbdDevice.open(uri + "&tls-verify-peer=false") as device:
            assert device.pread(4, 0) == bytes(4)
    assert "tls-verify-peer=false: whoever answers there is believed" in caplog.text


@pytest.mark.parametrize("left", ["client-cert.pem", "client-key.pem"])
def test_half_of_what_shows_who_we_are_is_an_error_before_anybody_is_asked(
    tmp_path: Path, papers: Papers, left: str
) -> None:
    half = papers.without_client(tmp_path / "half")
    shutil.copy(papers.folder / left, half)
    with pytest.raises(NotFound, match=r"client-(key|cert).pem does not exist"):
        NbdDevice.open(f"nbds://localhost:1/?tls-certificates={half}")


def test_file_that_holds_no_certificate_is_named(tmp_path: Path, papers: Papers) -> None:
    broken = papers.without_client(tmp_path / "broken")
    (broken / "ca-cert.pem").write_text("certainly not")
    with pytest.raises(InvalidArgument, match=r"ca-cert.pem in .*broken cannot be used"):
        NbdDevice.open(f"nbds://localhost:1/?tls-certificates={broken}")


# --- TLS or nothing ---


def test_server_without_tls_is_told_nothing_but_that_tls_is_wanted(tmp_path: Path, papers: Papers) -> None:
    with far_server(tmp_path) as far:
        uri = f"nbds+unix:///disk?socket={far.path}&tls-certificates={papers.folder}"
        with pytest.raises(InvalidArgument, match=r"does not speak TLS"):
            NbdDevice.open(uri)
        assert far.handshakes == 0
        assert far.options[:1] == [(5, b"")]
        assert [number for number, _ in far.options[1:]] in ([], [2])
    with spawn("nbdkit", "--foreground", "--unix", tmp_path / "nbd", "memory", "1M") as server:
        wait_for_socket(tmp_path / "nbd", server)
        with pytest.raises(InvalidArgument, match=r"does not speak TLS.*write nbd: for nbds:"):
            NbdDevice.open(uri.replace(str(far.path), str(tmp_path / "nbd")))


def test_plain_uri_of_a_server_that_insists_on_tls_is_told_what_to_write(
    papers: Papers, tmp_path: Path
) -> None:
    servers = 0
    with (
        nbdkit(papers.folder, "memory", "1M") as kit,
        qemu_nbd(papers.folder, made(tmp_path, "raw"), "raw") as qemu,
        ours(papers.folder, made(tmp_path, "qcow2")) as uri,
    ):
        for plain in (kit.plain_uri, qemu.plain_uri, uri.replace("nbds:", "nbd:")):
            with pytest.raises(InvalidArgument, match=r"without TLS.*write nbds: for nbd:"):
                NbdDevice.open(plain)
            servers += 1
    assert servers == 3


def test_server_that_gives_tls_up_is_not_used_again(far: FarServer) -> None:
    with NbdDevice.open(far.uri, reconnect_s=0) as device:
        device.pwrite(b"secret", 0)
        before, far.tls = len(far.asked), None
        far.crash()
        for _ in range(3):
            with pytest.raises(OSError, match=r"went away"):
                device.pwrite(b"secret", 0)
        assert len(far.asked) == before


@pytest.mark.parametrize(
    "injected",
    [
        b"\0\x03\xe8\x89\x04\x55\x65\xa9" + b"\0\0\0\x08\0\0\0\1\0\0\0\0",
        b"x",
        b"\x17\x03\x03\0\x05hello",
        bytes(500),
    ],
)
def test_plain_bytes_behind_the_last_word_before_tls_are_never_taken_for_an_answer(
    far: FarServer, injected: bytes
) -> None:
    """Such as an acknowledgement of STRUCTURED_REPLY, which would be the next thing that is asked for."""
    far.in_plain_text = injected
    with pytest.raises(InvalidArgument, match=r"broke TLS off"):
        NbdDevice.open(far.uri)
    assert far.handshakes == 0


def test_silence_instead_of_a_tls_handshake_ends_in_time(
    tmp_path: Path, papers: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmdbitmap.nbd.client.DIAL_S", 0.2)
    over = threading.Event()

    def say_yes_and_nothing_more(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
            sock.sendall(bytes.fromhex("0003e889045565a9 00000005 00000001 00000000"))
            over.wait(PATIENCE_SECONDS)

    with closing(socket.socket(socket.AF_UNIX)) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(str(tmp_path / "nbd"))
        listener.listen()
        serving = pool.submit(say_yes_and_nothing_more, listener)
        with pytest.raises(Busy, match=r"did not answer"):
            NbdDevice.open(f"nbds+unix:///?socket={tmp_path / 'nbd'}&tls-certificates={papers.folder}")
        over.set()
        serving.result(PATIENCE_SECONDS)


def test_large_reads_and_writes_at_once_do_not_block_each_other(tmp_path: Path, papers: Papers) -> None:
    """As without TLS: a server of one thread sends nothing while it receives."""
    with far_server(tmp_path, 8 * MIB) as far:
        far.tls = server_context(str(papers.folder))
        uri = f"nbds+unix:///disk?socket={far.path}&tls-certificates={papers.folder}"
        with NbdDevice.open(uri) as device, ThreadPoolExecutor(8) as pool:
            reads = [pool.submit(device.pread, 2 * MIB, 6 * MIB) for _ in range(20)]
            writes = [pool.submit(device.pwrite, b"w" * MIB, number % 6 * MIB) for number in range(20)]
            assert all(read.result(PATIENCE_SECONDS) == bytes(2 * MIB) for read in reads)
            assert all(write.result(PATIENCE_SECONDS) is None for write in writes)
        assert far.data[: 6 * MIB] == b"w" * 6 * MIB
        assert far.handshakes == 1


# --- what is tracked there ---


def test_disk_behind_tls_is_tracked_backed_up_restored_and_copied(
    cli: Cli, tmp_path: Path, papers: Papers
) -> None:
    source, target, copy = (tmp_path / name for name in ("source.raw", "target.raw", "copy.raw"))
    for image in (source, target, copy):
        image.write_bytes(bytes(SIZE))
    shutil.copytree(papers.folder, tmp_path / "moved")
    with ExitStack() as stack:
        far = [stack.enter_context(nbdkit(papers.folder, "file", image)) for image in (source, target, copy)]
        uri, target_uri, copy_uri = (one.uri(papers.folder) for one in far)
        cli.ok("add", "sda", uri)
        assert "is tracked already" in cli.fails(1, "add", "sdb", far[0].uri(tmp_path / "moved"))
        cli.ok("backup", "sda", tmp_path / "backups")
        cli.ok("sync", "sda", copy_uri)
        with cli.serving("sda") as served:
            run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 100k", served.uris["sda"])
            [backup] = cli.json("backup", "sda", tmp_path / "backups")["backups"]
            assert (backup["type"], backup["bytes_changed"]) == ("incremental", 2 * 65536)
        synced = cli.json("sync", "sda", far[2].uri(tmp_path / "moved"), "--require-incremental")
        assert synced["bytes_changed"] == 2 * 65536
        cli.ok("restore", tmp_path / "backups", "sda", target_uri)
    assert source.read_bytes()[MIB : MIB + 102_400] == b"\7" * 102_400
    assert source.read_bytes() == target.read_bytes() == copy.read_bytes()


# --- one connection, two threads ---


@pytest.fixture
def wired(papers: Papers) -> Iterator[tuple[TlsWire, ssl.SSLSocket]]:
    """A connection of ours, and its other end."""
    here, there = socket.socketpair()
    server, client = server_context(str(papers.folder)), client_context(str(papers.folder))
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server.wrap_socket, there, server_side=True)
        wire = TlsWire(client.wrap_socket(here, server_hostname="localhost"))
        with closing(wire), accepted.result(PATIENCE_SECONDS) as end:
            yield wire, end


def test_openssl_is_never_entered_by_two_threads_at_once(wired: tuple[TlsWire, ssl.SSLSocket]) -> None:
    """While one of its calls runs, the other thread is given every chance to begin one."""
    wire, end = wired
    inside, overlaps = [0], [0]
    ready = wire._when_ready

    def watched(act: Callable[[memoryview], int]) -> Callable[[memoryview], int]:
        def call(view: memoryview) -> int:
            inside[0] += 1
            try:
                for _ in range(20):
                    os.sched_yield()
                    overlaps[0] += inside[0] > 1
                return act(view)
            finally:
                inside[0] -= 1

        return call

    def receive() -> int:
        count, buffer = 0, memoryview(bytearray(4096))
        while count < 300_000:
            count += ready(watched(wire._sock.recv_into), buffer)
        return count

    def send() -> int:
        left = memoryview(bytes(300_000))
        while left:
            left = left[ready(watched(wire._sock.send), left[:4096]) :]
        return 300_000

    def echo() -> int:
        count = 0
        while count < 300_000:
            data = end.recv(4096)
            end.sendall(data)
            count += len(data)
        return count

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work) for work in (receive, send, echo)]
        assert [one.result(PATIENCE_SECONDS) for one in working] == [300_000] * 3
    assert overlaps == [0]


def test_whoever_receives_when_the_connection_is_ended_is_given_no_bytes_of_the_encryption(
    wired: tuple[TlsWire, ssl.SSLSocket],
) -> None:
    wire, end = wired
    end.sendall(b"an answer")
    wire.shutdown(socket.SHUT_WR)
    buffer = bytearray(100)
    assert bytes(buffer[: wire.recv_into(memoryview(buffer))]) == b"an answer"
    end.close()
    assert wire.recv_into(memoryview(buffer)) == 0


def test_what_openssl_holds_already_is_not_waited_for(wired: tuple[TlsWire, ssl.SSLSocket]) -> None:
    wire, end = wired
    wire.settimeout(PATIENCE_SECONDS)
    end.sendall(b"one record")
    buffer = memoryview(bytearray(1))
    assert b"".join(bytes(buffer[: wire.recv_into(buffer)]) for _ in range(10)) == b"one record"


def test_time_is_up_for_who_receives_and_for_who_sends(wired: tuple[TlsWire, ssl.SSLSocket]) -> None:
    wire, _ = wired
    wire.settimeout(0.01)
    with pytest.raises(TimeoutError):
        wire.recv_into(memoryview(bytearray(1)))
    with pytest.raises(TimeoutError):
        wire.sendall(bytes(64 * MIB))
