"""The verb `show`: the map of dirt, on the terminal and in pictures.

Each shade is a character, not a colour: the map reads the same on a terminal, in a pipe and in a log. If the output's
encoding lacks the shade characters, ASCII ones replace them.

All maps of one answer, and the sum above them, are counted from the same slices: they agree with each other even while
a guest writes to the disk.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import click

from lmdbitmap import render
from lmdbitmap.cli.changed import ask_or_everything, head_facts, head_words, insist_on_trust
from lmdbitmap.cli.options import FILE_OR_DASH, Session, verb
from lmdbitmap.cli.output import printable, progress, say, stream_json, stream_lines
from lmdbitmap.cli.sizes import format_size
from lmdbitmap.errors import AlreadyExists
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.render import Caption, Cell, DirtMap, Shade
from lmdbitmap.store import Store
from lmdbitmap.system import atomic_files, files
from lmdbitmap.tracker.changes import Changes, Standing
from lmdbitmap.tracker.slices import Slice
from lmdbitmap.work.progress import Progress

_COLUMNS, _ROWS = 64, 16
"""The size of the text and JSON map, whatever the terminal: the same disk has the same cells everywhere."""
_PICTURE_COLUMNS, _PICTURE_ROWS = 128, 32
_STDOUT = "-"

_GLYPHS = {Shade.NONE: "·", Shade.SOME: "░", Shade.MOST: "▓", Shade.ALL: "█"}
_PLAIN_GLYPHS = {Shade.NONE: ".", Shade.SOME: "-", Shade.MOST: "+", Shade.ALL: "#"}

_TRUST_WORDS = {
    Trust.EXACT: "exact",
    Trust.SUPERSET: "superset, which may show too much",
    Trust.UNTRUSTED: "untrusted, so all of it counts as dirty",
}


class _Seen(NamedTuple):
    """The maps and the standing counted from the slices of an answer, read once."""

    text_map: DirtMap
    picture_map: DirtMap
    standing: Standing


@verb(
    examples=[
        "lmdbitmap show sda",
        "lmdbitmap show sda --since monday --until tuesday --svg sda.svg --png sda.png",
    ]
)
@click.argument("name")
@click.option("--since", metavar="CHECKPOINT", help="Count from this one. [default: the newest]")
@click.option("--until", metavar="CHECKPOINT", help="Count to this one. [default: now]")
@click.option(
    "--svg", metavar="FILE", type=FILE_OR_DASH,
    help="Draw it there too, with words; with - on standard output, and the answer then goes to standard error.",
)  # fmt: skip
@click.option("--png", metavar="FILE", type=FILE_OR_DASH, help="The same as plain pixels.")
@click.pass_obj
def show(
    asked: Session, name: str, since: str | None, until: str | None, svg: str | None, png: str | None
) -> None:
    """Draw which parts of a disk changed since a checkpoint.

    Each cell of the map is an equal share of the disk. It looks clean only if none of it is dirty, and full only if all
    of it is. Pictures are written whole or not at all, and replace only pictures of the same kind. Exit code 3: it is
    not known what changed. Then all of the disk is shown as dirty, with the reason.
    """
    _require_sense(svg, png)
    _require_place(svg, png)
    with Store.open(asked.store_path) as store:
        answer = ask_or_everything(store, name, since, until)
        with progress(f"reading changes of {name}", shown=asked.shows_progress) as report:
            seen = _look_at(answer, report)
    _write_pictures(_caption(answer, seen), seen.picture_map, svg, png)
    with contextlib.redirect_stdout(sys.stderr if _STDOUT in (svg, png) else sys.stdout):
        if asked.as_json:
            _tell_json(answer, seen, svg, png)
        else:
            _tell_text(answer, seen, svg, png)
    insist_on_trust(answer)


def _look_at(answer: Changes, report: Progress) -> _Seen:
    text_map = DirtMap(answer.geometry, _COLUMNS, _ROWS)
    picture_map = DirtMap(answer.geometry, _PICTURE_COLUMNS, _PICTURE_ROWS)
    loose = False
    for part in _reported(answer, report):
        text_map.count(part)
        picture_map.count(part)
        loose = loose or part.loose
    return _Seen(text_map, picture_map, answer.standing_if(loose=loose))


def _reported(answer: Changes, report: Progress) -> Iterator[Slice]:
    for part in answer.slices():
        report(answer.geometry.bytes_of(0, part.region * REGION_BLOCKS)[1], answer.disk.size)
        yield part


# --- words ---


def _tell_text(answer: Changes, seen: _Seen, svg: str | None, png: str | None) -> None:
    glyphs = glyphs_for(sys.stdout.encoding)
    say(f"{head_words(answer, seen.text_map.dirty_bytes)}; {_standing_words(seen.standing)}")
    stream_lines(_row_words(row, glyphs) for row in seen.text_map.rows())
    shades = "  ".join(f"{glyphs[shade]} {shade.value}" for shade in Shade)
    say(f"{shades}  {_legend(seen.text_map)}")
    for path in filter(None, (svg, png)):
        say(f"drawn: {path}")


def glyphs_for(encoding: str | None) -> Mapping[Shade, str]:
    """Return a character for each shade that an output in `encoding` can hold."""
    try:
        "".join(_GLYPHS.values()).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_GLYPHS
    return _GLYPHS


def _row_words(row: list[Cell], glyphs: Mapping[Shade, str]) -> str:
    return f"{format_size(row[0].offset):>10}  {''.join(glyphs[cell.shade] for cell in row)}"


def _legend(dirt: DirtMap) -> str:
    return f"of a cell, which is {format_size(dirt.cell_bytes)}"


def _standing_words(standing: Standing) -> str:
    return _TRUST_WORDS[standing.trust] + (f": {standing.reason}" if standing.reason else "")


# --- JSON ---


def _tell_json(answer: Changes, seen: _Seen, svg: str | None, png: str | None) -> None:
    head = head_facts(answer, seen.standing, seen.text_map.dirty_bytes)
    head |= {"svg": svg, "png": png, "cell_bytes": seen.text_map.cell_bytes}
    stream_json(head, "cells", map(_cell_as_json, seen.text_map.cells()))


def _cell_as_json(cell: Cell) -> str:
    offset, length, dirty_bytes = cell
    numbers = f'"offset": {offset}, "length": {length}, "dirty_bytes": {dirty_bytes}'
    return f'{{{numbers}, "shade": "{cell.shade.value}"}}'


# --- pictures ---


def _caption(answer: Changes, seen: _Seen) -> Caption:
    title = printable(head_words(answer, seen.picture_map.dirty_bytes))
    standing = printable(_standing_words(seen.standing))
    return Caption(title, [standing], _legend(seen.picture_map), format_size)


def _require_sense(svg: str | None, png: str | None) -> None:
    if svg == png == _STDOUT:
        raise click.UsageError("Standard output takes one picture: name a file for the other.")
    if _STDOUT in (svg, png) and sys.stdout.isatty():
        raise click.UsageError(
            "The picture is for programs, and this is a terminal; lead it into a pipe or a file."
        )


def _require_place(svg: str | None, png: str | None) -> None:
    """Raise `AlreadyExists` for a file that is neither empty nor a picture of the kind that is to replace it."""
    if svg is not None:
        _require_beginning(svg, render.SVG_SIGNATURE, "an SVG picture")
    if png is not None:
        _require_beginning(png, render.PNG_SIGNATURE, "a PNG picture")


def _require_beginning(path: str, signature: bytes, kind: str) -> None:
    """Raise `AlreadyExists` for another kind of file. What is no regular file is refused when it is to be replaced."""
    if path != _STDOUT and files.first_bytes(path, len(signature)) not in (signature, b""):
        raise AlreadyExists(
            f"{path} is there and is not {kind}", next_step="name another file, or remove that one"
        )


def _write_pictures(caption: Caption, dirt: DirtMap, svg: str | None, png: str | None) -> None:
    """Write the pictures. Both paths are checked again: a file may be there by now, and the two may be the same."""
    if svg is not None:
        _require_place(svg, None)
        _write_picture(svg, render.svg(dirt, caption).encode())
    if png is not None:
        _require_place(None, png)
        _write_picture(png, render.png(dirt, caption))


def _write_picture(path: str, picture: bytes) -> None:
    if path == _STDOUT:
        sys.stdout.buffer.write(picture)
        sys.stdout.flush()  # before the answer says that it was drawn
    else:
        atomic_files.replace(path, picture)
