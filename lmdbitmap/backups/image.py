"""What one backup is made of, and how its image is written.

An image gets its final name once it and the digests of its chunks are durable. Nothing refers to it before the manifest
does (backup.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from lmdbitmap import bits
from lmdbitmap.access.access import Access, reading
from lmdbitmap.access.routes import PointInTime
from lmdbitmap.backups.plan import BackupPlan, DigestChoice, full_instead
from lmdbitmap.backups.rescan import differing, sifted
from lmdbitmap.bits import Run
from lmdbitmap.copying.copier import Copied, ImageFile, copy_clusters
from lmdbitmap.copying.hashing import ChunkHasher
from lmdbitmap.copying.readable import Metered, Readable
from lmdbitmap.errors import FormatError, LmdbitmapError, NotFound, StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import EXTENT_BLOCKS, Geometry
from lmdbitmap.interfaces import Allocation
from lmdbitmap.notes.holds import HoldFile
from lmdbitmap.notes.references import CheckpointRef
from lmdbitmap.qcow2.compression import Compression
from lmdbitmap.qcow2.layout import SECTOR, CompressionType, cluster_bits_for
from lmdbitmap.repository import backup_chain
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.repository.backup_files import image_name
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.digests import require_algorithms, synced_digests
from lmdbitmap.repository.manifest import BackupEntry, BackupType, ChunkDigests, Manifest, chain_to
from lmdbitmap.repository.proof import Whole, proven_beside
from lmdbitmap.repository.unfinished import Unfinished
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.system import atomic_files
from lmdbitmap.tracker.changes import Changes, changes_since
from lmdbitmap.work.progress import Report

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiskBackup:
    """One disk's part of a run: its folder locked, its backup planned."""

    access: Access
    disk: Disk
    folder: BackupFolder
    manifest: Manifest
    requested: BackupType
    plan: BackupPlan
    digests: DigestChoice
    sequence: int
    leftovers: Sequence[Unfinished]
    """Unfinished work of killed runs whose checkpoints cannot go before there is another one."""
    hold: HoldFile
    """The store's note on the folder, locked."""
    only_that: bool = False
    """Whether only the requested type will do."""

    @property
    def file(self) -> str:
        return image_name(self.sequence, self.plan.type_actual)

    def require_as_asked(self) -> None:
        """Raise `Untrusted` if the backup will be of another type than the one requested."""
        if self.plan.type_actual is self.requested:
            return
        assert self.plan.reason is not None
        article = "an" if self.requested is BackupType.INCREMENTAL else "a"
        raise Untrusted(
            f"disk {self.disk.name!r} cannot have {article} {self.requested.value} backup: {self.plan.reason.words}",
            next_step="leave out --require-incremental, or make a full backup",
        )

    @contextlib.contextmanager
    def parent_chain(self) -> Iterator[Readable]:
        """Open the backup that this one is stacked on, as a disk.

        Raises `ParentDamaged` on entry, while reading, or on exit. What is read of it is proven as a restore will prove
        it, because a restore takes from there what the backup has in common with the disk. The proof is left out if
        this Python lacks the package for one of its digests, and for images that have no digests by chunks.
        """
        assert self.plan.parent is not None
        of_the_parent = partial(_of_the_parent, needed=not self.plan.sifts)
        entries = chain_to(self.manifest, self.plan.parent.id)
        can_prove = _can_prove(self.folder, entries)
        with contextlib.ExitStack() as opened:
            with of_the_parent():
                past = opened.enter_context(backup_chain.opened(self.folder, entries, verify=can_prove))
                wholes = _without_their_digests(past) if can_prove else []
                if wholes and self.plan.sifts:
                    raise _costs_too_much(wholes[0])
                proven = opened.enter_context(proven_beside(wholes))
            yield _Parent(past, of_the_parent)
            with of_the_parent():
                proven.result()


def _can_prove(folder: BackupFolder, entries: Sequence[BackupEntry]) -> bool:
    try:
        require_algorithms(folder, entries)
    except NotFound as lacking:
        log.warning("%s; what the disk is compared with is not proven", lacking.problem)
        return False
    return True


