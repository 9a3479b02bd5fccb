"""One line per figure, a plain-text table of them, and the same as JSON."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """A figure. `ratio` compares it with `peer` in the same run; without a ratio the target is for the value."""

    name: str
    value: float
    unit: str
    peer: str
    ratio: float | None
    target: str
    """Such as `>= 3` or `< 40 MiB`; a target that is not a comparison is only shown."""
    note: str = ""


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_HEADINGS = ("what", "measured", "against", "ratio", "target", "met", "note")


def met(line: Line) -> bool | None:
    """Return whether the line meets its target; None if the target is not a comparison."""
    found = re.match(r"(<=|>=|<|>) *([0-9.]+)", line.target)
    if found is None:
        return None
    measured = line.value if line.ratio is None else line.ratio
    return _COMPARE[found[1]](measured, float(found[2]))


def as_text(lines: Sequence[Line]) -> str:
    """Return the table with aligned columns, numbers to the right."""
    rows = [_HEADINGS, *(_cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(_padded(row, widths) for row in rows)


def _cells(line: Line) -> tuple[str, ...]:
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}x"
    verdict = {True: "yes", False: "NO", None: ""}[met(line)]
    measured = f"{_short(line.value)} {line.unit}"
    return line.name, measured, line.peer, ratio, line.target, verdict, line.note


def _short(value: float) -> str:
    """Return a number with three significant digits; from 100 on without a fraction."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _padded(row: tuple[str, ...], widths: list[int]) -> str:
    numbers = {1, 3}
    cells = [
        cell.rjust(width) if column in numbers else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def write_json(lines: Iterable[Line], path: Path) -> None:
    """Replace `path` by a JSON array of the lines, each with its verdict."""
    rows = [{**line._asdict(), "met": met(line)} for line in lines]
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(rows, indent=2) + "\n")
    os.replace(unfinished, path)
