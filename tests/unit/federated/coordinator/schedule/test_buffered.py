"""Buffered rounds: their arithmetic beside a plain loop, kills at every point, replay, and replies that are none."""

import itertools
import os
import shutil
from contextlib import suppress

import numpy as np
import pytest
from clocked_silos import ClockedGrid, KeepingSilo, turn_by
from flwr.app import Message
from hypothesis import HealthCheck, given, settings, strategies
from model_parts import FILES
from signed_silos import adapter, coordinator

from configs.errors import InputError, SiloweaveError
from configs.events import read_events
from configs.storage.layout import ARRIVALS, ARRIVED
from federated.adapters.arrays import from_bytes
from federated.aggregation.server_optimizers import server_step
from federated.coordinator import round_commits as commits
from federated.coordinator.flower_grid import OneByOne
from federated.coordinator.schedule import arrivals as arrivals_module
from federated.coordinator.schedule.mail import TRAIN, Mail
from federated.protocol import silo_pb2 as pb
from federated.transport.flower_messages import pack
from privacy.certificate.check import check_certificate

ROUNDS = 4
NAMES = ("a", "b", "c")


def silos_of(names=NAMES):
    return [KeepingSilo(name, value=number / 4) for number, name in enumerate(names)]


def settings_of(buffer=2, *more, rounds=ROUNDS):
    return ("federated.schedule=buffered", f"federated.buffer={buffer}", f"federated.rounds={rounds}", *more)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """The coordinator is killed here, and never its machine: what it has written is there."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def run(grid, folder, *overrides):
    """A coordinator's run to its end; returns it."""
    with pytest.MonkeyPatch.context() as patch:
        turn_by(grid, patch)
        one = coordinator(grid, folder, "federated.round_timeout_s=10000", *overrides, silos=len(grid.silos))
        one.run(adapter)
    return one


def found_of(folder):
    return commits.all_rounds(folder / "run")


def digests_of(folder):
    return [(found.digests.adapter, found.updates) for found in found_of(folder)]


def events(folder, kind):
    return [event for event in read_events(folder / "run" / "events.jsonl") if event["event"] == kind]


def check_by_plain_loop(folder, silos, config):
    """Every committed model again, from what silos have released, the commits' order and float64 alone."""
    by_name, state, seen = {silo.name: silo for silo in silos}, {}, set()
    start, *steps = found_of(folder)
    before = from_bytes(start.adapter)
    for found in steps:
        total = {name: np.zeros(array.shape) for name, array in before.items()}
        for update in found.updates:
            released, digest = by_name[update.silo].released(update.round)
            assert digest == update.digest
            assert (update.silo, update.round) not in seen
            seen.add((update.silo, update.round))
            staleness = found.round_number - 1 - update.version
            assert 0 <= staleness <= config.max_staleness
            assert update.weight == (1 + staleness) ** -config.staleness_exponent
            for name, array in released.items():
                total[name] += update.weight * array.astype(np.float64)
        after = from_bytes(found.adapter)
        if found.updates:
            mean = {name: (array / len(found.updates)).astype(np.float32) for name, array in total.items()}
            before, state = server_step(config, before, mean, state)
        for name, array in after.items():
            np.testing.assert_allclose(array, before[name], rtol=0, atol=2e-6)
        before = after
    return steps


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ticks=strategies.lists(strategies.integers(1, 12), min_size=1, max_size=4),
    data=strategies.data(),
    aggregation=strategies.sampled_from(["fedavg", "fedavgm", "fedadam"]),
)
def test_each_step_is_what_a_plain_loop_makes_of_its_updates(ticks, data, aggregation, tmp_path_factory):
    folder, buffer = tmp_path_factory.mktemp("run"), data.draw(strategies.integers(1, len(ticks)))
    exponent = data.draw(strategies.sampled_from([0, 0.5, 1]))
    silos = silos_of("abcd"[: len(ticks)])
    more = (f"federated.staleness_exponent={exponent}", f"federated.aggregation={aggregation}")
    one = run(ClockedGrid(silos, ticks), folder, *settings_of(buffer, *more))
    steps = check_by_plain_loop(folder, silos, one.config.federated)
    assert [len(found.updates) for found in steps] == [buffer] * ROUNDS
    assert all(len(silo.kept) <= ROUNDS for silo in silos)  # what each has reserved
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    assert [len(found["updates"]) for found in document["model"]["rounds"]] == [buffer] * ROUNDS


