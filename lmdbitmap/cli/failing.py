"""The end of a verb in which some of several disks failed: a message for each, and the exit code for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lmdbitmap.cli.logs import AlreadyTold, last_words
from lmdbitmap.work.disks_failed import DisksFailed, code_of


def failure_facts(failed: DisksFailed | None) -> list[dict[str, object]]:
    return [
        {"disk": disk, "reason": {"code": code_of(error), "words": str(error)}}
        for disk, error in (failed.failures if failed is not None else {}).items()
    ]


@contextlib.contextmanager
def ending_as(
    failed: DisksFailed | None, what: str, also: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Report each disk that failed after the answer, which the block prints, and end the verb with the code for them.

    They are reported even if nobody takes the answer, as on a full disk. `also` may raise something graver at the end.
    """
    try:
        yield
    finally:
        for disk, error in (failed.failures if failed is not None else {}).items():
            last_words(f"{disk}: {what}: {error}")
    also()
    if failed is not None:
        raise AlreadyTold(failed)
