"""Owning a disk: what is refused, and in whose words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmdbitmap.errors import Busy, InvalidArgument, NotFound
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from tests.helpers.support import make_raw_image


def test_a_disk_that_is_attached_is_refused_by_its_name(tmp_path: Path) -> None:
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    with Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", str(image), granularity_bits=16)
        with Filter.attach(store, "sda", background=False):
            for attempt in (Filter.attach, session.remove, session.adopt):
                with pytest.raises(Busy, match="disk 'sda' is attached"):
                    attempt(store, "sda")
            with pytest.raises(Busy, match="disk 'sda' is attached"):
                session.relocate(store, "sda", str(image))
        session.remove(store, "sda")
        with pytest.raises(NotFound):
            session.remove(store, "sda")


def test_a_path_that_is_no_text_is_refused(tmp_path: Path) -> None:
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    strange = os.fsdecode(bytes(tmp_path) + b"/\xff.raw")
    os.rename(image, strange)
    with Store.create(str(tmp_path / "store")) as store:
        with pytest.raises(InvalidArgument, match="not UTF-8"):
            session.add(store, "sda", strange, granularity_bits=16)
        with store.read() as reader:
            assert reader.disks() == []
