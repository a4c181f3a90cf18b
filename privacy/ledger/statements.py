"""What a silo signs for others: a receipt for its ledger's head, and its statement of a finished run. Both are public.

A signature is over the canonical JSON of all other fields. It shows that the owner of ``public_key`` said so; whose key
that is has to be known from elsewhere.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from configs.errors import InputError
from configs.parse import json_object, parse
from configs.storage.files import canonical_json
from privacy.signing import Signer, signature_holds

LARGEST_STATEMENT_BYTES = 2**20
AUDIT_DATASET: Literal["canaries in public text"] = "canaries in public text"
Name = Annotated[str, Field(max_length=255)]
Hexadecimal = Annotated[str, Field(max_length=128)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Spent = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[int, Field(ge=1, le=2**53)]
Counted = Annotated[int, Field(ge=0, le=2**53)]


class Spend(BaseModel):
    """One reservation, under the hash of its entry: the same spend has the same name in every receipt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entry: Hexadecimal
    epsilon: Spent
    delta: Spent


class Signed(BaseModel):
    """A silo's signed document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    silo: Name
    dataset: Name
    public_key: Hexadecimal
    signature: Hexadecimal = ""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a mandate where there is none: earlier versions had no field for it."""
        found: dict[str, Any] = write(self)
        return found if found.get("mandate", True) else {name: found[name] for name in found if name != "mandate"}

    def signed(self, signer: Signer) -> Self:
        """The same with its signature."""
        return self.model_copy(update={"signature": signer.sign(self._message())})

    def holds(self) -> bool:
        """Whether the signature was made over these fields by the owner of ``public_key``."""
        return signature_holds(self.public_key, self._message(), self.signature)

    def _message(self) -> bytes:
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    def to_bytes(self) -> bytes:
        """Canonical JSON, the signature in it."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> Self:
        """Reads what ``to_bytes`` wrote. The signature is not looked at.

        Raises:
            InputError: it is something else, or longer than a megabyte.
        """
        if len(content) > LARGEST_STATEMENT_BYTES:
            raise InputError(f"{origin}: {len(content)} bytes, a signed document has at most {LARGEST_STATEMENT_BYTES}")
        return parse(cls, json_object(content, origin), origin)


class Receipt(Signed):
    """What a silo shows for its ledger's head.

    Attributes:
        run: whose reservation it tells of; empty in an anchor.
        number: the newest entry.
        head: hash of that entry.
        epoch: how often the ledger has been reconciled.
        plan_digest: of the plan that the run reserved. Where it has reserved none the next three are zero, and this is
            of the plan for clients that it was entrusted with under a mandate, or empty.
        public_record_count: what the steward declared then.
        epsilon_reserved: of the run.
        delta_reserved: of the run.
        epsilon_left: what no run has reserved yet.
        delta_left: the same for delta.
        mandate: digest of the mandate that covers the run; empty where the silo asked for none.
        spends: everything that the dataset has ever spent. From sums alone nobody could tell which spends of a file
            that was put back are lost: two branches of a ledger may have spent different things.
    """

    kind: Literal["receipt"] = "receipt"
    run: Name
    number: Number
    head: Hexadecimal
    epoch: Counted
    plan_digest: Hexadecimal
    public_record_count: Counted
    epsilon_reserved: Spent
    delta_reserved: Spent
    epsilon_left: Finite
    delta_left: Finite
    mandate: Hexadecimal = ""
    spends: Annotated[tuple[Spend, ...], Field(max_length=10_000)]


class RunStatement(Signed):
    """What a silo states of a closed run.

    Attributes:
        run: the run.
        plan_digest: of the plan that it reserved.
        public_record_count: what the steward declared.
        epsilon: reserved for the whole schedule.
        delta: the same.
        rounds_charged: rounds that were charged, and so may have been released.
        number: the entry that closed the run.
        head: hash of that entry.
        attests_disjoint_units: the steward's word that its units appear in no other silo.
        seed_source: where the seeds of the run's charges came from.
        versions: of the libraries that sampled, clipped, added noise and accounted.
        mandate: digest of the mandate that covered the run; empty where the silo asked for none.
    """

    kind: Literal["statement"] = "statement"
    run: Name
    plan_digest: Hexadecimal
    public_record_count: Number
    epsilon: Spent
    delta: Spent
    rounds_charged: Counted
    number: Number
    head: Hexadecimal
    attests_disjoint_units: bool
    seed_source: Literal["operating system", "injected", "not recorded"]
    versions: Annotated[dict[Name, Name], Field(max_length=100)]
    mandate: Hexadecimal = ""


class AuditedScore(BaseModel):
    """How often one way of looking guessed right; see ``privacy.audit.bound.Finding``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["gradient_white_box", "example_white_box", "example_black_box"]
    canaries: Annotated[int, Field(ge=1, le=1_000_000)]
    guesses: Annotated[int, Field(ge=0)]
    correct: Annotated[int, Field(ge=0)]
    share: Annotated[float, Field(gt=0, le=1)]


class AuditStatement(Signed):
    """What the simulated silo of an audit states of it: the counts, from which everybody computes the bound.

    Attributes:
        run: the audit's own run.
        plan_digest: of the plan that was audited.
        design_digest: of all that was fixed before its first step.
        earlier_audits: audits of the same run that are kept beside it: the best of many would show nothing.
        scores: every way of looking that was tried.
    """

    kind: Literal["audit"] = "audit"
    dataset: Literal["canaries in public text"] = AUDIT_DATASET
    run: Name
    plan_digest: Hexadecimal
    design_digest: Hexadecimal
    earlier_audits: Annotated[int, Field(ge=0)]
    scores: Annotated[tuple[AuditedScore, ...], Field(min_length=1, max_length=100)]
