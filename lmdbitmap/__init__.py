"""Remember which blocks of a disk image changed since the last backup, also after a crash.

What is named here is the library; everything else may move. Names are loaded when they are first asked for,
so that `import lmdbitmap` costs next to nothing. DESIGN.md explains the tracker.

    with Store.create("/var/lib/lmdbitmap") as store:
        add(store, "sda", "/srv/sda.raw", granularity_bits=16)
        with Filter.attach(store, "sda") as disk:
            disk.pwrite(b"hello", 0)
            disk.checkpoint("monday")
        for extent in changes_of(store, "sda", since="monday").extents():
            ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lmdbitmap.version import __version__

if TYPE_CHECKING:
    from lmdbitmap.changes import Changes, Standing
    from lmdbitmap.changes import changes as changes_of
    from lmdbitmap.check import Finding, Gravity, check_store
    from lmdbitmap.device import FileDevice, MemoryDevice
    from lmdbitmap.errors import (
        AlreadyExists,
        Busy,
        FormatError,
        InvalidArgument,
        LmdbitmapError,
        NotFound,
        StorageError,
        Untrusted,
    )
    from lmdbitmap.extents import Extent, Trust
    from lmdbitmap.filter import Filter, take_checkpoint
    from lmdbitmap.nbd.server import Server
    from lmdbitmap.session import add, adopt, remove
    from lmdbitmap.store import Store

_HOMES = {
    "AlreadyExists": "errors",
    "Busy": "errors",
    "Changes": "changes",
    "Extent": "extents",
    "FileDevice": "device",
    "Filter": "filter",
    "Finding": "check",
    "FormatError": "errors",
    "Gravity": "check",
    "InvalidArgument": "errors",
    "LmdbitmapError": "errors",
    "MemoryDevice": "device",
    "NotFound": "errors",
    "Server": "nbd.server",
    "Standing": "changes",
    "StorageError": "errors",
    "Store": "store",
    "Trust": "extents",
    "Untrusted": "errors",
    "add": "session",
    "adopt": "session",
    "changes_of": "changes",
    "check_store": "check",
    "remove": "session",
    "take_checkpoint": "filter",
}
"""Where each public name lives."""
_OTHER_NAMES = {"changes_of": "changes"}
"""What a name is called at home. A package's attribute `changes` is its module, whatever we say here."""

__all__ = [
    "AlreadyExists",
    "Busy",
    "Changes",
    "Extent",
    "FileDevice",
    "Filter",
    "Finding",
    "FormatError",
    "Gravity",
    "InvalidArgument",
    "LmdbitmapError",
    "MemoryDevice",
    "NotFound",
    "Server",
    "Standing",
    "StorageError",
    "Store",
    "Trust",
    "Untrusted",
    "__version__",
    "add",
    "adopt",
    "changes_of",
    "check_store",
    "remove",
    "take_checkpoint",
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
