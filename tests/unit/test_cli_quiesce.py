"""The hook around a checkpoint: in which order it is run, and what its failures cost."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from lmdbitmap.cli.quiesce import quiesced
from lmdbitmap.errors import InvalidArgument, LmdbitmapError


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """Notes what it is asked; fails, or does not end, at a word that stands in a file."""
    script = tmp_path / "the hook"
    script.write_text(
        f"""#!/bin/sh
echo "$@" >> '{tmp_path}/asked'
[ "$1" = "$(cat '{tmp_path}/fails' 2>/dev/null)" ] && {{ echo "no  such guest"; exit 3; }}
[ "$1" = "$(cat '{tmp_path}/hangs' 2>/dev/null)" ] && exec cat '{tmp_path}/fifo'
exit 0
"""
    )
    script.chmod(0o755)
    return script


def asked(hook: Path) -> list[str]:
    return (hook.parent / "asked").read_text().splitlines()


def test_guest_is_frozen_in_the_block_and_thawed_after_it(hook: Path) -> None:
    with quiesced(f"'{hook}' --vm 'my guest'", ["sda", "sdb"], 10):
        assert asked(hook) == ["--vm my guest freeze sda sdb"]
    assert asked(hook)[1:] == ["--vm my guest thaw sda sdb"]


def test_guest_is_thawed_after_a_failure_in_the_block(hook: Path) -> None:
    with pytest.raises(KeyError), quiesced(f"'{hook}'", ["sda"], 10):
        raise KeyError
    assert asked(hook) == ["freeze sda", "thaw sda"]


def test_failing_freeze_ends_it_and_is_thawed(hook: Path) -> None:
    (hook.parent / "fails").write_text("freeze")
    with (
        pytest.raises(LmdbitmapError, match="freeze sda` ended with 3: no such guest"),
        quiesced(f"'{hook}'", ["sda"], 10),
    ):
        raise AssertionError("the block is not entered")
    assert asked(hook) == ["freeze sda", "thaw sda"]


def test_hanging_freeze_ends_it_and_is_thawed(hook: Path) -> None:
    os.mkfifo(hook.parent / "fifo")
    (hook.parent / "hangs").write_text("freeze")
    with pytest.raises(LmdbitmapError, match=r"took more than 0\.2 s"), quiesced(f"'{hook}'", ["sda"], 0.2):
        raise AssertionError("the block is not entered")
    assert asked(hook) == ["freeze sda", "thaw sda"]


def test_failing_thaw_is_told_and_costs_nothing(hook: Path, caplog: pytest.LogCaptureFixture) -> None:
    (hook.parent / "fails").write_text("thaw")
    with caplog.at_level(logging.ERROR), quiesced(f"'{hook}'", ["sda"], 10):
        pass
    assert "thaw sda` ended with 3" in caplog.text


@pytest.mark.parametrize(
    ("command", "said"), [("", "empty"), ("'x", "no command"), ("/nowhere/at all", "cannot be run")]
)
def test_what_is_no_command_is_told(command: str, said: str) -> None:
    with pytest.raises((InvalidArgument, LmdbitmapError), match=said), quiesced(command, ["sda"], 10):
        raise AssertionError("the block is not entered")
