"""Merges images of a chain into one: what a backup reads as, less what its new parent reads as from the same place.

A view is what a backup reads as, run by run. Each run has its place: bytes of a file, or zeroes. If a backup and its
new parent have a range from the same place, the merged image leaves that range out. It stores everything else:

    backup 3 ─ 2 ─ 1, merged onto 1           of 3 and 2, which go together: all that is not in 1
    backup 3 ─ 2 ─ 1, merged onto nothing     everything: a full image, made without the disk
    backup 3 ─ 1, moved onto 2 ─ 1            what is in 3, and where 2 has something and 3 does not: that of 1

Bytes are not compared: a range that is equal by chance is stored. Clusters are whole, as in a backup; one that has
several places is put together by reading it. The kernel copies all other data from file to file. A compressed cluster
is copied as it is if the new image can have it: an image has one kind of compression.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lmdbitmap.copying.copier import Copied, ImageFile
from lmdbitmap.errors import os_errors_at
from lmdbitmap.images.file_copy import PIECE_BYTES, FileCopier
from lmdbitmap.images.file_pool import FilePool, PooledFile
from lmdbitmap.qcow2 import Kind, MappedRun, Qcow2Reader, Qcow2Writer, chain_read_into
from lmdbitmap.qcow2.chain import merged, overlaid, stored
from lmdbitmap.qcow2.layout import SECTOR, CompressionType
from lmdbitmap.repository.backup_chain import NamedFile, image_reader
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.proof import ChunkProof, Whole, chunk_proof
from lmdbitmap.work.progress import Report


class View:
    """What a backup reads as. `chain` is its images, the full one first.

    A view that goes `down_to` a number of them treats these as one place, and opens them only if it must.
    """

    def __init__(
        self, pool: FilePool, folder: BackupFolder, chain: Sequence[BackupEntry], down_to: int = 0
    ) -> None:
        self.entry = chain[-1]
        self._pool = pool
        self._folder = folder
        self._chain = chain[::-1]
        self._files: list[PooledFile] = []
        self._readers: list[Qcow2Reader] = []
        self._open(len(chain) - down_to)
        self._size_below = chain[down_to - 1].disk_size if down_to else None
        """Size of the disk in the newest image of that one place; None without such a place."""
        self._layer_below = len(self._readers)
        """Layer of all runs in that one place, wherever below they are; each layer above it is an image."""

    def _open(self, count: int, *, proves: bool = False) -> None:
        """Open images, newest first, until `count` are open. With `proves` nothing of them is read unproven."""
        for index in range(len(self._files), count):
            entry, parents = self._chain[index], self._chain[index + 1 :]
            file = PooledFile(self._pool, self._folder.image_path(entry.file))
            proof = self._proof(entry, file) if proves else None
            parent = parents[0].file if parents else None
            self._readers.append(image_reader(NamedFile(file, proof), entry, parent))
            self._files.append(file)

    def _proof(self, entry: BackupEntry, file: PooledFile) -> ChunkProof | None:
        """Return the proof of the image by chunks. Without one, prove it as a whole."""
        proof = chunk_proof(self._folder, entry, file)
        if proof is None:
            Whole(self._folder, entry, file).prove()
        return proof

    def runs(self, size: int) -> Iterator[tuple[MappedRun, object]]:
        """Yield each run of the first `size` bytes and its place. Past the disk's end there are zeroes."""
        for run in overlaid(merged(self._stored(size)), 0, size):
            yield run, self._place(run)

    def _stored(self, size: int) -> list[Iterator[MappedRun]]:
        """Return the runs that each layer has of the first `size` bytes."""
        streams = stored(self._readers[: self._layer_below], 0, size)
        if self._size_below is not None:
            end = min(self._size_below, size)
            streams.append(iter([MappedRun(0, end, Kind.DATA, 0, self._layer_below)] if end else []))
        return streams

    def _place(self, run: MappedRun) -> object:
        """Return a key that is equal for two runs that begin with the same bytes of the same file, or with zeroes."""
        if not run.is_stored:
            return None
        begins = run.host_offset if run.kind is Kind.COMPRESSED else run.host_offset - run.offset
        return self._chain[run.layer].id, run.kind, begins

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from the backup, through all of its images.

        The caller has proven the images of the view. Those in the one place below are proven here: what is read of them
        gets a new digest, which must not vouch for old damage.
        """
        self._open(len(self._chain), proves=True)
        chain_read_into(self._readers, buffer, offset)

    def file_of(self, run: MappedRun) -> PooledFile | None:
        """Return the file that the run's data is in; None if it is in the one place below."""
        return self._files[run.layer] if run.layer < self._layer_below else None

    def packed(self, run: MappedRun, cluster_size: int, kind: CompressionType) -> bytes | None:
        """Return a compressed cluster as it is in its file; None if an image of this kind cannot have it so.

        `run` is that long: the disk's last cluster, if it is short, is read.
        """
        reader = self._readers[run.layer]
        if (reader.cluster_size, reader.compression_type) != (cluster_size, kind):
            return None
        assert run.length == cluster_size
        with os_errors_at(self._files[run.layer].path):
            return self._files[run.layer].pread(run.host_length, run.host_offset)

    @property
    def compression_type(self) -> CompressionType:
        """The compression of the newest image that names one."""
        named = [entry.compression for entry in self._chain if entry.compression is not None]
        return named[0] if named else CompressionType.ZLIB


