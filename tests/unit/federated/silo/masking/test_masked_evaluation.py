"""Real silos whose noised sums of a private evaluation leave under masks alone, and what they are charged for them."""

import json

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from silo_requests import COORDINATOR, TRUSTED, ask, ward

from configs.storage.files import digest_bytes
from federated.aggregation.secure_sum import agreement, members
from federated.evaluation.private_sums import bounds_of, evaluated, private_sums
from federated.protocol import silo_pb2 as pb
from federated.protocol.framing import SECURE_VERSION
from federated.silo import silo as of_silo
from federated.silo.silo import Silo
from privacy.mechanism.streams import Streams, injected_seeds
from privacy.plan import METRIC, PlanTerms
from privacy.secagg.failures import SecureAggregationError
from privacy.secagg.messages import Phase
from privacy.secagg.server import Server
from privacy.secure_sum import SharedNoise

NAMES = ("east", "north", "south")
SEED = bytes(range(32))
CLIP = 500.0
MULTIPLIER = 5.0
METRICS = ({"name": METRIC, "noise_multiplier": MULTIPLIER, "releases": 2},)
RECORD = PlanTerms(
    sampling_rate=0.05,
    max_grad_norm=1.0,
    noise_multiplier=0.8,
    rounds=2,
    steps_per_round=1,
    delta=1e-5,
    secure_sum={"colluders": 1, "min_survivors": 3},
    metric_releases=METRICS,
)
TOGETHER = {"colluders": 1, "noise": SharedNoise(min_honest=2, reach=40.0, values=2**20)}
DISTRIBUTED = PlanTerms.model_validate({**RECORD.model_dump(), "secure_sum": TOGETHER})


class Silos:
    """Three silos, and what all of them know."""

    def __init__(self, folder, model):
        self.folder, self.model, self.roster, self.silos = folder, model, {}, {}
        for name in NAMES:
            (folder / name).mkdir()
            self.open(name)
            self.roster[name] = self.silos[name].ledger.public_key

    def open(self, name):
        config = ward(self.folder / name, self.model, releases_metrics=True, honest_silos=2, min_colluders=1)
        config = config.model_copy(update={"silo": config.silo.model_copy(update={"id": name})})
        self.silos[name] = Silo(config, TRUSTED, SEED, roster=self.roster)

    def ask(self, name, request_id, **kind):
        return ask(self.silos[name], request_id, silo_id=name, version=SECURE_VERSION, **kind)

    def reserve(self, plan):
        asked = pb.Reserve(plan=plan.model_dump_json(), secure=pb.Secure(roster=members(self.roster)))
        for name in NAMES:
            assert self.ask(name, "reserve", reserve=asked)[0].WhichOneof("kind") == "reserved"

    def evaluate(self, plan, roster=None, **changes):
        digest = self.silos["north"].workbench.base_model.content_digest
        secure = pb.Secure(roster=members(self.roster if roster is None else roster), clip=CLIP)
        given = {"number": 1, "metric": METRIC, "plan_digest": plan.digest, "base_model_digest": digest}
        spec = pb.AdapterSpec(rank=4, alpha=8.0)
        return pb.Evaluate(**{**given, "task": "causal", "adapter_spec": spec, "secure": secure, **changes})

    def summed(self, plan, asked, gone=()):
        """The server after all phases, and each silo's request; silos that are gone send no masked vector."""
        bounds = self.bounds()
        terms = plan.secure_sum
        server = Server(agreement(asked, terms, COORDINATOR.public_key, "run-1", bounds.num_sums))
        bodies = {}
        for name in NAMES:
            reply, bodies[name] = self.ask(name, "evaluation-1", evaluate=asked)
            assert list(reply.evaluated.sums) == []
            server.receive(reply.evaluated.keys)
        inbox = server.advance()
        for phase in list(Phase)[1:]:
            for name in inbox:
                if phase < Phase.MASKED or name not in gone:
                    server.receive(self.aggregate(name, phase, inbox[name]).aggregated.message)
            inbox = server.advance()
        return server, bodies

    def aggregate(self, name, phase, message, metric=METRIC):
        asked = pb.Aggregate(round=1, phase=phase, message=message, metric=metric)
        return self.ask(name, f"evaluation-1-{phase}", aggregate=asked)[0]

    def bounds(self):
        silo = self.silos["north"]
        return bounds_of(silo.workbench.base_model, silo.config.policy.task_spec, ())

    def in_the_clear(self, name, asked, body):
        """A silo's noised sums, as it would send them without masks to the very same request."""
        silo, digest = self.silos[name], digest_bytes(body)
        streams = Streams(injected_seeds(SEED, name)(digest), digest)
        bench = silo.workbench
        with evaluated(bench.model(asked), None):
            held_out, model = bench.held_out, bench.model(asked).eval()
            return private_sums(model, bench.task, held_out, [], self.bounds(), MULTIPLIER, streams)


@pytest.fixture
def three(tmp_path, tiny_model):
    silos = Silos(tmp_path, tiny_model)
    yield silos
    for silo in silos.silos.values():
        silo.close()


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


