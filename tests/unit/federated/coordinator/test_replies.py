"""One silo that owns a key and signs what it likes, against the coordinator: it is rejected, and the run goes on."""

import json
import math
import struct

import pytest
from evaluations import bounds_for
from flwr.app import Error, Message
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError
from model_parts import FILES
from mutations import BITS, header_of, safetensors, typed
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import InputError, SiloweaveError
from configs.events import read_events
from configs.storage.files import canonical_json, digest_bytes, digest_file
from federated.adapters.arrays import from_bytes, to_bytes
from federated.aggregation.aggregation import RoundAggregation
from federated.coordinator.flower_grid import OneByOne
from federated.evaluation.private_sums import checked_sums, figures
from federated.protocol import silo_pb2 as pb
from federated.transport.flower_messages import pack
from privacy.certificate.check import check_certificate


@pytest.mark.parametrize("kind", BITS)
def test_an_update_of_any_other_type_is_rejected(kind, tmp_path):
    """Before: BF16, F8, F6 and F4 raised a KeyError, which ended the run at this start and at every later one."""
    header, data = header_of(to_bytes(adapter()))
    for entry in header.values():
        entry["dtype"] = kind
    for content in (safetensors(header, data), typed(adapter(), kind)):
        with pytest.raises(ValueError, match=rf"is {kind}, expected is F32|not safetensors"):
            from_bytes(content)

    def change(_, reply, __):
        reply.trained.update = typed(adapter(), kind)
        return reply

    _, events, answered = run(tmp_path, SignedSilo("good"), SignedSilo("bad", in_kind("trained", change)))
    assert answered == [["good"]] * 2
    assert [event["silo"] for event in events if event["event"] == "rejected"] == ["bad"] * 2


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"a": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}),
        safetensors({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [0] + [1] * 70, "data_offsets": [0, 0]}}),
        safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**40]}}, bytes(4)),
        safetensors(b"[" * 100_000),
        safetensors(b'{"a":' * 50_000),
        struct.pack("<Q", 2**63) + b"{}",
    ],
    ids=["huge empty", "overflow", "dimensions", "negative", "offsets", "list bomb", "object bomb", "length"],
)
def test_a_header_that_lies_is_an_error_of_one_kind(content):
    with pytest.raises(ValueError, match=r"safetensors|no adapter has"):
        from_bytes(content)


def run(tmp_path, *silos, overrides=("federated.min_silos=1",)):
    """A whole run of two rounds. Returns its certificate, its events, and the rounds' answers."""
    one = coordinator(InProcess(silos), tmp_path, *overrides)
    one.run(adapter)
    document = json.loads(json.dumps(one.certify_model(FILES)))
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    return document, events, [event["answered"] for event in events if event["event"] == "round"]


def in_kind(kind, change):
    """Changes the replies of one kind."""
    return lambda silo, reply, request: change(silo, reply, request) if reply.HasField(kind) else reply


def with_receipt(kind, **values):
    def change(silo, reply, request):
        getattr(reply, kind).receipt = silo.receipt(request.run_id, **values).to_bytes()
        return reply

    return in_kind(kind, change)


WRONG = [
    ({"epsilon_reserved": 0.0}, "epsilon_reserved"),
    ({"epsilon_reserved": 1.0}, "epsilon_reserved"),
    ({"delta_reserved": 1e-6}, "delta_reserved"),
    ({"plan_digest": "cc" * 32}, "plan_digest"),
    ({"plan_digest": ""}, "plan_digest"),
    ({"public_record_count": 999}, "public_record_count"),
    ({"dataset": "another"}, "dataset"),
    ({"run": "another"}, "run"),
    ({"silo": "good"}, "silo"),
    ({"spends": ()}, "spends"),
]


