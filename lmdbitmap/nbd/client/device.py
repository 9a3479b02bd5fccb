"""An image behind another NBD server, as a device: qcow2 or VMDK behind qemu-nbd, anything behind nbdkit.

- What the server does not offer is done another way: zeroes are written out, a discard is dropped, without block status
  everything is data. A server that can neither flush nor write through is refused for writing: no checkpoint on it
  would survive a power cut.
- With extended headers the allocation of the whole image is one question. Zeroes and discards stay short all the same.
- Requests keep to the server's block sizes. Where its smallest block is larger than a byte, the rest of a block at
  either edge of a write is read and written back, while no other write is under way.
- A broken connection is mended within `reconnect_s`, unseen by callers (conversation.py says how, and what is kept for
  it). After that requests fail with ETIMEDOUT, a guest's with EIO, until the server is back.
- Only the place and the size of a far image are known. As with a block device, **a write around us while nobody is
  attached is not noticed**. A place is an address and an export's name; another place is another image. Other
  credentials do not make another image.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Final

from lmdbitmap.errors import Busy, InvalidArgument, LmdbitmapError, NotFound, error_from_os
from lmdbitmap.geometry import ceil_div, check_range
from lmdbitmap.interfaces import Allocation, Buffer, ImageIdentity, joined
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.conversation import Conversation
from lmdbitmap.nbd.client.dial import DIAL_S, dial, warn_about
from lmdbitmap.nbd.client.edges import Edges
from lmdbitmap.nbd.client.handshake import FarExport
from lmdbitmap.nbd.client.link import WINDOW, Link, Request
from lmdbitmap.nbd.client.statuses import statuses
from lmdbitmap.nbd.uri import NbdAddress, parse
from lmdbitmap.work.buffers import in_bytes, read_whole

RECONNECT_S: Final = 30.0
"""Seconds that a request waits for a server that went away."""
KEEP_BYTES: Final = 64 << 20
"""Bytes written and not flushed that are kept, to be written again on a new connection."""
_ZERO_CHUNK: Final = 1 << 20
_EFFECT_CHUNK: Final = 1 << 30
"""Bytes zeroed or discarded in one request, however long a request may be: servers are slow at it, and an unanswered
request delays all that follow. Also the limit of a status question, unless headers are extended.
"""
_TOO_LONG: Final = (nbd.NBD_EINVAL, nbd.NBD_EOVERFLOW)
_NOT_OF_THE_SERVER: Final = (errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Refusals of our own system: nobody was asked whether a server is there."""
_DATA: Final = Allocation(0, hole=False, zero=False)


