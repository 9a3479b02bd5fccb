"""`python -m lmdbitmap` is the `lmdbitmap` command."""

from __future__ import annotations

from lmdbitmap.cli.main import main

if __name__ == "__main__":
    main()
