"""TLS as libnbd and QEMU speak it, and what happens to those who do not."""

from __future__ import annotations

import random
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from lmdbitmap.errors import InvalidArgument, LmdbitmapError, NotFound, StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.interfaces import ServedDisk
from lmdbitmap.nbd.server.contexts import StatusSource
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.tls import client_context, server_context
from tests.cli.conftest import Cli, cli
from tests.helpers.certificates import Certificates, shared_papers
from tests.helpers.nbd_raw import DISC, GO, READ, WRITE, RawClient, request, string
from tests.helpers.support import PATIENCE_SECONDS, requires, run, spawn

__all__ = ["cli"]

SIZE = 16 << 20
STARTTLS, LIST = 5, 3
ACK, TLS_REQUIRED = 1, 2**31 + 5

pytestmark = [requires("openssl"), requires("nbdinfo"), requires("qemu-img"), requires("qemu-io")]


class House(NamedTuple):
    server: Server
    image: Path
    port: int
    papers: Certificates
    strangers: Certificates

    def uri(self, papers: Certificates) -> str:
        return f"nbds://localhost:{self.port}/disk?tls-certificates={papers.folder}"

    def qemu(self, papers: Certificates) -> list[str]:
        """What tells a QEMU program to come over TLS, before its other words."""
        return [
            "--object", f"tls-creds-x509,id=papers,endpoint=client,dir={papers.folder}", "--image-opts",
            f"driver=nbd,host=localhost,port={self.port},export=disk,tls-creds=papers",
        ]  # fmt: skip

    def plain_client(self) -> RawClient:
        sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)
        return RawClient(sock)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with opened_house(tmp_path_factory.mktemp("tls"), handshake_timeout_s=PATIENCE_SECONDS) as house:
        yield house


@contextmanager
def opened_house(folder: Path, *, handshake_timeout_s: float) -> Iterator[House]:
    papers, strangers = shared_papers(), Certificates(folder / "strangers")
    image = folder / "disk.raw"
    image.write_bytes(random.Random(1).randbytes(SIZE))
    with FileDevice.open(image) as device:
        server = Server({"disk": PlainDisk(device)}, handshake_timeout_s=handshake_timeout_s)
        listener = server.listen_tcp("127.0.0.1", 0, server_context(str(papers.folder)))
        server.start()
        yield House(server, image, listener.sock.getsockname()[1], papers, strangers)
        assert server.stop()


@pytest.fixture(autouse=True)
def still_there(house: House) -> Iterator[None]:
    """Whatever a test did to the server, the next honest client is served."""
    yield
    assert run("nbdinfo", "--size", house.uri(house.papers)).stdout.strip() == str(SIZE)


def test_libnbd_and_qemu_are_served_over_tls(house: House) -> None:
    assert house.server.uris == [f"nbds://127.0.0.1:{house.port}/disk"]
    assert "protocol: newstyle-fixed with TLS" in run("nbdinfo", house.uri(house.papers)).stdout
    copied = house.image.with_name("copied.raw")
    run("nbdcopy", house.uri(house.papers), copied)
    assert copied.read_bytes() == house.image.read_bytes()
    patterns = [
        "write -P 7 12345 3333",
        "write -P 9 4M 5M",
        "flush",
        "read -P 9 4M 5M",
        "read -P 7 12345 3333",
    ]
    run("qemu-io", *house.qemu(house.papers), *(word for said in patterns for word in ("-c", said)))
    content = house.image.read_bytes()
    assert content[12345 : 12345 + 3333] == b"\7" * 3333
    assert content[4 << 20 : 9 << 20] == b"\11" * (5 << 20)


def test_many_requests_in_flight_come_back_right(house: House) -> None:
    """More than a TLS record holds, in pieces that end anywhere."""
    chosen, content = random.Random(3), bytearray(house.image.read_bytes())
    with house.plain_client() as plain:
        plain.greet()
        assert plain.ask(STARTTLS) == [(ACK, b"")]
        with RawClient(
            house.papers.client_context().wrap_socket(plain.sock, server_hostname="localhost")
        ) as client:
            client.structured = False
            assert client.ask(GO, string("disk") + b"\0\0")[-1] == (ACK, b"")
            for _ in range(40):
                length = chosen.choice([1, 4096, 40_000, 300_000])
                offset = chosen.randrange(SIZE - length)
                data = chosen.randbytes(length)
                assert client.do(WRITE, offset, length, data=data).error == 0
                content[offset : offset + length] = data
                length = chosen.choice([1, 4096, 40_000, 300_000])
                offset = chosen.randrange(SIZE - length)
                assert client.do(READ, offset, length).data == content[offset : offset + length]