class NbdDevice:
    """An export of another server. Make one with `NbdDevice.open`. Safe for many threads."""

    fd = None

    def __init__(
        self,
        place: NbdAddress,
        *,
        read_only: bool,
        reconnect_s: float = RECONNECT_S,
        keep_bytes: int = KEEP_BYTES,
        connect: Callable[[], Link] | None = None,
        name: str | None = None,
        silence_s: float | None = None,
    ) -> None:
        """`connect` makes each connection; by default it dials the place.

        Errors say `name`, by default the place. A request is `Busy` after `silence_s` without a byte of any answer; the
        links that `connect` makes must have the same limit.
        """
        self.place = place
        self._read_only = read_only
        self._conversation = Conversation(
            connect or (lambda: dial(place, DIAL_S)),
            name or place.uri,
            reconnect_s=reconnect_s,
            keep_bytes=keep_bytes,
            silence_s=silence_s,
        )
        self.export = self._conversation.export
        self._minimum = self.export.minimum
        self._effect_chunk = _EFFECT_CHUNK
        self._edges = Edges() if self._minimum > 1 else None
        self._change_flags = nbd.NBD_CMD_FLAG_FUA if _writes_through(self.export) else 0

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        read_only: bool = False,
        reconnect_s: float = RECONNECT_S,
        keep_bytes: int = KEEP_BYTES,
    ) -> NbdDevice:
        """Connect once to the export that an NBD URI names.

        Raises `NotFound` if nobody serves it, `Busy` if the server does not answer, `FormatError` if it is no NBD
        server, `InvalidArgument` if TLS is not offered, or if an export to be written is read-only or cannot flush, and
        `StorageError` if TLS fails, as one side does not trust the other, or if the system does not let us connect.
        """
        place = parse(uri)
        warn_about(place)
        try:
            device = cls(place, read_only=read_only, reconnect_s=reconnect_s, keep_bytes=keep_bytes)
        except TimeoutError as late:
            raise Busy(
                f"{place.uri}: the server did not answer within {DIAL_S:.0f} s",
                next_step="see whether it serves another client and takes only one (qemu-nbd --shared=2)",
            ) from late
        except LmdbitmapError:
            raise
        except OSError as refusal:
            if refusal.errno in _NOT_OF_THE_SERVER:
                raise error_from_os(place.uri, refusal) from refusal
            raise NotFound(
                f"no server answers at {place.uri} ({refusal.strerror or refusal})",
                next_step="start its server, or check the address",
            ) from refusal
        try:
            _require_usable(device.export, place, read_only)
        except BaseException:
            device.close()
            raise
        return device

    @property
    def size(self) -> int:
        return self.export.size

    @property
    def read_only(self) -> bool:
        return self._read_only

    def identity(self) -> ImageIdentity:
        """Identify the image by a digest of its place and by the server's size for it; a far image has no mtime."""
        digest = hashlib.blake2b(self.place.bare.uri.encode(), digest_size=16).digest()
        place, more = int.from_bytes(digest[:8], "big") >> 1, int.from_bytes(digest[8:], "big") >> 1
        return ImageIdentity(place, more, self.size, 0)

    # -- reading -------------------------------------------------------------------------------------------

    def pread(self, length: int, offset: int) -> bytes:
        check_range(offset, length, self.size)
        return read_whole(self.pread_into, length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        buffer = in_bytes(buffer)
        check_range(offset, len(buffer), self.size)
        start, stop = self._outward(offset, offset + len(buffer))
        if (start, stop) == (offset, offset + len(buffer)):
            self._read(buffer, offset)
        else:
            whole = memoryview(bytearray(stop - start))
            self._read(whole, start)
            buffer[:] = whole[offset - start : offset - start + len(buffer)]

    def _read(self, buffer: memoryview, offset: int) -> None:
        longest = self.export.maximum
        for start in range(0, len(buffer), longest):
            part = buffer[start : start + longest]
            self._do(Request(nbd.NBD_CMD_READ, offset + start, len(part), into=part))

    def pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None:
        """Fill every (buffer, offset), many at a time."""
        for start in range(0, len(parts), WINDOW):
            together = parts[start : start + WINDOW]
            if all(self._is_one_request(offset, len(buffer)) for buffer, offset in together):
                requests = [Request(nbd.NBD_CMD_READ, at, len(into), into=into) for into, at in together]
                self._conversation.do(requests)
                for request in requests:
                    if request.error:
                        raise self._conversation.failure(request)
            else:
                for buffer, offset in together:
                    self.pread_into(buffer, offset)

    def _is_one_request(self, offset: int, length: int) -> bool:
        check_range(offset, length, self.size)
        stop = offset + length
        return 0 < length <= self.export.maximum and self._outward(offset, stop) == (offset, stop)

    # -- writing -------------------------------------------------------------------------------------------

    def pwrite(self, data: Buffer, offset: int) -> None:
        data = in_bytes(data)
        self._check_write(offset, len(data))
        if self._edges is None:
            self._write(data, offset)
            return
        start, stop = self._outward(offset, offset + len(data))
        if (start, stop) == (offset, offset + len(data)):
            with self._edges.left_alone():
                self._write(data, offset)
        else:
            with self._edges.mended():
                self._write(self._filled_up(data, offset, start, stop), start)

    def pwrite_many(self, writes: Sequence[tuple[int, Buffer]]) -> Mapping[int, Exception]:
        """Do all (offset, data) pairs, in any order, many at a time. Return what failed, by position."""
        failed: dict[int, Exception] = {}
        for start in range(0, len(writes), WINDOW):
            together: dict[int, Request] = {}
            for position, (offset, data) in enumerate(writes[start : start + WINDOW], start):
                try:
                    data = in_bytes(data)
                    if self._edges is None and 0 < len(data) <= self.export.maximum:
                        self._check_write(offset, len(data))
                        together[position] = self._write_request(data, offset)
                    else:
                        self.pwrite(data, offset)
                except (OSError, InvalidArgument) as refusal:
                    failed[position] = refusal
            if together:
                failed |= self._do_together(together)
        return failed

    def _do_together(self, requests: dict[int, Request]) -> dict[int, Exception]:
        try:
            self._conversation.do(list(requests.values()))
        except OSError as refusal:
            return dict.fromkeys(requests, refusal)
        return {
            position: self._conversation.failure(request)
            for position, request in requests.items()
            if request.error
        }

    def _write(self, data: Buffer, offset: int) -> None:
        view, longest = memoryview(data), self.export.maximum
        for start in range(0, len(view), longest):
            self._do(self._write_request(view[start : start + longest], offset + start))

    def _write_request(self, data: Buffer, offset: int) -> Request:
        """Make a request with a copy of the data: it may be sent again when the caller has long reused its buffer."""
        return Request(nbd.NBD_CMD_WRITE, offset, len(data), flags=self._change_flags, data=bytes(data))

    def _filled_up(self, data: Buffer, offset: int, start: int, stop: int) -> bytearray:
        """Surround `data` with the image's bytes, to fill the blocks of [start, stop)."""
        whole = bytearray(stop - start)
        view = memoryview(whole)
        self._read(view[: self._minimum], start)
        if stop - start > self._minimum:
            self._read(view[-self._minimum :], stop - self._minimum)
        view[offset - start : offset - start + len(data)] = data
        return whole

    # -- zeroing and discarding ----------------------------------------------------------------------------

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._check_write(offset, length)
        start, stop = self._inward(offset, offset + length)
        if start < stop and self._zero(start, stop, may_unmap, fast_only):
            self._write_zeroes_out(offset, start)
            self._write_zeroes_out(stop, offset + length)
        elif start < stop and fast_only:
            raise _os_error(errno.ENOTSUP, self.place.uri)
        else:
            self._write_zeroes_out(offset, offset + length)

    def _zero(self, start: int, stop: int, may_unmap: bool, fast_only: bool) -> bool:
        """Have whole blocks zeroed; return whether the server does that. All or nothing is fast: once a first piece was
        fast, the others are done at any speed.
        """
        needed = nbd.NBD_FLAG_SEND_WRITE_ZEROES | (nbd.NBD_FLAG_SEND_FAST_ZERO if fast_only else 0)
        if needed & ~self.export.flags:
            return False
        command, flags = nbd.NBD_CMD_WRITE_ZEROES, self._change_flags
        flags |= 0 if may_unmap else nbd.NBD_CMD_FLAG_NO_HOLE
        try:
            if fast_only:
                start += self._chunk(command, start, stop, flags | nbd.NBD_CMD_FLAG_FAST_ZERO)
            self._in_chunks(command, start, stop, flags)
        except OSError as refusal:
            if refusal.errno != errno.ENOTSUP:
                raise
            return False
        return True

    def _write_zeroes_out(self, start: int, stop: int) -> None:
        zeroes = memoryview(bytes(min(stop - start, _ZERO_CHUNK)))
        for offset in range(start, stop, _ZERO_CHUNK):
            self.pwrite(zeroes[: stop - offset], offset)

    def discard(self, offset: int, length: int) -> None:
        """Discard: advice, which is dropped if the server does not support it."""
        self._check_write(offset, length)
        if self.export.has(nbd.NBD_FLAG_SEND_TRIM):
            try:
                self._in_chunks(
                    nbd.NBD_CMD_TRIM, *self._inward(offset, offset + length), flags=self._change_flags
                )
            except OSError as refusal:
                if refusal.errno != errno.ENOTSUP:
                    raise

    def _in_chunks(self, command: int, start: int, stop: int, flags: int) -> None:
        while start < stop:
            start += self._chunk(command, start, stop, flags)

    def _chunk(self, command: int, start: int, stop: int, flags: int) -> int:
        """Change the beginning of a range by a request without data; return how many bytes.

        Such a request may have any length, but not every server takes any.
        """
        while True:
            request = Request(command, start, min(stop - start, self._effect_chunk), flags=flags)
            try:
                self._change(request)
                return request.length
            except OSError as refusal:
                if refusal.errno not in _TOO_LONG or request.length <= self.export.maximum:
                    raise
                self._effect_chunk = self.export.maximum

    def _change(self, request: Request) -> None:
        with nullcontext() if self._edges is None else self._edges.left_alone():
            self._do(request)

    def in_doubt(self) -> Sequence[tuple[int, int]]:
        """See `LeavesDoubt`. Nothing is taken off the list while the device is open."""
        return self._conversation.doubts.runs

    # -- the rest ------------------------------------------------------------------------------------------

    def tell_of_loss(self, tell: Callable[[OSError], None]) -> None:
        """See `FlushesByItself`: our own flushes bound how much is kept."""
        self._conversation.flushes.tell_of_loss = tell

    def flush(self) -> None:
        """Flush; a server that writes through has nothing to flush, nor has an export that is read-only for all.

        A flush that failed fails for good, unless the server was only away.
        """
        if self.export.has(nbd.NBD_FLAG_SEND_FLUSH):
            self._conversation.flush()
        else:
            self._conversation.flushes.require_sound()

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        """What the server says; where it says nothing, or refuses to, everything is data."""
        check_range(offset, length, self.size)
        return joined(self._statuses(offset, offset + length))

    def _statuses(self, start: int, stop: int) -> Iterator[Allocation]:
        position, end = self._outward(start, stop)
        most = max(end - position, 1) if self.export.extended else _EFFECT_CHUNK
        for length, flags in statuses(self._ask_statuses, position, end, most):
            extent = min(position + length, stop) - max(position, start)
            yield Allocation(
                max(extent, 0), bool(flags & nbd.NBD_STATE_HOLE), bool(flags & nbd.NBD_STATE_ZERO)
            )
            position += length
        if position < end:
            yield _DATA._replace(length=max(stop - max(position, start), 0))

    def _ask_statuses(self, requests: Sequence[Request]) -> None:
        if self.export.context_id is not None:
            self._conversation.do(requests)

    def resize(self, size: int) -> None:
        raise InvalidArgument(
            f"{self.place.uri} cannot be resized through NBD",
            next_step="stop serving the disk, resize the image on its server, restart that, and run `lmdbitmap adopt`",
        )

    def interrupt(self) -> None:
        """Fail the requests of other threads, and all that follow. Close the device then. Callable from any thread."""
        self._conversation.interrupt()

    def close(self) -> None:
        self._conversation.close()

    def __enter__(self) -> NbdDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _do(self, request: Request) -> None:
        self._conversation.do([request])
        if request.error:
            raise self._conversation.failure(request)

    def _check_write(self, offset: int, length: int) -> None:
        check_range(offset, length, self.size)
        if self._read_only:
            raise OSError(errno.EPERM, "the image is open read-only", self.place.uri)

    def _outward(self, start: int, stop: int) -> tuple[int, int]:
        if start == stop:  # within a block too
            return start, stop
        return start // self._minimum * self._minimum, ceil_div(stop, self._minimum) * self._minimum

    def _inward(self, start: int, stop: int) -> tuple[int, int]:
        return ceil_div(start, self._minimum) * self._minimum, stop // self._minimum * self._minimum


def _writes_through(export: FarExport) -> bool:
    return export.has(nbd.NBD_FLAG_SEND_FUA) and not export.has(nbd.NBD_FLAG_SEND_FLUSH)


def _require_usable(export: FarExport, place: NbdAddress, read_only: bool) -> None:
    if export.has(nbd.NBD_FLAG_READ_ONLY):
        if not read_only:
            raise InvalidArgument(
                f"{place.uri} is served read-only",
                next_step="let its server serve it for writing (qemu-nbd without --read-only)",
            )
    elif not export.flags & (nbd.NBD_FLAG_SEND_FLUSH | nbd.NBD_FLAG_SEND_FUA):
        raise InvalidArgument(
            f"{place.uri} can be written but not flushed: nothing on it would be sure to survive a power cut",
            next_step="serve it with a server that flushes (nbd-server: flush = true)",
        )


def _os_error(number: int, place: str) -> OSError:
    return OSError(number, os.strerror(number), place)
