"""`python -m tests.fuzz`: see `fuzz.py`."""

from __future__ import annotations

import sys

from tests.fuzz.fuzz import main

sys.exit(main(sys.argv[1:]))
