"""One row for each class of error, raised by real verbs for real reasons: its exit code and its next step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from lmdbitmap.filter import Filter
from lmdbitmap.images.device import FileDevice
from lmdbitmap.store import Store
from tests.cli.conftest import Cli

Trouble = Callable[[Cli], AbstractContextManager[list[object]]]


@contextlib.contextmanager
def unknown_name(cli: Cli) -> Iterator[list[object]]:
    cli.add("sda")
    yield ["info", "sdx"]


@contextlib.contextmanager
def name_taken(cli: Cli) -> Iterator[list[object]]:
    cli.add("sda")
    cli.add("sdb")
    yield ["checkpoint", "sda", "epoch-1"]


@contextlib.contextmanager
def impossible_range(cli: Cli) -> Iterator[list[object]]:
    cli.add("sda")
    yield ["mark", "sda", "1T", "1"]


@contextlib.contextmanager
def misspelt_size(cli: Cli) -> Iterator[list[object]]:
    cli.add("sda")
    yield ["mark", "sda", "one", "1"]


@contextlib.contextmanager
def written_behind_our_back(cli: Cli) -> Iterator[list[object]]:
    os.utime(cli.add("sda"), ns=(2**61, 2**61))
    yield ["changes", "sda"]


@contextlib.contextmanager
def owned_by_a_process_without_a_socket(cli: Cli) -> Iterator[list[object]]:
    cli.add("sda")
    with Store.open(str(cli.store)) as store, Filter.attach(store, "sda", background=False):
        yield ["checkpoint", "sda", "monday"]


@contextlib.contextmanager
def image_open_elsewhere(cli: Cli) -> Iterator[list[object]]:
    with FileDevice.open(cli.add("sda")):
        yield ["mark", "sda", "0", "1"]


@contextlib.contextmanager
def store_of_other_bytes(cli: Cli) -> Iterator[list[object]]:
    (cli.store / "lmdb").mkdir(parents=True)
    (cli.store / "lmdb" / "data.mdb").write_bytes(b"no environment" * 1000)
    yield ["ls"]


@contextlib.contextmanager
def folder_that_cannot_be_made(cli: Cli) -> Iterator[list[object]]:
    image = cli.folder / "sda.raw"
    image.touch()
    yield ["add", "sda", image, "--store", image / "store"]


@pytest.mark.parametrize(
    ("trouble", "code", "next_step"),
    [
        (unknown_name, 1, "`lmdbitmap ls` lists all of them"),
        (name_taken, 1, "choose another name, or forget that one"),
        (impossible_range, 2, "stay between 0 and the disk's size"),
        (misspelt_size, 2, "(see 'lmdbitmap mark --help')"),
        (written_behind_our_back, 3, "make a full backup"),
        (owned_by_a_process_without_a_socket, 4, ""),
        (image_open_elsewhere, 4, ""),
        (store_of_other_bytes, 1, "name another folder, or an empty one to make a new store"),
        (folder_that_cannot_be_made, 2, "name a folder, or one that can be made"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_refusal_is_one_sentence_with_the_next_step_and_its_code(
    cli: Cli, trouble: Trouble, code: int, next_step: str
) -> None:
    with trouble(cli) as words:
        said = cli.fails(code, *words)
    assert said.endswith(next_step)
