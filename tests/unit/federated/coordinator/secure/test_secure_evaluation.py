"""Private evaluations that are added up under masks: what the coordinator makes of them, and what a lost one costs."""

import os

import numpy as np
import pytest
from masked_silos import MaskedGrid, MaskedSilo
from model_parts import FILES
from signed_silos import COUNT, adapter, coordinator

from configs.errors import PolicyRefusal, SiloweaveError
from configs.events import read_events
from federated.coordinator.secure import secure_evaluation
from federated.coordinator.secure.masked_sum import MaskedSum
from federated.evaluation.private_sums import bounds_of, figures
from federated.silo.masking.terms import agreed
from federated.transport.flower_messages import unpack
from privacy.certificate.check import check_certificate

NAMES = ("a", "b", "c", "d")
MASKED = ("federated.secure_aggregation=true", "federated.colluders=1", "privacy.evaluations=2")
TOGETHER = ("privacy.mode=distributed", "privacy.min_honest=3", "federated.optimizer=sgd", "federated.learning_rate=1")
STEPS = ("evaluate", *(f"evaluation {phase}" for phase in range(2, 6)))


class EvaluatingSilo(MaskedSilo):
    """Answers an evaluation, too, by four sums of its own, once.

    ``skips`` are its steps that it does not answer, ``restarts`` the one at which it is another process; each a pair of
    the evaluation's number and the step.
    """

    def __init__(self, name, sums):
        super().__init__(name)
        self.sums, self.skips, self.evaluations = np.array(sums), set(), {}
        self.restarts = ()

    def masked(self, request, reply):
        kind = request.WhichOneof("kind")
        if kind == "evaluate":
            step = request.evaluate.number, kind
        else:
            step = request.aggregate.round, f"evaluation {request.aggregate.phase}"
        if kind == "evaluate" or request.aggregate.metric:
            if step in self.skips:
                raise ConnectionError("no answer")
            if step == self.restarts:
                self.restart()
                self.restarts = ()
        if kind != "evaluate":
            super().masked(request, reply)
            return
        asked = reply.request_digest
        first, keys = self.evaluations.get(request.evaluate.number, (asked, None))
        if first != asked:
            raise PolicyRefusal.of("request_id", asked, "the request that was charged")
        if keys is None:
            known = agreed(request, self.plan, lambda: self.roster, len(self.sums))
            release = (
                request.run_id,
                request.request_id,
                asked,
                request.evaluate.number,
                "held_out",
                request.coordinator,
            )
            opened = self.masking.begun(known, known.encoding.encode(self.sums), self.plan.digest, release)
            self.masking.keep(request, opened)
            self.evaluations[request.evaluate.number] = asked, (keys := opened.keys)
        self.number += 1
        reply.evaluated.receipt = self.receipt(request.run_id).to_bytes()
        reply.evaluated.keys = keys


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def silos_of():
    return [EvaluatingSilo(name, [40.5 + place, 60.25, 20.0 - place, 90.125]) for place, name in enumerate(NAMES)]


def run(silos, folder, *overrides):
    one = coordinator(MaskedGrid(silos), folder, *MASKED, *overrides)
    one.run(adapter)
    return one


