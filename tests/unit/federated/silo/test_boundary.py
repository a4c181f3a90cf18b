"""Hostile requests to a silo, and the service around it: who may ask, how much, and what a caller can break."""

import json
import struct
import threading
import time

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from silo_requests import COORDINATOR, EXPIRES, TRUSTED, ask, body_of, opened, signer_of, ward

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.storage.files import digest_bytes
from federated.adapters.arrays import check_update, from_bytes, to_bytes
from federated.adapters.update_codec import decoded
from federated.adapters.warm_model import initial_adapter
from federated.identity.cards import TrustedCoordinator
from federated.identity.trust import trust
from federated.protocol import silo_pb2 as pb
from federated.protocol import silo_pb2_grpc
from federated.protocol.envelope import seal_request
from federated.protocol.framing import CHUNK_BYTES, ROUNDED_VERSION
from federated.silo.line_file import LineFile
from federated.silo.local_training import PrivateUpdate
from federated.silo.requests import check_sender, decode, open_envelope
from federated.silo.silo import Silo
from federated.silo.traffic_log import UnloggedError
from federated.transport.service import MAX_WAITING, serve
from federated.transport.service_client import ask_service
from privacy.plan import PlanTerms

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5)
STRANGER = signer_of(bytes(range(1, 33)))


@pytest.fixture
def open_silo(tmp_path, tiny_model):
    silos = []

    def start(trusted=TRUSTED, folder=tmp_path, **policy):
        folder.mkdir(parents=True, exist_ok=True)
        silos.append(Silo(ward(folder, tiny_model, **policy), trusted))
        return silos[-1]

    yield start
    for silo in silos:
        silo.close()


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


def train(silo, content, **changes):
    values = {
        "round": 1,
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
        "adapter": content,
        "learning_rate": 0.01,
        "optimizer": "adam",
    }
    return {"train": pb.Train(**{**values, **changes})}


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


def reserve(silo):
    assert ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))[0].WhichOneof("kind") == "reserved"


