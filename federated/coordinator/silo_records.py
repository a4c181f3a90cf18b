"""What each silo of a run says of itself and signs: checked when it comes, and kept for the certificate.

A receipt or a statement that is not exactly what the plan and the silo's own first words give is an error, which
rejects the reply that brought it. So nothing is folded without a receipt that a certificate can be made of, and no silo
whose update is in the model can be missing there.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from configs.errors import InputError, SiloweaveError
from configs.parse import json_object, parse
from configs.storage.files import canonical_json
from federated.protocol import silo_pb2 as pb
from privacy.certificate.signed_parts import (
    check_closing,
    check_entrusted,
    check_history,
    check_mandate,
    check_receipt,
    check_statement,
    position,
)
from privacy.ledger.statements import Receipt, RunStatement
from privacy.plan import PlanTerms

_FACTS = ("dataset_id", "public_key", "public_record_count")
_SILOS_SHOWN = 10  # of those with the least left


class SiloRecords:
    """The silos of one run.

    Args:
        run_id: the run.
        plan: what each silo reserves; with clients as units, what it is entrusted with.
        signed: False for the comparison without DP, where silos sign nothing.
    """

    def __init__(self, run_id: str, plan: PlanTerms, *, signed: bool) -> None:
        self.silos: dict[str, dict[str, Any]] = {}
        self._run_id, self._plan, self._signed = run_id, plan, signed

    def restore(self, silos: dict[str, dict[str, Any]], origin: str) -> None:
        """Takes up what was committed: who has spent or stated stays in the certificate, whoever is there today.

        Where a silo was restored before, from the newest round, what goes with the newer of both receipts is kept.

        Args:
            silos: as ``silos`` was.
            origin: where they were read, for the message.

        Raises:
            InputError: a receipt or a statement there is not of this run and its plan, and so no certificate could be
                made.
        """
        for name, silo in silos.items():
            receipt = self._kept(name, silo, f"{origin}: {name}") if self._signed and "receipt" in silo else None
            held = self._receipt(name) if name in self.silos else None
            if receipt is None or held is None or position(receipt) >= position(held):
                self.silos[name] = silo

    def _kept(self, name: str, silo: dict[str, Any], origin: str) -> Receipt:
        """The receipt of what was committed of a silo, once it and the statement are found sound."""
        where = f"{origin}.receipt"
        receipt = parse(Receipt, silo["receipt"], where)
        check_mandate(silo, name, self._plan, self._spent(receipt), f"{origin}.mandate")
        self._check(name, silo, receipt, where)
        if "statement" in silo:
            where = f"{origin}.statement"
            statement = parse(RunStatement, silo["statement"], where)
            self._check_statement(name, silo, statement, receipt, where)
        return receipt

    def describe(self, silo: str, described: pb.Described) -> None:
        """Takes a silo's description in. Once it has signed a receipt, its description stays as it was.

        Raises:
            ValueError: its key or its dataset is another than that of its receipts.
        """
        found = {name: getattr(described, name) for name in _FACTS}
        known = self.silos.get(silo, {})
        if "receipt" not in known:
            self.silos[silo] = found
            return
        for name in ("dataset_id", "public_key"):
            if found[name] != known[name]:
                raise ValueError(f"silo {silo!r}: its {name} was {known[name]!r} and is {found[name]!r} now")

    def take_reservation(self, silo: str, reserved: pb.Reserved, study: str, coordinator: str) -> None:
        """Keeps what a silo has signed for a reservation: its receipt, and the mandate that covers the run.

        Args:
            silo: its name.
            reserved: its reply.
            study: in whose name the run asks.
            coordinator: the public key of who asks.

        Raises:
            InputError: a field of one of them is wrong, or they don't fit together.
        """
        if not self._signed:
            return
        if reserved.mandate:
            where = f"mandate of silo {silo}"
            facts = {**self.silos[silo], "mandate": json_object(reserved.mandate, where)}
            receipt = Receipt.from_bytes(reserved.receipt, f"receipt of silo {silo}")
            check_mandate(facts, silo, self._plan, self._spent(receipt), where)
            for field, asked in (("study", study), ("coordinator", coordinator)):
                if (found := facts["mandate"]["terms"][field]) != asked:
                    raise InputError(f"{where}.terms.{field} is {found!r}, and the run asks as {asked or 'none'!r}")
            self._check(silo, facts, receipt, f"receipt of silo {silo}")
            self.silos[silo] = facts
        self.take_receipt(silo, reserved.receipt)

    def take_receipt(self, silo: str, content: bytes) -> None:
        """Keeps a silo's newest receipt: it goes back to the silo with the next request, and into the certificate.

        A restart may bring an older one again, with the reply that it was stored with.

        Raises:
            InputError: a field of it is wrong.
        """
        if not self._signed:
            return
        where = f"receipt of silo {silo}"
        receipt = Receipt.from_bytes(content, where)
        self._check(silo, self.silos[silo], receipt, where)
        held = self._receipt(silo)
        if held is not None:
            check_history(held, receipt, where)
        if held is None or position(receipt) >= position(held):
            if "statement" in self.silos[silo]:
                stated = RunStatement.model_validate(self.silos[silo]["statement"])
                check_closing(stated, receipt, f"statement of silo {silo}")
            self.silos[silo]["receipt"] = receipt.model_dump(mode="json")

    def take_statement(self, silo: str, content: bytes, rounds: int) -> None:
        """Keeps a silo's closing statement, where there is one: of clients as units none is used.

        Args:
            silo: its name.
            content: as it came.
            rounds: of how many rounds the model has this silo's update.

        Raises:
            InputError: a field of it is wrong.
        """
        held = self._receipt(silo)
        if held is None or not content or self._plan.unit == "client":
            return
        where = f"statement of silo {silo}"
        statement = RunStatement.from_bytes(content, where)
        self._check_statement(silo, self.silos[silo], statement, held, where)
        if statement.rounds_charged < rounds:
            raise InputError(f"{where}.rounds_charged is {statement.rounds_charged}, but it has released {rounds}")
        self.silos[silo]["statement"] = statement.model_dump(mode="json")

    def held(self, silo: str) -> bytes:
        """A silo's newest receipt, as it goes back to it; nothing where there is none."""
        receipt = self.silos.get(silo, {}).get("receipt")
        return canonical_json(receipt) if receipt else b""

    def epsilon_left(self) -> float | None:
        """The least that a silo has left of its dataset's budget, by the receipts; None where there is none."""
        receipts = [silo["receipt"] for silo in self.silos.values() if "receipt" in silo]
        return min((receipt["epsilon_left"] for receipt in receipts), default=None)

    def cost_anew(self) -> str:
        """What another reservation of the plan costs, in words, beside what the silos have left by their receipts."""
        if not self._signed:
            return "reserves nothing"
        price = f"reserves epsilon {self._plan.epsilon:.4g} at delta {self._plan.delta:g} again"
        if self._plan.unit == "client":
            return f"{price} in the coordinator's own ledger"
        receipts = {name: silo["receipt"] for name, silo in self.silos.items() if "receipt" in silo}
        left = sorted((receipt["epsilon_left"], name) for name, receipt in receipts.items())
        told = [f"{name} {epsilon:.4g}" for epsilon, name in left[:_SILOS_SHOWN]]
        more = [f"{len(left) - _SILOS_SHOWN} others as much or more"] if len(left) > _SILOS_SHOWN else []
        return (
            f"{price} at each silo (epsilon left by their receipts: {', '.join([*told, *more]) or 'none has come yet'})"
        )

    def for_certificate(self, contributors: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Every silo that has reserved, whether the model has an update of it or not.

        Args:
            contributors: silos whose updates the model has.

        Raises:
            SiloweaveError: the model has an update of a silo without a receipt. No certificate may leave it out.
        """
        reserved = {name: silo for name, silo in self.silos.items() if "receipt" in silo}
        missing = sorted(set(contributors) - set(reserved))
        if missing:
            raise SiloweaveError(
                f"certificate: the model has updates of {', '.join(missing)} and no receipt that says what they spent; "
                "no certificate can be made of this run"
            )
        return reserved

    def mandated(self) -> dict[str, dict[str, Any]]:
        """What shows that the mandate of each silo that has one covers a run with clients as units."""
        fields = ("dataset_id", "public_key", "mandate", "receipt")
        under = {name: silo for name, silo in self.silos.items() if "mandate" in silo and "receipt" in silo}
        return {name: {field: silo[field] for field in fields} for name, silo in under.items()}

    def _spent(self, receipt: Receipt) -> float:
        """What counts for a mandate's budget; with clients as units, what the aggregator's plan claims."""
        return receipt.epsilon_reserved if self._plan.unit == "record" else self._plan.epsilon

    def _receipt(self, silo: str) -> Receipt | None:
        found = self.silos[silo].get("receipt")
        return Receipt.model_validate(found) if found else None

    def _check(self, name: str, silo: Mapping[str, Any], receipt: Receipt, where: str) -> None:
        if self._plan.unit == "record":
            check_receipt(receipt, silo, name, self._run_id, self._plan, where)
            return
        check_entrusted(receipt, silo, name, self._run_id, self._plan, where)

    def _check_statement(
        self, name: str, silo: Mapping[str, Any], statement: RunStatement, receipt: Receipt, where: str
    ) -> None:
        check_statement(statement, silo, name, self._run_id, self._plan, where)
        check_closing(statement, receipt, where)
