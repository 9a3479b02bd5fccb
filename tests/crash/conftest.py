"""The fixture that lets children die at every step of a life."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.crash.dying import Deaths, forking
from tests.helpers.tracked import quick_folder


@pytest.fixture(scope="module")
def forking_process() -> Iterator[subprocess.Popen[str]]:
    with forking() as process:
        yield process


@pytest.fixture
def deaths(forking_process: subprocess.Popen[str]) -> Iterator[Deaths]:
    with quick_folder() as graves:
        dying = Deaths(forking_process, graves)
        yield dying
        dying.hear_out()
