"""What a power cut may leave on the disk, of all that a recording tells.

At a moment (a tick of the recording) every operation that had begun is either *durable* or *loose*:

- what a sync covers is durable: all that had returned before the sync began, once the sync has returned;
  a synced write (O_DSYNC) covers itself; names need a sync of their folder;
- what is loose may be on the disk or not, each for itself and in any order. Data is torn at 512 bytes: a
  sector holds what it held after any operation from the last durable one to the newest. So does a file's
  size, as one more sector. A rename is there or not, as a whole.

A `Choice` says which loose operations *landed*. It may differ from sector to sector, which is a torn write.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

from tests.crash.power_cut.recording import Naming, Node, Operation, Recording, Resize, Sync, Write
from tests.crash.power_cut.strace import NEVER

SECTOR = 512
NOTHING = bytes(SECTOR)
SIZE = -1
"""Where the sector would stand: the file's size."""
NAMES = -2
"""Where the sector would stand: the folder's names."""

Content: TypeAlias = dict[int, bytes]
"""Sectors by number; those that are not named are zeroes."""
Place: TypeAlias = tuple[int, int]
"""(a node's number, a sector of it, or `SIZE`, or `NAMES`)."""
Choice: TypeAlias = Callable[[int, Place], bool]
"""Whether the loose operation with that index landed at that place."""


class File(NamedTuple):
    size: int
    content: Content

    @classmethod
    def cut(cls, size: int, content: Content) -> File:
        """Without what lies past the end."""
        last, kept = divmod(size, SECTOR)
        content = {number: sector for number, sector in content.items() if number * SECTOR < size}
        if last in content:
            content[last] = content[last][:kept].ljust(SECTOR, b"\0")
        return cls(size, content)

    def differing_sectors(self, other: File) -> list[int]:
        """Where the two do not hold the same; past the end there are zeroes."""
        mine, theirs = self.content, other.content
        return [
            number
            for number in mine.keys() | theirs.keys()
            if mine.get(number, NOTHING) != theirs.get(number, NOTHING)
        ]

    def data(self) -> bytes:
        """All of it, for small files."""
        whole = bytearray(self.size + -self.size % SECTOR)
        for number, sector in self.content.items():
            whole[number * SECTOR : (number + 1) * SECTOR] = sector
        return bytes(whole[: self.size])


@dataclass(frozen=True)
class DiskState:
    """Folders and files by their paths, relative to the recording's root; a folder comes before what is in it."""

    folders: list[str]
    files: dict[str, File]

    @cached_property
    def digest(self) -> bytes:
        """Of two states the same if they are."""
        seen = blake2b("\0".join(sorted(self.folders)).encode(), digest_size=16)
        for path, file in sorted(self.files.items()):
            seen.update(f"\0{path}\0{file.size}\0".encode())
            for number, sector in sorted(file.content.items()):
                if sector != NOTHING:
                    seen.update(number.to_bytes(8, "little") + sector)
        return seen.digest()


class _Version(NamedTuple):
    """What a sector, or a size, is after the operation with that number."""

    number: int
    value: bytes
    size: int = 0


