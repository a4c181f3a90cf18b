"""A mandate's terms as a steward would write them for the silo of ``silo_requests.ward``, for tests."""

from datetime import UTC, datetime

from silo_requests import COORDINATOR

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
