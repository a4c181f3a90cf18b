"""A made-up silo's folder, with a ledger and logs, no model and no data, and figures of a made-up federation."""

from mandates import STUDY, terms
from silo_requests import COORDINATOR, signer_of

from configs.storage.files import digest_bytes
from configs.storage.layout import SiloFiles
from federated.identity.cards import TrustedCoordinator
from federated.identity.trust import trust
from federated.silo.line_file import close_log, private_log
from federated.silo.mandates.folder import Mandates
from federated.silo.traffic_log import TrafficLog
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from privacy.ledger.limits import Limits
from privacy.plan import PlanTerms, PrivacyPlan

HOSTILE = "<script>alert(1)</script>\u202e"
OTHER = signer_of(bytes(range(1, 33)))
REASON = "max_rounds: asked 80, allowed at most 40"
UPDATE = b"u" * 5000
_PLAN = PlanTerms(sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=2.0, rounds=3, steps_per_round=2, delta=1e-5)
PLAN = PrivacyPlan(terms=_PLAN, public_record_count=100)


def made_up(folder, coordinator="stroke-net", run="late-referrals-1"):
    """Its silo.toml: a run of a study with two rounds, a closed run of somebody else's, and one refusal."""
    toml, state = folder / "silo.toml", folder / "state"
    toml.write_text(
        f"""[silo]
id = "north"
dataset_id = "ward"
state_dir = "{state}"
base_model = "{folder / "model"}"
public_record_count = 100
[data]
source = "{folder / "data.jsonl"}"
[policy]
budget_epsilon = 8.0
budget_delta = 1e-4
max_epsilon_per_day = 6.0
"""
    )
    with_ledger(state, run)
    trust(state, TrustedCoordinator(name=coordinator, public_key=COORDINATOR.public_key))
    traffic = TrafficLog(state)
    log = private_log(state)
    for kind, outcome, reply in (("reserve", "answered", b"r"), ("train", "answered", UPDATE), _REFUSED):
        body = f"{run} {kind} {outcome}".encode()
        digest = digest_bytes(body)
        named = {"run": run, "request": kind, "kind": kind, "study": STUDY}
        traffic.accepted(body, COORDINATOR.public_key, 100, request_digest=digest, **named)
        if outcome != "answered":
            log.warning("refused %s: %s", digest, REASON)
        traffic.leaves(reply, request_digest=digest, outcome=outcome)
    traffic.turned_away(b"a stranger", b"no", request_digest="", outcome="refused: coordinator")
    close_log(log)
    return toml


_REFUSED = ("reserve", "refused: max_rounds", b"no")


def with_ledger(state, run):
    """The ledger's part of it."""
    ledger = Ledger.open(state, "north", "ward", Budget(8.0, 1e-4))
    mandates = Mandates(SiloFiles(state), "north", "ward", ledger.public_key)
    study = mandates.add(terms(budget_epsilon=4.0), ledger.journal.signer).limit
    old, key = OTHER.public_key, COORDINATOR.public_key
    ledger.reserve("trial", PLAN, coordinator=old)
    ledger.close("trial", old)
    ledger.reserve(run, PLAN, Limits(study=study), key)
    for number in (1, 2):
        charge = ledger.charge(run, f"round-{number}", "aa" * 32, number, coordinator=key)
        ledger.release(charge.number, run, UPDATE)
    ledger.close_file()


SITE = {"epsilon_left": 6.5, "delta_left": 9e-5, "epsilon_reserved": 1.5}
FEDERATION = {
    "federation": "stroke-net",
    "address": "fed.example.org:9092",
    "time": "2026-11-30T12:00:00+00:00",
    "certificate_days_left": 397,
    "processes": {"superlink": {"healthy": True, "restarts": 0}, "proxy": {"healthy": False, "restarts": 3}},
    "silos": {
        "north": {**SITE, "state": "up", "reason": ""},
        "south": {**dict.fromkeys(SITE), "state": "down", "reason": "its relay is not connected"},
        HOSTILE: {**dict.fromkeys(SITE), "state": "refuses", "reason": f"refused at 3: {HOSTILE}"},
    },
    "run": {
        "name": "late-referrals",
        "directory": "/srv/runs/late-referrals/federated",
        "working": True,
        "finished": False,
        "round": 3,
        "rounds": 20,
        "secure_aggregation": True,
        "trouble": [{"event": "refused", "step": "3", "silo": HOSTILE, "message": HOSTILE}],
    },
    "rounds": [
        {
            "time": "2026-11-30T11:59:00+00:00",
            "round": 3,
            "answered": ["north"],
            "seconds": 61.5,
            "bytes": 2.5e6,
            "epsilon_left": None,
        }
    ],
    "pace": {
        "rounds": 3,
        "seconds_per_round": 61.5,
        "bytes_per_round": 2.5e6,
        "bytes_per_second": 40_650,
        "seconds_to_go": 1045.5,
    },
    "unreadable": ["events.jsonl: 1 of 9 lines are no events of ours"],
}
