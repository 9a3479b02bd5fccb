"""A server that was stopped does its writes when it goes on, though the client has long been told how they ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lmdbitmap.filter import Filter
from lmdbitmap.nbd.client import link
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.changes import changes
from tests.helpers.nbd_far import until_it_works
from tests.helpers.support import PATIENCE_SECONDS, Child, make_raw_image, requires, spawn, wait_for_socket
from tests.helpers.tracked import blocks_of

pytestmark = requires("nbdkit")

SIZE, BLOCK = 1 << 20, 4096
PLACE = 5 * BLOCK
HEADER = 28


class Between:
    """Takes connections at a socket to whichever server is behind it now, and can cut them on our side alone."""

    def __init__(self, path: Path, behind: Path) -> None:
        self.behind = behind
        self.bytes_sent = 0
        """To servers, ever."""
        self.bytes_after_cut = 0
        """From servers whose clients were cut off."""
        self._news = threading.Condition()
        self._clients: list[socket.socket] = []
        self._cut: list[socket.socket] = []
        self._all: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def await_sent(self, count: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: self.bytes_sent >= count, PATIENCE_SECONDS)

    def await_an_answer_to_nobody(self) -> None:
        with self._news:
            assert self._news.wait_for(lambda: self.bytes_after_cut > 0, PATIENCE_SECONDS)

    def cut(self) -> None:
        """Those that there are now: one that comes back at once is not meant."""
        self._cut, self._clients = self._clients, []
        for client in self._cut:
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in (self._listener, *self._all):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
        for sock in (self._listener, *self._all):
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._all += [client, server]
                server.connect(str(self.behind))
                self._clients.append(client)
                for work in (self._there, self._back):
                    thread = threading.Thread(target=work, args=(client, server))
                    self._threads.append(thread)
                    thread.start()

    def _there(self, client: socket.socket, server: socket.socket) -> None:
        """The server is not told when its client is cut off."""
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
                with self._news:
                    self.bytes_sent += len(data)
                    self._news.notify_all()

    def _back(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                try:
                    client.sendall(data)
                except OSError:
                    if client not in self._cut:
                        continue  # it left by itself
                    with self._news:
                        self.bytes_after_cut += len(data)
                        self._news.notify_all()


@contextmanager
def stopped(child: Child) -> Iterator[None]:
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)  # by then every thread of it stands still
    try:
        yield
    finally:
        os.kill(child.pid, signal.SIGCONT)


@pytest.mark.parametrize("patience_s", [0.0, PATIENCE_SECONDS])
def test_write_that_lands_after_a_checkpoint_is_in_the_period_that_is_open_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    """The write failed, or was done again on another connection and then overwritten; its first copy comes last."""
    monkeypatch.setattr(link, "_PART_S", 0.05)  # who is stopped does not get through with it meanwhile
    image = make_raw_image(tmp_path / "disk.raw", SIZE)
    old_socket, new_socket = tmp_path / "old", tmp_path / "new"

    def open_device(uri: str) -> NbdDevice:
        return NbdDevice.open(uri, reconnect_s=patience_s)

    with ExitStack() as stack:
        servers = []
        for path in (old_socket, new_socket):
            servers.append(
                stack.enter_context(spawn("nbdkit", "--foreground", "--unix", path, "file", image))
            )
            wait_for_socket(path, servers[-1])
        between = Between(tmp_path / "nbd", old_socket)
        stack.callback(between.close)
        store = stack.enter_context(Store.create(str(tmp_path / "store")))
        session.add(store, "sda", f"nbd+unix:///?socket={tmp_path / 'nbd'}", granularity_bits=12)
        attached = stack.enter_context(Filter.attach(store, "sda", background=False, open_device=open_device))
        attached.checkpoint("before")
        pool = stack.enter_context(ThreadPoolExecutor(1))
        with stopped(servers[0]):
            sent = between.bytes_sent
            writing = pool.submit(attached.pwrite, b"1" * BLOCK, PLACE)
            between.await_sent(sent + HEADER + BLOCK)
            between.behind = new_socket
            between.cut()
            assert isinstance(writing.exception(PATIENCE_SECONDS), OSError) == (patience_s == 0)
            until_it_works(lambda: attached.pwrite(b"2" * BLOCK, PLACE))
            attached.checkpoint("after")
            assert image.read_bytes()[PLACE : PLACE + BLOCK] == b"2" * BLOCK
        between.await_an_answer_to_nobody()
        assert image.read_bytes()[PLACE : PLACE + BLOCK] == b"1" * BLOCK, "it came last"
        assert blocks_of(attached.changes(since="after")) == {PLACE // BLOCK}
        attached.detach()
        assert blocks_of(changes(store, "sda", since="after")) == {PLACE // BLOCK}
