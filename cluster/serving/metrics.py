"""What Prometheus reads of a service. No label is a word of a request."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServingMetrics:
    """Counters of one service.

    Args:
        waiting: tells how many requests have no slot.
        running: tells how many have one.
    """

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("siloweave_requests", "Requests by path and status.", ["path", "status"], registry=own)
        self.tokens = Counter("siloweave_tokens", "Tokens that were read and written.", ["model", "kind"], registry=own)
        self.failures = Counter("siloweave_failures", "Errors inside the service, by kind.", ["kind"], registry=own)
        self.first = Histogram(
            "siloweave_first_token_seconds",
            "From a request to its first token.",
            ["model"],
            buckets=_SECONDS,
            registry=own,
        )
        self.whole = Histogram(
            "siloweave_answer_seconds", "From a request to its last token.", ["model"], buckets=_SECONDS, registry=own
        )
        Gauge("siloweave_requests_waiting", "Requests without a slot.", registry=own).set_function(waiting)
        Gauge("siloweave_requests_running", "Requests with a slot.", registry=own).set_function(running)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
