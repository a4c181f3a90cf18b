"""Who hangs, by what was heard of the ranks: a hang of one stops all others, and a slow copy stops nobody for good."""

import time
from types import SimpleNamespace

import pytest

from cluster.runtime.rank_actor import Beat, News, RankActor
from cluster.runtime.watch import RankFailed, Watch

TIMEOUT_S = 10.0
COMMIT, GATHER, SAVE = Beat(50, 20, "commit"), Beat(51, 20, "gather"), Beat(52, 20, "save")


class Heard:
    """A watch of ranks that are heard when the test says so; none of them runs."""

    def __init__(self, *beats):
        rank = SimpleNamespace(listen=SimpleNamespace(remote=lambda *_: object()))
        places = SimpleNamespace(ranks=[rank] * len(beats))
        self.watch = Watch(places, [object() for _ in beats], TIMEOUT_S, lambda _: None)
        self.now = time.monotonic()
        self.hears(*beats)

    def hears(self, *beats):
        """Every rank answers; a rank whose beat is None does not."""
        for rank, beat in enumerate(beats):
            if beat is not None:
                self.watch._hear(rank, beat, self.now)
        self.watch._check_hang(self.now)

    def hears_for(self, seconds, *beats):
        """The same, once a second."""
        for _ in range(seconds):
            self.now += 1
            self.hears(*beats)


def copying(times):
    return Beat(COMMIT.count, COMMIT.step, COMMIT.phase, times)


def test_nobody_hangs_while_the_copy_that_all_wait_for_moves():
    heard = Heard(COMMIT, COMMIT, COMMIT)
    for second in range(5 * int(TIMEOUT_S)):
        heard.hears_for(1, GATHER, GATHER, copying(second // 4))
    # The others have their whole time for what comes then, in whatever order they are heard.
    heard.hears(None, None, GATHER)
    heard.hears_for(11, GATHER, SAVE, SAVE)
    with pytest.raises(RankFailed, match=r"rank 0 hangs: nothing new for 10 s .* in phase gather of step 20$"):
        heard.hears_for(1, GATHER, SAVE, SAVE)


def test_a_copy_that_stands_still_is_named_though_others_stand_still_for_longer():
    heard = Heard(COMMIT, COMMIT, COMMIT)
    for second in range(20):
        heard.hears_for(1, GATHER, copying(second), GATHER)
    heard.hears_for(10, GATHER, copying(19), GATHER)
    with pytest.raises(RankFailed, match=r"rank 1 hangs: nothing new for 10 s .* in phase commit of step 20$"):
        heard.hears_for(1, GATHER, copying(19), GATHER)


def test_a_copy_that_moves_makes_no_rank_look_ahead_of_its_peers():
    heard = Heard(COMMIT, COMMIT)
    with pytest.raises(RankFailed, match=r"rank 0 hangs: .* in phase commit"):
        heard.hears_for(60, copying(1000), GATHER)


def test_a_rank_that_hangs_beside_a_slow_copy_is_named_once_that_is_done():
    heard = Heard(COMMIT, COMMIT)
    for second in range(30):
        heard.hears_for(1, copying(second), GATHER)  # rank 1 hangs there already
    heard.hears_for(11, SAVE, GATHER)
    with pytest.raises(RankFailed, match=r"rank 1 hangs: .* in phase gather"):
        heard.hears_for(1, SAVE, GATHER)


def test_the_rank_behind_is_the_one_that_hangs_but_for_one_that_does_not_answer():
    heard = Heard(Beat(7, 1, "backward"), Beat(6, 1, "forward"))
    with pytest.raises(RankFailed, match=r"rank 1 hangs: .* in phase forward of step 1$"):
        heard.hears_for(11, Beat(7, 1, "backward"), Beat(6, 1, "forward"))
    heard = Heard(Beat(7, 1, "backward"), Beat(6, 1, "forward"))
    with pytest.raises(RankFailed, match=r"rank 0 hangs: .* in phase backward of step 1, its process does not answer$"):
        heard.hears_for(11, None, Beat(6, 1, "forward"))


def test_saying_that_it_is_alive_is_no_phase():
    actor = RankActor()
    actor._enter(20, "commit")
    actor._alive()
    actor._alive()
    assert actor.listen(0, 0) == News(0, [], Beat(1, 20, "commit", 2))
    actor._enter(20, "gather")
    assert actor.listen(0, 0) == News(0, [], Beat(2, 20, "gather"))


def test_an_event_is_told_until_it_is_known_to_have_come():
    actor = RankActor()
    for step in (1, 2):
        actor._report({"event": "step", "step": step})
    assert [event["step"] for event in actor.listen(0, 0).events] == [1, 2]  # an answer that is lost
    actor._report({"event": "step", "step": 3})
    again = actor.listen(1, 0)
    assert (again.first, [event["step"] for event in again.events]) == (1, [2, 3])
    assert actor.listen(3, 0) == News(3, [], Beat())
    late = actor.listen(1, 0)  # a question that another one has overtaken
    assert late == News(3, [], Beat())


def test_the_driver_reports_an_event_once_in_whatever_order_answers_come():
    heard, reported = Heard(Beat()), []
    heard.watch._report = reported.append
    events = [{"event": "step", "step": step} for step in range(4)]
    for news in (
        News(0, events[:3], Beat()),
        News(0, events[:2], Beat()),
        News(2, events[2:], Beat()),
        News(4, [], Beat()),
    ):
        heard.watch._pass_on(news)
    assert reported == events
