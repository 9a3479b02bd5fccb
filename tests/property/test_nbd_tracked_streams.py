"""Any bytes a client may send, to a tracked disk: what they change in the image, the store names, cut off anywhere."""

from __future__ import annotations

import itertools
import random
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdbitmap.errors import FormatError
from lmdbitmap.filter import Filter
from tests.helpers.nbd_raw import WRITE, extended, request
from tests.helpers.tracked import TrackedDisk, changed_blocks, quick_folder
from tests.property.test_nbd_streams import EXTENDED, FORMS, SIZE, requests, serve_disk

BLOCK = 4096

writes = st.builds(
    lambda offset, length, seed: (offset, random.Random(seed).randbytes(length)),
    st.integers(0, SIZE),
    st.sampled_from([1, 4096, 100_000, 200_000, 400_000]) | st.integers(0, 400_000),
    st.integers(),
)
"""Some of them end past the end."""


class Stream:
    """Writes, then requests of all kinds among others, and as much of them as the client sends."""

    def __init__(self, said: list[bytes | tuple[int, bytes]], part: float) -> None:
        self.said = said
        self.part = part

    def of_form(self, form: str) -> bytes:
        write_out = extended if form == EXTENDED else request
        whole = b"".join(
            step if isinstance(step, bytes) else write_out(WRITE, step[0], len(step[1]), data=step[1])
            for step in self.said
        )
        return whole[: round(len(whole) * self.part)]


streams = st.builds(
    lambda honest, any_said, part: Stream([*honest, *any_said], part),
    st.lists(writes, min_size=1, max_size=4),
    st.lists(writes | requests, max_size=4),
    st.just(1.0) | st.floats(0, 1),
)


class Judge:
    """Counts what changed, so that a test that never changed anything is no proof."""

    def __init__(self, tracked: TrackedDisk, disk: Filter) -> None:
        self._tracked = tracked
        self._disk = disk
        self._names = itertools.count()
        self.changed_in_all = 0

    def serve(self, stream: bytes, form: str) -> None:
        """From a checkpoint of its own, so that nothing else is dirty."""
        name = f"c{next(self._names)}"
        self._disk.checkpoint(name)
        before = self._tracked.image.read_bytes()
        served = serve_disk(self._disk, stream, form)
        assert served.outcome is None or isinstance(served.outcome, (FormatError, ConnectionResetError))
        changed = changed_blocks(before, self._tracked.image.read_bytes(), BLOCK)
        assert changed <= self._tracked.stored_dirt()
        self.changed_in_all += len(changed)
        self._disk.forget(name)


@pytest.mark.parametrize("form", FORMS)
def test_whatever_a_client_sends_no_change_of_the_image_is_unnamed(form: str) -> None:
    with quick_folder() as folder, closing(TrackedDisk(folder, SIZE)) as tracked, tracked.attach() as disk:
        judge = Judge(tracked, disk)

        @settings(max_examples=60)
        @given(stream=streams)
        def every_stream(stream: Stream) -> None:
            judge.serve(stream.of_form(form), form)

        every_stream()
        assert judge.changed_in_all > 100
