"""A silo's update for a run with clients as units: clipped as a whole, without noise of the silo's own.

Reached only for a run that was entrusted with such updates, which the steward's ``policy.units`` has to allow. A run
that reserved a plan about records has no such entry, and so nothing here answers it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs.errors import PolicyRefusal
from configs.schema.silo import SiloConfig
from federated.adapters.arrays import Arrays
from federated.protocol import silo_pb2 as pb
from federated.silo.local_training import plain_update
from federated.silo.masking.masking import RULE
from federated.silo.policy import check_contribution, check_model, check_optimizer
from federated.silo.workbench import Workbench
from privacy.ledger.client_runs import record_update
from privacy.ledger.journal import Journal
from privacy.mechanism.client_sum import clipped
from privacy.mechanism.masked_clients import client_words
from privacy.mechanism.sampler import one_example_each
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan import PlanTerms
from privacy.secagg.encoding import Encoding, Words
from trainer.tasks.task import Encoded


@dataclass
class Contribution:
    """What a round asks of a silo, which its policy allows.

    Attributes:
        workbench: the silo's.
        config: the silo, with its policy of now.
        plan: what the run was entrusted with.
        request: of a round.
        digest: of its body.
        model, adapter: what trains, and from where.

    Raises:
        PolicyRefusal: a rule of the policy.
    """

    workbench: Workbench
    config: SiloConfig
    plan: PlanTerms
    request: pb.Request
    digest: str
    model: Any = field(init=False)
    adapter: Arrays = field(init=False)

    def __post_init__(self) -> None:
        asked, policy = self.request.contribute, self.config.policy
        check_contribution(asked, policy)
        check_model(asked.train, policy, self.workbench.base_model.content_digest)
        check_optimizer(asked.train, policy)
        self.model, self.adapter = self.workbench.fitted(asked.train, policy)

    def update(self, journal: Journal) -> Arrays:
        """The clipped update of the round.

        Nothing of it is stored: all that is random comes from the request's digest, so that the same request has the
        same answer. Batches that can be predicted cost nothing here, where no guarantee rests on them.

        Args:
            journal: of the silo's ledger, which records the update before it is computed.

        Raises:
            PolicyRefusal: the run may not ask for this round.
        """
        self._record(journal)
        short = clipped(self._trained(), self.plan.max_grad_norm)
        return {name: array.astype(np.float32) for name, array in short.items()}

    def words(self, journal: Journal, encoding: Encoding) -> Words:
        """The same as words that leave under masks, once: the masks are lost with the process that drew them.

        Raises:
            PolicyRefusal: as above; or the silo has trained in this round before.
        """
        if not self._record(journal):
            number = self.request.contribute.train.round
            message = f"this silo was started again since it trained in round {number}, and so drops out of its sum"
            raise PolicyRefusal.of(RULE, f"round {number}", "a round that it has not trained in", message)
        return client_words(self._trained(), self.plan.max_grad_norm, encoding)

    def _record(self, journal: Journal) -> bool:
        """Signed before anything is computed, as a charge is: an entry too many claims less privacy than there is."""
        request, number = self.request, self.request.contribute.train.round
        told = request.run_id, request.coordinator, request.request_id, self.digest, number
        return record_update(journal, *told)

    def _trained(self) -> Arrays:
        asked, bench = self.request.contribute, self.workbench
        settings, examples = bench.local_settings(asked.train, self.config.policy), bench.examples(asked.train)
        streams, units = Streams(bytes(SEED_BYTES), self.digest), examples.records

        def batch(step: int) -> list[Encoded]:
            drawn = streams.generator("batch", step).random(len(units)) < asked.sampling_rate
            return one_example_each(streams, step, units, map(int, np.flatnonzero(drawn)), settings.augment)

        batches = (batch(step) for step in range(asked.local_steps))
        expected = asked.sampling_rate * self.config.silo.public_record_count
        return plain_update(batches, expected, self.model, examples.task, self.adapter, settings)
