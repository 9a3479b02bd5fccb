"""Servers that insist on TLS and on a client's certificate, in front of our client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.tls import server_context
from tests.helpers.certificates import Certificates, shared_papers
from tests.helpers.nbd_far import FarServer, far_server
from tests.helpers.support import Argument, Child, free_port, spawn, wait_for_socket


@pytest.fixture(scope="session")
def papers() -> Certificates:
    return shared_papers()


@pytest.fixture
def far(tmp_path: Path, papers: Certificates) -> Iterator[FarServer]:
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
