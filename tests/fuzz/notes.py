"""Notes in the store, of copies (syncs/) and of holds (holds/): what is accepted says what its JSON says.

A note decides what is forgotten: whatever its bytes are, that is never a checkpoint that a person made by name, but
for one whose uuid a hold's note has as its run's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Any
from uuid import UUID

from lmdbitmap.errors import FormatError
from lmdbitmap.notes import holds, sync_note
from lmdbitmap.storage.schema import Checkpoint
from tests.fuzz.inputs import Input, check_words, scratch_folder
from tests.fuzz.manifests import change

PLACE = "a note"
DISK, HOLDER = UUID(int=1), UUID(int=2)
STAMP = re.compile(r"(backup|stream)-[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}")
PERSONS = ("mine", "epoch-1", "backup-of-monday", "stream")


def notes(data: bytes) -> None:
    source = Input(data)
    source.pick((raw_sync, built_sync, raw_hold, built_hold, sync_file, hold_file))(source)


def sound_sync() -> dict[str, Any]:
    trace = {"boot_id": "b0", "disk_sequence": 1, "sectors_written": 2, "label": "x"}
    identity = {"device": 1, "inode": 2, "size": 3, "mtime_ns": 4, "trace": trace}
    at = {"checkpoint": str(UUID(int=7)), "name": "sync-20260101T000000Z-012345", "epoch": str(UUID(int=8)),
          "identity": identity}  # fmt: skip
    return {"format_version": 1, "target": "/copy.raw", "at": at, "under_way": False, "unneeded": ["b0"]}


def sound_hold() -> dict[str, Any]:
    return {
        "format_version": 1, "holder": str(HOLDER), "repository": "/backups", "used_ns": 5,
        "checkpoints": [{"uuid": str(UUID(int=7)), "name": "mine"},
                        {"uuid": str(UUID(int=8)), "name": "backup-20260101T000000Z-012345"}],
        "under_way": {"name": "mine", "uuid": None}, "ended": {"code": "hold-lapsed", "words": "it lapsed"},
    }  # fmt: skip


def built(document: dict[str, Any], source: Input) -> bytes:
    while source.left:
        change(document, source)
        source.byte()  # what can no longer be changed must not keep us here for ever
    return json.dumps(document).encode()


def raw_sync(source: Input) -> None:
    check_sync(source.rest())


def built_sync(source: Input) -> None:
    check_sync(built(sound_sync(), source))


def raw_hold(source: Input) -> None:
    check_hold(source.rest())


def built_hold(source: Input) -> None:
    check_hold(built(sound_hold(), source))


def check_sync(data: bytes) -> sync_note.Note | None:
    try:
        found = sync_note.decode(data, PLACE)
    except FormatError as refusal:
        check_words(refusal, place=PLACE)
        return None
    written = sync_note.encode(found)
    assert sync_note.decode(written, PLACE) == found
    assert sync_note.encode(sync_note.decode(written, PLACE)) == written
    told, again = json.loads(data), json.loads(written)
    assert (found.target, found.under_way, list(found.unneeded)) == tuple(
        told[name] for name in ("target", "under_way", "unneeded")
    )
    assert (found.at is None) == (told["at"] is None) == (again["at"] is None)
    if found.at is not None:
        assert found.at.checkpoint == UUID(told["at"]["checkpoint"])
        assert again["at"]["identity"] == alike(told["at"]["identity"], again["at"]["identity"])
    return found


def alike(told: Any, like: Any) -> Any:
    """`told` without what `like` does not have: keys that are not known are left out."""
    if isinstance(told, dict) and isinstance(like, dict):
        return {name: alike(told[name], like[name]) for name in like}
    return told


def check_hold(data: bytes) -> holds.Hold | None:
    try:
        found = holds.decode(data, PLACE)
    except FormatError as refusal:
        check_words(refusal, place=PLACE)
        return None
    written = holds.encode(found)
    assert holds.decode(written, PLACE) == found
    assert holds.encode(holds.decode(written, PLACE)) == written
    told = json.loads(data)
    assert (found.repository, found.used_ns) == (told["repository"], told["used_ns"])
    assert [one.name for one in found.checkpoints] == [one["name"] for one in told["checkpoints"]]
    assert [one.uuid for one in found.checkpoints] == [UUID(one["uuid"]) for one in told["checkpoints"]]
    check_what_goes(found, told)
    return found


def check_what_goes(found: holds.Hold, told: dict[str, Any]) -> None:
    """Of a disk with a checkpoint for each name and uuid there is."""
    run = told["under_way"]
    named = {one["name"] for one in told["checkpoints"]} | set(PERSONS) | ({run["name"]} if run else set())
    uuids = {UUID(one["uuid"]) for one in told["checkpoints"]} | {UUID(int=99)}
    own = UUID(run["uuid"]) if run and run["uuid"] is not None else None
    for name in named:
        for uuid in uuids | ({own} if own else set()):
            if found.lets_go_of(Checkpoint(DISK, 1, name, uuid, 0, UUID(int=6), 1)):
                assert uuid == own or STAMP.fullmatch(name)


def in_a_store(folder: str, name: str, content: bytes) -> str:
    store = os.path.join(scratch_folder(), "store of notes")
    place = os.path.join(store, folder)
    os.makedirs(place, exist_ok=True)
    for other in os.listdir(place):
        os.unlink(os.path.join(place, other))
    with open(os.path.join(place, name), "wb") as file:
        file.write(content)
    return store


def sync_file(source: Input) -> None:
    """Read from its folder it says the same; a damaged one says nothing, a newer one is refused."""
    data = source.rest() if source.byte() % 2 else built(sound_sync(), source)
    store = in_a_store(sync_note.SYNCS, f"{DISK}-0123456789abcdef.json", data)
    with contextlib.suppress(sync_note.NewerNote):
        found = [note for _, note in sync_note.notes(store, DISK)]
        assert found == [note for note in (check_sync(data),) if note is not None]
        assert list(sync_note.notes(store, HOLDER)) == []


def hold_file(source: Input) -> None:
    """The same, but for a newer one, which says nothing either; and the number of days is one, or 0."""
    data = source.rest() if source.byte() % 2 else built(sound_hold(), source)
    store = in_a_store(holds.HOLDS, f"{DISK}-{HOLDER}.json", data)
    found = [file.hold for file in holds.hold_files(store, DISK)]
    assert found == [hold for hold in (check_hold(data),) if hold is not None]
    store = in_a_store(holds.HOLDS, f"{DISK}-lapse.json", data)
    assert holds.lapse_days(store, DISK) in range(holds.MOST_LAPSE_DAYS + 1)
    assert holds.hold_files(store, DISK) == []