def events(folder, kind):
    return [event for event in read_events(folder / "run" / "events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("mode", [(), TOGETHER], ids=["record", "distributed"])
def test_the_figures_are_those_of_the_plain_sum(mode, tmp_path):
    silos = silos_of()
    one = run(silos, tmp_path, *mode)
    told = events(tmp_path, "private_evaluation")
    assert [event["silos"] for event in told] == [list(NAMES)] * 2 and [event["round"] for event in told] == [0, 2]
    settings = one.config.privacy
    bounds = bounds_of(one.base, one.config.federated.task_spec, ())
    plain = figures([silo.sums for silo in silos], bounds, settings.evaluation_noise_multiplier)
    for name, value in plain.items():
        assert told[0][name] == pytest.approx(value, rel=1e-6), name
    # The words have room for COUNT units of each silo and ten deviations of its noise.
    clip = COUNT + 10 * settings.evaluation_noise_multiplier * bounds.sensitivity
    assert told[0]["error_bound"] == pytest.approx(4 * clip * 0.5 / ((2**31 - 1) // 4), rel=1e-3)
    document = one.certify_model(FILES)
    check_certificate(document, "test")


@pytest.mark.parametrize("step", STEPS)
def test_who_is_gone_from_a_phase_on_is_left_out_of_the_sum(step, tmp_path):
    silos = silos_of()
    silos[3].skips = {(1, one) for one in STEPS[STEPS.index(step) :]}
    run(silos, tmp_path, "federated.rounds=1", "privacy.evaluations=1")
    (told,) = events(tmp_path, "private_evaluation")
    assert told["silos"] == list(NAMES[:3] if step in STEPS[:3] else NAMES)
    assert events(tmp_path, "secure_sum")[-1]["summed"] == list(NAMES)  # the round had all of them


@pytest.mark.parametrize("step", STEPS)
def test_an_evaluation_with_too_few_is_lost_and_the_run_goes_on_without_it(step, tmp_path):
    silos, given = silos_of(), ("federated.rounds=2", "privacy.evaluations=3")
    for silo in silos[:2]:
        silo.skips = {(1, one) for one in STEPS[STEPS.index(step) :]}
    one = run(silos, tmp_path, *given)
    assert [event["round"] for event in events(tmp_path, "private_evaluation")] == [1, 2]
    (lost,) = events(tmp_path, "lost")
    assert "evaluation 1 is lost (step evaluation-1/" in lost["message"]
    assert "2 of 4 silos answered, a secure sum takes 3): it has no figures" in lost["message"]
    assert [silo.trained for silo in silos] == [[1, 2]] * 4
    check_certificate(one.certify_model(FILES), "test")


@pytest.mark.parametrize("mode", [(), (*TOGETHER, "privacy.min_honest=2")], ids=["record", "distributed"])
@pytest.mark.parametrize("step", STEPS[1:])
def test_a_silo_that_is_started_again_in_an_evaluation_costs_the_round_before_nothing(step, mode, tmp_path):
    """All three are needed, and one can unmask neither of both sums any more; the round's is known by then."""
    silos, given = silos_of()[:3], ("federated.rounds=2", "privacy.evaluations=3", "federated.min_silos=3", *mode)
    silos[2].restarts = (2, step)
    one = run(silos, tmp_path, *given)
    assert [event["round"] for event in events(tmp_path, "round")] == [1, 2]
    assert [silo.trained for silo in silos] == [[1, 2]] * 3 and not silos[2].restarts
    assert [event["evaluation"] for event in events(tmp_path, "lost")] == [2]
    assert [event["round"] for event in events(tmp_path, "private_evaluation")] == [0, 2]
    assert [digests.releases.keys() for digests in one.digests] == [set(NAMES[:3])] * 2
    check_certificate(one.certify_model(FILES), "test")


def test_what_is_no_silos_doing_ends_an_evaluation_as_it_did(tmp_path):
    class Cut(MaskedGrid):
        def push_messages(self, messages):
            if self.cut and b"evaluation-2" in unpack(next(iter(messages)).content):
                raise SiloweaveError("the SuperLink is gone")
            return super().push_messages(messages)

    silos, given = silos_of(), (*MASKED, "federated.rounds=1")
    grid = Cut(silos)
    grid.cut = True
    with pytest.raises(SiloweaveError, match="the SuperLink is gone"):
        coordinator(grid, tmp_path, *given).run(adapter)
    assert not events(tmp_path, "lost") and not events(tmp_path, "round")
    grid.cut = False
    coordinator(grid, tmp_path, *given).run(adapter)
    assert [event["round"] for event in events(tmp_path, "private_evaluation")] == [0, 1]


def test_a_silo_that_has_signed_nothing_does_not_say_how_sums_are_written(tmp_path):
    """Its count may be anything, and words that have room for it would have none for the figures."""

    class Boasts(EvaluatingSilo):
        def masked(self, request, reply):
            if request.WhichOneof("kind") == "reserve":
                raise PolicyRefusal.of("unit", "record", "none")
            super().masked(request, reply)
            if request.WhichOneof("kind") == "describe":
                reply.described.public_record_count = 10**12

    silos = [*silos_of(), Boasts("e", [0.0] * 4)]
    run(silos, tmp_path, "federated.rounds=1", "privacy.evaluations=1")
    (told,) = events(tmp_path, "private_evaluation")
    assert told["silos"] == list(NAMES) and told["error_bound"] < 0.01


@pytest.mark.parametrize("mode", [(), TOGETHER], ids=["record", "distributed"])
def test_a_coordinator_that_dies_in_an_evaluation_has_round_and_evaluation_from_the_same_sums(
    mode, tmp_path, monkeypatch
):
    """The round before the evaluation is not committed yet, and silos answer its phases again; to the same request.

    What the request says must not hang on who is there: a silo with more records is, at the second start.
    """

    class Killed(Exception):
        pass

    silos, given = silos_of(), ("federated.rounds=1", "privacy.evaluations=1", *mode)
    with pytest.MonkeyPatch.context() as patch:
        go_on = MaskedSum.next

        def dies(one, phase):
            if one.metric and phase == 4:
                raise Killed
            go_on(one, phase)

        patch.setattr(MaskedSum, "next", dies)
        with pytest.raises(Killed):
            run(silos, tmp_path, *given)
    monkeypatch.setattr(secure_evaluation, "sums_bound", lambda *_: 2.0 * COUNT)
    run(silos, tmp_path, *given)
    assert [silo.trained for silo in silos] == [[1]] * 4 and [len(silo.evaluations) for silo in silos] == [1] * 4
    assert len(events(tmp_path, "private_evaluation")) == 1 and not events(tmp_path, "refused")


def test_a_silo_that_sends_its_sums_by_itself_is_passed_over(tmp_path):
    class Earlier(EvaluatingSilo):
        def masked(self, request, reply):
            super().masked(request, reply)
            if request.WhichOneof("kind") == "evaluate":
                reply.evaluated.keys = b""
                reply.evaluated.sums.extend(self.sums)

    silos = [*silos_of()[:3], Earlier("d", [1.0, 2.0, 3.0, 4.0])]
    run(silos, tmp_path, "federated.rounds=1", "privacy.evaluations=1")
    assert events(tmp_path, "private_evaluation")[0]["silos"] == list(NAMES[:3])
    assert [event["silo"] for event in events(tmp_path, "rejected")] == ["d"]
