"""Error feedback at a silo: what leaves is what noised updates and public rules make, whatever crashes in between."""

import json
from pathlib import Path

import numpy as np
import pytest
from silo_requests import COORDINATOR, TRUSTED, ask, body_of, ward

from configs.storage.files import digest_bytes, private_folder
from federated.adapters.arrays import flat, from_bytes, to_bytes
from federated.adapters.packed_updates import packed, unpacked
from federated.adapters.warm_model import initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.protocol.framing import COMPRESSED_VERSION
from federated.silo.local_training import PrivateUpdate
from federated.silo.released.released import Released
from federated.silo.remainders import remainders
from federated.silo.remainders.remainders import Remainders
from federated.silo.silo import FAILED, Silo
from privacy.compression import Compression
from privacy.ledger.journal import default_anchor_dir
from privacy.ledger.runs import Runs
from privacy.plan import PlanTerms

HOW = Compression(dtype="int4", block=64, share=0.1)
PLAN = PlanTerms(
    sampling_rate=0.05,
    max_grad_norm=1.0,
    noise_multiplier=0.9,
    rounds=4,
    steps_per_round=1,
    delta=1e-5,
    compression=HOW,
)
WHOLE = PLAN.model_copy(update={"compression": None})
SEED = bytes(range(32))


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return initial_adapter(tiny_run.config(), tiny_run.model)


@pytest.fixture
def open_silo(tmp_path, tiny_model):
    silos = []

    def start(name="a", keep_released=False, **policy):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = ward(folder, tiny_model, **policy)
        config = config.model_copy(update={"silo": config.silo.model_copy(update={"keep_released": keep_released})})
        key = private_folder(folder / "state") / "split.key"
        if not key.exists():  # silos that are compared have held out the same
            key.touch(mode=0o600)
            key.write_bytes(SEED)
        silos.append(Silo(config, TRUSTED, SEED))
        return silos[-1]

    yield start
    for silo in silos:
        silo.close()


@pytest.fixture
def noised(monkeypatch):
    """The updates as training gives them, before anything is done about how they travel."""
    made, run = [], PrivateUpdate.run
    monkeypatch.setattr(PrivateUpdate, "run", lambda *given: made.append(run(*given)) or made[-1])
    return made


def reserve(silo, plan=PLAN, **changes):
    asked = pb.Reserve(plan=json.dumps(plan.model_dump()))
    return ask(silo, "reserve", **{"version": COMPRESSED_VERSION, **changes}, reserve=asked)[0]


def asked(silo, adapter, number, plan=PLAN, **changes):
    train = {
        "round": number,
        "plan_digest": plan.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
        "adapter": to_bytes(adapter),
        "learning_rate": 0.01,
        "optimizer": "adam",
    }
    return pb.Train(**{**train, **changes})


def trained(silo, adapter, number, run="run-1", **changes):
    request = {"version": COMPRESSED_VERSION, "run_id": run, "train": asked(silo, adapter, number, **changes)}
    return ask(silo, f"round-{number}", **request)[0]


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


def kept(silo):
    folder = silo.ledger.path.parent / "remainders"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def by_hand(updates):
    """What should leave in each round, and what of all of them has not left in the end."""
    left, said = 0.0, []
    for update in updates:
        whole = (flat(update) + np.float32(left)).astype(np.float32)
        kept = np.argsort(-np.abs(whole), kind="stable")[: int(np.ceil(HOW.share * len(whole)))]
        chosen, steps = np.zeros(len(whole), bool), np.zeros(len(whole), np.float32)
        chosen[kept] = True
        for start in range(0, len(kept), HOW.block):
            places = np.flatnonzero(chosen)[start : start + HOW.block]
            scale = np.abs(whole[places]).max() / np.float32(7)
            steps[places] = np.rint(whole[places] / scale) * scale
        said.append(steps)
        left = whole - steps
    return said, left


