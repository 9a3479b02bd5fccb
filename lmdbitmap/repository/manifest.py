"""The manifest of one disk's backups: what each image in a repository's folder is, as JSON. See docs/backup.md.

    format_version   1 to 3, the least that can say what follows; a newer one is refused
    disk             name, uuid
    released         uuid and name of checkpoints that pruned backups held: the next backup forgets them; may be absent
    holder           uuid by which stores know these backups as a holder of checkpoints; may be absent
    last_sequence    the highest number that a backup had which was dropped; may be absent
    backups          oldest first
      id, sequence                 unique; rising
      file                         the image, a plain name in the manifest's own folder
      parent                       the id of the backup that this one's image is stacked on; null for a full one
      type_requested, type_actual  full, incremental, differential, rescan
      reason                       code and words, if the two differ; null or a remark otherwise
      time_ns                      Unix time of the checkpoint
      checkpoint, epoch            uuid and name; uuid, all zeroes if the disk took the backup over from another one
      disk_size                    the true one: the image's is rounded up to 512 bytes
      granularity, cluster_size
      trust                        exact or superset
      bytes_changed, bytes_zero    of the disk: stored as data or as zero clusters; those that are zero clusters
      bytes_stored                 of the file
      sha256                       of the file; absent where `chunks` vouches for all of it, from version 2 on
      compression                  zlib or zstd, where clusters may be compressed; else there is no such key
      chunks                       file, chunk_size and sha256 of the file with its digests; optional beside `sha256`.
                                   From version 3 on `algorithm`, where they are not SHA-256

Invariants of what `decode` returns: every parent stands before its children, so a chain always ends, in a full backup;
ids and files are unique. Encoding is deterministic: sorted keys, indent 2, a newline at the end; an optional key
without a value is left out. Unknown keys are ignored, and lost when the manifest is written again.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import tzinfo
from typing import Any, Final
from uuid import UUID

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.errors import FormatError, InvalidArgument, NotFound
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS
from lmdbitmap.notes.references import CheckpointRef, Reason
from lmdbitmap.qcow2.layout import CompressionType
from lmdbitmap.repository.json_fields import Fields, shown
from lmdbitmap.repository.moments import last_ns_of

FORMAT_VERSION: Final = 3
MAX_MANIFEST_BYTES: Final = 16 << 20
"""Room for some 15 000 backups. Parsing hostile JSON of this size takes hundreds of MiB, and no more."""
MOST_ENTRY_BYTES: Final = 8 << 10
"""At most this many bytes for one backup that this program makes; most take one or two KiB."""
MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE = 512, 2 << 20
MIN_CHUNK_SIZE, MAX_CHUNK_SIZE = 4096, 64 << 20
TAKEN_OVER_EPOCH: Final = UUID(int=0)
"""Epoch of a backup that was made for a disk with another uuid than the manifest's now. No disk is in this epoch."""
_MOST_IDS_SHOWN: Final = 12
_MOST_SHOWN_OF_AN_ID: Final = 40
_RESTORE = "restore the manifest from a copy of the repository, or begin a new chain with `backup --full`"


class NewerManifest(FormatError):
    """A manifest that a newer version wrote: it is sound, and must not be replaced."""


class BackupType(enum.Enum):
    FULL = "full"
    INCREMENTAL = "incremental"
    """What changed since the backup before."""
    DIFFERENTIAL = "differential"
    """What changed since the last full backup."""
    RESCAN = "rescan"
    """What differs from the backup that it is stacked on, found out by reading both."""


@dataclass(frozen=True, slots=True)
class DiskRef:
    name: str
    uuid: UUID


@dataclass(frozen=True, slots=True)
class ChunkDigests:
    """The file that holds an image's digests, one for each `chunk_size` bytes, and that file's own SHA-256.

    That SHA-256 covers every digest, and so vouches for the whole image, whether the file is there or not.
    """

    file: str
    chunk_size: int
    sha256: str
    algorithm: DigestAlgorithm = DigestAlgorithm.SHA256
    """Algorithm of the digests in the file."""


