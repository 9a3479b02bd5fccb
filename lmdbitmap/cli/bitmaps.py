"""Verbs about flat files and stand-alone bitmaps: export, import, inspect, combine."""

from __future__ import annotations

from collections.abc import Iterator

import click

from lmdbitmap import export as flat_files
from lmdbitmap.access.questions import ask_changes
from lmdbitmap.cli.answers import report_on_bitmap, size_words, standing_words
from lmdbitmap.cli.options import FILE, Session, utf8_path, verb
from lmdbitmap.cli.output import progress, say, say_json
from lmdbitmap.cli.sizes import format_size, format_time, iso_time
from lmdbitmap.errors import InvalidArgument, Untrusted
from lmdbitmap.export import FileForm
from lmdbitmap.extents import Trust
from lmdbitmap.flat_file.inspection import Inspection, inspect_file
from lmdbitmap.format import NO_UUID, Flags, FlatHeader
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.changes import Standing
from lmdbitmap.tracker.standalone import Operation, disk_or_bitmap_called


@verb(
    examples=[
        "lmdbitmap export sda sda.dbm",
        "lmdbitmap export sda week.dbm --since monday --until friday",
        "lmdbitmap export sda sda.qcow2 --format qcow2",
    ]
)
@click.argument("name")
@click.argument("file", metavar="FILE", type=FILE)
@click.option("--since", metavar="CHECKPOINT", help="Count from this one. [default: the newest]")
@click.option("--until", metavar="CHECKPOINT", help="Count to this one. [default: now]")
@click.option(
    "--format", "form", type=click.Choice([known.value for known in FileForm]), default="flat", show_default=True,
    help="qcow2 is an image without data that holds the bitmap NAME, for QEMU's programs.",
)  # fmt: skip
@click.pass_obj
def export(asked: Session, name: str, file: str, since: str | None, until: str | None, form: str) -> None:
    """Write a bitmap to a file.

    NAME is a disk, whose changes are written, or a stand-alone bitmap. The file is written whole or not at all. An
    existing file is replaced if it is empty or, by a flat file, a flat file; any other file is refused.
    """
    with (
        Store.open(asked.store_path) as store,
        progress(f"exporting {name}", shown=asked.shows_progress),
    ):
        if isinstance(disk_or_bitmap_called(store, name), Disk):
            changes = ask_changes(store, name, since=since, until=until)
            header = flat_files.export_changes(changes, file, form=FileForm(form))
        elif since or until:
            raise InvalidArgument(f"{name!r} is no disk", next_step="leave --since and --until out")
        else:
            header = flat_files.export_bitmap(store, name, file, form=FileForm(form))
    if asked.as_json:
        say_json({"file": file, **_header_facts(header)})
    else:
        blocks = f"{header.dirty_count} of {header.bit_count} blocks dirty"
        say(f"{file}: {size_words(header.geometry)}, {blocks}, {header.trust.value}")


@verb(
    name="import",
    examples=[
        "lmdbitmap import sda.dbm monday",
        "lmdbitmap import sda.dbm monday --into sda",
        "lmdbitmap import guest.qcow2 monday --bitmap bitmap0",
    ],
)
@click.argument("file", metavar="FILE", type=utf8_path)
@click.argument("name")
@click.option("--bitmap", metavar="BITMAP", help="Which one of a qcow2 image's. [default: its only one]")
@click.option(
    "--into", metavar="DISK", help="Also call dirty on DISK what the file calls dirty; sizes must agree."
)
@click.option(
    "--all-dirty", is_flag=True,
    help="Whatever its bits are worth, take the file as saying that everything is dirty.",
)  # fmt: skip
@click.pass_obj
def import_(
    asked: Session, file: str, name: str, bitmap: str | None, into: str | None, all_dirty: bool
) -> None:
    """Keep a file's bitmap as the stand-alone bitmap NAME.

    FILE is a flat file, or a qcow2 image in which QEMU stored bitmaps when its guest was shut down. A file that was not
    closed cleanly, or a bitmap that is in use, cannot be trusted, and is refused with exit code 3.
    """
    flat_files.importable_header(file, bitmap=bitmap)  # before a store is made for it
    with (
        Store.create(asked.store_path) as store,
        progress(f"importing {file}", shown=asked.shows_progress),
    ):
        made = flat_files.import_file(store, file, name, bitmap=bitmap, into=into, all_dirty=all_dirty)
        kept = report_on_bitmap(store, made)
    if asked.as_json:
        say_json(kept.facts())
    else:
        dirty = f"{format_size(kept.dirty_bytes)} dirty"
        say(f"{name}: {size_words(made.geometry)}, {dirty}" + (f", also in {into}" if into else ""))


