"""The verb `serve`: disks over NBD, tracked, until a signal asks for the end.

Whatever ends it short of SIGKILL ends it in this order, and that order is why a clean end is clean: no more
clients, the requests that were taken in are answered, the disks are detached. A signal is only ever a wish:
the second one, or the tenth, finds it wished already and interrupts nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import FrameType

import click

from lmdbitmap import bitmap_file as flat_bitmap_file
from lmdbitmap.cli.options import Session, utf8_path, verb
from lmdbitmap.cli.output import say
from lmdbitmap.cli.ownership import find_disk, require_unowned
from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.control import ControlServer
from lmdbitmap.nbd.dirty_contexts import tracked_contexts
from lmdbitmap.nbd.server import Server
from lmdbitmap.nbd.supervisor import Supervisor
from lmdbitmap.nbd.tls import server_context
from lmdbitmap.period import DEFAULT_MAX_ARMED
from lmdbitmap.store import Store

log = logging.getLogger(__name__)

_FIRST_PASSED_FD = 3
_MOST_SOCKETS = 64
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@verb(
    examples=[
        "lmdbitmap serve sda --socket /run/sda.sock",
        "lmdbitmap serve sda sdb --listen 127.0.0.1:10809",
        "lmdbitmap serve sda --socket /run/sda.sock --bitmap-file sda.dbm",
    ]
)
@click.argument("names", metavar="NAME…", nargs=-1, required=True)
@click.option(
    "--socket", metavar="PATH", type=utf8_path, help="Serve at this unix socket, for its owner only."
)
@click.option("--listen", metavar="HOST:PORT", help="Serve at this TCP address; port 0 is any that is free.")
@click.option(
    "--tls",
    metavar="FOLDER",
    type=utf8_path,
    help="Of those who come over TCP, serve only clients with a certificate: ca-cert.pem, server-cert.pem and"
    " server-key.pem are in that folder, as QEMU has them.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Listen without TLS where other hosts can reach it: whoever connects may read and write the disks.",
)
@click.option(
    "--bitmap-file", metavar="FILE.dbm", type=utf8_path,
    help="Also keep the disk's bitmap in this flat file: taken in and called unclean now, written out at a clean"
    " end. Without it the store is all that is needed.",
)  # fmt: skip
@click.option("--max-armed", type=click.IntRange(1, 1 << 20), default=DEFAULT_MAX_ARMED, hidden=True)
@click.pass_obj
def serve(
    asked: Session,
    names: Sequence[str],
    socket: str | None,
    listen: str | None,
    tls: str | None,
    insecure: bool,
    bitmap_file: str | None,
    max_armed: int,
) -> None:
    """Serve disks over NBD, and track the writes.

    Each disk is exported under its name; a single one also as the default export. Prints `ready` and the
    URIs once clients can connect. SIGTERM or Ctrl-C ends it cleanly. Under systemd it takes the sockets of its
    socket unit, and says when it is ready.
    """
    _require_sense(names, bitmap_file)
    supervisor, passed = Supervisor(os.environ.pop("NOTIFY_SOCKET", "")), _passed_sockets(os.environ)
    address = None if listen is None else _address(listen, insecure or tls is not None)
    if socket is None and address is None and not passed:
        raise click.UsageError("say where to serve: --socket PATH or --listen HOST:PORT")
    if tls is not None and address is None and not passed:
        raise click.UsageError("--tls is for --listen: a unix socket is the owner's alone")
    certificates = None if tls is None else server_context(tls)
    with _Ending() as ending, Store.open(asked.store_path) as store, contextlib.ExitStack() as attached:
        disks = {name: attached.enter_context(_attach(store, name, max_armed)) for name in names}
        if bitmap_file is not None:
            _take_in(disks[names[0]], bitmap_file)
        with _served(disks, attached) as server:
            if socket is not None:
                server.listen_unix(socket)
            if address is not None:
                server.listen_tcp(*address, certificates)
            for fd in passed:
                server.listen_inherited(fd, certificates)
            ending.ends(server)
            _announce(asked, server.uris)
            supervisor.tell("READY=1")
            server.serve_forever()
            supervisor.tell("STOPPING=1")


def _passed_sockets(environment: MutableMapping[str, str]) -> range:
    """The descriptors of sockets that a service manager bound for this very process (sd_listen_fds(3))."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return range(0)
    if not (count.isascii() and count.isdigit() and int(count) <= _MOST_SOCKETS):
        raise InvalidArgument(
            f"LISTEN_FDS={count[:20]!r} is no number of sockets", next_step="mend the socket unit"
        )
    return range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count))


def _require_sense(names: Sequence[str], bitmap_file: str | None) -> None:
    if len(set(names)) < len(names):
        raise InvalidArgument(f"{' '.join(names)} names a disk twice", next_step="name each one once")
    if bitmap_file is not None and len(names) > 1:
        raise InvalidArgument("a bitmap file is of one disk", next_step="serve each disk by itself")


@contextlib.contextmanager
def _served(disks: Mapping[str, Filter], attached: contextlib.ExitStack) -> Iterator[Server]:
    """A server of the disks and of those who ask about them; afterwards nobody uses the disks any more."""
    server, control = Server(disks, contexts_of=tracked_contexts), ControlServer(disks)
    try:
        control.start()
        yield server
    finally:
        at_rest = [server.stop(), control.stop()]
        if not all(at_rest):
            attached.pop_all()  # whoever hangs in a disk may still write to it: as if we had crashed
            raise LmdbitmapError(
                "a request hangs in its disk, so the disks were not detached",
                next_step="see why the disk does not answer (dmesg); what was being written counts as dirty",
            )


class _Ending:
    """Turns signals into the wish to end, for good; if the block fails, signals are what they were before."""

    def __init__(self) -> None:
        self._wished = False
        self._server: Server | None = None

    def __enter__(self) -> _Ending:
        self._before = {number: signal.signal(number, self._wish) for number in _ENDING_SIGNALS}
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def ends(self, server: Server) -> None:
        """From now on a signal ends this server; one that came before ends it at once."""
        self._server = server
        if self._wished:
            server.request_stop()

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self._wished = True
        if self._server is not None:
            self._server.request_stop()


@contextlib.contextmanager
def _attach(store: Store, name: str, max_armed: int) -> Iterator[Filter]:
    before = find_disk(store, name)
    require_unowned(store, before)
    with Filter.attach(store, name, max_armed=max_armed) as disk:
        if disk.disk.epoch != before.epoch:
            log.warning("disk %s: the next backup is a full one: %s", name, disk.disk.epoch_reason)
        yield disk


def _take_in(disk: Filter, path: str) -> None:
    reason = flat_bitmap_file.begin(disk, path)
    if reason is not None:
        log.warning("disk %s: the next backup is a full one: %s", disk.disk.name, reason)


def _announce(asked: Session, uris: list[str]) -> None:
    if asked.as_json:
        print(json.dumps({"ready": True, "uris": uris}), flush=True)
        return
    for line in ("ready", *uris):
        say(line)
    sys.stdout.flush()


def _address(text: str, insecure: bool) -> tuple[str, int]:
    """HOST:PORT, with an IPv6 host in brackets; other hosts must not reach it unless that is wanted."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidArgument(f"{text!r} is not HOST:PORT", next_step="write it as in 127.0.0.1:10809")
    if not insecure and not _is_loopback(host):
        raise InvalidArgument(
            f"whoever reaches {host} could read and write the disks",
            next_step="give certificates with --tls, or serve at a unix socket, or say --insecure",
        )
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
