"""A mandate's terms as a steward would write them for the silo of ``silo_requests.ward``, for tests."""

from datetime import UTC, datetime

from silo_requests import COORDINATOR

from privacy.ledger.limits import Limits
from privacy.mandate import Mandate, MandateTerms

STUDY = "ward-notes"


def terms(base_model="ab" * 32, **changes):
    """What a study may ask for."""
    given = {
        "study": STUDY,
        "purpose": "Notes of one ward, to find late referrals",
        "coordinator": COORDINATOR.public_key,
        "recipients": ("the ward",),
        "expires": "2105-12-31",
        "base_models": (base_model,),
        "task": "causal",
        "budget_epsilon": 10.0,
        "budget_delta": 5e-5,
        "min_noise_multiplier": 0.8,
        "max_sampling_rate": 0.05,
        "max_steps_per_round": 4,
        "max_rounds_per_run": 4,
    }
    return MandateTerms(**{**given, **changes})


def signed(signer, allowed=None, **changes):
    """A mandate of silo north with its dataset ward, signed with any key."""
    given = {"silo": "north", "dataset": "ward", "public_key": signer.public_key, "issued": datetime.now(tz=UTC)}
    return Mandate(**{**given, "terms": allowed or terms(), **changes}).signed(signer)


def stated(ledger, plan, mandate, replies=("a reply",)):
    """What a ledger signs of a closed run of this plan under a mandate, as a certificate has it."""
    key = COORDINATOR.public_key
    ledger.reserve("run-1", plan, Limits(study=mandate.limit), key)
    for number, reply in enumerate(replies, 1):
        charge = ledger.charge("run-1", f"round-{number}", "aa" * 32, number, coordinator=key)
        ledger.release(charge.number, "run-1", reply.encode())
    receipt = ledger.close("run-1", key)
    statement = ledger.statement("run-1", {"torch": "2"}, attests_disjoint_units=True, coordinator=key)
    return {
        "dataset_id": receipt.dataset,
        "public_key": ledger.public_key,
        "public_record_count": plan.public_record_count,
        "mandate": mandate.model_dump(mode="json"),
        "receipt": receipt.model_dump(mode="json"),
        "statement": statement.model_dump(mode="json"),
    }
