"""The map of dirt: a disk as a grid of cells, each an equal share of it, and pictures of the grid.

A map must not show a cell as clean or as full if it is not. So only the shades between the two are rough: `NONE` means
not one dirty byte, `ALL` means every byte of the cell.

Bits are counted slice by slice. The time depends on the size of the bitmap, not on how scattered the dirt is. The
memory is one slice and one number for each cell.

A PNG of squares in five colours is a palette and one zlib stream: no imaging package is needed for it.
"""

from __future__ import annotations

import enum
import html
import itertools
import struct
import textwrap
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lmdbitmap import bits
from lmdbitmap.geometry import REGION_BLOCKS, Geometry, ceil_div
from lmdbitmap.tracker.slices import Slice


class Shade(enum.Enum):
    """How much of a cell is dirty."""

    NONE = "none"
    SOME = "some"
    """At least a byte, at most half."""
    MOST = "most"
    """More than half, and not all."""
    ALL = "all"


class Cell(NamedTuple):
    """Bytes [offset, offset + length) of a disk, of which `dirty_bytes` are dirty."""

    offset: int
    length: int
    dirty_bytes: int

    @property
    def shade(self) -> Shade:
        if self.dirty_bytes == 0:
            return Shade.NONE
        if self.dirty_bytes == self.length:
            return Shade.ALL
        return Shade.MOST if 2 * self.dirty_bytes > self.length else Shade.SOME


