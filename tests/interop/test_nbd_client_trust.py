"""Whom our NBD client believes over TLS, whom it does not, and that it is TLS or nothing."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from lmdbitmap.cli.main import run
from lmdbitmap.errors import Busy, InvalidArgument, NotFound, StorageError
from lmdbitmap.nbd.client import dial
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.client.handshake import Step
from tests.helpers.certificates import Certificates
from tests.helpers.far_tls import far, nbdkit, ours, papers, qemu_nbd
from tests.helpers.nbd_far import FarServer, far_server
from tests.helpers.support import PATIENCE_SECONDS, requires, spawn, wait_for_socket
from tests.interop.test_nbd_client import made

__all__ = ["far", "papers"]

pytestmark = [requires(tool) for tool in ("openssl", "qemu-nbd", "nbdkit")]


# --- who is not believed ---


def test_server_of_another_authority_is_not_believed(tmp_path: Path, papers: Certificates) -> None:
    strangers = Certificates(tmp_path / "strangers")
    with nbdkit(papers.folder, "memory", "1M") as far:
        with pytest.raises(StorageError, match=r"certificate is not believed .*; with tls-certificates="):
            NbdDevice.open(far.uri(strangers.folder))
        with pytest.raises(StorageError, match=r"certificate is not believed"):
            NbdDevice.open(far.plain_uri.replace("nbd:", "nbds:"))
        NbdDevice.open(far.uri(papers.folder)).close()


def test_without_a_folder_those_are_believed_whom_the_system_trusts(
    tmp_path: Path, papers: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers.folder / "server-cert.pem", papers.folder / "server-key.pem")
    with far_server(tmp_path) as server:
        server.tls = context
        uri = f"nbds+unix:///disk?socket={server.path}"
        with pytest.raises(StorageError, match=r"certificate is not believed"):
            NbdDevice.open(uri)
        monkeypatch.setenv("SSL_CERT_FILE", str(papers.folder / "ca-cert.pem"))
        NbdDevice.open(uri).close()


def test_certificate_must_be_of_the_host_or_of_the_name_that_is_given(papers: Certificates) -> None:
    with nbdkit(papers.folder, "memory", "1M") as far:
        with pytest.raises(StorageError, match=r"[Hh]ostname mismatch"):
            NbdDevice.open(far.uri(papers.folder, "&tls-hostname=other.example"))
        by_address = far.uri(papers.folder).replace("localhost", "127.0.0.1")
        NbdDevice.open(by_address).close()
        NbdDevice.open(by_address + "&tls-hostname=localhost").close()


def test_certificate_that_expired_is_not_believed(tmp_path: Path) -> None:
    old = Certificates(tmp_path / "old", days=-1)
    image = made(tmp_path, "raw")
    with ours(old.folder, image) as uri:
        uri += f"?tls-certificates={old.without_client(tmp_path / 'ca')}"
        with pytest.raises(StorageError, match=r"has expired"):
            NbdDevice.open(uri)
        assert run(["--store", str(tmp_path / "store"), "add", "sda", uri]) == 1, (
            "as a command that was misspelt"
        )


@pytest.mark.parametrize("server", ["nbdkit", "qemu-nbd", "ours"])
def test_client_without_a_certificate_is_told_that_it_may_need_one(
    tmp_path: Path, papers: Certificates, server: str
) -> None:
    authority, image = papers.without_client(tmp_path / "ca"), made(tmp_path, "raw")
    with ExitStack() as stack:
        if server == "ours":
            uri = stack.enter_context(ours(papers.folder, image)) + f"?tls-certificates={authority}"
        elif server == "nbdkit":
            uri = stack.enter_context(nbdkit(papers.folder, "memory", "1M")).uri(authority)
        else:
            uri = stack.enter_context(qemu_nbd(papers.folder, image, "raw")).uri(authority)
        with pytest.raises(StorageError, match=r"broke TLS off .*client-cert.pem"):
            NbdDevice.open(uri)


def test_client_certificate_of_another_authority_is_not_taken(tmp_path: Path, papers: Certificates) -> None:
    strangers = Certificates(tmp_path / "strangers")
    shutil.copy(papers.folder / "ca-cert.pem", strangers.folder)
    with (
        ours(papers.folder, made(tmp_path, "raw")) as uri,
        pytest.raises(StorageError, match=r"broke TLS off"),
    ):
        NbdDevice.open(f"{uri}?tls-certificates={strangers.folder}")


def test_whoever_answers_is_believed_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = Certificates(tmp_path / "old", days=-1)
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
            far.crash()
            assert device.pread(4, 0) == bytes(4)
        assert far.handshakes == 2
    assert caplog.text.count("tls-verify-peer=false: the certificate of the server is not verified") == 1


@pytest.mark.parametrize("left", ["client-cert.pem", "client-key.pem"])
def test_half_of_what_shows_who_we_are_is_an_error_before_anybody_is_asked(
    tmp_path: Path, papers: Certificates, left: str
) -> None:
    half = papers.without_client(tmp_path / "half")
    shutil.copy(papers.folder / left, half)
    with pytest.raises(NotFound, match=r"client-(key|cert).pem does not exist"):
        NbdDevice.open(f"nbds://localhost:1/?tls-certificates={half}")


def test_file_that_holds_no_certificate_is_named(tmp_path: Path, papers: Certificates) -> None:
    broken = papers.without_client(tmp_path / "broken")
    (broken / "ca-cert.pem").write_text("certainly not")
    with pytest.raises(InvalidArgument, match=r"ca-cert.pem in .*broken cannot be used"):
        NbdDevice.open(f"nbds://localhost:1/?tls-certificates={broken}")


# --- TLS or nothing ---


def test_server_without_tls_is_told_nothing_but_that_tls_is_wanted(
    tmp_path: Path, papers: Certificates
) -> None:
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
    papers: Certificates, tmp_path: Path
) -> None:
    servers = 0
    with (
        nbdkit(papers.folder, "memory", "1M") as kit,
        qemu_nbd(papers.folder, made(tmp_path, "raw"), "raw") as qemu,
        ours(papers.folder, made(tmp_path, "qcow2")) as uri,
    ):
        for plain in (kit.plain_uri, qemu.plain_uri, uri.replace("nbds:", "nbd:")):
            with pytest.raises(InvalidArgument, match=r"demands TLS.*write nbds: in place of nbd:"):
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
    with pytest.raises(StorageError, match=r"broke TLS off"):
        NbdDevice.open(far.uri)
    assert far.handshakes == 0


def test_silence_instead_of_a_tls_handshake_ends_in_time(
    tmp_path: Path, papers: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has all the time that it needs until there, as it may be late on a busy machine."""
    over, done = threading.Event(), dial._Haggling._done

    def hurry_tls(haggling: dial._Haggling, step: Step) -> bytes:
        if not isinstance(step, (bytes, int)):
            haggling._deadline = time.monotonic() + 0.2
        return done(haggling, step)

    monkeypatch.setattr(dial._Haggling, "_done", hurry_tls)
    monkeypatch.setattr("lmdbitmap.nbd.client.device.DIAL_S", PATIENCE_SECONDS)

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
