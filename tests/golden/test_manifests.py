"""Manifests frozen when their version was first written: read for ever, and written the same, see README.md."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.extents import Trust
from lmdbitmap.notes.references import CheckpointRef, Reason
from lmdbitmap.qcow2 import CompressionType
from lmdbitmap.repository.manifest import (
    BackupEntry,
    BackupType,
    ChunkDigests,
    DiskRef,
    Manifest,
    decode,
    encode,
)

FOLDER = Path(__file__).parent / "manifest"
DISK = DiskRef("sda", UUID("11111111-1111-4111-8111-111111111111"))
EPOCH = UUID("22222222-2222-4222-8222-222222222222")
HOLDER = UUID("33333333-3333-4333-8333-333333333333")
FULL, INCREMENTAL = BackupType.FULL, BackupType.INCREMENTAL
WHOLE = "0123456789abcdef" * 4
FIRST = Reason("no-earlier-backup", "no earlier backup — früher gab es keine")


def checkpoint(number: int) -> CheckpointRef:
    return CheckpointRef(UUID(int=number), f"backup-20260101T00000{number}Z-abcdef")


def backup(number: int, sha256: str | None, chunks: ChunkDigests | None, **more: Any) -> BackupEntry:
    kind = FULL if number == 1 else INCREMENTAL
    return BackupEntry(
        id=str(number), sequence=number, file=f"00000{number}-{kind.value}.qcow2",
        parent=None if number == 1 else str(number - 1), type_requested=INCREMENTAL, type_actual=kind,
        reason=FIRST if number == 1 else None, time_ns=1_700_000_000_123_456_789 + number,
        checkpoint=checkpoint(number), epoch=EPOCH, disk_size=1_000_003, granularity=65536,
        cluster_size=65536, trust=Trust.EXACT if number == 1 else Trust.SUPERSET, bytes_changed=131072,
        bytes_zero=65536, bytes_stored=458752, sha256=sha256, chunks=chunks, **more,
    )  # fmt: skip


def chunks(number: int, *algorithm: DigestAlgorithm) -> ChunkDigests:
    return ChunkDigests(f"00000{number}.qcow2.0123456{number}.digests", 1 << 20, "f" * 64, *algorithm)


V1 = (backup(1, WHOLE, None), backup(2, WHOLE, chunks(2), compression=CompressionType.ZLIB))
V2 = (*V1, backup(3, None, chunks(3), compression=CompressionType.ZSTD))
MANIFESTS = {
    "v1": Manifest(DISK, V1),
    "v2": Manifest(DISK, V2, released=(checkpoint(0),), holder=HOLDER),
    "v3": Manifest(DISK, (*V2, backup(4, None, chunks(4, DigestAlgorithm.BLAKE3))), holder=HOLDER),
}
DIGESTS = {
    "v1": "bb41bae77a5f1f72d4fe815f37b2b90b1fc649de68e04110ad8bbed6d1e6300e",
    "v2": "a2914fbffca45a272a098639f10848afdb23236d60d21d53e0587ef0ab5bf196",
    "v3": "0a4d86418dc9d71035a5ebed25aa6b8704665f92b43a0ee95a75a6ac52fced08",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_frozen_manifest_reads_and_is_written_as_ever(name: str) -> None:
    frozen = (FOLDER / f"{name}.json").read_bytes()
    assert hashlib.sha256(frozen).hexdigest() == DIGESTS[name]
    assert decode(frozen) == MANIFESTS[name]
    assert encode(MANIFESTS[name]) == frozen
    assert f"v{MANIFESTS[name].format_version}" == name


def test_every_frozen_manifest_is_read() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(MANIFESTS) == set(DIGESTS)
