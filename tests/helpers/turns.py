"""Whose turn it is where several workers of pytest-xdist run tests side by side: a test marked `alone` has the machine.

Each worker holds a lock while it runs a test, shared with the others, or exclusive if the test is marked. Whoever
waits for it keeps the door shut meanwhile, so that the others get through with theirs and begin no more. The locks
are `flock`s, which the kernel takes from a worker that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

_END_S = 60
"""How long a worker may take to end, once it is let go: 5 seconds and more on a busy machine."""


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
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        _give_time_to_end()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        self._processes.append((node.gateway.id, node.gateway._io.popen))
        node.workerinput["turns"] = self._folder.name

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        if error:
            self._deaths.append(f"{node.gateway.id}: {error}")

    @pytest.hookimpl(trylast=True)  # after xdist has let its workers go
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for name, process in self._processes:
            self._await_end(name, process)
        if self._deaths and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _await_end(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """One that has told all of its tests can die yet, while its interpreter exits."""
        try:
            code = process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._deaths.append(f"{name}: it had not ended {_END_S} s after its last test")
            return
        if code:
            self._deaths.append(f"{name}: it ended with {code}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._deaths:
            terminalreporter.section("workers that died", red=True)
            for line in self._deaths:
                terminalreporter.write_line(line)

    def pytest_unconfigure(self) -> None:
        self._folder.cleanup()


def _give_time_to_end() -> None:
    """Else xdist would kill, after 10 seconds, a worker that has told all of its tests."""
    from xdist.workermanage import NodeManager  # type: ignore[import-untyped]

    NodeManager.EXIT_TIMEOUT = _END_S
