"""The coordinator as a trusted aggregator: with clients as units it adds the noise, and keeps the ledger.

It sees the clients' updates, in memory; what it writes, commits, sends or logs is made of noised sums alone. Order of a
round: charge, ask, fold, store the noised mean and erase the seed, and only then use it. So a crash at any instant
repeats the same noise or finds the stored mean, and a round that too few answer is abandoned and stays charged.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError, SiloweaveError
from configs.schema.rounds.privacy import PrivacySettings
from configs.storage.files import digest_json
from configs.storage.layout import SiloFiles
from federated.adapters.arrays import Arrays, from_bytes, to_bytes
from federated.coordinator.parties import Parties
from federated.identity.trust import COORDINATOR_KEY, coordinator_signer
from privacy.certificate.certificate import AGGREGATOR, library_versions
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger, SeedSource
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms, PrivacyPlan

MEMBERS = "members"


def open_ledger(
    home: Path, folder: Path, members: str, privacy: PrivacySettings, seeds: SeedSource | None = None
) -> Ledger:
    """The aggregator's ledger, signed with the coordinator's own key, which every steward has confirmed.

    Args:
        home: the coordinator's folder, with its key.
        folder: of the ledger. It outlives runs; a new one would be a new budget for the same clients.
        members: name of those whom the ledger is about.
        privacy: settings with the budget.
        seeds: for tests; None draws from the operating system.

    Raises:
        InputError: the ledger is damaged, an old one, another's, or signed with another key.
    """
    signer, key = coordinator_signer(home), SiloFiles(folder).key
    folder.mkdir(parents=True, exist_ok=True)
    if not key.is_symlink():
        key.symlink_to(os.path.relpath((home / COORDINATOR_KEY).resolve(), folder.resolve()))
    ledger = Ledger.open(folder, AGGREGATOR, members, Budget(privacy.budget_epsilon, privacy.budget_delta), seeds)
    if ledger.public_key != signer.public_key:
        raise InputError(f"{key}: is not the key of {home}; put the link to its {COORDINATOR_KEY} back")
    return ledger


@dataclass(frozen=True)
class Released:
    """A round's release.

    Attributes:
        mean: the noised sum over the plan's constant.
        answered: silos in it; none where the mean was stored before.
    """

    mean: Arrays
    answered: list[str]


class TrustedAggregator:
    """One run's share of the aggregator's ledger. Reserves the whole schedule at once.

    Args:
        ledger: the aggregator's.
        run_id: the run.
        plan: with clients as units.

    Raises:
        PolicyRefusal: more is asked for than the clients have left.
    """

    def __init__(self, ledger: Ledger, run_id: str, plan: PrivacyPlan) -> None:
        self.plan, self._ledger, self._run_id = plan, ledger, run_id
        self._ledger.reserve(run_id, plan)

    def round(
        self,
        round_number: int,
        inputs: dict[str, str],
        ask: Callable[[], list[str]],
        noised_mean: Callable[[Streams], Arrays],
    ) -> Released:
        """Charges a round, has the clients asked, and releases the noised mean of what they sent.

        Args:
            round_number: 1 to the plan's rounds.
            inputs: digests of everything that the round starts from; the seed is bound to them.
            ask: asks the silos, adds their updates up, and returns those who answered; raises where they are too few.
                Not called where the round was released before.
            noised_mean: gives the mean of what was added up, with the noise of the charge's streams.

        Raises:
            PolicyRefusal: the round was charged with other inputs, or the run is closed.
        """
        digest = digest_json({"run": self._run_id, "round": str(round_number), **inputs})
        charge = self._ledger.charge(self._run_id, f"round-{round_number}", digest, round_number)
        if charge.reply is not None:
            return Released(from_bytes(charge.reply), [])
        streams, answered = charge.streams(digest), ask()
        mean = to_bytes(noised_mean(streams))
        # What is stored is what counts, should another process have been faster.
        return Released(from_bytes(self._ledger.release(charge.number, self._run_id, mean)), answered)

    def close(self) -> dict[str, Any]:
        """Ends the run, and tells of it: the ledger's owner, its receipt and its statement, both signed."""
        receipt = self._ledger.close(self._run_id)
        statement = self._ledger.statement(self._run_id, library_versions(), attests_disjoint_units=False)
        if statement is None:
            raise SiloweaveError(f"run {self._run_id} is not in the aggregator's ledger")
        return {
            "dataset_id": statement.dataset,
            "public_key": statement.public_key,
            "public_record_count": statement.public_record_count,
            "receipt": receipt.model_dump(mode="json"),
            "statement": statement.model_dump(mode="json"),
        }


def new_aggregator(parties: Parties, run_id: str, terms: PlanTerms) -> TrustedAggregator | None:
    """The aggregator of a run with clients as units; None where records are, whose noise the silos add.

    Raises:
        InputError: there are more silos than the plan has clients, or no ledger.
        PolicyRefusal: the run asks for more than the clients have left.
    """
    if terms.unit == "record":
        return None
    if parties.num_silos > terms.num_clients:
        raise InputError(
            f"privacy.num_clients is {terms.num_clients}: there are {parties.num_silos} silos; give at least that"
        )
    if parties.open_ledger is None:
        raise InputError("privacy.unit is 'client': this coordinator has no ledger; give 'record'")
    return TrustedAggregator(parties.open_ledger(), run_id, terms.for_clients())
