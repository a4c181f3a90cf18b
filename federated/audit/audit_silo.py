"""The simulated silo of an audit: a key and a ledger of its own, to which the audit's rounds are charged.

What it signs is about canaries in public text: its ledger is no dataset's, and its epsilon nobody's budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from privacy.audit.bound import Finding
from privacy.certificate.certificate import certificate, library_versions
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from privacy.ledger.statements import AUDIT_DATASET, AuditedScore, AuditStatement, RunStatement
from privacy.plan import PrivacyPlan

_SILO = "audit"


@dataclass(frozen=True)
class AuditSilo:
    """One audit's silo. Open it with ``AuditSilo.open``.

    Attributes:
        ledger: its own.
        plan: the plan that is audited, reserved as a whole.
        run_id: the audit's run.
        design_digest: of all that was fixed beforehand; the rounds' seeds are bound to it.
    """

    ledger: Ledger
    plan: PrivacyPlan
    run_id: str
    design_digest: str

    @classmethod
    def open(cls, state_dir: Path, plan: PrivacyPlan, run_id: str, design_digest: str) -> "AuditSilo":
        """Starts the ledger and reserves the plan."""
        budget = Budget(plan.terms.epsilon, plan.terms.delta)
        ledger = Ledger.open(state_dir, _SILO, AUDIT_DATASET, budget)
        ledger.reserve(run_id, plan)
        return cls(ledger, plan, run_id, design_digest)

    def close(self) -> None:
        """Closes the ledger's file."""
        self.ledger.close_file()

    def seed(self, round_number: int) -> bytes:
        """Charges a round, from 1 on, and gives the seed that was drawn for it.

        Raises:
            PolicyRefusal: the plan has no such round, or it is charged under another design.
        """
        charge = self.ledger.charge(self.run_id, f"round-{round_number}", self.design_digest, round_number)
        return cast("bytes", charge.seed)  # nothing stores a reply here

    def certificate(self, findings: Sequence[Finding], earlier_audits: int) -> dict[str, Any]:
        """Closes the run, which erases its seeds, and makes its certificate with the audited bound.

        Args:
            findings: of every score that was tried on the plan.
            earlier_audits: audits of the same run before this one.
        """
        journal, receipt = self.ledger.journal, self.ledger.close(self.run_id)
        statement = self.ledger.statement(self.run_id, library_versions(), attests_disjoint_units=True)
        closed = cast("RunStatement", statement)
        scores = tuple(AuditedScore(**{name: vars(f)[name] for name in AuditedScore.model_fields}) for f in findings)
        audit = AuditStatement(
            silo=_SILO,
            public_key=self.ledger.public_key,
            run=self.run_id,
            plan_digest=self.plan.terms.digest,
            design_digest=self.design_digest,
            earlier_audits=earlier_audits,
            scores=scores,
        ).signed(journal.signer)
        silo = {
            "dataset_id": AUDIT_DATASET,
            "public_key": self.ledger.public_key,
            "public_record_count": self.plan.public_record_count,
            "receipt": receipt.model_dump(mode="json"),
            "statement": closed.model_dump(mode="json"),
            "audit": audit.model_dump(mode="json"),
        }
        return certificate(self.run_id, self.plan.terms, {_SILO: silo}, None)
