"""Owners and callers of a control socket that are killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap import export
from lmdbitmap.errors import Busy, OwnerGone
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.control.control import ControlServer
from tests.helpers import naive_flat
from tests.helpers.support import spawn
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of

SIZE = 100 * 4096

OWN = """
import sys, threading
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.store import Store

store = Store.open(sys.argv[1])
disk = Filter.attach(store, "sda")
with ControlServer({"sda": disk}):
    print("ready", flush=True)
    threading.Event().wait()
"""

ASK_AND_DIE = """
import os, signal, sys
from lmdbitmap.nbd import control_client

client = control_client.reach(sys.argv[1])
client._sock.sendall(b'{"operation": "mark", "arguments": {"disk": "sda", "offset": 0, "length": 1}}\\n')
print("asked", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked:
        yield tracked


def test_killed_owner_is_reached_by_nobody_and_followed_by_anybody(tracked: TrackedDisk) -> None:
    path = tracked.store.control_path(tracked.disk().uuid)
    with spawn(sys.executable, "-c", OWN, tracked.store.path) as owner:
        owner.wait_for_line("ready")
        with pytest.raises(Busy):
            tracked.attach()
        client = control_client.reach(path)
        assert client is not None
        with client:
            assert client.pid == owner.pid
            client.call("mark", disk=NAME, offset=4096, length=1)
            owner.process.kill()
            owner.wait()
            with pytest.raises(OwnerGone, match="went away"):
                client.call("mark", disk=NAME, offset=0, length=1)
    assert os.path.lexists(path)
    assert control_client.reach(path) is None
    with tracked.attach() as disk, ControlServer({NAME: disk}):
        assert control_client.call(path, "info")["disks"][0]["name"] == NAME
        assert blocks_of(disk.changes()) >= {1}
    assert not os.path.lexists(path)


def test_an_import_into_a_disk_of_another_process_is_made_there(tracked: TrackedDisk, tmp_path: Path) -> None:
    (tmp_path / "x.dbm").write_bytes(naive_flat.write({3, 99}, SIZE, 12))
    with spawn(sys.executable, "-c", OWN, tracked.store.path) as owner:
        owner.wait_for_line("ready")
        export.import_file(tracked.store, tmp_path / "x.dbm", "copy", into=NAME)
        assert tracked.stored_dirt() == {3, 99}


def test_caller_that_is_killed_is_no_loss(tracked: TrackedDisk) -> None:
    path = tracked.store.control_path(tracked.disk().uuid)
    with tracked.attach() as disk, ControlServer({NAME: disk}) as server:
        with spawn(sys.executable, "-c", ASK_AND_DIE, path) as caller:
            caller.wait_for_line("asked")
            caller.wait()
        assert control_client.call(path, "info")["disks"]
        assert server.stop()
    assert tracked.stored_dirt() <= {0}  # the mark was done or it was not
