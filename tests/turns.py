"""Whose turn it is where several workers of pytest-xdist run tests side by side: a test marked `alone` has the machine.

Each worker holds a lock while it runs a test, shared with the others, or exclusive if the test is marked. Whoever
waits for it keeps the door shut meanwhile, so that the others get through with theirs and begin no more. The locks
are `flock`s, which the kernel takes from a worker that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest


def wants_to_be_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


class Turns:
    """In a worker: the locks, and which test holds what."""

    def __init__(self, folder: Path) -> None:
        self._door = (folder / "door").open("w")
        self._room = (folder / "room").open("w")

    @contextlib.contextmanager
    def taken(self, *, alone: bool) -> Iterator[None]:
        fcntl.flock(self._door, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest-timeout's clock
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        with self.taken(alone=wants_to_be_alone(item)):
            return (yield)

    def pytest_unconfigure(self) -> None:
        self.close()

    def close(self) -> None:
        self._door.close()
        self._room.close()


class Workers:
    """In the process that hands the tests out: where the workers' locks are, and that none of them dies unnoticed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lmdbitmap-turns-")
        self._deaths: list[str] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["turns"] = self._folder.name

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        if error:
            self._deaths.append(f"{node.gateway.id}: {error}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._deaths and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._deaths:
            terminalreporter.section("workers that died", red=True)
            for line in self._deaths:
                terminalreporter.write_line(line)

    def pytest_unconfigure(self) -> None:
        self._folder.cleanup()
