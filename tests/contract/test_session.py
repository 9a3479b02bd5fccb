"""Owning a disk: what is refused, and in whose words."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.errors import Busy, InvalidArgument, NotFound, StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.storage import owner, owner_file
from lmdbitmap.storage.owner import Owner
from lmdbitmap.storage.owner_name import OWNED_TWICE
from lmdbitmap.store import WENT_BACK, Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.chain import disk_called
from lmdbitmap.tracker.changes import MOVED, changes
from tests.helpers.nbd_far import far_server
from tests.helpers.support import make_raw_image, run, spawn

OPEN_SLOWLY = """
import os, sys, time
from lmdbitmap.store import Store

look = Store._distrust_what_it_lacks

def slowly(store):
    print("looking", flush=True)
    time.sleep(2)
    {end}

Store._distrust_what_it_lacks = slowly
Store.open(sys.argv[1]).close()
"""
GO_ON = """
import sys
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store

for number in range(9):
    with Store.open(sys.argv[1]) as opened, Filter.attach(opened, "sdb", background=False) as other:
        other.checkpoint(f"go on {number}")
"""

ATTACH_WITHOUT_DESCRIPTORS = """
import os, resource, sys
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store

with Store.open(sys.argv[1]) as opened:
    used = len(os.listdir("/proc/self/fd")) - 1
    for room in range(9):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, 4096))
        try:
            Filter.attach(opened, "sda", background=False).detach()
            print("attached")
        except OSError as refused:
            print(refused)
"""


def test_a_disk_that_is_attached_is_refused_by_its_name(tmp_path: Path) -> None:
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    with Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", str(image), granularity_bits=16)
        with Filter.attach(store, "sda", background=False):
            for attempt in (Filter.attach, session.remove, session.adopt):
                with pytest.raises(Busy, match="disk 'sda' is attached"):
                    attempt(store, "sda")
            with pytest.raises(Busy, match="disk 'sda' is attached"):
                session.relocate(store, "sda", str(image))
        session.remove(store, "sda")
        with pytest.raises(NotFound):
            session.remove(store, "sda")


def test_a_disk_is_let_go_of_whatever_finds_no_descriptor_while_it_is_attached(tmp_path: Path) -> None:
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    with Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", str(image), granularity_bits=16)
    said = run(sys.executable, "-c", ATTACH_WITHOUT_DESCRIPTORS, str(tmp_path / "store")).stdout.splitlines()
    assert "Too many open files" in said[0]
    assert said[-1] == "attached"


def test_a_path_that_is_no_text_is_refused(tmp_path: Path) -> None:
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    strange = os.fsdecode(bytes(tmp_path) + b"/\xff.raw")
    os.rename(image, strange)
    with Store.create(str(tmp_path / "store")) as store:
        with pytest.raises(InvalidArgument, match="not UTF-8"):
            session.add(store, "sda", strange, granularity_bits=16)
        with store.read() as reader:
            assert reader.disks() == []


@pytest.mark.parametrize("end", ["detached", "died"])
def test_store_put_back_as_a_whole_is_not_believed_about_a_far_image(tmp_path: Path, end: str) -> None:
    """Nothing in such an image shows that it was written since the copy."""
    path, saved = tmp_path / "store", tmp_path / "saved"
    with far_server(tmp_path) as far:
        with Store.create(str(path)) as store:
            session.add(store, "sda", far.uri, granularity_bits=12)
            with Filter.attach(store, "sda", background=False) as attached:
                attached.checkpoint("start")
        run("cp", "-a", path, saved)
        with Store.open(str(path)) as store:
            attached = Filter.attach(store, "sda", background=False)
            attached.pwrite(b"since the copy", 4096)
            attached.detach() if end == "detached" else attached.abandon()
        run("rm", "-r", path)
        run("mv", saved, path)
        with Store.open(str(path)) as store:
            standing = changes(store, "sda", since="start").standing
            assert (standing.trust, "put back from a copy" in str(standing.reason)) == (Trust.UNTRUSTED, True)
            session.adopt(store, "sda")  # a person knows that it was only moved
            assert changes(store, "sda", since="start").standing.trust is Trust.EXACT


def written_since_a_copy(opened: Store, saved: Path) -> Filter:
    """The disk sda, beside which the store has sdb; the copy of the store lacks what was written after `start`."""
    for name in ("sda", "sdb"):
        image = make_raw_image(saved.parent / f"{name}.raw", 1 << 20)
        session.add(opened, name, str(image), granularity_bits=12)
    attached = Filter.attach(opened, "sda", background=False)
    attached.checkpoint("start")
    run("cp", "-a", opened.path, saved)
    attached.pwrite(b"since the copy", 4096)
    attached.persist()
    return attached


@pytest.mark.parametrize("put_back", ["later", "under it"])
def test_store_that_was_put_back_and_went_on_is_not_believed_after_a_death(
    tmp_path: Path, put_back: str
) -> None:
    """Other disks' transactions make up for those that it lacks. Its new file has mostly the inode of the old one."""
    store, saved = tmp_path / "store", tmp_path / "saved"
    with Store.create(str(store)) as opened:
        attached = written_since_a_copy(opened, saved)
        if put_back == "under it":
            replace(store, saved)
        attached.beat()
        attached.abandon()
    if put_back == "later":
        replace(store, saved)
    with Store.open(str(store)) as opened:
        for number in range(9):
            with Filter.attach(opened, "sdb", background=False) as other:
                other.checkpoint(f"go on {number}")
        assert changes(opened, "sda", since="start").standing == (Trust.UNTRUSTED, WENT_BACK)


