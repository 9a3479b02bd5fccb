"""Many power cuts: every life, some hundred disk states of each, two processes at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.crash.power_cut import copying_lives
from tests.crash.power_cut.lives import LIVES
from tests.crash.power_cut.trial import Tally

PROCESSES = 2
STATES_PER_LIFE = 600
EXPLAINED = {
    "deferred": "in deferred mode the bits are written at a clean close only",
    "losing_track": "tracking failed",
    "losing_track_for_good": "tracking failed",
    "with_a_flat_file": "was not closed cleanly, so its bits say nothing",
    "adding": "the owner's file of this disk",
    "rescanning": copying_lives.NO_BITMAP,
}
"""Lives after which a power cut may cost a full backup, and what it then gives as the reason."""
EXPECTED_WAYS = frozenset(
    {
        "incremental", "full: no-earlier-backup", "full: first-sync", "full: target-gone", "full: interrupted",
        "compare: interrupted",
    }
)  # fmt: skip
"""How backups and syncs are done after a cut: only the first one of each may have to be done anew."""
WAYS_EXPLAINED = {"rescanning": "rescan: new-epoch"}
_LIVES_PER_TRIAL = 4
_TREE = Path(__file__).parents[3]


@dataclass(frozen=True)
class Outcome:
    """Of one trial: what was judged, and what was lost, or what its process died of."""

    tallies: list[Tally]
    failure: str | None


def run_trial(seed: str, quota: int, lives: Iterable[str], flaw: str = "") -> Outcome:
    """In a process of its own; `quota` states of each life."""
    words = [sys.executable, "-m", "tests.crash.power_cut.trial", seed, str(quota), ",".join(lives), flaw]
    with subprocess.Popen(
        words, cwd=_TREE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said, complained = process.communicate()
    lines = [json.loads(line) for line in said.splitlines()]
    tallies = [Tally(**line["tally"]) for line in lines if "tally" in line]
    failure = next((line["failed"] for line in lines if "failed" in line), None)
    if failure is None and process.returncode != 0:
        last = next((line["at"] for line in reversed(lines) if "at" in line), "before the first state")
        failure = f"{last}: the process ended with {process.returncode}\n{complained[-2000:]}"
    if failure is not None:
        failure += f"\n  again: python -m {' '.join(words[2:])}"
    return Outcome(tallies, failure)


def tried(seed: str, quota: int, lives: Sequence[str], at_once: int = _LIVES_PER_TRIAL) -> list[Tally]:
    """All lives, several in a process; raises `AssertionError` with whatever was lost."""
    groups = [lives[number :: -(-len(lives) // at_once)] for number in range(-(-len(lives) // at_once))]
    with ThreadPoolExecutor(PROCESSES) as pool:
        outcomes = list(pool.map(lambda group: run_trial(seed, quota, group), groups))
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    assert not failures, f"power cuts, seed {seed}:\n" + "\n".join(failures)
    return [tally for outcome in outcomes for tally in outcome.tallies]


def unexplained(tallies: Iterable[Tally]) -> list[str]:
    """Why full backups would be needed that need not be, and which were made."""
    return [
        f"life {tally.life!r}: {why} ({count} times)"
        for tally in tallies
        for why, count in [*_unexplained_answers(tally), *_unexplained_ways(tally)]
    ]


def _unexplained_answers(tally: Tally) -> Iterator[tuple[str, int]]:
    for reason, count in tally.reasons.items():
        if tally.life not in EXPLAINED or EXPLAINED[tally.life] not in reason:
            yield reason, count


def _unexplained_ways(tally: Tally) -> Iterator[tuple[str, int]]:
    for way, count in tally.ways.items():
        if way not in EXPECTED_WAYS and way != WAYS_EXPLAINED.get(tally.life):
            yield way, count


def torture(seed: int, scale: float) -> str:
    """Cut the power in every life; one line of figures."""
    tallies = tried(str(seed), max(int(STATES_PER_LIFE * scale), 1), list(LIVES))
    assert not unexplained(tallies), f"seed {seed}: {unexplained(tallies)}"
    states = sum(tally.states for tally in tallies)
    trust = sum((Counter(tally.trust) for tally in tallies), Counter[str]())
    answers = ", ".join(f"{count} {kind}" for kind, count in trust.most_common())
    moments = sum(tally.moments for tally in tallies)
    return f"{states} disk states at {moments} moments of {len(tallies)} lives, nothing lost ({answers})"


def table(tallies: Iterable[Tally]) -> str:
    """One line for each life, for whoever wants to see more."""
    return "\n".join(
        f"{tally.life:28} {tally.states:5} states {tally.cases:5} cases {tally.moments:4} moments {tally.trust}"
        for tally in tallies
    )
