"""What a process did to its files, told by the kernel: strace's output as one ordered list of operations.

    strace ──▶ lines ──▶ calls (split ones joined) ──▶ operations on nodes, and milestones

- A *tick* is a place in that order. Each line has two, so that a call that nobody interrupted begins at one and
  ends at the next, and calls of several threads overlap as they did.
- A *node* is a file or folder, whatever its name is at the moment: descriptors and names lead to it.
- A *milestone* is a line of JSON that the process writes to /dev/null: strace sees it in its place.
- Only what happens under the root counts. There, whatever could change a file in a way that is not understood
  is an error: the laboratory must not be blind without knowing it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tests.crash.power_cut.strace import NEVER, Blind, Call, calls, number, path_behind, run, string, vector

NOT_ON_DISK = frozenset({"lock.mdb"})
"""Files whose content nobody needs after a restart: LMDB makes its lock file anew."""


@dataclass(eq=False)
class Node:
    """A file or a folder."""

    number: int
    is_folder: bool
    entries: dict[str, Node] = field(default_factory=dict)
    """Of a folder, as the process sees it while the trace is read."""
    size: int = 0


class Write(NamedTuple):
    """Bytes into a file; zeroing a range is this too. `synced` ones are durable when they return."""

    begin: int
    end: int
    thread: int
    node: Node
    offset: int
    data: bytes
    synced: bool


class Resize(NamedTuple):
    begin: int
    end: int
    thread: int
    node: Node
    size: int


class Sync(NamedTuple):
    """fsync or fdatasync. Only `whole` ones bring a file's times to the disk."""

    begin: int
    end: int
    thread: int
    node: Node
    whole: bool


class Naming(NamedTuple):
    """Names that appear and vanish in one stroke: (folder, name, what it leads to then)."""

    begin: int
    end: int
    thread: int
    changes: tuple[tuple[Node, str, Node | None], ...]


Operation: TypeAlias = Write | Resize | Sync | Naming


class Milestone(NamedTuple):
    tick: int
    thread: int
    told: dict[str, Any]


@dataclass
class Recording:
    """All that happened under `root`, which was an empty folder."""

    root: str
    folder: Node
    operations: list[Operation]
    milestones: list[Milestone]

    def node_at(self, path: str) -> Node:
        """The file that has the path, relative to the root, in the end."""
        node = self.folder
        for name in path.split("/"):
            node = node.entries[name]
        return node

    def between(self, begun: int, ended: int, folder: str) -> Recording:
        """What happened in a folder of the root, which nothing else touched, from one tick to another."""
        return Recording(
            os.path.join(self.root, folder),
            self.node_at(folder),
            [operation for operation in self.operations if begun <= operation.begin < ended],
            [milestone for milestone in self.milestones if begun <= milestone.tick < ended],
        )


def record(command: Sequence[str], root: Path, *, timeout: float = 120.0) -> Recording:
    """Run a program that writes in the empty folder `root`, and listen."""
    assert not any(root.iterdir()), f"{root} is not empty"
    trace = root.with_name(f"{root.name}.strace")
    try:
        run(command, trace, (*_HANDLERS, *_NOT_UNDERSTOOD, *_FORBIDDEN), timeout=timeout)
        with trace.open(encoding="ascii") as lines:
            return parse(lines, str(root))
    finally:
        trace.unlink(missing_ok=True)


@dataclass(eq=False)
class _Opened:
    """An open file: descriptors that were duplicated share it."""

    node: Node
    synced: bool
    appends: bool
    position: int = 0


def parse(lines: Iterable[str], root: str) -> Recording:
    """Read a trace of a process that found `root` empty."""
    listener = _Listener(root)
    # a call that overlaps others is told when it ends, and counts from when it began
    for call in sorted(calls(lines), key=lambda call: call.begin):
        listener.hear(call)
    return Recording(root, listener.folder, listener.operations, listener.milestones)


