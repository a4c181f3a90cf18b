"""A silo's update for a run with clients as units: clipped as a whole, without noise of the silo's own.

Reached only for a run that was entrusted with such updates, which the steward's ``policy.units`` has to allow. A run
that reserved a plan about records has no such entry, and so nothing here answers it.
"""

import numpy as np

from configs.schema.silo import SiloConfig
from federated.adapters.arrays import Arrays
from federated.protocol import silo_pb2 as pb
from federated.silo.local_training import plain_update
from federated.silo.policy import check_contribution, check_model, check_optimizer
from federated.silo.workbench import Workbench
from privacy.ledger.client_runs import record_update
from privacy.ledger.journal import Journal
from privacy.mechanism.client_sum import clipped
from privacy.mechanism.sampler import one_example_each
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan import PlanTerms
from trainer.tasks.task import Encoded


def contribution(
    workbench: Workbench, journal: Journal, config: SiloConfig, plan: PlanTerms, request: pb.Request, digest: str
) -> Arrays:
    """The clipped update of one round.

    Nothing of it is stored: all that is random comes from the request's digest, so that the same request has the same
    answer. Batches that can be predicted cost nothing here, where no guarantee rests on them.

    Args:
        workbench: the silo's.
        journal: of its ledger, which records the update before it is computed.
        config: the silo, with its policy of now.
        plan: what the run was entrusted with.
        request: of a round.
        digest: of its body.

    Raises:
        PolicyRefusal: a rule of the policy, or the run may not ask for this round.
    """
    asked, policy = request.contribute, config.policy
    check_contribution(asked, policy)
    check_model(asked.train, policy, workbench.base_model.content_digest)
    check_optimizer(asked.train, policy)
    model, adapter = workbench.fitted(asked.train, policy)
    settings, examples = workbench.local_settings(asked.train, policy), workbench.examples(asked.train)
    # Signed before anything is computed, as a charge is: an entry too many claims less privacy than there is.
    run, coordinator = request.run_id, request.coordinator
    record_update(journal, run, coordinator, request.request_id, digest, asked.train.round)
    streams, units = Streams(bytes(SEED_BYTES), digest), examples.records

    def batch(step: int) -> list[Encoded]:
        drawn = streams.generator("batch", step).random(len(units)) < asked.sampling_rate
        return one_example_each(streams, step, units, map(int, np.flatnonzero(drawn)), settings.augment)

    batches = (batch(step) for step in range(asked.local_steps))
    expected = asked.sampling_rate * config.silo.public_record_count
    update = plain_update(batches, expected, model, examples.task, adapter, settings)
    short = clipped(update, plan.max_grad_norm)
    return {name: array.astype(np.float32) for name, array in short.items()}
