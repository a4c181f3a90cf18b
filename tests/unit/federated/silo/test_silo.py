"""One silo in this process: policy, idempotence, and what leaves."""

import json
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from silo_requests import COORDINATOR, TRUSTED, ask, opened

from configs.errors import InputError, PolicyRefusal
from configs.schema.silo import SiloConfig
from configs.storage.files import digest_bytes
from configs.storage.secrets import load_secret
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.silo.local_training import PrivateUpdate
from federated.silo.silo import FAILED, Silo
from federated.silo.units import rows_of, units_of
from federated.simulation.public_silo import PublicSilo
from privacy.accounting.truncation import units_for
from privacy.ledger import kept_replies
from privacy.ledger.journal import default_anchor_dir
from privacy.ledger.statements import Receipt, RunStatement
from privacy.mechanism.dp_sgd import PrivateTraining
from privacy.plan import MetricRelease, PlanTerms
from trainer.tasks.text import joined

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5)
SEED = bytes(range(32))


def silo_config(tmp_path, model, name="north", rows=120, **policy):
    tmp_path.mkdir(exist_ok=True)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"patient note number {i} of the ward"}) + "\n" for i in range(rows)))
    return SiloConfig(
        silo={
            "id": name,
            "dataset_id": "ward",
            "state_dir": str(tmp_path / "state" / name),
            "base_model": str(model),
            "public_record_count": 100,
        },
        data={"source": str(data)},
        policy={"budget_epsilon": 20.0, "budget_delta": 1e-4, "max_epsilon_per_run": 10.0, **policy},
    )


@pytest.fixture
def silo(tmp_path, tiny_model):
    silo = Silo(silo_config(tmp_path, tiny_model), TRUSTED)
    yield silo
    silo.close()


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


def reserve(silo, plan=PLAN, **changes):
    return ask(silo, "reserve", reserve=pb.Reserve(plan=plan.model_dump_json()), **changes)[0]


def train_kind(silo, content, round_number=1, **changes):
    values = {
        "round": round_number,
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
        "adapter": content,
        "learning_rate": 0.01,
        "optimizer": "adam",
    }
    return {"train": pb.Train(**{**values, **changes})}


def receipt_in(reply):
    return Receipt.from_bytes(reply.receipt, "reply")


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


def test_a_whole_run(silo, adapter):
    assert receipt_in(reserve(silo).reserved).epsilon_reserved == pytest.approx(PLAN.epsilon)
    reply, body = ask(silo, "round-1", **train_kind(silo, adapter))
    assert reply.request_digest == digest_bytes(body)
    update = from_bytes(reply.trained.update)
    assert {name: array.shape for name, array in update.items()} == {
        name: array.shape for name, array in from_bytes(adapter).items()
    }
    assert all(np.isfinite(array).all() and array.any() for array in update.values())
    assert kinds(silo) == ["open", "reserve", "charge", "release"]
    closed, _ = ask(silo, "close", close=pb.Close())
    assert receipt_in(closed.closed).epsilon_left == pytest.approx(20 - PLAN.epsilon)
    late, _ = ask(silo, "round-2", **train_kind(silo, adapter, 2))
    assert late.refusal.rule == "closed"


def test_a_repeated_request_gets_the_same_bytes_and_no_second_charge(silo, adapter):
    reserve(silo)
    _, body = ask(silo, "round-1", **train_kind(silo, adapter))
    envelope = seal_request(COORDINATOR, body)
    assert silo.handle(envelope) == silo.handle(envelope)
    assert kinds(silo).count("charge") == 1


