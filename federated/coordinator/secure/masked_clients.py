"""A round's sum with clients as units: the aggregator sees the clients' updates as words of one sum, and adds noise."""

from dataclasses import dataclass, field

from federated.adapters.arrays import Arrays
from federated.aggregation.secure_sum import arrays_of
from federated.coordinator.secure.secure_rounds import RoundSum
from privacy.mechanism.masked_clients import noised_client_mean
from privacy.mechanism.streams import Streams
from privacy.plan import PrivacyPlan
from privacy.secagg.encoding import Words


@dataclass
class MaskedClients:
    """What ``ClippedSum`` is to updates that come by themselves.

    Attributes:
        opened: the round's sum.
        plan: of the aggregator.
    """

    opened: RoundSum
    plan: PrivacyPlan
    _total: Words = field(init=False)

    def ask(self) -> list[str]:
        """Has the clients train and adds their words up; returns whose are in the sum.

        Raises:
            PolicyRefusal: too few have trained, because policies refuse.
            SiloweaveError: too few are left, or the sum is lost.
        """
        self._total, survivors = self.opened.run()
        encoding = self.opened.one.agreement.encoding
        cut = len(survivors) * encoding.clip / encoding.largest  # each client's value by less than a step
        self.opened.tell(survivors, error_bound=cut / self.plan.terms.num_clients)
        return survivors

    def noised_mean(self, streams: Streams) -> Arrays:
        """The sum with its noise over the plan's number of clients."""
        encoding, like = self.opened.one.agreement.encoding, self.opened.sent.adapter
        return arrays_of(noised_client_mean(self._total, self.plan, encoding, streams), like)
