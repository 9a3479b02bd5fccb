"""Remember which blocks of a disk image changed since the last backup, also after a crash.

The names in this module are the library's public interface; everything else may move. They are loaded on first use, so
that `import lmdbitmap` costs next to nothing. docs/python.md is the guide to them; DESIGN.md explains the tracker.

    with Store.create("/var/lib/lmdbitmap") as store:
        add(store, "sda", "/srv/sda.raw", granularity_bits=16)
        with Filter.attach(store, "sda") as disk:
            disk.checkpoint("monday")
            disk.pwrite(b"hello", 100_000)
        for extent in changes_of(store, "sda", since="monday").extents():
            ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lmdbitmap.version import __version__

if TYPE_CHECKING:
    from lmdbitmap.access.operations import Adopted, adopt, remove
    from lmdbitmap.access.operations import checkpoint as checkpoint_disks
    from lmdbitmap.access.operations import forget as forget_checkpoint
    from lmdbitmap.access.operations import mark as mark_dirty
    from lmdbitmap.access.questions import ask_changes
    from lmdbitmap.access.served_snapshots import (
        ServedSnapshot,
        open_served_snapshot,
        release_served_snapshot,
        take_served_snapshot,
    )
    from lmdbitmap.backups.backup import backup as back_up
    from lmdbitmap.backups.consumers import drop_hold, hold_lapse_days, holds_of, set_hold_lapse_days
    from lmdbitmap.backups.result import BackupResult, BackupsFailed
    from lmdbitmap.errors import (
        AlreadyExists,
        Busy,
        FormatError,
        InvalidArgument,
        LmdbitmapError,
        NotFound,
        OwnerGone,
        SomeFailed,
        StorageError,
        Untrusted,
    )
    from lmdbitmap.export import (
        FileForm,
        export_bitmap,
        export_changes,
        import_file,
        keep_changes,
    )
    from lmdbitmap.extents import Extent, Trust
    from lmdbitmap.filter import Filter, take_checkpoint, take_snapshot
    from lmdbitmap.flat_file.inspection import Inspection, inspect_file
    from lmdbitmap.images.device import FileDevice
    from lmdbitmap.images.memory_device import MemoryDevice
    from lmdbitmap.images.plain import PlainDisk
    from lmdbitmap.interfaces import BlockDevice
    from lmdbitmap.nbd.control.control import ControlServer
    from lmdbitmap.nbd.control.held import HeldSnapshots
    from lmdbitmap.nbd.server.server import Server
    from lmdbitmap.notes.holds import Hold
    from lmdbitmap.notes.references import CheckpointRef, Reason
    from lmdbitmap.repository.backup_chain import BackupChain, open_backup
    from lmdbitmap.repository.manifest import BackupEntry, BackupType
    from lmdbitmap.repository.prune import PruneResult, PrunesFailed
    from lmdbitmap.repository.prune import prune as prune_backups
    from lmdbitmap.repository.restore_points import backed_up_disks, backups_of
    from lmdbitmap.repository.retention import Retention
    from lmdbitmap.repository.transfer import CopiesFailed, CopyResult, copy_backups
    from lmdbitmap.repository.verify import Flaw, VerifyResult
    from lmdbitmap.repository.verify import verify as verify_backups
    from lmdbitmap.restoring.backup_server import serve_backup
    from lmdbitmap.restoring.restore import RestoreResult
    from lmdbitmap.restoring.restore import restore as restore_backup
    from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk
    from lmdbitmap.store import Store
    from lmdbitmap.streams.restore import AppliedResult, apply_stream
    from lmdbitmap.streams.stream import StreamResult, stream_backup
    from lmdbitmap.syncs.plan import SyncKind
    from lmdbitmap.syncs.sync import SyncResult
    from lmdbitmap.syncs.sync import sync as sync_disk
    from lmdbitmap.tracker.changes import Changes, Standing, Summary
    from lmdbitmap.tracker.changes import changes as changes_of
    from lmdbitmap.tracker.scratch import Scratch
    from lmdbitmap.tracker.session import add, relocate
    from lmdbitmap.tracker.snapshot import Snapshot
    from lmdbitmap.tracker.standalone import Operation as BitmapOperation
    from lmdbitmap.tracker.standalone import combine as combine_bitmaps
    from lmdbitmap.upkeep.check import check_store
    from lmdbitmap.upkeep.findings import Finding, Gravity
    from lmdbitmap.work.progress import Progress

_HOMES = {
    "Adopted": "access.operations",
    "AlreadyExists": "errors",
    "AppliedResult": "streams.restore",
    "BackupChain": "repository.backup_chain",
    "BackupEntry": "repository.manifest",
    "BackupResult": "backups.result",
    "BackupType": "repository.manifest",
    "BackupsFailed": "backups.result",
    "Bitmap": "storage.schema",
    "BitmapOperation": "tracker.standalone",
    "BlockDevice": "interfaces",
    "Busy": "errors",
    "Changes": "tracker.changes",
    "Checkpoint": "storage.schema",
    "CheckpointRef": "notes.references",
    "ControlServer": "nbd.control.control",
    "CopiesFailed": "repository.transfer",
    "CopyResult": "repository.transfer",
    "Disk": "storage.schema",
    "Extent": "extents",
    "FileDevice": "images.device",
    "FileForm": "export",
    "Filter": "filter",
    "Finding": "upkeep.findings",
    "Flaw": "repository.verify",
    "FormatError": "errors",
    "Gravity": "upkeep.findings",
    "HeldSnapshots": "nbd.control.held",
    "Hold": "notes.holds",
    "Inspection": "flat_file.inspection",
    "InvalidArgument": "errors",
    "LmdbitmapError": "errors",
    "MemoryDevice": "images.memory_device",
    "NotFound": "errors",
    "OwnerGone": "errors",
    "PlainDisk": "images.plain",
    "Progress": "work.progress",
    "PruneResult": "repository.prune",
    "PrunesFailed": "repository.prune",
    "Reason": "notes.references",
    "RestoreResult": "restoring.restore",
    "Retention": "repository.retention",
    "Scratch": "tracker.scratch",
    "ServedSnapshot": "access.served_snapshots",
    "Server": "nbd.server.server",
    "Snapshot": "tracker.snapshot",
    "SomeFailed": "errors",
    "Standing": "tracker.changes",
    "StorageError": "errors",
    "Store": "store",
    "StreamResult": "streams.stream",
    "Summary": "tracker.changes",
    "SyncKind": "syncs.plan",
    "SyncResult": "syncs.sync",
    "Trust": "extents",
    "Untrusted": "errors",
    "VerifyResult": "repository.verify",
    "add": "tracker.session",
    "adopt": "access.operations",
    "apply_stream": "streams.restore",
    "ask_changes": "access.questions",
    "back_up": "backups.backup",
    "backed_up_disks": "repository.restore_points",
    "backups_of": "repository.restore_points",
    "changes_of": "tracker.changes",
    "check_store": "upkeep.check",
    "checkpoint_disks": "access.operations",
    "combine_bitmaps": "tracker.standalone",
    "copy_backups": "repository.transfer",
    "drop_hold": "backups.consumers",
    "export_bitmap": "export",
    "export_changes": "export",
    "forget_checkpoint": "access.operations",
    "hold_lapse_days": "backups.consumers",
    "holds_of": "backups.consumers",
    "import_file": "export",
    "inspect_file": "flat_file.inspection",
    "keep_changes": "export",
    "mark_dirty": "access.operations",
    "open_backup": "repository.backup_chain",
    "open_served_snapshot": "access.served_snapshots",
    "prune_backups": "repository.prune",
    "release_served_snapshot": "access.served_snapshots",
    "relocate": "tracker.session",
    "remove": "access.operations",
    "restore_backup": "restoring.restore",
    "serve_backup": "restoring.backup_server",
    "set_hold_lapse_days": "backups.consumers",
    "stream_backup": "streams.stream",
    "sync_disk": "syncs.sync",
    "take_checkpoint": "filter",
    "take_served_snapshot": "access.served_snapshots",
    "take_snapshot": "filter",
    "verify_backups": "repository.verify",
}
"""The module of each public name."""
_OTHER_NAMES = {
    "BitmapOperation": "Operation",
    "back_up": "backup",
    "changes_of": "changes",
    "checkpoint_disks": "checkpoint",
    "combine_bitmaps": "combine",
    "forget_checkpoint": "forget",
    "mark_dirty": "mark",
    "prune_backups": "prune",
    "restore_backup": "restore",
    "sync_disk": "sync",
    "verify_backups": "verify",
}
"""The name in its own module, if it differs: there the object of the verb is clear."""

__all__ = [
    "Adopted",
    "AlreadyExists",
    "AppliedResult",
    "BackupChain",
    "BackupEntry",
    "BackupResult",
    "BackupType",
    "BackupsFailed",
    "Bitmap",
    "BitmapOperation",
    "BlockDevice",
    "Busy",
    "Changes",
    "Checkpoint",
    "CheckpointRef",
    "ControlServer",
    "CopiesFailed",
    "CopyResult",
    "Disk",
    "Extent",
    "FileDevice",
    "FileForm",
    "Filter",
    "Finding",
    "Flaw",
    "FormatError",
    "Gravity",
    "HeldSnapshots",
    "Hold",
    "Inspection",
    "InvalidArgument",
    "LmdbitmapError",
    "MemoryDevice",
    "NotFound",
    "OwnerGone",
    "PlainDisk",
    "Progress",
    "PruneResult",
    "PrunesFailed",
    "Reason",
    "RestoreResult",
    "Retention",
    "Scratch",
    "ServedSnapshot",
    "Server",
    "Snapshot",
    "SomeFailed",
    "Standing",
    "StorageError",
    "Store",
    "StreamResult",
    "Summary",
    "SyncKind",
    "SyncResult",
    "Trust",
    "Untrusted",
    "VerifyResult",
    "__version__",
    "add",
    "adopt",
    "apply_stream",
    "ask_changes",
    "back_up",
    "backed_up_disks",
    "backups_of",
    "changes_of",
    "check_store",
    "checkpoint_disks",
    "combine_bitmaps",
    "copy_backups",
    "drop_hold",
    "export_bitmap",
    "export_changes",
    "forget_checkpoint",
    "hold_lapse_days",
    "holds_of",
    "import_file",
    "inspect_file",
    "keep_changes",
    "mark_dirty",
    "open_backup",
    "open_served_snapshot",
    "prune_backups",
    "release_served_snapshot",
    "relocate",
    "remove",
    "restore_backup",
    "serve_backup",
    "set_hold_lapse_days",
    "stream_backup",
    "sync_disk",
    "take_checkpoint",
    "take_served_snapshot",
    "take_snapshot",
    "verify_backups",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'lmdbitmap' has no attribute {name!r}")
    found: object = getattr(importlib.import_module(f"lmdbitmap.{home}"), _OTHER_NAMES.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