def test_a_crash_before_the_release_repeats_the_same_noise(silo, adapter, monkeypatch):
    reserve(silo)
    request = train_kind(silo, adapter)
    monkeypatch.setattr(silo.ledger, "release", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    failed, _ = ask(silo, "round-1", **request)
    assert failed.failure.code == FAILED
    monkeypatch.undo()
    first, _ = ask(silo, "round-1", **request)
    second, _ = ask(silo, "round-1", **request)
    assert first.trained.update == second.trained.update
    assert kinds(silo).count("charge") == 1


def test_the_proof_runs_once_and_a_stored_reply_needs_none(silo, adapter, monkeypatch):
    reserve(silo)
    proofs, prove = [], PrivateTraining.prove

    def counted(training):
        proofs.append(kinds(silo).count("charge"))
        prove(training)

    monkeypatch.setattr(PrivateTraining, "prove", counted)
    first, body = ask(silo, "round-1", **train_kind(silo, adapter))
    assert proofs == [0]  # before the charge, and for the steps after it
    monkeypatch.setattr(PrivateTraining, "prove", lambda _: (_ for _ in ()).throw(InputError("no proof any more")))
    assert opened(silo.handle(seal_request(COORDINATOR, body)), silo) == first
    refused, _ = ask(silo, "round-2", **train_kind(silo, adapter, 2))
    assert refused.refusal.rule == "adapter"
    assert "no proof any more" not in refused.refusal.message
    assert kinds(silo) == ["open", "reserve", "charge", "release"]


def test_a_reply_that_made_room_for_newer_ones_is_a_signed_refusal_and_no_second_release(silo, adapter, monkeypatch):
    monkeypatch.setattr(kept_replies, "LEAST_KEPT", 1)
    monkeypatch.setattr(kept_replies, "KEPT_BYTES", 0)
    reserve(silo)
    _, first = ask(silo, "round-1", **train_kind(silo, adapter))
    second, body = ask(silo, "round-2", **train_kind(silo, adapter, 2))
    before = kinds(silo)
    refused = opened(silo.handle(seal_request(COORDINATOR, first)), silo).refusal
    assert refused.rule == "reply"
    assert refused.message.endswith("made room for newer ones; it stays spent, and is never computed again")
    assert opened(silo.handle(seal_request(COORDINATOR, body)), silo) == second
    assert kinds(silo) == before


def test_two_requests_of_one_round_with_other_adapters_never_share_noise(tmp_path, tiny_model, adapter):
    """Learning rate next to nothing: an update is the noise's direction. Another adapter, another direction."""
    signs = []
    for number, changed in enumerate((0.0, 1e-3)):
        silo = Silo(silo_config(tmp_path / str(number), tiny_model), TRUSTED, SEED)
        reserve(silo)
        arrays = {name: array + np.float32(changed) for name, array in from_bytes(adapter).items()}
        reply, _ = ask(silo, "round-1", **train_kind(silo, to_bytes(arrays), learning_rate=1e-4))
        signs.append(np.concatenate([np.sign(a).ravel() for a in from_bytes(reply.trained.update).values()]))
        silo.close()
    agreement = np.mean(signs[0] == signs[1])
    assert abs(agreement - 0.5) < 0.05


def test_an_injected_seed_makes_a_simulated_silo_repeatable(tmp_path, tiny_model, adapter):
    updates = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = silo_config(folder, tiny_model)
        if number:
            (folder / "state" / "north").mkdir(parents=True)
            shutil.copy(tmp_path / "0/state/north/split.key", folder / "state/north/split.key")
        silo = Silo(config, TRUSTED, SEED)
        reserve(silo)
        reply, _ = ask(silo, "round-1", **train_kind(silo, adapter))
        updates.append(reply.trained.update)
        silo.close()
    assert updates[0] == updates[1]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"noise_multiplier": 0.2}, "min_noise_multiplier"),
        ({"sampling_rate": 0.5}, "max_sampling_rate"),
        ({"steps_per_round": 2000}, "max_steps_per_round"),
        ({"noise_multiplier": 0.4, "rounds": 500}, "max_epsilon_per_run"),
        ({"metric_releases": (MetricRelease(name="nats", noise_multiplier=0.2, releases=1),)}, "min_noise_multiplier"),
        ({"metric_releases": (MetricRelease(name="nats", noise_multiplier=0.3, releases=9),)}, "metric_releases"),
        ({"unit": "client"}, "plan"),
        ({"sampler": "truncated_poisson"}, "plan"),
        ({"metric_releases": (MetricRelease(name="nats", noise_multiplier=9.0, releases=1),)}, "metric_releases"),
    ],
)
def test_plans_outside_the_policy_are_refused_and_nothing_is_reserved(silo, changes, rule):
    refusal = reserve(silo, PLAN.model_copy(update=changes)).refusal
    assert refusal.rule == rule
    assert refusal.asked
    assert refusal.allowed
    assert kinds(silo) == ["open"]


