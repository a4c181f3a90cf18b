"""What a trusted coordinator that turned hostile can ask of a silo: nothing that stops it, or takes another's run.

Each test is an attack that worked: what it did before is beside it.
"""

import json
import threading

import grpc
import pytest
from client_plans import client_plan
from silo_requests import COORDINATOR, TRUSTED, body_of, opened, signer_of
from typer.testing import CliRunner

from configs.schema.silo import load_silo
from federated.adapters.arrays import to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.commands.silo import silo_app
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.protocol.framing import SERVICE
from federated.silo.silo import Silo
from federated.transport.health import is_serving
from federated.transport.service import serve
from federated.transport.service_client import ask as ask_again
from federated.transport.service_client import ask_service
from privacy.accounting.schedule import Schedule
from privacy.ledger import limits
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import SCHEMA_VERSION
from privacy.ledger.journal import Journal
from privacy.ledger.replay import replay
from privacy.ledger.statements import Receipt, RunStatement
from privacy.plan import METRIC, MetricRelease, PlanTerms

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5)
NOTHING = PLAN.model_copy(update={"sampling_rate": 1e-4, "noise_multiplier": 1e6, "delta": 1e-9})
ENDLESS = PLAN.model_copy(
    update={"sampling_rate": 1e-6, "noise_multiplier": 0.3, "rounds": 100_000, "steps_per_round": 1000}
)
CLIENTS = client_plan(noise_multiplier=4.0, rounds=2, num_clients=10, delta=1e-6)
OTHER = signer_of(bytes(range(1, 33)))
POLICY = {"budget_epsilon": 20.0, "budget_delta": 1e-4, "max_epsilon_per_run": 10.0}


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


