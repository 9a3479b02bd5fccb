"""A measured store counts what was asked of it and nobody else's commits, however they end."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lmdbitmap.storage.measured import MeasuredStore
from lmdbitmap.store import Store, Writer
from tests.helpers.tracked import quick_folder


def put_nothing(writer: Writer) -> int:
    return writer.new_bitmap_id()


def test_commits_of_each_are_its_own(tmp_path: Path) -> None:
    Store.create(str(tmp_path)).close()
    with MeasuredStore.open(str(tmp_path)) as one, MeasuredStore.open(str(tmp_path)) as other:
        before = sum(one.commits.counts)
        for _ in range(3):
            one.update(put_nothing)
        assert sum(one.commits.counts) == before + 3
        assert one.commits.max_ns > 0
        assert sum(other.commits.counts) == before


def test_a_commit_that_fails_took_its_time_too(tmp_path: Path) -> None:
    def fail(_: Writer) -> None:
        raise KeyError

    Store.create(str(tmp_path)).close()
    with MeasuredStore.open(str(tmp_path)) as store:
        before = sum(store.commits.counts)
        with pytest.raises(KeyError):
            store.update(fail)
        assert sum(store.commits.counts) == before + 1


def test_commits_of_many_threads_are_all_counted() -> None:
    with quick_folder() as folder:
        Store.create(str(folder / "store")).close()
        with MeasuredStore.open(str(folder / "store")) as store:
            before = sum(store.commits.counts)

            def commit() -> None:
                for _ in range(25):
                    store.update(put_nothing)

            threads = [threading.Thread(target=commit) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(store.commits.counts) == before + 100
