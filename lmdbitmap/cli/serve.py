"""The verb `serve`: disks over NBD, tracked, until a signal asks for the end.

Unless SIGKILL ends it, it ends in this order, which makes the end a clean one: accept no more clients, answer the
requests that were received, detach the disks.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
from collections.abc import Iterator, MutableMapping, Sequence

import click

from lmdbitmap.access.owners import require_unowned
from lmdbitmap.cli import logs
from lmdbitmap.cli.descriptors import allow_many_descriptors
from lmdbitmap.cli.metrics import metrics_served
from lmdbitmap.cli.options import Session, size, utf8_path, verb
from lmdbitmap.cli.places import ListenAddresses
from lmdbitmap.cli.serving import (
    Ending,
    address_of,
    announce,
    listening,
    logging_as_asked,
)
from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file import bitmap_file as flat_bitmap_file
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.supervisor import Supervisor
from lmdbitmap.storage.measured import MeasuredStore
from lmdbitmap.store import Store
from lmdbitmap.tracker.chain import disk_called
from lmdbitmap.tracker.period import DEFAULT_MAX_ARMED
from lmdbitmap.tracker.scratch import Scratch, ScratchFile

log = logging.getLogger(__name__)

_WRITABLE = "read and write the disks"
_TOLD = "read the disks' names and figures"
_REMEDY = "use 127.0.0.1, or say --insecure-metrics"
_LOOK_S = 2.0


@verb(
    examples=[
        "lmdbitmap serve sda --socket /run/sda.sock",
        "lmdbitmap serve sda sdb --listen 127.0.0.1:10809",
        "lmdbitmap serve sda --socket /run/sda.sock --bitmap-file sda.dbm",
    ]
)
@click.argument("names", metavar="NAME…", nargs=-1, required=True)
@listening(_WRITABLE)
@click.option("--metrics", metavar="HOST:PORT", help="Answer Prometheus over HTTP at this TCP address.")
@click.option(
    "--insecure-metrics",
    is_flag=True,
    help=f"Answer where other hosts can reach it: each of them may {_TOLD}. --insecure implies this option.",
)
@logging_as_asked
@click.option(
    "--bitmap-file", metavar="FILE.dbm", type=utf8_path,
    help="Also keep the disk's bitmap in this flat file. It is read and marked not clean at the start, and written at a"
    " clean end. The store does not need it.",
)  # fmt: skip
@click.option(
    "--scratch", metavar="DIR", type=utf8_path,
    help="The folder for old data that the guest overwrites while a backup reads. [default: the store's folder]",
)  # fmt: skip
@click.option(
    "--scratch-limit", metavar="SIZE", type=size, default="10G", show_default=True,
    help="The most old data kept there for one backup of a disk; a backup that needs more fails.",
)  # fmt: skip
@click.option("--scratch-preallocate", is_flag=True, help="Reserve all of that space when a backup begins.")
@click.option(
    "--max-armed", metavar="EXTENTS", type=click.IntRange(1, 1 << 20), default=DEFAULT_MAX_ARMED, show_default=True,
    help="How many extents, of 64 blocks each, a crash may count as dirty though few of their blocks were written. With"
    " more, a guest that writes all over a large disk waits less.",
)  # fmt: skip
@click.pass_obj
def serve(
    asked: Session,
    names: Sequence[str],
    places: ListenAddresses,
    metrics: str | None,
    insecure_metrics: bool,
    log_style: str,
    verbose: bool,
    bitmap_file: str | None,
    scratch: str | None,
    scratch_limit: int,
    scratch_preallocate: bool,
    max_armed: int,
) -> None:
    """Serve disks over NBD, and track the writes.

    Each disk is exported under its name; a single disk is also the default export. Prints `ready` and the URIs once
    clients can connect. SIGTERM or Ctrl-C ends it cleanly. Under systemd it uses the sockets of its socket unit and
    notifies systemd when it is ready.
    """
    logs.choose(log_style, verbose=verbose)
    logs.never_wait()
    _require_sense(names, bitmap_file)
    allow_many_descriptors()
    supervisor = Supervisor(os.environ.pop("NOTIFY_SOCKET", ""))
    insecure_metrics = insecure_metrics or places.insecure
    scraped = None if metrics is None else address_of(metrics, _TOLD, _REMEDY, insecure=insecure_metrics)
    with Ending() as ending, Store.open(asked.store_path) as store, contextlib.ExitStack() as attached:
        disks = {name: attached.enter_context(_attach(asked.store_path, name, max_armed)) for name in names}
        if bitmap_file is not None:
            _take_in(disks[names[0]], bitmap_file)
        room = Scratch(os.path.abspath(scratch or store.path), scratch_limit, scratch_preallocate)
        _warn_of_no(room)
        with _served(disks, room, attached) as server, contextlib.ExitStack() as beside:
            places.open_all(server)
            url = beside.enter_context(metrics_served(store, disks, *scraped)) if scraped else None
            ending.ends(server)
            _leave_to_itself()
            announce(asked, server.uris, url)
            supervisor.tell("READY=1")
            server.serve_forever()
            supervisor.tell("STOPPING=1")


def _leave_to_itself() -> None:
    """Exclude everything allocated so far from garbage collection.

    It stays as long as the server does, and a full collection takes about 10 ms, during which no guest is served.
    """
    gc.collect()
    gc.freeze()


def _require_sense(names: Sequence[str], bitmap_file: str | None) -> None:
    if len(set(names)) < len(names):
        raise InvalidArgument(f"{' '.join(names)} names a disk twice", next_step="name each one once")
    if bitmap_file is not None and len(names) > 1:
        raise InvalidArgument("a bitmap file is of one disk", next_step="serve each disk by itself")


def _warn_of_no(room: Scratch) -> None:
    """Say now that old data cannot be kept there, not at night by a backup that fails. Guests are served anyway.

    They wait for no folder that does not answer, such as one on a network file system.
    """
    looking = threading.Thread(target=_try_out, args=[room], name="lmdbitmap scratch", daemon=True)
    try:
        looking.start()
    except RuntimeError:  # whatever needs a thread next says so
        return
    looking.join(_LOOK_S)
    if looking.is_alive():
        log.warning("no disk can be backed up while the scratch folder %s does not answer", room.folder)


def _try_out(room: Scratch) -> None:
    try:
        ScratchFile(room._replace(preallocate=False)).close()
    except LmdbitmapError as error:
        log.warning("no disk can be backed up while it is served: %s", error)


@contextlib.contextmanager
def _served(
    disks: MutableMapping[str, Filter],
    scratch: Scratch,
    attached: contextlib.ExitStack,
) -> Iterator[Server]:
    """Yield a server of the disks, with its control socket running; afterwards nobody uses the disks any more.

    A disk that the server was asked to detach is removed from `disks`.
    """
    server = Server(disks)
    held = HeldSnapshots(disks, server, scratch)
    control = ControlServer(disks, held=held, server=server)
    try:
        control.start()
        yield server
    finally:
        at_rest = [server.stop(), control.stop()]
        if not all(at_rest):
            attached.pop_all()  # a hanging request may still write to its disk: leave as after a crash
            raise LmdbitmapError(
                "a request hangs in its disk, so the disks were not detached",
                next_step="see why that disk does not answer (dmesg); what was being written counts as dirty",
            )


@contextlib.contextmanager
def _attach(store_path: str, name: str, max_armed: int) -> Iterator[Filter]:
    """Attach a disk with a store of its own, which measures its commits."""
    with MeasuredStore.open(store_path) as store:
        before = disk_called(store, name)
        require_unowned(store, before)
        with Filter.attach(store, name, max_armed=max_armed) as disk:
            if disk.disk.epoch != before.epoch:
                log.warning("disk %s: the next backup reads the whole disk: %s", name, disk.disk.epoch_reason)
            yield disk


def _take_in(disk: Filter, path: str) -> None:
    reason = flat_bitmap_file.begin(disk, path)
    if reason is not None:
        log.warning("disk %s: the next backup reads the whole disk: %s", disk.disk.name, reason)
