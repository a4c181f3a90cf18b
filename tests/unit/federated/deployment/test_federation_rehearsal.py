"""What a rehearsal comes to: its exit status, its prediction, its lines."""

import pytest

from configs.errors import InputError
from configs.findings import Finding
from configs.load import load
from federated.coordinator.rehearsal.verdict import Prediction, Site, away
from federated.coordinator.schedule.mail import pause_s
from federated.deployment.federation_rehearsal import Rehearsed, rehearse

GOOD = Finding("disk", ok=True, found="room")
REFUSED = Finding("policy, labels", ok=False, found="labels: asked a, allowed b", fix="agree on them")
BROKEN = Finding("clock", ok=False, found="400 s behind", fix="set it")


def site(name, finding=GOOD, seconds=1.0, *, required=True):
    predicted = Prediction(0.0, 0.0, 0.0, seconds, 0.0, 7.0, 1, 100, 50) if finding.ok else None
    return Site(name, required, [finding], predicted)


def found(*sites, coordinator=(), overrides=()):
    return Rehearsed(list(coordinator), list(sites), load("tiny", ["federated.rounds=3", *overrides]))


@pytest.mark.parametrize(
    ("rehearsed", "status"),
    [
        (found(site("a"), site("b")), 0),
        (found(site("a"), site("b", REFUSED)), 3),
        (found(site("a"), site("b", BROKEN)), 1),
        (found(site("a", BROKEN), site("b", REFUSED)), 3),
        (found(site("a"), site("b", REFUSED, required=False)), 0),
        (found(site("a"), site("b", BROKEN, required=False), overrides=["federated.min_silos=2"]), 1),
        (found(site("a"), away("b", required=True, reason="")), 1),
        (found(site("a"), away("b", required=True, reason="silo b refuses: coordinator: asked x, allowed y")), 3),
        (found(site("a"), coordinator=[BROKEN]), 1),
    ],
)
def test_its_exit_status(rehearsed, status):
    assert (rehearsed.exit_status, rehearsed.go) == (status, status == 0)
    document = rehearsed.document()
    assert (document["exit_status"], document["go"]) == (status, status == 0)
    assert rehearsed.lines()[-1].split(":")[0] == ("NO-GO" if status else "GO")


def test_a_round_waits_for_the_slowest_site_that_it_waits_for():
    sites = site("a", seconds=5.0), site("b", seconds=2.0), site("c", BROKEN, required=False)
    slowest = 5.0 + pause_s(5.0) / 2  # on average it is seen so much later
    assert found(*sites).round_seconds == slowest
    assert found(*sites, overrides=["federated.enough_silos=1"]).round_seconds == 2.0 + pause_s(2.0) / 2
    document = found(*sites).document()
    assert document["round"] == {"seconds": slowest, "bytes": 300}
    assert document["run"] == {"rounds": 3, "seconds": 7.0 + 3 * slowest, "bytes": 900}
    assert found(site("c", BROKEN)).document()["run"]["seconds"] is None


def test_what_has_to_be_mended_stands_below_its_site():
    lines = found(site("a"), site("b", REFUSED, required=False), coordinator=[BROKEN]).lines()
    assert lines[:3] == [
        "GO    a  disk: room",
        "NO-GO b (not required)",
        "      FIX policy, labels: labels: asked a, allowed b; agree on them",
    ]
    assert "(coordinator)  FIX clock: 400 s behind; set it" in lines


def test_runs_with_clients_as_units_are_not_rehearsed():
    clients = ["privacy.unit=client", "privacy.num_clients=10", "evaluate.without_dp=false"]
    with pytest.raises(InputError, match="a rehearsal is of runs with records as units"):
        rehearse(None, load("tiny", clients), [])
