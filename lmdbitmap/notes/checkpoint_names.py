"""The unique names of checkpoints of our making, such as `backup-20261130T022349Z-1f2e3d`.

Only a checkpoint with such a name is ever forgotten unasked, whatever a manifest or a note says.
"""

from __future__ import annotations

import enum
import os
import re
import time

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.storage.schema import check_name


class Maker(enum.Enum):
    """The kind of run that made a checkpoint."""

    BACKUP = "backup"
    SYNC = "sync"
    STREAM = "stream"

    def new_name(self, time_ns: int) -> str:
        """Return a new name for a checkpoint at that Unix time in nanoseconds."""
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time_ns // 1_000_000_000))
        return f"{self.value}-{moment}-{os.urandom(3).hex()}"

    @property
    def form(self) -> str:
        """The regular expression of its names."""
        return rf"{self.value}-[0-9]{{8}}T[0-9]{{6}}Z-[0-9a-f]{{6}}"

    def named(self, name: str) -> bool:
        """Whether a checkpoint of that name may be of this maker."""
        return re.fullmatch(self.form, name) is not None


def refuse_ours(name: str) -> None:
    """Raise `InvalidArgument` for a name such as we make, chosen by a person: it would be taken for a leftover.

    And for one that no checkpoint can have.
    """
    check_name(name, what="checkpoint")
    maker = next((maker for maker in Maker if maker.named(name)), None)
    if maker is not None:
        raise InvalidArgument(
            f"{name!r} is the name of a checkpoint that a {maker.value} makes, and forgets again",
            next_step="choose another name",
        )
