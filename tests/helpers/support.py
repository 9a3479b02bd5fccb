"""What tests share: needing a tool, running one, starting a server and knowing when it is ready, raw images.

No test sleeps. Everything awaited here ends in an event (a line, an exit, a connection) or in a failure that
shows what the program said.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TypeAlias

import pytest

Argument: TypeAlias = str | os.PathLike[str]
Address: TypeAlias = str | os.PathLike[str] | tuple[str, int]
"""The path of a unix socket, or (host, port)."""

PATIENCE_SECONDS = 20.0
"""How long anything may take before it counts as hung; a busy machine of one core is the measure."""


# --- this process ---


def open_files() -> list[str]:
    """Its descriptors, once those are closed that nobody uses any more; to be compared with the same later."""
    gc.collect()
    return os.listdir("/proc/self/fd")


# --- tools ---


def requires(tool: str, version: str | None = None) -> pytest.MarkDecorator:
    """Skip a test, with a sentence, on a machine that lacks `tool` or has it older than `version`."""
    reason = why_unusable(tool, version)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def why_unusable(tool: str, version: str | None = None) -> str | None:
    """The sentence that says why this machine's `tool` will not do, or None when it will."""
    if shutil.which(tool) is None:
        return f"{tool} is not installed; run tools/setup.sh"
    if version is None:
        return None
    found = tool_version(tool)
    if _numbers(found) < _numbers(version):
        return f"{tool} is {found}, and this needs {version} or newer"
    return None


@functools.cache
def tool_version(tool: str) -> str:
    """The version that `tool --version` names first, such as 7.2.22."""
    said = run(tool, "--version", check=False)
    found = re.search(r"\d+(\.\d+)+", said.stdout + said.stderr)
    assert found is not None, f"{tool} --version names no version: {said.stdout}{said.stderr}"
    return found.group()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


# --- programs that end of themselves ---


