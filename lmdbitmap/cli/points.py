"""Verbs that act on a disk's chain: checkpoint, snapshot, release, forget, mark, adopt. Durable when they return."""

from __future__ import annotations

import click

from lmdbitmap.access import operations, served_snapshots
from lmdbitmap.backups import consumers
from lmdbitmap.cli.answers import confirm
from lmdbitmap.cli.failing import ending_as, failure_facts
from lmdbitmap.cli.holders import hold_facts
from lmdbitmap.cli.options import Session, names, size, verb
from lmdbitmap.cli.output import say, say_json
from lmdbitmap.cli.quiesce import Hook, Thaw, hooked
from lmdbitmap.cli.sizes import format_size
from lmdbitmap.store import Store
from lmdbitmap.work.disks_failed import DisksFailed
from lmdbitmap.work.failures import Failures


@verb(examples=["lmdbitmap checkpoint sda monday", "lmdbitmap checkpoint sda,sdb monday"])
@click.argument("disks", metavar="NAME[,NAME…]", type=names)
@click.argument("checkpoint_name", metavar="CHECKPOINT")
@hooked("NAME…")
@click.pass_obj
def checkpoint(asked: Session, disks: list[str], checkpoint_name: str, hook: Hook) -> None:
    """Make a checkpoint, to ask later what changed since.

    It is made, durably, on all of the disks or on none. Several disks must all be unserved, or all served by one
    process. The checkpoint is yours, and stays until you forget it. Checkpoints of backups that are not held any more
    are merged away.
    """
    thaw = Thaw()
    with Store.open(asked.store_path) as store:
        operations.require_possible(store, disks, checkpoint_name)
        operations.checkpoint(
            store, disks, checkpoint_name,
            quiesced=lambda: hook.freezing(disks, thaw), freeze_limit_s=hook.answer_limit_s,
        )  # fmt: skip
        consumers.merge_unheld_of(store, disks)
    confirm(asked, f"{', '.join(disks)}: checkpoint {checkpoint_name} made",
             disks=disks, checkpoint=checkpoint_name, thaw_failure=thaw.problem)  # fmt: skip
    thaw.require()


@verb(examples=["lmdbitmap snapshot sda monday", "lmdbitmap snapshot sda,sdb monday --since sunday"])
@click.argument("disks", metavar="NAME[,NAME…]", type=names)
@click.argument("checkpoint_name", metavar="CHECKPOINT")
@click.option(
    "--since", metavar="CHECKPOINT", default="",
    help="Keep old data only of blocks that changed since that checkpoint: it costs less; no other block can be read.",
)  # fmt: skip
@hooked("NAME…")
@click.pass_obj
def snapshot(asked: Session, disks: list[str], checkpoint_name: str, since: str, hook: Hook) -> None:
    """Hold served disks as they are, for other programs to read.

    A checkpoint is made on all of the disks at one moment. Each disk is exported read-only as NAME@CHECKPOINT, with
    the changes since older checkpoints (qemu:dirty-bitmap:…), until it is released.
    """
    thaw = Thaw()
    with Store.open(asked.store_path) as store:
        operations.require_possible(store, disks, checkpoint_name, since)
        held = served_snapshots.take_served_snapshot(
            store, disks, checkpoint_name, since=since,
            quiesced=lambda: hook.freezing(disks, thaw), freeze_limit_s=hook.answer_limit_s,
        )  # fmt: skip
    exports = [snapshot.export for snapshot in held]
    confirm(asked, f"held, and served as {', '.join(exports)}",
            disks=disks, checkpoint=checkpoint_name, exports=exports, thaw_failure=thaw.problem)  # fmt: skip
    thaw.require()


