"""The boundary: one exit code for each kind of error, one sentence, never a traceback."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable

import click
import pytest

from lmdbitmap.cli.group import verbs
from lmdbitmap.cli.logs import AlreadyTold
from lmdbitmap.cli.main import run
from lmdbitmap.cli.options import verb
from lmdbitmap.cli.signals import Ended
from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    SomeFailed,
    StorageError,
    Untrusted,
)

Captured = pytest.CaptureFixture[str]
Fall = Callable[[BaseException], int]


@pytest.fixture
def fall(monkeypatch: pytest.MonkeyPatch) -> Fall:
    """Run a verb that raises what it is given; answers the exit code."""

    def run_one(error: BaseException) -> int:
        @verb(examples=[])
        def stumble() -> None:
            raise error

        monkeypatch.setitem(verbs.commands, "stumble", stumble)
        return run(["stumble"])

    return run_one


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LmdbitmapError("this", next_step="that"), 1),
        (InvalidArgument("this", next_step="that"), 2),
        (NotFound("this", next_step="that"), 1),
        (AlreadyExists("this", next_step="that"), 1),
        (Untrusted("this", next_step="that"), 3),
        (Busy("this", next_step="that"), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_our_errors_end_in_their_code_and_their_sentence(
    fall: Fall, capsys: Captured, error: Exception, code: int
) -> None:
    assert fall(error) == code
    assert capsys.readouterr() == ("", "lmdbitmap: this; that\n")


def test_errors_with_fields_end_in_one_sentence_too(fall: Fall, capsys: Captured) -> None:
    assert fall(FormatError("a.dbm", expected="a magic", found=b"\x1b\n", next_step="look")) == 1
    assert fall(StorageError("/srv", OSError(errno.EROFS, ""), next_step="remount")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "lmdbitmap: a.dbm: expected a magic, found b'\\x1b\\n'; look",
        "lmdbitmap: /srv: Read-only file system; remount",
    ]


@pytest.mark.parametrize(
    ("causes", "code"),
    [
        ([Busy("this", next_step="that")] * 2, 4),
        ([Busy("this", next_step="that"), NotFound("this", next_step="that")], 1),
    ],
)
def test_of_several_failures_the_code_is_theirs_if_they_agree(
    fall: Fall, capsys: Captured, causes: list[LmdbitmapError], code: int
) -> None:
    failed = SomeFailed("2 failed", causes, next_step="look")
    assert fall(failed) == code
    assert capsys.readouterr().err == "lmdbitmap: 2 failed; look\n"
    assert fall(AlreadyTold(failed)) == code
    assert capsys.readouterr() == ("", "")


def test_a_message_cannot_reach_the_terminal(fall: Fall, capsys: Captured) -> None:
    fall(NotFound("disk \x1b[2J\nhidden", next_step="look"))
    assert capsys.readouterr().err == "lmdbitmap: disk \\x1b[2J\\nhidden; look\n"


@pytest.mark.parametrize(
    ("end", "name"),
    [(KeyboardInterrupt(), "SIGINT"), (Ended(signal.SIGTERM), "SIGTERM"), (Ended(signal.SIGHUP), "SIGHUP")],
)
def test_whoever_ends_it_is_told_that_it_may_not_be_done(
    fall: Fall, capsys: Captured, end: BaseException, name: str
) -> None:
    assert fall(end) == 128 + signal.Signals[name]
    said = f"lmdbitmap: ended by {name} before it reported that its work was done"
    assert capsys.readouterr() == ("", f"{said}; look at the result, and run it again if need be\n")


def test_want_of_memory_is_no_fault_of_ours(fall: Fall, capsys: Captured) -> None:
    assert fall(MemoryError()) == 1
    said = "lmdbitmap: there is not enough memory; free some memory and try again\n"
    assert capsys.readouterr() == ("", said)


def test_want_of_threads_is_no_fault_of_ours(fall: Fall, capsys: Captured) -> None:
    assert fall(RuntimeError("can't start new thread")) == 1
    said = "lmdbitmap: the system refuses another thread; have fewer, or allow more (ulimit -u)\n"
    assert capsys.readouterr() == ("", said)


def test_our_own_fault_is_owned_up_to_without_a_traceback(
    fall: Fall, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LMDBITMAP_DEBUG", raising=False)
    assert fall(KeyError("region")) == 1
    said = capsys.readouterr().err
    assert said.startswith("lmdbitmap: KeyError: 'region'; this is a fault of lmdbitmap itself")
    assert said.count("\n") == 1


def test_our_own_fault_shows_where_when_asked(
    fall: Fall, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMDBITMAP_DEBUG", "1")
    assert fall(ModuleNotFoundError("no lzma", name="lzma")) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["click", "rich", "prometheus_client"])
def test_a_missing_library_is_named_with_the_way_to_get_it(
    fall: Fall, capsys: Captured, library: str
) -> None:
    assert fall(ModuleNotFoundError(f"No module named {library}", name=library)) == 1
    assert capsys.readouterr().err == (
        f"lmdbitmap: the command line needs {library}; run: pip install 'lmdbitmap[cli]'\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "lmdbitmap: no command given (see 'lmdbitmap --help')\n"),
        (["unheard-of"], "lmdbitmap: No such command 'unheard-of' (see 'lmdbitmap --help')\n"),
    ],
)
def test_what_is_not_understood_ends_in_2_and_a_pointer(
    capsys: Captured, words: list[str], said: str
) -> None:
    assert run(words) == 2
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    "words", [["--store", "", "ls"], ["ls", "--store="], ["ls", ""], ["backup", "sda", ""]]
)
def test_an_empty_word_is_no_name_of_this_folder(capsys: Captured, words: list[str]) -> None:
    """It is what a shell has for a variable that is not set."""
    assert run(words) == 2
    said = (
        "an argument is empty; leave it out, or set the variable that stands there (see 'lmdbitmap --help')"
    )
    assert capsys.readouterr() == ("", f"lmdbitmap: {said}\n")


def test_a_verbs_own_help_is_pointed_at(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    @verb(examples=[])
    @click.argument("name")
    def greet(name: str) -> None: ...

    monkeypatch.setitem(verbs.commands, "greet", greet)
    assert run(["greet"]) == 2
    assert capsys.readouterr().err == "lmdbitmap: Missing argument 'NAME' (see 'lmdbitmap greet --help')\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_and_version_are_answers(capsys: Captured, words: list[str]) -> None:
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert out != ""
    assert err == ""
