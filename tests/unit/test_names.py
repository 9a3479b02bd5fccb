"""What is no name, or no list of names, is refused as that, whatever it is given to."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lmdbitmap
from lmdbitmap import InvalidArgument, Store
from tests.helpers.support import make_raw_image
from tests.helpers.tracked import quick_folder


@pytest.fixture
def store() -> Iterator[Store]:
    with quick_folder() as folder, Store.create(str(folder / "store")) as store:
        lmdbitmap.add(store, "sda", str(make_raw_image(folder / "sda.raw", 4096)), granularity_bits=12)
        yield store


def beside(store: Store, name: str) -> str:
    return str(Path(store.path).parent / name)


Taker = Callable[[Store, Any], object]

TAKERS: dict[str, Taker] = {
    "adopt": lambda store, name: lmdbitmap.adopt(store, name),
    "ask_changes": lambda store, name: lmdbitmap.ask_changes(store, name),
    "attach": lambda store, name: lmdbitmap.Filter.attach(store, name),
    "back_up": lambda store, name: lmdbitmap.back_up(store, ["sda", name], beside(store, "backups")),
    "changes_of": lambda store, name: lmdbitmap.changes_of(store, name),
    "checkpoint": lambda store, name: lmdbitmap.checkpoint_disks(store, ["sda", name], "now"),
    "forget": lambda store, name: lmdbitmap.forget_checkpoint(store, name, "epoch-1"),
    "holds_of": lambda store, name: lmdbitmap.holds_of(store, name),
    "mark": lambda store, name: lmdbitmap.mark_dirty(store, name, 0, 1),
    "relocate": lambda store, name: lmdbitmap.relocate(store, name, beside(store, "sda.raw")),
    "release": lambda store, name: lmdbitmap.release_served_snapshot(store, name, "now"),
    "stream": lambda store, name: lmdbitmap.stream_backup(store, name, io.BytesIO()),
    "sync": lambda store, name: lmdbitmap.sync_disk(store, name, beside(store, "copy.raw")),
    "take": lambda store, name: lmdbitmap.take_served_snapshot(store, [name], "now"),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_name_that_is_no_text_is_refused(store: Store, taker: str) -> None:
    for name in (None, 5, b"sda", ["sda"]):
        with pytest.raises(InvalidArgument, match="is not text; give it as a str"):
            TAKERS[taker](store, name)
    assert sorted(path.name for path in Path(store.path).parent.iterdir()) == ["sda.raw", "store"]


@pytest.mark.parametrize("names", [None, 5, b"sda", iter(["sda"])], ids=["None", "5", "bytes", "iterator"])
def test_what_is_no_list_of_names_is_refused(store: Store, names: Any) -> None:
    with pytest.raises(InvalidArgument, match="is no list of names"):
        lmdbitmap.checkpoint_disks(store, names, "now")
