"""A file that its disk cannot read, or whose file system is damaged there, in this process."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

BAD_DISK = pytest.mark.parametrize("error", [errno.EIO, errno.EUCLEAN, errno.EBADMSG])


def refuse(patched: pytest.MonkeyPatch, path: str | os.PathLike[str], error: int) -> None:
    """Answer every look at that name, and every try to open it, with `error`, as ext4 and XFS do."""

    def refusing(call: Any) -> Any:
        def refuses(name: Any, *rest: Any, **options: Any) -> Any:
            if not isinstance(name, int) and os.fspath(name) == os.fspath(path):
                raise OSError(error, os.strerror(error))
            return call(name, *rest, **options)

        return refuses

    for name in ("lstat", "stat", "open"):
        patched.setattr(os, name, refusing(getattr(os, name)))
