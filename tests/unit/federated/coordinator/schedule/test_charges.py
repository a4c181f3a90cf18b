"""What buffered rounds cost: real ledgers, beside those of synchronous rounds."""

import copy
import json

import pytest
from clocked_silos import ClockedGrid, turn_by
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from model_parts import FILES
from signed_silos import COUNT, SignedSilo, adapter, coordinator

from configs.errors import InputError
from configs.storage.files import digest_bytes
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply
from privacy.certificate.check import check_certificate, check_in_ledger
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from privacy.ledger.replay import replay
from privacy.plan import PlanTerms

ROUNDS = 4


class LedgerSilo(SignedSilo):
    """One whose reservation, charges, stored replies, receipts and statement are those of a real ledger."""

    def __init__(self, name, folder):
        super().__init__(name)
        self.ledger, self.coordinator = Ledger.open(folder / name, name, f"ward-{name}", Budget(32.0, 1e-4)), ""
        self.signer = self.ledger.journal.signer

    def receipt(self, run, /, **_):
        return self.ledger.receipt(run, self.coordinator)

    def statement(self, run, /, **_):
        return self.ledger.statement(run, {"torch": "2"}, attests_disjoint_units=True, coordinator=self.coordinator)

    def handle(self, content):
        body = pb.Envelope.FromString(content).body
        request = pb.Request.FromString(body)
        if not request.HasField("train"):
            return super().handle(content)
        run, name, number = request.run_id, request.request_id, request.train.round
        charge = self.ledger.charge(run, name, digest_bytes(body), number, "", request.coordinator)
        reply = charge.reply
        if reply is None:
            trained = pb.Envelope.FromString(super().handle(content)).body
            reply = self.ledger.release(charge.number, run, trained)
        return seal_reply(self.signer, reply)

    def answer(self, request, reply):
        run, self.coordinator = request.run_id, request.coordinator
        if request.HasField("reserve"):
            terms = PlanTerms.model_validate_json(request.reserve.plan)
            self.ledger.reserve(run, terms.bind(COUNT), coordinator=request.coordinator)
        if request.HasField("close"):
            self.ledger.close(run, request.coordinator)
        super().answer(request, reply)


def spent(folder, ticks, *overrides):
    """The coordinator and the silos' ledgers, after a run."""
    silos = [LedgerSilo(name, folder) for name in "abc"]
    grid = ClockedGrid(silos, ticks)
    with pytest.MonkeyPatch.context() as patch:
        turn_by(grid, patch)
        given = ("federated.round_timeout_s=10000", f"federated.rounds={ROUNDS}", *overrides)
        one = coordinator(grid, folder, *given)
        one.run(adapter)
    return one, [silo.ledger for silo in silos]


def charges(ledger):
    return [body["round"] for body in ledger.journal.bodies() if body["kind"] == "charge"]


def reserved(ledger):
    (found,) = [body for body in ledger.journal.bodies() if body["kind"] == "reserve"]
    return {name: found[name] for name in ("plan", "epsilon", "delta")}


def test_the_same_tasks_cost_the_same(tmp_path):
    """Every silo gives every round: what its ledger has reserved and charged is the same to the last figure."""
    _, synchronous = spent(tmp_path / "synchronous", (1, 1, 1))
    one, buffered = spent(tmp_path / "buffered", (1, 1, 1), "federated.schedule=buffered", "federated.buffer=3")
    assert list(map(reserved, buffered)) == list(map(reserved, synchronous))
    assert _epsilon(one.plan) <= reserved(buffered[0])["epsilon"] * (1 + 1e-9)
    assert list(map(charges, buffered)) == list(map(charges, synchronous)) == [list(range(1, ROUNDS + 1))] * 3


@pytest.mark.parametrize("ticks", [(1, 2, 5), (1, 1, 40), (3, 1, 2)])
def test_at_any_speeds_each_round_is_charged_once_and_what_was_reserved_covers_it(ticks, tmp_path):
    one, ledgers = spent(tmp_path, ticks, "federated.schedule=buffered", "federated.buffer=2")
    document = json.loads(json.dumps(one.certify_model(FILES)))
    check_certificate(document, "test")
    for name, ledger in zip("abc", ledgers, strict=True):
        bodies, hashes = ledger.journal.bodies(), [entry["hash"] for entry in ledger.entries()]
        replay(bodies, name)
        assert check_in_ledger(document, bodies, hashes, "test") == name  # its releases are those of the model
        assert charges(ledger) == list(range(1, len(charges(ledger)) + 1))
        assert len(charges(ledger)) <= ROUNDS
        assert reserved(ledger)["epsilon"] == reserved(ledgers[0])["epsilon"]


def test_an_update_that_a_certificate_has_of_another_round_is_found_in_the_ledger(tmp_path):
    one, ledgers = spent(tmp_path, (1, 2, 5), "federated.schedule=buffered", "federated.buffer=2")
    document = json.loads(json.dumps(one.certify_model(FILES)))
    first = document["model"]["rounds"][0]["updates"][0]
    edits = {"digest": ("ab" * 32, "the release of"), "round": (3, "the release of|went into the model twice")}
    ledger = next(ledger for ledger in ledgers if ledger.journal.silo_id == first["silo"])
    for name, (value, message) in edits.items():
        other = copy.deepcopy(document)
        other["model"]["rounds"][0]["updates"][0][name] = value
        with pytest.raises(InputError, match=message):
            check_certificate(other, "test")
            hashes = [entry["hash"] for entry in ledger.entries()]
            check_in_ledger(other, ledger.journal.bodies(), hashes, "test")


def _epsilon(plan):
    """Of all rounds that a silo can be asked for, by dp-accounting alone."""
    accountant = PLDAccountant()
    step = PoissonSampledDpEvent(plan.sampling_rate, GaussianDpEvent(plan.noise_multiplier))
    accountant.compose(SelfComposedDpEvent(step, ROUNDS * plan.steps_per_round))
    return accountant.get_epsilon(plan.delta)