def test_store_that_was_put_back_without_the_owners_files_is_not_believed_after_a_detach(
    tmp_path: Path,
) -> None:
    """Distrust was withdrawn since, and the image was not written, so that it shows nothing."""
    store, saved = tmp_path / "store", tmp_path / "saved"
    with Store.create(str(store)) as opened:
        image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
        disk = session.add(opened, "sda", str(image), granularity_bits=12)
        with Filter.attach(opened, "sda", background=False) as attached:
            attached.checkpoint("start")
        owner.declare_distrust_at_rest(opened.owner_path(disk.uuid), "bits were lost", 1)
        run("cp", "-a", store, saved)
        Filter.attach(opened, "sda", background=False).detach()
    replace(store, saved)
    with Store.open(str(store)) as opened:
        assert changes(opened, "sda", since="start").standing == (Trust.UNTRUSTED, WENT_BACK)


def test_owner_that_writes_to_another_store_does_not_vouch_for_the_one_in_its_place(tmp_path: Path) -> None:
    """It persists when it is asked to, and what it persists is not there."""
    store, saved = tmp_path / "store", tmp_path / "saved"
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    with Store.create(str(store)) as opened:
        session.add(opened, "sda", str(image), granularity_bits=12)
        with Filter.attach(opened, "sda", background=False) as attached:
            attached.checkpoint("start")
            run("cp", "-a", store, saved)
            attached.pwrite(b"since the copy", 4096)
            replace(store, saved, "lmdb", "newest", "users")
            attached.persist()
            with Store.open(str(store)) as put_back:
                standing = changes(put_back, "sda", since="start", persisted=True).standing
            assert attached.changes(since="start").standing.trust is Trust.EXACT
    assert (standing.trust, "put back from a copy" in str(standing.reason)) == (Trust.UNTRUSTED, True)


@pytest.mark.parametrize("end", ["detach", "death"])
def test_store_that_was_put_back_in_its_own_file_is_not_believed_about_a_disk_that_it_lacks(
    tmp_path: Path, end: str
) -> None:
    """As by `cp`. Whoever opens it first says so, before other disks' transactions make up for what it lacks."""
    store = put_back_in_its_own_file(tmp_path, end)
    for number in range(9):
        with Store.open(str(store)) as opened, Filter.attach(opened, "sdb", background=False) as other:
            assert other.standing().trust is not Trust.UNTRUSTED
            other.checkpoint(f"go on {number}")
    with Store.open(str(store)) as opened:
        standing = changes(opened, "sda", since="start").standing
        assert (standing.trust, standing.reason) == (Trust.UNTRUSTED, WENT_BACK)
        with Filter.attach(opened, "sda", background=False) as attached:
            assert WENT_BACK in attached.disk.epoch_reason
    with Store.open(str(store)) as opened:  # by its sign of life it lacks nothing any more
        assert changes(opened, "sda").standing.trust is not Trust.UNTRUSTED


