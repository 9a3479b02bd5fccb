"""The verb `metrics`, and `serve --metrics`: the state of a store's disks in Prometheus' format.

The owner of a disk is asked for its facts, as by `info`, but does not persist its bits first: a scrape every few
seconds must not disturb the guests. So `lmdbitmap_dirty_bytes` is what a crash at this moment would leave dirty: armed
extents count whole.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from lmdbitmap.access.owners import is_attached
from lmdbitmap.access.questions import Owners
from lmdbitmap.cli.facts import epoch_facts
from lmdbitmap.cli.failing import ending_as, failure_facts
from lmdbitmap.cli.options import Session, verb
from lmdbitmap.cli.output import say_json
from lmdbitmap.cli.sizes import iso_time
from lmdbitmap.errors import NotFound
from lmdbitmap.extents import Trust
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker.chain import disk_called
from lmdbitmap.tracker.changes import changes
from lmdbitmap.work.disks_failed import DisksFailed
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.latencies import BUCKETS, bound_us

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

log = logging.getLogger(__name__)

_NS_PER_S = 1e9
_US_PER_S = 1e6


@dataclass(frozen=True)
class Figures:
    """The figures of a disk at one moment; `served` is its owner's report, None if nobody serves it.

    `attached` and `checkpoints` are None where they are not known.
    """

    disk: Disk
    attached: bool | None
    trust: Trust
    dirty_bytes: int
    checkpoints: Sequence[Checkpoint] | None
    served: Mapping[str, Any] | None

    def facts(self) -> dict[str, object]:
        newest = self.checkpoints[-1] if self.checkpoints else None
        return {
            "name": self.disk.name,
            "size": self.disk.size,
            "attached": self.attached,
            "trust": self.trust.value,
            "dirty_bytes": self.dirty_bytes,
            "epoch": epoch_facts(self.disk),
            "checkpoints": None if self.checkpoints is None else len(self.checkpoints),
            "last_checkpoint": None if newest is None else iso_time(newest.time_ns),
            "served": self.served,
        }


def figures_of(store: Store, disk: Disk, owners: Owners, apart: Failures) -> Figures:
    """Return the figures of a disk. If one cannot be read, which is set `apart`, everything may have changed."""
    known: list[Figures] = []
    with apart.of(disk.name):
        known.append(_known_figures(store, disk, owners))
    return known[0] if known else Figures(disk, None, Trust.UNTRUSTED, disk.size, None, None)


def _known_figures(store: Store, disk: Disk, owners: Owners) -> Figures:
    known = changes(store, disk.name).summary
    told = owners.ask(disk)
    trust = known.standing.trust if told is None else Trust(told["trust"])
    with store.read() as reader:
        checkpoints = reader.checkpoints(disk.uuid)
    served = None if told is None else told["served"]
    return Figures(disk, is_attached(store, disk), trust, known.dirty_bytes, checkpoints, served)


@verb(
    examples=[
        "lmdbitmap metrics",
        "lmdbitmap metrics sda sdb --json",
    ]
)
@click.argument("names", metavar="[NAME…]", nargs=-1)
@click.pass_obj
def metrics(asked: Session, names: Sequence[str]) -> None:
    """Print the state of disks in the format of Prometheus.

    Covers all disks of the store, served or not, or those that are named. Ranges being written count as dirty by whole
    extents, as they would after a crash: the guests are not disturbed for the sharper answer that `info` gives. A disk
    of which something cannot be read counts as dirty and not trusted, and is reported at the end.
    """
    with Store.open(asked.store_path) as store:
        found, owners, apart = [], Owners(store), Failures(never=(NotFound,))
        for disk in _disks(store, names):
            with contextlib.suppress(NotFound):  # it was removed meanwhile
                found.append(figures_of(store, disk, owners, apart))
    failed = DisksFailed("read", len(found) - len(apart.errors), apart.errors) if apart.errors else None
    with ending_as(failed, "not known"):
        if asked.as_json:
            disks = [figures.facts() for figures in found]
            say_json({"store": store.path, "disks": disks, "failures": failure_facts(failed)})
        else:
            print(exposition(found), end="")


def _disks(store: Store, names: Sequence[str]) -> list[Disk]:
    if names:
        return [disk_called(store, name) for name in dict.fromkeys(names)]
    with store.read() as reader:
        return reader.disks()


def exposition(found: Sequence[Figures]) -> str:
    from prometheus_client import generate_latest

    return generate_latest(_registry(lambda: found)).decode()


@contextlib.contextmanager
def metrics_served(store: Store, names: Collection[str], host: str, port: int) -> Iterator[str | None]:
    """Serve the current figures of the named disks over HTTP, in separate threads, until the block ends; yield the URL.

    `names` is read at each scrape. See `serving` for a port that cannot be had yet.
    """
    from lmdbitmap.cli.scraping import serving

    scrapes = _Scrapes(store, names)
    with serving(_registry(scrapes.figures), host, port) as url:
        try:
            yield url
        finally:
            scrapes.end()


class _Scrapes:
    """Reads figures for one scrape at a time, and for none after `end`: then the store may be closed safely."""

    def __init__(self, store: Store, names: Collection[str]) -> None:
        self._store = store
        self._names = names
        self._turn = threading.Lock()

    def figures(self) -> list[Figures]:
        """Return the figures of the disks, without those that were removed. What cannot be read is logged."""
        found, owners, apart = [], Owners(self._store), Failures(never=(NotFound,))
        with self._turn:
            for name in list(self._names):
                with contextlib.suppress(NotFound), apart.of(name):
                    found.append(figures_of(self._store, disk_called(self._store, name), owners, apart))
        for name, error in apart.errors.items():
            log.warning("disk %s: its metrics are not known: %s", name, error)
        return found

    def end(self) -> None:
        with self._turn:
            self._names = ()


def _registry(figures: Callable[[], Sequence[Figures]]) -> CollectorRegistry:
    from prometheus_client.registry import Collector, CollectorRegistry

    class Disks(Collector):
        def collect(self) -> Iterable[Metric]:
            return families(figures())

    registry = CollectorRegistry()
    registry.register(Disks())
    return registry


# --- the families ---


def families(found: Sequence[Figures]) -> list[Metric]:
    served = [(figures.disk.name, figures.served) for figures in found if figures.served is not None]
    return [*_of_disks(found), *_of_servers(served), *_latencies(served)]


def _of_disks(found: Sequence[Figures]) -> Iterator[Metric]:
    yield _gauge("disk_size_bytes", "Size of the disk.", ((f.disk.name, f.disk.size) for f in found))
    yield _gauge(
        "dirty_bytes",
        "Bytes that would count as changed after a crash at this moment.",
        ((f.disk.name, f.dirty_bytes) for f in found),
    )
    yield _gauge(
        "trusted",
        "1 if changes since the newest checkpoint are known, 0 if a full backup is needed.",
        ((f.disk.name, f.trust is not Trust.UNTRUSTED) for f in found),
    )
    known = [f for f in found if f.attached is not None]
    yield _gauge(
        "attached", "1 if a process owns the disk.", ((f.disk.name, bool(f.attached)) for f in known)
    )
    yield _gauge(
        "served",
        "1 if a process that answers at the control socket serves the disk.",
        ((f.disk.name, f.served is not None) for f in known),
    )
    yield _gauge(
        "epoch", "How often tracking began anew.", ((f.disk.name, f.disk.epoch_number) for f in found)
    )
    chains = [(f.disk.name, f.checkpoints) for f in found if f.checkpoints is not None]
    yield _gauge("checkpoints", "Checkpoints kept.", ((name, len(chain)) for name, chain in chains))
    yield _gauge(
        "last_checkpoint_timestamp_seconds",
        "When the newest checkpoint was made, since 1970.",
        ((name, chain[-1].time_ns / _NS_PER_S) for name, chain in chains if chain),
    )


_Served = Sequence[tuple[str, Mapping[str, Any]]]


def _of_servers(served: _Served) -> Iterator[Metric]:
    yield _gauge(
        "armed_extents",
        "Extents of 64 blocks that a crash at this moment would leave dirty as a whole.",
        ((name, told["armed"]) for name, told in served),
    )
    yield _gauge(
        "image_lost",
        "1 if the image was removed or replaced under its server, and ends with it.",
        ((name, told["image_lost"] is not None) for name, told in served),
    )
    yield _gauge(
        "connected_clients",
        "Clients that are connected.",
        ((name, told["connections"]["now"]) for name, told in served),
    )
    yield _counter(
        "connections",
        "Clients that have connected since the server started.",
        ((name, told["connections"]["ever"]) for name, told in served),
    )
    yield _counter(
        "received_bytes",
        "Bytes received from clients.",
        ((name, told["bytes"]["received"]) for name, told in served),
    )
    yield _counter(
        "sent_bytes", "Bytes sent to clients.", ((name, told["bytes"]["sent"]) for name, told in served)
    )
    yield _requests(served)


def _requests(served: _Served) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily("lmdbitmap_requests", "Requests answered.", labels=["disk", "type"])
    for name, told in served:
        for kind, count in told["requests"].items():
            family.add_metric([name, kind], count)
    return family


def _gauge(name: str, help_: str, values: Iterable[tuple[str, float]]) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"lmdbitmap_{name}", help_, labels=["disk"])
    for disk, value in values:
        family.add_metric([disk], value)
    return family


def _counter(name: str, help_: str, values: Iterable[tuple[str, float]]) -> Metric:
    """Return a counter; the name of its samples ends in `_total`."""
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"lmdbitmap_{name}", help_, labels=["disk"])
    for disk, value in values:
        family.add_metric([disk], value)
    return family


_LATENCY_HELP = {
    "commit": "Transactions of the store that were asked for the disk, arming among them.",
    "flush": "Flushes that clients asked for.",
    "batch": "From having received some requests to having answered them, of one such batch in sixteen.",
}


def _latencies(served: _Served) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    for kind, help_ in _LATENCY_HELP.items():
        family = HistogramMetricFamily(f"lmdbitmap_{kind}_seconds", help_, labels=["disk"])
        for name, told in served:
            latencies = told["latencies"][kind]
            family.add_metric([name], _cumulative(latencies["buckets"]), latencies["total_ns"] / _NS_PER_S)
        yield family


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return cumulative buckets: Prometheus counts in each bucket also everything in those before it."""
    total, buckets = 0.0, []
    for bucket in range(BUCKETS):
        total += counts[bucket]
        end_us = bound_us(bucket)
        buckets.append(("+Inf" if end_us is None else repr(end_us / _US_PER_S), total))
    return buckets
