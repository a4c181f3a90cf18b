"""``siloweave silo mandate``: add, list, revoke, and what is said of files that can't be used."""

import json
import os

import pytest
import tomli_w
from mandates import STUDY, terms
from silo_requests import COORDINATOR, silo_toml
from typer.testing import CliRunner

from configs.errors import InputError
from federated.commands.silo import silo_app
from federated.identity.cards import TrustedCoordinator
from federated.identity.trust import trust
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from privacy.mandate import read_mandate


@pytest.fixture
def toml(tmp_path):
    path = silo_toml(tmp_path)
    Ledger.open(tmp_path / "state", "north", "ward", Budget(20.0, 1e-4)).close_file()
    trust(tmp_path / "state", TrustedCoordinator(name="oncology", public_key=COORDINATOR.public_key))
    return path


@pytest.fixture
def write(tmp_path):
    """Writes a mandate's TOML, with changes; None leaves a setting out."""

    def written(**changes):
        given = {**terms().model_dump(mode="json"), **changes}
        path = tmp_path / "mandate.toml"
        path.write_text(tomli_w.dumps({name: value for name, value in given.items() if value is not None}))
        return path

    return written


def silo(toml, *arguments):
    return CliRunner().invoke(silo_app, ["mandate", *map(str, arguments), "-c", str(toml)])


def failed(toml, *arguments):
    error = silo(toml, *arguments).exception
    assert isinstance(error, InputError), error
    assert "\n" not in str(error)
    return str(error)


def files(tmp_path):
    return sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "state" / "mandates").rglob("*.json"))


def test_a_mandate_is_added_listed_and_revoked(toml, tmp_path, write):
    assert "no mandates; none is asked for" in silo(toml, "list").stdout
    path = write(coordinator="oncology")
    path.write_text(path.read_text().replace('"2105-12-31"', "2105-12-31"))  # a date of TOML's own
    added = json.loads(silo(toml, "add", path, "--json").stdout)
    assert added["terms"] == terms().model_dump(mode="json")
    assert files(tmp_path) == [f"state/mandates/{STUDY}.json"]
    stored = (tmp_path / "state" / "mandates" / f"{STUDY}.json").read_bytes()
    assert read_mandate(stored, "test").digest == added["digest"]
    assert json.loads(silo(toml, "list", "--json").stdout) == [added]
    assert f"{STUDY}: in force, until 2105-12-31" in silo(toml, "list").stdout
    assert "has a mandate; revoke it first" in failed(toml, "add", path)
    assert f"{STUDY}: revoked" in silo(toml, "revoke", STUDY).stdout
    (found,) = json.loads(silo(toml, "list", "--json").stdout)
    assert (found["state"], found["digest"]) == ("revoked", added["digest"])
    assert files(tmp_path) == [f"state/mandates/revoked/{added['digest']}.json"]
    assert f"{STUDY!r}: no mandate" in failed(toml, "revoke", STUDY)
    again = json.loads(silo(toml, "add", path, "--json").stdout)
    assert again["digest"] != added["digest"]
    assert [one["state"] for one in json.loads(silo(toml, "list", "--json").stdout)] == ["in force", "revoked"]


def test_nothing_is_answered_once_the_last_mandate_is_revoked(toml, write):
    silo(toml, "add", write())
    silo(toml, "revoke", STUDY)
    assert json.loads(silo(toml, "list", "--json").stdout)[0]["state"] == "revoked"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expires": "2020-01-01"}, "expires is 2020-01-01: that day has passed"),
        ({"expires": "soon"}, "expires is 'soon'"),
        ({"expires": None}, "expires: missing"),
        ({"coordinator": "nobody"}, "coordinator is 'nobody', and no trusted coordinator has this name or key"),
        ({"coordinator": "ab" * 32}, "no trusted coordinator has this name or key (there are oncology)"),
        ({"coordinator": None}, "coordinator is 'None'"),
        ({"coordinator": 3}, "coordinator is '3'"),
        ({"study": "../x"}, "study is '../x'"),
        ({"study": ""}, "study is ''"),
        ({"study": "x" * 101}, "study is "),
        ({"purpose": "two\nlines"}, "give one plain line"),
        ({"purpose": ""}, "purpose is ''"),
        ({"recipients": []}, "recipients is "),
        ({"base_models": ["x"]}, "base_models.0 is 'x'"),
        ({"task": "all"}, "task is 'all'"),
        ({"labels": ["yes"]}, "give two or more"),
        ({"budget_epsilon": -1.0}, "budget_epsilon is -1.0"),
        ({"budget_epsilon": float("nan")}, "budget_epsilon is nan"),
        ({"max_sampling_rate": 1.5}, "max_sampling_rate is 1.5"),
        ({"more": 1}, "more: no such setting"),
    ],
)
def test_what_is_wrong_with_a_mandates_toml_is_said_in_one_line_and_nothing_is_written(
    toml, tmp_path, write, changes, said
):
    path = write(**changes)
    message = failed(toml, "add", path)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert not (tmp_path / "state" / "mandates").exists()


def test_a_file_that_is_none_is_said_so(toml, tmp_path):
    assert "no such file" in failed(toml, "add", tmp_path / "none.toml")
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in failed(toml, "add", tmp_path / "pipe")
    (tmp_path / "bad.toml").write_text("= 3")
    assert "not TOML" in failed(toml, "add", tmp_path / "bad.toml")


def test_a_damaged_file_is_listed_as_such_and_goes_the_same_way(toml, tmp_path, write):
    silo(toml, "add", write())
    path = tmp_path / "state" / "mandates" / f"{STUDY}.json"
    path.write_bytes(path.read_bytes().replace(b"10.0", b"99.0"))
    (found,) = json.loads(silo(toml, "list", "--json").stdout)
    assert "one of its fields was edited" in found["state"]
    assert f"edited; take it away with `siloweave silo mandate revoke {STUDY}`" in failed(toml, "add", write())
    assert silo(toml, "revoke", STUDY).exit_code == 0
    assert silo(toml, "add", write()).exit_code == 0


def test_one_that_has_expired_makes_room_for_another(toml, tmp_path, write, monkeypatch):
    silo(toml, "add", write(expires="2100-01-01"))
    monkeypatch.setattr("time.time", lambda: 4_102_531_200.0)  # the day after
    assert "expired, until 2100-01-01" in silo(toml, "list").stdout
    assert silo(toml, "add", write()).exit_code == 0
    states = [one["state"] for one in json.loads(silo(toml, "list", "--json").stdout)]
    assert states == ["in force", "revoked"]


def test_looking_at_a_silo_that_has_not_started_makes_nothing(tmp_path):
    path = silo_toml(tmp_path)
    assert "no ledger yet" in failed(path, "list")
    assert [found.name for found in tmp_path.iterdir()] == ["silo.toml"]
