"""Real silos that make the noise of a sum together: what the sum is, what it is charged, and what is never unmasked."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from silo_requests import COORDINATOR, TRUSTED, acquainted, ask

from configs.schema.silo import SiloPolicy
from configs.storage.files import digest_bytes
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.warm_model import initial_adapter, put_on
from federated.aggregation.secure_sum import agreement, length_of, members
from federated.coordinator.secure.shared_step import SharedStep
from federated.protocol import silo_pb2 as pb
from federated.protocol.framing import SECURE_VERSION
from federated.silo.silo import Silo
from privacy.distributed import distributed
from privacy.distributed.planned import of_length
from privacy.mechanism.sampler import one_example_each, sample
from privacy.mechanism.streams import Streams, injected_seeds
from privacy.plan import PlanTerms
from privacy.secagg.client import Client
from privacy.secagg.failures import SecureAggregationError, TooFewSilos
from privacy.secagg.messages import Phase, server_message
from privacy.secagg.server import Server
from privacy.secure_sum import SharedNoise
from trainer.models.adapters import trainable

NAMES = ("east", "north", "south", "west")
SEED = bytes(range(32))
PLAN = PlanTerms(
    sampling_rate=0.2,
    max_grad_norm=0.5,
    noise_multiplier=1.5,
    rounds=2,
    steps_per_round=1,
    delta=1e-5,
    secure_sum={"colluders": 1, "noise": SharedNoise(min_honest=2, reach=40.0, values=2**26)},
)


def plan_with(**noise):
    shared = PLAN.secure_sum.noise.model_copy(update=noise)
    return PLAN.model_copy(update={"secure_sum": PLAN.secure_sum.model_copy(update={"noise": shared})})


@dataclass
class Silos:
    """Four silos, and what all of them know."""

    silos: dict
    roster: dict
    adapter: bytes

    def ask(self, name, request_id, **kind):
        return ask(self.silos[name], request_id, silo_id=name, version=SECURE_VERSION, **kind)[0]

    def reserve(self, name, plan=PLAN):
        asked = pb.Reserve(plan=plan.model_dump_json(), secure=pb.Secure(roster=members(self.roster)))
        return self.ask(name, "reserve", reserve=asked)

    def train(self, plan=PLAN, clip=0.0, **changes):
        return pb.Train(
            **{
                "round": 1,
                "plan_digest": plan.digest,
                "base_model_digest": self.silos["north"].workbench.base_model.content_digest,
                "task": "causal",
                "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
                "adapter": self.adapter,
                "learning_rate": 0.1,
                "optimizer": "sgd",
                "secure": pb.Secure(roster=members(self.roster), clip=clip),
                **changes,
            }
        )

    def server(self, train, plan=PLAN):
        length = length_of(from_bytes(train.adapter))
        return Server(agreement(train, plan.secure_sum, COORDINATOR.public_key, "run-1", length))

    def keys(self, name, train, plan=PLAN):
        self.reserve(name, plan)
        return ask(self.silos[name], "round-1", silo_id=name, version=SECURE_VERSION, train=train)

    def aggregate(self, name, phase, message):
        asked = pb.Aggregate(round=1, phase=phase, message=message)
        return self.ask(name, f"round-1-{phase}", aggregate=asked)

    def summed(self, train, plan=PLAN, gone=()):
        """The server after all phases, and each silo's request; ``gone`` has (silo, phase from which it is silent)."""
        server, bodies, silent = self.server(train, plan), {}, dict(gone)
        for name in NAMES:
            reply, bodies[name] = self.keys(name, train, plan)
            server.receive(reply.trained.keys)
        inbox = server.advance()
        for phase in list(Phase)[1:]:
            for name in inbox:
                if phase < silent.get(name, 99):
                    server.receive(self.aggregate(name, phase, inbox[name]).aggregated.message)
            inbox = server.advance()
        return server, bodies

    def noise(self, plan=PLAN):
        return of_length(plan.noise, length_of(from_bytes(self.adapter)))


@pytest.fixture(scope="module")
def adapter(tiny_run):
    draw = np.random.default_rng(1)
    start = initial_adapter(tiny_run.config(), tiny_run.model)
    return to_bytes({n: (a + 0.02 * draw.standard_normal(a.shape)).astype(np.float32) for n, a in start.items()})


