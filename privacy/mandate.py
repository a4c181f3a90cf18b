"""The mandate of a study: who may ask a silo for what, signed by the silo's own key on its steward's word.

A silo with mandates answers nothing that none of them covers. What the study's runs spend together is bounded by the
ledger's own entries; everything else is in the document, which goes into the certificate of each run.
"""

from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Field,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from configs.errors import InputError
from configs.parse import json_object, parse
from configs.schema.base import Count, Digest, Positive, Probability, Settings, StudyName
from configs.schema.tasks import TaskLabels, TaskName
from configs.storage.files import digest_bytes
from privacy.ledger.limits import Study
from privacy.ledger.statements import LARGEST_STATEMENT_BYTES, Signed
from privacy.plan import PlanTerms

VERSION = 2
_SINCE_2 = {"unit": "record", "honest_silos": 0}  # of its terms, and what a mandate of before says without them


def _one_line(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError(f"{text[:100]!r} has signs that are not shown, or blanks around it; give one plain line")
    return text


Line = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_one_line)]


class MandateTerms(Settings):
    """What a mandate allows. The steward writes it; nothing in it widens what the silo's policy allows."""

    study: StudyName
    """Name of the study; a run asks in it by ``federated.study``."""
    purpose: Line
    """What the study is for, in one line; it is in the certificate of each run."""
    coordinator: Digest
    """Public key of the coordinator that may ask; the name under which `siloweave silo status` shows it will do."""
    recipients: Annotated[tuple[Line, ...], Field(min_length=1, max_length=100)]
    """Who may be given the model. People's word: no program sees to it."""
    expires: date
    """Last day on which the silo answers, in UTC: ``2027-06-30``."""
    base_models: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=100)]
    """Content digests of the base models that may be trained."""
    task: TaskName
    """What may be learnt; the policy has to allow it, too."""
    labels: TaskLabels = ()
    """Labels that may be learnt, in the federation's order; none for a task without."""
    budget_epsilon: Positive
    """Epsilon of all runs in the study's name together."""
    budget_delta: Probability
    """Delta of all runs in the study's name together."""
    min_noise_multiplier: Positive
    """Smallest noise multiplier."""
    max_sampling_rate: Probability
    """Largest sampling rate: the expected share of the records in a step's batch."""
    max_steps_per_round: Count
    """Most steps of one round."""
    max_rounds_per_run: Count
    """Most rounds of one run; its private evaluations may be one more."""
    unit: Literal["record", "client"] = "record"
    """What a run of the study protects. With ``client`` updates leave without noise of the silo's own: the budget is of
    what the coordinator's plans claim, and the bounds on steps and sampling are for each request."""
    honest_silos: NonNegativeInt = 0
    """Most honest silos on which the epsilon of silos that make their noise together may rest, as
    ``policy.honest_silos``; 0: no such run."""


