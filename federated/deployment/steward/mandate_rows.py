"""A silo's mandates for its steward: whose each is, for what and how long, and what its study has reserved."""

from typing import Any

from configs.schema.silo import SiloConfig
from federated.deployment.steward.ledger_look import Looked
from federated.silo.mandates.folder import REVOKED, Mandates
from privacy.ledger.limits import spent_by
from privacy.mandate import Mandate

Row = dict[str, Any]


def mandate_rows(settings: SiloConfig, looked: Looked) -> list[Row]:
    """All of them, those in force first."""
    return [mandate_row(*one, looked.bodies) for one in Mandates.of(settings, looked.public_key).listed()]


def mandate_row(study: str, state: str, found: Mandate | None, bodies: list[dict[str, Any]]) -> Row:
    """One mandate; without its terms where its file can't be used."""
    if found is None:
        return {"study": study, "state": state}
    spent = spent_by(bodies, found.terms.study)
    return {
        "study": study,
        "state": state,
        "digest": found.digest,
        "issued": found.issued.isoformat(timespec="seconds"),
        "epsilon_reserved": spent.epsilon,
        "delta_reserved": spent.delta,
        "terms": found.terms.model_dump(mode="json"),
    }


def how_it_stands(row: Row) -> str:
    """A mandate in one line, without its study's name."""
    if "terms" not in row:
        return str(row["state"])
    terms = row["terms"]
    unit = "clients as units, " if terms["unit"] == "client" else ""
    return (
        f"{row['state']}, {unit}until {terms['expires']}, of coordinator {terms['coordinator'][:16]}…, "
        f"epsilon {row['epsilon_reserved']:.4g} of {terms['budget_epsilon']:g} reserved: {terms['purpose']}"
    )


def is_revoked(row: Row) -> bool:
    """Whether its steward has taken it back."""
    return str(row["state"]).startswith(REVOKED)