@dataclass(frozen=True, slots=True)
class BackupEntry:
    """One backup, as the manifest describes it (docs/backup.md has every field)."""

    id: str
    """The name by which a restore asks for the backup."""
    sequence: int
    file: str
    parent: str | None
    """The id of the backup that it is stacked on; None for a full one."""
    type_requested: BackupType
    type_actual: BackupType
    reason: Reason | None
    time_ns: int
    checkpoint: CheckpointRef
    epoch: UUID
    disk_size: int
    granularity: int
    cluster_size: int
    trust: Trust
    bytes_changed: int
    bytes_zero: int
    bytes_stored: int
    sha256: str | None
    compression: CompressionType | None = None
    chunks: ChunkDigests | None = None

    @property
    def digest(self) -> str:
        """The digest that proves the image as a whole: `sha256`, or that of the digests of its chunks."""
        if self.sha256 is not None:
            return self.sha256
        assert self.chunks is not None
        return self.chunks.sha256

    @property
    def digest_algorithm(self) -> DigestAlgorithm:
        """Algorithm of the digests that prove the image."""
        return DigestAlgorithm.SHA256 if self.chunks is None else self.chunks.algorithm


@dataclass(frozen=True, slots=True)
class Manifest:
    disk: DiskRef
    backups: tuple[BackupEntry, ...] = ()
    released: tuple[CheckpointRef, ...] = ()
    holder: UUID | None = None
    last_sequence: int = 0

    @property
    def newest_sequence(self) -> int:
        """The highest number that any backup has or had; 0 before the first."""
        return max([self.last_sequence, *(entry.sequence for entry in self.backups)])

    @property
    def format_version(self) -> int:
        """The oldest version whose readers understand this manifest.

        Version 1 is for programs that know no image without a digest of the whole file, version 2 for those that know
        no digests but SHA-256: they would call sound images damaged.
        """
        if any(entry.digest_algorithm is not DigestAlgorithm.SHA256 for entry in self.backups):
            return 3
        return 1 if all(entry.sha256 is not None for entry in self.backups) else 2


def taken_over(manifest: Manifest, disk: DiskRef) -> Manifest:
    """Return another disk's backups as those of `disk`. Its tracking does not cover them, so none is counted from."""
    backups = tuple(dataclasses.replace(entry, epoch=TAKEN_OVER_EPOCH) for entry in manifest.backups)
    return dataclasses.replace(manifest, disk=disk, backups=backups)


def id_at(manifest: Manifest, at: str | None, zone: tzinfo | None = None) -> str:
    """Return the id that `at` stands for: itself, or, if it is a time, that of the newest backup not later.

    moments.py says what a time is, in `zone` or by the local clock. Without `at`, return the newest backup's id.
    Whether a backup has that number is not checked. Raises `NotFound` if all backups are later, or `at` is neither, and
    `InvalidArgument` if it is not even text.
    """
    if at is None:
        return manifest.backups[-1].id
    if not isinstance(at, str):
        raise InvalidArgument(
            f"{at!r} is not the text of a backup's id or of a time",
            next_step="name the backup like '3', or the time like '2026-11-29T02:38:24Z'",
        )
    last_ns = None if any(entry.id == at for entry in manifest.backups) else last_ns_of(at, zone)
    if last_ns is None:
        return _require_number(manifest, at)
    early = [entry.id for entry in manifest.backups if entry.time_ns <= last_ns]
    if not early:
        raise NotFound(f"disk {manifest.disk.name} has no backup as old as {at}", next_step=_choice(manifest))
    return early[-1]


def _require_number(manifest: Manifest, at: str) -> str:
    """`at`, if it may be the id of a backup: what has no digits only was likely meant as a time."""
    if not at.isdecimal() and all(entry.id != at for entry in manifest.backups):
        raise NotFound(
            f"disk {manifest.disk.name} has no backup {at!r}, which is neither a number nor a time",
            next_step=f"write a time like '2026-11-29 02:38' or 2026-11-29T02:38:24Z, or {_choice(manifest)}",
        )
    return at


