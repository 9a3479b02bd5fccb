"""A file that its disk cannot read, whose file system is damaged there, or that is protected, in this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

import pytest

BAD_DISK = pytest.mark.parametrize("error", [errno.EIO, errno.EUCLEAN, errno.EBADMSG])


def refuse(
    patched: pytest.MonkeyPatch,
    path: str | os.PathLike[str],
    error: int,
    calls: Sequence[str] = ("lstat", "stat", "open", "unlink"),
) -> None:
    """Answer every such call with that name with `error`: all of these are what ext4 and XFS refuse."""

    def refusing(call: Any) -> Any:
        def refuses(name: Any, *rest: Any, **options: Any) -> Any:
            if not isinstance(name, int) and os.fspath(name) == os.fspath(path):
                raise OSError(error, os.strerror(error))
            return call(name, *rest, **options)

        return refuses

    for name in calls:
        patched.setattr(os, name, refusing(getattr(os, name)))
