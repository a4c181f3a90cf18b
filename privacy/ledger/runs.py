"""The runs of a ledger: whose each is, what it has charged, and how it ended.

A run belongs to the coordinator that opened it: the same name under another coordinator is another run, so that nobody
can continue, close or block what is another's. Entries from before version 3 name no coordinator. Such a run belongs to
the first that charges or closes it under version 3. In a ledger that only its owner asks (an aggregator's, an audit's)
no entry names one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
OPENING, CHARGING, CLOSE = ("reserve", "entrust"), ("charge", "unnoised"), "close"
STEWARD = "steward"


@dataclass
class Run:
    """One run.

    Attributes:
        opening: the entry with which it reserved its schedule, or was entrusted with updates.
        coordinator: the public key of whoever it belongs to; empty where no entry says so yet.
        charges: its entries of releases, and of updates without noise.
        closing: the entry that ended it; None while it is open.
    """

    opening: Body
    coordinator: str
    charges: list[Body] = field(default_factory=list)
    closing: Body | None = None

    @property
    def name(self) -> str:
        """Its name, which its coordinator gave it."""
        return str(self.opening["run"])

    @property
    def stopped(self) -> bool:
        """Whether the silo's steward ended it."""
        return self.closing is not None and self.closing.get("by") == STEWARD

    @property
    def end(self) -> str:
        """How it ended, in words for a coordinator that still asks."""
        how = "was stopped by the silo's steward" if self.stopped else "is closed"
        return f"run {self.name} {how}"

    @property
    def rounds_charged(self) -> int:
        """Rounds that may have been released."""
        return sum(body["round"] > 0 for body in self.charges)

    @property
    def seed_source(self) -> Any:
        """Where the seeds of its charges came from: the worst of them speaks for all."""
        sources = {body.get("seed_source", "not recorded") for body in self.charges}
        return next((source for source in ("injected", "not recorded") if source in sources), "operating system")

    def charge(self, **values: Any) -> Body | None:
        """Its first charge with these values."""
        found = (body for body in self.charges if all(body.get(name) == value for name, value in values.items()))
        return next(found, None)


class Runs:
    """All runs of a ledger's entries, oldest first."""

    def __init__(self, bodies: Iterable[Body] = ()) -> None:
        self._all: list[Run] = []
        self._by_key: dict[tuple[str, str], Run] = {}
        self._by_name: dict[str, Run] = {}  # for entries that name no coordinator: names were unique then
        for body in bodies:
            self.add(body)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._all)

    def of(self, name: str, coordinator: str) -> Run | None:
        """What a coordinator calls by this name: its own run, or one that is nobody's yet."""
        return self._by_key.get((coordinator, name)) or self._by_key.get(("", name))

    def open(self) -> list[Run]:
        """The runs that are not closed."""
        return [run for run in self._all if run.closing is None]

    def add(self, body: Body) -> Run | None:
        """Takes in the next entry. Returns the run that it is about; None where it is about none."""
        if body["kind"] in OPENING:
            return self._opened(body)
        return self._continued(body) if body["kind"] in (*CHARGING, CLOSE) else None

    def _opened(self, body: Body) -> Run:
        run = Run(body, coordinator_of(body))
        self._by_key[run.coordinator, run.name] = run
        self._by_name.setdefault(run.name, run)
        self._all.append(run)
        return run

    def _continued(self, body: Body) -> Run | None:
        name, coordinator = body["run"], body.get("coordinator")
        run = self._by_name.get(name) if coordinator is None else self.of(name, coordinator)
        if run is None:
            return None
        if not run.coordinator and coordinator is not None:
            run.coordinator = coordinator
            self._by_key[coordinator, name] = self._by_key.pop(("", name))
        if body["kind"] == CLOSE:
            run.closing = body
        else:
            run.charges.append(body)
        return run


def coordinator_of(opening: Body) -> str:
    """Whose run an entry opens; empty where it doesn't say."""
    return str(opening.get("coordinator", opening.get("aggregator", "")))


def named(coordinator: str) -> dict[str, str]:
    """How an entry names its coordinator, where there is one to name."""
    return {"coordinator": coordinator} if coordinator else {}