def chain_to(manifest: Manifest, backup_id: str) -> tuple[BackupEntry, ...]:
    """Return the backups whose images a restore of `backup_id` needs, the full one first; `NotFound` without it."""
    chain: list[BackupEntry] = []
    wanted: str | None = backup_id
    for entry in reversed(manifest.backups):
        if entry.id == wanted:
            chain.append(entry)
            wanted = entry.parent
    if wanted is not None:
        raise NotFound(
            f"disk {manifest.disk.name} has no backup {wanted}",
            next_step=_choice(manifest),
        )
    return tuple(reversed(chain))


def _choice(manifest: Manifest) -> str:
    among = "the only one," if len(manifest.backups) == 1 else "one of"
    return f"name {among} {_ids_shown(manifest)}; `lmdbitmap ls REPO` tells of each"


def _ids_shown(manifest: Manifest) -> str:
    """Return all ids, shortened if there are many."""
    ids = [entry.id for entry in manifest.backups]
    first = manifest.backups[0].sequence if ids else 0
    if len(ids) > 2 and ids == [str(first + index) for index in range(len(ids))]:
        return f"{ids[0]} to {ids[-1]}"
    short = ids if len(ids) <= _MOST_IDS_SHOWN else [*ids[: _MOST_IDS_SHOWN - 2], "…", ids[-1]]
    return ", ".join(each[:_MOST_SHOWN_OF_AN_ID] for each in short) or "none"


