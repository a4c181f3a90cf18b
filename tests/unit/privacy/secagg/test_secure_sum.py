"""A secure sum among honest parties: exact, whoever is gone, and failed below the threshold."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secure_sum import SecureSum, agreement_of, signers

from configs.errors import InputError
from privacy.secagg.agreement import Agreement, least_survivors
from privacy.secagg.client import Client
from privacy.secagg.encoding import Encoding
from privacy.secagg.failures import EarlyMessage, LateMessage, OutOfRange, TooFewSilos
from privacy.secagg.messages import Phase
from privacy.secagg.sharing import combine
from privacy.signing import Signer


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return signers(tmp_path_factory.mktemp("keys"), 10)


@pytest.fixture(scope="module")
def many_keys(tmp_path_factory):
    return signers(tmp_path_factory.mktemp("many"), 60)


def first(keys, count):
    return dict(list(keys.items())[:count])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 10), st.sampled_from([16, 32]), st.data())
def test_the_sum_is_exactly_that_of_the_survivors(keys, silos, word_bits, data):
    some = first(keys, silos)
    agreement = agreement_of(some, length=7, encoding=Encoding(1.0, silos, word_bits))
    gone, left = {}, set(some)
    for phase in Phase:
        lost = data.draw(st.sets(st.sampled_from(sorted(left)), max_size=len(left) - agreement.min_survivors))
        left -= lost
        gone[phase] = lost
    running = SecureSum.of(some, agreement, gone, seed=silos)
    after_masking = set(some) - gone[Phase.KEYS] - gone[Phase.SHARES] - gone[Phase.MASKED]
    assert running.total().tolist() == running.expected(after_masking)
    assert running.server.survivors == sorted(after_masking)


@pytest.mark.parametrize("phase", Phase)
def test_below_the_threshold_nothing_is_unmasked(keys, phase):
    running = SecureSum.of(keys, agreement_of(keys, colluders=2, min_survivors=8), {phase: set(list(keys)[:6])})
    with pytest.raises(TooFewSilos):
        running.total()
    with pytest.raises(EarlyMessage):
        running.server.total()
    assert not running.sent[Phase.REVEALED] or phase is Phase.REVEALED


def test_a_silo_too_few_before_the_last_phase_fails_the_round(keys):
    for phase in list(Phase)[:4]:
        running = SecureSum.of(keys, agreement_of(keys, min_survivors=8), {phase: set(list(keys)[:3])})
        with pytest.raises(TooFewSilos, match="7 silos are left, and 8"):
            running.total()


def test_what_comes_while_a_phase_waits_still_counts(keys):
    running = SecureSum.of(keys, agreement_of(keys, min_survivors=8), {Phase.MASKED: set(list(keys)[:3])})
    running.until(Phase.SHARES).collect(Phase.MASKED)
    with pytest.raises(TooFewSilos):
        running.server.advance()
    assert running.server.waiting_for == list(keys)[:3]
    running.server.receive(running.say("silo-01", Phase.MASKED))
    running.inbox = running.server.advance()
    running.collect(Phase.SURVIVORS)
    running.inbox = running.server.advance()
    running.collect(Phase.REVEALED)
    running.server.advance()
    assert running.server.total().tolist() == running.expected(running.server.survivors)
    assert "silo-01" in running.server.survivors and "silo-00" not in running.server.survivors


def test_on_a_sparse_ring_the_sum_is_exact_too(many_keys):
    agreement = agreement_of(many_keys, colluders=1, min_survivors=57, length=3)
    assert agreement.ring.reach and 2 * agreement.ring.reach + 1 < 60
    names = list(many_keys)
    running = SecureSum.of(many_keys, agreement, {Phase.SHARES: {names[4]}, Phase.MASKED: {names[20], names[33]}})
    assert running.total().tolist() == running.expected(running.server.survivors)
    assert len(running.server.survivors) == 57


def test_a_neighbourhood_on_the_ring_that_is_gone_fails_the_round(many_keys):
    agreement = agreement_of(many_keys, colluders=1, min_survivors=40, length=3)
    agreement.__dict__["ring"] = type(agreement.ring)(
        agreement.ring.order, 8, 1
    )  # a ring that is too sparse for 20 gone
    running = SecureSum.of(many_keys, agreement, {Phase.MASKED: set(agreement.ring.order[:8])})
    with pytest.raises(TooFewSilos, match="one part of the ring"):
        running.total()


def test_masked_vectors_are_uniform_whatever_they_cover(keys):
    """Chi-squared over the words' first bytes: 255 degrees of freedom exceed 460 by chance below once in 10^9."""
    some = first(keys, 3)
    agreement = agreement_of(some, length=100_000)
    running = SecureSum.of(some, agreement)
    running.words = {name: np.zeros(100_000, np.uint32) for name in some}
    running.until(Phase.MASKED)
    for name, message in running.sent[Phase.MASKED].items():
        words = np.frombuffer(message[-400_068:-68], np.uint32)  # a signature with its length is last
        for shift in (0, 24):
            counts = np.bincount((words >> shift) & 0xFF, minlength=256)
            assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 460, name


