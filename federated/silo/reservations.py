"""A silo's runs: reserving one, drawing on it, ending it, each under the steward's policy as it is now.

A run belongs to the coordinator that reserved it. Under another coordinator its name is another run, or none.
"""

from logging import Logger
from pathlib import Path
from threading import Lock

from configs.errors import InputError, PolicyRefusal
from configs.parse import parse
from configs.schema.silo import SiloConfig, SiloPolicy, load_silo
from federated.protocol import silo_pb2 as pb
from federated.protocol.framing import QUEUE
from federated.silo.masking.terms import Known, check_roster
from federated.silo.policy import check_epsilon, check_new_plan, check_plan, plan_of
from privacy.certificate.certificate import library_versions
from privacy.ledger.chain import Budget
from privacy.ledger.client_runs import entrust, entrusted, record_update
from privacy.ledger.ledger import Ledger
from privacy.ledger.limits import Limits
from privacy.mandate import Mandate
from privacy.plan import PlanTerms, PrivacyPlan


def policy_now(file: Path, log: Logger) -> SiloPolicy:
    """The policy as the steward's file has it now: it bounds the very next request.

    Raises:
        PolicyRefusal: the file doesn't hold; why is told to the silo's own log alone.
    """
    try:
        return load_silo(file).policy
    except InputError as error:
        log.error("everything is refused until this is mended: %s", error)
        raise PolicyRefusal.of("policy", "a request", "none until the silo's steward has mended its settings") from None


def budget_of(policy: SiloPolicy) -> Budget:
    """What the dataset may ever spend."""
    return Budget(policy.budget_epsilon, policy.budget_delta)


def limits_of(policy: SiloPolicy, mandate: Mandate | None) -> Limits:
    """What a policy allows beside its budget, and a study beside that."""
    study = None if mandate is None else mandate.limit
    return Limits(policy.max_epsilon_per_day, policy.max_runs_per_day, policy.max_open_runs, study)


def check_request_size(asked: pb.Reserve, policy: SiloPolicy) -> None:
    """Refuses a run at its start whose rounds would be refused for their size.

    Raises:
        PolicyRefusal: a round's request has more bytes than the policy allows.
    """
    size, most = asked.request_bytes, policy.max_request_bytes
    if size > most:
        message = (
            f"a round's request has {size} bytes, policy.max_request_bytes allows {most}; raise it and start the "
            "service again, or ask for a smaller federated.lora_rank"
        )
        raise PolicyRefusal.of("max_request_bytes", f"{size}", f"{most}", message)


def account(
    ledger: Ledger,
    config: SiloConfig,
    request: pb.Request,
    mandate: Mandate | None,
    known_now: Known,
    one_at_a_time: Lock,
    accounting: Lock,
) -> None:
    """Checks all about a reservation that is cheap, then computes its epsilon, which the accountant remembers.

    So ``reserve`` waits for nothing while it holds the silo and its ledger; and what has no room costs no accounting.
    While one plan is accounted for, which may take seconds, a second one is refused: it would hold a place that others'
    requests wait for.

    Args:
        ledger: the silo's.
        config: the silo, with its policy of now.
        request: a reservation.
        mandate: what covers it, where the silo asks for mandates.
        known_now: gives the keys of the silos that the steward knows, by name.
        one_at_a_time: held while the ledger is looked at.
        accounting: held while epsilon is computed.

    Raises:
        PolicyRefusal: a rule of the policy, or no room; or another plan is being accounted for.
    """
    policy = config.policy
    check_request_size(request.reserve, policy)
    plan = check_new_plan(plan_of(request.reserve.plan), policy, config.silo.public_record_count)
    check_roster(plan.terms, request.reserve.secure.roster, known_now)
    if plan.terms.unit == "record":
        with one_at_a_time:
            ledger.bind(budget_of(policy))
            ledger.check_room(request.run_id, plan.terms, limits_of(policy, mandate), request.coordinator)
    check_epsilon(epsilon_of(plan.terms, accounting), policy)


def epsilon_of(terms: PlanTerms, accounting: Lock) -> float:
    """What a plan spends, which the accountant remembers; computed for one plan at a time.

    Raises:
        PolicyRefusal: another plan is being accounted for.
    """
    if not accounting.acquire(blocking=False):
        raise PolicyRefusal.of(QUEUE, "a second plan at a time", "one; ask again later")
    try:
        return terms.epsilon
    finally:
        accounting.release()


