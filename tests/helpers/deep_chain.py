"""A chain of very many small images in a repository, made without a tracker, and what its newest backup reads as."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from lmdbitmap.copying.copier import ImageFile
from lmdbitmap.copying.digest_algorithms import fastest
from lmdbitmap.copying.hashing import CHUNK_BYTES, chunk_digests
from lmdbitmap.qcow2 import Qcow2Writer
from lmdbitmap.repository.backup_files import digests_name, sha256_of
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry, ChunkDigests, Manifest
from tests.helpers.tracked import NAME
from tests.unit.test_manifest import DISK, entry

CLUSTER = 4096


def make_deep_chain(
    repository: Path, count: int, *, size: int, written: int, seed: int = 1
) -> tuple[BackupFolder, bytearray]:
    """`count` images of the disk, of which each but the first, an empty one, has `written` clusters all over it."""
    folder, truth, randomness = BackupFolder(repository, NAME), bytearray(size), random.Random(seed)
    entries: list[BackupEntry] = []
    with folder.locked():
        for number in range(count):
            clusters = sorted(randomness.sample(range(size // CLUSTER), written)) if number else []
            entries.append(_image(folder, number, size, clusters, truth, randomness))
        folder.replace_manifest(Manifest(DISK, tuple(entries)))
    return folder, truth


def _image(
    folder: BackupFolder,
    number: int,
    size: int,
    clusters: list[int],
    truth: bytearray,
    randomness: random.Random,
) -> BackupEntry:
    """A fifth of what is written is zeroes."""
    name, parent = f"{number + 1:06}-full.qcow2", f"{number:06}-full.qcow2" if number else None
    with open(folder.path_of(name), "x+b") as file:
        writer = Qcow2Writer(
            ImageFile(file.fileno(), name),
            size=size,
            cluster_bits=CLUSTER.bit_length() - 1,
            backing_file=parent,
        )
        for cluster in clusters:
            start = cluster * CLUSTER
            if randomness.random() < 0.2:
                truth[start : start + CLUSTER] = bytes(CLUSTER)
                writer.write_zeroes(start, CLUSTER)
            else:
                truth[start : start + CLUSTER] = randomness.randbytes(CLUSTER)
                writer.write(start, truth[start : start + CLUSTER])
        stored = writer.finish()
        digests = b"".join(chunk_digests(file.fileno(), fastest()))
        sha256 = sha256_of(file.fileno())
    sidecar = digests_name(name)
    Path(folder.path_of(sidecar)).write_bytes(digests)
    return entry(
        number, number - 1 if number else None, file=name, disk_size=size, cluster_size=CLUSTER,
        granularity=CLUSTER, bytes_stored=stored, sha256=sha256,
        chunks=ChunkDigests(sidecar, CHUNK_BYTES, hashlib.sha256(digests).hexdigest(), fastest()),
    )  # fmt: skip
