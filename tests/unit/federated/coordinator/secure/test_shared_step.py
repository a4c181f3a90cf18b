"""Rounds that are one step over all silos' samples: what they do to the model, who may be gone, what is refused."""

import os

import numpy as np
import pytest
from masked_silos import MaskedGrid, MaskedSilo
from model_parts import FILES
from signed_silos import COUNT, adapter, coordinator
from signed_silos import NAMES as PARTS

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.events import read_events
from configs.load import load
from federated.adapters.arrays import from_bytes
from federated.coordinator import round_commits as commits
from federated.coordinator.secure.secure_rounds import check_silos
from federated.protocol import silo_pb2 as pb
from privacy.certificate.check import check_certificate
from privacy.distributed import distributed

NAMES = ("a", "b", "c", "d", "e")
STEPS = ("train", "phase 2", "phase 3", "phase 4", "phase 5")
SHARED = (
    "federated.secure_aggregation=true",
    "federated.colluders=1",
    "privacy.mode=distributed",
    "privacy.min_honest=3",
    "federated.optimizer=sgd",
    "federated.learning_rate=1",
)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def without_noise(monkeypatch):
    monkeypatch.setattr(distributed, "discrete_gaussian", lambda _bits, size, _stream: np.zeros(size, np.int64))


def values_of(names=NAMES):
    return {name: (number + 1) ** 2 / 1000 for number, name in enumerate(names)}


def silos_of(names=NAMES):
    return [MaskedSilo(name, value=value) for name, value in values_of(names).items()]


def started(silos, folder, *overrides):
    return coordinator(MaskedGrid(silos), folder, *SHARED, *overrides)


def run(silos, folder, *overrides):
    one = started(silos, folder, *overrides)
    one.run(adapter)
    return one


def events(folder, kind):
    return [event for event in read_events(folder / "run" / "events.jsonl") if event["event"] == kind]


def moved(folder, number=1):
    """By how much a round has moved the part of the model that began at zero."""
    found = {one.round_number: from_bytes(one.adapter)[PARTS[1]] for one in commits.all_rounds(folder / "run")}
    return found[number].astype(np.float64) - found[number - 1]


def gradient_of(names=NAMES):
    """What all silos' sums are together, over their expected batch."""
    rate = load("tiny").privacy.sampling_rate
    return sum(values_of()[name] for name in names) / (rate * COUNT * len(names))


def near(value):
    return pytest.approx(np.full((5, 4), value), abs=2e-7)


@pytest.mark.parametrize("aggregation", ["fedavg", "fedavgm"])
def test_a_round_is_a_plain_step_over_all_silos_records(aggregation, without_noise, tmp_path):
    one = run(silos_of(), tmp_path, f"federated.aggregation={aggregation}")
    assert moved(tmp_path) == near(-gradient_of())
    assert moved(tmp_path, 2) == near(-gradient_of() * (1 if aggregation == "fedavg" else 1.9))
    told = events(tmp_path, "secure_sum")
    assert [event["summed"] for event in told] == [list(NAMES)] * 2
    noise, batch = one.plan.noise, one.plan.sampling_rate * COUNT * 5
    assert told[0]["noise_std"] == pytest.approx(noise.noise_std(5) / batch) and told[0]["error_bound"] < 1e-6
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    assert "epsilon rests on it that at least 3 of them were honest" in document["secure_sum"]


def test_an_adaptive_server_optimizer_has_the_step_as_its_update(without_noise, tmp_path):
    run(silos_of(), tmp_path, "federated.aggregation=fedadam", "federated.rounds=1")
    update, tau, rate = -gradient_of(), 1e-3, 0.01
    second = tau**2 + 0.01 * (update**2 - tau**2)
    assert moved(tmp_path) == near(rate * 0.1 * update / (np.sqrt(second) + tau))


def test_the_anchor_is_added_by_the_coordinator(without_noise, tmp_path):
    run(silos_of(), tmp_path, "federated.anchor=0.5")
    first = moved(tmp_path)
    assert moved(tmp_path, 2) == near(-gradient_of() - 0.5 * first[0, 0])


def test_the_noise_of_a_step_is_what_is_told(tmp_path):
    run(silos_of(), tmp_path, "federated.rounds=1")
    (told,) = events(tmp_path, "secure_sum")
    drawn = moved(tmp_path) + gradient_of()  # 20 values
    assert 0.3 < drawn.std() / told["noise_std"] < 2  # the draws are fixed


