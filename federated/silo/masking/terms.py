"""What a secure sum needs before a silo takes part: plan and policy, and the roster as its steward knows it."""

from collections.abc import Callable, Mapping, Sequence
from logging import Logger
from pathlib import Path

from configs.errors import InputError, PolicyRefusal
from configs.schema.silo import SiloPolicy
from federated.aggregation.secure_sum import agreement, secure_of
from federated.identity.trust import confirmed_silos
from federated.protocol import silo_pb2 as pb
from privacy.distributed.distributed import DistributedNoise
from privacy.distributed.planned import of_length
from privacy.mechanism.masked_clients import client_encoding
from privacy.plan import PlanTerms
from privacy.secagg.agreement import Agreement
from privacy.secure_sum import SecureSum

Known = Callable[[], Mapping[str, str]]
_CONFIRM = "`siloweave silo roster --add` confirms one"


def check_secure(terms: PlanTerms, policy: SiloPolicy) -> None:
    """Whether a plan adds updates up as the steward wants it.

    Raises:
        PolicyRefusal: it doesn't.
    """
    if terms.secure_sum is None:
        if policy.secure_aggregation == "required":
            raise PolicyRefusal.of("secure_aggregation", "updates by themselves", "a run with secure aggregation alone")
        return
    secure = terms.secure_sum
    if secure.colluders < policy.min_colluders:
        raise PolicyRefusal.of("min_colluders", str(secure.colluders), str(policy.min_colluders))
    if secure.noise is not None and secure.noise.min_honest > policy.honest_silos:
        asked, allowed = f"{secure.noise.min_honest}", f"{policy.honest_silos}"
        message = (
            f"epsilon would rest on {asked} honest silos of each sum, and this silo's steward counts on {allowed} "
            "(policy.honest_silos)"
        )
        raise PolicyRefusal.of("honest_silos", asked, allowed, message)


def confirmed_now(state_dir: Path, log: Logger) -> dict[str, str]:
    """Public keys of the other silos that the steward has confirmed, by name.

    Raises:
        PolicyRefusal: a file can't be read; which one is told to the silo's own log alone.
    """
    try:
        return {name: silo.public_key for name, silo in confirmed_silos(state_dir).items()}
    except InputError as error:
        log.error("no updates are added up until this is mended: %s", error)
        raise PolicyRefusal.of("roster", "a sum", "none until the silo's steward has mended its roster") from None


def check_roster(terms: PlanTerms, roster: Sequence[pb.Member], known_now: Known) -> None:
    """Whether a request names the silos that the steward knows, with their keys, and no others.

    Args:
        terms: the run's plan.
        roster: of the request; empty where it has none.
        known_now: gives the keys of all silos that the steward knows, by name, this one among them.

    Raises:
        PolicyRefusal: it doesn't.
    """
    if terms.secure_sum is None:
        if roster:
            raise PolicyRefusal.of("secure_aggregation", "a secure sum", "none, which the plan has not got")
        return
    asked, known = {member.silo: member.public_key for member in roster}, known_now()
    if len(asked) == len(roster) and asked == known:
        _check_number(terms.secure_sum, len(roster))
        return
    wrong = {
        "not confirmed here": sorted(asked.keys() - known.keys()),
        "confirmed here, and not there": sorted(known.keys() - asked.keys()),
        "with another key": sorted(name for name in asked.keys() & known.keys() if asked[name] != known[name]),
    }
    said = "; ".join(f"{', '.join(names)} {what}" for what, names in wrong.items() if names) or "a silo is there twice"
    message = f"the roster of the run is not what this silo's steward has confirmed: {said}; {_CONFIRM}"
    raise PolicyRefusal.of("roster", f"{len(roster)} silos", f"{len(known)} silos", message)


def _check_number(terms: SecureSum, silos: int) -> None:
    """Refuses, before anything is reserved, silos of whom no sum could have the noise that they share."""
    if terms.noise is not None and not terms.fewest <= silos <= terms.most:
        allowed = f"{terms.fewest} to {terms.most} silos"
        raise PolicyRefusal.of(
            "roster", f"{silos} silos", allowed, f"{silos} silos, and the plan's noise is for {allowed}"
        )


def agreed(request: pb.Request, terms: PlanTerms, known_now: Known, length: int) -> Agreement | None:
    """What a request to train or to evaluate makes this silo agree to; None where what it sends leaves by itself.

    Raises:
        PolicyRefusal: the roster is another one, or such a sum would not be secure.
    """
    asked: pb.Train | pb.Contribute | pb.Evaluate = getattr(request, request.WhichOneof("kind") or "train")
    secure = secure_of(asked)
    check_roster(terms, secure.roster, known_now)
    if terms.secure_sum is None:
        return None
    if terms.secure_sum.noise is not None and secure.clip and isinstance(asked, pb.Train):
        raise PolicyRefusal.of("clip", f"{secure.clip:g}", "0: the plan says how sums are written")
    try:
        if isinstance(asked, pb.Contribute):
            fits = client_encoding(terms.for_clients(), len(secure.roster)).clip
            if secure.clip != fits:
                raise PolicyRefusal.of("clip", f"{secure.clip!r}", f"{fits!r}, which follows from the plan")
        return agreement(asked, terms.secure_sum, request.coordinator, request.run_id, length)
    except InputError as error:
        raise PolicyRefusal.of("secure_aggregation", "a sum", "a secure one", str(error)) from None


def shared_noise(terms: PlanTerms, summed: Agreement | None, length: int) -> DistributedNoise | None:
    """The noise that this silo adds its share of; None where it adds all of its own to its update.

    Raises:
        PolicyRefusal: the plan is of fewer values.
        TooFewShares: the sum could be unmasked with less noise than is charged.
    """
    noise = terms.noise
    if noise is None or summed is None:
        return None
    noise.require(summed.min_survivors)  # the least that this silo's signature and shares unmask
    return of_length(noise, length)