class _Listener:
    """Follows descriptors and names. `hear` every call in the order of their beginnings."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._numbers = itertools.count()
        self.folder = Node(next(self._numbers), is_folder=True)
        self.operations: list[Operation] = []
        self.milestones: list[Milestone] = []
        self._open: dict[int, _Opened] = {}
        self._opening: list[tuple[int, int, _Opened | None]] = []
        """(tick, number, file) of calls that had not returned: until then another thread's file may have the number."""

    def hear(self, call: Call) -> None:
        self._take_opened(call.begin)
        handler = _HANDLERS.get(call.name)
        if handler is None:
            if call.name in _FORBIDDEN or self._concerns_us(call):
                raise Blind(f"not understood: {call.line}")
        elif call.answer >= 0 or call.end == NEVER:
            handler(self, call)
        elif call.name in _WRITERS and self._concerns_us(call):
            raise Blind(f"a failed call may have done something: {call.line}")

    def _take_opened(self, tick: int) -> None:
        for end, number_, file in self._opening:
            if end <= tick:
                self._open.pop(number_, None)
                if file is not None:
                    self._open[number_] = file
        self._opening = [opening for opening in self._opening if opening[0] > tick]

    def _concerns_us(self, call: Call) -> bool:
        return any(self.root.encode().hex() in argument.replace("\\x", "") for argument in call.arguments)

    # -- names --

    def _inside(self, path: str) -> str | None:
        """A path relative to the root; None elsewhere."""
        path = os.path.normpath(path)
        if path == self.root:
            return ""
        return path.removeprefix(self.root + "/") if path.startswith(self.root + "/") else None

    def _path(self, folder: str, name: str) -> str | None:
        path = os.path.join(path_behind(folder), string(name).decode())
        if not os.path.isabs(path):
            raise Blind(f"nobody knows the folder of {path!r}")
        return self._inside(path)

    def _place(self, path: str) -> tuple[Node, str]:
        parent, name = os.path.split(path)
        return self._find(parent), name

    def _find(self, path: str) -> Node:
        node = self.folder
        for name in filter(None, path.split("/")):
            node = node.entries[name]
        return node

    def _name(self, call: Call, *changes: tuple[Node, str, Node | None]) -> None:
        for folder, name, node in changes:
            if node is None:
                folder.entries.pop(name, None)
            else:
                folder.entries[name] = node
        self.operations.append(Naming(call.begin, call.end, call.thread, changes))

    def opened_by_name(self, call: Call) -> None:
        """The C library reads what the kernel is set to so; of what concerns us nothing is opened like that."""
        name, flags = call.arguments[:2]
        if "O_RDONLY" not in flags.split("|") or not string(name).startswith(b"/proc/"):
            raise Blind(f"not understood: {call.line}")
        self._opening.append((call.end, call.answer, None))

    def opened(self, call: Call) -> None:
        at, name, flags = call.arguments[:3]
        path = self._path(at, name)
        if path is None or os.path.basename(path) in NOT_ON_DISK or call.end == NEVER:
            self._opening.append((call.end, call.answer, None))
            return
        words = set(flags.split("|"))
        if "O_TMPFILE" in words:  # without a name, nothing of it is found after a power cut
            self._opening.append((call.end, call.answer, None))
            return
        if "O_DIRECT" in words:
            raise Blind(f"not understood: {call.line}")
        parent, base = self._place(path) if path else (self.folder, "")
        node = parent.entries.get(base) if path else self.folder
        if node is None:
            node = Node(next(self._numbers), is_folder=False)
            self._name(call, (parent, base, node))
        elif "O_TRUNC" in words:
            self._resize(call, node, 0)
        file = _Opened(node, bool(words & {"O_DSYNC", "O_SYNC"}), "O_APPEND" in words)
        self._opening.append((call.end, call.answer, file))

    def closed(self, call: Call) -> None:
        if (
            self._inside(path_behind(call.arguments[0])) is not None
        ):  # else another thread has the number by now
            self._open.pop(number(call.arguments[0]), None)

    def duplicated(self, call: Call) -> None:
        self._opening.append((call.end, call.answer, self._open.get(number(call.arguments[0]))))

    def controlled(self, call: Call) -> None:
        if call.arguments[1].startswith("F_DUPFD"):
            self.duplicated(call)

    def made_folder(self, call: Call) -> None:
        at, name = call.arguments[:2] if call.name == "mkdirat" else ("AT_FDCWD", call.arguments[0])
        path = self._path(at, name)
        if path:
            self._name(call, (*self._place(path), Node(next(self._numbers), is_folder=True)))

    def renamed(self, call: Call) -> None:
        if call.name == "rename":
            source, target = (self._path("AT_FDCWD", name) for name in call.arguments)
        else:
            source, target = self._path(*call.arguments[:2]), self._path(*call.arguments[2:4])
        if source is None and target is None:
            return
        if source is None or target is None or (call.name == "renameat2" and call.arguments[4] != "0"):
            raise Blind(f"not understood: {call.line}")
        node = self._find(source)
        self._name(call, (*self._place(source), None), (*self._place(target), node))

    def removed(self, call: Call) -> None:
        at, name = call.arguments[:2] if call.name == "unlinkat" else ("AT_FDCWD", call.arguments[0])
        path = self._path(at, name)
        if path and os.path.basename(path) not in NOT_ON_DISK:
            self._name(call, (*self._place(path), None))

    # -- content --

    def _file(self, call: Call) -> _Opened | None:
        """The open file of a call's first argument, where it is one of ours; strace must agree."""
        argument = call.arguments[0]
        file = self._open.get(number(argument))
        path = path_behind(argument)
        is_ours = self._inside(path) is not None and os.path.basename(path) not in NOT_ON_DISK
        if (file is not None) != is_ours and "(deleted)" not in argument:
            raise Blind(f"it leads elsewhere than we think: {call.line}")
        return file

    def sought(self, call: Call) -> None:
        file = self._file(call)
        if file is not None:
            file.position = call.answer

    def read(self, call: Call) -> None:
        file = self._open.get(int(call.arguments[0], 0))
        if file is not None:
            file.position += call.answer

    def written(self, call: Call) -> None:
        data = string(call.arguments[1]) if call.name == "write" else vector(call.arguments[1])
        if path_behind(call.arguments[0]) == "/dev/null":
            self.milestones.append(Milestone(call.begin, call.thread, json.loads(data)))
            return
        file = self._file(call)
        if file is None:
            return
        if file.appends or call.end == NEVER:
            raise Blind(f"not understood: {call.line}")
        self._write(call, file, file.position, data)
        file.position += call.answer

    def written_at(self, call: Call) -> None:
        file = self._file(call)
        if file is None:
            return
        if call.name == "pwritev2" and call.arguments[4:] not in ([], ["0"]):
            raise Blind(f"not understood: {call.line}")
        data = string(call.arguments[1]) if call.name == "pwrite64" else vector(call.arguments[1])
        self._write(call, file, int(call.arguments[3]), data)

    def _write(self, call: Call, file: _Opened, offset: int, data: bytes) -> None:
        data = data if call.end == NEVER else data[: call.answer]
        if call.end != NEVER and len(data) != call.answer:
            raise Blind(f"{len(data)} bytes were seen, and {call.answer} written: {call.line}")
        file.node.size = max(file.node.size, offset + len(data))
        self.operations.append(Write(call.begin, call.end, call.thread, file.node, offset, data, file.synced))

    def resized(self, call: Call) -> None:
        if call.name == "truncate":
            path = self._path("AT_FDCWD", call.arguments[0])
            node = None if path is None else self._find(path)
        else:
            file = self._file(call)
            node = None if file is None else file.node
        if node is not None:
            self._resize(call, node, int(call.arguments[1]))

    def _resize(self, call: Call, node: Node, size: int) -> None:
        node.size = size
        self.operations.append(Resize(call.begin, call.end, call.thread, node, size))

    def allocated(self, call: Call) -> None:
        """Only what zeroes a range within the file: FALLOC_FL_KEEP_SIZE with PUNCH_HOLE or ZERO_RANGE."""
        file = self._file(call)
        if file is None:
            return
        mode, offset, length = set(call.arguments[1].split("|")), *map(int, call.arguments[2:4])
        if "FALLOC_FL_KEEP_SIZE" not in mode or not mode & {"FALLOC_FL_PUNCH_HOLE", "FALLOC_FL_ZERO_RANGE"}:
            raise Blind(f"not understood: {call.line}")
        zeroes = bytes(max(min(length, file.node.size - offset), 0))
        self.operations.append(
            Write(call.begin, call.end, call.thread, file.node, offset, zeroes, file.synced)
        )

    def synced(self, call: Call) -> None:
        file = self._file(call)
        if file is not None:
            whole = call.name == "fsync"
            self.operations.append(Sync(call.begin, call.end, call.thread, file.node, whole))

    # -- what must not happen --

    def mapped(self, call: Call) -> None:
        _, _, protection, flags, argument = call.arguments[:5]
        shared = "MAP_SHARED" in flags and "PROT_WRITE" in protection
        if shared and argument != "-1" and self._file(call._replace(arguments=[argument])) is not None:
            raise Blind(f"a file is written through memory: {call.line}")

    def asked_device(self, call: Call) -> None:
        if call.arguments[1] not in _HARMLESS_REQUESTS and self._concerns_us(call):
            raise Blind(f"not understood: {call.line}")

    def cloned(self, call: Call) -> None:
        if "CLONE_THREAD" not in call.line:
            raise Blind(f"another process would have descriptors of its own: {call.line}")