@pytest.mark.parametrize("end", ["look(store)", "os._exit(9)"])
def test_nobody_goes_on_in_a_store_before_it_is_known_what_it_lacks(tmp_path: Path, end: str) -> None:
    """If who opens it first dies before it knows, the next one looks."""
    store = put_back_in_its_own_file(tmp_path, "death")
    with spawn(sys.executable, "-c", OPEN_SLOWLY.format(end=end), store) as first:
        first.wait_for_line("looking")
        run(sys.executable, "-c", GO_ON, store)
        assert first.wait() == (9 if "exit" in end else 0)
    with Store.open(str(store)) as opened:
        assert changes(opened, "sda", since="start").standing == (Trust.UNTRUSTED, WENT_BACK)


def test_store_lacks_what_it_lacks_also_where_its_owners_files_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = put_back_in_its_own_file(tmp_path, "death")

    def refused(*_: object) -> None:
        raise StorageError("injected", OSError(errno.EMFILE, "injected"), next_step="try again")

    with monkeypatch.context() as patched:
        patched.setattr(owner_file, "last_beat", refused)
        with pytest.raises(StorageError, match="injected"):
            Store.open(str(store))
    with monkeypatch.context() as patched:
        patched.setattr(owner, "declare_distrust_at_rest", refused)
        Store.open(str(store)).close()
    run(sys.executable, "-c", GO_ON, store)
    with Store.open(str(store)) as opened:
        assert sum(extent.length for extent in changes(opened, "sda", since="start").extents()) == 1 << 20


@pytest.mark.parametrize("is_over", [False, True])
def test_two_owners_believe_neither_where_the_owners_file_was_replaced(
    tmp_path: Path, *, is_over: bool
) -> None:
    """The second one came before the first one looked. Neither records what the other one writes."""
    with far_server(tmp_path) as far, Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", far.uri, granularity_bits=12)
        first = Filter.attach(store, "sda", background=False)
        first.checkpoint("start")
        path = store.owner_path(first.disk.uuid)
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
        second = Filter.attach(store, "sda", background=False)
        second.checkpoint("second")
        first.pwrite(b"unknown to the second", 8192)
        if is_over:
            second.detach()
            first.beat()
        else:
            with pytest.raises(Busy):
                first.beat()
            with pytest.raises(Busy, match="owned the disk too"):
                first.background_pass()
            second.detach()
        assert changes(store, "sda", since="second").standing == (Trust.UNTRUSTED, OWNED_TWICE)
        assert first.changes(since="start").standing == (Trust.UNTRUSTED, OWNED_TWICE)
        first.beat()
        first.background_pass()
        assert first.disk.epoch_reason == OWNED_TWICE
        assert disk_called(store, "sda").session is not None
        assert first.standing().trust is not Trust.UNTRUSTED
        first.detach()
        with Filter.attach(store, "sda", background=False) as attached:
            assert attached.disk.epoch_reason == OWNED_TWICE
            with pytest.raises(Untrusted):
                attached.changes(since="second")