def test_what_leaves_is_the_largest_of_the_noised_updates_and_of_what_they_left_out(open_silo, adapter, noised):
    silo = open_silo()
    assert reserve(silo).WhichOneof("kind") == "reserved"
    shapes = {name: array.shape for name, array in adapter.items()}
    replies = [trained(silo, adapter, number) for number in (1, 2, 3)]
    sent = [flat(unpacked(reply.trained.update, HOW, shapes)) for reply in replies]
    said, left = by_hand(noised)
    for one, other in zip(sent, said, strict=True):
        assert np.array_equal(one, other)
        assert np.count_nonzero(one) <= HOW.kept(len(one))
    # Nothing is lost: what has left and what has not are all that was noised, up to float32's own rounding.
    everything = sum(flat(update).astype(np.float64) for update in noised)
    assert np.abs(sum(one.astype(np.float64) for one in sent) + left - everything).max() < 1e-6
    assert len(replies[0].trained.update) < len(to_bytes(adapter)) / 25
    # A file beside the newest reply alone, its owner's; and no entry of the ledger more than without.
    (name,) = kept(silo)
    assert name == digest_bytes(replies[-1].SerializeToString(deterministic=True))
    path = silo.ledger.path.parent / "remainders" / name
    assert path.stat().st_mode & 0o777 == 0o600
    assert kinds(silo) == ["open", "reserve", *["charge", "release"] * 3]
    closed = ask(silo, "close", version=COMPRESSED_VERSION, close=pb.Close())[0]
    assert closed.WhichOneof("kind") == "closed"
    assert kept(silo) == []


def test_a_charge_is_what_it_is_without_and_the_digest_says_how_updates_travel():
    assert PLAN.epsilon == WHOLE.epsilon
    digests = [PLAN.digest, WHOLE.digest]
    for change in ({"share": 0.2}, {"block": 32}, {"dtype": "int8"}):
        other = PLAN.model_copy(update={"compression": HOW.model_copy(update=change)})
        digests.append(other.digest)
    assert len(set(digests)) == len(digests)
    assert "compression" not in WHOLE.model_dump()
    assert PlanTerms(**PLAN.model_dump()) == PLAN


@pytest.mark.parametrize("at", ["before the file", "before the reply", "after the reply"])
def test_a_crash_at_any_instant_comes_to_the_same_bytes(open_silo, adapter, monkeypatch, at):
    """Beside a silo that nothing happens to, with the same seeds."""
    undisturbed, silo = open_silo("b"), open_silo("a")
    for one in (undisturbed, silo):
        reserve(one)
        trained(one, adapter, 1)
    expected = [trained(undisturbed, adapter, number).trained.update for number in (2, 3)]

    def dies(*_):
        raise SystemExit

    monkeypatch.setattr(*{
        "before the file": (Remainders, "keep", dies),
        "before the reply": (silo.ledger, "release", dies),
        "after the reply": (Remainders, "drop_old", dies),
    }[at])  # fmt: skip
    with pytest.raises(SystemExit):
        trained(silo, adapter, 2)
    monkeypatch.undo()
    silo.close()
    silo = open_silo("a")
    assert [trained(silo, adapter, number).trained.update for number in (2, 3)] == expected
    assert trained(silo, adapter, 2).trained.update == expected[0]  # the stored reply, whatever came after it
    assert trained(silo, adapter, 3).trained.update == expected[1]
    assert len(kept(silo)) == 1
    assert kinds(silo).count("charge") == 3


