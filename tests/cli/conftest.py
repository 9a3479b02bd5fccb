"""The command with a store of its own, run in this process, and a server of it in another."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import click
import pytest

from lmdbitmap.cli.group import verbs
from lmdbitmap.cli.main import run
from tests.helpers.support import Child, make_raw_image, spawn
from tests.helpers.tracked import quick_folder

MIB = 1 << 20
SIZE = 8 * MIB
"""Of the disks that `Cli.add` makes."""


CONTEXT = click.Context(verbs)
ALL_VERBS = sorted(verbs.list_commands(CONTEXT))


def verb_named(name: str) -> click.Command:
    verb = verbs.get_command(CONTEXT, name)
    assert verb is not None
    return verb


class Answer(NamedTuple):
    code: int
    out: str
    err: str


class Served(NamedTuple):
    """A `serve` process that is ready, and the URIs it printed, by the disks' names."""

    child: Child
    uris: dict[str, str]


class Cli:
    """Runs the command as the shell would, without the cost of a process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.store = folder / "store"
        self._capsys = capsys

    def __call__(self, *words: object) -> Answer:
        self._capsys.readouterr()
        code = run(["--store", str(self.store), *map(str, words)])
        return Answer(code, *self._capsys.readouterr())

    def ok(self, *words: object) -> str:
        """What it says on the way to exit code 0, with nothing to complain about."""
        answer = self(*words)
        assert (answer.code, answer.err) == (0, ""), answer
        return answer.out

    def json(self, *words: object) -> Any:
        return json.loads(self.ok(*words, "--json"))

    def fails(self, code: int, *words: object) -> str:
        """The one sentence with which it fails, without the program's name."""
        answer = self(*words)
        assert answer.code == code, answer
        assert answer.err.startswith("lmdbitmap: "), answer
        assert answer.err.count("\n") == 1, answer
        return answer.err.removeprefix("lmdbitmap: ").rstrip("\n")

    def add(self, name: str, size: int = SIZE, *options: object) -> Path:
        """Make a raw image and track it; answers its path."""
        image = make_raw_image(self.folder / f"{name}.raw", size)
        self.ok("add", name, image, *options)
        return image

    def dirty(self, name: str, *options: object) -> tuple[str, list[tuple[int, int]]]:
        """What `changes` answers: the trust, and (offset, length) of every dirty extent, joined."""
        answer = self.json("changes", name, *options)
        joined: list[tuple[int, int]] = []
        for extent in answer["extents"]:
            assert extent["dirty"] is True
            if joined and sum(joined[-1]) == extent["offset"]:
                joined[-1] = (joined[-1][0], joined[-1][1] + extent["length"])
            else:
                joined.append((extent["offset"], extent["length"]))
        assert sum(length for _, length in joined) == answer["dirty_bytes"]
        return answer["trust"], joined

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "lmdbitmap", "--store", str(self.store), *map(str, words)]

    @contextlib.contextmanager
    def serving(self, *words: object, log: bool = False) -> Iterator[Served]:
        """`serve` with these words at a unix socket; ended by SIGTERM, which must be clean."""
        socket = self.folder / f"{words[0]}.sock"
        with spawn(*self.command("serve", *words, "--socket", socket)) as child:
            child.wait_for_line("^ready$")
            uris = {}
            for name in (str(word) for word in words if not str(word).startswith("-")):
                uris[name] = child.wait_for_line(rf"^nbd\+unix:///{name}\?socket=.*$").group()
            yield Served(child, uris)
        assert child.process.returncode in (0, -9), child.stderr
        assert log or child.stderr == ""


Serving: TypeAlias = AbstractContextManager[Served]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path, capsys)


@pytest.fixture
def quick_cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """All of it in memory: for what is about processes that die, and moves hundreds of megabytes."""
    with quick_folder() as folder:
        yield Cli(folder, capsys)
