"""Programs of a newer Debian than the one that tests run on: of NBD, which ask for extended headers, and of libvirt."""

from __future__ import annotations

from pathlib import Path

import pytest

NEWER = Path(__file__).parents[2] / ".venv" / "newer"
"""What tools/newer.py made."""

requires_newer = pytest.mark.skipif(
    not (NEWER / "key").exists(),
    reason="needs the newer programs that tools/newer.py makes of Debian's packages",
)


def newer(program: str) -> Path:
    return NEWER / "bin" / program
