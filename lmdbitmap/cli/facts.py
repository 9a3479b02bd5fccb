"""What JSON answers say of a backup, of a reason and of an epoch: the same in each answer that has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmdbitmap.cli.sizes import iso_time
from lmdbitmap.notes.references import Reason
from lmdbitmap.storage.schema import Disk

if TYPE_CHECKING:
    from lmdbitmap.repository.manifest import BackupEntry


def reason_facts(reason: Reason | None) -> dict[str, str] | None:
    return None if reason is None else {"code": reason.code, "words": reason.words}


def epoch_facts(disk: Disk) -> dict[str, object]:
    return {"number": disk.epoch_number, "uuid": str(disk.epoch), "reason": disk.epoch_reason}


def entry_facts(entry: BackupEntry) -> dict[str, object]:
    return {
        "backup": entry.id,
        "time": iso_time(entry.time_ns),
        "type": entry.type_actual.value,
        "requested": entry.type_requested.value,
        "reason": reason_facts(entry.reason),
        "parent": entry.parent,
        "file": entry.file,
        "checkpoint": entry.checkpoint.name,
        "size": entry.disk_size,
        "trust": entry.trust.value,
        "bytes_changed": entry.bytes_changed,
        "bytes_zero": entry.bytes_zero,
        "bytes_stored": entry.bytes_stored,
        "compression": None if entry.compression is None else entry.compression.value,
        "sha256": entry.sha256,
        "chunks_sha256": None if entry.chunks is None else entry.chunks.sha256,
        "digest": entry.digest_algorithm.value,
    }
