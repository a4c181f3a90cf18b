"""What the replicas say of themselves, asked once for all who ask the door: of it nobody needs a key."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.serving.replicas.replica import Report, report
from cluster.serving.replicas.shared import Shared

HELD_S = 1.0
ANSWER_S = 5.0  # of the office, and of a replica


@dataclass(frozen=True)
class Seen:
    """What was seen at one time.

    Attributes:
        replicas: reports of those that answer, by name.
        taken: requests that the door had taken.
    """

    replicas: dict[str, Report]
    taken: int

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return sum(one.running for one in self.replicas.values() if one.ready)

    @property
    def waiting(self) -> int:
        """Requests without one. A replica may still have one that the door has given up."""
        return max(0, self.taken - self.running)


class Reports:
    """Asks the replicas, and waits for none twice: one that hangs has one question, however often it is looked at.

    Args:
        office: the actor that knows them.
        taken: says how many requests the door has taken.
    """

    def __init__(self, office: Any, taken: Callable[[], int]) -> None:
        self._office, self._taken = office, taken
        self._known: dict[str, Any] = {}
        self._questions: dict[str, Shared[Report]] = {}
        self._knowing = Shared(self._ask_office, 0.0)
        self._seen = Shared(self._ask_all, HELD_S)

    async def seen(self) -> Seen:
        """What was seen less than a second ago, or is seen now."""
        return await self._seen.get()

    async def _ask_office(self) -> dict[str, Any]:
        known: dict[str, Any] = await self._office.known.remote()
        return known

    async def _ask_all(self) -> Seen:
        from ray.exceptions import RayActorError

        with suppress(TimeoutError, RayActorError):  # those that it knew last answer for themselves
            self._known = await self._knowing.get(ANSWER_S)
        self._questions = {
            name: self._questions.get(name) or Shared(partial(_ask, actor), 0.0) for name, actor in self._known.items()
        }
        found = await asyncio.gather(*map(self._report, self._questions))
        return Seen({name: one for name, one in zip(self._known, found, strict=True) if one}, self._taken())

    async def _report(self, name: str) -> Report | None:
        from ray.exceptions import ActorDiedError, RayActorError

        try:
            return await self._questions[name].get(ANSWER_S)
        except ActorDiedError:
            self._office.leave.remote(name)
        except (TimeoutError, RayActorError):
            pass  # it may come back
        return None


async def _ask(actor: Any) -> Report:
    said: Report = await actor.__ray_call__.remote(report)
    return said
