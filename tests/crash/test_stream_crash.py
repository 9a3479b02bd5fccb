"""A stream killed at either end: what is there of it is whole, or known not to be, and can be had again."""

from __future__ import annotations

import io
from contextlib import closing

from lmdbitmap.backups.backup import backup
from lmdbitmap.backups.consumers import holds_of
from lmdbitmap.store import Store
from lmdbitmap.streams.restore import apply_stream
from lmdbitmap.streams.stream import stream_backup
from lmdbitmap.tracker import chain
from tests.crash.dying import Death, Deaths
from tests.helpers import naive_rbd_diff
from tests.helpers.tracked import NAME


def test_a_killed_stream_is_whole_or_streamed_again(deaths: Deaths) -> None:
    """Law 3: as long as the receiver has no end, what it counts from can say all that changed."""
    fates = {True: 0, False: 0}
    left_over = 0
    for death in deaths("streaming"):
        is_whole = is_stream(death)
        fates[is_whole] += 1
        assert is_whole or not death.told, death
        with closing(Store.open(str(death.folder / "store"))) as store:
            left_over += not is_whole and "streamed" in checkpoints(store)
            goes_on(death, store, is_whole)
    assert min(fates.values()) >= 1
    assert left_over >= 3, "most of its deaths leave the checkpoint"


def goes_on(death: Death, store: Store, is_whole: bool) -> None:
    """The next stream is right, and has merged away the checkpoint of one that has no end; but for a death right
    before its note had the uuid of a checkpoint with a name that could be another's, or right after it was dropped."""
    held, content = ((death.folder / name).read_bytes() for name in ("start.raw", "disk.raw"))
    known = [hold.under_way for hold in holds_of(store, NAME) if hold.under_way and hold.under_way.uuid]
    assert naive_rbd_diff.applied(streamed(store, "start"), held) == content, death
    if is_whole:
        assert naive_rbd_diff.applied(whole(death), held) == content, death
        assert streamed(store, "streamed").ranges == [], death
    assert not known or "streamed" not in checkpoints(store), death
    assert [hold.under_way for hold in holds_of(store, NAME)] == [], death


def test_the_checkpoint_of_a_killed_stream_goes_with_the_next_stream_or_backup(deaths: Deaths) -> None:
    """Law 3: but where the end may have been on its way already, it stays for whoever counts from it."""
    fates = {True: 0, False: 0}
    for death in deaths("streaming_without_a_name"):
        with closing(Store.open(str(death.folder / "store"))) as store:
            before = {name for name in checkpoints(store) if name.startswith("stream-")}
            is_noted = any(hold.under_way for hold in holds_of(store, NAME))
            backup(store, [NAME], death.folder / "backups")
            left = {name for name in checkpoints(store) if name.startswith("stream-")}
            assert left == (set() if is_noted else before), death
            assert left or not death.told, death
            assert {hold.repository for hold in holds_of(store, NAME)} == {str(death.folder / "backups")}, (
                death
            )
            fates[bool(before - left)] += 1
    assert min(fates.values()) >= 3


def is_stream(death: Death) -> bool:
    try:
        whole(death)
    except (ValueError, OSError):
        return False
    return True


def whole(death: Death) -> naive_rbd_diff.Stream:
    return naive_rbd_diff.read((death.folder / "out.diff").read_bytes())


def streamed(store: Store, since: str) -> naive_rbd_diff.Stream:
    out = io.BytesIO()
    stream_backup(store, NAME, out, since=since)
    return naive_rbd_diff.read(out.getvalue())


def checkpoints(store: Store) -> list[str]:
    with store.read() as reader:
        return [point.name for point in reader.checkpoints(chain.find_disk(reader, NAME).uuid)]


def test_a_killed_receiver_leaves_no_name_or_a_whole_disk(deaths: Deaths) -> None:
    fates = {True: 0, False: 0}
    for death in deaths("receiving"):
        out = death.folder / "out.raw"
        fates[out.exists()] += 1
        assert out.exists() or not death.told, death
        if not out.exists():
            receive(death)
        assert out.read_bytes() == (death.folder / "disk.raw").read_bytes(), death
        assert [path.name for path in death.folder.glob("out.raw*")] == ["out.raw"], death
    assert min(fates.values()) >= 1


def test_a_diff_whose_receiver_was_killed_is_done_by_applying_it_again(deaths: Deaths) -> None:
    fates = set()
    for death in deaths("receiving_a_diff"):
        out, before, after = (
            (death.folder / name).read_bytes() for name in ("out.raw", "start.raw", "disk.raw")
        )
        fates.add("old" if out == before else "new" if out == after else "neither")
        assert out == after or not death.told, death
        receive(death)
        assert (death.folder / "out.raw").read_bytes() == after, death
    assert fates == {"old", "new", "neither"}


def receive(death: Death) -> None:
    with (death.folder / "in.diff").open("rb", buffering=0) as stream:
        apply_stream(stream, death.folder / "out.raw")
