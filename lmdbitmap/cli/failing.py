"""The end of a verb in which some of several disks failed: a message for each, and the exit code for them."""

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
    """Report each disk that failed, and end the verb with the exit code for them."""
    if failed is not None:
        tell_failures(failed, what)
        raise AlreadyTold(failed)
