"""The verb `serve`: disks over NBD, tracked, until a signal asks for the end.

Whatever ends it short of SIGKILL ends it in this order, and that order is why a clean end is clean: no more
clients, the requests that were taken in are answered, the disks are detached. A signal is only ever a wish:
the second one, or the tenth, finds it wished already and interrupts nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

import click

from lmdbitmap import bitmap_file as flat_bitmap_file
from lmdbitmap.cli import logs
from lmdbitmap.cli.logs import HUMAN, STYLES, VARIABLE
from lmdbitmap.cli.metrics import metrics_served
from lmdbitmap.cli.options import Session, size, utf8_path, verb
from lmdbitmap.cli.output import say
from lmdbitmap.cli.ownership import find_disk, require_unowned
from lmdbitmap.cli.places import Places, group_id, host_and_port, is_loopback, passed_sockets, socket_mode
from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.measured import MeasuredStore
from lmdbitmap.nbd.control import ControlServer
from lmdbitmap.nbd.dirty_contexts import tracked_contexts
from lmdbitmap.nbd.held import HeldSnapshots
from lmdbitmap.nbd.server import Server
from lmdbitmap.nbd.supervisor import Supervisor
from lmdbitmap.nbd.watch import Watch
from lmdbitmap.period import DEFAULT_MAX_ARMED
from lmdbitmap.snapshot import Scratch
from lmdbitmap.store import Store

log = logging.getLogger(__name__)

_WRITABLE = "read and write the disks"
_TOLD = "read the disks' names and figures"
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
@click.option(
    "--socket-mode", metavar="MODE", type=socket_mode,
    help="Permissions of that socket, in octal: 0660 lets a group in. [default: 0600]",
)  # fmt: skip
@click.option("--socket-group", metavar="GROUP", type=group_id, help="The group that they are for.")
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
@click.option("--metrics", metavar="HOST:PORT", help="Answer Prometheus over HTTP at this TCP address.")
@click.option(
    "--log", "log_style", type=click.Choice(STYLES), envvar=VARIABLE, show_envvar=True,
    default=HUMAN, show_default=True,
    help="Write the log on stderr as sentences, or as one JSON object a line, which also tells what --verbose does.",
)  # fmt: skip
@click.option("--verbose", is_flag=True, help="Also log clients that come and go, and checkpoints.")
@click.option(
    "--bitmap-file", metavar="FILE.dbm", type=utf8_path,
    help="Also keep the disk's bitmap in this flat file: taken in and called unclean now, written out at a clean"
    " end. Without it the store is all that is needed.",
)  # fmt: skip
@click.option(
    "--scratch", metavar="DIR", type=utf8_path,
    help="Where old data goes that the guest overwrites while a backup reads. [default: the store's folder]",
)  # fmt: skip
@click.option(
    "--scratch-limit", metavar="SIZE", type=size, default="10G", show_default=True,
    help="How much of it each backup of a disk may have there; one that needs more fails.",
)  # fmt: skip
@click.option("--scratch-preallocate", is_flag=True, help="Take all of that room when a backup begins.")
@click.option("--max-armed", type=click.IntRange(1, 1 << 20), default=DEFAULT_MAX_ARMED, hidden=True)
@click.pass_obj
def serve(
    asked: Session,
    names: Sequence[str],
    socket: str | None,
    socket_mode: int | None,
    socket_group: int | None,
    listen: str | None,
    tls: str | None,
    insecure: bool,
    metrics: str | None,
    log_style: str,
    verbose: bool,
    bitmap_file: str | None,
    scratch: str | None,
    scratch_limit: int,
    scratch_preallocate: bool,
    max_armed: int,
) -> None:
    """Serve disks over NBD, and track the writes.

    Each disk is exported under its name; a single one also as the default export. Prints `ready` and the
    URIs once clients can connect. SIGTERM or Ctrl-C ends it cleanly. Under systemd it takes the sockets of its
    socket unit, and says when it is ready.
    """
    logs.choose(log_style, verbose=verbose)
    _require_sense(names, bitmap_file)
    supervisor, passed = Supervisor(os.environ.pop("NOTIFY_SOCKET", "")), passed_sockets(os.environ)
    address = None if listen is None else _address(listen, _WRITABLE, insecure=insecure or tls is not None)
    scraped = None if metrics is None else _address(metrics, _TOLD, insecure=insecure)
    if socket is None and address is None and not passed:
        raise click.UsageError("say where to serve: --socket PATH or --listen HOST:PORT")
    if socket is None and not (socket_mode is None and socket_group is None):
        raise click.UsageError("--socket-mode and --socket-group are for --socket")
    if tls is not None and address is None and not passed:
        raise click.UsageError("--tls is for --listen: a unix socket is the owner's alone")
    file = None if socket is None else (socket, socket_mode or 0o600, socket_group)
    places = Places(file, address, passed, tls)
    with _Ending() as ending, Store.open(asked.store_path) as store, contextlib.ExitStack() as attached:
        stores = {name: attached.enter_context(MeasuredStore.open(asked.store_path)) for name in names}
        disks = {name: attached.enter_context(_attach(stores[name], name, max_armed)) for name in names}
        if bitmap_file is not None:
            _take_in(disks[names[0]], bitmap_file)
        room = Scratch(scratch or store.path, scratch_limit, scratch_preallocate)
        with _served(disks, stores, room, attached) as server, contextlib.ExitStack() as beside:
            places.open_all(server)
            url = beside.enter_context(metrics_served(store, names, *scraped)) if scraped else None
            ending.ends(server)
            _announce(asked, server.uris, url)
            supervisor.tell("READY=1")
            server.serve_forever()
            supervisor.tell("STOPPING=1")


def _require_sense(names: Sequence[str], bitmap_file: str | None) -> None:
    if len(set(names)) < len(names):
        raise InvalidArgument(f"{' '.join(names)} names a disk twice", next_step="name each one once")
    if bitmap_file is not None and len(names) > 1:
        raise InvalidArgument("a bitmap file is of one disk", next_step="serve each disk by itself")


@contextlib.contextmanager
def _served(
    disks: Mapping[str, Filter],
    stores: Mapping[str, MeasuredStore],
    scratch: Scratch,
    attached: contextlib.ExitStack,
) -> Iterator[Server]:
    """A server of the disks and of those who ask about them; afterwards nobody uses the disks any more."""
    server = Server(disks, contexts_of=tracked_contexts)
    watch = Watch(server, {name: store.commits for name, store in stores.items()})
    control = ControlServer(disks, watch=watch, held=HeldSnapshots(disks, server, scratch))
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
            log.warning("disk %s: the next backup reads the whole disk: %s", name, disk.disk.epoch_reason)
        yield disk


def _take_in(disk: Filter, path: str) -> None:
    reason = flat_bitmap_file.begin(disk, path)
    if reason is not None:
        log.warning("disk %s: the next backup reads the whole disk: %s", disk.disk.name, reason)


def _announce(asked: Session, uris: list[str], metrics_url: str | None) -> None:
    if asked.as_json:
        metrics = {} if metrics_url is None else {"metrics": metrics_url}
        print(json.dumps({"ready": True, "uris": uris, **metrics}), flush=True)
        return
    for line in ("ready", *uris, *([] if metrics_url is None else [f"metrics {metrics_url}"])):
        say(line)
    sys.stdout.flush()


def _address(text: str, power: str, *, insecure: bool) -> tuple[str, int]:
    """HOST:PORT to listen at; other hosts must not reach it, and have that power, unless that is wanted."""
    host, port = host_and_port(text)
    if not insecure and not is_loopback(host):
        remedy = (
            "give certificates with --tls, or serve at a unix socket"
            if power == _WRITABLE
            else "use 127.0.0.1"
        )
        raise InvalidArgument(
            f"whoever reaches {host} could {power}", next_step=f"{remedy}, or say --insecure"
        )
    return host, port
