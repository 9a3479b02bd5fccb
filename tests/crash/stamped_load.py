"""A load over NBD that knows what the disk may hold at whatever moment its server dies.

Every write fills its sectors with a number of its own, its stamp; stamps count up over all connections. A
request remembers the oldest stamp that was unanswered when it was sent. All older ones had been answered by
then, so once the request itself is answered, its sectors hold none of those:

    sent       1   2   3       4
    answered         1   2         4        3 was under way all the time
    when the server dies, the sectors of 4 hold 4, or 3 where that covers them too, and not 1 or 2

After the death `check_content` holds the image to that, and `blocks_of` says which blocks were touched.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tests.helpers import nbd_raw
from tests.helpers.nbd_raw import RawClient
from tests.helpers.support import PATIENCE_SECONDS

SECTOR = 512
_DEPTH = 12
_WORDS = SECTOR // 8
_LENGTHS = (1, 1, 3, 8, 8, 8, 16, 64, 128, 400)
"""In sectors; the longest is streamed by the server, in pieces."""
_CLEARED_LENGTHS = (1, 8, 64, 1000)
_HOT_SECTORS = 1500


class Request(NamedTuple):
    stamp: int
    command: int
    sector: int
    sector_count: int
    oldest_rival: int
    """The oldest stamp that was unanswered when this one was sent, itself at the latest."""

    @property
    def sectors(self) -> range:
        return range(self.sector, self.sector + self.sector_count)

    def message(self, flags: int) -> bytes:
        data = (
            self.stamp.to_bytes(8, "little") * (_WORDS * self.sector_count)
            if self.command == nbd_raw.WRITE
            else b""
        )
        offset, length = self.sector * SECTOR, self.sector_count * SECTOR
        return nbd_raw.request(self.command, offset, length, cookie=self.stamp, flags=flags, data=data)


class Load:
    """Connections that write as fast as they are answered, from `start` until `finish` or the server's death."""

    def __init__(self, socket_path: str, disk: str, sectors: int, seed: int, first_stamp: int) -> None:
        self.sent: dict[int, Request] = {}
        self.answered: set[int] = set()
        self._socket_path, self._disk, self._sectors = socket_path, disk, sectors
        self._stamps = itertools.count(first_stamp)
        self._unanswered: set[int] = set()
        self._news = threading.Condition()
        self._finishing = False
        self._failure: BaseException | None = None
        hot = [random.Random(seed).randrange(sectors - 2 * _HOT_SECTORS) for _ in range(3)]
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed + number), hot), daemon=True)
            for number in range(2)
        ]

    def start(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    # -- for who kills -------------------------------------------------------------------------------------

    def await_answers(self, count: int) -> None:
        """Return when so many requests were answered in all; at once if the server is gone."""
        with self._news:
            reached = self._news.wait_for(
                lambda: len(self.answered) >= count or not self._somebody_writes(), PATIENCE_SECONDS
            )
        assert reached, f"no more than {len(self.answered)} requests were answered"

    def finish(self) -> None:
        """Send nothing more; wait for what is under way, or for the server's death."""
        self._finishing = True
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), "the server neither answers nor hangs up"
        if self._failure is not None:
            raise AssertionError("the load failed") from self._failure

    def answered_by_now(self) -> frozenset[int]:
        with self._news:
            return frozenset(self.answered)

    @property
    def last_stamp(self) -> int:
        with self._news:
            return next(reversed(self.sent), 0)

    def _somebody_writes(self) -> bool:
        return any(thread.is_alive() for thread in self._threads) and self._failure is None

    # -- writing -------------------------------------------------------------------------------------------

    def _run(self, chosen: random.Random, hot: list[int]) -> None:
        try:
            # without a server there is nobody to connect to, or to hear from
            with contextlib.suppress(ConnectionError, FileNotFoundError, EOFError):
                self._converse(chosen, hot)
        except BaseException as failure:
            self._failure = failure
        with self._news:
            self._news.notify_all()

    def _converse(self, chosen: random.Random, hot: list[int]) -> None:
        with RawClient.connect(self._socket_path) as client:
            client.go(self._disk, structured=False)
            while not self._finishing:
                requests = [self._next(chosen, hot) for _ in range(chosen.randint(1, _DEPTH))]
                flags = nbd_raw.FUA if chosen.random() < 0.05 else 0
                client.send(b"".join(request.message(flags) for request in requests))
                for _ in requests:
                    self._note_answer(client)
                if chosen.random() < 0.05:
                    assert client.do(nbd_raw.FLUSH).error == 0

    def _next(self, chosen: random.Random, hot: list[int]) -> Request:
        command = chosen.choices((nbd_raw.WRITE, nbd_raw.WRITE_ZEROES, nbd_raw.TRIM), (20, 1, 1))[0]
        count = chosen.choice(_LENGTHS if command == nbd_raw.WRITE else _CLEARED_LENGTHS)
        sector = chosen.randrange(self._sectors - count)
        if chosen.random() < 0.7:
            sector = chosen.choice(hot) + chosen.randrange(_HOT_SECTORS)
            sector = min(sector, self._sectors - count)
        with self._news:
            stamp = next(self._stamps)
            self._unanswered.add(stamp)
            request = Request(stamp, command, sector, count, min(self._unanswered))
            self.sent[stamp] = request
        return request

    def _note_answer(self, client: RawClient) -> None:
        reply = client.reply()
        assert reply.error == 0, f"{self.sent[reply.cookie]} failed with {reply.error}"
        with self._news:
            self._unanswered.remove(reply.cookie)
            self.answered.add(reply.cookie)
            self._news.notify_all()

    # -- what must be so now -------------------------------------------------------------------------------

    def check_content(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Hold the image's stamps, as `stamps_of` reads them, to what they were and to what was sent."""
        oldest, cleared = [0] * len(after), [0] * len(after)
        touched: set[int] = set()
        for request in self.sent.values():
            touched.update(request.sectors)
            for sector in request.sectors:
                if request.command != nbd_raw.WRITE:
                    cleared[sector] = max(cleared[sector], request.stamp)
                if request.stamp in self.answered and request.command != nbd_raw.TRIM:  # a trim is advice
                    oldest[sector] = max(oldest[sector], request.oldest_rival)
        for sector in touched:
            found = after[sector]
            if found == 0 and cleared[sector] > 0:
                assert cleared[sector] >= oldest[sector], f"sector {sector}: an answered write is gone"
            elif found in self.sent:
                request = self.sent[found]
                assert sector in request.sectors, f"sector {sector} holds what was written to {request}"
                assert found >= oldest[sector], f"sector {sector}: an answered write is gone"
            else:
                assert found == before[sector], f"sector {sector} holds {found:x}, which nobody wrote"
                assert oldest[sector] == 0, f"sector {sector}: an answered write is gone"
        stray = [n for n, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
        assert touched.issuperset(stray), "a sector changed that nobody wrote to"

    def changed_blocks(self, stamps: Sequence[int], block_bytes: int, since: int = 0) -> set[int]:
        """Where a request newer than `since` was answered, or its data is seen: a long one lands in pieces."""
        answered = self.blocks_of((stamp for stamp in self.answered if stamp > since), block_bytes)
        seen = (sector for sector, stamp in enumerate(stamps) if stamp > since and stamp in self.sent)
        return answered | {sector * SECTOR // block_bytes for sector in seen}

    def blocks_of(self, requests: Iterable[int], block_bytes: int) -> set[int]:
        per_block = block_bytes // SECTOR
        return {block for stamp in requests for block in _blocks(self.sent[stamp].sectors, per_block)}


def _blocks(sectors: range, per_block: int) -> Iterator[int]:
    return iter(range(sectors.start // per_block, (sectors.stop - 1) // per_block + 1))


def stamps_of(image: bytes) -> list[int]:
    """What is in every sector: its stamp, or a negative number where it is torn or somebody else's."""
    firsts = struct.iter_unpack(f"<Q{SECTOR - 8}x", image)
    lasts = struct.iter_unpack(f"<{SECTOR - 8}xQ", image)
    return [first if first == last else -1 - first for (first,), (last,) in zip(firsts, lasts, strict=True)]