def ticks_to(share, folder, monkeypatch, *overrides):
    """When steps have come so near to what three equal silos learn, one ten times slower; and the run's coordinator."""
    grid, save, found = ClockedGrid([KeepingSilo(name) for name in NAMES], (1, 1, 10)), commits.save, []

    def timed(directory, digest, commit, *rest):
        errors = [np.square(array - 0.5).mean() for array in from_bytes(commit.adapter).values()]
        found.append((grid.now, np.mean(errors)))
        return save(directory, digest, commit, *rest)

    monkeypatch.setattr(commits, "save", timed)
    run(grid, folder, *overrides)
    monkeypatch.setattr(commits, "save", save)
    return next(now for now, error in found if error <= (1 - share) * found[0][1])


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_slow_silo_holds_up_nobody(share, tmp_path, monkeypatch):
    """In ticks, not in seconds: to the same loss, with the same number of steps."""
    synchronous = ticks_to(share, tmp_path / "synchronous", monkeypatch, "federated.rounds=20")
    buffered = ticks_to(share, tmp_path / "buffered", monkeypatch, *settings_of(2, rounds=20))
    assert buffered <= synchronous / 5
    taken = events(tmp_path / "buffered", "round")
    assert max(event["stalest"] for event in taken) > 0
    assert sum(event["updates"].get("c", 0) for event in taken) >= 1  # and it has its say


def test_a_silo_that_has_answered_gets_the_newest_model(tmp_path):
    silos = silos_of()
    run(ClockedGrid(silos, (1, 1, 4)), tmp_path, *settings_of(2))
    for found in found_of(tmp_path)[1:]:
        for update in found.updates:
            if update.silo in ("a", "b"):  # both make a step together, so neither is ever late by more than one
                assert found.round_number - 1 - update.version <= 1


class Killed(BaseException):
    """What no handler of the coordinator's catches: as a kill."""


def points(patch, kill_at):
    """Counts what the coordinator does to its disk and its silos, and dies at one of these."""
    count = itertools.count()

    def dying(what):
        def inner(*arguments, **values):
            if next(count) == kill_at:
                raise Killed
            return what(*arguments, **values)

        return inner

    for where, name in (
        (arrivals_module.Arrivals, "_append"),
        (arrivals_module, "write_sealed"),
        (commits, "save"),
        (Mail, "post"),
    ):
        patch.setattr(where, name, dying(getattr(where, name)))
    return count


def killed_at(folder, kill_at, silos):
    """A run that is killed there, and the same command again over a new grid. Returns whether it came so far."""
    died = False
    with pytest.MonkeyPatch.context() as patch:
        points(patch, kill_at)
        try:
            run(ClockedGrid(silos, (1, 2, 5)), folder, *settings_of(rounds=3))
        except Killed:
            died = True
    one = run(ClockedGrid(silos, (1, 2, 5)), folder, *settings_of(rounds=3))
    return died, one


def test_a_kill_at_any_point_adds_nothing_twice_and_loses_no_spend(tmp_path):
    for kill_at in itertools.count():
        silos, folder = silos_of(), tmp_path / str(kill_at)
        died, one = killed_at(folder, kill_at, silos)
        steps = check_by_plain_loop(folder, silos, one.config.federated)
        assert [len(found.updates) for found in steps] == [2] * 3
        for silo in silos:
            # Whatever was asked again had the same bytes, so no round was charged twice and none refused.
            assert len({digest for _, digest in silo.asked}) == len(silo.kept) <= ROUNDS
        assert not events(folder, "refused") and not events(folder, "rejected")
        check_certificate(one.certify_model(FILES), "test")
        if not died:
            break
    assert kill_at > 20, "the run has more points than that"


def killed_before(number, silos, folder, *overrides):
    """A run that is killed when a step has all its updates and is to be committed."""
    save = commits.save

    def dies(directory, digest, commit, *rest):
        if commit.round_number == number:
            raise Killed
        return save(directory, digest, commit, *rest)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(commits, "save", dies)
        run(ClockedGrid(silos, (1, 2, 5)), folder, *overrides)