@pytest.mark.parametrize(("values", "field"), WRONG, ids=[str(one[0]) for one in WRONG])
@pytest.mark.parametrize("kind", ["reserved", "trained", "closed"])
def test_a_signed_receipt_with_a_wrong_field_is_rejected_when_it_comes(tmp_path, kind, values, field):
    """Before: none was rejected. A wrong epsilon, digest or count at the close made the certificate of all unsound; and
    with ``epsilon_reserved: 0`` in every receipt the certificate of two silos named one, verified, and its sum was half
    of what was spent, with the hostile silo's update in the model."""
    document, events, answered = run(tmp_path, SignedSilo("good"), SignedSilo("bad", with_receipt(kind, **values)))
    rejected = [event for event in events if event["event"] == "rejected"]
    assert {event["silo"] for event in rejected} == {"bad"}
    assert all(f"receipt of silo bad.{field}" in event["message"] for event in rejected)
    assert answered == [["bad", "good"] if kind == "closed" else ["good"]] * 2
    check_certificate(document, "test")
    # One that has reserved is claimed, whatever it says later; one that has not was never asked for anything.
    assert set(document["silos"]) == ({"good"} if kind == "reserved" else {"bad", "good"})
    assert document["epsilon_sum"] == pytest.approx(len(document["silos"]) * document["epsilon"])


STATED = [
    {"epsilon": 1.0},
    {"delta": 1e-7},
    {"plan_digest": "cc" * 32},
    {"public_record_count": 999},
    {"rounds_charged": 1},
    {"rounds_charged": 3},
    {"number": 99},
    {"head": "00" * 32},
    {"run": "another"},
    {"dataset": "another"},
]


@pytest.mark.parametrize("values", STATED, ids=map(str, STATED))
def test_a_signed_statement_with_a_wrong_field_is_rejected_when_it_comes(tmp_path, values):
    def change(silo, reply, request):
        reply.closed.statement = silo.statement(request.run_id, **values).to_bytes()
        return reply

    document, events, _ = run(tmp_path, SignedSilo("good"), SignedSilo("bad", in_kind("closed", change)))
    (rejected,) = [event for event in events if event["event"] == "rejected"]
    assert f"statement of silo bad.{next(iter(values))}" in rejected["message"]
    check_certificate(document, "test")
    assert "statement" not in document["silos"]["bad"]
    assert document["seeds"].startswith("not stated by bad")


def test_two_receipts_that_no_one_ledger_can_have_made_are_not_both_taken(tmp_path):
    def forgets(silo, reply, request):
        spends = tuple(spend.model_copy(update={"entry": "f" * 64}) for spend in silo.receipt("").spends)
        return with_receipt("trained", spends=spends)(silo, reply, request)

    def branches(silo, reply, request):
        return with_receipt("trained", number=2, head="00" * 32)(silo, reply, request)  # where its reservation is

    for name, change, word in (("one", forgets, ".spends: one of"), ("two", branches, ".head: another receipt")):
        _, events, answered = run(tmp_path / name, SignedSilo("good"), SignedSilo("bad", change))
        assert answered == [["good"]] * 2
        assert all(word in event["message"] for event in events if event["event"] == "rejected")


def test_no_silo_with_an_update_in_the_model_can_be_left_out(tmp_path):
    silos = [SignedSilo("good"), SignedSilo("bad")]
    one = coordinator(InProcess(silos), tmp_path, "federated.min_silos=1")
    one.run(adapter)
    document = one.certify_model(FILES)
    assert [set(found["releases"]) for found in document["model"]["rounds"]] == [{"bad", "good"}] * 2
    del document["silos"]["bad"]
    with pytest.raises(InputError, match=r"has a release of 'bad', which the certificate leaves out"):
        check_certificate(document, "test")
    del one.silo_records.silos["bad"]["receipt"]
    with pytest.raises(SiloweaveError, match="updates of bad and no receipt"):
        one.certify_model(FILES)


def test_a_silo_that_breaks_off_at_the_end_ends_nothing(tmp_path):
    """Both of two were needed for every round; for the close nobody is."""
    silent = in_kind("closed", lambda *_: b"\xff")
    document, events, answered = run(
        tmp_path, SignedSilo("good"), SignedSilo("bad", silent), overrides=("federated.min_silos=2",)
    )
    assert answered == [["bad", "good"]] * 2
    assert [event["silo"] for event in events if event["event"] == "rejected"] == ["bad"]
    check_certificate(document, "test")
    assert "statement" not in document["silos"]["bad"]