@pytest.fixture
def four(tmp_path, tiny_model, adapter):
    with acquainted(tmp_path, tiny_model, NAMES, SEED, max_sampling_rate=0.5, honest_silos=2) as (silos, roster):
        yield Silos(silos, roster, adapter)


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


def clipped_by_hand(silo, train, body, plan=PLAN):
    """The sum over a silo's sampled records of their gradients, clipped one by one, in float64."""
    request_digest = digest_bytes(body)
    streams = Streams(injected_seeds(SEED, silo.config.silo.id)(request_digest), request_digest)
    bench, bound = silo.workbench, plan.bind(100)
    model = bench.model(train)
    put_on(model, from_bytes(train.adapter))
    model.train()
    units = bench.records
    batch = one_example_each(streams, 0, units, sample(bound, streams, 0, len(units)))
    total = np.zeros(length_of(from_bytes(train.adapter)))
    for record in batch:
        model.zero_grad()
        bench.task.record_losses(model, bench.task.collate([record])).sum().backward()
        parts = [trainable(model)[name].grad.double().numpy().reshape(-1) for name in sorted(trainable(model))]
        gradient = np.concatenate(parts)
        total += gradient * min(1.0, plan.max_grad_norm / np.linalg.norm(gradient))
    model.zero_grad()
    return total, len(batch)


@pytest.fixture
def without_noise(monkeypatch):
    """Shares of zeros: what is left of an encoded sum is its rounding."""
    monkeypatch.setattr(distributed, "discrete_gaussian", lambda _bits, size, _stream: np.zeros(size, np.int64))


def test_the_sum_without_its_noise_is_that_of_single_clipped_records(four, without_noise):
    """Which records are sampled differs from session to session: that there is none at all has a chance of 1e-16."""
    train = four.train()
    server, bodies = four.summed(train)
    found, noise = four.noise().decode(server.total()), four.noise()
    by_hand = [clipped_by_hand(four.silos[name], train, bodies[name]) for name in NAMES]
    exact = sum(total for total, _ in by_hand)
    records = sum(number for _, number in by_hand)
    # Float32's own rounding of gradients and factors, beside the dither's of one step for each silo.
    assert np.abs(found - exact).max() <= noise.rounding_bound(4) + 1e-5 * PLAN.max_grad_norm * records
    assert np.linalg.norm(exact) > 1e3 * np.sqrt(len(exact)) * noise.rounding_bound(4)
    step = SharedStep(noise, PLAN.sampling_rate, 0.1)
    moved = step.update(server.total(), dict.fromkeys(NAMES, 100), {}, from_bytes(train.adapter))
    flat = np.concatenate([moved[name].reshape(-1) for name in sorted(moved)])
    assert np.abs(flat + 0.1 * exact / 80).max() < 1e-6  # 80: a fifth of four times 100 records


@pytest.mark.parametrize("gone", [(), (("east", Phase.MASKED),)])
def test_the_noise_of_a_sum_is_that_of_its_survivors_and_at_least_what_is_charged(four, gone, monkeypatch):
    train = four.train()
    server, bodies = four.summed(train, gone=gone)
    left = [name for name in NAMES if name not in dict(gone)]
    assert server.survivors == left
    noise = four.noise()
    exact = sum(clipped_by_hand(four.silos[name], train, bodies[name])[0] for name in left)
    drawn = noise.decode(server.total()) - exact
    wanted = noise.noise_std(len(left))
    assert wanted >= PLAN.noise_multiplier * PLAN.max_grad_norm * (1 - 1e-12)
    # Two shares are what is charged; the one that a colluder knows, and any others, come on top.
    assert wanted == pytest.approx(PLAN.noise_multiplier * PLAN.max_grad_norm * np.sqrt(len(left) / 2))
    # Keys, and with them the draws, are new in each session: these fail by chance once in 10^9 sessions at most.
    assert drawn.std() == pytest.approx(wanted, rel=6.5 / np.sqrt(2 * len(drawn)))
    assert abs(drawn.mean()) < 6.5 * wanted / np.sqrt(len(drawn))