def test_what_had_come_before_a_kill_is_added_and_not_asked_for_again(tmp_path):
    silos = silos_of()
    killed_before(2, silos, tmp_path, *settings_of())
    kept = {silo.name: dict(silo.kept) for silo in silos}
    recorded = (tmp_path / "run" / ARRIVALS).read_bytes()
    for silo in silos:
        silo.asked.clear()
    one = run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    assert (tmp_path / "run" / ARRIVALS).read_bytes().startswith(recorded)
    done = {(update.silo, update.round) for update in found_of(tmp_path)[2].updates}
    again = {(silo.name, number) for silo in silos for number, _ in silo.asked}
    assert done and not done & again
    assert all(silo.kept.items() >= kept[silo.name].items() for silo in silos)
    check_by_plain_loop(tmp_path, silos, one.config.federated)


@pytest.mark.parametrize("lost", range(ROUNDS))
@pytest.mark.parametrize("replies", ["kept here", "kept by the silos"])
def test_a_replay_makes_the_same_bytes_in_the_recorded_order(lost, replies, tmp_path):
    """Rounds after some are lost, and made again of the record, at other speeds of the silos than before."""
    silos = silos_of()
    run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    before = digests_of(tmp_path)
    for number in range(lost + 1, ROUNDS + 1):
        shutil.rmtree(tmp_path / "run" / f"round-{number:05d}")
    if replies == "kept by the silos":
        shutil.rmtree(tmp_path / "run" / ARRIVED)
    for silo in silos:
        silo.asked.clear()
    run(ClockedGrid(silos, (7, 3, 1)), tmp_path, *settings_of())
    assert digests_of(tmp_path) == before
    if replies == "kept here" and lost >= ROUNDS - 2:
        assert not any(silo.asked for silo in silos)


def test_a_replay_needs_the_very_same_reply(tmp_path):
    silos = silos_of()
    run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    shutil.rmtree(tmp_path / "run" / ARRIVED)
    shutil.rmtree(tmp_path / "run" / f"round-{ROUNDS:05d}")
    last = found_of(tmp_path)[-1].round_number
    for silo in silos:
        silo.kept.clear()
        silo.value += 1
    with pytest.raises(SiloweaveError, match=f"step {last + 1}: 0 of 1 silos answered"):
        run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    assert "another one than it gave before" in events(tmp_path, "rejected")[-1]["message"]


def test_a_record_that_is_gone_costs_what_has_come_since_the_newest_round_at_most(tmp_path):
    silos = silos_of()
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        points(patch, 20)
        run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    done = digests_of(tmp_path)
    assert 1 < len(done) < ROUNDS
    (tmp_path / "run" / ARRIVALS).unlink()
    one = run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    assert digests_of(tmp_path)[: len(done)] == done
    check_by_plain_loop(tmp_path, silos, one.config.federated)


@pytest.mark.parametrize(
    "damage",
    [
        b"{}x\n",
        b'{"ended": "nobody"}\n',
        b'["asked"]\n',
        b'{"asked": "a", "round": "x", "version": 0}\n',
        b'{"asked": "a", "round": 1, "version": 0}',
    ],
)
def test_a_damaged_record_is_one_clear_line_and_one_that_a_kill_cut_short_is_none(damage, tmp_path):
    silos = silos_of()
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        points(patch, 20)
        run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    path = tmp_path / "run" / ARRIVALS
    path.write_bytes(path.read_bytes() + damage)
    if damage.endswith(b"\n"):
        with pytest.raises(InputError, match=r"arrivals.jsonl") as caught:
            run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
        assert "\n" not in str(caught.value)
    else:
        run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
        assert len(found_of(tmp_path)) == ROUNDS + 1


def test_an_update_that_a_forged_record_has_twice_is_refused(tmp_path):
    silos = silos_of()
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        points(patch, 20)
        run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    path = tmp_path / "run" / ARRIVALS
    arrived = [line for line in path.read_bytes().splitlines(keepends=True) if b"arrived" in line]
    path.write_bytes(path.read_bytes() + arrived[-1])
    with pytest.raises(InputError, match=r"arrivals.jsonl: damaged"):
        run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())


class Hostile(ClockedGrid):
    """A grid that gives more than it was asked for: each reply twice, one to an unknown message, an old one again."""

    def pull_messages(self, message_ids):
        found = list(super().pull_messages(message_ids))
        unasked = Message(pack(b"?"), dst_node_id=1, message_type="train")
        strange = [Message(pack(b"never asked"), reply_to=unasked)] if found else []
        return [*found, *found, *strange]


