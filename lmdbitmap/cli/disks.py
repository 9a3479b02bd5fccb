"""Verbs that begin and end the tracking of a disk, and show its state and image: add, ls, info, relocate, rm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from lmdbitmap.access import operations
from lmdbitmap.access.owners import require_unowned
from lmdbitmap.access.questions import Owners
from lmdbitmap.cli.answers import (
    BitmapReport,
    DiskReport,
    Period,
    UnknownDisk,
    confirm,
    periods_of,
    report_apart,
    report_on,
    report_on_bitmap,
    served_words,
    size_words,
    standing_words,
)
from lmdbitmap.cli.facts import epoch_facts
from lmdbitmap.cli.failing import ending_as, failure_facts
from lmdbitmap.cli.holders import holder_words
from lmdbitmap.cli.options import FOLDER, Session, granularity, utf8_path, verb
from lmdbitmap.cli.output import complain, say, say_json, say_table
from lmdbitmap.cli.repositories import list_backups
from lmdbitmap.cli.sizes import format_size, format_time
from lmdbitmap.errors import InvalidArgument, NotFound
from lmdbitmap.extents import Trust
from lmdbitmap.images.image import is_far, lasting_name
from lmdbitmap.qcow2 import layout as qcow2
from lmdbitmap.storage.schema import DURABILITIES, POLICIES, Disk
from lmdbitmap.store import Store
from lmdbitmap.system import files
from lmdbitmap.tracker import session
from lmdbitmap.tracker.chain import disk_called
from lmdbitmap.tracker.standalone import disk_or_bitmap_called
from lmdbitmap.upkeep.check import next_step_for
from lmdbitmap.work.disks_failed import DisksFailed
from lmdbitmap.work.failures import Failures

_FORMATS = {qcow2.MAGIC: "qcow2", b"KDMV": "VMDK", b"vhdxfile": "VHDX"}
"""The first bytes of image formats whose disk is not simply the bytes of the file."""


@verb(
    examples=[
        "lmdbitmap add sda /srv/vm/sda.raw",
        "lmdbitmap add data /dev/vg0/data --granularity 1M --policy strict",
        "lmdbitmap add sdb 'nbd+unix:///sdb?socket=/run/sdb.sock'",
        "lmdbitmap add sdc 'nbds://other-host/sdc?tls-certificates=/etc/pki/nbd'",
    ]
)
@click.argument("name")
@click.argument("image", type=utf8_path)
@click.option(
    "--granularity", "granularity_bits", type=granularity, default="64K", show_default=True, metavar="SIZE",
    help="Bytes that one bit stands for: a power of two, 512 to 2G.",
)  # fmt: skip
@click.option(
    "--durability", type=click.Choice(DURABILITIES), default=DURABILITIES[0], show_default=True,
    help="When the store learns that a block is dirty: before the block's new data is written, or at a clean detach"
    " only; then the first backup after a crash reads the whole disk.",
)  # fmt: skip
@click.option(
    "--policy", type=click.Choice(POLICIES), default=POLICIES[0], show_default=True,
    help="If a write cannot be recorded: let it through and ask for a full backup, or fail it.",
)  # fmt: skip
@click.pass_obj
def add(asked: Session, name: str, image: str, granularity_bits: int, durability: str, policy: str) -> None:
    """Start tracking a disk image.

    IMAGE is a raw file, a block device, or the nbd:// or nbd+unix:// URI of another server's export (nbds:// or
    nbds+unix:// over TLS). NAME is the disk's name from now on. The first checkpoint is made. Everything counts as
    dirty until the first full backup.
    """
    _refuse_odd_uri(image)
    lasting_name(image)  # refuses a name that leads to nothing, before a store is made for it
    with Store.create(asked.store_path) as store:
        disk = session.add(
            store, name, image, granularity_bits=granularity_bits, durability=durability, policy=policy
        )
        if asked.as_json:
            say_json(report_on(Owners(store), disk).facts())
        else:
            say(f"{name}: {size_words(disk.geometry)}, all dirty until the first full backup")
    _warn_of_format(name, image)


def _warn_of_format(name: str, image: str) -> None:
    """Warn: such a file can be meant as plain bytes, but hardly ever is."""
    if is_far(image):
        return
    beginning = files.first_bytes(image, max(map(len, _FORMATS)), of_devices=True)
    for magic, kind in _FORMATS.items():
        if beginning.startswith(magic):
            complain(
                f"{image} looks like a {kind} image, and is tracked and served as the bytes of the file, not as the"
                f" disk inside it; if that disk is meant, `lmdbitmap rm {name}`, serve the image with qemu-nbd or"
                " nbdkit, and add its nbd:// or nbd+unix:// URI"
            )


def _refuse_odd_uri(image: str) -> None:
    if "://" in image and not is_far(image):
        raise InvalidArgument(
            f"{image} is a URI of a kind that cannot be tracked",
            next_step="serve it with qemu-nbd or nbdkit, and add its nbd:// or nbd+unix:// URI",
        )


@verb(examples=["lmdbitmap ls", "lmdbitmap ls --json", "lmdbitmap ls /srv/backups"])
@click.argument("repository", metavar="[REPO]", type=FOLDER, required=False)
@click.pass_obj
def ls(asked: Session, repository: str | None) -> None:
    """List disks and bitmaps, or backups.

    Without REPO, lists the tracked disks and the stand-alone bitmaps. With REPO, lists the backups in that repository
    to which a disk can be restored, and how many images each of them is made of.

    A disk of which something cannot be read counts as dirty and not trusted, and is reported at the end.
    """
    if repository is not None:
        list_backups(asked, repository)
        return
    apart = Failures(never=(NotFound,))
    with Store.open(asked.store_path) as store:
        with store.read() as reader:
            disks, bitmaps = reader.disks(), reader.bitmaps()
        owners, reports = Owners(store), []
        for disk in disks:
            with contextlib.suppress(NotFound):  # it was removed meanwhile
                reports.append(report_apart(owners, disk, apart))
        kept = [report_on_bitmap(store, bitmap) for bitmap in bitmaps]
    failed = DisksFailed("read", len(reports) - len(apart.errors), apart.errors) if apart.errors else None
    with ending_as(failed, "not known"):
        if asked.as_json:
            disk_facts, bitmap_facts = [report.facts() for report in reports], [one.facts() for one in kept]
            facts = {"store": store.path, "disks": disk_facts, "bitmaps": bitmap_facts}
            say_json({**facts, "failures": failure_facts(failed)})
        else:
            _tell_list(reports, kept)


def _tell_list(reports: Sequence[DiskReport | UnknownDisk], kept: Sequence[BitmapReport]) -> None:
    if reports:
        headings = ("disk", "size", "dirty", "since", "trust", "attached", "holders", "image")
        say_table(headings, map(_disk_row, reports), right=("size", "dirty", "holders"))
    if reports and kept:
        say("")
    if kept:
        say_table(("bitmap", "size", "dirty", "trust"), map(_bitmap_row, kept), right=("size", "dirty"))
    if not reports and not kept:
        say("nothing is tracked yet; begin with `lmdbitmap add`")


def _disk_row(report: DiskReport | UnknownDisk) -> list[str]:
    if isinstance(report, UnknownDisk):
        size = format_size(report.disk.size)
        return [report.disk.name, size, size, "?", Trust.UNTRUSTED.value, "?", "?", report.disk.image]
    disk, dirt = report.disk, report.dirt
    return [
        disk.name,
        format_size(disk.size),
        format_size(dirt.dirty_bytes),
        report.newest.name,
        dirt.standing.trust.value,
        "yes" if report.attached else "no",
        str(sum(hold.ended is None and hold.repository is not None for hold in report.holds)),
        disk.image,
    ]


def _bitmap_row(kept: BitmapReport) -> list[str]:
    size, dirty = format_size(kept.bitmap.size), format_size(kept.dirty_bytes)
    return [kept.bitmap.name or "", size, dirty, kept.standing.trust.value]


@verb(examples=["lmdbitmap info sda", "lmdbitmap info sda --json"])
@click.argument("name")
@click.pass_obj
def info(asked: Session, name: str) -> None:
    """Show all about one disk or one stand-alone bitmap.

    Shows what changed since each checkpoint, how far that can be trusted and why, and who holds the checkpoint. For a
    served disk it also shows what its clients do and how long they wait.
    """
    with Store.open(asked.store_path) as store:
        found = disk_or_bitmap_called(store, name)
        if isinstance(found, Disk):
            owners = Owners(store)
            told = owners.ask(found, alone=True)
            served = None if told is None else told["served"]
            report = report_on(owners, found)
            is_lost = report.dirt.standing.trust is Trust.UNTRUSTED
            next_step = next_step_for(store, found) if is_lost else None
            _tell_disk(asked, report, list(periods_of(owners, found)), served, next_step)
        else:
            _tell_bitmap(asked, report_on_bitmap(store, found))


def _tell_disk(
    asked: Session,
    report: DiskReport,
    periods: list[Period],
    served: Mapping[str, Any] | None,
    next_step: str | None,
) -> None:
    disk = report.disk
    if asked.as_json:
        checkpoints = [period.facts() for period in periods]
        facts = {**report.facts(), "next_step": next_step, "epoch": epoch_facts(disk)}
        say_json({**facts, "checkpoints": checkpoints, "served": served})
        return
    _tell_pairs(_portrait(report, next_step))
    if served is not None:
        say("")
        _tell_pairs(served_words(served))
    say("")
    say_table(
        ("checkpoint", "made", "changed until the next", "held by"),
        map(_period_row, periods),
        right=("changed until the next",),
    )


def _period_row(period: Period) -> list[str]:
    checkpoint = period.checkpoint
    made, dirt = format_time(checkpoint.time_ns), _dirt_words(period.dirty_bytes)
    return [checkpoint.name, made, dirt, holder_words(period.holders)]


def _portrait(report: DiskReport, next_step: str | None) -> Iterator[tuple[str, str]]:
    disk, dirt = report.disk, report.dirt
    yield "disk", f"{disk.name}, {size_words(disk.geometry)}"
    yield "image", disk.image
    yield "attached", "yes" if report.attached else "no"
    yield "dirty", f"{format_size(dirt.dirty_bytes)} since checkpoint {report.newest.name}"
    yield "trust", standing_words(dirt.standing)
    if next_step is not None:
        yield "next step", next_step
    yield "epoch", f"{disk.epoch_number}: {disk.epoch_reason}"
    yield "durability", f"{disk.durability}, {disk.policy}"


def _dirt_words(dirty_bytes: int | None) -> str:
    return "not known any more" if dirty_bytes is None else format_size(dirty_bytes)


def _tell_bitmap(asked: Session, kept: BitmapReport) -> None:
    if asked.as_json:
        say_json(kept.facts())
        return
    portrait = [
        ("bitmap", f"{kept.bitmap.name}, {size_words(kept.bitmap.geometry)}"),
        ("dirty", format_size(kept.dirty_bytes)),
        ("trust", standing_words(kept.standing)),
    ]
    _tell_pairs(portrait)


def _tell_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    for label, words in pairs:
        say(f"{label:<12}{words}")


@verb(
    examples=[
        "lmdbitmap relocate sda /srv/vm/new/sda.raw",
        "lmdbitmap relocate sdc 'nbds://other-host/sdc?tls-certificates=/etc/pki/nbd'",
    ]
)
@click.argument("name")
@click.argument("image", type=utf8_path)
@click.pass_obj
def relocate(asked: Session, name: str, image: str) -> None:
    """Set where the image of a disk is now.

    IMAGE is as for `add`. A file that was moved within its file system, or an export that is now reached over TLS, is
    recognised, and the next backup is an increment. An image that cannot be recognised, such as a copy, counts as
    another one: either vouch for it with `adopt`, or the next backup reads the disk.
    """
    _refuse_odd_uri(image)
    with Store.open(asked.store_path) as store:
        require_unowned(store, disk_called(store, name))
        report = report_on(Owners(store), session.relocate(store, name, image))
        standing = report.dirt.standing
        is_lost = standing.trust is Trust.UNTRUSTED
        next_step = next_step_for(store, report.disk) if is_lost else None
    if asked.as_json:
        say_json({**report.facts(), "next_step": next_step})
        return
    say(f"{name}: its image is {report.disk.image}, {standing_words(standing)}")
    if next_step is not None:
        say(f"next step: {next_step}")


@verb(examples=["lmdbitmap rm sda"])
@click.argument("name")
@click.pass_obj
def rm(asked: Session, name: str) -> None:
    """Remove a disk or a stand-alone bitmap from the store.

    The disk's checkpoints are removed too; its image is not touched. The next backup will be a full one. A process that
    serves the disk stops serving it and goes on serving its others; it refuses while a client is connected.
    """
    with Store.open(asked.store_path) as store:
        operations.remove(store, name)
    confirm(asked, f"{name}: removed from the store", name=name)
