"""Where some disks of several failed: they are told of one by one, and the exit code is theirs."""

from __future__ import annotations

from lmdbitmap.cli.logs import AlreadyTold, last_words
from lmdbitmap.work.disks_failed import DisksFailed, code_of


def failure_facts(failed: DisksFailed | None) -> list[dict[str, object]]:
    return [
        {"disk": disk, "reason": {"code": code_of(error), "words": str(error)}}
        for disk, error in (failed.failures if failed is not None else {}).items()
    ]


def tell_failures(failed: DisksFailed | None, what: str) -> None:
    for disk, error in (failed.failures if failed is not None else {}).items():
        last_words(f"{disk}: {what}: {error}")


def end_as(failed: DisksFailed | None, what: str) -> None:
    """Tell of each disk that failed, and end with the exit code for that."""
    if failed is not None:
        tell_failures(failed, what)
        raise AlreadyTold(failed)
