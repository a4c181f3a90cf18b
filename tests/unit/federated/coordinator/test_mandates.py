"""The coordinator's side of a mandate: a refusal ends the run with its own exit status, and what is signed is kept."""

import pytest
from mandates import signed, terms
from model_parts import FILES
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import PolicyRefusal, SiloweaveError
from configs.events import read_events
from federated.protocol import silo_pb2 as pb
from privacy.certificate.check import check_certificate

NAMES = ("one", "two")
WIDE = {"min_noise_multiplier": 0.01, "max_sampling_rate": 0.99, "max_steps_per_round": 1000}
STUDY = "federated.study=ward-notes"


def mandated(name, **changes):
    silo = SignedSilo(name)
    silo.mandate = of(silo, **{**WIDE, **changes})
    return silo


def of(silo, /, **changes):
    return signed(silo.signer, terms(**changes), silo=silo.name, dataset=f"ward-{silo.name}")


def test_the_certificate_of_a_run_has_each_silos_mandate(tmp_path):
    silos = [*map(mandated, NAMES), SignedSilo("three")]
    one = coordinator(InProcess(silos), tmp_path, STUDY)
    one.run(adapter)
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    for silo in silos[:2]:
        assert document["silos"][silo.name]["mandate"] == silo.mandate.model_dump(mode="json")
        assert document["silos"][silo.name]["statement"]["mandate"] == silo.mandate.digest
    assert "mandate" not in document["silos"]["three"]
    again = coordinator(InProcess(silos), tmp_path, STUDY)
    again.run(adapter)
    later = again.certify_model(FILES)
    check_certificate(later, "test")
    assert [later["silos"][name]["mandate"] for name in NAMES] == [document["silos"][name]["mandate"] for name in NAMES]


def test_every_request_names_the_study_and_none_where_none_is_set(tmp_path):
    asked = []

    def change(_, reply, request):
        asked.append(request.study)
        return reply

    for folder, overrides, expected in (("with", (STUDY,), "ward-notes"), ("without", (), "")):
        asked.clear()
        coordinator(InProcess([SignedSilo("one", change)]), tmp_path / folder, *overrides).run(adapter)
        assert set(asked) == {expected}
        assert len(asked) >= 5  # describe, reserve, two rounds, close


@pytest.mark.parametrize("kind", ["describe", "reserve", "train"])
def test_a_refusal_ends_the_run_with_its_own_status_in_one_line_that_names_the_field(tmp_path, kind):
    def change(silo, reply, request):
        if request.WhichOneof("kind") == kind:
            said = pb.Refusal(rule="mandate.expires", asked="a day later", allowed="until 2026-01-01")
            said.message = "mandate.expires: asked a day later, allowed until 2026-01-01"
            return pb.Reply(version=3, silo_id=silo.name, request_digest=reply.request_digest, refusal=said)
        return reply

    with pytest.raises(PolicyRefusal, match=r"one refuses: mandate\.expires: asked a day later") as refusal:
        overrides = (STUDY, "federated.round_timeout_s=0.3")
        coordinator(InProcess([SignedSilo("one", change)]), tmp_path, *overrides).run(adapter)
    assert (refusal.value.exit_status, refusal.value.rule) == (3, "mandate.expires")
    assert "\n" not in str(refusal.value)


def without(silo, reply, request):
    reply.reserved.mandate = b""
    return reply


def edited(silo, reply, request):
    reply.reserved.mandate = silo.mandate.to_bytes().replace(b"late referrals", b"everything    ")
    return reply


def of_another(silo, reply, request):
    silo.mandate = signed(silo.signer, terms(**WIDE), silo="other", dataset="ward-one")
    reply.reserved.mandate = silo.mandate.to_bytes()
    reply.reserved.receipt = silo.receipt(request.run_id).to_bytes()
    return reply


def resigned(**changes):
    """Another mandate that the silo itself has signed, and names in its receipt."""

    def change(silo, reply, request):
        silo.mandate = of(silo, **{**WIDE, **changes})
        reply.reserved.mandate = silo.mandate.to_bytes()
        reply.reserved.receipt = silo.receipt(request.run_id).to_bytes()
        return reply

    return change


CHANGES = [
    without,
    edited,
    of_another,
    resigned(max_rounds_per_run=1),
    resigned(study="other"),
    resigned(coordinator="ab" * 32),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_mandate_that_does_not_fit_receipt_plan_or_run_rejects_the_reservation(tmp_path, change):
    silo = mandated("one")
    silo.change = lambda *a: change(*a) if a[2].WhichOneof("kind") == "reserve" else a[1]
    one = coordinator(InProcess([silo]), tmp_path, STUDY, "federated.round_timeout_s=0.3")
    with pytest.raises(SiloweaveError, match="0 of 1 silos answered"):
        one.run(adapter)
    (said,) = [event["message"] for event in read_events(one.log.path) if event["event"] == "rejected"]
    assert "mandate" in said


def test_a_receipt_of_a_round_that_names_another_mandate_is_no_receipt_of_the_run(tmp_path):
    def change(silo, reply, request):
        if request.WhichOneof("kind") == "train":
            reply.trained.receipt = silo.receipt(request.run_id, mandate="cd" * 32).to_bytes()
        return reply

    silo = mandated("one")
    silo.change = change
    one = coordinator(InProcess([silo]), tmp_path, STUDY, "federated.round_timeout_s=0.3")
    with pytest.raises(SiloweaveError, match="step 1: 0 of 1"):
        one.run(adapter)