def audit(silo, name="audit.jsonl"):
    path = silo.ledger.path.parent / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_only_a_trusted_coordinator_is_answered(open_silo):
    silo = open_silo()
    body = body_of("reserve", coordinator=STRANGER.public_key, reserve=pb.Reserve(plan=PLAN.model_dump_json()))
    assert opened(silo.handle(seal_request(STRANGER, body)), silo).refusal.rule == "coordinator"
    described = body_of("describe", silo_id="", describe=pb.Describe(), coordinator="")
    assert opened(silo.handle(seal_request(STRANGER, described)), silo).refusal.rule == "coordinator"
    # It can't borrow a trusted one's name either.
    body = body_of("reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
    assert opened(silo.handle(seal_request(STRANGER, body)), silo).refusal.rule == "signature"
    assert kinds(silo) == ["open"]


def test_the_stewards_files_say_whom_to_trust_from_one_request_to_the_next(open_silo):
    silo = open_silo(trusted=None)
    assert ask(silo, "describe", describe=pb.Describe())[0].refusal.rule == "coordinator"
    path = trust(silo.ledger.path.parent, TrustedCoordinator(name="ours", public_key=COORDINATOR.public_key))
    assert ask(silo, "describe", describe=pb.Describe())[0].described.dataset_id == "ward"
    path.unlink()
    assert ask(silo, "describe", describe=pb.Describe())[0].refusal.rule == "coordinator"


def test_a_trusted_file_that_is_none_stops_the_start(open_silo, tmp_path):
    (tmp_path / "state" / "trusted").mkdir(parents=True)
    (tmp_path / "state" / "trusted" / "x.json").write_text('{"kind": "coordinator", "name": "x", "public_key": "12"}')
    with pytest.raises(InputError, match=r"x\.json: public_key"):
        open_silo(trusted=None)


@pytest.mark.parametrize(
    ("version", "whom"), [(2, "the coordinator"), (5, "the coordinator"), (8, "this silo"), (2**32 - 1, "this silo")]
)
def test_a_version_that_is_not_spoken_is_refused_with_who_has_to_be_upgraded(version, whom):
    with pytest.raises(PolicyRefusal, match=rf"^version: asked {version}, allowed 3 or 4 or 6 or 7: upgrade {whom}$"):
        decode(body_of("reserve", version=version, reserve=pb.Reserve()), "north")


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_a_request_that_was_changed_on_its_way_is_refused(open_silo, adapter, position):
    silo = open_silo()
    reserve(silo)
    envelope = pb.Envelope.FromString(seal_request(COORDINATOR, body_of("round-1", **train(silo, adapter))))
    changed = bytearray(envelope.body)
    at = int(len(changed) * position)
    changed[at] ^= 1
    envelope.body = bytes(changed)
    rule = opened(silo.handle(envelope.SerializeToString()), silo).refusal.rule
    assert rule in ("signature", "request", "coordinator", "version", "silo_id", "expires")
    assert kinds(silo) == ["open", "reserve"]


def test_a_receipt_can_neither_be_taken_away_nor_swapped_on_its_way(open_silo):
    silo = open_silo()
    reserve(silo)
    body = body_of("close", close=pb.Close())
    receipts = [silo.ledger.receipt("run-1").to_bytes(), silo.ledger.receipt("run-2").to_bytes()]
    envelope = pb.Envelope.FromString(seal_request(COORDINATOR, body, receipts[0]))
    for other in (b"", receipts[1]):
        envelope.receipt = other
        assert opened(silo.handle(envelope.SerializeToString()), silo).refusal.rule == "signature"


def test_a_request_ends_with_its_expiry(open_silo):
    silo = open_silo()
    for expires in (0, int(time.time()) - 1):
        assert ask(silo, "close", close=pb.Close(), expires=expires)[0].refusal.rule == "expires"


def test_a_request_replayed_after_the_run_is_refused_and_gets_no_stored_reply(open_silo, adapter):
    silo = open_silo()
    reserve(silo)
    request = train(silo, adapter)
    assert ask(silo, "round-1", **request)[0].WhichOneof("kind") == "trained"
    ask(silo, "close", close=pb.Close())
    assert ask(silo, "round-1", **request)[0].refusal.rule == "closed"


def test_a_used_id_with_another_adapter_is_refused(open_silo, adapter, tiny_run):
    silo = open_silo()
    reserve(silo)
    ask(silo, "round-1", **train(silo, adapter))
    other = to_bytes({name: array + 1 for name, array in initial_adapter(tiny_run.config(), tiny_run.model).items()})
    assert ask(silo, "round-1", **train(silo, other))[0].refusal.rule == "request_id"
    assert kinds(silo).count("charge") == 1


def test_the_policy_bounds_how_much_and_how_often(open_silo, adapter, tmp_path):
    silo = open_silo(max_request_bytes=20_000, max_requests_per_day=3)
    assert opened(silo.handle(bytes(20_001)), silo).refusal.rule == "max_request_bytes"
    for _ in range(3):
        assert ask(silo, "close", close=pb.Close())[0].WhichOneof("kind") == "closed"
    assert ask(silo, "close", close=pb.Close())[0].refusal.rule == "max_requests_per_day"
    silo.close()
    again = open_silo(max_requests_per_day=4)  # a restart forgets nothing
    assert ask(again, "close", close=pb.Close())[0].WhichOneof("kind") == "closed"
    assert ask(again, "close", close=pb.Close())[0].refusal.rule == "max_requests_per_day"
    # A stranger's requests don't use up the coordinators' share.
    body = body_of("close", close=pb.Close(), coordinator=STRANGER.public_key)
    assert opened(again.handle(seal_request(STRANGER, body)), again).refusal.rule == "coordinator"


def test_a_run_whose_requests_are_too_large_is_refused_at_its_start_and_reserves_nothing(open_silo):
    """Before: its first round was. A coordinator that says no size, or a false one, meets the limit there."""
    silo = open_silo(max_request_bytes=20_000)
    for size, kind in ((20_001, "refusal"), (2**64 - 1, "refusal"), (20_000, "reserved"), (0, "reserved")):
        asked = pb.Reserve(plan=PLAN.model_dump_json(), request_bytes=size)
        reply = ask(silo, f"reserve {size}", reserve=asked)[0]
        assert reply.WhichOneof("kind") == kind
        if kind == "refusal":
            assert kinds(silo) == ["open"]
            assert (reply.refusal.rule, reply.refusal.allowed) == ("max_request_bytes", "20000")
            assert f"has {size} bytes, policy.max_request_bytes allows 20000; raise it" in reply.refusal.message


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_update_is_rounded_after_its_noise_and_signed_and_kept_as_it_travels(open_silo, adapter, dtype):
    silo = open_silo()
    reserve(silo)
    refused = ask(silo, "round-1", **train(silo, adapter, update_dtype="float16"))[0].refusal
    assert (refused.rule, refused.asked) == ("update_dtype", "float16")
    assert kinds(silo) == ["open", "reserve"]
    asked = {"version": ROUNDED_VERSION, **train(silo, adapter, update_dtype=dtype)}
    reply = ask(silo, "round-1", **asked)[0]
    update = decoded(reply.trained.update, dtype, len(adapter) * 2)
    check_update(update, from_bytes(adapter))
    assert any(array.any() for array in update.values())
    assert ask(silo, "round-1", **asked)[0] == reply
    assert kinds(silo).count("charge") == 1
    assert len(reply.trained.update) < len(adapter)


def lying_header(adapter):
    """Safetensors whose header points beyond the end, into itself, or is longer than the file."""
    (size,) = struct.unpack("<Q", adapter[:8])
    header = json.loads(adapter[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")

    def with_header(**changes):
        tree = {**header, name: {**header[name], **changes}}
        text = json.dumps(tree).encode()
        return struct.pack("<Q", len(text)) + text + adapter[8 + size :]

    yield with_header(data_offsets=[0, 2**60])
    yield with_header(data_offsets=[-4, 8])
    yield with_header(shape=[2**40, 2**40])
    yield with_header(dtype="F64")
    yield struct.pack("<Q", 2**63) + adapter[8:]
    yield adapter[:-1]


def test_safetensors_with_a_lying_header_are_refused_and_never_charged(open_silo, adapter):
    silo = open_silo()
    reserve(silo)
    for content in lying_header(adapter):
        assert ask(silo, "round-1", **train(silo, content))[0].refusal.rule == "adapter"
    assert kinds(silo) == ["open", "reserve"]


def test_a_path_in_a_request_reaches_no_file(open_silo, adapter, tmp_path):
    """Names of runs, requests and tasks are looked up in the ledger, and never opened or written."""
    site = tmp_path / "site" / "ward"  # the path's two steps up end in this test's own folder: others write beside it
    silo, path = open_silo(folder=site), f"../../{'x' * 20}"
    ask(silo, path, run_id=path, reserve=pb.Reserve(plan=PLAN.model_dump_json()))
    before = set(tmp_path.rglob("*"))
    for changes, rule in (({"task": path}, "task"), ({"base_model_digest": path}, "base_model")):
        assert ask(silo, path, run_id=path, **train(silo, adapter, **changes))[0].refusal.rule == rule
    assert ask(silo, path + "/1", run_id=path, **train(silo, adapter))[0].WhichOneof("kind") == "trained"
    ask(silo, path, run_id=path, close=pb.Close())
    assert set(tmp_path.rglob("*")) == before


def test_the_audit_log_tells_sizes_and_digests_of_everything(open_silo, adapter):
    silo = open_silo()
    reserve(silo)
    ask(silo, "round-1", **train(silo, adapter))
    silo.handle(b"nonsense")
    lines = audit(silo)
    assert [line["direction"] for line in lines] == ["accepted", "out"] * 2
    assert [line["outcome"] for line in lines if line["direction"] == "out"] == ["answered", "answered"]
    trained = lines[2]
    assert (trained["kind"], trained["run"], trained["request"]) == ("train", "run-1", "round-1")
    assert all(len(line["digest"]) == 64 and line["bytes"] > 0 for line in lines)
    assert (silo.ledger.path.parent / "audit.jsonl").stat().st_mode & 0o077 == 0
    assert max(len(json.dumps(line)) for line in lines) < 1000  # no adapter and no plan is in it


def test_what_no_trusted_coordinator_signed_is_recorded_apart(open_silo, monkeypatch):
    """Whatever it is, and whatever goes wrong while it is looked at: what came and what left, in one of both files."""
    from federated.silo import silo as module

    silo = open_silo()
    reserve(silo)
    before = audit(silo)
    body = body_of("close", close=pb.Close())
    other = body_of("close", close=pb.Close(), coordinator=STRANGER.public_key)
    late = seal_request(COORDINATOR, body_of("close", close=pb.Close(), expires=1))
    sent = [b"", b"nonsense", seal_request(STRANGER, body), seal_request(STRANGER, other), late]
    replies = [silo.handle(content) for content in sent]
    with monkeypatch.context() as patched:
        patched.setattr(module, "check_sender", lambda *_: 1 / 0)
        sent.append(seal_request(COORDINATOR, body))
        replies.append(silo.handle(sent[-1]))
    lines = audit(silo, "strangers.jsonl")
    assert [line["digest"] for line in lines if line["direction"] == "in"] == list(map(digest_bytes, sent))
    assert [line["digest"] for line in lines if line["direction"] == "out"] == list(map(digest_bytes, replies))
    refused = [f"refused: {rule}" for rule in ("version", "request", "signature", "coordinator", "expires")]
    assert [line["outcome"] for line in lines if line["direction"] == "out"] == [*refused, "failed"]
    assert audit(silo) == before
    assert opened(silo.handle(seal_request(COORDINATOR, body)), silo).WhichOneof("kind") == "closed"
    assert [line["direction"] for line in audit(silo)[len(before) :]] == ["accepted", "out"]


def test_a_stranger_is_not_answered_where_its_line_cannot_be_written(open_silo, tmp_path):
    silo = open_silo()
    (tmp_path / "state" / "strangers.jsonl").mkdir()
    with pytest.raises(UnloggedError):
        silo.handle(b"nonsense")
    assert "no reply to" in (tmp_path / "state" / "silo.log").read_text()


def test_nothing_is_answered_where_the_audit_log_cannot_be_written(open_silo, tmp_path):
    silo = open_silo()
    (tmp_path / "state" / "audit.jsonl").mkdir()
    with pytest.raises(UnloggedError):
        ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
    assert kinds(silo) == ["open"]


@pytest.mark.parametrize("broken", [False, True], ids=["an update", "a failure"])
def test_no_reply_leaves_whose_line_was_not_written_and_the_next_try_gets_it(open_silo, adapter, monkeypatch, broken):
    """Before: the update left with a cut line or, where writing failed at once, a failure's reply without any."""

    silo = open_silo()
    reserve(silo)
    if broken:
        monkeypatch.setattr(PrivateUpdate, "run", lambda *_: 1 / 0)
    envelope, append = seal_request(COORDINATOR, body_of("round-1", **train(silo, adapter))), LineFile.append

    def full_for_replies(file, line, **options):
        if '"direction": "out"' in line:
            raise SiloweaveError("no space left")
        append(file, line, **options)

    with monkeypatch.context() as patched:
        patched.setattr(LineFile, "append", full_for_replies)
        with pytest.raises(UnloggedError):
            silo.handle(envelope)
    assert audit(silo)[-1]["direction"] == "accepted"
    assert kinds(silo) == ["open", "reserve", "charge", "release"][: 3 if broken else 4]
    reply = silo.handle(envelope)
    assert opened(reply, silo).WhichOneof("kind") == ("failure" if broken else "trained")
    assert kinds(silo).count("charge") == 1
    assert audit(silo)[-1]["bytes"] == len(reply)


MESSAGES = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda **fields: pb.Request(**fields).SerializeToString(),
        version=st.sampled_from([0, 2, 3, 2**32 - 1]),
        run_id=st.text(max_size=120),
        silo_id=st.sampled_from(["north", "", "south"]),
        request_id=st.text(max_size=220),
        coordinator=st.sampled_from([COORDINATOR.public_key, "", "00", "é"]),
        expires=st.sampled_from([0, EXPIRES, 2**63]),
        reserve=st.builds(pb.Reserve, plan=st.text(max_size=50)),
    ),
)


@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=MESSAGES, signature=st.text(max_size=130), wrapped=st.booleans())
def test_the_decoder_refuses_and_never_crashes(body, signature, wrapped):
    """10,000 envelopes, none of which a coordinator signed: each is refused by a rule, and nothing else is raised."""
    content = pb.Envelope(body=body, signature=signature).SerializeToString() if wrapped else body
    with pytest.raises(PolicyRefusal) as refused:
        envelope = open_envelope(content, 2**20)
        check_sender(envelope, decode(envelope.body, "north"), TRUSTED)
    assert refused.value.rule