class History:
    """Every version that every sector and every size ever had in the page cache."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.operations = recording.operations
        self.begins = [operation.begin for operation in self.operations]
        self.durable_from = _durable_from(self.operations)
        self._sectors: dict[int, dict[int, list[_Version]]] = defaultdict(lambda: defaultdict(list))
        self._sizes: dict[int, list[_Version]] = defaultdict(list)
        for index, operation in enumerate(self.operations):
            if isinstance(operation, Write):
                self._write(index, operation)
            elif isinstance(operation, Resize):
                self._resize(index, operation)

    def _write(self, index: int, write: Write) -> None:
        sectors, offset, data = self._sectors[write.node.number], write.offset, memoryview(write.data)
        end = offset + len(data)
        if end > self._size(write.node.number):
            self._sizes[write.node.number].append(_Version(index, b"", end))
        while data:
            number, start = divmod(offset, SECTOR)
            piece = bytes(data[: SECTOR - start])
            if len(piece) < SECTOR:
                old = _newest(sectors[number])
                piece = old[:start] + piece + old[start + len(piece) :]
            sectors[number].append(_Version(index, piece))
            data, offset = data[SECTOR - start :], offset + SECTOR - start

    def _resize(self, index: int, resize: Resize) -> None:
        """What is cut off reads as zeroes, should the file grow again."""
        last, kept = divmod(resize.size, SECTOR)
        for number, versions in self._sectors[resize.node.number].items():
            if number >= last and resize.size < self._size(resize.node.number):
                rest = _newest(versions)[:kept] if number == last else b""
                versions.append(_Version(index, rest.ljust(SECTOR, b"\0")))
        self._sizes[resize.node.number].append(_Version(index, b"", resize.size))

    def _size(self, node: int) -> int:
        sizes = self._sizes[node]
        return sizes[-1].size if sizes else 0

    def seen(self, node: Node, tick: int) -> File:
        """What a reader of the file saw at that tick, when no write was under way: the page cache."""
        begun = bisect_right(self.begins, tick)
        content = {
            number: _newest(versions[: _position(versions, begun)])
            for number, versions in self._sectors[node.number].items()
        }
        sizes = self._sizes[node.number][: _position(self._sizes[node.number], begun)]
        return File.cut(sizes[-1].size if sizes else 0, content)

    def file_at(self, node: Node, begun: int, durable: Callable[[int], bool]) -> PossibleFile:
        """What may be on the disk of the file's first `begun` operations."""
        found = PossibleFile(node.number, _possible(self._sizes[node.number], begun, durable))
        for number, versions in self._sectors[node.number].items():
            possible = _possible(versions, begun, durable)
            if len(possible) > 1:
                found.torn[number] = possible
            elif possible[0].number >= 0:
                found.certain[number] = possible[0].value
        return found


_NEVER_WRITTEN = _Version(-1, NOTHING)


def _newest(versions: list[_Version]) -> bytes:
    return versions[-1].value if versions else NOTHING


def _position(versions: list[_Version], begun: int) -> int:
    return bisect_right(versions, begun - 1, key=lambda version: version.number)


def _possible(versions: list[_Version], begun: int, durable: Callable[[int], bool]) -> list[_Version]:
    """From the last durable one to the newest; never empty."""
    found: list[_Version] = []
    for version in reversed(versions[: _position(versions, begun)]):
        found.append(version)
        if durable(version.number):
            return found[::-1]
    return [_NEVER_WRITTEN, *found[::-1]]


@dataclass
class PossibleFile:
    """What is certain of a file's content, and the versions that the rest may have, oldest first."""

    node: int
    sizes: list[_Version]
    certain: Content = field(default_factory=dict)
    torn: dict[int, list[_Version]] = field(default_factory=dict)

    def where(self, landed: Choice) -> File:
        size = _picked(self.sizes, (self.node, SIZE), landed).size
        content = dict(self.certain)
        for number, versions in self.torn.items():
            content[number] = _picked(versions, (self.node, number), landed).value
        return File.cut(size, content)


def _picked(versions: list[_Version], place: Place, landed: Choice) -> _Version:
    """The newest that landed; the oldest is on the disk anyway."""
    for version in reversed(versions[1:]):
        if landed(version.number, place):
            return version
    return versions[0]


def _durable_from(operations: list[Operation]) -> list[int]:
    """For every operation the tick from which on no power cut can undo it."""
    syncs: dict[int, list[Sync]] = defaultdict(list)
    for operation in operations:
        if isinstance(operation, Sync):
            syncs[operation.node.number].append(operation)

    def covered_from(node: int, end: int) -> int:
        return min((sync.end for sync in syncs[node] if sync.begin >= end), default=NEVER)

    def durable_from(operation: Operation) -> int:
        if isinstance(operation, Naming):
            folders = {folder.number for folder, _, _ in operation.changes}
            return max(covered_from(folder, operation.end) for folder in folders)
        if isinstance(operation, Sync) or (isinstance(operation, Write) and operation.synced):
            return operation.end
        return covered_from(operation.node.number, operation.end)

    return [durable_from(operation) for operation in operations]


