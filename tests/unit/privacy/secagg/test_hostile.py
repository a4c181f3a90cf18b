"""A server, a network and silos that lie: refused by name, and nothing is unmasked."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secure_sum import SecureSum, agreement_of, signers

from privacy.secagg.client import Client
from privacy.secagg.failures import (
    EarlyMessage,
    ForgedMessage,
    InconsistentView,
    LateMessage,
    MalformedMessage,
    RepeatedMessage,
    SecureAggregationError,
    TooFewSilos,
    UnknownSilo,
    UnknownVersion,
    WrongContext,
)
from privacy.secagg.messages import Phase, pack, server_message, silo_message, unpack

HEADER = 38


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return signers(tmp_path_factory.mktemp("keys"), 5)


@pytest.fixture
def running(keys):
    return SecureSum.of(keys, agreement_of(keys))


def answer(running, phase, *fields):
    return server_message(phase, running.agreement.digest, *fields)


def fields(message):
    return unpack(message[HEADER:])


def test_a_key_that_the_server_made_itself_is_refused(running, keys):
    running.until(Phase.KEYS)
    honest = fields(running.inbox["silo-00"])
    other = Client("silo-01", keys["silo-01"], running.agreement).advertise()
    name, _body, signature = unpack(honest[1][HEADER:])
    swapped = honest[1][:HEADER] + pack(name, unpack(other[HEADER:])[1], signature)
    with pytest.raises(ForgedMessage, match="silo-01"):
        running.clients["silo-00"].share(answer(running, Phase.KEYS, honest[0], swapped, *honest[2:]))


def test_keys_under_another_silos_name_are_refused(running, keys):
    running.until(Phase.KEYS)
    honest = fields(running.inbox["silo-00"])
    body = unpack(honest[2][HEADER:])[1]
    posing = silo_message(keys["silo-02"], "silo-01", Phase.KEYS, running.agreement.digest, body)
    with pytest.raises(ForgedMessage, match="silo-01"):
        running.clients["silo-00"].share(answer(running, Phase.KEYS, honest[0], posing, *honest[2:]))


def test_a_silo_that_the_server_adds_is_refused(running, tmp_path):
    running.until(Phase.KEYS)
    (signer,) = signers(tmp_path, 1).values()
    honest = fields(running.inbox["silo-00"])
    body = unpack(honest[0][HEADER:])[1]
    added = silo_message(signer, "zz", Phase.KEYS, running.agreement.digest, body)
    with pytest.raises(UnknownSilo):
        running.clients["silo-00"].share(answer(running, Phase.KEYS, *honest, added))


def test_a_silo_that_is_counted_twice_is_refused(running):
    running.until(Phase.KEYS)
    honest = fields(running.inbox["silo-00"])
    with pytest.raises(RepeatedMessage):
        running.clients["silo-00"].share(answer(running, Phase.KEYS, *honest[:3], honest[2]))


def test_a_silos_own_keys_have_to_come_back(running, keys):
    running.until(Phase.KEYS)
    again = Client("silo-00", keys["silo-00"], running.agreement).advertise()
    with pytest.raises(InconsistentView, match="own keys"):
        running.clients["silo-00"].share(answer(running, Phase.KEYS, again, *fields(running.inbox["silo-00"])[1:]))


def test_keys_of_another_round_are_refused(running, keys):
    earlier = SecureSum.of(keys, agreement_of(keys, context=b"round 0")).until(Phase.KEYS)
    running.until(Phase.KEYS)
    with pytest.raises(WrongContext):
        running.clients["silo-00"].share(earlier.inbox["silo-00"])
    with pytest.raises(WrongContext):  # under this round's own header
        running.clients["silo-00"].share(answer(running, Phase.KEYS, *fields(earlier.inbox["silo-00"])))


def test_two_models_are_never_unmasked_together(keys):
    """100 tries: the server shows another model to one silo, to two, or to all but one, and relabels what it can."""
    names = sorted(keys)
    for attempt in range(100):
        fooled = {names[(attempt + step) % 5] for step in range(1 + attempt % 4)}
        agreements = [agreement_of(keys, length=2, context=b"model %d" % version) for version in (1, 2)]
        clients = {name: Client(name, keys[name], agreements[name in fooled]) for name in names}
        advertised = {name: client.advertise() for name, client in clients.items()}
        refused = set()
        for name, client in clients.items():
            digest = agreements[name in fooled].digest
            relabelled = [message[:6] + digest + message[HEADER:] for message in advertised.values()]
            for bundle in (advertised.values(), relabelled):
                with pytest.raises((WrongContext, ForgedMessage)):
                    client.share(server_message(Phase.KEYS, digest, *bundle))
            same = [advertised[other] for other in names if (other in fooled) == (name in fooled)]
            if len(same) < agreements[0].min_survivors:
                with pytest.raises(TooFewSilos):
                    client.share(server_message(Phase.KEYS, digest, *same))
                refused.add(name)
        assert refused in (fooled, set(names) - fooled)  # whichever is the smaller group is alone


def test_a_share_that_the_server_made_up_or_swapped_is_refused(running):
    running.until(Phase.SHARES)
    listed, packed = fields(running.inbox["silo-00"])
    sealed = unpack(packed)
    for wrong in ([sealed[1], sealed[0], *sealed[2:]], [bytes(len(sealed[0])), *sealed[1:]], [b"", *sealed[1:]]):
        with pytest.raises(ForgedMessage, match="silo-"):
            running.clients["silo-00"].mask(
                answer(running, Phase.SHARES, listed, pack(*wrong)), running.words["silo-00"]
            )
    with pytest.raises(MalformedMessage):
        running.clients["silo-00"].mask(
            answer(running, Phase.SHARES, listed, pack(*sealed[:-1])), running.words["silo-00"]
        )
    running.collect(Phase.MASKED)  # what was refused has changed nothing
    assert not running.server.waiting_for


def lists(running, names):
    return answer(running, Phase.MASKED, *(name.encode() for name in names))


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (("silo-00", "silo-01"), TooFewSilos),
        (("silo-01", "silo-02", "silo-03"), InconsistentView),  # without the silo itself
        (("silo-00", "silo-01", "silo-01"), InconsistentView),
        (("silo-01", "silo-00", "silo-02"), InconsistentView),
        (("silo-00", "silo-01", "zz"), UnknownSilo),
        (("silo-00", "silo-01", "silo-04"), UnknownSilo),  # has not shared
    ],
)
def test_lists_of_survivors_that_can_not_be_are_refused(keys, names, error):
    running = SecureSum.of(keys, agreement_of(keys), {Phase.SHARES: {"silo-04"}}).until(Phase.MASKED)
    with pytest.raises(error):
        running.clients["silo-00"].agree(lists(running, names))


def test_a_server_that_tells_of_different_survivors_unmasks_nothing(keys):
    """It wants silo-00's seed of some, and its key of others."""
    running = SecureSum.of(keys, agreement_of(keys)).until(Phase.MASKED)
    names = sorted(keys)
    told = {name: names if name < "silo-03" else names[1:] for name in names}
    signed = {name: running.clients[name].agree(lists(running, told[name])) for name in names}
    for name, client in running.clients.items():
        with pytest.raises(InconsistentView):
            client.reveal(answer(running, Phase.SURVIVORS, *signed.values()))
        same = [message for other, message in signed.items() if told[other] == told[name]]
        if len(same) < running.agreement.min_survivors:
            with pytest.raises(TooFewSilos):
                client.reveal(answer(running, Phase.SURVIVORS, *same))
            with pytest.raises(TooFewSilos):  # one signature often is one signature
                client.reveal(answer(running, Phase.SURVIVORS, *same * 3))