def test_equal_vectors_of_one_silo_look_unrelated_in_every_sum(keys):
    some = first(keys, 3)
    seen = []
    for _ in range(2):
        running = SecureSum.of(some, agreement_of(some))
        running.until(Phase.MASKED)
        seen.append(running.sent[Phase.MASKED]["silo-00"][-268:-68])
    assert seen[0] != seen[1]


def test_colluders_shares_do_not_give_a_silos_seed_or_key(keys):
    """One share below the threshold, the secrets stay out of reach; with one more they don't."""
    agreement = agreement_of(keys, colluders=3)
    running = SecureSum.of(keys, agreement).until(Phase.SHARES)
    for name in running.clients:
        running.say(name, Phase.MASKED)  # now each holds its neighbours' shares
    victim, ring = "silo-09", agreement.ring
    owner = running.clients[victim]
    held = {
        ring.neighbourhood(victim).index(name) + 1: client._held[victim] for name, client in running.clients.items()
    }
    numbers = sorted(held)[: ring.threshold]
    secrets = (owner._seed, owner._mask_key.private_bytes_raw())
    for half, secret in enumerate(secrets):
        assert combine({number: held[number][half] for number in numbers}) == secret
        assert combine({number: held[number][half] for number in numbers[:-1]}) != secret
    assert ring.threshold > agreement.colluders


def test_a_survivor_gives_a_share_of_each_peers_seed_or_key_and_never_both(keys):
    running = SecureSum.of(keys, agreement_of(keys), {Phase.MASKED: {"silo-03"}}).until(Phase.SURVIVORS)
    client = running.clients["silo-00"]
    held = dict(client._held.items())
    message = running.say("silo-00", Phase.REVEALED)
    for name, (of_seed, of_key) in held.items():
        assert (of_seed in message, of_key in message) == (name != "silo-03", name == "silo-03")
    with pytest.raises(LateMessage):
        running.say("silo-00", Phase.REVEALED)


def test_a_vector_that_is_refused_leaves_the_silo_in_its_phase(keys):
    some = first(keys, 4)
    running = SecureSum.of(some, agreement_of(some)).until(Phase.SHARES)
    client, mail = running.clients["silo-00"], running.inbox["silo-00"]
    for wrong in (np.zeros(49, np.uint32), np.zeros(50, np.uint16), np.zeros((50, 1), np.uint32)):
        with pytest.raises(InputError, match="words: give 50"):
            client.mask(mail, wrong)
    with pytest.raises(OutOfRange):
        running.agreement.encoding.encode(np.full(50, 1.5))
    running.collect(Phase.MASKED)
    assert not running.server.waiting_for


def test_phases_out_of_turn_are_named(keys):
    client = SecureSum.of(first(keys, 3), agreement_of(first(keys, 3))).clients["silo-00"]
    with pytest.raises(EarlyMessage):
        client.reveal(b"")
    client.advertise()
    with pytest.raises(LateMessage):
        client.advertise()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_survivors": 4}, "need at least 5"),
        ({"min_survivors": 9}, "no more than"),
        ({"colluders": 7, "min_survivors": 8}, "need at least 9"),
        ({"colluders": -1}, "0 or more"),
        ({"length": 0}, "length"),
        ({"encoding": Encoding(1.0, 7)}, "could wrap"),
        ({"roster": {"a": "0" * 64, "b": "0" * 64}}, "same key"),
        ({"roster": {"a": "ab" * 32, "b": "AB" * 32}}, "the key of b"),
        ({"roster": {"a": "ab" * 32, "b": " ".join(["ab"] * 32)}}, "the key of b"),
    ],
)
def test_an_agreement_that_would_not_be_secure_is_refused(keys, change, message):
    roster = {name: signer.public_key for name, signer in first(keys, 8).items()}
    terms = {"roster": roster, "colluders": 0, "min_survivors": 5, "encoding": Encoding(1.0, 8), "length": 1}
    with pytest.raises(InputError, match=message):
        Agreement(**terms | change, context=b"c")


def test_a_silo_alone_and_a_silo_of_another_key_are_refused(keys, tmp_path):
    with pytest.raises(InputError, match="need at least 2"):
        agreement_of(first(keys, 1), min_survivors=1)
    with pytest.raises(InputError, match="own key"):
        Client("silo-00", Signer(tmp_path / "other.key"), agreement_of(keys))


def test_two_lists_can_never_both_be_signed_by_enough():
    """By trying all sizes: each honest silo signs one list, colluders sign both."""
    for silos in range(2, 40):
        for colluders in range(silos - 1):
            least = least_survivors(silos, colluders)
            honest = silos - colluders
            assert 2 * max(0, least - colluders) > honest and least - colluders >= 2


def test_each_phase_takes_one_message_of_each_silo(keys):
    running = SecureSum.of(keys, agreement_of(keys))
    running.total()
    assert Counter(len(sent) for sent in running.sent.values()) == {10: 5}