class _MergedRun(NamedTuple):
    """A range of the disk, where its bytes are, and whether the new parent has them from the same place."""

    run: MappedRun
    inherited: bool

    def cut(self, length: int) -> tuple[_MergedRun, _MergedRun]:
        """Return the first `length` bytes, and the rest."""
        run, middle = self.run, self.run.offset + length
        return self._replace(run=run.part(run.offset, middle)), self._replace(run=run.part(middle, run.end))


def write_merged(
    fd: int, place: str, view: View, over: View | None, report: Report
) -> tuple[Copied, CompressionType | None]:
    """Fill the empty file `fd` with an image of `view` over that of `over`, or a full one. Nothing is synced.

    Also returns how its clusters are compressed, if any are.
    """
    entry = view.entry
    writer = Qcow2Writer(
        ImageFile(fd, place),
        size=entry.disk_size,
        cluster_bits=entry.cluster_size.bit_length() - 1,
        backing_file=None if over is None else over.entry.file,
        compression_type=view.compression_type,
    )
    merger = _Merger(view, writer, fd, place, report)
    for piece in _pieces(view, over):
        merger.take(piece)
    copied = Copied(merger.bytes_changed, merger.bytes_zero, writer.finish())
    return copied, view.compression_type if merger.keeps_packed else None


def _pieces(view: View, over: View | None) -> Iterator[_MergedRun]:
    size = view.entry.disk_size
    if over is None:
        yield from (_MergedRun(run, False) for run, _ in view.runs(size))
        return
    theirs, shared_end = over.runs(size), _shared_end(view.entry, over.entry)
    their_run, their_place = MappedRun(0, 0, Kind.ZERO), None
    for run, place in view.runs(size):
        rest = _MergedRun(run, False)
        while rest.run.length:
            while their_run.end <= rest.run.offset:
                their_run, their_place = next(theirs)
            offset, end = rest.run.offset, min(rest.run.end, their_run.end)
            if offset < shared_end:
                end = min(end, shared_end)
            first, rest = rest.cut(end - offset)
            yield first._replace(inherited=place == their_place and end <= shared_end)


def _shared_end(entry: BackupEntry, parent: BackupEntry) -> int:
    """Return where the last cluster begins, if it must be stored; else the disk's end.

    It must be stored if the disk shrank to an end within a sector, as in a backup: the image's own size is rounded up,
    and there QEMU would show the parent's bytes.
    """
    cuts_a_sector = entry.disk_size < parent.disk_size and entry.disk_size % SECTOR
    return entry.disk_size // entry.cluster_size * entry.cluster_size if cuts_a_sector else entry.disk_size


