"""A stream killed at either end: what is there of it is whole, or known not to be, and can be had again."""

from __future__ import annotations

import io
from contextlib import closing

from lmdbitmap import chain
from lmdbitmap.store import Store
from lmdbitmap.stream import stream_backup
from lmdbitmap.stream_restore import apply_stream
from tests import naive_rbd_diff
from tests.crash.dying import Death, Deaths
from tests.tracked import NAME


def test_a_killed_stream_is_whole_or_streamed_again(deaths: Deaths) -> None:
    """Law 3: as long as the receiver has no end, what it counts from can say all that changed."""
    fates = {True: 0, False: 0}
    left_over = 0
    for death in deaths("streaming"):
        held, content = ((death.folder / name).read_bytes() for name in ("start.raw", "disk.raw"))
        is_whole = is_stream(death)
        fates[is_whole] += 1
        assert is_whole or not death.told, death
        with closing(Store.open(str(death.folder / "store"))) as store:
            assert naive_rbd_diff.applied(streamed(store, "start"), held) == content, death
            if is_whole:
                assert naive_rbd_diff.applied(whole(death), held) == content, death
                assert streamed(store, "streamed").ranges == [], death
            else:
                left_over += "streamed" in checkpoints(store)
    assert min(fates.values()) >= 1
    assert left_over >= 3, "most of its deaths leave the checkpoint"


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