class Mandate(Signed):
    """A mandate as its silo has signed it.

    Attributes:
        version: 2; mandates of version 1 are read, and cover what they did: records as units, and no noise that silos
            make together.
        issued: when; so the same terms, given again, are another mandate.
        terms: what it allows.
    """

    version: Literal[1, 2] = 2  # type: ignore[assignment]  # wider than what a receipt may have
    kind: Literal["mandate"] = "mandate"
    issued: AwareDatetime
    terms: MandateTerms

    @model_validator(mode="after")
    def _says_what_its_version_can(self) -> Self:
        for name, value in _SINCE_2.items():
            if self.version < VERSION and getattr(self.terms, name) != value:
                raise ValueError(f"version is {self.version}, and terms.{name} is there since version {VERSION}")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A mandate of before as it was, so that its signature holds."""
        found: dict[str, Any] = write(self)
        if self.version < VERSION:
            found["terms"] = {name: value for name, value in found["terms"].items() if name not in _SINCE_2}
        return found

    @property
    def digest(self) -> str:
        """By which ledger, receipts and statements name it: over the whole file, the signature included."""
        return digest_bytes(self.to_bytes())

    @property
    def limit(self) -> Study:
        """What the ledger has to keep to."""
        terms = self.terms
        return Study(terms.study, self.digest, self.issued.timestamp(), terms.budget_epsilon, terms.budget_delta)

    def is_over(self, now: float) -> bool:
        """Whether its last day has passed at a time, in seconds since 1970."""
        return datetime.fromtimestamp(now, tz=UTC).date() > self.terms.expires

    def beyond(self, plan: PlanTerms, epsilon: float = 0.0) -> tuple[str, str, str] | None:
        """The first of its bounds that a plan goes beyond.

        Args:
            plan: of one run.
            epsilon: of the plan, where it is known.

        Returns:
            The field, what the plan has, what the field allows; None where the mandate covers the plan.
        """
        terms = self.terms
        if plan.unit != terms.unit:
            return "unit", plan.unit, terms.unit
        noise = min([plan.schedule.noise_multiplier, *(metric.noise_multiplier for metric in plan.metric_releases)])
        if noise < terms.min_noise_multiplier:
            return "min_noise_multiplier", f"{noise:g}", f"at least {terms.min_noise_multiplier:g}"
        evaluations = sum(metric.releases for metric in plan.metric_releases)
        shared = plan.secure_sum.noise if plan.secure_sum else None
        # A plan for clients samples all of them in one step; what a client does itself, each request says.
        of_steps = () if plan.unit == "client" else self._of_steps(plan.steps_per_round, plan.sampling_rate)
        return _first_beyond(
            *of_steps,
            ("honest_silos", shared.min_honest if shared else 0, terms.honest_silos),
            ("max_rounds_per_run", plan.rounds, terms.max_rounds_per_run),
            ("max_rounds_per_run", evaluations, terms.max_rounds_per_run + 1),
            ("budget_epsilon", epsilon, terms.budget_epsilon * (1 + 1e-12)),
            ("budget_delta", plan.delta, terms.budget_delta * (1 + 1e-12)),
        )

    def beyond_work(self, steps: int, sampling_rate: float) -> tuple[str, str, str] | None:
        """The first of its bounds that the work of one round goes beyond whose update leaves without noise.

        Args:
            steps: of the round.
            sampling_rate: of each.

        Returns:
            As ``beyond``.
        """
        return _first_beyond(*self._of_steps(steps, sampling_rate))

    def _of_steps(self, steps: int, sampling_rate: float) -> tuple[tuple[str, float, float], ...]:
        return (
            ("max_sampling_rate", sampling_rate, self.terms.max_sampling_rate),
            ("max_steps_per_round", steps, self.terms.max_steps_per_round),
        )


def _first_beyond(*bounds: tuple[str, float, float]) -> tuple[str, str, str] | None:
    """Of fields, what is asked and the most that is allowed: the first of which too much is."""
    for field, asked, most in bounds:
        if not asked <= most:  # true for a NaN, too
            return field, f"{asked:g}", f"at most {most:g}"
    return None


class UnsoundMandateError(InputError):
    """A mandate that can't be used.

    Attributes:
        field: what of it is wrong.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def read_mandate(content: bytes, origin: str) -> Mandate:
    """A mandate, whose signature holds.

    Args:
        content: the file, byte for byte.
        origin: its name, for the message.

    Raises:
        UnsoundMandateError: it is of a newer version, something else, or was edited.
    """
    if len(content) > LARGEST_STATEMENT_BYTES:
        raise UnsoundMandateError(f"{origin}: longer than any mandate", "size")
    try:
        tree = json_object(content, origin)
    except InputError as error:
        raise UnsoundMandateError(str(error), "content") from None
    mandate = mandate_of(tree, origin)
    if mandate.to_bytes() != content:
        raise UnsoundMandateError(f"{origin}: not as it was written: edited", "content")
    return mandate


def mandate_of(tree: object, origin: str) -> Mandate:
    """A mandate from its JSON, whose signature holds.

    Raises:
        UnsoundMandateError: as ``read_mandate``.
    """
    if not isinstance(tree, dict):
        raise UnsoundMandateError(f"{origin}: no mandate", "content")
    if isinstance(found := tree.get("version"), int) and found > VERSION:
        raise UnsoundMandateError(
            f"{origin}: version is {found}, this Siloweave reads 1 to {VERSION}; a newer one needs a newer Siloweave",
            "version",
        )
    try:
        mandate = parse(Mandate, tree, origin)
    except InputError as error:
        raise UnsoundMandateError(str(error), "content") from None
    if mandate.model_dump(mode="json") != tree or not mandate.holds():
        raise UnsoundMandateError(f"{origin}: signature doesn't hold: one of its fields was edited", "signature")
    return mandate


def require_owner(mandate: Mandate, silo: str, dataset: str, public_key: str, origin: str) -> None:
    """Whether a silo itself has signed a mandate.

    Raises:
        UnsoundMandateError: it is of another silo or dataset, or signed with another key.
    """
    own = {"silo": silo, "dataset": dataset, "public_key": public_key}
    for field, expected in own.items():
        if (found := getattr(mandate, field)) != expected:
            raise UnsoundMandateError(f"{origin}: {field} is {found!r}, the silo's is {expected!r}", field)
