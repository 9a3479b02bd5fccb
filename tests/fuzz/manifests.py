"""The manifest and the note of unfinished work: what is accepted is a chain that ends, in its own folder."""

from __future__ import annotations

import copy
import json
import os
from typing import Any
from uuid import UUID

from lmdbitmap.errors import FormatError, InvalidArgument
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository import manifest
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupType, Manifest
from lmdbitmap.repository.manifest_file import MANIFEST
from lmdbitmap.repository.unfinished import UNFINISHED
from tests.fuzz.inputs import Input, check_words, scratch_folder

TEXTS = ("", "b0", "b1", "b2", "000001-full.qcow2", "../x", "a:b", "..", "full", "incremental", "exact", "\ud800",
         "untrusted", "blake3", "sha256", "0" * 64, str(UUID(int=7)), "\n", "x" * 256, "ß" * 512)  # fmt: skip
MOST_COPIES = 6
NUMBERS = (0, 1, 2, 3, 511, 512, 65536, 2**31, 2**32, 2**63 - 1, 2**63, -1, 10**19, 10**21, 1e300, True)


def manifest_bytes(data: bytes) -> None:
    source = Input(data)
    source.pick((raw_manifest, built_manifest, manifest_file, note))(source)


def raw_manifest(source: Input) -> None:
    check_manifest(source.rest())


def built_manifest(source: Input) -> None:
    """A sound manifest with values put in, taken out, replaced, and entries moved."""
    check_manifest(built(source))


def built(source: Input) -> bytes:
    document: dict[str, Any] = sound(1 + source.byte() % 3)
    while source.left:
        change(document, source)
        source.byte()  # what can no longer be changed must not keep us here for ever
    return json.dumps(document).encode()


def sound(count: int) -> dict[str, Any]:
    return {
        "format_version": 3,
        "disk": {"name": "sda", "uuid": str(UUID(int=1))},
        "backups": [entry(number) for number in range(count)],
    }


def entry(number: int) -> dict[str, Any]:
    kind = "full" if number == 0 else "incremental"
    return {
        "id": f"b{number}", "sequence": number, "file": f"00000{number}-{kind}.qcow2",
        "parent": None if number == 0 else f"b{number - 1}", "type_requested": kind, "type_actual": kind,
        "reason": {"code": "first", "words": "no earlier backup"}, "time_ns": 5,
        "checkpoint": {"uuid": str(UUID(int=number)), "name": "c"}, "epoch": str(UUID(int=4)),
        "disk_size": 1 << 20, "granularity": 65536, "cluster_size": 65536, "trust": "exact",
        "bytes_changed": 1, "bytes_zero": 0, "bytes_stored": 4096, "sha256": "0" * 64,
        "chunks": {
            "file": f"{number}.digests", "chunk_size": 4096, "sha256": "0" * 64,
            "algorithm": ("blake3", "sha256")[number % 2],
        },
    }  # fmt: skip


def change(document: dict[str, Any], source: Input) -> None:
    """Walk down to some value and do something to it."""
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = source.pick(keys)
        if not isinstance(place[key], (dict, list)) or source.byte() % 8 == 0:
            break
        place = place[key]
    deed = source.byte() % 8
    if deed == 0:
        del place[key]
    elif deed == 1 and isinstance(place, list):
        place.append(place.pop(key))
    elif deed == 2 and isinstance(place, list) and len(place) < MOST_COPIES:
        place.append(copy.deepcopy(place[key]))
    else:
        place[key] = value_of(source)


def value_of(source: Input, depth: int = 0) -> object:
    kind = source.byte() % 8
    if kind < 2 and depth < 3:
        values = [value_of(source, depth + 1) for _ in range(source.byte() % 4)]
        return values if kind else {str(index): value for index, value in enumerate(values)}
    simple = (None, source.pick(TEXTS), source.pick(TEXTS), source.pick(NUMBERS), source.number(8))
    return (*simple, source.take(source.byte() % 40).decode("latin-1"))[kind % 6]


def check_manifest(data: bytes) -> Manifest | None:
    try:
        found = manifest.decode(data)
    except FormatError as refusal:
        check_words(refusal)
        return None
    written = manifest.encode(found)
    assert manifest.decode(written) == found
    assert manifest.encode(manifest.decode(written)) == written
    check_chains(found)
    check_algorithms(json.loads(data), found)
    return found


def check_algorithms(document: Any, found: Manifest) -> None:
    """Digests are of the algorithm that stands there, or of SHA-256 where none does; older programs read no other."""
    for said, backup in zip(document["backups"], found.backups, strict=True):
        assert backup.digest_algorithm.value == said.get("chunks", {}).get("algorithm", "sha256")
    kinds = {backup.digest_algorithm.value for backup in found.backups}
    assert (found.format_version == 3) == ("blake3" in kinds)


def check_chains(found: Manifest) -> None:
    """Each chain begins with a full backup, goes by parents, and names files of one folder only."""
    folder = "/repository/disk"
    for backup in found.backups:
        chain = manifest.chain_to(found, backup.id)
        assert chain[-1] == backup
        assert [each.parent for each in chain] == [None, *(each.id for each in chain[:-1])]
        assert chain[0].type_actual is BackupType.FULL
        path = os.path.normpath(os.path.join(folder, backup.file))
        assert os.path.split(path) == (folder, backup.file)
    sequences = [backup.sequence for backup in found.backups]
    assert sequences == sorted(set(sequences))
    assert len({backup.file for backup in found.backups}) == len(found.backups)


# --- in a folder ---


def folder_with(name: str, content: bytes) -> BackupFolder:
    """One folder with one file of that name and content, and an image that no manifest names."""
    folder = BackupFolder(os.path.join(scratch_folder(), "repository"), "sda")
    os.makedirs(folder.path, exist_ok=True)
    for other in {MANIFEST, UNFINISHED} - {name}:
        if os.path.lexists(folder.path_of(other)):
            os.unlink(folder.path_of(other))
    with open(folder.path_of(name), "wb") as file:
        file.write(content)
    return folder


def manifest_file(source: Input) -> None:
    """Read from its folder it says the same, or the refusal names the file."""
    data = source.rest() if source.byte() % 2 else built(source)
    folder = folder_with(MANIFEST, data)
    try:
        found = folder.manifest()
    except FormatError as refusal:
        check_words(refusal, place=folder.path)
        assert check_manifest(data) is None
        return
    assert found == check_manifest(data)


def note(source: Input) -> None:
    """What a note has removed are images of the folder, by their names, and nothing else ever."""
    folder = folder_with(UNFINISHED, source.rest())
    outside = os.path.join(folder.repository_path, "outside")
    for path in (outside, folder.path_of("000001-full.qcow2"), folder.path_of("kept")):
        with open(path, "wb"):
            pass
    try:
        abandoned = folder.unfinished()
    except (FormatError, InvalidArgument):
        abandoned = []
        assert os.path.exists(folder.path_of("000001-full.qcow2"))
    for work in abandoned:
        assert Maker.BACKUP.named(work.checkpoint)
        assert os.path.basename(work.file) == work.file
        assert not os.path.exists(folder.path_of(work.file))
    assert os.path.exists(outside)
    assert os.path.exists(folder.path_of("kept"))
