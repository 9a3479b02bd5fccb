"""The `lmdbitmap` command, which `python -m lmdbitmap` is too.

Its imports take longer than anything else in most runs: a Ctrl-C meanwhile ends it as quietly as any later one.
"""

from __future__ import annotations

import sys
from typing import NoReturn

_ENDED_BY_CTRL_C = 130


def main() -> NoReturn:
    try:
        from lmdbitmap.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(_ENDED_BY_CTRL_C)


if __name__ == "__main__":
    main()
