"""The operations of the control socket: one function for each operation of docs/control.md.

Values in, values out: control.py knows the caller and the socket. An operation that is not in the table is an error,
and so is an argument that is missing, unknown or of another type.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from lmdbitmap import export
from lmdbitmap.errors import Busy, InvalidArgument, NotFound, os_errors_at
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.nbd import control_wire as wire
from lmdbitmap.nbd.control.detaching import Detaching
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.control.watch import Watch
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.snapshot import Snapshot

_log = logging.getLogger(__name__)

_REQUEST: Final = "request"

Filters = Mapping[str, Filter]
Answer = dict[str, Any]


class Scene(NamedTuple):
    """What a request works on. With a `watch`, `info` also reports its facts about each disk."""

    filters: Filters
    watch: Watch | None = None
    held: HeldSnapshots | None = None
    bound: list[Snapshot] | None = None
    """Snapshots to release when the caller hangs up."""
    detaching: Detaching | None = None
    untold: list[Snapshot] | None = None
    """Snapshots to release if the answer cannot be sent: nobody would know of them."""
    passed: list[int] | None = None
    """Descriptors to send with the answer, and to close then; None if the caller cannot receive any."""


def answer(scene: Scene, request: wire.Message) -> Answer:
    """Do what the request says. Raise the errors of the disks, and `FormatError` if it is no request."""
    name = wire.field(request, "operation", str, _REQUEST)
    operation = _OPERATIONS.get(name)
    if operation is None:
        raise InvalidArgument(
            f"operation {name[:40]!r} is not one of {', '.join(_OPERATIONS)}",
            next_step="use the same version of lmdbitmap on both sides",
        )
    arguments = wire.field(request, "arguments", dict, _REQUEST)
    optional = {name: kind for name, kind in operation.optional.items() if name in arguments}
    expected = {**operation.arguments, **optional}
    wire.require_names(arguments, expected, _REQUEST)
    values: Answer = {name: wire.field(arguments, name, kind, _REQUEST) for name, kind in expected.items()}
    return operation.act(scene, **values)


def _info(scene: Scene, disks: list[Any] | None = None) -> Answer:
    """Report the disks in the list that are ours, each of them once; without a list all of ours."""
    asked = None if disks is None else {disk for disk in disks if isinstance(disk, str)}
    found = []
    for name, attached in list(scene.filters.items()):
        if asked is not None and name not in asked:
            continue
        served = None if scene.watch is None else scene.watch.facts(name)
        with contextlib.suppress(NotFound):  # the disk was detached and removed meanwhile
            found.append(_described(attached) | ({} if served is None else {"served": served}))
    return {"disks": found}


def _described(attached: Filter) -> Answer:
    disk, standing = attached.disk, attached.standing()
    with attached.store.read() as reader:
        recording = chain.current_checkpoint(reader, disk)
    return {
        "name": disk.name,
        "uuid": str(disk.uuid),
        "size": disk.size,
        "granularity": disk.geometry.granularity,
        "durability": disk.durability,
        "policy": disk.policy,
        "epoch": str(disk.epoch),
        "session": str(disk.session),
        "recording_since": recording.name,
        "recording_since_ns": recording.time_ns,
        "trust": standing.trust.value,
        "reason": standing.reason,
        "image_lost": attached.image_lost,
        "armed": attached.armed_count,
        "snapshots": [_snapshot_facts(snapshot) for snapshot in attached.snapshots],
    }


def _snapshot_facts(snapshot: Snapshot) -> Answer:
    return {
        "checkpoint": snapshot.checkpoint.name,
        "kept_bytes": snapshot.kept_bytes,
        "limit_bytes": snapshot.limit_bytes,
        "broken": snapshot.broken,
    }


def _checkpoint(scene: Scene, disks: list[Any], name: str) -> Answer:
    with _staying(scene, disks):
        _require_ours(scene, disks)
        taken = take_checkpoint([scene.filters[disk] for disk in disks], name)
    for disk in disks:
        _log.info("disk %s: checkpoint %s is made", disk, name)
    return {"checkpoints": [{"disk": disk, "uuid": str(checkpoint.uuid), "time_ns": checkpoint.time_ns}
                            for disk, checkpoint in zip(disks, taken, strict=True)]}  # fmt: skip


def _staying(scene: Scene, disks: list[Any]) -> AbstractContextManager[None]:
    """Keep these disks from being detached in this context."""
    names = [disk for disk in disks if isinstance(disk, str)]
    return contextlib.nullcontext() if scene.detaching is None else scene.detaching.staying(names)


def _require_ours(scene: Scene, disks: list[Any]) -> None:
    foreign = [str(disk) for disk in disks if not isinstance(disk, str) or disk not in scene.filters]
    if foreign:
        ours = [disk for disk in disks if str(disk) not in foreign]
        raise Busy(
            f"process {os.getpid()} serves {', '.join(ours) or 'none of them'}, and not {', '.join(foreign)}",
            next_step="serve all of the disks in one process, or run the command for each disk alone",
        )


def _snapshot(scene: Scene, disks: list[Any], name: str, since: list[Any], bound: bool, once: bool) -> Answer:
    """Hold the disks. For a disk with a checkpoint in `since`, only what changed since then will be read."""
    with _staying(scene, disks):
        return _held_as_asked(scene, disks, name, since, bound, once)


def _held_as_asked(
    scene: Scene, disks: list[Any], name: str, since: list[Any], bound: bool, once: bool
) -> Answer:
    _require_ours(scene, disks)
    if len(since) != len(disks) or not all(isinstance(one, str) for one in since):
        raise InvalidArgument("`since` is a checkpoint or nothing for each disk", next_step="name as many")
    _require_checkpoints(scene, disks, since)
    held = _held(scene)
    taken = held.take(disks, name, private=bound and once)
    try:
        for snapshot, checkpoint in zip(taken, since, strict=True):
            if checkpoint:
                snapshot.want_changes(since=checkpoint)
            if once:
                snapshot.read_once()
        told = {"snapshots": [_held_facts(snapshot) for snapshot in taken]}
        if bound and scene.bound is not None:
            scene.bound[:] = [*filter(held.is_held, scene.bound), *taken]  # an agent may never hang up
        elif scene.untold is not None:
            scene.untold.extend(taken)
    except BaseException:
        for snapshot in taken:
            held.release(snapshot)
        raise
    return told


def _held_facts(snapshot: Snapshot) -> Answer:
    return {
        "disk": snapshot.disk.name,
        "export": snapshot.name,
        "epoch": str(snapshot.checkpoint.epoch),
        "uuid": str(snapshot.checkpoint.uuid),
        "time_ns": snapshot.checkpoint.time_ns,
        "direct": snapshot.image_fd is not None,
    }


def _require_checkpoints(scene: Scene, disks: list[Any], since: list[Any]) -> None:
    """Check before a checkpoint is made: it would stay and keep its name when a caller corrects a mistyped `since`."""
    for name, checkpoint in zip(disks, since, strict=True):
        attached = scene.filters[name]
        with attached.store.read() as reader:
            if checkpoint:
                chain.find_checkpoint(reader, attached.disk, checkpoint)


def _release(scene: Scene, disk: str, checkpoint: str, uuid: str | None = None) -> Answer:
    """Release a snapshot, and say whether everything read from it is the disk at that checkpoint."""
    _named(scene, disk)
    held = _held(scene)
    snapshot = held.find(disk, checkpoint, uuid)
    facts = _snapshot_facts(snapshot)
    held.release(snapshot)
    return {**facts, "broken": snapshot.broken}


def _room(scene: Scene) -> Answer:
    return {"bytes": _held(scene).room()}


def _connect(scene: Scene) -> Answer:
    _passed(scene).append(_held(scene).connect().detach())
    return {}


def _image(scene: Scene, disk: str, checkpoint: str, uuid: str | None = None) -> Answer:
    _named(scene, disk)
    _passed(scene).append(_held(scene).open_image(disk, checkpoint, uuid))
    return {}


def _passed(scene: Scene) -> list[int]:
    if scene.passed is None:
        raise Busy("nothing can be passed with the answer", next_step="ask at the control socket")
    return scene.passed


def _held(scene: Scene) -> HeldSnapshots:
    if scene.held is None:
        raise Busy(
            "the process that owns the disk holds no snapshots for others", next_step="serve it instead"
        )
    return scene.held


def _persist(scene: Scene, disk: str) -> Answer:
    _named(scene, disk).persist()
    return {}


def _mark(scene: Scene, disk: str, offset: int, length: int) -> Answer:
    _named(scene, disk).mark(offset, length)
    return {}


def _merge(scene: Scene, disk: str, bitmap: str) -> Answer:
    export.merge_into(_named(scene, disk), bitmap)
    return {}


def _forget(scene: Scene, disk: str, checkpoint: str) -> Answer:
    _named(scene, disk).forget(checkpoint)
    return {}


def _resize(scene: Scene, disk: str, size: int) -> Answer:
    attached = _named(scene, disk)
    with os_errors_at(attached.disk.image):
        attached.resize(size)
    return {"size": attached.size}


def _detach(scene: Scene, disk: str) -> Answer:
    attached = _named(scene, disk)
    if scene.detaching is None:
        raise Busy(f"disk {disk!r} is used by the process that has it", next_step="end that process")
    scene.detaching.let_go(disk, attached)
    return {}


def _named(scene: Scene, disk: str) -> Filter:
    found = scene.filters.get(disk)
    if found is None:
        raise NotFound(f"disk {disk!r} is not served by this process", next_step="ask the one that serves it")
    return found


class _Operation(NamedTuple):
    act: Callable[..., Answer]
    arguments: Mapping[str, type]
    optional: Mapping[str, type] = {}


_OPERATIONS: Final = {
    "info": _Operation(_info, {}, {"disks": list}),
    "checkpoint": _Operation(_checkpoint, {"disks": list, "name": str}),
    "snapshot": _Operation(
        _snapshot, {"disks": list, "name": str, "since": list, "bound": bool, "once": bool}
    ),
    "release": _Operation(_release, {"disk": str, "checkpoint": str}, {"uuid": str}),
    "room": _Operation(_room, {}),
    "connect": _Operation(_connect, {}),
    "image": _Operation(_image, {"disk": str, "checkpoint": str}, {"uuid": str}),
    "persist": _Operation(_persist, {"disk": str}),
    "mark": _Operation(_mark, {"disk": str, "offset": int, "length": int}),
    "merge": _Operation(_merge, {"disk": str, "bitmap": str}),
    "forget": _Operation(_forget, {"disk": str, "checkpoint": str}),
    "resize": _Operation(_resize, {"disk": str, "size": int}),
    "detach": _Operation(_detach, {"disk": str}),
}