def test_plain_client_is_told_to_begin_tls_and_learns_nothing_else(house: House) -> None:
    refused = run("qemu-img", "info", f"nbd://127.0.0.1:{house.port}/disk", check=False)
    assert refused.returncode == 1
    assert "this server demands TLS" in refused.stderr
    with house.plain_client() as client:
        client.greet()
        [(kind, said)] = client.ask(LIST)
        assert (kind, b"disk" in said) == (TLS_REQUIRED, False)


def test_nothing_is_asked_of_the_disks_before_a_certificate_is_verified(house: House) -> None:
    asked: list[str] = []

    def contexts_of(name: str, disk: ServedDisk) -> dict[str, StatusSource]:
        asked.append(name)
        return {}

    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))}, contexts_of=contexts_of)
    listener = server.listen_tcp("127.0.0.1", 0, server_context(str(house.papers.folder)))
    server.start()
    elsewhere = house._replace(server=server, port=listener.sock.getsockname()[1])
    with elsewhere.plain_client() as client:
        client.greet()
        assert client.ask(LIST)[0][0] == TLS_REQUIRED
        assert client.ask(STARTTLS) == [(ACK, b"")]
        assert no_service(stranger_who_believes(house), client)
    assert asked == []
    assert run("nbdinfo", elsewhere.uri(house.papers), check=False).stdout
    assert set(asked) == {"disk"}
    assert server.stop()


def test_plain_client_is_one_sentence_in_the_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with house.plain_client() as client:
        client.greet()
        for _ in range(3):
            assert client.ask(LIST)[0][0] == TLS_REQUIRED
        who = "{}:{}".format(*client.sock.getsockname())
    [record] = caplog.records
    assert record.getMessage() == (
        f"{who}: NBD option 3: expected NBD_OPT_STARTTLS before it, found none; "
        "connect with a client that speaks NBD newstyle"
    )
    assert record.__dict__["client"] == who


def test_certificate_of_another_authority_is_refused(house: House) -> None:
    stranger = run("nbdinfo", "--size", house.uri(house.strangers), check=False)
    assert (stranger.returncode != 0, stranger.stdout) == (True, "")
    with house.plain_client() as client:
        client.greet()
        assert client.ask(STARTTLS) == [(ACK, b"")]
        assert no_service(stranger_who_believes(house), client)


def test_client_without_a_certificate_is_refused(house: House) -> None:
    with house.plain_client() as client:
        client.greet()
        assert client.ask(STARTTLS) == [(ACK, b"")]
        assert no_service(ssl.create_default_context(cafile=house.papers.folder / "ca-cert.pem"), client)


def stranger_who_believes(house: House) -> ssl.SSLContext:
    """Shows a certificate of another authority, and verifies the server's by ours."""
    context = house.strangers.client_context()
    context.load_verify_locations(house.papers.folder / "ca-cert.pem")
    return context


def no_service(context: ssl.SSLContext, client: RawClient) -> bool:
    """Whether the server ends it; with TLS 1.3 a client hears that only after its own half of the handshake."""
    try:
        with context.wrap_socket(client.sock, server_hostname="localhost") as sock:
            sock.sendall(b"IHAVEOPT\0\0\0\3\0\0\0\0")
            return sock.recv(1) == b""
    except (ssl.SSLError, ConnectionError):
        return True


def test_plain_words_behind_starttls_cost_the_connection(house: House) -> None:
    with house.plain_client() as client:
        client.greet()
        client.send(b"IHAVEOPT\0\0\0\5\0\0\0\0" + b"IHAVEOPT\0\0\0\3\0\0\0\0")
        assert client.hears_the_end()


