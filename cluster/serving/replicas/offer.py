"""What a process serves: from a command's options to a service with its models loaded."""

import os
from dataclasses import dataclass, replace

from cluster.serving.app import Service
from cluster.serving.keys import ApiKeys
from cluster.serving.labels import LabelModel
from cluster.serving.models import Place, ServedModel, find, load, named
from configs.storage.sealing import ENVIRONMENT, FROM_ENVIRONMENT, MasterKey, load_key
from trainer.inference.batching import Engine, EngineLimits

_WAITING = 8  # requests that may wait, for each slot


@dataclass(frozen=True)
class Offer:
    """What a process is to serve.

    Attributes:
        models: as ``PATH`` or ``NAME=PATH``.
        slots: requests that are decoded together.
        timeout_s: longest that an answer may take.
        adapters_memory: bytes that the adapters on one base may take; None: as many as there are.
        key_file: key of encrypted runs; empty: the environment's, where it is set.
    """

    models: tuple[str, ...]
    slots: int
    timeout_s: float
    adapters_memory: int | None
    key_file: str

    @property
    def most(self) -> int:
        """Requests that have or may wait for a slot."""
        return (1 + _WAITING) * self.slots

    def everywhere(self) -> "Offer":
        """The same for processes with other working folders."""
        return replace(
            self, models=tuple("=".join((name, str(path.resolve()))) for name, path in map(named, self.models))
        )

    def places(self) -> list[Place]:
        """Where the models lie, and what is claimed of them.

        Raises:
            InputError: one is not whole, or not what its manifest says.
        """
        return [find(model, self._key) for model in self.models]

    def load(self) -> dict[str, ServedModel | LabelModel]:
        """The models, by name.

        Raises:
            InputError: one can't be loaded or served.
        """
        return load(self.places(), self._key, self.adapters_memory)

    @property
    def _key(self) -> MasterKey | None:
        return load_key(self.key_file or (FROM_ENVIRONMENT if os.environ.get(ENVIRONMENT) else ""))


def service_of(offer: Offer, keys: ApiKeys | None) -> Service:
    """A service with its models loaded.

    Args:
        offer: what it serves.
        keys: whose requests are taken; None: anybody's.

    Raises:
        InputError: a model can't be loaded or served.
    """
    served = offer.load()
    writing = {name: one for name, one in served.items() if isinstance(one, ServedModel)}
    room = offer.slots * max((model.context_length for model in writing.values()), default=1)
    limits = EngineLimits(offer.slots, room, _WAITING * offer.slots)
    engine = Engine({name: one.voice for name, one in writing.items()}, limits)
    return Service(served, engine, keys, offer.timeout_s, offer.most)