def test_a_silo_signs_one_list_and_no_other(running):
    running.until(Phase.MASKED)
    running.say("silo-00", Phase.SURVIVORS)
    with pytest.raises(LateMessage):
        running.clients["silo-00"].agree(lists(running, ["silo-00", "silo-01", "silo-02"]))


def test_the_server_that_hides_who_has_shared_unmasks_nothing(running):
    """Silo 0 is told that silo 4 did not share: its masks would not fit, and its signature doesn't."""
    running.until(Phase.SHARES)
    listed, packed = fields(running.inbox["silo-00"])
    neighbours = running.agreement.neighbours("silo-00", running.clients)
    sealed = [share for name, share in zip(neighbours, unpack(packed), strict=True) if name != "silo-04"]
    running.inbox["silo-00"] = answer(running, Phase.SHARES, pack(*unpack(listed)[:4]), pack(*sealed))
    running.collect(Phase.MASKED)
    running.inbox = running.server.advance()
    with pytest.raises(UnknownSilo):
        running.say("silo-00", Phase.SURVIVORS)


def test_a_silo_that_signs_something_else_is_not_taken(running, keys):
    running.until(Phase.MASKED)
    wrong = silo_message(keys["silo-01"], "silo-01", Phase.SURVIVORS, running.agreement.digest, bytes(32))
    with pytest.raises(InconsistentView, match="silo-01"):
        running.server.receive(wrong)
    running.collect(Phase.SURVIVORS)
    with pytest.raises(InconsistentView, match="silo-01"):
        running.clients["silo-00"].reveal(
            answer(running, Phase.SURVIVORS, wrong, *running.sent[Phase.SURVIVORS].values())
        )