@verb(examples=["lmdbitmap inspect sda.dbm", "lmdbitmap inspect sda.dbm --json"])
@click.argument("file", metavar="FILE.dbm", type=FILE)
@click.pass_obj
def inspect(asked: Session, file: str) -> None:
    """Show what a flat file holds and whether it can be trusted.

    The whole file is read and proven. Exit code 3: it cannot be trusted, and everything counts as dirty.
    """
    with progress(f"reading {file}", shown=asked.shows_progress):
        found = inspect_file(file)
    if asked.as_json:
        say_json(_inspection_facts(found))
    else:
        for label, words in _portrait(found):
            say(f"{label:<12}{words}")
    if found.trust is Trust.UNTRUSTED:
        raise Untrusted(
            f"{file} cannot be trusted: {'; '.join(found.problems)}", next_step="make a full backup"
        )


@verb(
    examples=[
        "lmdbitmap combine week or monday tuesday wednesday",
        "lmdbitmap combine monday and-not known --into news",
    ]
)
@click.argument("name")
@click.argument(
    "operation", metavar="or|and|and-not|xor", type=click.Choice([known.value for known in Operation])
)
@click.argument("others", metavar="OTHER…", nargs=-1, required=True)
@click.option("--into", metavar="NEW", help="Leave NAME as it is, and keep what comes out as the bitmap NEW.")
@click.pass_obj
def combine(asked: Session, name: str, operation: str, others: tuple[str, ...], into: str | None) -> None:
    """Combine stand-alone bitmaps, as `import` keeps them.

    NAME is combined (or, and, and-not, xor) with each OTHER in turn, in one step that is done or not; each OTHER stays
    as it is. All must be of disks of one size. A disk's changes have to be exported and imported first.

    The result never names too few blocks. It may name too many if NAME or an OTHER does. `and-not` and `xor` remove
    blocks: they need bitmaps with blocks of one size, and are refused with exit code 3 if they could hide a change.
    """
    with (
        Store.open(asked.store_path) as store,
        progress(f"combining {name}", shown=asked.shows_progress),
    ):
        answer = standalone.combine(store, name, Operation(operation), others, into=into)
        kept = report_on_bitmap(store, answer)
    if asked.as_json:
        say_json(kept.facts())
    else:
        dirty = f"{format_size(kept.dirty_bytes)} dirty"
        say(f"{answer.name}: {size_words(answer.geometry)}, {dirty}, {standing_words(kept.standing)}")


def _inspection_facts(found: Inspection) -> dict[str, object]:
    return {
        "file": found.path,
        **_header_facts(found.header),
        "trust": found.trust.value,
        "dirty_bytes": found.dirty_bytes,
        "metadata": found.metadata,
        "problems": found.problems,
    }


def _header_facts(header: FlatHeader) -> dict[str, object]:
    return {
        "size": header.disk_size,
        "granularity": header.geometry.granularity,
        "clean": header.clean,
        "recording": Flags.RECORDING in header.flags,
        "superset": Flags.SUPERSET in header.flags,
        "bit_count": header.bit_count,
        "dirty_count": header.dirty_count,
        "bitmap_uuid": str(header.bitmap_uuid),
        "disk_uuid": str(header.disk_uuid),
        "epoch_uuid": str(header.epoch_uuid),
        "since_uuid": str(header.since_uuid),
        "until_uuid": None if header.until_uuid is None else str(header.until_uuid),
        "since_time": iso_time(header.since_time_ns),
        "trust": header.trust.value,
    }


def _portrait(found: Inspection) -> Iterator[tuple[str, str]]:
    header = found.header
    block_count = header.bit_count if found.trust is Trust.UNTRUSTED else header.dirty_count
    yield "file", found.path
    yield "size", size_words(header.geometry)
    yield "dirty", f"{format_size(found.dirty_bytes)} in {block_count} blocks"
    yield "trust", standing_words(Standing(found.trust, "; ".join(found.problems) or None))
    yield "flags", " ".join(flag.name or "" for flag in Flags if flag in header.flags) or "none"
    if header.since_uuid != NO_UUID:  # as a combined bitmap
        until = "still recording" if header.until_uuid is None else f"checkpoint {header.until_uuid}"
        yield "since", f"{format_time(header.since_time_ns)}, checkpoint {header.since_uuid}"
        yield "until", until
    yield "bitmap", str(header.bitmap_uuid)
    if header.disk_uuid != NO_UUID:
        yield "disk", str(header.disk_uuid)
    if header.epoch_uuid != NO_UUID:
        yield "epoch", str(header.epoch_uuid)
    yield "names", ", ".join(f"{key} {value}" for key, value in found.metadata.items())