def test_a_reply_that_comes_twice_or_to_nothing_is_added_once(tmp_path):
    silos = silos_of()
    one = run(Hostile(silos, (1, 2, 5)), tmp_path, *settings_of())
    check_by_plain_loop(tmp_path, silos, one.config.federated)
    assert [len(found.updates) for found in found_of(tmp_path)[1:]] == [2] * ROUNDS


def test_a_reply_of_another_version_another_silo_or_a_stranger_is_rejected(tmp_path):
    """``b`` sends its first answer for every round, ``c`` what ``a`` has answered; the others' steps go on."""
    a, b, c, _ = silos = silos_of("abcd")
    first = []

    def old(silo, reply, request):
        if not request.HasField("train"):
            return reply
        if not first:
            first.append(reply.SerializeToString())
            return reply
        return type(reply).FromString(first[0])

    b.change = old
    c.change = lambda _, reply, request: a.kept[1][1] if request.HasField("train") and a.kept else reply
    one = run(ClockedGrid(silos, (1, 1, 2, 2)), tmp_path, *settings_of(2))
    check_by_plain_loop(tmp_path, silos, one.config.federated)
    used = [(update.silo, update.round) for found in found_of(tmp_path) for update in found.updates]
    assert [number for silo, number in used if silo == "b"] == [1]
    assert not [number for silo, number in used if silo == "c"]
    said = {event["silo"]: event["message"] for event in events(tmp_path, "rejected")}
    assert "not to this request" in said["b"] and "not to this request" in said["c"]
    check_certificate(one.certify_model(FILES), "test")


def test_a_silo_past_its_deadline_is_given_up_and_its_late_update_is_in_no_step(tmp_path):
    silos = silos_of()
    grid = ClockedGrid(silos, (2, 2, 9))
    one = run(grid, tmp_path, *settings_of(2, "federated.deadlines_s={c=4}"))
    used = [update.silo for found in found_of(tmp_path) for update in found.updates]
    assert set(used) == {"a", "b"}
    assert {silo for event in events(tmp_path, "timeout") for silo in event["silos"]} == {"c"}
    assert silos[2].kept or not silos[2].asked  # whatever it has done is its own ledger's
    check_by_plain_loop(tmp_path, silos, one.config.federated)


def test_a_reply_that_came_in_time_is_not_late_however_long_others_are_waited_for_meanwhile(tmp_path, monkeypatch):
    """It comes while a new silo is asked what it reserves, and that takes until the deadline is over."""
    silos = silos_of("ab")
    grid = ClockedGrid(silos, (2, 9))
    turn_by(grid, monkeypatch)
    one = coordinator(grid, tmp_path, *settings_of(1, "federated.round_timeout_s=5"), silos=2)
    one._meet(2, 0)
    post, nodes = one.exchange.mail, one.exchange.nodes
    for silo in ("a", "b"):
        post.post(nodes[silo], one.exchange.body(f"round-{silo}", silo, close=pb.Close()), b"", "1")
    query = one.exchange.body("describe", describe=pb.Describe())
    grid.ticks[nodes["b"]] = 20
    list(post.send([(nodes["b"], query, b"")], TRAIN, "other", None))
    assert grid.now >= 5
    assert [posted.silo for posted in post.overdue("1")] == ["b"]
    assert [posted.silo for posted, _ in post.landed()] == ["a"]


def test_an_update_of_too_old_a_model_is_dropped_said_and_stays_charged(tmp_path):
    silos = silos_of()
    one = run(ClockedGrid(silos, (1, 1, 6)), tmp_path, *settings_of(2, "federated.max_staleness=1", rounds=12))
    used = [update.silo for found in found_of(tmp_path) for update in found.updates]
    dropped = events(tmp_path, "rejected")
    assert "c" not in used and {event["silo"] for event in dropped} == {"c"}
    assert "from the model of" in dropped[0]["message"] and "stays charged" in dropped[0]["message"]
    check_by_plain_loop(tmp_path, silos, one.config.federated)


def test_a_step_needs_min_silos_different_ones_and_those_that_it_has_spend_no_round_meanwhile(tmp_path):
    silos = silos_of()
    one = run(ClockedGrid(silos, (1, 1, 10)), tmp_path, *settings_of(3, "federated.min_silos=3"))
    steps = check_by_plain_loop(tmp_path, silos, one.config.federated)
    assert all({update.silo for update in found.updates} == set(NAMES) for found in steps)
    assert [len(silo.kept) for silo in silos] <= [ROUNDS] * 3


