"""The command as a process: its streams may be closed, full, or gone, and its libraries missing."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.helpers.support import all_that_appears, read_by_nobody, run

COMMAND = [sys.executable, "-m", "lmdbitmap"]
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}
"""What a shell has: Python keeps the answer back, and writes it once more when it exits."""


def test_the_installed_command_is_this_package() -> None:
    installed = Path(sys.executable).with_name("lmdbitmap")
    assert run(installed, "--version").stdout == run(*COMMAND, "--version").stdout != ""


def test_without_click_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['click'] = None; from lmdbitmap.cli.main import main; main()"
    done = run(sys.executable, "-c", code, check=False)
    assert done.returncode == 1
    assert done.stderr == "lmdbitmap: the command line needs click; run: pip install 'lmdbitmap[cli]'\n"


INTERRUPTED_IMPORT = """
import importlib.abc, runpy, sys

class CtrlC(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
sys.argv = ["lmdbitmap", "ls"]
runpy.run_module("lmdbitmap", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["lmdbitmap.cli", "lmdbitmap.cli.logs", "lmdbitmap.cli.group"])
def test_ctrl_c_shows_no_traceback_while_the_command_is_imported(module: str) -> None:
    done = run(sys.executable, "-c", INTERRUPTED_IMPORT.format(module=module), check=False)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (130, "", False)


def test_on_a_terminal_progress_is_a_bar_that_vanishes() -> None:
    code = (
        "from lmdbitmap.cli.output import progress\n"
        "with progress('backing up sda', shown=True) as report: report(1 << 20, 4 << 20)\n"
        "print('done')"
    )
    said, seen = _on_terminal(code)
    assert said == "done\n"
    assert "backing up sda" in seen
    assert "1.0/4.0 MiB" in seen
    assert seen.endswith("\x1b[2K"), "the line is erased"


def _on_terminal(code: str) -> tuple[str, str]:
    """Run Python code with a terminal for stderr; answers its stdout and what the terminal received."""
    terminal, stderr = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with open(terminal, "rb"):
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                timeout=20,
            )
        finally:
            os.close(stderr)
        seen = all_that_appears(terminal)
    return done.stdout.decode(), seen.decode()


def test_log_lines_cannot_reach_the_terminal() -> None:
    code = (
        "import logging; from lmdbitmap.cli import main as boundary;"
        "boundary.run = lambda words, **how: logging.getLogger('lmdbitmap.x').warning('disk %s', '\\x1b[2J\\n') or 0;"
        "boundary.main()"
    )
    assert run(sys.executable, "-c", code).stderr == "lmdbitmap: disk \\x1b[2J\\n\n"


def test_a_full_disk_under_the_answer_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=20
        )
    assert done.returncode == 1
    assert (
        done.stderr
        == "lmdbitmap: standard output: No space left on device; free some space there and try again\n"
    )


def test_a_reader_that_went_away_is_no_error_to_talk_about() -> None:
    with read_by_nobody() as stdout:
        done = subprocess.run(
            [*COMMAND, "--help"], stdout=stdout, stderr=subprocess.PIPE, env=BUFFERED, timeout=20
        )
    assert (done.returncode, done.stderr) == (141, b"")


ENDINGS = [
    ("pass", 0),
    ("raise Untrusted('this', next_step='that')", 3),
    ("complain('this; that'); raise AlreadyTold(Busy('this', next_step='that'))", 4),
    ("raise Ended(signal.SIGTERM)", 143),
]
"""How a verb ends after it has answered, and the exit code."""
ANSWERS = """
import signal
from lmdbitmap.cli import main
from lmdbitmap.cli.logs import AlreadyTold
from lmdbitmap.cli.output import complain, say, stream_lines
from lmdbitmap.cli.signals import Ended
from lmdbitmap.errors import Busy, Untrusted
def answers(words, owns_process):
    say("an answer")
    {}
    return 0
main._run_verb = answers
main.main()
"""


@pytest.mark.parametrize(("ending", "code"), ENDINGS)
def test_an_answer_that_nobody_takes_hides_no_failure(ending: str, code: int) -> None:
    with read_by_nobody() as stdout:
        done = subprocess.run(
            [sys.executable, "-c", ANSWERS.format(ending)],
            stdout=stdout, stderr=subprocess.PIPE, env=BUFFERED, timeout=20,
        )  # fmt: skip
    assert (done.returncode, done.stderr.count(b"\n")) == (code or 141, code != 0)


