"""The map's cells beside a model that asks about every byte."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.geometry import REGION_BLOCKS, Geometry
from lmdbitmap.render import Cell, DirtMap, Shade
from lmdbitmap.tracker.slices import Slice

GRANULARITY = 512

sizes = st.one_of(
    st.integers(0, 40 * GRANULARITY),
    st.builds(
        lambda regions, rest: max(regions * REGION_BLOCKS * GRANULARITY + rest, 0),
        st.integers(1, 3),
        st.integers(-3 * GRANULARITY, 3 * GRANULARITY),
    ),
)
dirt = st.lists(
    st.tuples(st.integers(0, 4 * REGION_BLOCKS), st.one_of(st.integers(1, 9), st.integers(1, 9000))),
    max_size=8,
)


@given(sizes, dirt, st.integers(1, 9), st.integers(1, 40), st.integers(1, 3))
def test_cells_are_what_asking_about_every_byte_gives(
    size: int, dirt: list[tuple[int, int]], columns: int, rows: int, slice_regions: int
) -> None:
    geometry = Geometry(size, 9)
    dirty = _dirty_bytes(geometry, dirt)
    seen = DirtMap(geometry, columns, rows)
    for part in _slices(geometry, dirty, slice_regions):
        seen.count(part)
    cells = list(seen.cells())
    assert len(cells) <= columns * rows
    assert b"".join(_covered(cell, dirty) for cell in cells) == dirty
    assert {cell.length for cell in cells[:-1]} <= {seen.cell_bytes}
    assert seen.dirty_bytes == sum(dirty)
    assert [len(row) for row in seen.rows()] == [
        len(cells[i : i + columns]) for i in range(0, len(cells), columns)
    ]


def _dirty_bytes(geometry: Geometry, runs: list[tuple[int, int]]) -> bytes:
    """A byte for each byte of the disk, 1 if it is dirty."""
    blocks = bytearray(geometry.block_count)
    for start, length in runs:
        stop = min(start + length, len(blocks))
        blocks[start:stop] = b"\1" * max(stop - start, 0)
    return b"".join(bytes([block]) * GRANULARITY for block in blocks)[: geometry.size]


def _slices(geometry: Geometry, dirty: bytes, regions: int) -> Iterator[Slice]:
    """As `Changes.slices`: a clean one is left out, and the last may reach past the end of the disk."""
    blocks = dirty[::GRANULARITY]
    for region in range(0, geometry.region_count, regions):
        part = blocks[region * REGION_BLOCKS : (region + regions) * REGION_BLOCKS]
        if any(part):
            bits = sum(1 << number for number, one in enumerate(part) if one)
            yield Slice(region, bytearray(bits.to_bytes(regions * REGION_BLOCKS // 8, "little")), loose=False)


def _covered(cell: Cell, dirty: bytes) -> bytes:
    """The part of the model under a cell, which has to agree with it."""
    part = dirty[cell.offset : cell.offset + cell.length]
    assert len(part) == cell.length > 0
    assert cell.dirty_bytes == sum(part)
    assert (cell.shade is Shade.NONE) == (not any(part))
    assert (cell.shade is Shade.ALL) == all(part)
    assert (cell.shade is Shade.MOST) == (len(part) / 2 < sum(part) < len(part))
    return part
