"""The hook around a checkpoint: in which order it is run, and what its failures cost."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmdbitmap.access.routes import FREEZE_LIMIT_S, OWNER_LIMIT_S
from lmdbitmap.cli.backups import backup
from lmdbitmap.cli.quiesce import Thaw, _beginning_of, quiesced
from lmdbitmap.cli.syncing import sync
from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from tests.helpers.support import PATIENCE_SECONDS, handled

LIMIT_S = 100.0
"""That nothing reaches by itself."""


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """Notes what it is asked; fails, or does not end, at a word that stands in a file."""
    script = tmp_path / "the hook"
    script.write_text(
        f"""#!/bin/sh
echo "$@" >> '{tmp_path}/asked'
[ "$1" = "$(cat '{tmp_path}/fails' 2>/dev/null)" ] && {{ echo "no  such guest"; exit 3; }}
[ "$1" = "$(cat '{tmp_path}/hangs' 2>/dev/null)" ] && {{
    : > '{tmp_path}/begun'; cat '{tmp_path}/fifo'; echo over >> '{tmp_path}/asked'
}}
exit 0
"""
    )
    script.chmod(0o755)
    return script


def asked(hook: Path) -> list[str]:
    return (hook.parent / "asked").read_text().splitlines()


@pytest.fixture
def hurried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file. Once it is there, the time of what runs then is up, and that of what begins later is not."""
    begun = tmp_path / "begun"

    def monotonic() -> float:
        return time.monotonic() + (2 * LIMIT_S if begun.exists() else 0)

    monkeypatch.setattr("lmdbitmap.cli.quiesce.time", SimpleNamespace(monotonic=monotonic))
    return begun


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