def test_silos_draw_noise_of_their_own_and_one_more_time_the_same(four):
    """A silo that is asked again after a crash sends the very same words, under other masks."""
    train, words = four.train(), {}
    for name in NAMES:
        four.keys(name, train)
        words[name] = four.silos[name]._masking._open[COORDINATOR.public_key, "run-1", ""].words
    spread = four.noise().noise_std(1)
    for one, other in (("east", "north"), ("east", "south")):
        difference = four.noise().decode(words[one]) - four.noise().decode(words[other])
        assert difference.std() > spread  # two shares and two samples
    again = Silo(four.silos["north"].config, TRUSTED, SEED, roster=four.roster)
    release, again.ledger.release = again.ledger.release, lambda *_: (_ for _ in ()).throw(OSError("no space left"))
    second = four.train(round=2)
    four.silos["north"].close()
    four.silos["north"] = again
    assert four.ask("north", "round-2", train=second).failure.code
    kept = {}
    begun = again._masking.begun
    again._masking.begun = lambda *given: kept.setdefault(len(kept), begun(*given))
    assert four.ask("north", "round-2", train=second).failure.code
    again.ledger.release = release
    assert four.ask("north", "round-2", train=second).trained.keys
    assert (kept[0].words == kept[1].words).all() and kept[0].keys != kept[1].keys
    assert not (kept[0].words == words["north"]).all()
    refused = four.ask("north", "round-2", train=four.train(round=2, learning_rate=0.2)).refusal
    assert refused.rule == "request_id"
    assert kinds(again).count("charge") == 2


@pytest.mark.parametrize("phase", list(Phase)[1:])
def test_with_fewer_than_are_charged_for_nothing_is_unmasked(four, phase):
    """Three of four are left out by the server, which may lie as it likes: the last one tells it nothing."""
    train = four.train()
    server = four.server(train)
    for name in NAMES:
        server.receive(four.keys(name, train)[0].trained.keys)
    inbox = server.advance()
    for now in range(Phase.SHARES, phase):
        for name in NAMES:
            server.receive(four.aggregate(name, now, inbox[name]).aggregated.message)
        inbox = server.advance()
    if phase is not Phase.REVEALED:
        server.receive(four.aggregate("north", phase, inbox["north"]).aggregated.message)
        with pytest.raises(TooFewSilos, match="1 silos are left, and 3 have to be"):
            server.advance()
    forged = server_message(phase, server._agreement.digest, b"north")  # a list of one survivor, where one is due
    told = four.aggregate("north", min(phase + 1, Phase.REVEALED), forged)
    assert told.refusal.rule == "secure_aggregation"
    assert kinds(four.silos["north"]) == ["open", "reserve", "charge", "release"]  # what was charged stays
    assert four.silos["north"].ledger.left().epsilon == pytest.approx(20 - PLAN.epsilon)


def test_a_list_of_too_few_survivors_is_not_signed(four):
    """A sum of one silo and another one's share of the noise is all that a hostile server is after."""
    train = four.train()
    server = four.server(train)
    for name in NAMES:
        server.receive(four.keys(name, train)[0].trained.keys)
    inbox = server.advance()
    for now in (Phase.SHARES, Phase.MASKED):
        for name in NAMES:
            server.receive(four.aggregate(name, now, inbox[name]).aggregated.message)
        inbox = server.advance()
    digest = server._agreement.digest
    for few in ((b"north",), ()):
        told = four.aggregate("north", Phase.SURVIVORS, server_message(Phase.MASKED, digest, *few))
        assert "silos are left, and 3 have to be" in told.refusal.message
    assert four.aggregate("north", Phase.SURVIVORS, inbox["north"]).aggregated.message


def test_the_charge_is_the_plans_and_comes_before_anything_is_read(four):
    assert four.reserve("north").WhichOneof("kind") == "reserved"
    reserved = json.loads(four.silos["north"].ledger.entries()[1]["body"])
    assert reserved["epsilon"] == PLAN.epsilon and reserved["plan"]["secure_sum"]["noise"]["min_honest"] == 2
    more = plan_with(min_honest=3)
    assert four.ask("north", "round-1", train=four.train(more)).refusal.rule == "reservation"
    assert kinds(four.silos["north"]) == ["open", "reserve"]


