"""Hostile bytes at the control socket: every connection ends in an error of ours, and the owner goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.control import orders
from lmdbitmap.nbd.control.control import ControlServer
from tests.helpers.support import PATIENCE_SECONDS
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

SIZE = 100 * 4096


@pytest.fixture(scope="module")
def disk() -> Iterator[Filter]:
    with (
        quick_folder() as folder,
        closing(TrackedDisk(folder, SIZE).clean()) as tracked,
        tracked.attach() as attached,
    ):
        attached.pwrite(b"x", 0)
        yield attached


@pytest.fixture(scope="module")
def path(disk: Filter) -> Iterator[str]:
    with ControlServer({NAME: disk}):
        yield disk.store.control_path(disk.disk.uuid)


json_values: st.SearchStrategy[object] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from([NAME, "start", "mark", -1, 0, 4096, SIZE, 2**63, 2**64 - 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
operations = st.sampled_from(["info", "persist", "mark", "merge", "checkpoint", "forget", "stop", ""])
names = st.sampled_from(["disk", "disks", "offset", "length", "name", "checkpoint", "bitmap", "size"])
requests = st.fixed_dictionaries(
    {"operation": operations | json_values, "arguments": st.dictionaries(names, json_values) | json_values}
)


@given(requests)
def test_a_request_of_any_shape_gets_an_answer_or_an_error_of_ours(
    disk: Filter, request_: dict[str, object]
) -> None:
    try:
        answer = orders.answer(orders.Scene({NAME: disk}), request_)
    except LmdbitmapError:
        return
    assert json.loads(json.dumps(answer)) == answer


@given(
    st.lists(
        st.binary(max_size=200)
        | requests.map(lambda request: json.dumps(request).encode() + b"\n")
        | st.sampled_from([b"\n", b"{", b"}", b"[" * 5000, b'{"operation"', b"\xff" * 70000, b"\0"]),
        max_size=6,
    )
)
@example([b"x" * (1 << 20), b"\n"])
def test_a_stream_of_any_bytes_ends_and_every_line_of_the_answer_is_sound(
    path: str, pieces: list[bytes]
) -> None:
    said = conversation(path, b"".join(pieces))
    lines = [json.loads(line) for line in said.splitlines()]
    assert lines[0]["disks"] == [NAME]
    assert all(set(line) in ({"answer"}, {"error"}) for line in lines[1:])
    failures = [line["error"]["class"] for line in lines[1:] if "error" in line]
    assert "LmdbitmapError" not in failures  # which would be a fault of ours
    assert control_client.call(path, "info")["disks"]


def conversation(path: str, words: bytes) -> bytes:
    """All that the owner says to somebody who says this and then nothing more."""
    with socket.socket(socket.AF_UNIX) as sock, control_client.short_path(path) as address:
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(address)
        with sock.makefile("rb") as file:
            said = file.readline()
            try:
                sock.sendall(words)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it had enough of us
            try:
                return said + file.read()
            except ConnectionError:
                return said
