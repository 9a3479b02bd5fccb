"""The note of the newest transaction: it only goes up, and whatever it cannot say it does not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from lmdbitmap.storage.highwater import HighWater

STORE, OTHER = UUID(int=1), UUID(int=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "newest"


@pytest.fixture
def note(path: Path) -> Iterator[HighWater]:
    with closing(HighWater(str(path), STORE)) as note:
        yield note


def test_note_only_goes_up(note: HighWater) -> None:
    told = []
    for transaction in (7, 3, 8, 8, 2**64 - 1):
        note.raise_to(transaction)
        told.append(note.read())
    assert told == [7, 7, 8, 8, 2**64 - 1]
    note.set(5)
    assert note.read() == 5


def test_note_is_of_one_store(note: HighWater, path: Path) -> None:
    note.raise_to(7)
    with closing(HighWater(str(path), STORE)) as same, closing(HighWater(str(path), OTHER)) as other:
        assert (same.read(), other.read()) == (7, 0)
        other.raise_to(2)
        assert (same.read(), other.read()) == (0, 2)


def test_damaged_note_says_nothing(note: HighWater, path: Path) -> None:
    note.raise_to(7)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert note.read() == 0
    note.raise_to(9)
    assert note.read() == 9


def test_note_that_cannot_be_kept_is_missing_and_no_error(tmp_path: Path) -> None:
    with closing(HighWater(str(tmp_path / "no folder" / "newest"), STORE)) as note:
        note.raise_to(7)
        note.set(8)
        assert note.read() == 0
    note.close()