# --- encoding ---


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as it stands in its file. Raise `InvalidArgument` if `decode` would refuse it."""
    data = _text(manifest)
    try:
        decoded = decode(data)
    except FormatError as refused:
        raise InvalidArgument(refused.problem, next_step="mend the entry before it is written") from refused
    assert decoded == manifest
    return data


def has_room(manifest: Manifest) -> bool:
    """Return whether its file can take one more backup. The length is computed only with thousands of backups."""
    is_short = 2 * len(manifest.backups) * MOST_ENTRY_BYTES < MAX_MANIFEST_BYTES
    return is_short or len(_text(manifest)) + MOST_ENTRY_BYTES <= MAX_MANIFEST_BYTES


def _text(manifest: Manifest) -> bytes:
    text = json.dumps(_tree(manifest), default=_plain, sort_keys=True, indent=2, ensure_ascii=False)
    return text.encode(errors="surrogatepass") + b"\n"


def _tree(manifest: Manifest) -> dict[str, Any]:
    tree = {"format_version": manifest.format_version, **dataclasses.asdict(manifest)}
    for entry in tree["backups"]:
        for absent in ("compression", "chunks", "sha256"):
            if entry[absent] is None:
                del entry[absent]
        if "chunks" in entry and entry["chunks"]["algorithm"] is DigestAlgorithm.SHA256:
            del entry["chunks"]["algorithm"]
    for absent in ("released", "holder", "last_sequence"):
        if not tree[absent]:
            del tree[absent]
    return tree


def _plain(value: object) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    assert isinstance(value, UUID)
    return str(value)


# --- decoding ---


def decode(data: bytes, *, max_bytes: int = MAX_MANIFEST_BYTES) -> Manifest:
    """Read a manifest whose every byte may lie. Anything wrong with it is a `FormatError` that names the place."""
    root = Fields.of_document(data, "manifest", max_bytes=max_bytes, next_step=_RESTORE)
    version = _version(root)
    disk = root.fields("disk")
    backups = tuple(_backup(fields, version) for fields in root.list_of_fields("backups"))
    _check_order(backups)
    released = root.if_there("released", root.list_of_fields) or []
    return Manifest(
        DiskRef(disk.text("name"), disk.uuid("uuid")),
        backups,
        tuple(map(_checkpoint, released)),
        root.if_there("holder", root.uuid),
        root.if_there("last_sequence", lambda name: root.integer(name, 1)) or 0,
    )


def _version(root: Fields) -> int:
    version = root.integer("format_version", 0)
    if 1 <= version <= FORMAT_VERSION:
        return version
    kind = NewerManifest if version > FORMAT_VERSION else FormatError
    step = "use a newer lmdbitmap, or another repository" if kind is NewerManifest else _RESTORE
    raise kind("manifest format_version", expected=f"1 to {FORMAT_VERSION}", found=version, next_step=step)


def _backup(fields: Fields, version: int) -> BackupEntry:
    entry = BackupEntry(
        id=fields.text("id"),
        sequence=fields.integer("sequence", 0),
        file=fields.file_name("file"),
        parent=fields.optional("parent", fields.text),
        type_requested=fields.choice("type_requested", list(BackupType)),
        type_actual=fields.choice("type_actual", list(BackupType)),
        reason=fields.optional("reason", lambda name: _reason(fields.fields(name))),
        time_ns=fields.integer("time_ns", 0),
        checkpoint=_checkpoint(fields.fields("checkpoint")),
        epoch=fields.uuid("epoch"),
        disk_size=fields.integer("disk_size", 0),
        granularity=fields.power_of_two("granularity", 1 << MIN_GRANULARITY_BITS, 1 << MAX_GRANULARITY_BITS),
        cluster_size=fields.power_of_two("cluster_size", MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE),
        trust=fields.choice("trust", [Trust.EXACT, Trust.SUPERSET]),
        bytes_changed=fields.integer("bytes_changed", 0),
        bytes_zero=fields.integer("bytes_zero", 0),
        bytes_stored=fields.integer("bytes_stored", 0),
        sha256=fields.digest("sha256") if version == 1 else fields.if_there("sha256", fields.digest),
        compression=fields.if_there("compression", lambda name: fields.choice(name, list(CompressionType))),
        chunks=fields.if_there("chunks", lambda name: _chunks(fields.fields(name))),
    )
    if entry.reason is None and entry.type_requested is not entry.type_actual:
        raise _refusal(f"{fields.place}.reason", "one, as the type is not the requested one", "null")
    if entry.sha256 is None and entry.chunks is None:
        raise _refusal(f"{fields.place}.chunks", "digests of chunks, as there is none of the file", "none")
    return entry


def _checkpoint(fields: Fields) -> CheckpointRef:
    return CheckpointRef(fields.uuid("uuid"), fields.text("name"))


def _reason(fields: Fields) -> Reason:
    return Reason(fields.text("code"), fields.text("words"))


def _chunks(fields: Fields) -> ChunkDigests:
    chunk_size = fields.power_of_two("chunk_size", MIN_CHUNK_SIZE, MAX_CHUNK_SIZE)
    algorithm = fields.if_there("algorithm", lambda name: fields.choice(name, list(DigestAlgorithm)))
    return ChunkDigests(
        fields.file_name("file"), chunk_size, fields.digest("sha256"), algorithm or DigestAlgorithm.SHA256
    )


def _check_order(backups: Sequence[BackupEntry]) -> None:
    """Refuse what would break a chain. Only earlier entries count, so no two entries can be each other's parent."""
    ids: set[str] = set()
    files: set[str] = set()
    last_sequence = -1
    for index, entry in enumerate(backups):
        place = f"manifest backups[{index}]"
        if entry.id in ids:
            raise _refusal(f"{place}.id", "an id of its own", shown(entry.id))
        if entry.file in files:
            raise _refusal(f"{place}.file", "a file of its own", shown(entry.file))
        if entry.sequence <= last_sequence:
            raise _refusal(f"{place}.sequence", f"more than {last_sequence}", entry.sequence)
        if entry.type_actual is BackupType.FULL and entry.parent is not None:
            raise _refusal(f"{place}.parent", "null, as the backup is full", shown(entry.parent))
        if entry.type_actual is not BackupType.FULL and entry.parent not in ids:
            raise _refusal(f"{place}.parent", "the id of an earlier backup", shown(entry.parent))
        ids.add(entry.id)
        files.add(entry.file)
        last_sequence = entry.sequence


def _refusal(place: str, expected: str, found: object) -> FormatError:
    return FormatError(place, expected=expected, found=found, next_step=_RESTORE)
