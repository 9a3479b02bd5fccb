"""The map of dirt: what a shade may say, and that pictures show the cells, read by other eyes than drew them."""

from __future__ import annotations

import itertools
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator

import pytest

from lmdbitmap import render
from lmdbitmap.geometry import REGION_BLOCKS, Geometry
from lmdbitmap.render import Caption, Cell, DirtMap, Shade
from lmdbitmap.tracker.slices import Slice

SVG = "{http://www.w3.org/2000/svg}"
CAPTION = Caption("sda: a title", ["exact", "and more"], "of a cell", str)
SHADES = [Shade.SOME, Shade.MOST, Shade.ALL, Shade.NONE, Shade.NONE, Shade.SOME]
"""Of `_small_map`, whose second row has two cells."""


def _map(size: int, columns: int, rows: int, *dirty_blocks: int) -> DirtMap:
    seen = DirtMap(Geometry(size, 9), columns, rows)
    bits = bytearray(REGION_BLOCKS // 8)
    for block in dirty_blocks:
        bits[block // 8] |= 1 << block % 8
    seen.count(Slice(0, bits, loose=False))
    return seen


def _small_map() -> DirtMap:
    """Six cells of three blocks in rows of four; the last block has a single byte."""
    return _map(17 * 512 + 1, 4, 2, 0, 3, 5, 6, 7, 8, 15)


@pytest.mark.parametrize(
    ("dirty_bytes", "shade"),
    [(0, Shade.NONE), (1, Shade.SOME), (500_000, Shade.SOME), (500_001, Shade.MOST), (999_999, Shade.MOST),
     (1_000_000, Shade.ALL)],
)  # fmt: skip
def test_only_nothing_looks_clean_and_only_everything_full(dirty_bytes: int, shade: Shade) -> None:
    assert Cell(0, 1_000_000, dirty_bytes).shade is shade


def test_one_dirty_block_of_a_huge_disk_is_seen() -> None:
    seen = DirtMap(Geometry(64 << 40, 16), 64, 16)
    seen.count(Slice(REGION_BLOCKS, bytearray([0, 4]), loose=False))
    dirty = [
        (number, cell.dirty_bytes) for number, cell in enumerate(seen.cells()) if cell.shade is Shade.SOME
    ]
    assert dirty == [((REGION_BLOCKS * REGION_BLOCKS + 10) // (1 << 20), 1 << 16)]


def test_a_short_last_block_can_fill_its_cell() -> None:
    [cell] = _map(513, 1, 1, 0, 1).cells()
    assert cell == (0, 513, 513)
    assert cell.shade is Shade.ALL
    [cell] = _map(513, 1, 1, 1).cells()
    assert cell.dirty_bytes == 1


def test_a_disk_of_few_blocks_has_a_cell_for_each() -> None:
    assert [cell.length for cell in _map(3 * 512, 64, 16).cells()] == [512, 512, 512]


def test_the_small_map_is_as_the_tests_of_pictures_take_it() -> None:
    assert [cell.shade for cell in _small_map().cells()] == SHADES


# --- SVG ---


def test_an_svg_has_a_square_for_each_cell() -> None:
    page = ElementTree.fromstring(render.svg(_small_map(), CAPTION))
    found = sorted((y, x, shade) for shade, x, y in _svg_squares(page))
    columns, rows = sorted({x for _, x, _ in found}), sorted({y for y, _, _ in found})
    assert [shade for _, _, shade in found] == [shade.value for shade in SHADES]
    assert [(rows.index(y), columns.index(x)) for y, x, _ in found] == [divmod(n, 4) for n in range(6)]


def _svg_squares(page: ElementTree.Element) -> Iterator[tuple[str, int, int]]:
    """The shade and the upper left corner of each dash of the lines."""
    for path in page.iter(f"{SVG}path"):
        assert (path.attrib["stroke-width"], path.attrib["stroke-dasharray"]) == ("7", "7 1")
        lines = re.findall(r"M(\d+) (\d+)\.5h(\d+)", path.attrib["d"])
        assert path.attrib["d"] == "".join(f"M{x} {y}.5h{length}" for x, y, length in lines)
        for x, y, length in lines:
            dashes = range(int(x), int(x) + int(length), 8)
            assert dashes[-1] + 7 == int(x) + int(length), "the last dash is not cut short"
            yield from ((path.attrib["class"], dash, int(y) - 3) for dash in dashes)


def test_all_of_an_svg_lies_on_it() -> None:
    page = ElementTree.fromstring(render.svg(_small_map(), CAPTION))
    width, height = int(page.attrib["width"]), int(page.attrib["height"])
    assert page.attrib["viewBox"] == f"0 0 {width} {height}"
    assert all(x + 7 < width and y + 7 < height for _, x, y in _svg_squares(page))
    assert all(0 < int(text.attrib["y"]) < height for text in page.iter(f"{SVG}text"))


def test_an_svg_says_in_words_what_it_shows() -> None:
    page = ElementTree.fromstring(render.svg(_small_map(), CAPTION))
    told = {page.findtext(f"{SVG}{tag}") for tag in ("title", "desc")}
    assert told == {"sda: a title", "exact; and more; shades for none, some, most, all of a cell"}
    assert page.attrib["role"] == "img"
    shown = [text.text for text in page.iter(f"{SVG}text")]
    assert shown == ["sda: a title", "exact", "and more", "0", *(shade.value for shade in Shade), "of a cell"]


def test_rows_are_labelled_with_their_offsets() -> None:
    page = ElementTree.fromstring(render.svg(_map(18 * 512, 2, 9), CAPTION))
    shown = [text.text for text in page.iter(f"{SVG}text")]
    assert [str(row * 2 * 512) for row in (0, 4, 8)] == shown[3:6]


@pytest.mark.parametrize("name", ["<&>\"'", "a\x00\x1b[2Jb", "\ud800\uffff", "é \N{FULL BLOCK}"])
def test_no_name_can_spoil_an_svg(name: str) -> None:
    text = render.svg(_small_map(), CAPTION._replace(title=name, lines=[name], legend=name))
    page = ElementTree.fromstring(text.encode())
    assert page.findtext(f"{SVG}title") == "".join(c if c.isprintable() else "\ufffd" for c in name)


def test_long_words_are_wrapped_to_the_picture() -> None:
    lines = CAPTION._replace(lines=["because " * 60])
    page = ElementTree.fromstring(render.svg(_small_map(), lines))
    shown = [text.text or "" for text in page.iter(f"{SVG}text")]
    assert sum("because" in text for text in shown) == 4
    assert max(map(len, shown)) <= 150


# --- PNG ---


def test_a_png_has_a_square_for_each_cell() -> None:
    rows, palette, _ = _decoded(render.png(_small_map(), CAPTION))
    background, *colours = palette
    by_shade = dict(zip(Shade, colours, strict=True))
    drawn = dict(zip((divmod(n, 4) for n in range(6)), (by_shade[shade] for shade in SHADES), strict=True))
    wrong = [
        (x, y)
        for y, row in enumerate(rows)
        for x, colour in enumerate(row)
        if colour != _expected(x - 16, y - 16, drawn, background)
    ]
    assert wrong == []
    assert (len(rows[0]), len(rows)) == (16 + 4 * 8 + 16, 16 + 2 * 8 + 16)


def _expected(x: int, y: int, drawn: dict[tuple[int, int], bytes], background: bytes) -> bytes:
    in_gap = x % 8 == 7 or y % 8 == 7
    return background if in_gap else drawn.get((y // 8, x // 8), background)


def test_the_words_of_a_png_are_in_its_text() -> None:
    caption = CAPTION._replace(title="disk é\x00", lines=["one", "two"])
    assert _decoded(render.png(_small_map(), caption))[2] == {
        "Title": "disk é\ufffd",
        "Description": "one\ntwo\nshades for none, some, most, all of a cell",
    }


def test_a_disk_without_blocks_has_pictures_too() -> None:
    empty = DirtMap(Geometry(0, 16), 4, 2)
    assert list(empty.cells()) == []
    assert len(_decoded(render.png(empty, CAPTION))[0]) == 32
    assert list(_svg_squares(ElementTree.fromstring(render.svg(empty, CAPTION)))) == []


def test_pictures_begin_as_we_know_them_again() -> None:
    assert render.svg(_small_map(), CAPTION).encode().startswith(render.SVG_SIGNATURE)
    assert render.png(_small_map(), CAPTION).startswith(render.PNG_SIGNATURE)


def test_each_shade_is_darker_than_the_one_before_it_by_far() -> None:
    _, palette, _ = _decoded(render.png(_small_map(), CAPTION))
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in palette[1:]]
    assert len(light) == len(Shade)
    assert all(dark + 40 < pale for pale, dark in itertools.pairwise(light))


def _decoded(png: bytes) -> tuple[list[list[bytes]], list[bytes], dict[str, str]]:
    """The pixels as colours, the palette, and the texts: an image of 8 bits a pixel, nothing filtered."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = list(_chunks(png[8:]))
    assert [kind for kind, _ in chunks] == [b"IHDR", b"PLTE", b"iTXt", b"iTXt", b"IDAT", b"IEND"]
    kinds = dict(chunks)
    width, height, *form = struct.unpack(">IIBBBBB", kinds[b"IHDR"])
    assert form == [8, 3, 0, 0, 0]
    palette = [kinds[b"PLTE"][n : n + 3] for n in range(0, len(kinds[b"PLTE"]), 3)]
    texts = dict(_text(data) for kind, data in chunks if kind == b"iTXt")
    data = zlib.decompress(kinds[b"IDAT"])
    lines = [data[n : n + width + 1] for n in range(0, len(data), width + 1)]
    assert len(lines) == height
    assert {line[0] for line in lines} == {0}
    return [[palette[n] for n in line[1:]] for line in lines], palette, texts


def _chunks(rest: bytes) -> Iterator[tuple[bytes, bytes]]:
    while rest:
        (length,) = struct.unpack_from(">I", rest)
        kind, data, crc = rest[4:8], rest[8 : 8 + length], rest[8 + length : 12 + length]
        assert crc == zlib.crc32(kind + data).to_bytes(4, "big")
        yield kind, data
        rest = rest[12 + length :]


def _text(data: bytes) -> tuple[str, str]:
    keyword, _, rest = data.partition(b"\0")
    assert rest[:4] == bytes(4)
    return keyword.decode("latin-1"), rest[4:].decode()