def test_a_consistent_plan_for_clients_is_refused_by_a_silo(silo):
    client = {"unit": "client", "relation": "zero_out", "sampler": "all", "sampling_rate": 1.0, "steps_per_round": 1}
    refusal = reserve(silo, PlanTerms(**{**PLAN.model_dump(), **client, "num_clients": 10})).refusal
    assert (refusal.rule, refusal.asked, refusal.allowed) == ("units", "client", "record")
    assert kinds(silo) == ["open"]


@pytest.mark.parametrize(("max_units", "fits"), [(units_for(100, 2, 1e-5), True), (250, False)])
def test_a_round_of_truncated_poisson_sampling(silo, adapter, max_units, fits):
    plan = PlanTerms(
        **{**PLAN.model_dump(), "sampler": "truncated_poisson", "max_batch_size": 40, "max_units": max_units}
    )
    reply = reserve(silo, plan)
    if not fits:
        assert reply.refusal.rule == "max_units"
        return
    receipt = Receipt.from_bytes(reply.reserved.receipt, "reply")
    assert receipt.epsilon_reserved == pytest.approx(plan.epsilon)
    assert plan.epsilon > PLAN.epsilon
    train = train_kind(silo, adapter)
    train["train"].plan_digest = plan.digest
    update = from_bytes(ask(silo, "round-1", **train)[0].trained.update)
    assert all(np.isfinite(array).all() and array.any() for array in update.values())


def test_a_budget_too_small_for_the_run_is_refused(tmp_path, tiny_model):
    silo = Silo(silo_config(tmp_path, tiny_model, budget_epsilon=PLAN.epsilon / 2), TRUSTED)
    assert reserve(silo).refusal.rule == "budget_epsilon"
    silo.close()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"base_model_digest": "00" * 32}, "base_model"),
        ({"task": "classify"}, "task"),
        ({"adapter_spec": pb.AdapterSpec(rank=1000, alpha=1.0)}, "max_lora_rank"),
        ({"adapter_spec": pb.AdapterSpec(rank=2, alpha=1.0)}, "adapter"),
        ({"learning_rate": 7.0}, "max_learning_rate"),
        ({"adapter_spec": pb.AdapterSpec(rank=4, alpha=1e38)}, "max_lora_alpha"),
        ({"adapter_spec": pb.AdapterSpec(rank=4, alpha=float("nan"))}, "max_lora_alpha"),
        ({"proximal_mu": float("inf")}, "max_proximal_mu"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"optimizer": ""}, "optimizer"),
        ({"learning_rate": float("nan")}, "max_learning_rate"),
        ({"plan_digest": "00" * 32}, "reservation"),
        ({"adapter": b"lies"}, "adapter"),
        ({"round": 9}, "schedule"),
    ],
)
def test_training_outside_the_policy_is_refused_and_never_charged(silo, adapter, changes, rule):
    reserve(silo)
    reply, _ = ask(silo, "round-1", **train_kind(silo, adapter, **changes))
    assert reply.refusal.rule == rule
    assert kinds(silo) == ["open", "reserve"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, -1001.0])
@pytest.mark.parametrize("field", ["adapter", "correction"])
def test_values_beyond_the_policys_bound_are_refused_and_never_charged(silo, adapter, field, value):
    """NaN, inf and 1e38 were charged, and then failed; 1e19 let a record move the sum by 4 C."""
    reserve(silo)
    arrays = from_bytes(adapter)
    last = sorted(arrays)[-1]
    arrays[last].flat[-1] = value
    reply, _ = ask(silo, "round-1", **train_kind(silo, adapter, **{field: to_bytes(arrays)}))
    assert reply.refusal.rule == "max_adapter_value"
    assert last in reply.refusal.message
    assert kinds(silo) == ["open", "reserve"]


