"""Where the store is, and how arguments are read."""

from __future__ import annotations

from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner

from lmdbitmap.cli.group import verbs
from lmdbitmap.cli.options import Session, default_store, granularity, names, size, verb
from tests.cli.conftest import ALL_VERBS, verb_named


@pytest.mark.parametrize(
    ("environment", "uid", "path"),
    [
        ({}, 0, "/var/lib/lmdbitmap"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/root"}, 0, "/var/lib/lmdbitmap"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/home/u"}, 1000, "/x/lmdbitmap"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/home/u"}, 1000, "/home/u/.local/state/lmdbitmap"),
        ({"XDG_STATE_HOME": "", "HOME": "/home/u"}, 1000, "/home/u/.local/state/lmdbitmap"),
    ],
)
def test_the_store_is_where_the_system_keeps_state(environment: dict[str, str], uid: int, path: str) -> None:
    assert default_store(environment, uid) == path


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """What a verb called `look` was told, each time it ran."""
    seen: list[Session] = []

    @verb(examples=["lmdbitmap look"])
    @click.pass_obj
    def look(session: Session) -> None:
        seen.append(session)

    monkeypatch.setitem(verbs.commands, "look", look)
    return seen


@pytest.mark.parametrize(
    ("words", "variable", "path", "as_json"),
    [
        (["look"], "/from-env", "/from-env", False),
        (["--store", "/before", "look"], "/from-env", "/before", False),
        (["look", "--store", "/after"], "/from-env", "/after", False),
        (["--store", "/before", "look", "--store", "/after"], None, "/after", False),
        (["--json", "look"], "/e", "/e", True),
        (["look", "--json"], "/e", "/e", True),
    ],
)
def test_store_and_json_are_taken_before_and_after_the_verb(
    sessions: list[Session], words: list[str], variable: str | None, path: str, as_json: bool
) -> None:
    done = CliRunner().invoke(verbs, words, env={"LMDBITMAP_STORE": variable})
    assert (done.exit_code, done.output) == (0, "")
    assert sessions == [Session(path, as_json)]


def test_help_shows_the_examples_as_typed(sessions: list[Session]) -> None:
    done = CliRunner().invoke(verbs, ["look", "--help"])
    assert "Examples:\n  $ lmdbitmap look\n" in done.output
    assert sessions == []


def test_arguments_are_read_as_people_write_them() -> None:
    assert size("64K") == 65536
    assert granularity("64K") == 16
    assert names("sda") == ["sda"]
    assert names("sda,sdb") == ["sda", "sdb"]


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (size, "many", "is not a size"),
        (granularity, "48K", "is not a power of two"),
        (granularity, "256", "is not a power of two between 512"),
        (names, "", "empty name"),
        (names, "sda,,sdb", "empty name"),
        (names, "sda,", "empty name"),
        (names, "sda,sdb,sda", "twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind: Callable[[str], object], text: str, said: str) -> None:
    with pytest.raises(click.BadParameter, match=said):
        kind(text)


OF_TIME = [
    (name, option.opts[0])
    for name in ALL_VERBS
    for option in verb_named(name).params
    if isinstance(option.type, click.types.FloatParamType)
]


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-1", "10000001", "long"])
@pytest.mark.parametrize(("name", "option"), OF_TIME)
def test_for_ever_is_no_time(name: str, option: str, value: str) -> None:
    done = CliRunner().invoke(verbs, [name, option, value])
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.output


def test_every_time_is_thought_of() -> None:
    assert {option for _, option in OF_TIME} == {
        "--owner-limit", "--hook-limit", "--freeze-limit", "--lock-wait",
    }  # fmt: skip