@pytest.mark.parametrize("first", [Filter.attach, session.adopt])
def test_two_owners_believe_neither_where_the_first_had_not_beaten_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Callable[..., object]
) -> None:
    """As one that was stopped just then. The second one's whole life is between its commit and its first beat."""
    beat = Owner.beat
    with far_server(tmp_path) as far, Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", far.uri, granularity_bits=12)
        with Filter.attach(store, "sda", background=False) as before:
            before.checkpoint("start")

        def beat_late(self: Owner, *arguments: int, **named: Any) -> None:
            monkeypatch.setattr(Owner, "beat", beat)
            path = store.owner_path(disk_called(store, "sda").uuid)
            shutil.copy(path, tmp_path / "copy")
            os.replace(tmp_path / "copy", path)
            with Filter.attach(store, "sda", background=False) as second:
                second.checkpoint("second")
            beat(self, *arguments, **named)

        monkeypatch.setattr(Owner, "beat", beat_late)
        if first is session.adopt:
            with pytest.raises(Busy, match="owned the disk too"):
                first(store, "sda")
        else:
            attached = Filter.attach(store, "sda", background=False)
            attached.pwrite(b"unknown to the second", 8192)
            attached.detach()
        assert changes(store, "sda", since="second").standing == (Trust.UNTRUSTED, OWNED_TWICE)


@pytest.mark.parametrize("how", ["moved", "moved and removed", "removed", "renamed over", "without its file"])
@pytest.mark.parametrize("end", ["detach", "death"])
def test_copy_of_a_distrusted_store_stays_distrusted_in_the_place_of_one_that_is_used(
    tmp_path: Path, how: str, end: str
) -> None:
    """That one's disk is trusted again, in a new epoch of which the copy knows nothing."""
    path, copy, away = tmp_path / "store", tmp_path / "copy", tmp_path / "away"
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    with Store.create(str(path)) as store:
        disk = session.add(store, "sda", str(image), granularity_bits=12)
        with Filter.attach(store, "sda", background=False) as attached:
            attached.checkpoint("start")
        owner.declare_distrust_at_rest(store.owner_path(disk.uuid), "bits were lost", 1)
        run("cp", "-a", path, copy)
        attached = Filter.attach(store, "sda", background=False)
        file = f"owners/{disk.uuid}"
        if how == "renamed over":
            for part in ("lmdb/data.mdb", "newest", file):
                os.replace(copy / part, path / part)
        else:
            if how == "without its file":
                (copy / file).unlink()
            path.rename(away)
            if how == "removed":
                shutil.rmtree(away)
            copy.rename(path)
        attached.beat()
        if how == "moved and removed":
            shutil.rmtree(away)
            attached.beat()
        attached.detach() if end == "detach" else attached.abandon()
    with Store.open(str(path)) as put_there:
        standing = changes(put_there, "sda", since="start").standing
        expected = (
            "bits were lost" if how != "without its file" else "the owner's file of this disk was missing"
        )
        assert standing == (Trust.UNTRUSTED, expected)


def test_no_disk_is_owned_in_a_store_in_whose_place_a_copy_was_put(tmp_path: Path) -> None:
    """What is trusted again in the one that is open would be so in the copy, whose file is under that name."""
    path, copy, away = tmp_path / "store", tmp_path / "copy", tmp_path / "away"
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    with Store.create(str(path)) as store:
        disk = session.add(store, "sda", str(image), granularity_bits=12)
        with Filter.attach(store, "sda", background=False) as attached:
            attached.checkpoint("start")
        owner.declare_distrust_at_rest(store.owner_path(disk.uuid), "bits were lost", 1)
        run("cp", "-a", path, copy)
        path.rename(away)
        copy.rename(path)
        for attempt in (Filter.attach, session.remove, session.adopt):
            with pytest.raises(StorageError, match="a copy put there"):
                attempt(store, "sda")
        assert not owner.is_owned(store.owner_path(disk.uuid))
    for place in (path, away):
        with Store.open(str(place)) as opened:
            assert changes(opened, "sda", since="start").standing == (Trust.UNTRUSTED, "bits were lost")