def _without_their_digests(past: BackupChain) -> Sequence[Whole]:
    """Return the images whose digests by chunks are lost or damaged: they can be proven only as a whole."""
    return [image for image in past.unproven if image.entry.chunks is not None]


def _costs_too_much(image: Whole) -> NotFound:
    """Return why an increment is not compared: all of an image would be read for it, while guests write."""
    return NotFound(
        f"{image.file.path}: its digests are lost, and all of it would have to be read",
        next_step="run `lmdbitmap verify`, which proves it",
    )


class ParentDamaged(Exception):
    """The backup that a disk is compared with cannot be read. Not yet an error: the backup is made without it."""

    def __init__(self, error: LmdbitmapError) -> None:
        super().__init__(error)
        self.error = error


@contextlib.contextmanager
def _of_the_parent(*, needed: bool) -> Iterator[None]:
    """Raise `ParentDamaged` for damage, and if the parent is not `needed`, for any error.

    Else refusals by the disk and unknown errors pass unchanged: another program may be in the way.
    """
    try:
        yield
    except LmdbitmapError as error:
        is_bad_disk = isinstance(error, StorageError) and error.is_of_bad_disk
        if needed and not is_bad_disk and not isinstance(error, FormatError):
            raise
        raise ParentDamaged(error) from error


