"""One round's aggregation: what each silo is sent, how its update is folded in, and what becomes of all of them."""

from dataclasses import dataclass

from configs.errors import InputError
from configs.schema.base import LARGEST_ADAPTER_VALUE, named_as
from configs.schema.federated import ROBUST, FederatedSettings
from federated.adapters.arrays import Arrays, check_update
from federated.adapters.lora_factors import change, cut, factored, frozen, products
from federated.aggregation.anchor import Anchor
from federated.aggregation.control_variates import ControlVariates
from federated.aggregation.exact_sum import FixedPointSum
from federated.aggregation.robust_means import HeldUpdates
from federated.aggregation.server_optimizers import server_step
from privacy.mechanism.client_sum import ClippedSum
from privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Sent:
    """What one silo trains on.

    Attributes:
        rank: of its adapter.
        alpha: scale of its adapter; with its rank it makes the same factor for every silo.
        adapter: the weights that are trained, and travel back.
        frozen: those that travel there alone, since they don't train in this round.
        correction: what its steps add to each gradient: SCAFFOLD's variates, or the anchor's share; else empty.
    """

    rank: int
    alpha: float
    adapter: Arrays
    frozen: Arrays
    correction: Arrays


def _rank_of(silo: str, settings: FederatedSettings) -> int:
    name = named_as(silo, settings.lora_ranks)
    return settings.lora_rank if name is None else settings.lora_ranks[name]


class RoundAggregation:
    """Folds the updates of one round as they come; their order doesn't matter.

    Memory doesn't grow with the silos, but for the robust means (``max_silos``) and for SCAFFOLD's variates.

    Args:
        settings: how to aggregate.
        adapter: the whole shared adapter before the round, A and B.
        state: what ``result`` returned with it; empty before the first round.
        num_silos: silos of the federation, whoever answers.
        clients: the aggregator's plan, where clients are the units: then their clipped sum is all that is folded, and
            its noised mean takes the place of the mean.
        held_back: names of what stays as it is in this round, to the bit, with its state.
    """

    def __init__(
        self,
        settings: FederatedSettings,
        adapter: Arrays,
        state: Arrays,
        num_silos: int,
        clients: PrivacyPlan | None = None,
        held_back: frozenset[str] = frozenset(),
    ) -> None:
        self._settings, self._adapter, self._state, self._held_back = settings, adapter, state, held_back
        self._weights = {name: array for name, array in adapter.items() if self._trains(name)}
        if settings.adapters == "product":
            self._weights = products(self._weights)
        self._fold: ClippedSum | FixedPointSum | HeldUpdates
        if clients is not None:
            self._fold = ClippedSum(self._weights, clients)
        elif settings.aggregation in ROBUST:
            self._fold = HeldUpdates(self._weights, settings)
        else:
            self._fold = FixedPointSum(self._weights)
        self._variates: ControlVariates | None = None
        self._anchor = Anchor(settings.anchor, self._weights, state) if settings.anchor else None
        if settings.aggregation == "scaffold":
            path = settings.learning_rate * settings.local_steps
            self._variates = ControlVariates(self._weights, state, path, num_silos)

    def _trains(self, name: str) -> bool:
        return name not in self._held_back and (self._settings.adapters != "ffa" or not frozen(name))

    def sent(self, silo: str) -> Sent:
        """What a silo trains on."""
        settings = self._settings
        rank = _rank_of(silo, settings)
        whole = cut(self._adapter, rank)
        return Sent(
            rank=rank,
            alpha=settings.lora_alpha * rank / settings.lora_rank,
            adapter=self.travels(silo),
            frozen={name: array for name, array in whole.items() if name in self._held_back},
            correction=self._correction(silo),
        )

    def travels(self, silo: str) -> Arrays:
        """The weights that a silo trains, of whose change its update is."""
        whole = cut(self._adapter, _rank_of(silo, self._settings))
        return {name: array for name, array in whole.items() if self._trains(name)}

    def _correction(self, silo: str) -> Arrays:
        if self._variates:
            return self._variates.correction(silo)
        return self._anchor.correction() if self._anchor else {}

    def add(self, silo: str, update: Arrays, weight: float = 1.0) -> None:
        """Folds one silo's update in: its adapter after its steps minus before.

        Args:
            silo: whose it is.
            update: the arrays.
            weight: what they are multiplied by, of an update that comes late to a buffer; for the mean alone.

        Raises:
            ValueError: it doesn't fit what the silo was sent, or isn't finite; nothing of it is folded in. With clients
                as units see ``ClippedSum.add``.
        """
        if self._settings.adapters == "product":
            before = self.sent(silo).adapter
            check_update(update, before)
            update = change(before, update)
        if self._variates:
            check_update(update, self._weights)
            self._variates.add(silo, update)  # before anything is folded: it may refuse the update
        if isinstance(self._fold, ClippedSum):
            self._fold.add(silo, update)
        elif isinstance(self._fold, FixedPointSum):
            self._fold.add(update, weight)
        else:
            self._fold.add(update)

    @property
    def clipped_sum(self) -> ClippedSum:
        """What was folded, with clients as units; nothing but its noised mean may be used."""
        if not isinstance(self._fold, ClippedSum):
            raise TypeError("only with clients as units there is a clipped sum")
        return self._fold

    def result(self) -> tuple[Arrays, Arrays]:
        """The whole shared adapter after the round, and the state that the next round continues from."""
        if isinstance(self._fold, ClippedSum):
            raise TypeError("with clients as units nothing without noise becomes of their updates")
        return self.after(self._fold.mean())

    def after(self, mean: Arrays) -> tuple[Arrays, Arrays]:
        """The same for a mean update that was computed from ``clipped_sum``, or stored before."""
        after, state = server_step(self._settings, self._weights, mean, self._state)
        if self._variates:
            state = self._variates.after(mean, self._fold.count)
        if self._anchor:
            state = {**state, **self._anchor.state}
        if self._settings.adapters == "product":
            after = factored(after, self._settings.lora_rank)
        return _sendable({**self._adapter, **after}), {**self._state, **state}


def _sendable(adapter: Arrays) -> Arrays:
    """Cuts an adapter to values that silos accept: one silo's false update must not end the run for all others."""
    return {name: array.clip(-LARGEST_ADAPTER_VALUE, LARGEST_ADAPTER_VALUE) for name, array in adapter.items()}


def check_size(settings: FederatedSettings, num_silos: int) -> None:
    """Refuses more silos than a rule that holds all updates may hold, and a buffer that they can't fill.

    Raises:
        InputError: there are more; or each step takes more updates than there are silos, each of which gives one update
            a round at most.
    """
    if settings.buffer > num_silos:
        raise InputError(
            f"federated.buffer is {settings.buffer}: there are {num_silos} silos, each of which gives federated.rounds "
            f"updates at most; give {num_silos}, or less where some are slow"
        )
    if settings.aggregation in ROBUST and num_silos > settings.max_silos:
        raise InputError(
            f"federated.max_silos is {settings.max_silos}: there are {num_silos} silos, and {settings.aggregation!r} "
            "holds all their updates at once; raise it, or give another federated.aggregation"
        )