def run(
    *command: Argument,
    timeout: float = PATIENCE_SECONDS,
    check: bool = True,
    cwd: Argument | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; fail with all it said when it hangs or, if `check`, exits non-zero.

    `env` is added to the environment, it does not replace it.
    """
    words = [os.fspath(word) for word in command]
    environment = {**os.environ, **(env or {})}
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment
        )
    except subprocess.TimeoutExpired as hung:
        # Python keeps what was read until then as bytes, whatever `text` says.
        said = [
            part.decode(errors="replace") if isinstance(part, bytes) else part
            for part in (hung.stdout, hung.stderr)
        ]
        pytest.fail(_told(words, f"still running after {timeout} s", said[0] or "", said[1] or ""))
    if check and done.returncode != 0:
        pytest.fail(_told(words, f"exit code {done.returncode}", done.stdout, done.stderr))
    return done


@contextlib.contextmanager
def read_by_nobody() -> Iterator[int]:
    """The stdout for a program whose reader is gone before it starts: one gone afterwards may have had its answer."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def all_that_appears(terminal: int) -> bytes:
    """Until nobody has its other side. What was written there comes to this one in parts, and later than it left."""
    seen = b""
    with contextlib.suppress(OSError):
        while drawn := os.read(terminal, 65536):
            seen += drawn
    return seen


def _told(words: list[str], outcome: str, stdout: str, stderr: str) -> str:
    return f"{' '.join(words)}: {outcome}\n--- stdout\n{stdout}\n--- stderr\n{stderr}"


# --- programs that stay: servers ---


class Child:
    """A program started by `spawn`. Its output is drained all the time, so it never blocks on a full pipe."""

    def __init__(self, words: list[str], process: subprocess.Popen[str]) -> None:
        self.words = words
        self.process = process
        self._stdout: list[str] = []
        self._stderr: list[str] = []
        self._news = threading.Condition()
        self._open_pipes = 2
        self._readers = [
            threading.Thread(target=self._drain, args=pipe, daemon=True)
            for pipe in ((process.stdout, self._stdout), (process.stderr, self._stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        """Everything it said so far; all of it after `wait`."""
        return "".join(self._stdout)

    @property
    def stderr(self) -> str:
        return "".join(self._stderr)

    def wait_for_line(self, pattern: str, timeout: float = PATIENCE_SECONDS) -> re.Match[str]:
        """The first line of its standard output in which `pattern` is found, waiting for it if need be."""
        deadline = time.monotonic() + timeout
        with self._news:
            while (match := self._first_line(pattern)) is None:
                left = deadline - time.monotonic()
                if self._open_pipes == 0 or left <= 0 or not self._news.wait(left):
                    self.fail(f"never said {pattern!r} within {timeout} s")
        return match

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        """Its exit code, once it has ended and its last word is read."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.fail(f"still running after {timeout} s")
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():
                self.fail("ended, but a process that it left behind still holds its output")
        return code

    def fail(self, problem: str) -> None:
        """Fail the test, showing what the program said."""
        pytest.fail(_told(self.words, problem, self.stdout, self.stderr))

    def _first_line(self, pattern: str) -> re.Match[str] | None:
        found = (re.search(pattern, line.rstrip("\n")) for line in self._stdout)
        return next((match for match in found if match is not None), None)

    def _drain(self, pipe: IO[str], lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                with self._news:
                    lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._open_pipes -= 1
            self._news.notify_all()


@contextlib.contextmanager
def spawn(
    *command: Argument, cwd: Argument | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Child]:
    """Run a program beside the test; afterwards end it, and nothing but it: SIGTERM, then SIGKILL."""
    words = [os.fspath(word) for word in command]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",  # nbdkit said bytes that are no text when it was ended
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )
    child = Child(words, process)
    try:
        yield child
    finally:
        _end(process)
        child.wait()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


@contextlib.contextmanager
def handled(number: signal.Signals, how: signal.Handlers) -> Iterator[None]:
    """Handle a signal so in the block, as do programs begun there: tests under nohup begin with SIGHUP ignored."""
    before = signal.signal(number, how)
    try:
        yield
    finally:
        signal.signal(number, before)


def signal_another_thread(child: Child, number: signal.Signals) -> None:
    """Send a signal that wakes no system call of the main thread, as one does that comes right before such a call."""
    other = next(task for name in os.listdir(f"/proc/{child.pid}/task") if (task := int(name)) != child.pid)
    assert ctypes.CDLL(None).tgkill(child.pid, other, int(number)) == 0


def wait_for_socket(address: Address, child: Child, timeout: float = PATIENCE_SECONDS) -> None:
    """Return once `address` takes connections; fail at once when `child` ends before that.

    The one place where tests poll: a foreign server has no other way to say that it listens. Ours prints
    `ready`, see `Child.wait_for_line`.
    """
    deadline = time.monotonic() + timeout
    while not _connects(address):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(0.01)
            child.wait()
            child.fail(f"ended with {child.process.returncode} before it listened at {address}")
        if time.monotonic() > deadline:
            child.fail(f"does not listen at {address} after {timeout} s")


def free_port() -> int:
    """A port of 127.0.0.1 where nobody listens, for a server that wants to be told one.

    The kernel gives none of these to a connection, so it stays free while its server is away.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _connects(address: Address) -> bool:
    over_tcp = isinstance(address, tuple)
    with socket.socket(socket.AF_INET if over_tcp else socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address if isinstance(address, tuple) else os.fspath(address))
        except OSError:
            return False
        return True


# --- images ---


def no_ascii(length: int) -> bytes:
    """Random bytes; whatever a test writes over them in letters is a change, of each single byte."""
    return os.urandom(length).translate(_WITH_HIGH_BIT)


_WITH_HIGH_BIT = bytes(byte | 0x80 for byte in range(256))


def make_raw_image(path: Path, size: int, data: Iterable[tuple[int, bytes]] = ()) -> Path:
    """A sparse raw image of `size` bytes: `data` is pairs of (offset, bytes), the rest reads as zeroes."""
    with path.open("xb") as image:
        image.truncate(size)
        for offset, content in data:
            assert 0 <= offset <= size - len(content), "data outside the image would make it longer"
            image.seek(offset)
            image.write(content)
    return path
