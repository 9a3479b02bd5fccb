"""What people and programs get to see: sentences, tables and JSON on stdout, progress on stderr.

Text that comes from outside (names, paths, messages) passes through `printable`: a name must not be able to
move the cursor of whoever lists it. rich is imported where it is needed; JSON and sentences do without.
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
    """`text` on one line, with everything that a terminal would obey or cannot show spelled out."""
    return "".join(char if char.isprintable() else _spelled_out(char) for char in text)


def _spelled_out(char: str) -> str:
    return repr(char)[1:-1]


def say(text: str, *, aside: bool = False) -> None:
    """One line on stdout; `aside` puts it on stderr, where stdout is for something else."""
    print(printable(text), file=sys.stderr if aside else sys.stdout)


def complain(text: str) -> None:
    """One line on stderr, under the program's name."""
    print(f"lmdbitmap: {printable(text)}", file=sys.stderr)


# --- JSON: plain ASCII, so that neither a locale nor a name that is not UTF-8 can spoil it ---


def say_json(value: object, *, aside: bool = False) -> None:
    print(json.dumps(value, indent=2, default=str), file=sys.stderr if aside else sys.stdout)


def stream_json(head: Mapping[str, object], key: str, rows: Iterable[str]) -> None:
    """`head` with `key` added last, a list of any length in constant memory, one row on a line.

    The rows are JSON already: whoever has millions of them knows a faster way to write each than we do.
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
    """Lines of our own making, any number of them."""
    lines = iter(lines)
    while batch := list(itertools.islice(lines, _ROWS_PER_WRITE)):
        print("\n".join(batch))


# --- tables ---


def say_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Columns under their headings; those named in `right` are numbers. Fit to a terminal, whole in a pipe."""
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
    """A bar on stderr that vanishes at the end; where it is not `shown` the reports go nowhere."""
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