def test_an_adapter_with_which_the_proof_fails_is_refused_and_never_charged(silo, adapter):
    """Before: values within the policy's bounds were charged, and then answered by FAILED."""
    reserve(silo)
    draw = np.random.default_rng(0)
    values = {name: draw.choice([-1000.0, 1000.0], array.shape) for name, array in from_bytes(adapter).items()}
    largest = to_bytes({name: array.astype("f4") for name, array in values.items()})
    refusal = ask(silo, "round-1", **train_kind(silo, largest))[0].refusal
    assert (refusal.rule, refusal.asked) == ("adapter", "values with which the start-up proof fails")
    assert kinds(silo) == ["open", "reserve"]
    assert "no proof with a request's adapter: parameter" in (silo.ledger.path.parent / "silo.log").read_text()
    # The round is still there for an adapter that can be proved.
    assert ask(silo, "round-1b", **train_kind(silo, adapter))[0].WhichOneof("kind") == "trained"


@pytest.mark.parametrize("norm", [7e-44, 1e-5, 1e5, 6e36])
def test_clipping_norms_beyond_the_policys_bounds_are_refused(silo, norm):
    assert reserve(silo, PLAN.model_copy(update={"max_grad_norm": norm})).refusal.rule == "max_grad_norm"
    assert kinds(silo) == ["open"]


def test_training_without_a_reservation_is_refused(silo, adapter):
    assert ask(silo, "round-1", **train_kind(silo, adapter))[0].refusal.rule == "reservation"


def test_other_versions_and_other_silos_are_refused(silo):
    assert ask(silo, "r", version=1, close=pb.Close())[0].refusal.rule == "version"
    assert ask(silo, "r", silo_id="south", close=pb.Close())[0].refusal.rule == "silo_id"
    assert ask(silo, "r", run_id="", close=pb.Close())[0].refusal.rule == "run_id"
    assert ask(silo, "r")[0].refusal.rule == "request"


def test_a_failure_leaves_as_one_constant_code(silo, adapter, monkeypatch):
    reserve(silo)
    monkeypatch.setattr(PrivateUpdate, "run", lambda *_: 1 / 0)
    reply, _ = ask(silo, "round-1", **train_kind(silo, adapter))
    assert reply.failure == pb.Failure(code=FAILED)
    log = (silo.ledger.path.parent / "silo.log").read_text()
    assert "ZeroDivisionError" in log