@pytest.mark.parametrize("step", STEPS)
def test_a_silo_may_be_gone_from_any_phase_on_and_the_step_is_over_the_others(step, without_noise, tmp_path):
    silos = silos_of()
    silos[2].gone = set(STEPS[STEPS.index(step) :])
    one = run(silos, tmp_path, "federated.rounds=1")
    left = [name for name in NAMES if name != "c"] if step in STEPS[:3] else list(NAMES)
    assert moved(tmp_path) == near(-gradient_of(left))
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    assert sorted(document["model"]["rounds"][0]["releases"]) == left


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_round_with_less_noise_than_is_charged_is_lost_and_stays_charged(step, tmp_path):
    """Three of five honest ones would have the noise; with a colluder four have to be there."""
    silos, settings = silos_of(), ("federated.rounds=2",)
    for silo in silos[:2]:
        silo.gone = set(STEPS[STEPS.index(step) :])
    with pytest.raises(SiloweaveError, match="3 of 5 silos answered, a secure sum takes 4"):
        run(silos, tmp_path, *settings)
    for silo in silos[:2]:
        silo.gone = set()
        silo.restart()
    with pytest.raises(SiloweaveError, match="the sum of round 1 is lost: nothing was unmasked, and its charges stay"):
        run(silos, tmp_path, *settings)
    one = run(silos, tmp_path, *settings)
    assert not moved(tmp_path).any() and moved(tmp_path, 2).any()
    assert [silo.trained for silo in silos] == [[1, 2]] * 5
    check_certificate(one.certify_model(FILES), "test")


def test_a_silo_that_was_told_other_numbers_is_never_added_up(tmp_path, monkeypatch):
    silos = silos_of(NAMES[:4])
    one = started(silos, tmp_path)
    body = one.exchange.body

    def other(request_id, silo="", **kind):
        if silo == "b" and "train" in kind:
            train = pb.Train.FromString(kind["train"].SerializeToString())
            train.learning_rate = 0.5
            kind = {"train": train}
        return body(request_id, silo, **kind)

    monkeypatch.setattr(one.exchange, "body", other)
    with pytest.raises(SiloweaveError, match="3 of 4 silos answered, a secure sum takes 4"):
        one.run(adapter)


def test_a_steward_who_counts_on_fewer_silos_ends_the_run_with_status_3_before_anything_is_reserved(tmp_path):
    silos = silos_of()
    for silo in silos:
        silo.policy = silo.policy.model_copy(update={"honest_silos": 2})
    with pytest.raises(PolicyRefusal, match="epsilon would rest on 3 honest silos of each sum") as refused:
        run(silos, tmp_path)
    assert refused.value.exit_status == 3 and not any(silo.trained for silo in silos)


@pytest.mark.parametrize(
    ("settings", "silos", "said"),
    [
        ((), 4, ""),
        ((), 5, ""),
        ((), 2, "privacy.min_honest 3 and federated.min_silos 1 a sum takes 4 silos, and there are 2"),
        ((), 6, ""),
        ((), 7, "privacy.min_honest is 3: with 7 silos and federated.colluders 1 at least 4 honest ones are in every"),
        (
            ("federated.colluders=2",),
            4,
            "privacy.min_honest 3 and federated.min_silos 1 a sum takes 5 silos, and there are 4",
        ),
        (("federated.colluders=2",), 7, ""),
    ],
)
def test_a_number_of_silos_that_does_not_go_with_the_noise_is_told_before_anybody_is_asked(settings, silos, said):
    config = load("tiny", [*SHARED, "federated.local_steps=1", *settings])
    if not said:
        check_silos(config, silos)
        return
    with pytest.raises(InputError, match=said):
        check_silos(config, silos)


def test_a_silo_that_is_too_large_for_the_plan_is_named_before_anything_is_reserved(tmp_path):
    silos, rate = silos_of(), "privacy.sampling_rate=0.05"
    with pytest.raises(InputError, match=f"silo 'a' has declared {COUNT} records, and the plan has room for") as told:
        run(silos, tmp_path, *(f"data.private.public_record_{given}" for given in ("counts={}", "count=10")), rate)
    assert "\n" not in str(told.value) and not any(silo.plan for silo in silos)


def test_more_values_than_rounding_is_charged_for_are_refused_before_anything_is_reserved(tmp_path, monkeypatch):
    monkeypatch.setattr("privacy.plan_from_settings._MOST_VALUES", 30)
    silos = silos_of()
    with pytest.raises(InputError, match="32 values train: rounding is charged for 30 at most; train fewer"):
        run(silos, tmp_path)
    assert not any(silo.plan for silo in silos)
