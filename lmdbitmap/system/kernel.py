"""Facts from /proc and /sys: which boot this is, whether a block device was written, which device lies on which, and
which processes hold a lock.

A block device has no mtime, but the kernel knows three things of it while the machine runs:

- `diskseq`, a number that no other disk of this boot has had: it changes with the medium, and with the backing of a
  loop, nbd or device-mapper number (Linux 5.15);
- `stat`, which counts the sectors written and discarded. It counts writes that reached the device, so flush the page
  cache before comparing. It counts nothing while `queue/iostats` is 0;
- a label, if the driver has one: a serial number, a volume's uuid, the file behind a loop device.

A partition is written through its own node or through the whole disk's. So its count is the disk's count less that of
the other partitions. Writes beneath a device (to the file behind a loop device, to the disk under a volume, by another
machine) are not counted.

"Not known" is an answer here, never an error.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import time
from collections.abc import Callable
from typing import TypeAlias

from lmdbitmap.interfaces import DeviceTrace

_BOOT_ID_PATH = "/proc/sys/kernel/random/boot_id"
_BLOCK_DEVICES = "/sys/dev/block"
_LABELS = ("dm/uuid", "wwid", "device/wwid", "serial", "device/serial", "loop/backing_file")
_SECTORS_WRITTEN, _SECTORS_DISCARDED = 6, 13
_QUIET_READING_TRIES = 100


def flock_pids(status: os.stat_result, kind: str) -> list[str]:
    """Return the pids of other processes that hold a lock (flock) of the kind `READ` or `WRITE` on that file."""
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as table:
            locks = [line.split() for line in table]
    except OSError:
        return []
    held = {words[4] for words in locks if words[1:2] == ["FLOCK"] and words[3:6:2] == [kind, file]}
    return sorted(held - {str(os.getpid())})


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    return _boot_id()


@functools.cache
def _boot_id() -> str:
    return _line(_BOOT_ID_PATH)


def boot_time_ns() -> int:
    """Return when this boot began, in Unix nanoseconds."""
    with open("/proc/stat", encoding="ascii") as source:
        seconds = next(line.split()[1] for line in source if line.startswith("btime "))
    return int(seconds) * 1_000_000_000


def awake_ns() -> int:
    """Return the nanoseconds since this boot began, sleep included. Nobody can set that clock."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def device_trace(number: int, devices: str = _BLOCK_DEVICES) -> DeviceTrace | None:
    """Return the trace that shows whether a block device was written or exchanged; None if the kernel has none."""
    try:
        node = _node(number, devices)
        disk = os.path.dirname(node) if _is_partition(node) else node
        if _line(f"{disk}/queue/iostats") != "1":
            return None
        sequence = int(_line(f"{disk}/diskseq"))
        return DeviceTrace(boot_id(), sequence, _sectors_of(node, disk), _label_of(node, disk))
    except (OSError, ValueError, IndexError):
        return None


def _sectors_of(node: str, disk: str) -> int:
    """Return the sectors written and discarded.

    The counters are read one after another, and again until the disk's own did not change meanwhile.
    """
    others = [path for path in _partitions_of(disk) if path != node] if node != disk else []
    for _ in range(_QUIET_READING_TRIES):
        before = _sectors(disk)
        sectors = before - sum(map(_sectors, others))
        if not others or _sectors(disk) == before:
            return sectors
    raise ValueError("its neighbours are written all the time")


def _sectors(node: str) -> int:
    counts = _line(f"{node}/stat").split()
    return int(counts[_SECTORS_WRITTEN]) + int(counts[_SECTORS_DISCARDED])


def _partitions_of(disk: str) -> list[str]:
    return [entry.path for entry in os.scandir(disk) if entry.is_dir() and _is_partition(entry.path)]


def _is_partition(node: str) -> bool:
    return os.path.exists(f"{node}/partition")


def _label_of(node: str, disk: str) -> str:
    label = next(filter(None, (_line_or_nothing(f"{disk}/{name}") for name in _LABELS)), "")
    offset = _line_or_nothing(f"{disk}/loop/offset")
    if offset not in ("", "0"):
        label = f"{label} from byte {offset}"
    return label if node == disk else f"{label} from sector {_line(f'{node}/start')}"


# --- what lies on what ---


Place: TypeAlias = tuple[int, int]
"""A file as (device, inode), a block device as (its number, 0)."""