@pytest.mark.parametrize("plan", [RECORD, DISTRIBUTED], ids=["record", "distributed"])
def test_what_is_unmasked_is_the_plaintext_sum_of_what_each_silo_would_have_sent(three, plan):
    three.reserve(plan)
    asked = three.evaluate(plan)
    server, bodies = three.summed(plan, asked)
    encoding = server._agreement.encoding
    plain = np.sum([three.in_the_clear(name, asked, bodies[name]) for name in NAMES], axis=0)
    assert np.abs(encoding.decode(server.total()) - plain).max() <= encoding.error_bound(3) + 1e-9
    assert encoding.error_bound(3) < 1e-4 * MULTIPLIER  # far below the noise
    assert server.survivors == list(NAMES)
    for name in NAMES:
        assert kinds(three.silos[name]) == ["open", "reserve", "charge", "release"]


def test_each_silo_has_all_of_its_noise_under_the_mask(three, monkeypatch):
    """Also where the silos make the noise of their steps together: an evaluation's rests on no other silo."""
    seen, written = {}, of_silo.written

    def watched(sums, encoding):
        seen[len(seen)] = np.array(sums)
        return written(sums, encoding)

    monkeypatch.setattr(of_silo, "written", watched)
    three.reserve(DISTRIBUTED)
    asked = three.evaluate(DISTRIBUTED)
    _, bodies = three.summed(DISTRIBUTED, asked)
    for place, name in enumerate(NAMES):
        assert seen[place].tolist() == three.in_the_clear(name, asked, bodies[name])


@pytest.mark.parametrize("plan", [RECORD, DISTRIBUTED], ids=["record", "distributed"])
def test_masks_change_no_charge_and_it_is_that_of_dp_accounting(plan):
    beside = dp.SelfComposedDpEvent(dp.GaussianDpEvent(MULTIPLIER), 2)
    sigma = plan.schedule.noise_multiplier  # of the steps; of shares what is left after rounding
    step = dp.PoissonSampledDpEvent(plan.sampling_rate, dp.GaussianDpEvent(sigma))
    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    event = dp.ComposedDpEvent([dp.SelfComposedDpEvent(step, plan.steps), beside])
    assert accountant.compose(event).get_epsilon(plan.delta) == pytest.approx(plan.epsilon, rel=5e-3)
    if plan is RECORD:
        assert plan.epsilon == plan.model_copy(update={"secure_sum": None}).epsilon


def test_an_evaluation_by_itself_is_refused_in_a_run_of_sums_before_it_is_charged(three):
    three.reserve(RECORD)
    others = {"far": "22" * 32}
    for asked in (three.evaluate(RECORD, roster={}), three.evaluate(RECORD, roster={**three.roster, **others})):
        refusal = three.ask("north", "evaluation-1", evaluate=asked)[0].refusal
        assert refusal.rule == "roster" and "\n" not in refusal.message
    for clip in (0.0, float("nan"), float("inf"), -1.0):
        secure = pb.Secure(roster=members(three.roster), clip=clip)
        refusal = three.ask("north", "evaluation-1", evaluate=three.evaluate(RECORD, secure=secure))[0].refusal
        assert refusal.rule == "secure_aggregation" and "clip" in refusal.message
    assert kinds(three.silos["north"]) == ["open", "reserve"]


def test_masks_are_refused_in_a_run_that_has_none(three):
    plan = RECORD.model_copy(update={"secure_sum": None})
    three.ask("north", "reserve", reserve=pb.Reserve(plan=plan.model_dump_json()))
    refusal = three.ask("north", "evaluation-1", evaluate=three.evaluate(plan))[0].refusal
    assert refusal.rule == "secure_aggregation" and kinds(three.silos["north"]) == ["open", "reserve"]


def test_two_silos_that_were_shown_two_models_are_never_added_up(three):
    three.reserve(RECORD)
    asked = three.evaluate(RECORD)
    server = Server(agreement(asked, RECORD.secure_sum, COORDINATOR.public_key, "run-1", three.bounds().num_sums))
    other = three.evaluate(RECORD, adapter_spec=pb.AdapterSpec(rank=2, alpha=8.0))
    server.receive(three.ask("north", "evaluation-1", evaluate=asked)[0].evaluated.keys)
    with pytest.raises(SecureAggregationError, match="another round, model, adapter, plan, roster"):
        server.receive(three.ask("south", "evaluation-1", evaluate=other)[0].evaluated.keys)


def test_a_silo_that_was_started_again_drops_out_and_stays_charged(three):
    three.reserve(RECORD)
    asked = three.evaluate(RECORD)
    before = three.ask("north", "evaluation-1", evaluate=asked)[0]
    three.silos["north"].close()
    three.open("north")
    assert three.ask("north", "evaluation-1", evaluate=asked)[0] == before  # the stored reply: no second client
    refusal = three.aggregate("north", Phase.SHARES, b"").refusal
    assert "this silo is in no sum of evaluation 1: it has not evaluated in it, or was started" in refusal.message
    changed = three.evaluate(RECORD, base_model_digest=asked.base_model_digest, adapter_spec=pb.AdapterSpec(rank=1))
    assert three.ask("north", "evaluation-1", evaluate=changed)[0].WhichOneof("kind") in ("refusal", "failure")
    assert kinds(three.silos["north"]) == ["open", "reserve", "charge", "release"]


def test_a_rounds_sum_and_an_evaluations_of_the_same_number_are_two(three):
    three.reserve(RECORD)
    three.ask("north", "evaluation-1", evaluate=three.evaluate(RECORD))
    refusal = three.aggregate("north", Phase.SHARES, b"", metric="").refusal
    assert "this silo is in no sum of round 1" in refusal.message
    assert "this is no message" in three.aggregate("north", Phase.SHARES, b"").refusal.message