def test_a_steward_says_how_many_honest_silos_a_run_may_count_on(four):
    refusal = four.reserve("north", plan_with(min_honest=3)).refusal
    assert (refusal.rule, refusal.asked, refusal.allowed) == ("honest_silos", "3", "2")
    silo = four.silos["north"]
    for allowed, kind in ((0, "refusal"), (1, "refusal"), (2, "reserved")):
        policy = silo.config.policy.model_copy(update={"honest_silos": allowed})
        silo.config = silo.config.model_copy(update={"policy": policy})
        assert four.reserve("north").WhichOneof("kind") == kind
    assert SiloPolicy(budget_epsilon=1, budget_delta=1e-5).honest_silos == 0
    policy = silo.config.policy.model_copy(update={"honest_silos": 0})  # no longer, in the middle of the run
    silo.config = silo.config.model_copy(update={"policy": policy})
    assert four.ask("north", "round-1", train=four.train()).refusal.rule == "honest_silos"
    assert kinds(silo) == ["open", "reserve"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"min_honest": 1}, "min_honest"),
        ({"reach": 0.5}, "give more than max_grad_norm"),
        ({"reach": 1e9}, "does not fit 32 bits"),
        ({"reach": float("inf")}, "reach"),
        ({"values": 2**32}, "values"),
        ({"word_bits": 8}, "word_bits"),
        ({"word_bits": 16}, "would cost more than a unit does"),
        ({"min_honest": 2**14}, "at most 32767"),
    ],
)
def test_noise_that_no_sum_could_have_is_refused_before_anything_is_reserved(four, change, said):
    tree = PLAN.model_dump()
    tree["secure_sum"]["noise"] |= change
    asked = pb.Reserve(plan=json.dumps(tree), secure=pb.Secure(roster=members(four.roster)))
    refusal = four.ask("north", "reserve", reserve=asked).refusal
    assert refusal.rule == "plan" and said in refusal.message and "\n" not in refusal.message
    assert kinds(four.silos["north"]) == ["open"]


@pytest.mark.parametrize("change", [{"steps_per_round": 2}, {"clipping_function": "quantile", "target_quantile": 0.5}])
def test_other_steps_than_the_proof_is_about_are_refused(four, change):
    asked = pb.Reserve(plan=json.dumps({**PLAN.model_dump(), **change}))
    assert "with secure_sum.noise give" in four.ask("north", "reserve", reserve=asked).refusal.message


def test_a_request_for_more_values_than_were_charged_or_with_a_clip_of_its_own_is_refused(four):
    small = plan_with(values=1000)
    four.reserve("north", small)
    assert four.ask("north", "round-1", train=four.train(small)).refusal.rule == "values"
    four.reserve("south")
    assert four.ask("south", "round-1", train=four.train(clip=1.0)).refusal.rule == "clip"
    assert kinds(four.silos["north"]) == kinds(four.silos["south"]) == ["open", "reserve"]


def test_more_silos_than_the_words_have_room_for_are_refused(four):
    """A plan for two honest ones and a colluder has room for four, and none for five; and no sum is of two."""
    known = dict(four.roster)
    four.roster |= {"far": "22" * 32}
    refusal = four.reserve("north").refusal
    assert (refusal.rule, refusal.asked, refusal.allowed) == ("roster", "5 silos", "3 to 4 silos")
    four.roster.clear()
    four.roster |= {name: known[name] for name in ("east", "north")}
    assert four.reserve("north").refusal.asked == "2 silos"
    assert kinds(four.silos["north"]) == ["open"]


def test_a_silo_that_knows_its_own_share_is_counted_among_the_colluders(four):
    tree = PLAN.model_dump()
    tree["secure_sum"]["colluders"] = 0
    refusal = four.ask("north", "reserve", reserve=pb.Reserve(plan=json.dumps(tree))).refusal
    assert refusal.rule == "plan" and "colluders is 0: with secure_sum.noise give 1 or more" in refusal.message


def test_silos_that_are_shown_two_models_or_two_rates_are_never_added_up(four):
    trains = {name: four.train() for name in NAMES}
    moved = {name: array + 1 for name, array in from_bytes(four.adapter).items()}
    for other in (four.train(adapter=to_bytes(moved)), four.train(learning_rate=0.2)):
        server = four.server(trains["north"])
        server.receive(four.keys("north", trains["north"])[0].trained.keys)
        with pytest.raises(SecureAggregationError):
            server.receive(
                Client("south", four.silos["south"].ledger.journal.signer, four.server(other)._agreement).advertise()
            )