def is_kept_in(path: str, image: str, devices: str = _BLOCK_DEVICES) -> bool:
    """Return whether `path` lies on a file system that is kept in `image`, a file or a block device.

    Partitions, volumes, arrays and loop devices in between are followed; NBD devices and FUSE file systems are not.
    Raises `OSError` if there is no such path or image.
    """
    return _place_of(image) in _ground_of(path, devices)


def rests_on(device: str, image: str, devices: str = _BLOCK_DEVICES) -> bool:
    """Return whether a block device is made of `image`, so that writing the one writes the other.

    The device may be a loop device of that file, or a partition or volume of that device, several layers up. Raises
    `OSError` if there is no such device or image.
    """
    place = _place_of(device)
    return stat.S_ISBLK(os.stat(device).st_mode) and _place_of(image) in _all_under(place, devices)


def is_so(asked: Callable[[str, str], bool], one: str, other: str) -> bool:
    """Call `is_kept_in` or `rests_on`; return False for a missing path, because opening it will report the error."""
    try:
        return asked(one, other)
    except (OSError, ValueError):
        return False


def _place_of(path: str) -> Place:
    status = os.stat(path)
    return (status.st_rdev, 0) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def _ground_of(path: str, devices: str) -> set[Place]:
    """Return the block devices under `path`, and the files behind its loop devices."""
    return _all_under((_filesystem_device(path, devices), 0), devices)


def _all_under(top: Place, devices: str) -> set[Place]:
    found: set[Place] = set()
    todo = [top]
    while todo:
        place = todo.pop()
        if place not in found:
            found.add(place)
            todo += _directly_under(place, devices)
    return found


def _directly_under(place: Place, devices: str) -> list[Place]:
    number, inode = place
    node = _node(number, devices)
    if inode or not os.path.isdir(node):
        return []
    below = [f"{node}/slaves/{name}" for name in _names_in(f"{node}/slaves")]
    if _is_partition(node):
        below.append(os.path.dirname(node))
    found = [(_parsed(_line(f"{one}/dev")), 0) for one in below]
    backing = _backing_file(node)
    if os.path.exists(backing):
        found += [_place_of(backing), (_filesystem_device(backing, devices), 0)]
    return found


def _names_in(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def _filesystem_device(path: str, devices: str) -> int:
    """Return the block device of the file system that holds `path`.

    Some file systems (btrfs) have a device number of their own; then the mount's source is the device.
    """
    number = os.stat(path).st_dev
    if not os.path.exists(_entry(number, devices)):
        with contextlib.suppress(OSError):
            return os.stat(_mount_source(path)).st_rdev or number
    return number


def _mount_source(path: str, mounts: str = "/proc/self/mountinfo") -> str:
    """Return the source of the mount that holds `path`: the deepest above it, and the last made of several there."""
    deepest, source = "", ""
    real = os.path.realpath(path)
    with open(mounts, "rb") as table:
        for line in table:
            words = line.split(b" ")  # names may have any other space
            point = _unescaped(words[4])
            if len(point) >= len(deepest) and os.path.commonpath([point, real]) == point:
                deepest, source = point, _unescaped(words[words.index(b"-") + 2])
    return source


def _unescaped(word: bytes) -> str:
    """Decode a mountinfo field, which has spaces, tabs, newlines, `#` and backslashes as octal numbers."""
    for code in ("040", "011", "012", "043", "134"):
        word = word.replace(f"\\{code}".encode(), bytes([int(code, 8)]))
    return os.fsdecode(word)


# --- reading ---


def _entry(number: int, devices: str) -> str:
    return f"{devices}/{os.major(number)}:{os.minor(number)}"


def _node(number: int, devices: str) -> str:
    return os.path.realpath(_entry(number, devices))


def _parsed(number: str) -> int:
    major, _, minor = number.partition(":")
    return os.makedev(int(major), int(minor))


def _line(path: str) -> str:
    with open(path, encoding="utf-8", errors="backslashreplace") as source:
        return source.read().strip()


def _backing_file(node: str) -> str:
    """Return the path behind a loop device, which may end with a space; empty if it is none."""
    try:
        with open(f"{node}/loop/backing_file", "rb") as source:
            return os.fsdecode(source.read().removesuffix(b"\n"))
    except OSError:
        return ""


def _line_or_nothing(path: str) -> str:
    try:
        return _line(path)
    except OSError:
        return ""
