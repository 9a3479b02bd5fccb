"""One target in a process that ends with it: `python -m tests.fuzz.child TARGET RUNS`, which `fuzz.py` starts."""

from __future__ import annotations

import logging
import sys

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]  # see `make fuzz`

from tests.fuzz.fuzz import limit_memory, options_of

with atheris.instrument_imports(include=["lmdbitmap"]):
    from tests.fuzz.targets import TARGETS


def main(target: str, runs: str) -> None:
    limit_memory()
    logging.getLogger("lmdbitmap").setLevel(
        logging.CRITICAL
    )  # it would tell of every write that is made to fail
    atheris.Setup([sys.argv[0], *options_of(target, int(runs))], TARGETS[target].check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
