"""Random combinations of stand-alone bitmaps beside plain sets of blocks, across granularities."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.geometry import Geometry
from lmdbitmap.storage.schema import Bitmap
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.standalone import Operation
from tests.tracked import quick_folder

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
    return store.update(lambda writer: standalone.combine(writer, target, operation, sources))


def blocks_of(store: Store, name: str) -> set[int]:
    with store.read() as reader:
        bitmap = standalone.find(reader, name)
    return {block for run in standalone.runs(store, bitmap) for block in range(*run)}


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
        st.tuples(st.sampled_from("abc"), st.sampled_from(Operation), st.lists(st.sampled_from("abc"), max_size=3)),
        min_size=1,
        max_size=6,
    ),
)  # fmt: skip
def test_any_sequence_of_combinations_stays_beside_its_model(
    store: Store, size: int, sets: list[set[float]], steps: list[tuple[str, Operation, list[str]]]
) -> None:
    geometry = Geometry(size, 9)
    model = {name: fraction_of(geometry, places) for name, places in zip("abc", sets, strict=True)}
    replace_all(store, {name: (blocks, geometry) for name, blocks in model.items()})
    for target, operation, sources in steps:
        combine(store, target, operation, sources)
        for source in sources:
            model[target] = MODEL[operation](model[target], model[source])
        assert {name: blocks_of(store, name) for name in model} == model
