"""Hypothesis profiles, shared fixtures, the order of tests, and the rule that in CI a skipped test is a failure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, settings

from lmdbitmap.tracker import continuity
from tests.helpers.late_beats import EXACT_GRACE_NS, let_beats_be_late
from tests.helpers.support import make_raw_image
from tests.helpers.tracked import quick_folder
from tests.helpers.turns import Turns, Workers, wants_to_be_alone

# A slow example is no failure: the machine may be busy, and pytest-timeout catches what hangs. Where `CI` is set,
# Hypothesis itself would always take the same examples, whatever the seed.
settings.register_profile("dev", deadline=None, derandomize=False)
settings.register_profile(
    "ci", deadline=None, derandomize=False, database=None, max_examples=100, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

let_beats_be_late()

NO_SKIP = os.environ.get("LMDBITMAP_NO_SKIP", "") not in ("", "0")

TIERS = ("unit", "property", "fuzz", "golden", "contract", "crash", "interop", "cli")
"""Cheap to dear: the first failure is the lowest thing that broke.

What is in no tier goes first, what is `alone` last."""

RawImage: TypeAlias = Callable[..., Path]


@pytest.fixture
def tmp_path(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Of a test that is marked `in_memory`, a folder there."""
    if request.node.get_closest_marker("in_memory") is None:
        yield tmp_path
        return
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def raw_image(tmp_path: Path) -> RawImage:
    """Make sparse raw images: `raw_image(size, data=[(offset, bytes)], name="disk.raw")` answers the path."""

    def make(size: int, data: Iterable[tuple[int, bytes]] = (), name: str = "disk.raw") -> Path:
        return make_raw_image(tmp_path / name, size, data)

    return make


@pytest.fixture
def exact_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner's beat vouches for as long as it does for users."""
    monkeypatch.setattr(continuity, "_BEAT_GRACE_NS", EXACT_GRACE_NS)


class SkipIsFailure:
    """Collects every skip of a session and, where skipping is not allowed, fails it with the reasons."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("skipped, and LMDBITMAP_NO_SKIP makes that a failure", red=True)
            for line in self.skipped:
                terminalreporter.write_line(line)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        self.skipped.append(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place_of)


def _place_of(item: pytest.Item) -> tuple[bool, int]:
    folder = item.path.parent.name
    return wants_to_be_alone(item), TIERS.index(folder) if folder in TIERS else -1


def pytest_configure(config: pytest.Config) -> None:
    if NO_SKIP:
        config.pluginmanager.register(SkipIsFailure())
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Turns(Path(config.workerinput["turns"])))
    elif config.getoption("tx", None):
        config.pluginmanager.register(Workers())