class DirtMap:
    """The cells of a disk: the same number of whole blocks in each; the last cell may be shorter."""

    def __init__(self, geometry: Geometry, columns: int, most_rows: int) -> None:
        self.geometry = geometry
        self.columns = columns
        self.cell_blocks = max(ceil_div(geometry.block_count, columns * most_rows), 1)
        self._dirty_blocks = [0] * ceil_div(geometry.block_count, self.cell_blocks)
        self._last_dirty = False
        """Whether the disk's last block, which may be short, is dirty."""

    def count(self, part: Slice) -> None:
        """Add the dirt of a slice; no block may be in two slices."""
        base, size = part.region * REGION_BLOCKS, self.cell_blocks
        stop = min(base + 8 * len(part.dirty), self.geometry.block_count)
        for number in range(base // size, ceil_div(stop, size)):
            first, last = max(number * size, base), min((number + 1) * size, stop)
            self._dirty_blocks[number] += bits.count_ones(part.dirty, first - base, last - base)
        if base < stop == self.geometry.block_count:
            self._last_dirty = bits.count_ones(part.dirty, stop - base - 1, stop - base) == 1

    def cells(self) -> Iterator[Cell]:
        last = len(self._dirty_blocks) - 1
        for number, dirty in enumerate(self._dirty_blocks):
            start = number * self.cell_blocks
            offset, length = self.geometry.bytes_of(start, start + self.cell_blocks)
            with_last = number == last and self._last_dirty
            yield Cell(offset, length, self.geometry.bytes_in(dirty, with_last=with_last))

    def rows(self) -> Iterator[list[Cell]]:
        """Yield the cells in rows of `columns`; the last row may have fewer."""
        cells = self.cells()
        while row := list(itertools.islice(cells, self.columns)):
            yield row

    @property
    def cell_bytes(self) -> int:
        return self.cell_blocks * self.geometry.granularity

    @property
    def dirty_bytes(self) -> int:
        return sum(cell.dirty_bytes for cell in self.cells())


# --- pictures ---

_COLOURS = {Shade.NONE: "#e3e7ea", Shade.SOME: "#f0b04a", Shade.MOST: "#d1580b", Shade.ALL: "#561c00"}
"""Each is darker than the one before it, so that the map does not depend on hues."""
_BACKGROUND = "#ffffff"
_SQUARE = 7
_PITCH = 8
"""Pixels from one cell to the next: its square and a gap."""
_MARGIN = 16


class Caption(NamedTuple):
    """The text of a picture. Unprintable characters are replaced."""

    title: str
    lines: Sequence[str]
    legend: str
    """The text after the four shades."""
    format_offset: Callable[[int], str]
    """Formats the offset of a row's first byte."""


# --- SVG ---

_GUTTER = 72
"""Pixels on the left, for the offsets of rows."""
_LABELLED_ROWS = 4
"""One in this many rows has its offset beside it."""
_LINE = 20
_TITLE_CHARS = 110
_LINE_CHARS = 150


def svg(dirt: DirtMap, caption: Caption) -> str:
    """Return the map under its caption, with a legend below; `<title>` and `<desc>` are for screen readers."""
    words, grid = [*_svg_lines(caption)], [*dirt.rows()]
    top = _MARGIN + len(words) * _LINE + _LINE // 2
    bottom = top + len(grid) * _PITCH + _LINE
    parts = [
        *_svg_head(_GUTTER + dirt.columns * _PITCH + _MARGIN, bottom + _LINE, caption),
        *words,
        *_svg_offsets(grid, top, caption),
        *_svg_cells(grid, top),
        *_svg_legend(bottom, caption),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _svg_head(width: int, height: int, caption: Caption) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" role="img" aria-labelledby="title description"'
        ' font-family="sans-serif" font-size="13" fill="#222">'
    )
    yield f'<title id="title">{_xml(caption.title)}</title>'
    yield f'<desc id="description">{_xml("; ".join(_in_words(caption)))}</desc>'
    yield f'<rect width="{width}" height="{height}" fill="{_BACKGROUND}"/>'


def _in_words(caption: Caption) -> list[str]:
    """Return the text of a picture for people who cannot see it."""
    shades = ", ".join(shade.value for shade in Shade)
    return [*caption.lines, f"shades for {shades} {caption.legend}"]


def _svg_lines(caption: Caption) -> Iterator[str]:
    """Yield the title and the caption's lines, wrapped to the width of the picture."""
    title = textwrap.wrap(caption.title, _TITLE_CHARS)
    rest = [part for line in caption.lines for part in textwrap.wrap(line, _LINE_CHARS)]
    for number, line in enumerate([*title, *rest], 1):
        weight = ' font-size="16" font-weight="bold"' if number <= len(title) else ""
        yield _svg_text(_MARGIN, _MARGIN // 2 + number * _LINE, line, weight)


def _svg_offsets(grid: Sequence[Sequence[Cell]], top: int, caption: Caption) -> Iterator[str]:
    style = ' text-anchor="end" font-size="11" fill="#666"'
    for number in range(0, len(grid), _LABELLED_ROWS):
        label = caption.format_offset(grid[number][0].offset)
        yield _svg_text(_GUTTER - _PITCH, top + number * _PITCH + _PITCH, label, style)


def _svg_cells(grid: Sequence[Sequence[Cell]], top: int) -> Iterator[str]:
    """Yield for each shade one path of lines, dashed into squares: separate squares take up to ten times the room."""
    lines: dict[Shade, list[str]] = {shade: [] for shade in Shade}
    for y, row in enumerate(grid):
        x = 0
        for shade, alike in itertools.groupby(row, key=lambda cell: cell.shade):
            count = len([*alike])
            corner = f"M{_GUTTER + x * _PITCH} {top + y * _PITCH + _SQUARE / 2}"
            lines[shade].append(f"{corner}h{count * _PITCH - (_PITCH - _SQUARE)}")
            x += count
    style = f'stroke-width="{_SQUARE}" stroke-dasharray="{_SQUARE} {_PITCH - _SQUARE}"'
    for shade, found in lines.items():
        if found:
            yield f'<path class="{shade.value}" stroke="{_COLOURS[shade]}" {style} d="{"".join(found)}"/>'


def _svg_legend(top: int, caption: Caption) -> Iterator[str]:
    """Yield the names of the shades, each after its square."""
    step = 9 * _PITCH
    for number, shade in enumerate(Shade):
        x = _GUTTER + number * step
        yield f'<rect x="{x}" y="{top - 10}" width="12" height="12" fill="{_COLOURS[shade]}"/>'
        yield _svg_text(x + 18, top, shade.value)
    yield _svg_text(_GUTTER + len(Shade) * step, top, caption.legend)


def _svg_text(x: int, y: int, text: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}"{style}>{_xml(text)}</text>'


def _xml(text: str) -> str:
    """Return `text` for an XML document, which cannot hold most control characters."""
    return html.escape(_printable(text))


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


# --- PNG ---

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SVG_SIGNATURE = b"<svg "
"""The first bytes of our pictures."""

_PALETTE = [_BACKGROUND, *_COLOURS.values()]
_NUMBERS = {shade: number for number, shade in enumerate(_COLOURS, 1)}
"""The index of each shade's colour in the palette, after the background."""


def png(dirt: DirtMap, caption: Caption) -> bytes:
    """Return the map alone, at the scale of the SVG; the caption is in text chunks, which viewers can show."""
    width = 2 * _MARGIN + dirt.columns * _PITCH
    pixels = [b"\0" + row for row in _pixel_rows(dirt, width)]  # 0: unfiltered
    header = struct.pack(">IIBBBBB", width, len(pixels), 8, 3, 0, 0, 0)  # 8 bits a pixel, from a palette
    palette = b"".join(bytes.fromhex(colour[1:]) for colour in _PALETTE)
    chunks = [
        _chunk(b"IHDR", header),
        _chunk(b"PLTE", palette),
        _text_chunk("Title", caption.title),
        _text_chunk("Description", "\n".join(_in_words(caption))),
        _chunk(b"IDAT", zlib.compress(b"".join(pixels), 9)),
        _chunk(b"IEND", b""),
    ]
    return PNG_SIGNATURE + b"".join(chunks)


def _pixel_rows(dirt: DirtMap, width: int) -> Iterator[bytes]:
    """Yield the rows of the picture from top to bottom, one byte per pixel: its index in the palette."""
    blank, gap = bytes(width), bytes(_PITCH - _SQUARE)
    yield from itertools.repeat(blank, _MARGIN)
    for row in dirt.rows():
        squares = b"".join(bytes([_NUMBERS[cell.shade]]) * _SQUARE + gap for cell in row)
        yield from itertools.repeat((bytes(_MARGIN) + squares).ljust(width, b"\0"), _SQUARE)
        yield from itertools.repeat(blank, len(gap))
    yield from itertools.repeat(blank, _MARGIN)


def _text_chunk(keyword: str, text: str) -> bytes:
    """Return an `iTXt` chunk: the keyword, zeroes (no compression, no language, no translation), and UTF-8 text."""
    lines = "\n".join(map(_printable, text.split("\n")))
    return _chunk(b"iTXt", keyword.encode("ascii") + b"\0\0\0\0\0" + lines.encode())


def _chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk: the length of the data, the kind, the data, and the CRC-32 of kind and data."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
