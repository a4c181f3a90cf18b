"""The certificate: what a run claims, in one document that can be checked offline."""

from collections.abc import Mapping
from typing import Any

from privacy.plan import PlanRequest

CERTIFICATE_VERSION = 1

_NOT_COVERED = [
    "not audited: no empirical lower bound was measured",
    "timing: how long a reply takes depends on the size of its batch",
    "a silo whose own machine or key is in the hands of the adversary",
    "rewriting of a whole ledger by the owner of its key, and an old copy of a whole ledger put back",
    "a coordinator that is not who it says: requests are not signed yet",
    "float32 rounding inside the clipped sum: one record may change how the others' contributions are rounded",
    "the release of the same person's records by several silos, beyond the sum over silos",
]


def certificate(run_id: str, plan: PlanRequest, silos: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a finished run claims.

    Args:
        run_id: the run.
        plan: the plan that every silo reserved.
        silos: public facts of each silo that has reserved, its last ``receipt`` among them, by name.

    Returns:
        A JSON document. ``epsilon`` is for a unit that is in one silo; ``epsilon_sum`` is the claim for one that may
        be in all of them.
    """
    guarantee = plan.guarantee()
    return {
        "version": CERTIFICATE_VERSION,
        "run_id": run_id,
        "unit": plan.unit,
        "relation": plan.relation,
        "plan": plan.model_dump(),
        "plan_digest": plan.digest,
        "delta": plan.delta,
        "epsilon": guarantee.epsilon,
        "epsilon_sum": guarantee.epsilon * len(silos),
        "delta_sum": plan.delta * len(silos),
        "epsilon_optimistic": guarantee.epsilon_optimistic,
        "epsilon_rdp": guarantee.epsilon_rdp,
        "epsilon_prv": guarantee.epsilon_prv,
        "accountant": "dp-accounting PLD, pessimistic",
        "seeds": "operating system, one a charge, erased when the reply is stored",
        "left_each_silo": "one noised adapter update a round; no loss, norm or count",
        "silos": {name: dict(silo) for name, silo in silos.items()},
        "not_covered": _NOT_COVERED,
    }
