"""Random combinations of stand-alone bitmaps beside plain sets of blocks, across granularities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import reduce
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdbitmap.errors import AlreadyExists, InvalidArgument, NotFound, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import Geometry
from lmdbitmap.storage.schema import Bitmap, region_key
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.standalone import Operation
from tests.helpers.tracked import quick_folder

MODEL: dict[Operation, Callable[[set[int], set[int]], set[int]]] = {
    Operation.OR: lambda left, right: left | right,
    Operation.AND: lambda left, right: left & right,
    Operation.AND_NOT: lambda left, right: left - right,
    Operation.XOR: lambda left, right: left ^ right,
}


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with quick_folder() as folder, Store.create(str(folder / "store")) as store:
        yield store


def fraction_of(geometry: Geometry, places: set[float]) -> set[int]:
    """The blocks at these places between 0 and 1 of the disk."""
    return {int(place * geometry.block_count) for place in places}


def regrained(blocks: set[int], source: Geometry, target: Geometry) -> set[int]:
    """Byte by byte, in the plainest way: every target block that shares a byte with a dirty one."""
    return {
        offset // target.granularity
        for block in blocks
        for offset in range(
            block * source.granularity,
            min((block + 1) * source.granularity, source.size),
            min(source.granularity, target.granularity),
        )
    }


def replace_all(store: Store, kept: dict[str, tuple[set[int], Geometry]]) -> None:
    def change(writer: Writer) -> None:
        for bitmap in writer.bitmaps():
            standalone.remove(writer, bitmap.name or "")
        for name, (blocks, geometry) in kept.items():
            runs = [(block, block + 1) for block in sorted(blocks)]
            standalone.create(writer, name, geometry, standalone.dirt_of_runs(runs, geometry))

    store.update(change)


def combine(store: Store, target: str, operation: Operation, sources: list[str]) -> Bitmap:
    return standalone.combine(store, target, operation, sources)


def blocks_of(store: Store, name: str) -> set[int]:
    return {block for run in standalone.runs(store, bitmap_of(store, name)) for block in range(*run)}


places = st.sets(st.floats(0, 1, exclude_max=True), max_size=12)


@settings(max_examples=150)
@given(
    size=st.integers(1, 1 << 26),
    left_bits=st.integers(9, 16),
    right_bits=st.integers(9, 16),
    left_places=places,
    right_places=places,
    operation=st.sampled_from(Operation),
)
def test_two_bitmaps_combine_like_sets_of_the_blocks_that_they_touch(
    store: Store,
    size: int,
    left_bits: int,
    right_bits: int,
    left_places: set[float],
    right_places: set[float],
    operation: Operation,
) -> None:
    left, right = Geometry(size, left_bits), Geometry(size, right_bits)
    mine, theirs = fraction_of(left, left_places), fraction_of(right, right_places)
    replace_all(store, {"mine": (mine, left), "theirs": (theirs, right)})
    one_granularity = left_bits == right_bits
    if operation in (Operation.AND_NOT, Operation.XOR) and not one_granularity:
        with pytest.raises(InvalidArgument):
            combine(store, "mine", operation, ["theirs"])
        assert blocks_of(store, "mine") == mine
    else:
        after = combine(store, "mine", operation, ["theirs"])
        assert blocks_of(store, "mine") == MODEL[operation](mine, regrained(theirs, right, left))
        assert (after.superset is not None) == (left_bits < right_bits)
    assert blocks_of(store, "theirs") == theirs


@settings(max_examples=60)
@given(
    size=st.integers(1, 1 << 26),
    sets=st.lists(places, min_size=3, max_size=3),
    steps=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from(Operation),
            st.lists(st.sampled_from("abcd"), max_size=3),
            st.sampled_from([None, "d"]),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_any_sequence_of_combinations_stays_beside_its_model(
    store: Store,
    size: int,
    sets: list[set[float]],
    steps: list[tuple[str, Operation, list[str], str | None]],
) -> None:
    """The bitmap `d` is there once something was combined into it."""
    geometry = Geometry(size, 9)
    model = {name: fraction_of(geometry, places) for name, places in zip("abc", sets, strict=True)}
    replace_all(store, {name: (blocks, geometry) for name, blocks in model.items()})
    for target, operation, sources, into in steps:
        if not is_possible(model, target, sources, into):
            with pytest.raises((NotFound, AlreadyExists, InvalidArgument)):
                standalone.combine(store, target, operation, sources, into=into)
        else:
            standalone.combine(store, target, operation, sources, into=into)
            step = MODEL[operation]
            model[into or target] = reduce(step, (model[source] for source in sources), model[target])
        assert {name: blocks_of(store, name) for name in model} == model
        assert names_in(store) == sorted(model)


def is_possible(model: dict[str, set[int]], target: str, sources: list[str], into: str | None) -> bool:
    return set(sources) <= set(model) and (target not in sources if into is None else into not in model)


def names_in(store: Store) -> list[str | None]:
    with store.read() as reader:
        return [bitmap.name for bitmap in reader.bitmaps()]


class Told(NamedTuple):
    """A bitmap as it is made: what it is told, and how far that, or its record, is to be believed."""

    changed: set[float]
    superfluous: set[float]
    granularity_bits: int
    kind: str

    def keep(self, writer: Writer, name: str, size: int) -> set[int]:
        """Answers the blocks that really changed."""
        geometry = Geometry(size, self.granularity_bits)
        changed, dirty = fraction_of(geometry, self.changed), fraction_of(geometry, self.changed)
        if self.kind == "superset":
            dirty |= fraction_of(geometry, self.superfluous)
        dirt = standalone.dirt_of_runs([(block, block + 1) for block in sorted(dirty)], geometry)
        superset, all_dirty = ("because" if self.kind == kind else None for kind in ("superset", "all dirty"))
        bitmap = standalone.create(writer, name, geometry, dirt, superset=superset, all_dirty=all_dirty)
        if self.kind == "damaged":
            writer._put("regions", region_key(bitmap.id, 0), b"rot")
        return changed


told = st.builds(
    Told,
    places,
    places,
    st.sampled_from([9, 9, 11]),
    st.sampled_from(["exact", "superset", "all dirty", "damaged"]),
)


@settings(max_examples=200)
@given(
    size=st.integers(1, 1 << 22),
    bitmaps=st.lists(told, min_size=2, max_size=4),
    steps=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(Operation), st.integers(0, 9), st.booleans()),
        min_size=1,
        max_size=8,
    ),
)
def test_what_really_changed_is_dirty_whatever_is_combined(
    store: Store, size: int, bitmaps: list[Told], steps: list[tuple[int, Operation, int, bool]]
) -> None:
    """And nothing else, where the answer calls itself exact."""
    replace_all(store, {})
    named = list(zip("abcd", bitmaps, strict=False))
    truth = store.update(lambda writer: {name: one.keep(writer, name, size) for name, one in named})
    for number, (left, operation, right, is_apart) in enumerate(steps):
        name, other = (list(truth)[which % len(truth)] for which in (left, right))
        into = f"new {number}" if is_apart else None
        geometry, theirs = bitmap_of(store, name).geometry, bitmap_of(store, other).geometry
        with contextlib.suppress(InvalidArgument, Untrusted):
            standalone.combine(store, name, operation, [other], into=into)
            truth[into or name] = MODEL[operation](truth[name], seen(truth[other], theirs, geometry))
        check_truth(store, truth)


def seen(changed: set[int], theirs: Geometry, mine: Geometry) -> set[int]:
    """What changed in one block of theirs may be in the first byte of it only."""
    if mine.granularity >= theirs.granularity:
        return regrained(changed, theirs, mine)
    return {block * theirs.granularity // mine.granularity for block in changed}


def check_truth(store: Store, truth: dict[str, set[int]]) -> None:
    for name, changed in truth.items():
        bitmap, named = bitmap_of(store, name), blocks_of(store, name)
        is_damaged = any(part.loose for part in standalone.slices(store, bitmap))
        is_exact = standalone.trust(bitmap) is Trust.EXACT and not is_damaged
        assert named == changed if is_exact else named >= changed


def bitmap_of(store: Store, name: str) -> Bitmap:
    with store.read() as reader:
        return standalone.find(reader, name)