def test_a_run_whose_silos_have_given_all_their_rounds_ends(tmp_path):
    """One silo's replies are all spoilt: what the others have to give is not enough for every step."""
    silos = silos_of()
    silos[2].change = lambda _, reply, request: b"spoilt" if request.HasField("train") else reply
    one = run(ClockedGrid(silos, (1, 1, 1)), tmp_path, *settings_of(3))
    sizes = [len(found.updates) for found in found_of(tmp_path)[1:]]
    assert sum(sizes) == 2 * ROUNDS and len(sizes) == ROUNDS
    assert all(len(silo.kept) <= ROUNDS for silo in silos)
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    assert any("changes nothing" in event["message"] for event in events(tmp_path, "unused")) or min(sizes) > 0


def test_a_step_that_had_to_do_with_less_is_made_again_of_just_that(tmp_path):
    """In the first step all silos but one fail, and that one fails then, too; nobody is left to be asked."""
    silos, failing = silos_of(), {("a", 2), ("b", 1), ("c", 1)}

    def fails(silo, reply, request):
        return b"spoilt" if request.HasField("train") and (silo.name, request.train.round) in failing else reply

    for silo in silos:
        silo.change = fails
    killed_before(3, silos, tmp_path, *settings_of(2, rounds=6))
    before = digests_of(tmp_path)
    assert [(up.silo, up.round) for up in before[1][1]] == [("a", 1)]
    for number in (1, 2):
        shutil.rmtree(tmp_path / "run" / f"round-{number:05d}")
    run(ClockedGrid(silos, (3, 1, 1)), tmp_path, *settings_of(2, rounds=6))
    assert digests_of(tmp_path)[:3] == before


def test_with_nobody_there_it_ends_and_the_same_command_goes_on(tmp_path):
    silos = silos_of()
    for silo in silos:
        silo.change = lambda _, reply, request: b"spoilt" if request.HasField("train") else reply
    with pytest.raises(SiloweaveError, match=r"step 1: 0 of 3 silos answered, federated.min_silos is 1"):
        run(ClockedGrid(silos, (1, 1, 1)), tmp_path, *settings_of(2, rounds=6))
    for silo in silos:
        silo.change = None
    one = run(ClockedGrid(silos, (1, 1, 1)), tmp_path, *settings_of(2, rounds=6))
    check_by_plain_loop(tmp_path, silos, one.config.federated)
    assert len(found_of(tmp_path)) == 7


def test_a_buffer_that_the_silos_cannot_fill_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"federated.buffer is 4: there are 3 silos") as caught:
        run(ClockedGrid(silos_of(), (1, 1, 1)), tmp_path, *settings_of(4))
    assert "\n" not in str(caught.value)


def test_over_a_grid_that_takes_replies_one_by_one_it_is_the_same(tmp_path):
    """As over Flower: what is asked for is pulled by threads, and dropped once nobody waits for it."""
    silos = silos_of()
    grid = ClockedGrid(silos, (1, 2, 5))
    with pytest.MonkeyPatch.context() as patch:
        turn_by(grid, patch)
        given = ("federated.round_timeout_s=10000", *settings_of())
        one = coordinator(OneByOne(grid), tmp_path, *given, silos=3)
        one.run(adapter)
    steps = check_by_plain_loop(tmp_path, silos, one.config.federated)
    assert [len(found.updates) for found in steps] == [2] * ROUNDS
    check_certificate(one.certify_model(FILES), "test")


def test_an_encrypted_run_keeps_replies_encrypted(tmp_path, monkeypatch):
    monkeypatch.setenv("SILOWEAVE_ENCRYPTION_KEY", bytes(range(7, 39)).hex())
    silos = silos_of()
    run(ClockedGrid(silos, (1, 2, 5)), tmp_path, *settings_of())
    kept = list((tmp_path / "run" / ARRIVED).iterdir())
    assert kept and all(b"base_model" not in path.read_bytes() for path in kept)
    before = digests_of_encrypted(tmp_path)
    shutil.rmtree(tmp_path / "run" / f"round-{ROUNDS:05d}")
    run(ClockedGrid(silos, (5, 2, 1)), tmp_path, *settings_of())
    assert digests_of_encrypted(tmp_path) == before


def digests_of_encrypted(folder):
    from configs.storage.sealing import load_key

    return [found.digests for found in commits.all_rounds(folder / "run", load_key("env:"))]