@pytest.mark.parametrize(("ending", "code"), ENDINGS)
def test_a_full_disk_under_the_answer_hides_no_failure(ending: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ANSWERS.format(ending)],
            stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, timeout=20,
        )  # fmt: skip
    *_, last = lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (code or 1, 1 + (code != 0))
    assert last.startswith("lmdbitmap: standard output: No space left on device; ")


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_full_disk_under_an_answer_of_any_length_hides_no_disk_that_failed(length: int) -> None:
    """More than the buffer takes is refused while it is printed."""
    ending = f"""
    from lmdbitmap.cli.failing import ending_as
    from lmdbitmap.work.disks_failed import DisksFailed
    with ending_as(DisksFailed("done", 2, {{"sda": Busy("this", next_step="that")}}), "not done"):
        say("x" * {length})"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ANSWERS.format(ending.strip())],
            stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, timeout=20,
        )  # fmt: skip
    first, last = done.stderr.splitlines()
    assert first == "lmdbitmap: sda: not done: this; that"
    assert last.startswith("lmdbitmap: standard output: No space left on device; ")


@pytest.mark.parametrize(("ending", "code"), [*ENDINGS, ("import logging; logging.warning('a warning')", 0)])
def test_a_full_disk_under_the_errors_changes_no_exit_code(ending: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ANSWERS.format(ending)],
            stdout=subprocess.PIPE, stderr=full, text=True, timeout=20,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "an answer\n")


INTERRUPTED = """
    import sys
    def flush():
        del sys.stdout.flush
        raise KeyboardInterrupt
    sys.stdout.flush = flush
    """
"""Has the verb's answer wait for its reader until somebody presses Ctrl-C."""


@pytest.mark.parametrize(("ending", "code"), ENDINGS)
def test_ctrl_c_while_nobody_reads_the_answer_hides_no_failure(ending: str, code: int) -> None:
    done = run(sys.executable, "-c", ANSWERS.format(INTERRUPTED + ending), check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code or 130, "", 1)
    assert done.stderr.startswith("lmdbitmap: ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_answer_is_whole_for_a_reader_whose_pipe_does_not_block(unbuffered: str) -> None:
    """As programs in other languages make theirs: Python would leave out what does not fit in at once."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = ANSWERS.format("stream_lines('x' * 99 for _ in range(9999))")
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open(reader, "rb") as answer:
        with subprocess.Popen([sys.executable, "-c", code], stdout=writer, env=environment) as process:
            os.close(writer)
            time.sleep(1)
            assert len(answer.read()) == len("an answer\n") + 9999 * 100
        assert process.returncode == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_never_taken_by_files(closed: str) -> None:
    """A store opened as descriptor 1 would get the answer written into it."""
    code = (
        "import os; from lmdbitmap.cli import main as boundary;"
        "boundary.run = lambda words, **how: 0 if os.open('/dev/null', os.O_RDONLY) > 2 else 9; boundary.main()"
    )
    done = run("sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "words", [["restore", "backups", "sda", "out.raw"], ["--store", "here", "ls"], ["verify", "backups"]]
)
def test_a_folder_that_was_removed_under_the_command_is_named(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "here").mkdir()
    done = run(
        "sh", "-c", 'rmdir ../here; exec "$@"', "sh", *COMMAND, *words, cwd=tmp_path / "here", check=False
    )
    said = "lmdbitmap: the current folder is not there any more; change to another one\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_second_signal_ends_what_undoes_too_long_without_a_word() -> None:
    """The next backup cleans up, as after any death."""
    code = (
        "import signal, sys; from lmdbitmap.cli import main, signals\n"
        "def hangs(words, owns_process):\n"
        "    with signals.undoing():\n"
        "        try: signal.raise_signal(signal.SIGTERM)\n"
        "        finally: signal.raise_signal(signal.SIGTERM)\n"
        "main._run_verb = hangs; main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, b"")


def test_a_hook_that_fails_is_known_to_although_whoever_started_us_ignores_its_children(cli: Cli) -> None:
    """As daemons in Perl or C do, and what they start inherits it: then the system says of no child how it ended."""
    cli.add("sda")
    command = cli.command("checkpoint", "sda", "monday", "--hook", "false")
    begin = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    done = run(sys.executable, "-c", begin, *command, check=False)
    assert (done.returncode, "freeze sda` ended with 1" in done.stderr) == (1, True)
    assert [point["name"] for point in cli.json("info", "sda")["checkpoints"]] == ["epoch-1"]


def test_what_undoes_nothing_is_ended_at_once() -> None:
    """Also where it waits for what no signal interrupts, as for another writer of the store."""
    code = (
        "import signal; from lmdbitmap.cli import main\n"
        "main._run_verb = lambda words, owns_process: signal.raise_signal(signal.SIGTERM); main.main()"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == -signal.SIGTERM
