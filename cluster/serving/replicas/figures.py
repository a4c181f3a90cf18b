"""What Prometheus reads of several replicas: one page, each replica's figures under its name."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_AT_THE_DOOR = ("siloweave_requests", "siloweave_requests_created")  # counted once, where they come in


class DoorMetrics:
    """Counters of the door, beside those of its replicas.

    Args:
        wanted: how many replicas there should be.
    """

    def __init__(self, wanted: int) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("siloweave_requests", "Requests by path and status.", ["path", "status"], registry=own)
        self.failures = Counter("siloweave_failures", "Errors inside the service, by kind.", ["kind"], registry=own)
        self.moved = Counter(
            "siloweave_requests_moved", "Requests given to another replica when theirs died.", registry=own
        )
        self._answering = Gauge("siloweave_replicas", "Replicas that answer.", registry=own)
        Gauge("siloweave_replicas_wanted", "Replicas that there should be.", registry=own).set(wanted)

    def page(self, replicas: Mapping[str, bytes]) -> bytes:
        """The text that Prometheus reads.

        Args:
            replicas: the pages of those that answer, by name.
        """
        self._answering.set(len(replicas))
        joined = CollectorRegistry()
        joined.register(_Joined(generate_latest(self._registry), replicas))
        return generate_latest(joined)


class _Joined(Collector):
    def __init__(self, door: bytes, replicas: Mapping[str, bytes]) -> None:
        self._families: dict[str, Metric] = {}
        self._add(text_string_to_metric_families(door.decode()), {})
        for name, page in replicas.items():
            families = text_string_to_metric_families(page.decode())
            self._add((one for one in families if one.name not in _AT_THE_DOOR), {"replica": name})

    def _add(self, families: Iterable[Metric], label: Mapping[str, str]) -> None:
        for family in families:
            into = self._families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for one in family.samples:
                into.samples.append(one._replace(labels={**one.labels, **label}))

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._families.values()
