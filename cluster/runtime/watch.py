"""Watches a gang: the first failure ends it at once, with its cause; a rank that no longer moves is a failure too."""

import re
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.runtime.places import Places
from cluster.runtime.rank_actor import QUIET_S, Beat, News
from configs.errors import SiloweaveError, lines_of
from configs.events import Listener
from trainer.pretraining.rollback import RollBack

# What a rank sees of a peer's death. The death itself is reported a moment later.
_ECHO = re.compile(r"gloo|nccl|TCPStore|store->get|Connection (?:closed|reset|refused)|Broken pipe", re.IGNORECASE)
_ECHO_WAIT_S = 2.0
_CHECK_S = 1.0


class RankFailed(Exception):
    """A rank raised, hangs, or its process died."""


@dataclass
class _Heard:
    """What was last heard of a rank, by the driver's clock.

    Attributes:
        beat: where it is.
        moved: when it, or a rank that it may be waiting for, was last seen to move.
        answered: when its process last answered.
    """

    beat: Beat = field(default_factory=Beat)
    moved: float = field(default_factory=time.monotonic)
    answered: float = field(default_factory=time.monotonic)


class Watch:
    """One start of the gang, from ``train`` to its end.

    Args:
        places: the gang's processes.
        runs: reference of each rank's ``train``, by rank.
        hang_timeout_s: seconds without a new phase, and without a copy that moves, that count as a hang.
        report: receives rank 0's events.
    """

    def __init__(self, places: Places, runs: list[Any], hang_timeout_s: float, report: Listener) -> None:
        self._places, self._hang_timeout_s, self._report = places, hang_timeout_s, report
        self._runs = dict(zip(runs, range(len(runs)), strict=True))
        self._quiet_s = min(QUIET_S, hang_timeout_s / 4)
        self._told = 0
        self._listens = {self._listen(rank, self._quiet_s): rank for rank in range(len(runs))}
        self._heard = [_Heard() for _ in runs]

    def until_done(self) -> None:
        """Returns when every rank has finished.

        Raises:
            RankFailed: a rank died, raised or hangs.
            SiloweaveError: a rank says that going on is of no use.
        """
        try:
            while self._runs:
                self._next()
        except (RankFailed, RollBack, SiloweaveError):
            self._last_events(_ECHO_WAIT_S)
            raise
        self._last_events(self._hang_timeout_s)

    def _next(self) -> None:
        import ray

        # Runs come first: a failure is never behind a queue of answers.
        references = [*self._runs, *self._listens, *self._places.waits]
        for reference in ray.wait(references, timeout=min(_CHECK_S, self._hang_timeout_s / 4))[0]:
            if reference in self._runs:
                self._end_of_run(reference)
            elif reference in self._listens:
                self._answer(reference)
            else:
                self._places.standby_changed(reference)
        self._check_hang(time.monotonic())

    def _last_events(self, timeout_s: float) -> None:
        """What rank 0 has not told yet: without it, steps that are in the newest commit would be in no event."""
        import ray

        try:
            news: News = ray.get(self._listen(0, quiet_s=0), timeout=timeout_s)
        except ray.exceptions.RayError:
            return  # a process that is gone, or that does not answer: its last half second is lost
        self._pass_on(news)

    def _end_of_run(self, reference: Any) -> None:
        rank = self._runs.pop(reference)
        cause = _failure(rank, reference)
        if cause is not None:
            raise RankFailed(self._first_cause(cause))

    def _first_cause(self, cause: str) -> str:
        """The failure that another rank's broken connection is the echo of."""
        import ray

        deadline = time.monotonic() + _ECHO_WAIT_S
        while _is_echo(cause) and self._runs and time.monotonic() < deadline:
            for reference in ray.wait(list(self._runs), timeout=deadline - time.monotonic())[0]:
                other = _failure(self._runs.pop(reference), reference)
                if other is not None and not _is_echo(other):
                    return other
        return (self._lost_node() if _is_echo(cause) else None) or cause

    def _lost_node(self) -> str | None:
        """A rank that does not answer: Ray takes a while to say that a node is gone."""
        import ray

        probes = {self._listen(rank, quiet_s=0): rank for rank in self._runs.values()}
        if not probes:
            return None
        _, mute = ray.wait(list(probes), num_returns=len(probes), timeout=_ECHO_WAIT_S)
        return f"rank {probes[mute[0]]}'s process does not answer any more: its node may be lost" if mute else None

    def _answer(self, reference: Any) -> None:
        import ray

        rank = self._listens.pop(reference)
        try:
            news: News = ray.get(reference)
        except ray.exceptions.RayError:
            return  # the rank's own run tells why
        self._hear(rank, news.beat, time.monotonic())
        self._pass_on(news)
        self._listens[self._listen(rank, self._quiet_s)] = rank
        if any(event["event"] == "step" for event in news.events):
            self._places.add_standbys()  # not earlier: they would take time from the (re)start

    def _listen(self, rank: int, quiet_s: float) -> Any:
        return self._places.ranks[rank].listen.remote(self._told, quiet_s)

    def _hear(self, rank: int, beat: Beat, now: float) -> None:
        heard = self._heard[rank]
        heard.answered = now
        if beat != heard.beat:
            for other in self._heard:  # those beside it or ahead may wait for it, itself included
                if other.beat.count >= heard.beat.count:
                    other.moved = now
            heard.beat = beat

    def _pass_on(self, news: News) -> None:
        for event in news.events[self._told - news.first :] if news.events else []:
            self._told += 1
            self._report(event)

    def _check_hang(self, now: float) -> None:
        running = set(self._runs.values())
        still = [rank for rank in running if now - self._heard[rank].moved > self._hang_timeout_s]
        if not still:
            return
        mute = [rank for rank in still if now - self._heard[rank].answered > self._hang_timeout_s / 2]
        # A rank that hangs is behind: its peers wait for it inside a collective, a phase or more ahead.
        rank = mute[0] if mute else min(still, key=lambda rank: self._heard[rank].beat.count)
        beat = self._heard[rank].beat
        raise RankFailed(
            f"rank {rank} hangs: nothing new for {self._hang_timeout_s:g} s (cluster.hang_timeout_s) "
            f"in phase {beat.phase} of step {beat.step}{', its process does not answer' if mute else ''}"
        )


def _is_echo(cause: str) -> bool:
    """Whether a cause echoes a peer's death. A death itself is no echo, whatever Ray quotes in its message."""
    return " raised " in cause and _ECHO.search(cause) is not None


def _failure(rank: int, reference: Any) -> str | None:
    """How a rank's run ended: None where it finished."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SiloweaveError | RollBack):
            raise cause from None
        return f"rank {rank} raised {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
    except ray.exceptions.RayActorError as error:
        return f"rank {rank}'s process died ({lines_of(error)[0]})"
    return None