def reserve(ledger: Ledger, config: SiloConfig, request: pb.Request, mandate: Mandate | None) -> pb.Reserved:
    """Commits a run's whole schedule, in the name of its study where a mandate covers it.

    Raises:
        PolicyRefusal: a rule of the policy, or no room.
    """
    policy, coordinator, limits = config.policy, request.coordinator, limits_of(config.policy, mandate)
    plan = check_new_plan(plan_of(request.reserve.plan), policy, config.silo.public_record_count)
    check_epsilon(plan.terms.epsilon, policy)
    if plan.terms.unit == "client":  # its guarantee, and what it spends, are the aggregator's
        entrust(ledger.journal, request.run_id, plan.terms, coordinator, limits)
        receipt = ledger.receipt(request.run_id, coordinator)
    else:
        receipt = ledger.reserve(request.run_id, plan, limits, coordinator)
    return pb.Reserved(receipt=receipt.to_bytes(), mandate=mandate.to_bytes() if mandate else b"")


def reserved_plan(ledger: Ledger, config: SiloConfig, request: pb.Request, plan_digest: str) -> PrivacyPlan:
    """The plan that a run reserved, if the policy of today would still allow it.

    Raises:
        PolicyRefusal: it would not, or the run has reserved none.
    """
    reservation = ledger.reservation(request.run_id, request.coordinator)
    if reservation is None or reservation["plan_digest"] != plan_digest:
        raise PolicyRefusal.of("reservation", plan_digest or "no plan", "the plan that the run reserved")
    asked = parse(PlanTerms, reservation["plan"], "ledger")
    check_plan(asked, config.policy, config.silo.public_record_count)
    check_epsilon(reservation["epsilon"], config.policy)
    _check_budget(ledger, config.policy)
    return PrivacyPlan(terms=asked, public_record_count=reservation["public_record_count"])


def _check_budget(ledger: Ledger, policy: SiloPolicy) -> None:
    """Refuses to go on where more is reserved than the steward allows today."""
    budget = budget_of(policy)
    ledger.bind(budget)
    left = ledger.left()
    for name in ("epsilon", "delta"):
        allowed, over = getattr(budget, name), -getattr(left, name)
        if over > 1e-9 * allowed:  # a sum's rounding is no breach
            raise PolicyRefusal.of(f"budget_{name}", f"{allowed + over:.6g}, which is reserved,", f"{allowed:.6g}")


def entrusted_plan(ledger: Ledger, config: SiloConfig, request: pb.Request, plan_digest: str) -> PlanTerms:
    """The plan of a run that was entrusted with updates without noise, if the policy of today would still allow it.

    Raises:
        PolicyRefusal: it would not, or the run was not entrusted with any.
    """
    run = entrusted(ledger.journal, request.run_id, request.coordinator)
    if run is None or run["plan_digest"] != plan_digest:
        raise PolicyRefusal.of("reservation", plan_digest or "no plan", "the plan that the run was entrusted with")
    asked = parse(PlanTerms, run["plan"], "ledger")
    check_plan(asked, config.policy, config.silo.public_record_count)
    check_epsilon(asked.epsilon, config.policy)
    return asked


def plan_of_sum(
    ledger: Ledger,
    config: SiloConfig,
    request: pb.Request,
    plan_digest: str,
    release: tuple[str, str, str, int, str, str],
) -> PlanTerms:
    """The plan of a run with an open sum, if the policy of today would still allow it.

    Args:
        ledger: the silo's.
        config: the silo, with its policy of now.
        request: what goes on with the sum.
        plan_digest: of the plan that the sum was begun under.
        release: what has begun it, as the ledger has it: run, request, digest, round, metric, coordinator.

    Raises:
        PolicyRefusal: it would not, or the run was ended meanwhile.
    """
    run, request_id, digest, number, _, coordinator = release
    if entrusted(ledger.journal, run, coordinator) is None:
        terms = reserved_plan(ledger, config, request, plan_digest).terms
        ledger.reply(*release)
        return terms
    terms = entrusted_plan(ledger, config, request, plan_digest)
    record_update(ledger.journal, run, coordinator, request_id, digest, number)
    return terms


def close(ledger: Ledger, config: SiloConfig, request: pb.Request) -> pb.Closed:
    """Ends a run, and states what it did."""
    run, coordinator = request.run_id, request.coordinator
    receipt = ledger.close(run, coordinator)
    attests = config.policy.attests_disjoint_units
    statement = ledger.statement(run, library_versions(), attests_disjoint_units=attests, coordinator=coordinator)
    return pb.Closed(receipt=receipt.to_bytes(), statement=statement.to_bytes() if statement else b"")
