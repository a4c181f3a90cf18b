"""Whether a mandate covers a request: from the request, the mandate's file and the ledger, without reading data."""

from logging import Logger
from unicodedata import normalize

from pydantic import TypeAdapter, ValidationError

from configs.errors import PolicyRefusal
from configs.parse import parse
from configs.schema.base import StudyName
from configs.schema.silo import SiloConfig
from federated.protocol import silo_pb2 as pb
from federated.silo.mandates.folder import Mandates
from federated.silo.policy import plan_of
from privacy.ledger.journal import Journal
from privacy.ledger.runs import Run, Runs
from privacy.mandate import Mandate, UnsoundMandateError
from privacy.plan import PlanTerms

_NAME = TypeAdapter(StudyName)
_IN_FORCE = "a study with a mandate in force at this silo"


def covering(request: pb.Request, config: SiloConfig, journal: Journal, log: Logger) -> Mandate | None:
    """The mandate under which a request may be answered.

    A run goes on under the mandate that it was reserved under, and no other: one that was revoked ends it, whatever was
    added since. To close a run, which releases nothing, needs none.

    Args:
        request: of a trusted coordinator, its signature checked.
        config: the silo, with its policy of now.
        journal: its ledger.
        log: is told what is wrong with a file.

    Returns:
        None where the silo asks for no mandate, or the request for none.

    Raises:
        PolicyRefusal: none covers it; the rule names the mandate's field.
    """
    mandates = Mandates.of(config, journal.signer.public_key)
    if not (config.policy.requires_mandate or mandates.are_asked_for):
        return None
    bodies = journal.bodies()
    run = Runs(bodies).of(request.run_id, request.coordinator)
    kind = request.WhichOneof("kind")
    if kind == "close" and run is not None and run.opening.get("study", "") == request.study:
        return None
    mandate = _in_force(request.study, mandates, log, journal.now(bodies[-1]["time"]))  # a clock may be set back
    if mandate.terms.coordinator != request.coordinator:
        raise _refusal("coordinator", request.coordinator, "the one that the mandate names")
    if run is not None:
        _check_run(run, mandate)
    if (plan := _plan(request)) is not None and (found := mandate.beyond(plan_of(plan))):
        raise _refusal(*found)
    _check_unit(request, mandate)
    if (asked := _asked(request)) is not None:
        _check_model(asked, mandate)
    return mandate


def _in_force(study: str, mandates: Mandates, log: Logger, now: float) -> Mandate:
    """The mandate of a study; whatever is wrong with its file is told to the silo's own log alone."""
    try:
        mandate = mandates.read(_NAME.validate_python(study))
    except ValidationError:
        mandate = None
    except UnsoundMandateError as error:
        log.error("nothing is answered in the name of study %s: %s", study, error)
        raise _refusal(error.field, f"study {study}", "a sound mandate: ask the silo's steward") from None
    if mandate is None:
        raise _refusal("study", study or "none", _IN_FORCE)
    if mandate.is_over(now):
        raise _refusal("expires", f"study {study} after its last day", f"until {mandate.terms.expires}")
    return mandate


def _check_run(run: Run, mandate: Mandate) -> None:
    """Raises a PolicyRefusal where a run was opened under another mandate, or none, or goes beyond what this one says.

    An older version may have opened it that took the mandate to cover more.
    """
    if run.opening.get("mandate") != mandate.digest:
        raise _refusal("run", f"run {run.name}, opened under another mandate or none", "a run opened under this one")
    if found := mandate.beyond(parse(PlanTerms, run.opening["plan"], "ledger")):
        raise _refusal(*found)


def _check_unit(request: pb.Request, mandate: Mandate) -> None:
    """Raises a PolicyRefusal where an update without noise is asked for and not allowed, or more work than is."""
    kind, unit = request.WhichOneof("kind"), mandate.terms.unit
    of_unit = {"contribute": "client", "train": "record", "evaluate": "record"}
    if of_unit.get(kind or "", unit) != unit:
        raise _refusal("unit", of_unit[kind or ""], unit)
    work = request.contribute
    if kind == "contribute" and (found := mandate.beyond_work(work.local_steps, work.sampling_rate)):
        raise _refusal(*found)


def _plan(request: pb.Request) -> str | None:
    """What a request would reserve."""
    kind = request.WhichOneof("kind")
    if kind == "rehearse" and request.rehearse.HasField("train"):
        return request.rehearse.reserve.plan
    return request.reserve.plan if kind == "reserve" else None


def _asked(request: pb.Request) -> pb.Train | pb.Evaluate | None:
    """What of a request says what is learnt of which model."""
    kind = request.WhichOneof("kind")
    if kind == "rehearse":
        return request.rehearse.train if request.rehearse.HasField("train") else None
    if kind == "contribute":
        return request.contribute.train
    return getattr(request, kind) if kind in ("train", "evaluate") else None


def _check_model(asked: pb.Train | pb.Evaluate, mandate: Mandate) -> None:
    terms = mandate.terms
    if asked.base_model_digest not in terms.base_models:
        raise _refusal("base_models", asked.base_model_digest or "none", ", ".join(terms.base_models))
    if asked.task != terms.task:
        raise _refusal("task", asked.task or "none", terms.task)
    labels = tuple(normalize("NFC", label) for label in asked.task_spec.labels)
    if labels != terms.labels:
        raise _refusal("labels", ", ".join(labels) or "none", ", ".join(terms.labels) or "none")


def _refusal(field: str, asked: str, allowed: str) -> PolicyRefusal:
    return PolicyRefusal.of(f"mandate.{field}", asked, allowed)