@pytest.fixture
def toml(tmp_path, tiny_model):
    """The steward's silo.toml, and how to write it with another policy."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"note {i}"}) + "\n" for i in range(60)))

    def write(**policy):
        path = tmp_path / "silo.toml"
        lines = [f"{name} = {json.dumps(value)}" for name, value in {**POLICY, **policy}.items()]
        path.write_text(
            f'[silo]\nid = "north"\ndataset_id = "ward"\nstate_dir = "{tmp_path / "state"}"\n'
            f'base_model = "{tiny_model}"\npublic_record_count = 100\n'
            f'[data]\nsource = "{tmp_path / "data.jsonl"}"\n[policy]\n' + "\n".join(lines) + "\n"
        )
        return path

    return write


@pytest.fixture
def start(toml):
    """Starts the silo as its service does, with two coordinators that are trusted."""
    silos = []

    def started(**policy):
        path = toml(**policy)
        silos.append(Silo(load_silo(path), TRUSTED | {OTHER.public_key}, file=path))
        return silos[-1]

    yield started
    for silo in silos:
        silo.close()


def ask(silo, request_id, sender=COORDINATOR, run_id="run-1", **kind):
    body = body_of(request_id, run_id, coordinator=sender.public_key, **kind)
    return opened(silo.handle(seal_request(sender, body)), silo)


def reserve(silo, sender=COORDINATOR, plan=PLAN, run_id="run-1"):
    return ask(silo, "reserve", sender, run_id, reserve=pb.Reserve(plan=plan.model_dump_json()))


def train(silo, adapter, sender=COORDINATOR, number=1, run_id="run-1"):
    return ask(silo, f"round-{number}", sender, run_id, train=asked(silo, adapter, number))


def asked(silo, adapter, number=1, plan=PLAN):
    return pb.Train(
        round=number,
        plan_digest=plan.digest,
        base_model_digest=silo.workbench.base_model.content_digest,
        task="causal",
        adapter_spec=pb.AdapterSpec(rank=4, alpha=8.0),
        adapter=adapter,
        learning_rate=0.01,
        optimizer="adam",
    )


def close(silo, sender=COORDINATOR, run_id="run-1"):
    return ask(silo, "close", sender, run_id, close=pb.Close()).closed


def bodies(silo):
    found = verify_entries(silo.ledger.entries(), "test", silo.ledger.public_key)
    replay(found, "test")
    return found


def kinds(silo):
    return [body["kind"] for body in bodies(silo)]


# Accounting


def test_a_schedule_without_end_is_refused_before_it_is_accounted_for(start, monkeypatch):
    # Before: 18.7 GB, then killed by the kernel, at every restart again; the silo answered nobody meanwhile.
    silo = start(max_rounds_per_run=100_000)
    monkeypatch.setattr(Schedule, "pld", None)
    refusal = reserve(silo, plan=ENDLESS).refusal
    assert refusal.rule == "accounting"
    assert "100000000 steps" in refusal.message
    metrics = (MetricRelease(name="held_out", noise_multiplier=0.3, releases=100_000),)
    assert reserve(silo, plan=PLAN.model_copy(update={"metric_releases": metrics})).refusal.rule == "metric_releases"
    assert kinds(silo) == ["open"]


def test_metrics_count_in_a_runs_epsilon(start):
    metrics = (MetricRelease(name=METRIC, noise_multiplier=0.3, releases=9),)
    refusal = reserve(start(releases_metrics=True), plan=PLAN.model_copy(update={"metric_releases": metrics})).refusal
    assert refusal.rule == "max_epsilon_per_run"


@pytest.mark.parametrize(
    ("policy", "plan", "rule"),
    [
        ({}, {"noise_multiplier": 0.1}, "min_noise_multiplier"),
        ({"max_steps_per_round": 1}, {}, "max_steps_per_round"),
        ({"budget_delta": 1e-6}, {}, "budget_delta"),
        ({"max_open_runs": 1}, {}, "max_open_runs"),
        ({"max_runs_per_day": 1}, {}, "max_runs_per_day"),
    ],
)
def test_what_is_refused_anyway_costs_no_accounting(start, monkeypatch, policy, plan, rule):
    # Before: seconds of accounting for each, under the lock.
    silo = start(**policy)
    if rule.endswith(("open_runs", "per_day")):
        reserve(silo, run_id="run-0")
    monkeypatch.setattr(Schedule, "pld", None)
    changed = PLAN.model_copy(update={"rounds": 3, **plan})
    assert reserve(silo, plan=changed).refusal.rule == rule


def test_while_a_plan_is_accounted_for_others_are_answered(start, adapter, monkeypatch):
    # Before: the silo's lock, and its ledger's transaction, were held for as long as the accounting took.
    silo, entered, go_on, before = start(), threading.Event(), threading.Event(), Schedule.pld
    reserve(silo, OTHER)

    def slow(schedule, **options):
        entered.set()
        assert go_on.wait(300)
        return before(schedule, **options)

    monkeypatch.setattr(Schedule, "pld", slow)
    new, replies = PLAN.model_copy(update={"rounds": 5}), []
    waiting = threading.Thread(target=lambda: replies.append(reserve(silo, plan=new)))
    waiting.start()
    assert entered.wait(300)
    assert train(silo, adapter, OTHER).WhichOneof("kind") == "trained"
    go_on.set()
    waiting.join(300)
    assert replies[0].WhichOneof("kind") == "reserved"


def test_plans_that_are_slow_to_account_for_take_no_waiting_places(start, adapter, monkeypatch, tmp_path_factory):
    # Before: five of them waited for one another in all places, and everybody else was sent away.
    silo, entered, go_on, before = start(), threading.Event(), threading.Event(), Schedule.pld
    reserve(silo)

    def slow(schedule, **options):
        entered.set()
        assert go_on.wait(300)
        return before(schedule, **options)

    def sealed(number):
        plan = PLAN.model_copy(update={"rounds": 40 + number}).model_dump_json()
        body = body_of("reserve", f"slow-{number}", coordinator=OTHER.public_key, reserve=pb.Reserve(plan=plan))
        return seal_request(OTHER, body)

    monkeypatch.setattr(Schedule, "pld", slow)
    address = f"unix:{tmp_path_factory.mktemp('s')}/silo.sock"
    server, _ = serve(silo.handle, silo.config.policy.max_request_bytes, address)
    first, replies = threading.Thread(target=lambda: replies.append(opened(ask_service(address, sealed(0))))), []
    first.start()
    assert entered.wait(300)
    for number in range(1, 6):
        with pytest.raises(grpc.RpcError) as error:
            ask_service(address, sealed(number), timeout_s=300)
        assert error.value.details() == "queue: a plan is accounted for; ask again later"
    assert is_serving(address, SERVICE)
    training = seal_request(COORDINATOR, body_of("round-1", train=asked(silo, adapter)))
    assert opened(ask_service(address, training)).WhichOneof("kind") == "trained"
    again = threading.Thread(target=lambda: replies.append(opened(ask_again(address, sealed(1), timeout_s=300))))
    again.start()
    go_on.set()
    for thread in (first, again):  # the relay asks until the accountant is free
        thread.join(300)
    server.stop(None).wait()
    assert [reply.refusal.rule or reply.WhichOneof("kind") for reply in replies] == ["reserved"] * 2


# Places in the ledger


def test_runs_that_spend_nothing_use_up_no_dataset(start, monkeypatch):
    # Before: 5,000 reservations of epsilon 0, in minutes, and the ledger took no more from anybody, for good.
    clock = [1.9e9]  # of the ledger alone: the requests' expiry is of today
    monkeypatch.setattr(Journal, "now", staticmethod(lambda latest: max(clock[0], latest)))
    silo = start(max_runs_per_day=3)
    assert NOTHING.epsilon == 0
    for number in range(3):
        assert reserve(silo, plan=NOTHING, run_id=f"run-{number}").WhichOneof("kind") == "reserved"
        close(silo, run_id=f"run-{number}")
    refusal = reserve(silo, plan=NOTHING, run_id="run-3").refusal
    assert (refusal.rule, refusal.asked, refusal.allowed) == ("max_runs_per_day", "4", "3")
    assert reserve(silo, plan=NOTHING, run_id="run-2").WhichOneof("kind") == "reserved"  # again: no new one
    assert reserve(silo, OTHER).WhichOneof("kind") == "reserved"
    clock[0] += limits.DAY_S + 1
    assert reserve(silo, plan=NOTHING, run_id="run-3").WhichOneof("kind") == "reserved"


def test_a_run_has_few_entries(start):
    # Before: 100,000 rounds of epsilon 1e-6, and every request of anybody took seconds under the silo's lock.
    silo = start(units=["record", "client"], releases_metrics=True)
    for plan in (NOTHING, CLIENTS):
        refusal = reserve(silo, plan=plan.model_copy(update={"rounds": 1001})).refusal
        assert refusal.message == "max_rounds_per_run: asked 1001, allowed 1000"
    metrics = (MetricRelease(name=METRIC, noise_multiplier=1e6, releases=1002),)
    refusal = reserve(silo, plan=NOTHING.model_copy(update={"metric_releases": metrics})).refusal
    assert refusal.message == "max_rounds_per_run: asked 1002 evaluations, allowed 1001"
    assert kinds(silo) == ["open"]
    assert reserve(silo, plan=NOTHING.model_copy(update={"rounds": 1000})).WhichOneof("kind") == "reserved"


def test_open_runs_of_a_coordinator_are_few(start):
    silo = start(max_open_runs=2, units=["record", "client"])
    reserve(silo, run_id="a")
    reserve(silo, plan=CLIENTS, run_id="b")
    for plan in (NOTHING, CLIENTS):
        assert reserve(silo, plan=plan, run_id="c").refusal.rule == "max_open_runs"
    assert reserve(silo, OTHER, run_id="c").WhichOneof("kind") == "reserved"
    close(silo, run_id="b")
    assert reserve(silo, plan=NOTHING, run_id="c").WhichOneof("kind") == "reserved"


def test_a_coordinator_takes_its_share_of_a_ledger_and_no_more(start, monkeypatch):
    # The share is made small here; what is tested is whose reservations count.
    monkeypatch.setattr(limits, "LARGEST_SHARE", 2)
    silo = start()
    for number in range(2):
        reserve(silo, plan=NOTHING, run_id=f"run-{number}")
    assert reserve(silo, plan=NOTHING, run_id="run-2").refusal.rule == "max_reservations"
    assert reserve(silo, OTHER, NOTHING, "run-2").WhichOneof("kind") == "reserved"


# Whose run it is


def test_nobody_trains_evaluates_or_closes_anothers_run(start, adapter):
    # Before: any trusted coordinator trained round 1 with its adapter, and closed the run.
    silo = start(units=["record", "client"])
    reserve(silo)
    reserve(silo, plan=CLIENTS, run_id="run-2")
    not_there = train(silo, adapter, OTHER, run_id="run-3").refusal
    refusal = train(silo, adapter, OTHER).refusal
    assert (refusal.rule, refusal.message) == (not_there.rule, not_there.message) != ("", "")  # nor is told of it
    assert refusal.rule == "reservation"
    evaluate = pb.Evaluate(metric="held_out", number=1, plan_digest=PLAN.digest)
    assert ask(silo, "evaluation", OTHER, evaluate=evaluate).refusal.rule == "reservation"
    work = pb.Contribute(train=asked(silo, adapter, plan=CLIENTS), local_steps=1, sampling_rate=0.1)
    assert ask(silo, "round-1", OTHER, "run-2", contribute=work).refusal.rule == "reservation"
    for run in ("run-1", "run-2"):
        closed = close(silo, OTHER, run)
        assert (Receipt.from_bytes(closed.receipt, "test").epsilon_reserved, closed.statement) == (0.0, b"")
    assert kinds(silo) == ["open", "reserve", "entrust"]
    assert train(silo, adapter).WhichOneof("kind") == "trained"
    assert ask(silo, "round-1", run_id="run-2", contribute=work).WhichOneof("kind") == "trained"


def test_a_name_is_its_coordinators_own(start, adapter):
    # Before: whoever reserved a name first kept the other's run of that name from ever starting.
    silo = start()
    reserve(silo, OTHER, NOTHING)
    assert Receipt.from_bytes(reserve(silo).reserved.receipt, "test").plan_digest == PLAN.digest
    assert train(silo, adapter).WhichOneof("kind") == "trained"
    assert close(silo, OTHER).statement
    assert train(silo, adapter, number=2).WhichOneof("kind") == "trained"
    own, others = (RunStatement.from_bytes(close(silo, who).statement, "test") for who in (COORDINATOR, OTHER))
    assert (own.rounds_charged, own.plan_digest) == (2, PLAN.digest)
    assert (others.rounds_charged, others.plan_digest) == (0, NOTHING.digest)
    assert own.number > others.number
    assert kinds(silo).count("close") == 2


def test_a_run_of_before_belongs_to_the_first_that_continues_it(start, adapter):
    silo = start()
    silo.ledger.reserve("run-1", PLAN.bind(100))  # without a coordinator, as entries were
    silo.ledger.journal.db.execute("PRAGMA user_version = 2")
    silo.close()
    silo = start()
    assert silo.ledger.journal.db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION == 3
    assert reserve(silo).WhichOneof("kind") == "reserved"
    assert kinds(silo) == ["open", "reserve"]
    assert train(silo, adapter).WhichOneof("kind") == "trained"
    assert train(silo, adapter, OTHER, number=2).refusal.rule == "reservation"
    assert not close(silo, OTHER).statement
    assert train(silo, adapter, number=2).WhichOneof("kind") == "trained"
    assert RunStatement.from_bytes(close(silo).statement, "test").rounds_charged == 2
    assert [body.get("coordinator") for body in bodies(silo) if body["kind"] in ("reserve", "charge", "close")] == [
        None,
        *[COORDINATOR.public_key] * 3,
    ]


def test_one_coordinators_requests_use_up_nobody_elses_day(start):
    # Before: one count for all, and whoever asked often kept the others out for ever.
    silo = start(max_requests_per_day=3)
    rules = [ask(silo, f"d{number}", OTHER, describe=pb.Describe()).refusal.rule for number in range(5)]
    assert rules == ["", "", "", "max_requests_per_day", "max_requests_per_day"]
    assert reserve(silo).WhichOneof("kind") == "reserved"


# The policy as it is now


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ({"min_noise_multiplier": 1.0}, "min_noise_multiplier"),
        ({"max_sampling_rate": 0.01}, "max_sampling_rate"),
        ({"max_steps_per_round": 1}, "max_steps_per_round"),
        ({"max_rounds_per_run": 1}, "max_rounds_per_run"),
        ({"max_epsilon_per_run": 0.1}, "max_epsilon_per_run"),
        ({"units": ["client"]}, "units"),
        ({"max_requests_per_day": 1}, "max_requests_per_day"),
    ],
)
def test_a_tightened_policy_reaches_open_runs(start, toml, adapter, policy, rule):
    # Before: a policy was read at the start, and applied to reservations alone: open runs went on to their end.
    silo = start()
    reserve(silo)
    toml(**policy)
    assert train(silo, adapter).refusal.rule == rule
    assert kinds(silo) == ["open", "reserve"]
    toml()
    assert train(silo, adapter).WhichOneof("kind") == "trained"
    toml(**policy)
    assert train(silo, adapter).refusal.rule == rule  # what is stored doesn't leave either


def test_a_tightened_policy_reaches_runs_with_clients_as_units(start, toml, adapter):
    silo = start(units=["record", "client"])
    reserve(silo, plan=CLIENTS)
    work = pb.Contribute(train=asked(silo, adapter, plan=CLIENTS), local_steps=1, sampling_rate=0.1)
    for policy, rule in (({}, "units"), ({"units": ["client"], "min_noise_multiplier": 5.0}, "min_noise_multiplier")):
        toml(**policy)
        assert ask(silo, "round-1", contribute=work).refusal.rule == rule
    assert kinds(silo) == ["open", "entrust"]


def test_a_budget_that_was_lowered_bounds_the_next_reservation(start, toml):
    silo = start()
    toml(budget_epsilon=0.01)
    assert reserve(silo).refusal.rule == "budget_epsilon"
    assert kinds(silo) == ["open", "policy"]


@pytest.mark.parametrize(
    ("policy", "rule"), [({"budget_epsilon": 0.5}, "budget_epsilon"), ({"budget_delta": 1e-9}, "budget_delta")]
)
def test_a_budget_below_what_is_reserved_reaches_open_runs(start, toml, adapter, policy, rule):
    # Before: it bound new reservations alone, and a run went on to release what the steward allows no more.
    silo = start()
    reserve(silo)
    assert train(silo, adapter).WhichOneof("kind") == "trained"
    toml(**policy)
    for number in (1, 2):  # what is stored doesn't leave either
        assert train(silo, adapter, number=number).refusal.rule == rule
    assert kinds(silo) == ["open", "reserve", "charge", "release", "policy"]
    toml(budget_epsilon=PLAN.epsilon, budget_delta=PLAN.delta)  # all of it is reserved, and no more
    assert train(silo, adapter, number=2).WhichOneof("kind") == "trained"


@pytest.mark.parametrize("content", ["[policy", None, '[silo]\nid = "north"\n'])
def test_settings_that_do_not_hold_refuse_everything(start, toml, adapter, content):
    silo = start()
    reserve(silo)
    path = toml()
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert train(silo, adapter).refusal.rule == "policy"
    lines = (silo.ledger.path.parent / "silo.log").read_text().splitlines()
    errors = [line for line in lines if " ERROR " in line]
    assert len(errors) == 1
    assert f"everything is refused until this is mended: {path}" in errors[0]
    toml()
    assert train(silo, adapter).WhichOneof("kind") == "trained"


# The steward ends a run


def runs(path, *arguments):
    done = CliRunner().invoke(silo_app, ["runs", *arguments, "-c", str(path), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_steward_sees_runs_and_ends_one_while_the_service_runs(start, toml, adapter):
    silo, path = start(), toml()
    assert CliRunner().invoke(silo_app, ["runs", "-c", str(path)]).stdout == "no runs\n"
    reserve(silo)
    reserve(silo, OTHER)
    train(silo, adapter)
    mine, others = runs(path)
    assert mine["run"] == others["run"] == "run-1"
    assert (mine["rounds_charged"], mine["rounds_planned"], mine["state"]) == (1, 2, "open")
    assert mine["epsilon_reserved"] == pytest.approx(PLAN.epsilon)
    assert mine["coordinator"] == COORDINATOR.public_key[:16]
    several = CliRunner().invoke(silo_app, ["runs", "stop", "run-1", "-c", str(path)])
    assert "2 open runs are called 'run-1'" in str(several.exception)
    stopped = runs(path, "stop", "run-1", "--coordinator", mine["coordinator"])
    assert stopped["state"] == "stopped by the steward"
    refusal = train(silo, adapter, number=2).refusal
    assert (refusal.rule, refusal.message) == ("closed", "closed: run run-1 was stopped by the silo's steward")
    assert train(silo, adapter, OTHER).WhichOneof("kind") == "trained"
    assert RunStatement.from_bytes(close(silo).statement, "test").rounds_charged == 1
    assert [run["state"] for run in runs(path)] == ["stopped by the steward", "open"]
    [closing] = [body for body in bodies(silo) if body["kind"] == "close"]
    assert (closing["by"], closing["coordinator"]) == ("steward", COORDINATOR.public_key)
    again = CliRunner().invoke(silo_app, ["runs", "stop", "run-2", "-c", str(path)])
    assert "0 open runs are called 'run-2'" in str(again.exception)