@verb(examples=["lmdbitmap release sda monday", "lmdbitmap release sda,sdb monday"])
@click.argument("disks", metavar="NAME[,NAME…]", type=names)
@click.argument("checkpoint_name", metavar="CHECKPOINT")
@click.pass_obj
def release(asked: Session, disks: list[str], checkpoint_name: str) -> None:
    """Release disks that `snapshot` holds.

    The checkpoint stays. If old data of a disk could not be kept, this fails: then discard what was read of it. Of
    several disks, the others are released all the same.
    """
    apart, kept = Failures(at_once=len(disks) == 1), {}
    with Store.open(asked.store_path) as store:
        for name in disks:
            with apart.of(name):
                kept[name] = served_snapshots.release_served_snapshot(store, name, checkpoint_name)
    failed = DisksFailed("released", len(kept), apart.errors) if apart.errors else None
    with ending_as(failed, "release failed"):
        if asked.as_json:
            released = [{"disk": name, "kept_bytes": kept_bytes} for name, kept_bytes in kept.items()]
            say_json({"checkpoint": checkpoint_name, "disks": released, "failures": failure_facts(failed)})
        else:
            for name, kept_bytes in kept.items():
                say(
                    f"{name}@{checkpoint_name}: released; {format_size(kept_bytes)} of old data had been kept"
                )


@verb(examples=["lmdbitmap forget sda monday", "lmdbitmap forget sda --repository /mnt/old-backups"])
@click.argument("name")
@click.argument("checkpoint_name", metavar="[CHECKPOINT]", required=False)
@click.option(
    "--repository", metavar="REPO|UUID",
    help="Instead of CHECKPOINT: all that this repository holds; `holds` lists their uuids.",
)  # fmt: skip
@click.pass_obj
def forget(asked: Session, name: str, checkpoint_name: str | None, repository: str | None) -> None:
    """Delete a checkpoint, or all that a repository holds.

    The changes that a checkpoint recorded are merged into the one before it. The next backup into a repository that
    holds nothing any more reads the whole disk, and stores what differs.
    """
    if (checkpoint_name is None) == (repository is None):
        raise click.UsageError("Name either CHECKPOINT or --repository.")
    with Store.open(asked.store_path) as store:
        if repository is not None:
            dropped = consumers.drop_hold(store, name, repository)
            confirm(asked, f"{name}: {dropped.repository or 'a stream'} holds nothing any more",
                    disk=name, hold=hold_facts(dropped))  # fmt: skip
        elif checkpoint_name is not None:
            operations.forget(store, name, checkpoint_name)
            confirm(
                asked,
                f"{name}: checkpoint {checkpoint_name} forgotten",
                disk=name,
                checkpoint=checkpoint_name,
            )


@verb(examples=["lmdbitmap mark sda 1M 64K"])
@click.argument("name")
@click.argument("offset", type=size)
@click.argument("length", type=size)
@click.pass_obj
def mark(asked: Session, name: str, offset: int, length: int) -> None:
    """Mark a range of bytes as dirty.

    Every block that the LENGTH bytes from OFFSET on touch counts as changed.
    """
    with Store.open(asked.store_path) as store:
        operations.mark(store, name, offset, length)
    confirm(asked, f"{name}: {format_size(length)} from byte {offset} on are dirty",
             disk=name, offset=offset, length=length)  # fmt: skip


@verb(examples=["lmdbitmap adopt sda"])
@click.argument("name")
@click.pass_obj
def adopt(asked: Session, name: str) -> None:
    """Vouch that an image still holds the data that was tracked.

    Use it for an image that was copied, restored or touched and holds the same data as before, and where the store was
    moved. If the image does not, or the store is an older copy that was put back, the next incremental backup will be
    wrong.

    Run it before anything attaches the disk: an image that is not recognised then begins a new epoch, whose first
    backup reads the whole disk. For a disk that is served already, it is either unnecessary or too late.
    """
    with Store.open(asked.store_path) as store:
        adopted = operations.adopt(store, name)
    words = "is known to the process that serves it" if adopted.is_served else "is accepted as it is"
    if adopted.lost is not None:
        words += f", and the next backup still reads the whole disk: {adopted.lost}"
    confirm(asked, f"{name}: its image {words}", disk=name, served=adopted.is_served, lost=adopted.lost)