class Instant:
    """A moment, what is loose then, and the states that may come of it."""

    def __init__(self, history: History, moment: int) -> None:
        self.moment = moment
        self._history = history
        self._begun = bisect_right(history.begins, moment)
        self.loose = [
            index
            for index, operation in enumerate(history.operations[: self._begun])
            if not self._durable(index) and not isinstance(operation, Sync)
        ]
        """The operations that a power cut may undo, in their order."""
        self._files: dict[int, PossibleFile] = {}

    def _durable(self, index: int) -> bool:
        return self._history.durable_from[index] <= self.moment

    def state(self, landed: Choice) -> DiskState:
        folders, files = [], {}
        for path, node in self._named(landed):
            if node.is_folder:
                folders.append(path)
            else:
                files[path] = self._possible_file(node).where(landed)
        return DiskState(folders, files)

    def _possible_file(self, node: Node) -> PossibleFile:
        if node.number not in self._files:
            self._files[node.number] = self._history.file_at(node, self._begun, self._durable)
        return self._files[node.number]

    def _named(self, landed: Choice) -> Iterator[tuple[str, Node]]:
        entries: dict[int, dict[str, Node]] = defaultdict(dict)
        for index, operation in enumerate(self._history.operations[: self._begun]):
            if isinstance(operation, Naming) and (
                self._durable(index) or landed(index, (operation.changes[0][0].number, NAMES))
            ):
                for folder, name, node in operation.changes:
                    _name(entries[folder.number], name, node)
        return _walked(self._history.recording.folder, entries, "")


def _name(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _walked(folder: Node, entries: dict[int, dict[str, Node]], prefix: str) -> Iterator[tuple[str, Node]]:
    for name, node in list(entries[folder.number].items()):
        yield prefix + name, node
        if node.is_folder:
            yield from _walked(node, entries, f"{prefix}{name}/")


# --- choosing ---


def nothing_landed(index: int, place: Place) -> bool:
    return False


def all_landed(index: int, place: Place) -> bool:
    return True


def but(missing: int) -> Choice:
    return lambda index, place: index != missing


def only(present: int) -> Choice:
    return lambda index, place: index == present


def torn(seed: str, share: float) -> Choice:
    """Each sector of each operation lands with that probability; the same seed tears in the same way."""
    luck = random.Random(seed)
    fates: dict[tuple[int, Place], bool] = {}

    def landed(index: int, place: Place) -> bool:
        key = (index, place)
        if key not in fates:
            fates[key] = luck.random() < share
        return fates[key]

    return landed


def scattered(seed: str, share: float) -> Choice:
    """Each operation lands as a whole or not at all, with that probability."""
    whole = torn(seed, share)
    return lambda index, place: whole(index, (0, 0))


def choices(instant: Instant, seed: str, random_count: int, limit: int = 40) -> Iterator[tuple[str, Choice]]:
    """Nothing, everything, each one missing, each one alone (the latest `limit` of them), and random ones."""
    yield "nothing", nothing_landed
    if not instant.loose:
        return
    yield "everything", all_landed
    for index in instant.loose[-limit:] if len(instant.loose) > 1 else ():
        yield f"but {index}", but(index)
        yield f"only {index}", only(index)
    for number in range(random_count):
        luck = random.Random(f"{seed} {instant.moment} {number}")
        kind, share = luck.choice((torn, scattered)), luck.choice((0.1, 0.3, 0.5, 0.7, 0.9))
        words = f"{seed} {instant.moment} {number}"
        yield f"{kind.__name__} {share} ({words})", kind(words, share)