def test_refusals_are_alike_on_neighbouring_datasets(tmp_path, tiny_model, adapter):
    replies = []
    for number, rows in enumerate((120, 119)):
        folder = tmp_path / str(number)
        folder.mkdir()
        silo = Silo(silo_config(folder, tiny_model, rows=rows), TRUSTED)
        shown = [
            ask(silo, "r", **train_kind(silo, adapter))[0],
            reserve(silo, PLAN.model_copy(update={"noise_multiplier": 0.4, "rounds": 500})),
        ]
        silo.close()
        replies.append(shown)
    assert replies[0] == replies[1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_no_bytes_make_a_silo_crash_or_talk(silo, content):
    reply = opened(silo.handle(content), silo)
    assert reply.WhichOneof("kind") == "refusal"
    assert "Traceback" not in str(reply)


def test_a_receipt_ahead_of_the_ledger_stops_everything_until_it_is_reconciled(silo, adapter, tmp_path, siloweave):
    """State and anchor put back together: only the coordinator knows. What it repeats gets no stored reply either."""
    state = silo.ledger.path.parent
    reserve(silo)
    silo.close()
    for place in (state, default_anchor_dir(state)):
        shutil.copytree(place, tmp_path / "last week" / place.name)
    ahead = Silo(silo.config, TRUSTED)
    reply, _ = ask(ahead, "round-1", **train_kind(ahead, adapter))
    ahead.close()
    for place in (state, default_anchor_dir(state)):
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "last week" / place.name, place)
    back = Silo(silo.config, TRUSTED)
    assert receipt_in(reserve(back).reserved).number == 2  # nothing on this machine can tell
    kinds_before = kinds(back)
    shown = reply.trained.receipt
    assert reserve(back, receipt=shown).refusal.rule == "rollback"
    for kind in ({"close": pb.Close()}, {"reserve": pb.Reserve()}, train_kind(back, adapter)):
        refusal = ask(back, "round-1", **kind)[0].refusal
        assert (refusal.rule, str(tmp_path) in refusal.message) == ("rollback", False)
    assert kinds(back) == kinds_before
    back.close()
    with pytest.raises(InputError, match="siloweave silo budget reconcile"):
        Silo(silo.config, TRUSTED)
    (tmp_path / "silos.json").write_bytes(b'{"north": {"receipt": ' + shown + b"}}")
    done = siloweave("silo", "budget", "reconcile", str(state), "silos.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = Silo(silo.config, TRUSTED)
    assert ask(again, "round-1", receipt=shown, **train_kind(again, adapter))[0].refusal.rule == "closed"
    assert receipt_in(reserve(again, run_id="run-2", receipt=shown).reserved).epsilon_left < 20 - PLAN.epsilon
    again.close()


@pytest.mark.parametrize("receipt", [b"lies", b"{}", b"[" * 5000, b"1" * 2_000_000])
def test_receipts_that_are_none_are_refused(silo, receipt):
    assert reserve(silo, receipt=receipt).refusal.rule == "receipt"
    assert kinds(silo) == ["open"]


def test_the_receipt_is_no_part_of_what_is_digested(silo, adapter):
    first = reserve(silo).reserved.receipt
    reply, _ = ask(silo, "round-1", **train_kind(silo, adapter))
    for receipt in (b"", first, reply.trained.receipt):
        assert ask(silo, "round-1", receipt=receipt, **train_kind(silo, adapter))[0] == reply


def test_a_closed_run_is_stated_and_signed(tmp_path, tiny_model, adapter):
    silo = Silo(silo_config(tmp_path, tiny_model, attests_disjoint_units=True), TRUSTED, SEED)
    assert ask(silo, "close", close=pb.Close())[0].closed.statement == b""  # nothing reserved, nothing to state
    reserve(silo)
    ask(silo, "round-1", **train_kind(silo, adapter))
    closed, _ = ask(silo, "close", close=pb.Close())
    statement = RunStatement.from_bytes(closed.closed.statement, "reply")
    assert statement.holds()
    assert (statement.rounds_charged, statement.public_record_count) == (1, 100)
    assert (statement.attests_disjoint_units, statement.seed_source) == (True, "injected")
    assert statement.epsilon == PLAN.epsilon
    reserve(silo, run_id="run-2")
    assert ask(silo, "close", close=pb.Close())[0].closed.statement == closed.closed.statement
    silo.close()
    later = Silo(silo.config, TRUSTED)  # without the seed: the run stays one with an injected seed
    assert ask(later, "close", close=pb.Close())[0].closed.statement == closed.closed.statement
    later.close()


def test_a_day_is_limited_by_the_policy(tmp_path, tiny_model):
    silo = Silo(silo_config(tmp_path, tiny_model, max_epsilon_per_day=1.5 * PLAN.epsilon), TRUSTED)
    assert reserve(silo).reserved.receipt
    assert reserve(silo, run_id="run-2").refusal.rule == "max_epsilon_per_day"
    silo.close()


def test_an_anchor_inside_the_state_directory_is_refused(tmp_path, tiny_model):
    tree = silo_config(tmp_path, tiny_model).model_dump()
    tree["silo"]["anchor_dir"] = f"{tree['silo']['state_dir']}/anchors"
    with pytest.raises(ValueError, match=r"outside silo\.state_dir"):
        SiloConfig(**tree)


@pytest.mark.parametrize("text", ["[]", "{", '{"rounds": "NaN"}', "[" * 5000, "1" * 20_000])
def test_plans_that_are_none_are_refused(silo, text):
    assert ask(silo, "reserve", reserve=pb.Reserve(plan=text))[0].refusal.rule == "plan"


@pytest.mark.parametrize("plan", ['{"sampling_rate": 1' + "0" * 5000 + "}", '{"sampling_rate": NaN}'])
def test_numbers_that_are_none_are_refused(silo, plan):
    assert ask(silo, "reserve", reserve=pb.Reserve(plan=plan))[0].refusal.rule == "plan"


def test_what_a_refusal_repeats_is_short_and_on_one_line(silo):
    reserve(silo)
    for asked in ("é", "a" * 1_000_000, "b\n2026-11-22 INFO nothing happened\x1b[2J"):
        for changes in ({"plan_digest": asked}, {"base_model_digest": asked}, {"task": asked}):
            refusal = ask(silo, "x", **train_kind(silo, b"", **changes))[0].refusal
            assert refusal.rule in ("reservation", "base_model", "task", *changes)  # too long a text, by its field
            assert len(refusal.SerializeToString()) < 1000
            assert refusal.message.isprintable()
    ask(silo, "x", run_id="run\nforged", **train_kind(silo, b""))
    lines = (silo.ledger.path.parent / "silo.log").read_text().splitlines()
    assert all(" WARNING refused " in line for line in lines)


def test_the_split_is_never_drawn_anew(tmp_path, tiny_model, adapter):
    silo = Silo(silo_config(tmp_path, tiny_model), TRUSTED)
    key = silo.ledger.path.parent / "split.key"
    reserve(silo)
    silo.close()
    kept = key.read_bytes()
    key.unlink()
    silo = Silo(silo.config, TRUSTED)  # nothing is charged yet
    assert key.read_bytes() != kept
    ask(silo, "round-1", **train_kind(silo, adapter))
    silo.close()
    kept = key.read_bytes()
    key.unlink()
    with pytest.raises(InputError, match="put its backup back"):
        Silo(silo.config, TRUSTED)
    with pytest.raises(InputError, match="put its backup back"):
        load_secret(key)
    assert not key.exists()
    key.write_bytes(kept)
    key.chmod(0o644)
    with pytest.raises(InputError, match="mode 644 lets others read it"):
        Silo(silo.config, TRUSTED)
    key.chmod(0o600)
    Silo(silo.config, TRUSTED).close()


def test_a_base_model_that_is_not_from_public_text_is_refused(tmp_path, tiny_model):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["metadata"]["trained_on"] = "private"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="public text only"):
        Silo(silo_config(tmp_path, copy), TRUSTED)


