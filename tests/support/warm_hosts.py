"""Processes that host the silos of one federation after the other: to start one takes longer than a federation in it.

For tests that look at what federations do. Those that kill processes, or compare bytes after a restart, take Ray as it
is.
"""

import sys
from contextlib import suppress
from typing import Any

from federated.simulation.local_grid import SiloHost


class WarmHost(SiloHost):
    """A process that hosts the silos that it is given, until it is given others."""

    def __init__(self) -> None:
        self._silos: dict[str, Any] = {}

    def host(self, *given: Any) -> None:
        super().__init__(*given)

    def rest(self) -> None:
        while self._silos:
            self._silos.popitem()[1].close()


class WarmRay:
    """Ray, but a process that a grid ends is there for the next grid."""

    def __init__(self, ray: Any) -> None:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes do not find this module
        self._ray, self._free = ray, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)

    def remote(self, *kinds: Any, **options: Any) -> Any:
        return _Hosts(self) if kinds == (SiloHost,) else self._ray.remote(*kinds, **options)

    def started(self, *given: Any) -> Any:
        # Without a CPU of its own: all of Ray's are there for whoever else works in this session.
        host = self._free.pop() if self._free else self._ray.remote(WarmHost).options(num_cpus=0).remote()
        host.host.remote(*given)
        return host

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        with suppress(self._ray.exceptions.RayActorError):  # it had died
            self._ray.get(actor.rest.remote())
            self._free.append(actor)


class _Hosts:
    """What a grid takes for Ray's actor class."""

    def __init__(self, warm: WarmRay) -> None:
        self._warm = warm

    def options(self, **_: Any) -> "_Hosts":
        return self

    def remote(self, *given: Any) -> Any:
        return self._warm.started(*given)