def test_what_fails_twice_is_told_once_the_cause_first(hook: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook.write_text('#!/bin/sh\necho "$1: no such guest"; exit 3\n')
    thaw = Thaw()
    with pytest.raises(LmdbitmapError) as failed, quiesced(f"'{hook}'", ["sda"], 10, thaw):
        raise AssertionError("the block is not entered")
    said = str(failed.value)
    assert said.index("ended with 3: freeze: no such guest") < said.index("ended with 3: thaw: no such guest")
    assert said.endswith(
        "the guest may be frozen still; thaw it by hand, and see what the hook says when it is run by hand"
    )
    assert (caplog.text, thaw.problem is None) == ("", False)


def test_a_guest_that_stays_frozen_is_told_of_although_a_signal_ends_it(
    hook: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The signal's exception takes the place of the error that would have told it."""
    hook.write_text(
        f'#!/bin/sh\n[ $1 = thaw ] && kill -TERM {os.getpid()}\necho "$1: no such guest"; exit 3\n'
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    try:
        with pytest.raises(SystemExit), quiesced(f"'{hook}'", ["sda"], 10):
            raise AssertionError("the block is not entered")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "ended with 3: thaw: no such guest" in caplog.text


def test_a_hook_that_is_none_leaves_no_guest_frozen(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LmdbitmapError) as failed, quiesced("/nowhere/hook", ["sda"], 10):
        raise AssertionError("the block is not entered")
    said = "hook `/nowhere/hook freeze sda` cannot be run (No such file or directory)"
    assert (str(failed.value), caplog.text) == (f"{said}; name a command that exists and is executable", "")


def test_hanging_freeze_ends_it_and_is_thawed(hook: Path, hurried: Path) -> None:
    os.mkfifo(hook.parent / "fifo")
    (hook.parent / "hangs").write_text("freeze")
    with (
        pytest.raises(LmdbitmapError, match=r"took more than 100 s; .* allow it more \(--hook-limit\)"),
        quiesced(f"'{hook}'", ["sda"], LIMIT_S),
    ):
        raise AssertionError("the block is not entered")
    assert asked(hook) == ["freeze sda", "thaw sda"]


def test_failing_thaw_is_told_at_once_and_kept(hook: Path, caplog: pytest.LogCaptureFixture) -> None:
    (hook.parent / "fails").write_text("thaw")
    thaw = Thaw()
    with caplog.at_level(logging.ERROR), quiesced(f"'{hook}'", ["sda"], 10, thaw):
        thaw.require()
    assert thaw.problem is not None
    assert thaw.problem.endswith("thaw sda` ended with 3: no such guest")
    with pytest.raises(
        LmdbitmapError, match=r"is done, but the guest may be frozen still: .*; thaw it by hand"
    ):
        thaw.require()
    assert "thaw sda` ended with 3" in caplog.text


@pytest.mark.parametrize(
    ("command", "said"), [("", "empty"), ("'x", "no command"), ("/nowhere/at all", "cannot be run")]
)
def test_what_is_no_command_is_told(command: str, said: str) -> None:
    with pytest.raises((InvalidArgument, LmdbitmapError), match=said), quiesced(command, ["sda"], 10):
        raise AssertionError("the block is not entered")


# --- signals ---

_FREEZES = """
import signal
import sys
from lmdbitmap.cli.quiesce import _ENDING_SIGNALS
for number in (*_ENDING_SIGNALS, signal.SIGTSTP):  # some are ignored under nohup, or in a shell's background
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from lmdbitmap.access.routes import FREEZE_LIMIT_S, OWNER_LIMIT_S
from lmdbitmap.cli.backups import backup
from lmdbitmap.cli.syncing import sync
from lmdbitmap.cli.quiesce import Thaw, quiesced
with quiesced(sys.argv[1], ["sda"], 60):
    print("frozen", flush=True)
    sys.stdin.read()
"""


@contextmanager
def a_backup_that_freezes(hook: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _FREEZES, f"'{hook}'"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM, signal.SIGXCPU]
)
def test_guest_is_thawed_after_a_signal_in_the_block(hook: Path, number: signal.Signals) -> None:
    with a_backup_that_freezes(hook) as backup:
        assert backup.stdout is not None
        assert backup.stdout.readline() == "frozen\n"
        backup.send_signal(number)
        assert backup.wait(PATIENCE_SECONDS) != 0
    assert asked(hook) == ["freeze sda", "thaw sda"]


def test_guest_is_thawed_after_a_signal_during_the_freeze(hook: Path) -> None:
    os.mkfifo(hook.parent / "fifo")
    (hook.parent / "hangs").write_text("freeze")
    with a_backup_that_freezes(hook) as backup, open(hook.parent / "fifo", "w"):
        backup.send_signal(signal.SIGTERM)
        assert backup.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM
    assert asked(hook) == ["freeze sda", "thaw sda"]


def test_who_presses_ctrl_z_stops_it_with_a_guest_that_is_thawed(hook: Path) -> None:
    stops = _FREEZES.replace("sys.stdin.read()", "signal.raise_signal(signal.SIGTSTP)")
    with subprocess.Popen(
        [sys.executable, "-c", f"import os; os.setpgid(0, 0)\n{stops}", f"'{hook}'"],
        stdout=subprocess.DEVNULL,
    ) as backup:
        _, status = os.waitpid(backup.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        backup.send_signal(signal.SIGCONT)
        assert asked(hook) == ["freeze sda", "thaw sda"]
        assert backup.wait(PATIENCE_SECONDS) == 0


def test_who_ends_it_after_ctrl_z_has_it_ended_and_not_stopped(hook: Path) -> None:
    ends = "signal.raise_signal(signal.SIGTSTP); signal.raise_signal(signal.SIGTERM)"
    code = f"import os; os.setpgid(0, 0)\n{_FREEZES.replace('sys.stdin.read()', ends)}"
    with subprocess.Popen([sys.executable, "-c", code, f"'{hook}'"], stdout=subprocess.DEVNULL) as backup:
        _, status = os.waitpid(backup.pid, os.WUNTRACED)
        backup.send_signal(signal.SIGCONT)
    assert (os.WIFSTOPPED(status), asked(hook)) == (False, ["freeze sda", "thaw sda"])


def test_what_fails_twice_is_told_once_to_who_presses_ctrl_z_too(
    hook: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook.write_text(
        f'#!/bin/sh\n[ $1 = thaw ] && kill -TSTP {os.getpid()}\necho "$1: no such guest"; exit 3\n'
    )
    stopped: list[int] = []
    before = signal.signal(signal.SIGTSTP, lambda number, frame: stopped.append(number))
    try:
        with pytest.raises(LmdbitmapError, match="and then"), quiesced(f"'{hook}'", ["sda"], 10):
            raise AssertionError("the block is not entered")
    finally:
        signal.signal(signal.SIGTSTP, before)
    assert (stopped, caplog.text) == ([signal.SIGTSTP], "")


def test_second_signal_waits_for_the_thaw(hook: Path) -> None:
    os.mkfifo(hook.parent / "fifo")
    (hook.parent / "hangs").write_text("thaw")
    with a_backup_that_freezes(hook) as backup:
        assert backup.stdout is not None
        assert backup.stdout.readline() == "frozen\n"
        backup.send_signal(signal.SIGINT)
        with open(hook.parent / "fifo", "w") as thaw:
            backup.send_signal(signal.SIGTERM)
            backup.send_signal(signal.SIGINT)
            thaw.write("it is read to its end, or writing it fails")
            thaw.flush()
        assert backup.wait(PATIENCE_SECONDS) != 0
    assert asked(hook) == ["freeze sda", "thaw sda", "over"]


def test_signal_that_is_ignored_stays_so(hook: Path) -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN), quiesced(f"'{hook}'", ["sda"], 10):
        signal.raise_signal(signal.SIGHUP)
    assert asked(hook) == ["freeze sda", "thaw sda"]


def test_what_a_hanging_freeze_began_is_over_before_the_thaw(tmp_path: Path, hurried: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    freeze = f": > {tmp_path}/late; : > {hurried}; cat {tmp_path}/fifo >> {tmp_path}/late; true"
    with (
        pytest.raises(LmdbitmapError, match="took more than"),
        quiesced(f"sh -c 'test $0 = thaw || {{ {freeze}; }}'", ["sda"], LIMIT_S),
    ):
        raise AssertionError("the block is not entered")
    feed(tmp_path / "fifo")
    assert (tmp_path / "late").read_bytes() == b""


@pytest.mark.parametrize("talk", ["", "yes &"])
def test_a_hook_is_over_when_it_ends_whatever_it_leaves_in_the_background(tmp_path: Path, talk: str) -> None:
    """Such as a thaw of its own for the case that we die."""
    os.mkfifo(tmp_path / "fifo")
    entered = False
    stays = f"test $0 = thaw || cat {tmp_path}/fifo"
    with quiesced(f"sh -c '{{ {stays}; }} & {talk} echo said'", ["sda"], PATIENCE_SECONDS):
        entered = True
    assert entered
    (tmp_path / "fifo").write_bytes(b"")  # waits for the one that reads it, which ends then


def test_last_words_of_a_hook_are_heard_although_its_background_keeps_the_output_open() -> None:
    reader, writer = os.pipe()

    class Ending(subprocess.Popen[bytes]):
        def __init__(self) -> None: ...

        def __del__(self) -> None: ...

        def poll(self) -> int:
            os.write(writer, b"last words")
            return 3

    try:
        with open(reader, "rb", buffering=0) as output:
            assert _beginning_of(output, Ending(), time.monotonic() + PATIENCE_SECONDS) == b"last words"
    finally:
        os.close(writer)


@pytest.fixture
def late(tmp_path: Path) -> Path:
    """What a freeze does that goes on: it would freeze the guest when somebody writes to this fifo."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "late"


def freezing_late(late: Path, then: str) -> str:
    """A hook that has it done in the background, with outputs of its own."""
    freeze = f": > {late}; cat {late.parent}/fifo >> {late} 2>/dev/null & : > {late.parent}/begun; {then}"
    return f"sh -c 'test $0 = thaw || {{ {freeze}; }}'"


def is_over(late: Path) -> bool:
    feed(late.parent / "fifo")
    return late.read_bytes() == b""


def test_what_a_failing_freeze_began_is_over_before_the_thaw(late: Path) -> None:
    with (
        pytest.raises(LmdbitmapError, match="ended with 3"),
        quiesced(freezing_late(late, "exit 3"), ["sda"], 10),
    ):
        raise AssertionError("the block is not entered")
    assert is_over(late)


def test_what_a_freeze_began_is_over_if_a_signal_comes_while_it_is_started(
    late: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if "freeze" in arguments[0]:
                while not (late.parent / "begun").exists():
                    time.sleep(0.001)
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Begun)
    with (
        ending_at(signal.SIGTERM),
        pytest.raises(SystemExit),
        quiesced(freezing_late(late, "wait"), ["sda"], 10),
    ):
        raise AssertionError("the block is not entered")
    assert is_over(late)


@contextmanager
def ending_at(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, lambda number, frame: sys.exit(number))
    try:
        yield
    finally:
        signal.signal(number, before)


def test_a_signal_that_comes_while_signals_are_taken_over_ends_it_as_any_other(
    hook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = signal.signal

    def handle_too_late(number: int, how: Any) -> Any:
        before = handle(number, how)
        if number == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        return before

    with ending_at(signal.SIGTERM):
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(signal, "signal", handle_too_late)
        with pytest.raises(SystemExit), quiesced(f"'{hook}'", ["sda"], 10):
            raise AssertionError("the block is not entered")
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGTERM) is before
    assert asked(hook)[-1] == "thaw sda"


def test_guest_is_thawed_although_the_freeze_is_another_users_and_cannot_be_killed(
    hook: Path, hurried: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As `sudo` is. Nobody waits for it either."""

    def refused(group: int, number: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    begun: list[subprocess.Popen[bytes]] = []

    class Begun(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            begun.append(self)

    os.mkfifo(hook.parent / "fifo")
    (hook.parent / "hangs").write_text("freeze")
    monkeypatch.setattr(subprocess, "Popen", Begun)
    monkeypatch.setattr(os, "killpg", refused)
    with pytest.raises(LmdbitmapError, match="took more than"), quiesced(f"'{hook}'", ["sda"], LIMIT_S):
        raise AssertionError("the block is not entered")
    assert asked(hook) == ["freeze sda", "thaw sda"]
    assert "cannot be ended: [Errno 1] Operation not permitted" in caplog.text
    assert begun[0].poll() is None
    (hook.parent / "fifo").write_bytes(b"")  # waits for the one that reads it, which ends then
    begun[0].wait(PATIENCE_SECONDS)


@pytest.mark.parametrize("code", [0, 3])
def test_a_hook_that_does_not_stop_talking_takes_no_memory(code: int) -> None:
    talk = "head -c 64M /dev/zero | tr \\0 x"
    tracemalloc.start()
    try:
        with suppress(LmdbitmapError), quiesced(f'sh -c "{talk}; exit {code}"', ["sda"], PATIENCE_SECONDS):
            assert code == 0
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_a_hook_that_talks_for_ever_is_ended_at_its_time() -> None:
    with (
        pytest.raises(LmdbitmapError, match=r"freeze sda` took more than 0\.2 s, and then .* took more"),
        quiesced("yes", ["sda"], 0.2),
    ):
        raise AssertionError("the block is not entered")


def feed(fifo: Path) -> None:
    """Write to whoever reads it, until nobody does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with suppress(OSError):
        while time.monotonic() < deadline:
            with open(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb") as reader:
                reader.write(b"x")


def test_limits_that_nobody_names_are_those_of_the_library() -> None:
    """They are written out in the command line, as what they belong to is imported when a verb runs."""
    for verb in (backup, sync):
        defaults = {option.name: option.default for option in verb.params}
        assert (defaults["freeze_limit"], defaults["owner_limit"]) == (FREEZE_LIMIT_S, OWNER_LIMIT_S)