def test_training_without_dp_needs_public_data(tmp_path, tiny_model):
    with pytest.raises(PolicyRefusal, match="declared public = true"):
        PublicSilo(silo_config(tmp_path, tiny_model), TRUSTED, PLAN)


def test_the_comparison_opens_no_ledger_and_never_draws_a_key_beside_one(tmp_path, tiny_model, adapter):
    config = silo_config(tmp_path, tiny_model)
    public = config.model_copy(update={"data": config.data.model_copy(update={"public": True})})
    state = Path(config.silo.state_dir)
    PublicSilo(public, TRUSTED, PLAN).close()
    assert sorted(path.name for path in state.iterdir()) == ["silo.key", "silo.log", "split.key"]
    silo = Silo(config, TRUSTED)
    (state / "split.key").unlink()
    PublicSilo(public, TRUSTED, PLAN).close()  # nothing is charged: a new one takes nothing from anybody
    reserve(silo)
    ask(silo, "round-1", **train_kind(silo, adapter))
    silo.close()
    (state / "split.key").unlink()
    for opens in (lambda: PublicSilo(public, TRUSTED, PLAN), lambda: Silo(config, TRUSTED)):
        with pytest.raises(InputError, match=r"split\.key: no such key"):
            opens()
    shutil.rmtree(state)
    with pytest.raises(InputError, match=r"ledger\.sqlite: missing, and .* tells of it"):
        PublicSilo(public, TRUSTED, PLAN)


