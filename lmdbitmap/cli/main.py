"""The boundary between verbs and the shell: runs one verb and ends with an exit code and at most one sentence.

| exit code | when |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | the command was not understood |
| 3 | the bitmap cannot be trusted, a full backup is needed |
| 4 | busy or locked |
| 130, 143, 129 | ended by Ctrl-C, SIGTERM, SIGHUP; verbs that copy undo what they began first |
| 141 | the reader of our output went away |

click and rich are imported inside functions, so that an installation without them gets a message that names them.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, TextIO

from lmdbitmap.cli import logs
from lmdbitmap.cli.signals import Ended
from lmdbitmap.errors import (
    Busy,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    SomeFailed,
    Untrusted,
    error_from_os,
)

PROGRAM = "lmdbitmap"
FAILED = 1
USAGE = 2
_EXIT_CODES: dict[type[LmdbitmapError], int] = {InvalidArgument: USAGE, Untrusted: 3, Busy: 4}
SIGNALLED = 128
"""The exit code for a signal is this plus the signal's number, as in shells."""
READER_GONE = 141
_NO_THREAD = "can't start new thread"
"""What Python says for it."""


def main() -> NoReturn:
    _occupy_standard_descriptors()
    sys.stdout, sys.stderr = _dependable(1, sys.stdout, -1), _dependable(2, sys.stderr, 1)
    logs.begin()
    # Where whoever started us ignores it, every hook ends with 0.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = run(sys.argv[1:], owns_process=True)
    _flush_or_drop(sys.stderr)
    sys.exit(code)


def run(words: Sequence[str], *, owns_process: bool = False) -> int:
    """Run the verb in `words` and return the exit code. With `owns_process` it may change the process's priority.

    If the answer cannot be written, that is a failure too; one that came before it has the exit code.
    """
    code = 0
    try:
        code = _outcome(words, owns_process)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop(sys.stdout)  # silently, as cat and grep do
        return code or READER_GONE
    except OSError as refusal:
        _drop(sys.stdout)
        failed = _fail_as(_error_from(refusal))
        return code or failed
    except KeyboardInterrupt:  # while nobody reads the answer
        _drop(sys.stdout)
        return code or _fail_by(signal.SIGINT)


def _outcome(words: Sequence[str], owns_process: bool) -> int:
    """Run the verb, report its failure, and return the exit code. What standard output refuses is raised."""
    try:
        return _run_verb(words, owns_process)
    except LmdbitmapError as error:
        return _fail_as(error)
    except logs.AlreadyTold as end:
        return exit_code_of(end.error)
    except KeyboardInterrupt:
        return _fail_by(signal.SIGINT)
    except Ended as end:
        return _fail_by(end.signal)
    except OSError:
        raise
    except MemoryError:
        return _fail("there is not enough memory; free some memory and try again", FAILED)
    except RuntimeError as refused:
        if str(refused) != _NO_THREAD:
            return _own_bug(refused)
        return _fail("the system refuses another thread; have fewer, or allow more (ulimit -u)", FAILED)
    except ModuleNotFoundError as missing:
        if missing.name not in ("click", "rich", "prometheus_client"):
            return _own_bug(missing)
        return _fail(f"the command line needs {missing.name}; run: pip install 'lmdbitmap[cli]'", FAILED)
    except Exception as bug:
        return _own_bug(bug)


def _run_verb(words: Sequence[str], owns_process: bool) -> int:
    import click

    from lmdbitmap.cli.group import verbs

    try:
        with verbs.make_context(PROGRAM, list(words), obj=owns_process) as context:
            verbs.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort:
        return _fail_by(signal.SIGINT)
    except click.UsageError as error:
        path = PROGRAM if error.ctx is None else error.ctx.command_path
        return _fail(f"{_one_line(error.format_message())} (see '{path} --help')", error.exit_code)
    except click.ClickException as error:
        return _fail(_one_line(error.format_message()), error.exit_code)
    return 0


def _fail_by(ending: signal.Signals) -> int:
    problem = f"ended by {ending.name} before it reported that its work was done"
    return _fail(f"{problem}; look at the result, and run it again if need be", SIGNALLED + ending)


def _error_from(refusal: OSError) -> LmdbitmapError:
    """Return the error for a refusal that no other place has words for: it has to do with the process itself."""
    if refusal.errno == errno.ENOENT and refusal.filename is None:  # os.getcwd, for a relative path
        return NotFound("the current folder is not there any more", next_step="change to another one")
    return error_from_os(str(refusal.filename or "standard output"), refusal)


def exit_code_of(error: LmdbitmapError) -> int:
    if isinstance(error, SomeFailed):
        codes = {exit_code_of(cause) for cause in error.causes}
        return codes.pop() if len(codes) == 1 else FAILED
    return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), FAILED)


def _one_line(message: str) -> str:
    return " ".join(message.split()).removesuffix(".")


def _fail_as(error: LmdbitmapError) -> int:
    return _fail(str(error), exit_code_of(error))


def _fail(message: str, code: int) -> int:
    logs.last_words(message)
    return code


def _own_bug(bug: Exception) -> int:
    if os.environ.get("LMDBITMAP_DEBUG"):
        traceback.print_exception(bug)
    return _fail(
        f"{type(bug).__name__}: {bug}; this is a fault of lmdbitmap itself, please report it together with what"
        " the same command says after LMDBITMAP_DEBUG=1",
        FAILED,
    )


def _flush_or_drop(stream: TextIO) -> None:
    """Write what is left of `stream`, or drop it: Python would fail on it at exit, with an exit code of its own."""
    try:
        stream.flush()
    except OSError:
        _drop(stream)


def _drop(stream: TextIO) -> None:
    """Send what `stream` has not written to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _occupy_standard_descriptors() -> None:
    """Make sure that descriptors 0, 1 and 2 are taken.

    If one were free, the next file opened, such as the store or an image, would get its number, and printed output
    would land in that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _dependable(descriptor: int, stream: TextIO | None, buffering: int) -> TextIO:
    """Return a stream in place of Python's own, which is None where it was closed: it writes all of a text, or raises.

    Python's own leaves out what does not fit in at once where its buffer is turned off (PYTHONUNBUFFERED) and the pipe
    does not block. A name may have letters that its encoding lacks.
    """
    os.set_blocking(descriptor, True)  # another process that shares the pipe may have made it non-blocking
    encoding = None if stream is None else stream.encoding
    return open(descriptor, "w", buffering, encoding=encoding, errors="backslashreplace", closefd=False)