class _Parent:
    def __init__(
        self, chain: BackupChain, of_the_parent: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._chain = chain
        self._of_the_parent = of_the_parent
        self.size = chain.size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        with self._of_the_parent():
            self._chain.pread_into(buffer, offset)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        with self._of_the_parent():
            yield from self._chain.allocation(offset, length)


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What one image is made of: the blocks that changed up to the point in time, in whole clusters."""

    job: DiskBackup
    point: PointInTime
    clusters: Geometry
    changes: Changes | None
    """None for a full backup, and for a rescan."""
    trust: Trust
    bytes_to_copy: int

    @classmethod
    def of(cls, store: Store, job: DiskBackup, point: PointInTime) -> ImagePlan:
        disk, since = point.disk, job.plan.since
        clusters = Geometry(disk.size, cluster_bits_for(disk.geometry))
        if since is None:
            return cls(job, point, clusters, None, Trust.EXACT, disk.size)
        changed = changes_since(store, disk.name, since, point.checkpoint.name)
        summary = changed.summary
        return cls(job, point, clusters, changed, summary.standing.trust, summary.dirty_bytes)

    def without_comparison(self, damage: LmdbitmapError) -> ImagePlan:
        """Return a plan for the same point in time that needs not read the parent, which cannot be read."""
        if not self.job.plan.sifts:
            return self._full_instead(damage)
        log.warning("disk %s: all that counts as changed is stored: %s", self.job.disk.name, damage.problem)
        return dataclasses.replace(
            self, job=dataclasses.replace(self.job, plan=self.job.plan._replace(sifts=False))
        )

    def _full_instead(self, damage: LmdbitmapError) -> ImagePlan:
        """Return a plan for all of the disk. The new image is noted before it is begun."""
        job = dataclasses.replace(self.job, plan=full_instead(damage))
        if job.only_that:
            job.require_as_asked()
        log.warning("disk %s: a full backup is made instead: %s", job.disk.name, damage.problem)
        job.folder.note_unfinished([*job.leftovers, Unfinished(self.point.checkpoint.name, job.file)])
        return dataclasses.replace(self, job=job)

    @contextlib.contextmanager
    def runs(self, device: Readable, report: Report) -> Iterator[Iterator[Run]]:
        """Yield the runs of clusters to copy, ascending and not adjacent. Only a comparison reads the device for them.

        Raises `ParentDamaged` only at the end, so that the device can be read once more.
        """
        if not self.job.plan.compares:
            yield self._with_tail(self._dirty_clusters())
            return
        lost: list[ParentDamaged] = []
        with self.job.parent_chain() as past:
            yield self._with_tail(_until_lost(self._compared(device, past, report), lost))
            if lost:
                raise lost[0]

    def _dirty_clusters(self) -> Iterator[Run]:
        """Yield the runs of clusters that count as dirty: all of them, if no bitmap is asked."""
        if self.changes is None:
            return iter([(0, self.clusters.block_count)])
        changes = self.changes
        return bits.regrain_outward(changes.runs(), changes.geometry, self.clusters.granularity_bits)

    def _compared(self, device: Readable, past: Readable, report: Report) -> Iterator[Run]:
        """Yield the runs of clusters that differ from the parent, or were written to in part of an extent."""
        if self.changes is None:
            return differing(device, past, self.clusters, report.advance)
        extent_bytes = EXTENT_BLOCKS * self.changes.geometry.granularity
        return sifted(self._dirty_clusters(), device, past, self.clusters, extent_bytes, report.advance)

    def _with_tail(self, runs: Iterator[Run]) -> Iterator[Run]:
        """Return the runs with the last cluster added if it is needed."""
        last = self.clusters.block_count
        return bits.joined_runs(itertools.chain(runs, [(last - 1, last)] if self._cut_in_a_sector() else []))

    def _cut_in_a_sector(self) -> bool:
        """Return whether the parent has something between this disk's end and the end of the image, in the same sector.

        That is so if the parent's disk is longer. No byte there belongs to the disk, but QEMU shows it: it must be
        zeroes.
        """
        parent, size = self.job.plan.parent, self.clusters.size
        return parent is not None and size < parent.disk_size and size % SECTOR != 0


def _until_lost(runs: Iterator[Run], lost: list[ParentDamaged]) -> Iterator[Run]:
    """Yield `runs`. On `ParentDamaged` end, and append the error to `lost`: to raise it here would spoil the device."""
    try:
        yield from runs
    except ParentDamaged as damaged:
        lost.append(damaged)


def write_image(
    source: ImagePlan, device: Metered, report: Report, packing: Compression | None
) -> BackupEntry:
    """Write the image, durable in the folder under its final name. Return its manifest entry.

    Raises `ParentDamaged` if a comparison is impossible; then there is no image.
    """
    job, parent = source.job, source.job.plan.parent
    path = job.folder.path_of(job.file)
    compares = job.plan.compares
    spared = device.methods.spared
    with (
        atomic_files.replacing(path, follow=False) as file,
        ChunkHasher(file.fileno(), job.folder.path, job.digests.algorithm, spared=spared) as hasher,
    ):
        with reading(job.access, source.point), source.runs(device, report) as runs:
            copied = copy_clusters(
                device,
                ImageFile(file.fileno(), path),
                hasher,
                source.clusters,
                runs,
                backing_file=None if parent is None else parent.file,
                report=Report(None, 0) if compares else report,
                compression=packing,
            )
        chunks = synced_digests(job.folder, job.file, file.fileno(), hasher)
        job.access.prove(source.point)
    return _entry(source, copied, chunks, None if packing is None else packing.type)


def _entry(
    source: ImagePlan, copied: Copied, chunks: ChunkDigests, compression: CompressionType | None
) -> BackupEntry:
    job, disk, plan, checkpoint = source.job, source.point.disk, source.job.plan, source.point.checkpoint
    return BackupEntry(
        id=str(job.sequence), sequence=job.sequence, file=job.file,
        parent=None if plan.parent is None else plan.parent.id,
        type_requested=job.requested, type_actual=plan.type_actual, reason=plan.reason,
        time_ns=checkpoint.time_ns, checkpoint=CheckpointRef(checkpoint.uuid, checkpoint.name),
        epoch=checkpoint.epoch, disk_size=disk.size, granularity=disk.geometry.granularity,
        cluster_size=source.clusters.granularity, trust=source.trust, bytes_changed=copied.bytes_changed,
        bytes_zero=copied.bytes_zero, bytes_stored=copied.bytes_stored,
        sha256=None, chunks=chunks, compression=compression,
    )  # fmt: skip
