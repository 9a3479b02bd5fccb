"""The long runs behind the promise: `make torture`, or `python -m tests.torture [PART…] [--seed N] [--scale X]`.

Each part is a laboratory whose small, seeded sample `make test` runs too. Here it runs at the length that we want
to have seen before a release, from a seed of its own; a failure names the seed, and the same seed fails again.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
import traceback

PARTS = {
    "power-cuts": "tests.crash.power_cut.torture",
    "kill-storm": "tests.crash.kill_storm",
    "races": "tests.crash.races",
    "io-errors": "tests.crash.io_errors",
    "bit-rot": "tests.crash.bit_rot",
}
"""A part's module has `torture(seed, scale)`, which answers one line of figures or raises `AssertionError`."""


def main() -> int:
    asked = parse(sys.argv[1:])
    print(f"seed {asked.seed}, scale {asked.scale:g}", flush=True)  # now, in case somebody ends the run
    failures = [part for part in asked.parts or PARTS if not run(part, asked.seed, asked.scale)]
    return 1 if failures else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make torture ARGS=…")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--scale", type=float, default=1.0, help="1 is the full length, 0.1 a tenth of it")
    asked = parser.parse_args(arguments)
    unknown = [part for part in asked.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(PARTS)}")
    return asked


def run(part: str, seed: int, scale: float) -> bool:
    begun = time.monotonic()
    try:
        told = importlib.import_module(PARTS[part]).torture(seed, scale)
    except Exception as failure:
        if not isinstance(failure, AssertionError):  # a laboratory that broke has no sentence of its own
            traceback.print_exc()
        print(f"{part}: FAILED with --seed {seed}: {failure}", flush=True)
        return False
    print(f"{part}: {told} ({time.monotonic() - begun:.0f} s, seed {seed})", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
