"""The verb that keeps a second copy of a disk up to date: sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lmdbitmap.cli.facts import reason_facts
from lmdbitmap.cli.options import FILE_OR_DEVICE, Session, verb
from lmdbitmap.cli.output import progress, say, say_json
from lmdbitmap.cli.politeness import nice_after, owner_limited, polite, waiting
from lmdbitmap.cli.quiesce import Hook, Thaw, hooked
from lmdbitmap.cli.sizes import format_duration, format_size
from lmdbitmap.cli.streams import words_of_what_is_behind
from lmdbitmap.store import Store

if TYPE_CHECKING:
    from lmdbitmap.syncs.sync import SyncResult


@verb(
    undoes=True,
    examples=[
        "lmdbitmap sync sda /mnt/other/sda.raw",
        "lmdbitmap sync sda nbd://other-host/sda --require-incremental",
        "lmdbitmap sync sda /dev/vg/sda-copy --compare",
    ],
)
@click.argument("name", metavar="NAME")
@click.argument("target", metavar="TARGET", type=FILE_OR_DEVICE)
@click.option(
    "--compare", is_flag=True,
    help="Read all of the disk and of the copy, and write what differs.",
)  # fmt: skip
@click.option(
    "--require-incremental", "only_incremental", is_flag=True,
    help="Fail with exit code 3, and do nothing, if it is not known what changed.",
)  # fmt: skip
@click.option(
    "--larger", is_flag=True,
    help="TARGET may be larger than the disk, and keeps its size; what is behind the disk is zeroed.",
)  # fmt: skip
@hooked("NAME")
@polite
@owner_limited
@waiting("another sync to TARGET, or a program that has the disk for itself,")
@click.pass_obj
def sync(
    asked: Session,
    name: str,
    target: str,
    compare: bool,
    only_incremental: bool,
    larger: bool,
    hook: Hook,
    nice: int,
    speed_limit: int | None,
    owner_limit: float,
    lock_wait: float,
) -> None:
    """Bring a second copy of a disk up to date.

    TARGET is a raw file, which is made if it is missing, a block device, or the URI of an NBD export. It becomes a copy
    of the disk at one point in time, while the guest keeps writing. Only what changed since the last sync to TARGET is
    copied. The first time, or if the changes are not known, both are read and what differs is written; the answer says
    why.

    Nobody else may write TARGET. After a sync that failed or was killed, TARGET is unusable until a sync succeeds.
    """
    from lmdbitmap.access.owners import is_served
    from lmdbitmap.syncs.sync import sync as bring_up_to_date

    if compare and only_incremental:
        raise click.UsageError("--compare and --require-incremental exclude each other.")

    thaw = Thaw()
    with (
        Store.open(asked.store_path) as store,
        progress(f"syncing {name}", shown=asked.shows_progress) as report,
    ):
        done = bring_up_to_date(
            store, name, target,
            compare=compare, only_incremental=only_incremental, larger=larger, freeze_limit_s=hook.freeze_limit_s,
            quiesced=lambda: nice_after(
                hook.freezing([name], thaw), nice, asked, served=lambda: is_served(store, name)
            ),
            progress=report, bytes_per_s=speed_limit, owner_limit_s=owner_limit,
            lock_wait_s=lock_wait,
        )  # fmt: skip
    if asked.as_json:
        say_json({**_facts(done), "thaw_failure": thaw.problem})
    else:
        say(f"{done.target}: {name} as of now · {_words(done)}")
    thaw.require()


def _words(done: SyncResult) -> str:
    words = [
        done.kind.value + ("" if done.reason is None else f": {done.reason.words}"),
        f"{format_size(done.bytes_changed)} of {format_size(done.size)} changed",
        f"{format_size(done.bytes_written)} written and {format_size(done.bytes_zeroed)} zeroed",
        *words_of_what_is_behind(done.bytes_behind),
        format_duration(done.seconds),
    ]
    return " · ".join(words)


def _facts(done: SyncResult) -> dict[str, object]:
    return {
        "disk": done.disk,
        "target": done.target,
        "kind": done.kind.value,
        "reason": reason_facts(done.reason),
        "checkpoint": done.checkpoint,
        "size": done.size,
        "trust": done.trust.value,
        "bytes_changed": done.bytes_changed,
        "bytes_read": done.bytes_read,
        "bytes_compared": done.bytes_compared,
        "bytes_written": done.bytes_written,
        "bytes_zeroed": done.bytes_zeroed,
        "bytes_behind": done.bytes_behind,
        "seconds": round(done.seconds, 3),
    }
