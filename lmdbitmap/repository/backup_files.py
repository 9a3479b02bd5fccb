"""The files in a disk's folder: how they are called. Only files that are called so are ever written or removed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from typing import Final

from lmdbitmap.errors import os_errors_at
from lmdbitmap.repository.manifest import BackupEntry, BackupType
from lmdbitmap.work.buffers import new_buffer

IMAGE_FORM: Final = r"([0-9]{6,15})-(?:full|incremental|differential|rescan)\.qcow2"
LAST_NUMBER: Final = 10**15 - 1
"""The highest number that an image's name can hold."""
SUCCESSOR_SUFFIX: Final = ".next"
_HASHED_AT_ONCE = 1 << 20
_IMAGE_NAME = re.compile(IMAGE_FORM)
_DIGESTS_NAME = re.compile(rf"({IMAGE_FORM})\.[0-9a-f]{{8}}\.digests")
_SUCCESSOR_NAME = re.compile(rf"({IMAGE_FORM}){re.escape(SUCCESSOR_SUFFIX)}")


def image_name(sequence: int, kind: BackupType) -> str:
    return f"{sequence:06d}-{kind.value}.qcow2"


def digests_name(file: str) -> str:
    """Return a new name for an image's digests. Those of an image and of its successor lie beside each other."""
    return f"{file}.{os.urandom(4).hex()}.digests"


def is_ours(name: str) -> bool:
    """Return whether an image is called so, or an image's digests."""
    return bool(_IMAGE_NAME.fullmatch(name) or _DIGESTS_NAME.fullmatch(name))


def has_our_names(entry: BackupEntry) -> bool:
    """Return whether the files of a backup are called as we call them: a manifest may name anything."""
    digests = entry.chunks.file if entry.chunks else None
    return bool(_IMAGE_NAME.fullmatch(entry.file)) and (
        digests is None or bool(_DIGESTS_NAME.fullmatch(digests))
    )


def files_of(entries: Iterable[BackupEntry]) -> set[str]:
    """Return all files that backups name: images, and their digests."""
    known = list(entries)
    return {entry.file for entry in known} | {entry.chunks.file for entry in known if entry.chunks}


def images_in(folder_path: str) -> dict[str, int]:
    """Return the names of all images in a folder, known or not, with their numbers."""
    return {match[0]: int(match[1]) for match in _names_like(_IMAGE_NAME, folder_path)}


def digests_in(folder_path: str) -> dict[str, str]:
    """Return the names of all files of digests in a folder, each with the name of its image."""
    return {match[0]: match[1] for match in _names_like(_DIGESTS_NAME, folder_path)}


def succeeded_in(folder_path: str) -> list[str]:
    """Return the images that have a successor in a folder."""
    return [match[1] for match in _names_like(_SUCCESSOR_NAME, folder_path)]


def _names_like(form: re.Pattern[str], folder_path: str) -> list[re.Match[str]]:
    with os_errors_at(folder_path):
        matches = [form.fullmatch(name) for name in os.listdir(folder_path)]
    return [match for match in matches if match is not None]


def sha256_of(fd: int, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the SHA-256 of a file in hexadecimal; of its beginning only, if `stopped` returns True meanwhile."""
    digest, buffer, offset = hashlib.sha256(), new_buffer(_HASHED_AT_ONCE), 0
    view = memoryview(buffer)
    while not stopped() and (count := os.preadv(fd, [buffer], offset)):
        digest.update(view[:count])
        offset += count
    return digest.hexdigest()
