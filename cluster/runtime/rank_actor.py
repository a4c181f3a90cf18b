"""The process of one rank, or of the standby that waits for a rank's place."""

import os
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from trainer.zero import Rank

LISTEN_S = 0.5  # an answer costs both sides a millisecond or two, which training loses
QUIET_S = 1.0


@dataclass(frozen=True)
class Beat:
    """Where a rank is.

    Attributes:
        count: phases entered so far; every rank enters the same ones in the same order, so the lowest is behind.
        step: the step it works on.
        phase: what it does in that step.
        alive: how often it said within the phase that what it waits for moves; says nothing on who is behind.
    """

    count: int = 0
    step: int = 0
    phase: str = "start"
    alive: int = 0


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
        self._events: deque[dict[str, Any]] = deque()
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
        from trainer.zero import prepare_process

        with self._preparing:
            if not self._taken.is_set():
                # Threads and device are read at import; the rest is not known yet and is set when the place is taken.
                prepare_process(Rank(0, 1, 0, 1, "127.0.0.1", 0, device, config.cluster.threads_per_rank))
                from trainer.pretrain import warm_up

                warm_up(config)
        return os.getpid()

    def stand_by(self) -> None:
        """Returns when the place is taken; fails when the process dies."""
        self._taken.wait()

    def train(self, config: RunConfig, run_directory: Path, rank: Rank, skipped: list[tuple[int, int]]) -> None:
        """Trains this rank's share to the end."""
        self._taken.set()
        from trainer.zero import prepare_process

        with self._preparing:  # a standby may be taken before it is warm
            prepare_process(rank)
        from trainer.pretrain import pretrain

        pretrain(config, run_directory, rank, self._report, self._enter, self._alive, skipped)

    def listen(self, quiet_s: float = QUIET_S) -> tuple[list[dict[str, Any]], Beat]:
        """Events since the last call (rank 0 has them), and where this rank is.

        Answers at most every ``LISTEN_S``, and after ``quiet_s`` even if there are no events.
        """
        time.sleep(min(LISTEN_S, quiet_s))
        self._news.wait(max(0.0, quiet_s - LISTEN_S))
        self._news.clear()
        return [self._events.popleft() for _ in range(len(self._events))], self._beat

    def _report(self, event: dict[str, Any]) -> None:
        self._events.append({**event, "time": time.time()})
        self._news.set()

    def _enter(self, step: int, phase: str) -> None:
        self._beat = Beat(self._beat.count + 1, step, phase)

    def _alive(self) -> None:
        self._beat = replace(self._beat, alive=self._beat.alive + 1)
