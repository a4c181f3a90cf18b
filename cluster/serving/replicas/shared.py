"""What many ask for, and is fetched once."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Fetched = TypeVar("Fetched")


class Shared(Generic[Fetched]):
    """At most one fetch at a time, for all who ask meanwhile, and for those who ask soon after.

    Args:
        fetch: fetches.
        holds_s: how long after its beginning a fetch counts; one that fails counts for those alone who wait for it.
    """

    def __init__(self, fetch: Callable[[], Awaitable[Fetched]], holds_s: float) -> None:
        self._fetch, self._holds_s = fetch, holds_s
        self._begun = 0.0
        self._task: asyncio.Task[Fetched] | None = None

    async def get(self, within_s: float | None = None) -> Fetched:
        """What was fetched. Who waits no longer ends no fetch.

        Args:
            within_s: longest time since its beginning; None: as long as it takes.

        Raises:
            TimeoutError: it takes longer. The next one to ask waits for the same fetch.
        """
        task = self._current()
        async with asyncio.timeout_at(None if within_s is None else self._begun + within_s):
            return await asyncio.shield(task)

    def _current(self) -> asyncio.Task[Fetched]:
        now = asyncio.get_running_loop().time()
        task = self._task
        if task is None or (task.done() and (_failed(task) or now >= self._begun + self._holds_s)):
            self._begun, self._task = now, (task := asyncio.create_task(self._fetching()))
            task.add_done_callback(_failed)  # all who waited may have gone, and nobody is to hear of it then
        return task

    async def _fetching(self) -> Fetched:
        return await self._fetch()


def _failed(task: "asyncio.Task[Fetched]") -> bool:
    return task.cancelled() or task.exception() is not None
