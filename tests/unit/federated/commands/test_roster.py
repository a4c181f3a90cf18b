"""The steward's roster: whose keys are confirmed, and which card is none."""

import json

import pytest
from typer.testing import CliRunner

from configs.errors import InputError
from configs.storage.layout import SiloFiles
from federated.commands.silo import silo_app
from federated.identity.cards import EnrolledSilo, fingerprint, write_document
from federated.identity.trust import confirmed_silos

SOUTH = EnrolledSilo(silo="south", public_key="11" * 32, node_key="ecdsa south")


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "silo.toml"
    path.write_text(
        """[silo]
id = "north"
dataset_id = "ward"
state_dir = "state"
base_model = "model"
public_record_count = 100
[data]
source = "data.jsonl"
[policy]
budget_epsilon = 20.0
budget_delta = 1e-4
"""
    )
    return path


def roster(toml, *arguments):
    return CliRunner().invoke(silo_app, ["roster", "-c", str(toml), *arguments])


def card(folder, document):
    path = folder / f"{document.silo or 'none'}.json".replace("/", "-")
    write_document(path, document)
    return path


def test_a_silo_is_known_once_its_fingerprint_is_confirmed(toml, tmp_path):
    assert "no other silo is known" in roster(toml).stdout
    path, digits = card(tmp_path, SOUTH), fingerprint(SOUTH)
    with pytest.raises(InputError, match=f"its fingerprint is {digits}, not 0000"):
        raise roster(toml, "--add", str(path), "--fingerprint", "0000").exception
    assert confirmed_silos(tmp_path / "state") == {}
    for _ in range(2):
        assert f"south: {digits}" in roster(toml, "--add", str(path), "--fingerprint", digits).stdout
    assert confirmed_silos(tmp_path / "state") == {"south": SOUTH}
    assert SiloFiles(tmp_path / "state").roster.stat().st_mode & 0o777 == 0o700
    assert json.loads(roster(toml, "--json").stdout) == {"south": digits}
    assert "no other silo is known" in roster(toml, "--remove", "south").stdout
    assert confirmed_silos(tmp_path / "state") == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (EnrolledSilo(silo="north", public_key="22" * 32, node_key=""), "'north': is this silo itself"),
        (EnrolledSilo(silo="south", public_key="22" * 32, node_key=""), "'south': is there with other keys"),
        (EnrolledSilo(silo="west", public_key="11" * 32, node_key=""), "'west': has the key of silo 'south'"),
        (EnrolledSilo(silo="..", public_key="33" * 32, node_key=""), ""),
        (EnrolledSilo(silo="../../trusted/x", public_key="44" * 32, node_key=""), ""),
    ],
)
def test_a_card_of_a_name_or_key_that_is_there_is_refused(toml, tmp_path, given, said):
    roster(toml, "--add", str(card(tmp_path, SOUTH)), "--fingerprint", fingerprint(SOUTH))
    (tmp_path / "new").mkdir()
    done = roster(toml, "--add", str(card(tmp_path / "new", given)), "--fingerprint", fingerprint(given))
    known = confirmed_silos(tmp_path / "state")
    if said:
        assert said in str(done.exception)
        assert known == {"south": SOUTH}
    else:
        assert known == {"south": SOUTH, given.silo: given}
        assert len(list((tmp_path / "state" / "roster").iterdir())) == 2  # wherever its name points to


def test_what_makes_no_sense_is_refused_in_a_line(toml, tmp_path):
    (tmp_path / "bad.json").write_text('{"kind": "coordinator"}')
    for arguments, said in (
        (("--add", "x", "--remove", "y"), "one at a time"),
        (("--fingerprint", "00"), "of the silo that --add names"),
        (("--remove", "south"), r"'south': is not in this silo's roster \(there are none\)"),
        (("--remove", "../silo"), "is not in this silo's roster"),
        (("--add", str(tmp_path / "bad.json"), "--fingerprint", "0"), "bad.json"),
        (("--add", str(tmp_path / "none.json"), "--fingerprint", "0"), "can't be read"),
    ):
        with pytest.raises(InputError, match=said):
            raise roster(toml, *arguments).exception