def test_shares_that_a_silo_made_up_are_found_before_they_spoil_the_sum(running, keys):
    liar, *_, gone = running.agreement.ring.order  # the first holder's shares are always among those that are combined
    running.gone = {Phase.MASKED: {gone}}
    running.until(Phase.SURVIVORS)
    honest = running.say(liar, Phase.REVEALED)
    pairs = [unpack(pair) for pair in unpack(unpack(honest[HEADER:])[1])]
    body = pack(*(pack(owner, bytes(32)) for owner, _ in pairs))
    running.server.receive(silo_message(keys[liar], liar, Phase.REVEALED, running.agreement.digest, body))
    del running.inbox[liar]
    running.collect(Phase.REVEALED)
    with pytest.raises(ForgedMessage, match="promised"):
        running.server.advance()
    with pytest.raises(EarlyMessage):
        running.server.total()


def test_late_early_repeated_and_unknown_messages_are_named(running, keys, tmp_path):
    first = running.clients["silo-00"].advertise()
    running.server.receive(first)
    with pytest.raises(RepeatedMessage):
        running.server.receive(first)
    digest = running.agreement.digest
    with pytest.raises(EarlyMessage):
        running.server.receive(silo_message(keys["silo-01"], "silo-01", Phase.MASKED, digest, b""))
    (stranger,) = signers(tmp_path, 1).values()
    with pytest.raises(UnknownSilo):
        running.server.receive(silo_message(stranger, "zz", Phase.KEYS, digest, b""))
    for name in ("silo-01", "silo-02"):
        running.server.receive(running.clients[name].advertise())
    running.server.advance()
    with pytest.raises(LateMessage):
        running.server.receive(running.clients["silo-03"].advertise())
    with pytest.raises(UnknownSilo, match="gone before phase 2"):
        running.server.receive(silo_message(keys["silo-03"], "silo-03", Phase.SHARES, digest, b""))


@pytest.mark.parametrize("phase", Phase)
def test_every_truncation_and_every_flipped_byte_of_a_silos_message_is_refused(keys, phase):
    running = SecureSum.of(keys, agreement_of(keys, length=4))
    if phase > Phase.KEYS:
        running.until(Phase(phase - 1))
    message = running.say("silo-00", phase)
    step = max(1, len(message) // 60)
    for position in [*range(HEADER + 20), *range(HEADER + 20, len(message), step)]:
        for wrong in (
            message[:position],
            message[:position] + bytes([message[position] ^ 1]) + message[position + 1 :],
            message + message[: position + 1],
        ):
            with pytest.raises(SecureAggregationError):
                running.server.receive(wrong)
    assert running.server.receive(message) == "silo-00"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from(list(Phase)))
def test_any_bytes_are_refused_by_both_sides(running, body, phase):
    client = running.clients["silo-00"]
    asked = (client.share, client.agree, client.reveal, lambda mail: client.mask(mail, np.zeros(50, np.uint32)))
    for wrong in (body, answer(running, phase, body), running.agreement.digest + body):
        for call in (running.server.receive, *asked):
            with pytest.raises(SecureAggregationError):
                call(wrong)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_bodies_that_a_silo_has_signed_are_still_checked(keys, body):
    running = SecureSum.of(keys, agreement_of(keys, length=4))
    digest = running.agreement.digest
    for phase in Phase:
        wrong = body[:15] if phase is Phase.MASKED else body  # 16 bytes would be a vector
        with pytest.raises((MalformedMessage, InconsistentView)):
            running.server.receive(silo_message(keys["silo-00"], "silo-00", phase, digest, wrong))
        running.collect(phase)
        running.inbox = running.server.advance()
    assert running.server.total().tolist() == running.expected(keys)


def test_another_version_of_the_protocol_is_refused(running):
    message = running.clients["silo-00"].advertise()
    with pytest.raises(UnknownVersion, match="version 2"):
        running.server.receive(message[:4] + b"\x02" + message[5:])


@pytest.mark.parametrize(
    "change", [{"context": b"round 2"}, {"length": 51}, {"colluders": 1, "min_survivors": 4}, {"min_survivors": 4}]
)
def test_whoever_has_other_terms_has_another_sum(keys, change):
    assert agreement_of(keys).digest != agreement_of(keys, **change).digest