def test_no_disk_is_added_where_another_store_took_the_place(tmp_path: Path) -> None:
    """What no disk is known of is swept away there: the files of the disks that were added to the other one alone."""
    path, other = tmp_path / "store", tmp_path / "other"
    image, of_other = (
        make_raw_image(tmp_path / "sda.raw", 1 << 20),
        make_raw_image(tmp_path / "sdb.raw", 1 << 20),
    )
    with Store.create(str(other)) as store:
        session.add(store, "sdb", str(of_other), granularity_bits=12)
    with Store.create(str(path)) as store:
        path.rename(tmp_path / "away")
        other.rename(path)
        files = os.listdir(path / "owners")
        with pytest.raises(StorageError, match="a copy put there"):
            session.add(store, "sda", str(image), granularity_bits=12)
        assert os.listdir(path / "owners") == files


def test_store_in_whose_place_a_copy_was_put_is_not_believed_by_the_owners_file_of_the_copy(
    tmp_path: Path,
) -> None:
    path, copy = tmp_path / "store", tmp_path / "copy"
    with far_server(tmp_path) as far, Store.create(str(path)) as store:
        session.add(store, "sda", far.uri, granularity_bits=12)
        attached = Filter.attach(store, "sda", background=False)
        attached.checkpoint("start")
        run("cp", "-a", path, copy)
        attached.abandon()
        owner.declare_distrust_at_rest(store.owner_path(attached.disk.uuid), "the store was full", 1)
        path.rename(tmp_path / "away")
        copy.rename(path)
        assert changes(store, "sda", since="start").standing == (Trust.UNTRUSTED, MOVED)


@pytest.mark.parametrize("saved", ["detached", "adopted"])
def test_owners_file_put_back_from_before_the_session_vouches_for_no_far_image(
    tmp_path: Path, saved: str
) -> None:
    """The owner lost track, and said so in the file that was there."""
    with far_server(tmp_path) as far, Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", far.uri, granularity_bits=12)
        with Filter.attach(store, "sda", background=False) as attached:
            attached.checkpoint("start")
        if saved == "adopted":
            session.adopt(store, "sda")
        path = store.owner_path(attached.disk.uuid)
        shutil.copy(path, tmp_path / "saved")
        Filter.attach(store, "sda", background=False).abandon()
        assert changes(store, "sda", since="start").standing.trust is Trust.SUPERSET
        owner.declare_distrust_at_rest(path, "the store was full", 1)
        os.replace(tmp_path / "saved", path)
        standing = changes(store, "sda", since="start").standing
        assert (standing.trust, "sign of life" in str(standing.reason)) == (Trust.UNTRUSTED, True)


def test_sign_of_life_of_an_adoption_says_nothing_of_the_next_session(tmp_path: Path) -> None:
    """As in an owner's file that was put back from a copy. All of this is within the two seconds that it allows for."""
    image = make_raw_image(tmp_path / "sda.raw", 1 << 20)
    with Store.create(str(tmp_path / "store")) as store:
        disk = session.add(store, "sda", str(image), granularity_bits=12)
        path = store.owner_path(disk.uuid)
        with Filter.attach(store, "sda", background=False) as attached:
            attached.checkpoint("start")
        session.adopt(store, "sda")
        shutil.copy(path, tmp_path / "saved")
        attached = Filter.attach(store, "sda", background=False)
        image.write_bytes(b"untracked".ljust(1 << 20, b"\0"))
        attached.abandon()
        owner.declare_distrust_at_rest(path, "the store was full", 1)
        os.replace(tmp_path / "saved", path)
        assert changes(store, "sda", since="start").standing.trust is Trust.UNTRUSTED


def put_back_in_its_own_file(tmp_path: Path, end: str) -> Path:
    """A store of two disks that lacks what was written to sda until the `end` of that one's owner."""
    store, saved = tmp_path / "store", tmp_path / "saved"
    with Store.create(str(store)) as opened:
        attached = written_since_a_copy(opened, saved)
        attached.beat()
        attached.detach() if end == "detach" else attached.abandon()
    for part in ("lmdb/data.mdb", "newest"):
        (store / part).write_bytes((saved / part).read_bytes())
    return store


def replace(store: Path, saved: Path, *parts: str) -> None:
    for part in parts or ("lmdb", "newest"):
        run("rm", "-rf", store / part)
        run("cp", "-a", saved / part, store / part)