_HANDLERS: dict[str, Callable[[_Listener, Call], None]] = {
    "open": _Listener.opened_by_name,
    "openat": _Listener.opened,
    "close": _Listener.closed,
    "dup": _Listener.duplicated,
    "dup2": _Listener.duplicated,
    "dup3": _Listener.duplicated,
    "fcntl": _Listener.controlled,
    "mkdir": _Listener.made_folder,
    "mkdirat": _Listener.made_folder,
    "rename": _Listener.renamed,
    "renameat": _Listener.renamed,
    "renameat2": _Listener.renamed,
    "unlink": _Listener.removed,
    "unlinkat": _Listener.removed,
    "rmdir": _Listener.removed,
    "lseek": _Listener.sought,
    "read": _Listener.read,
    "readv": _Listener.read,
    "write": _Listener.written,
    "writev": _Listener.written,
    "pwrite64": _Listener.written_at,
    "pwritev": _Listener.written_at,
    "pwritev2": _Listener.written_at,
    "ftruncate": _Listener.resized,
    "truncate": _Listener.resized,
    "fallocate": _Listener.allocated,
    "fsync": _Listener.synced,
    "fdatasync": _Listener.synced,
    "mmap": _Listener.mapped,
    "clone": _Listener.cloned,
    "clone3": _Listener.cloned,
    "fork": _Listener.cloned,
    "vfork": _Listener.cloned,
    "ioctl": _Listener.asked_device,
}
_WRITERS = {
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "ftruncate",
    "truncate",
    "fsync",
    "fdatasync",
}
_HARMLESS_REQUESTS = {"TCGETS", "FIOCLEX", "FIONCLEX"}

_FORBIDDEN = (
    "io_uring_setup", "io_submit", "openat2", "creat", "link", "linkat", "symlink", "symlinkat", "mknod",
    "mknodat",
)  # fmt: skip
"""Nobody here needs them, and it is not always seen which file they concern."""
_NOT_UNDERSTOOD = ("copy_file_range", "sendfile", "splice")
"""An error where they concern a file of ours. `sync` and its like are not listened to: they can only do good."""
