"""strace's output as system calls: who called when, with which arguments, and what the answer was.

Strings and names are asked for in hexadecimal, and whole. A call that another thread's came between is told in two
lines, which are joined here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

NEVER = 1 << 60
"""The tick at which a call ended that never returned."""
_LONGEST_STRING = 32 << 20


class Blind(AssertionError):
    """Something happened to a file that this module does not understand."""


def run(command: Sequence[str], trace: Path, system_calls: Iterable[str], *, timeout: float) -> None:
    """Run a program to its end and have all that it and its threads ask of the kernel written to `trace`."""
    words = [_strace(), "-f", "--seccomp-bpf", "-y", "-xx", "-s", str(_LONGEST_STRING), "-o", str(trace)]
    words += ["-e", "signal=none", "-e", "raw=read,readv", "-e", f"trace={','.join(system_calls)}", *command]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except BaseException:
        process.terminate()  # strace takes its child along; killed, it would leave it behind
        process.communicate()
        raise
    assert process.returncode == 0, f"{command}: exit code {process.returncode}\n{said}"


def _strace() -> str:
    found = shutil.which("strace")
    assert found is not None, "strace is not installed; run tools/setup.sh"
    return found


class Call(NamedTuple):
    begin: int
    end: int
    thread: int
    name: str
    arguments: list[str]
    answer: int
    line: str
    """For complaints: the beginning of it."""


_LINE = re.compile(r"(\d+) +(.*)", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)", re.DOTALL)
_UNFINISHED = " <unfinished ...>"
_WHOLE = re.compile(r"(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+|\?)(.*)", re.DOTALL)
_ARGUMENT = re.compile(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+")


def calls(lines: Iterable[str]) -> Iterator[Call]:
    """Every system call that returned or will never return, in the order in which they began to be known."""
    waiting: dict[int, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        found = _LINE.fullmatch(line.rstrip("\n"))
        if found is None:
            raise Blind(f"no line of strace's: {line[:200]!r}")
        thread, text = int(found[1]), found[2]
        resumed = _RESUMED.fullmatch(text)
        if text.endswith(_UNFINISHED):
            waiting[thread] = 2 * number, text.removesuffix(_UNFINISHED)
        elif resumed is not None:
            begin, head = waiting.pop(thread)
            yield _call(begin, 2 * number + 1, thread, head + resumed[2])
        elif not text.startswith(("+++", "---")):
            yield _call(2 * number, 2 * number + 1, thread, text)
    for thread, (begin, head) in waiting.items():
        yield _call(begin, NEVER, thread, head + ") = ?")


def _call(begin: int, end: int, thread: int, text: str) -> Call:
    found = _WHOLE.fullmatch(text)
    if found is None:
        raise Blind(f"not understood: {text[:200]!r}")
    answer = -1 if found[3] == "?" else int(found[3], 0)
    arguments = [argument.strip() for argument in _ARGUMENT.findall(found[2])]
    return Call(begin, end, thread, found[1], arguments, answer, _readable(text))


def _readable(text: str) -> str:
    """The call's beginning, with names as people write them."""
    return re.sub(r"\\x([2-7][0-9a-f])", lambda found: chr(int(found[1], 16)), text[:1000])[:200]


def string(quoted: str) -> bytes:
    """A string of strace's, all of it in hexadecimal."""
    if not quoted.startswith('"') or not quoted.endswith('"'):
        raise Blind(f"cut short: {quoted[:40]!r} … {quoted[-40:]!r}")
    return bytes.fromhex(quoted[1:-1].replace("\\x", ""))


_VECTOR = re.compile(r"iov_base=([^,]+), iov_len")


def vector(argument: str) -> bytes:
    return b"".join(string(base) for base in _VECTOR.findall(argument))


_DESCRIPTOR = re.compile(r"(-?\d+|AT_FDCWD)(?:<([^>]*)>)?(\(deleted\))?")


def path_behind(argument: str) -> str:
    """What strace says that a descriptor leads to."""
    found = _DESCRIPTOR.fullmatch(argument)
    assert found is not None, argument[:100]
    return bytes.fromhex((found[2] or "").replace("\\x", "")).decode(errors="replace")


def number(argument: str) -> int:
    found = _DESCRIPTOR.fullmatch(argument)
    return int(argument, 0) if found is None else int(found[1])
