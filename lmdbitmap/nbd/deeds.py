"""What a disk is asked to do for a client, with the answer in NBD's words: 0, or an error of the protocol."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.interfaces import Lane
from lmdbitmap.latencies import Latencies
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.conduit import Conduit
from lmdbitmap.nbd.notice import Notice
from lmdbitmap.nbd.requests import error_of

_log = logging.getLogger(__name__)


class Deeds:
    """Done by way of `lane`. `flushes` are how long they took."""

    def __init__(self, lane: Lane, notice: Notice) -> None:
        self.flushes = Latencies()
        self._lane = lane
        self._notice = notice

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        """{index: error} of the writes that failed: all of them when the lane refuses as a whole."""
        try:
            failed = self._lane.write_many(writes)
        except (OSError, LmdbitmapError) as refused:
            _log.warning("%d writes failed: %s", len(writes), refused)
            return dict.fromkeys(range(len(writes)), error_of(refused))
        if not failed:
            return failed
        numbers = sorted(set(failed.values()))
        _log.warning("%d of %d writes failed: errno %s", len(failed), len(writes), numbers)
        return {index: nbd.nbd_error(number) for index, number in failed.items()}

    def write(self, offset: int, data: memoryview) -> int:
        return self.write_many([(offset, data)]).get(0, 0)

    def write_held(self, conduit: Conduit, length: int, offset: int) -> int:
        """Write what the conduit holds; after an error it is closed."""
        try:
            conduit.write(length, offset)
        except (OSError, LmdbitmapError) as failure:
            _log.warning("a write failed: %s", failure)
            conduit.close()
            return error_of(failure)
        return 0

    def flush(self) -> int:
        self._notice.give()
        begun_ns = time.perf_counter_ns()
        try:
            self._lane.flush()
        except (OSError, LmdbitmapError) as failure:
            _log.warning("a flush failed: %s", failure)
            return error_of(failure)
        finally:
            self.flushes.count(time.perf_counter_ns() - begun_ns)
        return 0
