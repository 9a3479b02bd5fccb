"""The verb `changes`: which bytes of a disk changed, streamed, whatever the number of extents.

The sum is printed before the extents, and the records are read once for each. So for a period that still records the
two may differ by what was written in between. A period that a checkpoint closed never changes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

import click

from lmdbitmap.access.questions import ask_changes
from lmdbitmap.cli.answers import standing_words
from lmdbitmap.cli.options import Session, verb
from lmdbitmap.cli.output import progress, say, stream_json, stream_lines
from lmdbitmap.cli.sizes import format_size
from lmdbitmap.errors import LmdbitmapError, Untrusted
from lmdbitmap.extents import Extent, Trust
from lmdbitmap.images.image import open_image
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.chain import disk_called
from lmdbitmap.tracker.changes import Changes, Standing, unknown_error
from lmdbitmap.work.progress import Progress

_EXTENTS_PER_REPORT = 4096
_BOOL = ("false", "true")


@verb(
    examples=[
        "lmdbitmap changes sda --since monday",
        "lmdbitmap changes sda --since monday --until tuesday --json",
    ]
)
@click.argument("name")
@click.option("--since", metavar="CHECKPOINT", help="Count from this one. [default: the newest]")
@click.option("--until", metavar="CHECKPOINT", help="Count to this one. [default: now]")
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), help="The same as with --json, or without."
)
@click.pass_obj
def changes(asked: Session, name: str, since: str | None, until: str | None, form: str | None) -> None:
    """List which bytes of a disk changed since a checkpoint.

    Exit code 3: it is not known what changed. Then the answer is the whole disk, with the reason.
    """
    as_json = asked.as_json if form is None else form == "json"
    bar_shown = sys.stderr.isatty() and not sys.stdout.isatty() and not asked.as_json
    with Store.open(asked.store_path) as store:
        answer = ask_or_everything(store, name, since, until)
        with _image(answer) as device, progress(f"reading changes of {name}", shown=bar_shown) as report:
            extents = _reported(answer.extents(device), answer.disk.size, report)
            (_tell_json if as_json else _tell_text)(answer, extents)
        insist_on_trust(answer)


def ask_or_everything(store: Store, name: str, since: str | None, until: str | None) -> Changes:
    """Return the changes; if it is not known what changed, return the whole disk as changed."""
    try:
        return ask_changes(store, name, since=since, until=until)
    except Untrusted as error:
        disk = disk_called(store, name)
        with store.read() as reader:
            first = chain.find_checkpoint(reader, disk, since or "")
            last = chain.find_checkpoint(reader, disk, until) if until else None
        return Changes(store, disk, first, last, Standing(Trust.UNTRUSTED, error.problem))


@contextlib.contextmanager
def _image(answer: Changes) -> Iterator[BlockDevice | None]:
    """Yield the image, to find what reads as zeroes; None if it cannot be opened, for then nothing is known."""
    try:
        device = open_image(answer.disk.image, read_only=True, share_writes=True)
    except LmdbitmapError:
        yield None
        return
    with contextlib.closing(device):
        yield device


def _reported(extents: Iterable[Extent], size: int, report: Progress) -> Iterator[Extent]:
    for count, extent in enumerate(extents):
        if count % _EXTENTS_PER_REPORT == 0:
            report(extent.offset, size)
        yield extent


def _tell_json(answer: Changes, extents: Iterable[Extent]) -> None:
    head = head_facts(answer, answer.summary.standing, answer.summary.dirty_bytes)
    stream_json(head, "extents", map(_extent_as_json, extents))


def head_facts(answer: Changes, standing: Standing, dirty_bytes: int) -> dict[str, object]:
    """Return what was asked, how far the answer can be trusted, and the dirty bytes in all."""
    disk = answer.disk
    return {
        "disk": disk.name,
        "size": disk.size,
        "granularity": disk.geometry.granularity,
        "since": answer.since.name,
        "until": None if answer.until is None else answer.until.name,
        "trust": standing.trust.value,
        "reason": standing.reason,
        "dirty_bytes": dirty_bytes,
    }


def _extent_as_json(extent: Extent) -> str:
    """Return an extent as JSON, ten times as fast as the json module, which matters for millions of them."""
    offset, length, dirty, zero = extent
    return f'{{"offset": {offset}, "length": {length}, "dirty": {_BOOL[dirty]}, "zero": {_BOOL[zero]}}}'


def _tell_text(answer: Changes, extents: Iterable[Extent]) -> None:
    summary = answer.summary
    say(f"# {head_words(answer, summary.dirty_bytes)}; {standing_words(summary.standing)}")
    say(f"#{'offset':>19} {'length':>19}")
    stream_lines(f"{e.offset:>20} {e.length:>19}{'  reads as zeroes' if e.zero else ''}" for e in extents)


def head_words(answer: Changes, dirty_bytes: int) -> str:
    """`sda: 1.1 MiB of 8 MiB changed since monday`."""
    stretch = f"since {answer.since.name}" + (f" until {answer.until.name}" if answer.until else "")
    dirty = f"{format_size(dirty_bytes)} of {format_size(answer.disk.size)}"
    return f"{answer.disk.name}: {dirty} changed {stretch}"


def insist_on_trust(answer: Changes) -> None:
    """Raise `Untrusted` if it is not known what changed. Call it after the answer was printed."""
    if answer.standing.trust is Trust.UNTRUSTED:
        raise unknown_error(answer)
