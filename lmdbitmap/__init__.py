"""Remember which blocks of a disk image changed since the last backup, also after a crash.

What is named here is the library; everything else may move. Names are loaded when they are first asked for,
so that `import lmdbitmap` costs next to nothing. DESIGN.md explains the tracker.

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
    from lmdbitmap.backup import backup as back_up
    from lmdbitmap.backup_chain import BackupChain, open_backup
    from lmdbitmap.backup_result import BackupResult, BackupsFailed
    from lmdbitmap.backup_server import serve_backup
    from lmdbitmap.changes import Changes, Standing
    from lmdbitmap.changes import changes as changes_of
    from lmdbitmap.check import Finding, Gravity, check_store
    from lmdbitmap.consumers import drop_hold, hold_lapse_days, holds_of, set_hold_lapse_days
    from lmdbitmap.device import FileDevice, MemoryDevice
    from lmdbitmap.errors import (
        AlreadyExists,
        Busy,
        FormatError,
        InvalidArgument,
        LmdbitmapError,
        NotFound,
        OwnerGone,
        StorageError,
        Untrusted,
    )
    from lmdbitmap.export import (
        Inspection,
        export_bitmap,
        export_changes,
        import_file,
        inspect_file,
        keep_changes,
    )
    from lmdbitmap.extents import Extent, Trust
    from lmdbitmap.filter import Filter, take_checkpoint, take_snapshot
    from lmdbitmap.holds import Hold
    from lmdbitmap.manifest import BackupEntry, BackupType, CheckpointRef, Reason
    from lmdbitmap.nbd.control import ControlServer
    from lmdbitmap.nbd.held import HeldSnapshots
    from lmdbitmap.nbd.server import Server
    from lmdbitmap.plain import PlainDisk
    from lmdbitmap.prune import PruneResult
    from lmdbitmap.prune import prune as prune_backups
    from lmdbitmap.restore import RestoreResult
    from lmdbitmap.restore import restore as restore_backup
    from lmdbitmap.restore_points import backed_up_disks, backups_of
    from lmdbitmap.retention import Retention
    from lmdbitmap.scratch import Scratch
    from lmdbitmap.served_snapshots import (
        ServedSnapshot,
        release_served_snapshot,
        take_served_snapshot,
    )
    from lmdbitmap.session import add, adopt, relocate, remove
    from lmdbitmap.snapshot import Snapshot
    from lmdbitmap.store import Store
    from lmdbitmap.stream import StreamResult, stream_backup
    from lmdbitmap.stream_restore import AppliedResult, apply_stream
    from lmdbitmap.sync import SyncResult
    from lmdbitmap.sync import sync as sync_disk
    from lmdbitmap.sync_plan import SyncKind
    from lmdbitmap.transfer import CopyResult, copy_backups
    from lmdbitmap.verify import Flaw, VerifyResult
    from lmdbitmap.verify import verify as verify_backups

_HOMES = {
    "AlreadyExists": "errors",
    "AppliedResult": "stream_restore",
    "BackupChain": "backup_chain",
    "BackupResult": "backup_result",
    "BackupEntry": "manifest",
    "BackupType": "manifest",
    "BackupsFailed": "backup_result",
    "Busy": "errors",
    "Changes": "changes",
    "CheckpointRef": "manifest",
    "ControlServer": "nbd.control",
    "CopyResult": "transfer",
    "Extent": "extents",
    "FileDevice": "device",
    "Filter": "filter",
    "Finding": "check",
    "Flaw": "verify",
    "FormatError": "errors",
    "Gravity": "check",
    "HeldSnapshots": "nbd.held",
    "Hold": "holds",
    "Inspection": "export",
    "InvalidArgument": "errors",
    "LmdbitmapError": "errors",
    "MemoryDevice": "device",
    "NotFound": "errors",
    "OwnerGone": "errors",
    "PlainDisk": "plain",
    "PruneResult": "prune",
    "Reason": "manifest",
    "RestoreResult": "restore",
    "Retention": "retention",
    "Scratch": "scratch",
    "ServedSnapshot": "served_snapshots",
    "Server": "nbd.server",
    "Snapshot": "snapshot",
    "Standing": "changes",
    "StorageError": "errors",
    "Store": "store",
    "StreamResult": "stream",
    "SyncKind": "sync_plan",
    "SyncResult": "sync",
    "Trust": "extents",
    "Untrusted": "errors",
    "VerifyResult": "verify",
    "add": "session",
    "adopt": "session",
    "apply_stream": "stream_restore",
    "back_up": "backup",
    "backed_up_disks": "restore_points",
    "backups_of": "restore_points",
    "changes_of": "changes",
    "check_store": "check",
    "copy_backups": "transfer",
    "drop_hold": "consumers",
    "export_bitmap": "export",
    "export_changes": "export",
    "hold_lapse_days": "consumers",
    "holds_of": "consumers",
    "import_file": "export",
    "inspect_file": "export",
    "keep_changes": "export",
    "open_backup": "backup_chain",
    "prune_backups": "prune",
    "release_served_snapshot": "served_snapshots",
    "relocate": "session",
    "remove": "session",
    "restore_backup": "restore",
    "serve_backup": "backup_server",
    "set_hold_lapse_days": "consumers",
    "stream_backup": "stream",
    "sync_disk": "sync",
    "take_checkpoint": "filter",
    "take_served_snapshot": "served_snapshots",
    "take_snapshot": "filter",
    "verify_backups": "verify",
}
"""Where each public name lives."""
_OTHER_NAMES = {
    "back_up": "backup",
    "changes_of": "changes",
    "prune_backups": "prune",
    "restore_backup": "restore",
    "sync_disk": "sync",
    "verify_backups": "verify",
}
"""What a name is called at home. A package's attribute `changes` is its module, whatever we say here."""

__all__ = [
    "AlreadyExists",
    "AppliedResult",
    "BackupChain",
    "BackupEntry",
    "BackupResult",
    "BackupType",
    "BackupsFailed",
    "Busy",
    "Changes",
    "CheckpointRef",
    "ControlServer",
    "CopyResult",
    "Extent",
    "FileDevice",
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
    "PruneResult",
    "Reason",
    "RestoreResult",
    "Retention",
    "Scratch",
    "ServedSnapshot",
    "Server",
    "Snapshot",
    "Standing",
    "StorageError",
    "Store",
    "StreamResult",
    "SyncKind",
    "SyncResult",
    "Trust",
    "Untrusted",
    "VerifyResult",
    "__version__",
    "add",
    "adopt",
    "apply_stream",
    "back_up",
    "backed_up_disks",
    "backups_of",
    "changes_of",
    "check_store",
    "copy_backups",
    "drop_hold",
    "export_bitmap",
    "export_changes",
    "hold_lapse_days",
    "holds_of",
    "import_file",
    "inspect_file",
    "keep_changes",
    "open_backup",
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