def test_ids_that_look_alike_are_told_to_the_steward_and_to_nobody_else(tmp_path, tiny_model):
    config = silo_config(tmp_path, tiny_model)
    with (tmp_path / "data.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"text": f"note {name!r}", "patient": name}) + "\n" for name in ("zq7", "ZQ7", "zq7 ")
        )
    rows_of.cache_clear()
    silo = Silo(config.model_copy(update={"data": config.data.model_copy(update={"unit": "patient"})}), TRUSTED)
    reply, notes = ask(silo, "describe", describe=pb.Describe())[0], silo.workbench.notes
    silo.close()
    log = (silo.ledger.path.parent / "silo.log").read_text()
    assert all(note in log for note in notes)
    assert "1 ids are written in several ways" in log and "1 pairs of ids look alike" in log
    assert "zq7" not in log.lower()
    assert "alike" not in str(reply)


def test_what_was_replaced_dropped_and_shortened_is_told_to_the_steward_and_to_nobody_else(
    tmp_path, tiny_model, adapter
):
    config = silo_config(tmp_path, tiny_model)
    ends = "and a very long story of many words " * 30
    rows = [
        *(json.dumps({"text": f"note {i}", "patient": f"p{i}"}).encode() for i in range(60)),
        *(json.dumps({"text": f"visit {i}", "patient": "often"}).encode() for i in range(11)),
        *(b'{"text": "caf\xe9 ' + ends.encode() + b'", "patient": "long%d"}' % i for i in range(3)),
        b'{"text": "half \\ud800 nul \\u0000", "patient": "half"}',
        b'{"text": "nobody", "patient": null}',
        b'{"text": " ", "patient": "p1"}',
    ]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    rows_of.cache_clear()
    silo = Silo(config.model_copy(update={"data": config.data.model_copy(update={"unit": "patient"})}), TRUSTED)
    reserve(silo)
    reply, _ = ask(silo, "round-1", **train_kind(silo, adapter))
    silo.close()
    train = [joined(unit) for unit in units_of(silo.config).train]
    cut = sum("long story" in unit for unit in train)
    tokens = sum(len(one.ids) for unit in silo.workbench.records for one in unit)
    shown = [" ".join(note.split()) for note in silo.workbench.notes]
    assert shown[:10] == [
        "text of this silo's records",
        "replaced: invalid bytes 3 of 77 3.90%",
        "replaced: half characters 1 of 77 1.30%",
        "replaced: NUL 1 of 77 1.30%",
        "dropped: no text 1 of 77 1.30%",
        "dropped: no silo or unit 1 of 77 1.30%",
        "dropped: beyond data.max_rows_per_unit 3 of 77 3.90%",
        f"replaced: tokens unknown to the model's tokenizer 0 of {tokens:,} 0.00%",
        f"shortened: training units beyond the context {cut} of {len(train)} {cut / len(train):.2%}",
        "warning: replaced: invalid bytes: 3.90%, which is more than 1%; look at the data",
    ]
    log = (silo.ledger.path.parent / "silo.log").read_text()
    assert all(note in log for note in silo.workbench.notes)
    assert set(reply.trained.DESCRIPTOR.fields_by_name) == {"receipt", "update", "keys"} and not reply.trained.keys
    for path in silo.ledger.path.parent.rglob("*"):
        assert path.name == "silo.log" or not path.is_file() or b"replaced:" not in path.read_bytes()


def test_a_refusal_for_the_encoding_shows_nothing_of_the_records(tmp_path, tiny_model):
    config = silo_config(tmp_path, tiny_model)
    (tmp_path / "data.jsonl").write_bytes('{"text": "Gr\u00fc\u00dfe an Zo\u00eb"}\n'.encode("latin-1") * 40)
    rows_of.cache_clear()
    with pytest.raises(InputError, match=r'data\.jsonl: not utf-8.* encoding = "latin-1"') as refused:
        Silo(config, TRUSTED)
    shown = "".join(traceback.format_exception(refused.value))
    assert "Zo" not in shown.replace("Zone", "") and "40" not in str(refused.value).replace(str(tmp_path), "")
    declared = config.model_copy(update={"data": config.data.model_copy(update={"encoding": "latin-1"})})
    Silo(declared, TRUSTED).close()
