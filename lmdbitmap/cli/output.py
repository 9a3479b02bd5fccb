"""All output: sentences, tables and JSON on stdout, progress on stderr.

Text from outside (names, paths, messages) passes through `printable`: a name must not be able to move the terminal's
cursor. rich is imported where it is needed; JSON and sentences do not need it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lmdbitmap.work.progress import Progress

_ROWS_PER_WRITE = 4096


def printable(text: str) -> str:
    """Return `text` on one line, with control characters and unprintable ones escaped."""
    return "".join(char if char.isprintable() else _spelled_out(char) for char in text)


def _spelled_out(char: str) -> str:
    return repr(char)[1:-1]


def say(text: str, *, aside: bool = False) -> None:
    """Print one line on stdout; with `aside` on stderr, because stdout carries something else."""
    print(printable(text), file=sys.stderr if aside else sys.stdout)


def complain(text: str) -> None:
    """Print one line on stderr, after the program's name. If stderr takes nothing, the exit code must do."""
    with contextlib.suppress(OSError):
        print(f"lmdbitmap: {printable(text)}", file=sys.stderr)


# --- JSON: plain ASCII, so that neither a locale nor a name that is not UTF-8 can spoil it ---


def say_json(value: object, *, aside: bool = False) -> None:
    print(json.dumps(value, indent=2, default=str), file=sys.stderr if aside else sys.stdout)


def stream_json(head: Mapping[str, object], key: str, rows: Iterable[str]) -> None:
    """Print `head` with `key` added last: a list of any length, in constant memory, one row per line.

    The rows are JSON already: a caller with millions of them can format each faster than the json module.
    """
    opening = json.dumps(head)[:-1]
    print(f"{opening}{', ' if head else ''}{json.dumps(key)}: [", end="")
    rows = iter(rows)
    separator = "\n"
    while batch := list(itertools.islice(rows, _ROWS_PER_WRITE)):
        print(separator + ",\n".join(batch), end="")
        separator = ",\n"
    print("\n]}")


def stream_lines(lines: Iterable[str]) -> None:
    """Print any number of lines; they must be printable already."""
    lines = iter(lines)
    while batch := list(itertools.islice(lines, _ROWS_PER_WRITE)):
        print("\n".join(batch))


# --- tables ---


def say_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table, with the columns in `right` aligned right. It is folded to fit a terminal, and whole in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    width = None if on_terminal else 100_000
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    page = io.StringIO()
    Console(file=page, force_terminal=on_terminal, width=width).print(table)
    print("".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines()), end="")


# --- progress ---


@contextlib.contextmanager
def progress(label: str, *, shown: bool) -> Iterator[Progress]:
    """Show a progress bar on stderr that vanishes at the end; if not `shown`, ignore the reports."""
    if not shown:
        yield _ignore
        return
    with _bar() as bar:
        task = bar.add_task(printable(label), total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report


def _ignore(done: int, total: int) -> None: ...


def _bar() -> Any:
    from rich import progress as rich
    from rich.console import Console

    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