def test_noise_instead_of_a_tls_handshake_costs_the_connection(tmp_path: Path) -> None:
    """Silence too, once its time is up, which passes for all of them at once."""
    noises = [b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.0\r\n\r\n", bytes(500)]
    with ExitStack() as stack:
        house = stack.enter_context(opened_house(tmp_path, handshake_timeout_s=4))
        clients = [stack.enter_context(house.plain_client()) for _ in noises]
        for client, noise in zip(clients, noises, strict=True):
            client.greet()
            assert client.ask(STARTTLS) == [(ACK, b"")]
            client.send(noise)
        for client in clients:
            assert client.hears_the_end()


@pytest.mark.parametrize("last_words", [request(DISC), bytes(28)], ids=["a goodbye", "a lie"])
def test_tls_is_ended_before_the_connection(house: House, last_words: bytes) -> None:
    """As the protocol demands: else the client cannot tell the end from somebody who cut something off."""
    with inside(house.plain_client(), house.papers) as client:
        client.send(last_words)
        assert client.sock.recv(1) == b""


def test_tls_is_ended_when_the_server_stops(papers: Path) -> None:
    """Without an alert, as if the client had done something wrong."""
    server = Server({"disk": PlainDisk(MemoryDevice(SIZE))})
    port = server.listen_tcp("127.0.0.1", 0, server_context(str(papers))).sock.getsockname()[1]
    server.start()
    with inside(RawClient(socket.create_connection(("127.0.0.1", port))), shared_papers()) as client:
        assert server.stop()
        assert client.sock.recv(1) == b""


def inside(client: RawClient, papers: Certificates) -> RawClient:
    """In the transmission phase, over TLS, and not content with an end that TLS does not speak of."""
    client.greet()
    assert client.ask(STARTTLS) == [(ACK, b"")]
    context = papers.client_context()
    encrypted = context.wrap_socket(client.sock, server_hostname="localhost", suppress_ragged_eofs=False)
    client = RawClient(encrypted, structured=False)
    assert client.ask(GO, string("disk") + b"\0\0")[-1] == (ACK, b"")
    assert client.do(READ, 0, 1).error == 0
    return client


# --- the certificates themselves ---


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    return shutil.copytree(shared_papers().folder, tmp_path / "papers")


@pytest.mark.parametrize("missing", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_missing_file_is_named(papers: Path, missing: str) -> None:
    (papers / missing).unlink()
    with pytest.raises(NotFound, match=missing):
        server_context(str(papers))


def test_what_is_no_certificate_is_said(papers: Path) -> None:
    (papers / "server-key.pem").write_text((papers / "client-key.pem").read_text())
    with pytest.raises(InvalidArgument, match="cannot be used"):
        server_context(str(papers))
    (papers / "server-cert.pem").write_bytes(b"\0")
    with pytest.raises(InvalidArgument, match="cannot be used"):
        server_context(str(papers))


def linked_to_nothing(path: Path) -> None:
    path.symlink_to("revoked.pem")


@pytest.mark.parametrize(
    ("make", "expected"),
    [(linked_to_nothing, NotFound), (Path.mkdir, StorageError), (Path.touch, InvalidArgument)],
    ids=["a link to nothing", "a folder", "empty"],
)
@pytest.mark.parametrize("context", [server_context, client_context])
def test_list_of_revoked_certificates_that_cannot_be_read_is_named_and_not_passed_over(
    papers: Path,
    make: Callable[[Path], None],
    expected: type[LmdbitmapError],
    context: Callable[[str], ssl.SSLContext],
) -> None:
    make(papers / "ca-crl.pem")
    with pytest.raises(expected, match=r"ca-crl\.pem"):
        context(str(papers))


def test_encrypted_key_is_not_asked_about_at_the_terminal(papers: Path) -> None:
    key = papers / "server-key.pem"
    run("openssl", "ec", "-aes128", "-passout", "pass:word", "-in", key, "-out", key)
    with pytest.raises(InvalidArgument, match="encrypted"):
        server_context(str(papers))


def test_serve_speaks_tls(cli: Cli, house: House) -> None:
    cli.add("sda")
    command = cli.command("serve", "sda", "--listen", "127.0.0.1:0", "--tls", house.papers.folder)
    with spawn(*command) as child:
        uri = child.wait_for_line(r"^nbds://127\.0\.0\.1:\d+/sda$").group()
        told = run("nbdinfo", "--size", f"{uri}?tls-certificates={house.papers.folder}").stdout
        assert int(told) == (cli.folder / "sda.raw").stat().st_size
    assert child.process.returncode == 0