def test_a_restart_takes_up_the_receipts_and_a_silo_stays_who_it_was(tmp_path):
    grid = InProcess([SignedSilo("good"), SignedSilo("bad")])
    first = coordinator(grid, tmp_path, "federated.min_silos=1")
    first.run(adapter)

    def another(silo, reply, _):
        reply.described.dataset_id = "ward-other"
        return reply

    grid.silos[2].change = in_kind("described", another)
    again = coordinator(InProcess(grid.silos.values()), tmp_path, "federated.min_silos=1")
    again.run(adapter)
    document = again.certify_model(FILES)
    check_certificate(document, "test")
    assert set(document["silos"]) == {"bad", "good"}
    (event,) = [one for one in read_events(tmp_path / "run" / "events.jsonl") if one["event"] == "rejected"]
    assert "its dataset_id was 'ward-bad' and is 'ward-other' now" in event["message"]


def test_a_run_of_an_earlier_version_is_continued_or_refused_at_its_start(tmp_path):
    """Its rounds have no digests of releases; a receipt that it took and that no certificate can hold is named."""
    silos = [SignedSilo("good"), SignedSilo("bad")]
    first = coordinator(InProcess(silos), tmp_path, "federated.min_silos=1")
    first.run(adapter)
    for number in (1, 2):
        folder = tmp_path / "run" / f"round-{number:05d}"
        silos_file, committed = folder / "silos.json", json.loads((folder / "COMMITTED").read_text())
        for name in ("releases.json", "earlier.json"):
            (folder / name).unlink()
            del committed["files"][name]
        (folder / "COMMITTED").write_text(json.dumps(committed))
    again = coordinator(InProcess(silos), tmp_path, "federated.min_silos=1")
    again.run(adapter)
    document = again.certify_model(FILES)
    check_certificate(document, "test")
    assert [found["releases"] for found in document["model"]["rounds"]] == [None, None]
    kept = json.loads(silos_file.read_text())
    kept["bad"]["receipt"]["epsilon_reserved"] = 0.0
    silos_file.write_text(json.dumps(kept))
    committed["files"]["silos.json"] = {"size_bytes": silos_file.stat().st_size, "sha256": digest_file(silos_file)}
    (folder / "COMMITTED").write_text(json.dumps(committed))
    with pytest.raises(InputError, match=r"round 2: bad.receipt.epsilon_reserved is 0.0, expected"):
        coordinator(InProcess(silos), tmp_path, "federated.min_silos=1").run(adapter)


def test_what_a_silo_says_is_logged_as_one_line_without_control_characters(tmp_path):
    def refuses(_, reply, __):
        reply.refusal.CopyFrom(pb.Refusal(rule="r\x1b[2J", message="no\n\x1b]0;owned\x07" + "x" * 2_000))
        return reply

    _, events, _ = run(tmp_path, SignedSilo("good"), SignedSilo("bad", in_kind("trained", refuses)))
    refused = [event for event in events if event["event"] == "refused"]
    assert len(refused) == 2
    for event in refused:
        assert event["message"].isprintable() and event["rule"].isprintable()
        assert len(event["message"]) < 1000


def test_figures_of_any_accepted_sums_are_numbers():
    """Before: sums of 1e308 made an infinity, and NaN, of the figures of all."""
    bounds = bounds_for(64, ("yes", "no"))
    for bad in (1e308, -1e308, math.inf, math.nan, 2.0**41):
        with pytest.raises(ValueError, match="not finite or beyond"):
            checked_sums([bad] * bounds.num_sums, bounds)
    largest = checked_sums([2.0**40] * bounds.num_sums, bounds)
    canonical_json(figures([largest, [-value for value in largest], largest], bounds, 1.0))


