"""The end of a run: what silos have stated stays, whoever is away later, and whatever is lost before the last round."""

import json
import shutil

import pytest
from model_parts import FILES
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import InputError
from configs.events import read_events
from federated.coordinator import round_commits as commits
from privacy.certificate.check import check_certificate


@pytest.mark.parametrize("restarted", [False, True])
def test_a_lost_early_round_costs_neither_the_close_nor_the_certificate(tmp_path, monkeypatch, restarted):
    """Before: budgets were spent, no silo was asked to close, and no certificate could be made."""
    silos, save = [SignedSilo("one"), SignedSilo("two")], commits.save

    def loses(directory, digest, commit, *rest):
        if commit.round_number == 3 and restarted:
            raise KeyboardInterrupt
        save(directory, digest, commit, *rest)
        if commit.round_number == 2:
            shutil.rmtree(directory / "round-00001")
        return commit

    monkeypatch.setattr(commits, "save", loses)
    one = coordinator(InProcess(silos), tmp_path, "federated.rounds=3")
    if restarted:
        with pytest.raises(KeyboardInterrupt):
            one.run(adapter)
        monkeypatch.setattr(commits, "save", save)
        one = coordinator(InProcess(silos), tmp_path, "federated.rounds=3")
    one.run(adapter)
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    assert len(document["model"]["rounds"]) == 3
    assert all("statement" in silo for silo in document["silos"].values())


class Away(InProcess):
    """A grid where some silos have gone home."""

    away = ()

    def get_node_ids(self):
        return [node for node, silo in self.silos.items() if silo.name not in self.away]


OVERRIDES = ("federated.min_silos=1", "federated.round_timeout_s=0.3")


def again(tmp_path, silos, *away):
    """The same command, with some silos away. Returns its certificate."""
    grid = Away(silos)
    grid.away = away
    one = coordinator(grid, tmp_path, *OVERRIDES)
    one.run(adapter)
    document = one.certify_model(FILES)
    check_certificate(json.loads(json.dumps(document)), "test")
    return document


def stated(document):
    return {name: silo["statement"] for name, silo in document["silos"].items() if "statement" in silo}


NAMES = ("one", "two", "three")


@pytest.mark.parametrize("away", [NAMES, ("one",)])
def test_the_same_command_again_loses_no_statement(tmp_path, away):
    """Before: with the silos away it replaced a certificate of the maximum by one of the sum, and said so of seeds."""
    silos = [SignedSilo(name) for name in NAMES]
    first = again(tmp_path, silos)
    assert first["headline"]["rule"].startswith("maximum")
    for _ in range(2):
        later = again(tmp_path, silos, *away)
        assert (later["headline"], later["seeds"]) == (first["headline"], first["seeds"])
        assert all(stated(later)[name] == stated(first)[name] for name in away)


def test_a_kill_before_the_certificate_loses_no_statement(tmp_path):
    silos = [SignedSilo(name) for name in NAMES]
    coordinator(Away(silos), tmp_path, *OVERRIDES).run(adapter)  # and then, for instance, a full disk
    assert set(stated(again(tmp_path, silos, "one"))) == set(NAMES)


def test_one_that_was_away_at_the_end_states_it_later_and_the_others_stay(tmp_path):
    silos = [SignedSilo(name) for name in NAMES]

    def is_silent(_, reply, request):
        return b"" if request.HasField("close") else reply

    silos[0].change = is_silent
    assert set(stated(again(tmp_path, silos))) == {"two", "three"}
    silos[0].change = None
    assert set(stated(again(tmp_path, silos, "two", "three"))) == set(NAMES)
    assert set(stated(again(tmp_path, silos, *NAMES))) == set(NAMES)


def test_a_certificate_of_an_earlier_version_keeps_its_statements(tmp_path):
    """It had committed none of them; so where a commit is damaged, the certificate still has them, too."""
    silos = [SignedSilo(name) for name in NAMES]
    first = again(tmp_path, silos)
    for folder in (tmp_path / "run").glob("closing-*"):
        shutil.rmtree(folder)
    assert stated(again(tmp_path, silos, *NAMES)) == stated(first)
    assert not list((tmp_path / "run").glob("closing-*"))  # nobody has stated anything anew
    second = again(tmp_path, silos)
    (closing,) = (tmp_path / "run").glob("closing-*")
    (closing / commits.SILOS).write_text("{ }")
    assert stated(again(tmp_path, silos, *NAMES)) == stated(second)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert any("closing-00001" in event["message"] for event in events if event["event"] == "damaged")
    shutil.rmtree(closing)
    for content in ("", "[]", "{}"):
        (tmp_path / "run" / "certificate.json").write_text(content)
        with pytest.raises(InputError, match=r"certificate.json: no certificate that can be read"):
            again(tmp_path, silos)


def test_what_another_run_has_left_in_the_folder_is_none_of_this_one(tmp_path):
    silos = [SignedSilo(name) for name in NAMES]
    again(tmp_path, silos)
    for name in ("run.json", "round-00000", "round-00001", "round-00002"):
        path = tmp_path / "run" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert stated(again(tmp_path, [SignedSilo("other")])).keys() == {"other"}


def test_what_was_committed_is_checked_again(tmp_path):
    silos = [SignedSilo(name) for name in NAMES]
    again(tmp_path, silos)
    kept = json.loads((tmp_path / "run" / "closing-00001" / commits.SILOS).read_text())
    run = kept["one"]["receipt"]["run"]
    for values, field in (({"epsilon": 1.0}, "epsilon"), ({"number": 99}, "number"), ({"run": "another"}, "run")):
        kept["one"]["statement"] = silos[0].statement(run, **values).model_dump(mode="json")
        config_digest = json.loads((tmp_path / "run" / "closing-00001" / "COMMITTED").read_text())["config_digest"]
        commits.save_closing(tmp_path / "run", config_digest, kept, run)
        with pytest.raises(InputError, match=rf"closing-0000\d: one.statement.{field} is"):
            again(tmp_path, silos)


def test_a_silo_that_shows_another_ledger_after_its_statement_is_rejected(tmp_path):
    """Else it could spoil the certificate of all at a restart: its receipt would not cover the entry it has stated."""
    silos = [SignedSilo(name) for name in NAMES]
    first = again(tmp_path, silos)

    def rolled_back(silo, reply, request):
        for kind in ("reserved", "closed"):
            if reply.HasField(kind):
                getattr(reply, kind).receipt = silo.receipt(request.run_id, epoch=1, number=2).to_bytes()
        return reply

    silos[0].change = rolled_back
    assert stated(again(tmp_path, silos))["one"] == stated(first)["one"]
    rejected = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "rejected"]
    assert "statement of silo one.number is" in rejected[0]["message"]
