"""What can be asked of an owner at its control socket: one function for each operation of docs/control.md.

Values in, values out: who asks, and how it got here, is control.py's business. An operation that is not in the
table is an error, and so is an argument too few, too many or of another type.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from lmdbitmap import chain, export
from lmdbitmap.errors import Busy, InvalidArgument, NotFound, os_errors_at
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.nbd import control_wire as wire
from lmdbitmap.nbd.watch import Watch

_log = logging.getLogger(__name__)

_REQUEST: Final = "request"

Filters = Mapping[str, Filter]
Answer = dict[str, Any]


def answer(filters: Filters, request: wire.Message, watch: Watch | None = None) -> Answer:
    """Do what the request says. Raises the errors that the disks raise, and `FormatError` for no request.

    With a `watch`, `info` also tells what it knows of each disk.
    """
    name = wire.field(request, "operation", str, _REQUEST)
    operation = _OPERATIONS.get(name)
    if operation is None:
        raise InvalidArgument(
            f"operation {name[:40]!r} is not one of {', '.join(_OPERATIONS)}",
            next_step="use the same version of lmdbitmap on both sides",
        )
    arguments = wire.field(request, "arguments", dict, _REQUEST)
    wire.require_names(arguments, operation.arguments, _REQUEST)
    values: Answer = {
        name: wire.field(arguments, name, kind, _REQUEST) for name, kind in operation.arguments.items()
    }
    return operation.act(_Scene(filters, watch), **values)


class _Scene(NamedTuple):
    filters: Filters
    watch: Watch | None


def _info(scene: _Scene) -> Answer:
    disks = []
    for name, attached in scene.filters.items():
        served = {} if scene.watch is None else {"served": scene.watch.facts(name)}
        disks.append({**_described(attached), **served})
    return {"disks": disks}


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
        "armed": attached.armed_count,
    }


def _checkpoint(scene: _Scene, disks: list[Any], name: str) -> Answer:
    filters = scene.filters
    foreign = [str(disk) for disk in disks if not isinstance(disk, str) or disk not in filters]
    if foreign:
        raise Busy(
            f"not served by this process: {', '.join(foreign)}",
            next_step="serve all of the disks in one process, or stop serving them",
        )
    taken = take_checkpoint([filters[disk] for disk in disks], name)
    for disk in disks:
        _log.info("disk %s: checkpoint %s is made", disk, name)
    return {"checkpoints": [{"disk": disk, "uuid": str(checkpoint.uuid), "time_ns": checkpoint.time_ns}
                            for disk, checkpoint in zip(disks, taken, strict=True)]}  # fmt: skip


def _persist(scene: _Scene, disk: str) -> Answer:
    _named(scene, disk).persist()
    return {}


def _mark(scene: _Scene, disk: str, offset: int, length: int) -> Answer:
    _named(scene, disk).mark(offset, length)
    return {}


def _merge(scene: _Scene, disk: str, bitmap: str) -> Answer:
    export.merge_into(_named(scene, disk), bitmap)
    return {}


def _forget(scene: _Scene, disk: str, checkpoint: str) -> Answer:
    _named(scene, disk).forget(checkpoint)
    return {}


def _resize(scene: _Scene, disk: str, size: int) -> Answer:
    attached = _named(scene, disk)
    with os_errors_at(attached.disk.image):
        attached.resize(size)
    return {"size": attached.size}


def _named(scene: _Scene, disk: str) -> Filter:
    found = scene.filters.get(disk)
    if found is None:
        raise NotFound(f"disk {disk!r} is not served by this process", next_step="ask the one that serves it")
    return found


class _Operation(NamedTuple):
    act: Callable[..., Answer]
    arguments: Mapping[str, type]


_OPERATIONS: Final = {
    "info": _Operation(_info, {}),
    "checkpoint": _Operation(_checkpoint, {"disks": list, "name": str}),
    "persist": _Operation(_persist, {"disk": str}),
    "mark": _Operation(_mark, {"disk": str, "offset": int, "length": int}),
    "merge": _Operation(_merge, {"disk": str, "bitmap": str}),
    "forget": _Operation(_forget, {"disk": str, "checkpoint": str}),
    "resize": _Operation(_resize, {"disk": str, "size": int}),
}