def test_a_reply_is_known_by_the_message_that_it_answers_and_not_by_what_it_says_of_its_sender(tmp_path):
    """Before: Flower's own error for a reply that was never uploaded, which comes from nobody that was asked, raised a
    KeyError."""

    def message_of(content, asked):
        reply = Message(pack(content), reply_to=asked)
        if asked.metadata.dst_node_id == 2 and asked.metadata.message_type == "train":
            reply = Message(Error(code=9, reason="never\nuploaded"), reply_to=asked)
            reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    one = coordinator(InProcess([SignedSilo("good"), SignedSilo("bad")], message_of), tmp_path, "federated.min_silos=1")
    one.run(adapter)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert [event["answered"] for event in events if event["event"] == "round"] == [["good"]] * 2
    shown = {(event["silo"], event["message"]) for event in events if event["event"] == "rejected"}
    assert shown == {("bad", f"silo bad: never uploaded; step {number} goes on") for number in (1, 2)}


UNREADABLE_BY_FLOWER = (b"Strange  0\x00", b"Message  7\x00nothing", b"RecordDict  0\x00", b"\xff", b"")


class OverTheNetwork(InProcess):
    """Reads what one node sends as Flower does: replies are taken first, and then inflated, all that have come."""

    sent = b""

    def pull_messages(self, message_ids):
        asked = {one: self._asked[one].metadata.dst_node_id for one in message_ids if one in self._asked}
        replies = super().pull_messages(message_ids)
        if 2 in asked.values() and replies[0].metadata.message_type == "train":
            name = digest_bytes(self.sent)
            cast_message = inflate_object_from_contents(name, {name: self.sent})
            cast_message.metadata.__dict__["_message_id"] = name
        return replies


@pytest.mark.parametrize("sent", UNREADABLE_BY_FLOWER)
def test_what_flower_itself_can_not_read_is_lost_alone(tmp_path, sent):
    """Before: a SuperNode's object of an unknown class raised a KeyError in Flower's grid, which ended the ServerApp at
    every start, and took the other replies of its batch with it."""
    grid = OverTheNetwork([SignedSilo("good"), SignedSilo("bad")])
    grid.sent = sent
    with pytest.raises((KeyError, ValueError, AttributeError, DecodeError)):
        coordinator(grid, tmp_path / "before", "federated.min_silos=1").run(adapter)
    settings = ("federated.min_silos=1", "federated.round_timeout_s=60")
    one = coordinator(OneByOne(grid), tmp_path / "after", *settings, silos=2)
    one.run(adapter)
    events = list(read_events(tmp_path / "after" / "run" / "events.jsonl"))
    assert [event["answered"] for event in events if event["event"] == "round"] == [["good"]] * 2
    rejected = [event["message"] for event in events if event["event"] == "rejected"]
    assert len(rejected) == 2 and all("silo bad: Flower can't read its reply (" in line for line in rejected)


class Impostor(InProcess):
    """A grid whose second node says that its replies answer what the first one was asked."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if reply.metadata.src_node_id == 2 and reply.metadata.message_type == "train":
                first = str(int(reply.metadata.reply_to_message_id) - 1)
                reply.metadata.__dict__["_reply_to_message_id"] = first
        return replies


def test_no_reply_can_pass_for_another_silos(tmp_path):
    """Pulled first, it would take the place of an honest silo's, which was then not looked at."""
    for name, grid, answered, patience_s in (
        ("before", Impostor, [], 1.0),  # the other reply never comes
        ("after", lambda silos: OneByOne(Impostor(silos)), ["bad"], 60.0),
    ):
        silos = [SignedSilo("good"), SignedSilo("bad")]
        one = coordinator(grid(silos), tmp_path / name, "federated.round_timeout_s=60", silos=2)
        one._meet(2, 0)
        one.exchange.mail.settings = one.config.federated.model_copy(update={"round_timeout_s": patience_s})
        assert one._ask(1, RoundAggregation(one.config.federated, adapter(), {}, 2), adapter()) == [*answered, "good"]