class _Merger:
    """Puts pieces into an image, in whole clusters."""

    def __init__(self, view: View, writer: Qcow2Writer, fd: int, place: str, report: Report) -> None:
        self._view = view
        self._writer = writer
        self._copier = FileCopier(fd, place)
        self._report = report
        self._parts: list[_MergedRun] = []
        """Parts of a cluster that is not complete yet."""
        self.keeps_packed = False
        """Whether a compressed cluster was copied as it is."""
        self._packed: MappedRun | None = None
        """The cluster that was copied so last."""
        self.bytes_changed = 0
        self.bytes_zero = 0

    def take(self, piece: _MergedRun) -> None:
        while piece.run.length:
            offset, length = piece.run.offset, piece.run.length
            room = self._room(offset)
            if not self._parts and room == self._writer.cluster_size and length >= room:
                first, piece = piece.cut(self._whole(offset, length))
                self._put(first)
            else:
                first, piece = piece.cut(min(room, length))
                self._parts.append(first)
                if first.run.length == room or first.run.end == self._writer.size:
                    self._put_mixed()

    def _room(self, offset: int) -> int:
        return self._writer.cluster_size - offset % self._writer.cluster_size

    def _whole(self, offset: int, length: int) -> int:
        """Return the length of the range's whole clusters; the disk's last one may be short."""
        return length if offset + length == self._writer.size else length - length % self._writer.cluster_size

    def _put_mixed(self) -> None:
        parts, self._parts = self._parts, []
        offset, length = parts[0].run.offset, parts[-1].run.end - parts[0].run.offset
        if all(part.inherited for part in parts):
            return
        if not any(part.run.is_stored for part in parts):
            self._put_zeroes(offset, length)
        else:
            self._put_read(offset, length)

    def _put_read(self, offset: int, length: int) -> None:
        """Store a cluster by reading it: it is in several places, or further below than the view goes."""
        buffer = bytearray(length)
        self._view.fill(memoryview(buffer), offset)
        self._writer.write(offset, buffer)
        self._count(length)

    def _put(self, piece: _MergedRun) -> None:
        run = piece.run
        if piece.inherited:
            return
        source = self._view.file_of(run)
        if not run.is_stored:
            self._put_zeroes(run.offset, run.length)
        elif source is None:
            self._put_read(run.offset, run.length)
        elif run.kind is Kind.COMPRESSED:
            self._put_packed(run)
        else:
            self._put_data(run, source)

    def _put_packed(self, run: MappedRun) -> None:
        cluster_size = self._writer.cluster_size
        packed = self._view.packed(run, cluster_size, self._view.compression_type)
        if packed is None or len(packed) >= cluster_size or not self._writer.can_point_to_compressed:
            self._put_read(run.offset, run.length)
            return
        shared = 0 if self._packed is None else _shared_bytes(run, self._packed)
        self._writer.write_compressed(run.offset, packed, phase=run.host_offset % SECTOR, shared=shared)
        self._packed, self.keeps_packed = run, True
        self._count(run.length)

    def _put_data(self, run: MappedRun, source: PooledFile) -> None:
        host_offset = self._writer.reserve(run.offset, run.length)
        for done in range(0, run.length, PIECE_BYTES):
            length = min(PIECE_BYTES, run.length - done)
            with source.reading() as device:
                self._copier.copy(device, run.host_offset + done, host_offset + done, length)
            self._count(length)

    def _put_zeroes(self, offset: int, length: int) -> None:
        self._writer.write_zeroes(offset, length)
        self.bytes_zero += length
        self.bytes_changed += length

    def _count(self, length: int) -> None:
        self.bytes_changed += length
        self._report.advance(length)


def _shared_bytes(run: MappedRun, before: MappedRun) -> int:
    """Return how many of the first bytes of a compressed cluster are in the last sector of another one's, too."""
    shared = before.host_offset + before.host_length - run.host_offset
    is_next = run.layer == before.layer and before.host_offset <= run.host_offset and 0 < shared < SECTOR
    return shared if is_next else 0