# The service


@pytest.fixture
def service(open_silo, tmp_path_factory):
    """A silo behind its Unix socket, and the channel's address."""
    silo = open_silo(max_request_bytes=4 * CHUNK_BYTES)
    address = f"unix:{tmp_path_factory.mktemp('s')}/silo.sock"
    server, _ = serve(silo.handle, silo.config.policy.max_request_bytes, address)
    yield silo, address
    server.stop(grace=None).wait()


def test_large_messages_cross_in_chunks(service):
    silo, address = service
    plan = PLAN.model_dump_json() + " " * (3 * CHUNK_BYTES)
    envelope = seal_request(COORDINATOR, body_of("reserve", reserve=pb.Reserve(plan=plan)))
    assert opened(ask_service(address, envelope), silo).refusal.rule == "plan"  # it was read whole: it is too long


def test_a_refusal_comes_back_with_its_status_code(service):
    silo, address = service
    codes = {}
    for name, plan in {
        "weak": PLAN.model_copy(update={"noise_multiplier": 0.1}),
        "long": PLAN.model_copy(update={"noise_multiplier": 0.4, "rounds": 1000}),
    }.items():
        envelope = seal_request(COORDINATOR, body_of(name, reserve=pb.Reserve(plan=plan.model_dump_json())))
        with grpc.insecure_channel(address) as channel:
            call = silo_pb2_grpc.SiloStub(channel).Exchange(iter([pb.Chunk(data=envelope)]))
            content = bytearray()
            with pytest.raises(grpc.RpcError):
                for chunk in call:
                    content += chunk.data
            codes[opened(bytes(content), silo).refusal.rule] = call.code()
    assert codes == {
        "min_noise_multiplier": grpc.StatusCode.PERMISSION_DENIED,
        "max_epsilon_per_run": grpc.StatusCode.RESOURCE_EXHAUSTED,
    }


