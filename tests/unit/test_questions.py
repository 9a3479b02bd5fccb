"""What the process that serves disks is asked about them: not more at once than its answer can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lmdbitmap.access import questions
from lmdbitmap.access.questions import Owners, ask_owner
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.control import orders
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.control_client import Client
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.chain import disk_called
from tests.helpers.support import make_raw_image
from tests.helpers.tracked import quick_folder

NAMES = ("sda", "sdb", "sdc")


@pytest.fixture(params=[True])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Of three disks that this process serves, or only has attached."""
    with ExitStack() as stack:
        folder = stack.enter_context(quick_folder())
        store = stack.enter_context(Store.create(str(folder / "store")))
        filters: dict[str, Filter] = {}
        for name in NAMES:
            session.add(store, name, str(make_raw_image(folder / name, 4096)), granularity_bits=12)
            filters[name] = stack.enter_context(Filter.attach(store, name, background=False))
        server = Server(filters) if request.param else None
        if server is not None:
            server.start()
            stack.callback(server.stop)
        stack.enter_context(ControlServer(filters, server=server))
        yield store


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each question, in order."""
    asked: list[dict[str, Any]] = []

    def noted(client: Client, operation: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return call(client, operation, timeout_s=timeout_s, **arguments)

    call = Client.call
    monkeypatch.setattr(Client, "call", noted)
    return asked


def told(store: Store) -> list[str]:
    owners = Owners(store)
    entries = [owners.ask(disk_called(store, name)) for name in NAMES]
    return [entry["name"] for entry in entries if entry is not None and entry["served"]["pid"]]


def test_few_disks_are_asked_about_at_once(store: Store, asked: list[dict[str, Any]]) -> None:
    assert told(store) == list(NAMES)
    assert asked == [{}]


@pytest.mark.parametrize("store", [False], indirect=True)
def test_a_process_that_serves_nothing_is_asked_once_too(store: Store, asked: list[dict[str, Any]]) -> None:
    assert told(store) == []
    assert asked == [{}]


def test_many_disks_are_asked_about_in_parts(
    store: Store, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_AT_ONCE", 2)
    assert told(store) == list(NAMES)
    assert asked == [{"disks": ["sda", "sdb"]}, {"disks": ["sdc"]}]
    asked.clear()
    entry = ask_owner(store, disk_called(store, "sdb"))
    assert entry is not None
    assert (entry["name"], asked) == ("sdb", [{"disks": ["sdb"]}])


def test_an_older_owner_is_asked_about_all(
    store: Store, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_AT_ONCE", 2)
    older = {**orders._OPERATIONS, "info": orders._OPERATIONS["info"]._replace(optional={})}
    monkeypatch.setattr(orders, "_OPERATIONS", older)
    assert told(store) == list(NAMES)
    assert asked == [{"disks": ["sda", "sdb"]}, {}]
