"""What a connection's dirty contexts say, and what asking them costs the guest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdbitmap.errors import Busy, NotFound
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.server.contexts import StatusSource, one_question
from lmdbitmap.nbd.server.dirty_contexts import NAMESPACE, tracked_contexts
from lmdbitmap.storage import schema
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

BLOCK = 4096
EXTENT = 64 * BLOCK
BLOCKS = 64 * 8
SIZE = BLOCKS * BLOCK
CHECKPOINTS = ("start", "one", "two")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Filter]:
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked, tracked.attach() as disk:
        for name in CHECKPOINTS[1:]:
            disk.checkpoint(name)
        disk.background_pass()
        yield disk


def sources_of(disk: Filter) -> list[StatusSource]:
    contexts = tracked_contexts(NAME, disk)
    return [contexts[NAMESPACE + name] for name in CHECKPOINTS]


def dirty(source: StatusSource) -> set[int]:
    found, position = set[int](), 0
    for length, status in source(0, SIZE):
        if status:
            found.update(range(position // BLOCK, (position + length) // BLOCK))
        position += length
    assert position == SIZE
    return found


def test_contexts_that_are_asked_together_disarm_once(disk: Filter) -> None:
    first, second, third = sources_of(disk)
    disk.pwrite(b"x", 5 * BLOCK)
    with one_question():
        assert dirty(first) == {5}
        assert disk.armed_count == 0
        disk.pwrite(b"x", 7 * BLOCK)
        assert dirty(second) >= {5}
        assert dirty(third) >= {5}
        assert disk.armed_count == 1, "the guest's next write there needs no commit"
    with one_question():
        assert dirty(first) == {5, 7}
        assert disk.armed_count == 0


def test_context_that_is_asked_by_itself_answers_as_of_that_moment(disk: Filter) -> None:
    for number, source in enumerate(sources_of(disk) * 2):
        disk.pwrite(b"x", 3 * number * BLOCK)
        assert dirty(source) == {3 * earlier for earlier in range(number + 1)}
        assert disk.armed_count == 0


def test_asking_again_commits_nothing_where_nothing_changed(disk: Filter) -> None:
    first, second, _ = sources_of(disk)
    disk.pwrite(b"x", 5 * BLOCK)

    def newest() -> int:
        with disk.store.read() as reader:
            return reader.transaction

    with one_question():
        dirty(first)
    before = newest()
    for _ in range(3):
        disk.pwrite(b"y", 5 * BLOCK)
        with one_question():
            assert dirty(first) == dirty(second) == {5}
    assert newest() == before


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, BLOCKS - 1)),
        st.tuples(st.just("ask"), st.sampled_from(range(len(CHECKPOINTS)))),
        st.tuples(st.sampled_from(["begin", "end"]), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=25)
@pytest.mark.parametrize("durability", schema.DURABILITIES)
@given(steps=steps)
def test_no_answer_is_older_than_its_question(durability: str, steps: list[tuple[str, int]]) -> None:
    """Two connections: one asks questions of many contexts, the other just one in between."""
    with (
        quick_folder() as folder,
        closing(TrackedDisk(folder, SIZE, durability=durability).clean()) as tracked,
        tracked.attach() as disk,
    ):
        for name in CHECKPOINTS[1:]:
            disk.checkpoint(name)
        sources, (stranger, *_) = sources_of(disk), sources_of(disk)
        written, needed = set[int](), set[int]()
        begun = None
        for step, number in steps:
            if step == "write":
                disk.pwrite(b"x", number * BLOCK)
                written.add(number)
            elif step == "ask":
                assert dirty(sources[number]) >= (written if begun is None else needed)
                assert dirty(stranger) >= (written if begun is None else needed)
            elif step == "begin" and begun is None:
                begun, needed = one_question(), set(written)
                begun.__enter__()
            elif step == "end" and begun is not None:
                begun.__exit__(None, None, None)
                begun = None
        if begun is not None:
            begun.__exit__(None, None, None)


def test_context_whose_checkpoint_has_another_namesake_is_refused(disk: Filter) -> None:
    first, _, third = sources_of(disk)
    disk.forget("two")
    disk.checkpoint("two")
    with one_question():
        dirty(first)
        with pytest.raises(NotFound, match="another has its name"):
            dirty(third)


def test_question_about_more_than_a_disk_that_was_made_smaller_is_refused(disk: Filter) -> None:
    """The connection compared its range with the size of before. The rest is dirty once the disk grows again."""
    source, *_ = sources_of(disk)
    disk.resize(SIZE // 2)
    with pytest.raises(Busy, match="made smaller"):
        dirty(source)
    assert list(source(0, SIZE // 2)) == [(SIZE // 2, 0)]
    disk.resize(SIZE)
    assert dirty(source) == set(range(BLOCKS // 2, BLOCKS))
