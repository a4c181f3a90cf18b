"""The process of one rank, or of the standby that waits for a rank's place."""

import os
import socket
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.schema.schema import RunConfig
from trainer.rank import Rank

LISTEN_S = 0.5  # an answer costs both sides a millisecond or two, which training loses
QUIET_S = 1.0


@dataclass(frozen=True)
class Beat:
    """Where a rank is.

    Attributes:
        count: phases entered so far; every rank enters the same ones in the same order, so the lowest is behind.
        step: the step it works on.
        phase: what it does in that step.
        alive: how often it said that what it waits for in this phase moves; that does not tell who is behind.
    """

    count: int = 0
    step: int = 0
    phase: str = "start"
    alive: int = 0


@dataclass(frozen=True)
class News:
    """What a rank tells of itself.

    Attributes:
        first: the number of the first of these events, counted from 0.
        events: those that were not told yet; rank 0 has them.
        beat: where the rank is.
    """

    first: int
    events: list[dict[str, Any]]
    beat: Beat


@dataclass(frozen=True)
class Endpoint:
    """Where a rank's process runs.

    Attributes:
        node: Ray's node id.
        address: the node's address.
        port: a port that was free a moment ago.
        pid: process id on that node.
    """

    node: str
    address: str
    port: int
    pid: int


class RankActor:
    """One rank. ``train`` or ``stand_by`` runs in one of the actor's threads; the others answer meanwhile."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._first = 0
        self._telling = threading.Lock()
        self._news = threading.Event()
        self._beat = Beat()
        self._taken = threading.Event()
        self._preparing = threading.Lock()

    def endpoint(self) -> Endpoint:
        """This process's node and a port for the gang's rendezvous."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return Endpoint(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port, os.getpid())

    def warm(self, config: RunConfig, device: str) -> int:
        """Imports what a rank needs, so that taking its place takes no time. Returns the process id."""
        from trainer.rank import prepare_process

        with self._preparing:
            if not self._taken.is_set():
                # Threads and device are read at import; the rest is not known yet and is set when the place is taken.
                prepare_process(Rank(0, 1, 0, 1, "127.0.0.1", 0, device, config.cluster.threads_per_rank))
                from trainer.pretraining.loop import warm_up

                warm_up(config)
        return os.getpid()

    def stand_by(self) -> None:
        """Returns when the place is taken; fails when the process dies."""
        self._taken.wait()

    def train(self, config: RunConfig, run_directory: Path, rank: Rank, skipped: list[tuple[int, int]]) -> None:
        """Trains this rank's share to the end."""
        self._taken.set()
        from trainer.rank import prepare_process

        with self._preparing:  # a standby may be taken before it is warm
            prepare_process(rank)
        from trainer.pretraining.loop import pretrain

        pretrain(config, run_directory, rank, self._report, self._enter, self._alive, skipped)

    def listen(self, told: int, quiet_s: float = QUIET_S) -> News:
        """Events after the first ``told``, and where this rank is.

        Answers at most every ``LISTEN_S``, and after ``quiet_s`` even if there are no events. An event is kept until
        the caller says that it has it: an answer that is lost, or overtaken by another one, loses none.
        """
        time.sleep(min(LISTEN_S, quiet_s))
        self._news.wait(max(0.0, quiet_s - LISTEN_S))
        self._news.clear()
        with self._telling:
            del self._events[: max(0, told - self._first)]
            self._first = max(self._first, told)
            return News(self._first, list(self._events), self._beat)

    def _report(self, event: dict[str, Any]) -> None:
        self._events.append({**event, "time": time.time()})
        self._news.set()

    def _enter(self, step: int, phase: str) -> None:
        self._beat = Beat(self._beat.count + 1, step, phase)

    def _alive(self) -> None:
        self._beat = replace(self._beat, alive=self._beat.alive + 1)