def test_a_failed_round_is_asked_again_and_another_runs_updates_change_nothing(open_silo, adapter, monkeypatch):
    alone, silo = open_silo("b", budget_epsilon=100.0), open_silo("a", budget_epsilon=100.0)
    for one in (alone, silo):
        reserve(one)
        trained(one, adapter, 1)
    expected = trained(alone, adapter, 2).trained.update
    with monkeypatch.context() as patch:
        patch.setattr(remainders, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        assert trained(silo, adapter, 2).failure.code == FAILED
    reserve(silo, run_id="run-2")
    assert trained(silo, adapter, 1, run="run-2").WhichOneof("kind") == "trained"
    assert len(kept(silo)) == 2
    assert trained(silo, adapter, 2).trained.update == expected
    ask(silo, "close", version=COMPRESSED_VERSION, run_id="run-2", close=pb.Close())
    assert len(kept(silo)) == 1


def test_replies_that_could_not_be_stored_leave_one_file_however_often_they_are_tried(open_silo, adapter, monkeypatch):
    """Another run's entries come between, so that each try has another receipt, and so another digest."""
    silo = open_silo(budget_epsilon=100.0)
    reserve(silo)
    with monkeypatch.context() as patch:
        patch.setattr(silo.ledger, "release", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        for number in range(3):
            assert trained(silo, adapter, 1).failure.code == FAILED
            reserve(silo, run_id=f"other-{number}")
            assert len(kept(silo)) == 1
    reply = trained(silo, adapter, 1)
    assert kept(silo) == [digest_bytes(reply.SerializeToString(deterministic=True))]


@pytest.mark.parametrize("harm", ["lost", "damaged", "cut"])
def test_what_is_lost_costs_quality_alone_and_is_logged(open_silo, adapter, noised, harm):
    silo = open_silo()
    reserve(silo)
    trained(silo, adapter, 1)
    (path,) = (silo.ledger.path.parent / "remainders").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if harm != "lost":
        path.write_bytes(content if harm == "damaged" else content[:50])
    assert trained(silo, adapter, 2).trained.update == packed(noised[1], HOW)
    assert "left out is lost" in (silo.ledger.path.parent / "silo.log").read_text()
    assert kinds(silo).count("charge") == 2


def test_an_update_that_is_not_finite_spends_its_charge_and_spoils_no_later_one(open_silo, adapter, monkeypatch):
    silo = open_silo()
    reserve(silo)
    trained(silo, adapter, 1)
    before = kept(silo)
    run = PrivateUpdate.run

    def broken(*given):
        return {name: np.full_like(array, np.nan) for name, array in run(*given).items()}

    with monkeypatch.context() as patch:
        patch.setattr(PrivateUpdate, "run", broken)
        assert trained(silo, adapter, 2).failure.code == FAILED
    assert kept(silo) == before
    assert trained(silo, adapter, 3).WhichOneof("kind") == "trained"
    assert kinds(silo).count("charge") == 3


@pytest.mark.parametrize(
    ("compression", "more", "said"),
    [
        ({"dtype": "int4", "block": 0, "share": 0.1}, {}, "block is 0 with dtype 'int4'"),
        ({"dtype": "int8", "block": -64}, {}, "compression.block"),
        ({"dtype": "int8", "block": 2**40}, {}, "compression.block"),
        ({"dtype": "int8", "block": 64, "share": 17.0}, {}, "compression.share"),
        ({"dtype": "int8", "block": 64, "share": 0}, {}, "compression.share"),
        ({"dtype": "int8", "block": 64, "share": float("nan")}, {}, "compression.share"),
        ({"dtype": "float16", "share": 0.5}, {}, "compression.dtype"),
        ({"dtype": "int8", "block": 64, "seed": 1}, {}, "compression.seed"),
        ({"dtype": "int4", "block": 64, "share": 0.1}, {"secure_sum": {}}, "which values are sent would be seen"),
        ({"dtype": "int8", "block": 64}, {"secure_sum": {}}, "compression goes with no secure_sum"),
        (
            {"dtype": "int8", "block": 64, "share": 0.5},
            {
                "unit": "client",
                "relation": "zero_out",
                "sampler": "all",
                "sampling_rate": 1,
                "num_clients": 5,
                "rounds": 1,
                "steps_per_round": 1,
            },
            "has no noise, and would be kept",
        ),
        ({"dtype": "int8", "block": 64}, {"version": 1}, "no metric_releases, secure_sum, compression"),
    ],
)
def test_a_hostile_plan_is_refused_by_name_and_reserves_nothing(open_silo, compression, more, said):
    silo = open_silo(units=("record", "client"))
    plan = {**PLAN.model_dump(), **more, "compression": compression}
    request = {"version": COMPRESSED_VERSION, "reserve": pb.Reserve(plan=json.dumps(plan))}
    refusal = ask(silo, "reserve", **request)[0].refusal
    assert refusal.rule == "plan"
    assert said in refusal.message
    assert kinds(silo) == ["open"]


def test_a_request_can_neither_ask_for_another_way_than_the_plan_nor_for_what_the_policy_refuses(open_silo, adapter):
    silo = open_silo()
    reserve(silo)
    refusal = trained(silo, adapter, 1, update_dtype="int8").refusal
    assert (refusal.rule, refusal.asked) == ("update_dtype", "int8")
    assert trained(silo, adapter, 1, plan=WHOLE).refusal.rule == "reservation"
    assert kinds(silo) == ["open", "reserve"]
    strict = open_silo("strict", error_feedback=False)
    refusal = reserve(strict).refusal
    assert refusal.rule == "error_feedback"
    assert "0.1 of an update's values" in refusal.message
    rounded = PLAN.model_copy(update={"compression": HOW.model_copy(update={"share": 1.0})})
    assert reserve(strict, rounded).WhichOneof("kind") == "reserved"
    assert trained(strict, adapter, 1, plan=rounded).WhichOneof("kind") == "trained"
    assert kept(strict) == []
    masked = open_silo("masked", secure_aggregation="required")
    assert reserve(masked).refusal.rule == "secure_aggregation"


def test_a_policy_that_changes_meanwhile_is_asked_in_every_round(open_silo, adapter):
    silo = open_silo()
    reserve(silo)
    trained(silo, adapter, 1)
    silo.config = silo.config.model_copy(update={"policy": ward_policy(silo, error_feedback=False)})
    assert trained(silo, adapter, 2).refusal.rule == "error_feedback"
    assert kinds(silo).count("charge") == 1


def ward_policy(silo, **changes):
    return silo.config.policy.model_copy(update=changes)


def test_what_was_left_out_of_frozen_or_other_arrays_waits_or_is_dropped(tmp_path, open_silo, adapter):
    """A coordinator may ask for another rank, or freeze layers: nothing of another shape is added."""
    silo = open_silo()
    reserve(silo)
    trained(silo, adapter, 1)
    bodies = silo.ledger.journal.bodies()
    run, found = Runs(bodies).of("run-1", COORDINATOR.public_key), silo._remainders
    before = found._before(run, bodies)
    first, second, *_ = sorted(before)
    ones = {first: np.ones_like(before[first]), second: np.ones((3, 3), np.float32)}
    request = pb.Request(run_id="run-1", coordinator=COORDINATOR.public_key)
    written = found.written(ones, HOW, request, silo.ledger.journal)
    sent = unpacked(written.content, HOW, {name: array.shape for name, array in ones.items()})
    assert np.allclose(written.left[first] + sent[first], 1 + before[first], atol=1e-6)
    assert np.allclose(written.left[second] + sent[second], 1)
    assert all(np.array_equal(written.left[name], before[name]) for name in sorted(before)[2:])


def test_a_stewards_own_attack_reads_what_has_left(open_silo, adapter):
    silo = open_silo(keep_released=True)
    reserve(silo)
    reply = trained(silo, adapter, 1)
    bodies = silo.ledger.journal.bodies()
    (released,) = Released(silo.ledger.path.parent).rounds(next(iter(Runs(bodies))), bodies)
    train, update = released.read()
    assert train == asked(silo, adapter, 1)
    shapes = {name: array.shape for name, array in from_bytes(train.adapter).items()}
    assert np.array_equal(flat(update), flat(unpacked(reply.trained.update, HOW, shapes)))


def test_files_beside_no_reply_go_when_the_silo_starts(open_silo, adapter):
    silo = open_silo()
    reserve(silo)
    trained(silo, adapter, 1)
    before = kept(silo)
    (silo.ledger.path.parent / "remainders" / ("0" * 64)).write_bytes(b"of a crash")
    assert len(kept(silo)) == 2
    silo.close()
    assert kept(open_silo()) == before


def test_a_coordinator_that_is_not_the_runs_own_continues_nothing(open_silo, adapter):
    """The same name under another key is another run, which starts with nothing that was left out."""
    silo = open_silo()
    reserve(silo)
    trained(silo, adapter, 1)
    body = body_of("round-2", version=COMPRESSED_VERSION, coordinator="f" * 64, train=asked(silo, adapter, 2))
    reply = pb.Reply.FromString(pb.Envelope.FromString(silo.handle(seal_request(COORDINATOR, body))).body)
    assert reply.refusal.rule == "coordinator"
    assert Path(default_anchor_dir(silo.ledger.path.parent)).exists()