def test_two_gigabytes_are_cut_off_at_the_policys_limit(service):
    _, address = service
    sent = []

    def parts():
        for _ in range(2048):
            sent.append(CHUNK_BYTES)
            yield pb.Chunk(data=bytes(CHUNK_BYTES))

    with grpc.insecure_channel(address) as channel:
        call = silo_pb2_grpc.SiloStub(channel).Exchange(parts())
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_request_bytes: allowed 4194304" in call.details()
        whole = silo_pb2_grpc.SiloStub(channel).Exchange(iter([pb.Chunk(data=bytes(3 * CHUNK_BYTES))]))
        with pytest.raises(grpc.RpcError):
            list(whole)
        assert whole.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # gRPC itself, before it is in memory whole
    assert sum(sent) < 2**30


def test_a_caller_that_gives_up_changes_no_charge_and_finds_its_reply_later(service, adapter, monkeypatch):
    silo, address = service
    reserve(silo)
    began, gone, run = threading.Event(), threading.Event(), PrivateUpdate.run

    def slow(*arguments):
        began.set()
        assert gone.wait(300)
        return run(*arguments)

    monkeypatch.setattr(PrivateUpdate, "run", slow)
    envelope = seal_request(COORDINATOR, body_of("round-1", **train(silo, adapter)))
    with grpc.insecure_channel(address) as channel:
        call = silo_pb2_grpc.SiloStub(channel).Exchange(iter([pb.Chunk(data=envelope)]))
        assert began.wait(300)
        call.cancel()
        with pytest.raises(grpc.RpcError):
            list(call)
    gone.set()
    first = ask_service(address, envelope)  # waits for its turn, and gets what was stored
    assert opened(first, silo).WhichOneof("kind") == "trained"
    assert ask_service(address, envelope) == first
    assert kinds(silo) == ["open", "reserve", "charge", "release"]


def test_one_request_is_answered_at_a_time_and_few_wait(service, monkeypatch):
    silo, address = service
    free, inside = threading.Event(), []
    dispatch = silo._dispatch

    def held(*arguments):
        inside.append(1)
        assert len(inside) == 1  # never two at once
        free.wait(300)
        inside.pop()
        return dispatch(*arguments)

    monkeypatch.setattr(silo, "_dispatch", held)
    envelope = seal_request(COORDINATOR, body_of("describe", describe=pb.Describe()))
    outcomes = []

    def ask_it():
        try:
            outcomes.append(opened(ask_service(address, envelope), silo).WhichOneof("kind"))
        except grpc.RpcError as error:
            outcomes.append(error.details())

    threads = [threading.Thread(target=ask_it) for _ in range(MAX_WAITING + 2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 300
    while not outcomes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert outcomes == [f"queue: {MAX_WAITING} requests wait; ask again later"]
    free.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[:-1] == ["described"] * (MAX_WAITING + 1)


def test_a_network_address_needs_tls(open_silo):
    with pytest.raises(InputError, match="anybody could read"):
        serve(open_silo().handle, 2**20, "127.0.0.1:0")
